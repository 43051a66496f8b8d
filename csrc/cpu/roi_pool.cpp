// Region pooling by the largest value in each bin of each box of an image, for each channel.
//
// Parallel over blocks of planes, which are an image's channels. On chip: a block of planes stays in L2 while the
// image's boxes pass; a box's bins, made once, serve the planes of the block. Bytes: each plane is read once, and each
// bin and its place written once; backward reads both and writes each plane. Backward adds the boxes to a plane in
// their order, in the thread that owns it, so there are no atomics and the result does not depend on the threads.
// Ragged edges: bins are cut to the map, and those that nothing is left of are 0.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/roi.h"
#include "cpu/simd/roi_pool.h"

namespace pymm {
namespace {

constexpr const char* kOp = "roi_pool";
constexpr double kFarthest = 0x1p40;  // a corner of a box, in pixels of the map
constexpr int64_t kRegister = 64;     // bytes, of the widest instruction set

// The bins of the boxes of a call, in the order of their images.
class Boxes {
 public:
  Boxes(const Tensor& boxes, int64_t bins_h, int64_t bins_w, double scale, int64_t images, int64_t height,
        int64_t width)
      : given_(boxes, images, kOp), bins_h_(bins_h), bins_w_(bins_w) {
    edges_.reserve(given_.index.size() * static_cast<size_t>(2 * (bins_h + bins_w)));
    for (const int64_t k : given_.index) add(given_.values.data() + k * 5, scale, height, width);
    for (size_t i = 0; i < boxes_.size(); ++i) {
      RoiPoolBox& box = boxes_[i];
      box.top = edges_.data() + static_cast<int64_t>(i) * 2 * (bins_h + bins_w);
      box.bottom = box.top + bins_h;
      box.left = box.bottom + bins_h;
      box.right = box.left + bins_w;
    }
  }

  int64_t most_columns() const { return most_columns_; }

  // f(box, its index in the call) for each box of an image, in order.
  template <class F>
  void each(int64_t image, F&& f) const {
    const size_t end = static_cast<size_t>(given_.start[static_cast<size_t>(image) + 1]);
    for (size_t i = static_cast<size_t>(given_.start[static_cast<size_t>(image)]); i < end; ++i) {
      f(boxes_[i], given_.index[i]);
    }
  }

 private:
  void add(const double* values, double scale, int64_t height, int64_t width) {
    double corner[4];
    bool finite = true;
    for (int i = 0; i < 4; ++i) {
      corner[i] = values[i + 1] * scale;
      finite = finite && std::isfinite(corner[i]);
      corner[i] = std::round(std::clamp(corner[i], -kFarthest, kFarthest));
    }
    const size_t rows = edges_.size();
    add_edges(corner[1], corner[3], bins_h_, finite ? height : 0);
    const size_t columns = edges_.size();
    add_edges(corner[0], corner[2], bins_w_, finite ? width : 0);
    RoiPoolBox box{};
    box.bins_h = bins_h_;
    box.bins_w = bins_w_;
    // Edges ascend: the first bin's are the lowest and the last bin's the highest.
    const int32_t low = edges_[columns], high = edges_.back();
    box.x = low;
    box.span = edges_[rows] < edges_[columns - 1] ? max_of(0, high - low) : 0;
    for (size_t i = columns; i < edges_.size(); ++i) edges_[i] -= low;
    most_columns_ = max_of(most_columns_, box.span);
    boxes_.push_back(box);
  }

  // First pixels, and those after the last, of the bins of one axis.
  void add_edges(double start, double end, int64_t bins, int64_t length) {
    const double size = std::max(end - start + 1, 1.0) / static_cast<double>(bins), limit = static_cast<double>(length);
    const auto inside = [&](double x) { return static_cast<int32_t>(std::clamp(x + start, 0.0, limit)); };
    for (int64_t bin = 0; bin < bins; ++bin) edges_.push_back(inside(std::floor(static_cast<double>(bin) * size)));
    for (int64_t bin = 0; bin < bins; ++bin) edges_.push_back(inside(std::ceil(static_cast<double>(bin + 1) * size)));
  }

  BoxRows<double> given_;
  int64_t bins_h_, bins_w_, most_columns_ = 0;
  std::vector<int32_t> edges_;  // of each box: top, bottom, left, right
  std::vector<RoiPoolBox> boxes_;
};

void check_map(int64_t height, int64_t width) {
  PYMM_CHECK(height * width <= std::numeric_limits<int32_t>::max(), kOp, ": features must have H W below 2**31");
}

std::tuple<Tensor, Tensor> forward(const Tensor& features_in, const Tensor& boxes_in, int64_t bins_h, int64_t bins_w,
                                   double scale) {
  check_regions(features_in, boxes_in, bins_h, bins_w, kOp);
  const int64_t count = boxes_in.size(0), channels = features_in.size(1);
  Tensor out = empty({count, channels, bins_h, bins_w}, features_in);
  Tensor argmax = empty({count, channels, bins_h, bins_w}, features_in, ScalarType::Int);
  if (out.numel() == 0) return {out, argmax};
  const Tensor features = dense(features_in), boxes = dense(boxes_in);
  const int64_t images = features.size(0), height = features.size(2), width = features.size(3);
  check_map(height, width);
  const DType dtype = pymm::dtype_of(features, kOp);
  const Boxes all(boxes, bins_h, bins_w, scale, images, height, width);
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    const RoiPool& loops = roi_pool_for(dtype);
    const int64_t area = height * width, bins = bins_h * bins_w;
    const int64_t scratch_bytes = 2 * (all.most_columns() * static_cast<int64_t>(sizeof(Acc)) + kRegister);
    const int64_t plane_bytes = area * static_cast<int64_t>(sizeof(T));
    each_plane_block(images, channels, plane_bytes, [&](int64_t image, int64_t first, int64_t n) {
      const Scratch scratch(scratch_bytes);
      const T* planes = data<T>(features) + (image * channels + first) * area;
      all.each(image, [&](const RoiPoolBox& box, int64_t k) {
        const int64_t at = (k * channels + first) * bins;
        for (int64_t c = 0; c < n; ++c) {
          loops.forward(&box, planes + c * area, width, scratch.as<Acc>(), data<T>(out) + at + c * bins,
                        data<int32_t>(argmax) + at + c * bins);
        }
      });
    });
  });
  return {out, argmax};
}

Tensor backward(const Tensor& dout_in, const Tensor& boxes_in, const Tensor& argmax_in, int64_t images, int64_t height,
                int64_t width) {
  PYMM_CHECK(dout_in.dim() == 4 && argmax_in.dim() == 4 && dout_in.size(0) == boxes_in.size(0) &&
                 argmax_in.numel() == dout_in.numel() && argmax_in.scalar_type() == ScalarType::Int,
             kOp, ": dout and argmax must be (K, C, h, w), argmax int32");
  const int64_t channels = dout_in.size(1), bins = dout_in.size(2) * dout_in.size(3);
  check_regions(dout_in, boxes_in, dout_in.size(2), dout_in.size(3), kOp);
  check_map(height, width);
  Tensor grad = empty({images, channels, height, width}, dout_in);
  if (grad.numel() == 0) return grad;
  const Tensor dout = dense(dout_in), boxes = dense(boxes_in), argmax = dense(argmax_in);
  const int64_t area = height * width;
  const int32_t* places = data<int32_t>(argmax);
  PYMM_CHECK(std::all_of(places, places + argmax.numel(), [&](int32_t at) { return at < area; }), kOp,
             ": argmax must be places of the map");
  const DType dtype = pymm::dtype_of(dout, kOp);
  const BoxRows<double> given(boxes, images, kOp);
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    constexpr bool direct = std::is_same_v<T, Acc>;
    const RoiPool& loops = roi_pool_for(dtype);
    const int64_t plane_bytes = area * static_cast<int64_t>(sizeof(Acc));
    each_plane_block(images, channels, plane_bytes, [&](int64_t image, int64_t first, int64_t n) {
      T* target = data<T>(grad) + (image * channels + first) * area;
      const Scratch scratch(direct ? 0 : n * plane_bytes);
      Acc* planes = scratch.as<Acc>();
      if constexpr (direct) planes = target;
      std::fill_n(planes, n * area, Acc{0});
      const int64_t end = given.start[static_cast<size_t>(image) + 1];
      for (int64_t i = given.start[static_cast<size_t>(image)]; i < end; ++i) {
        const int64_t at = (given.index[static_cast<size_t>(i)] * channels + first) * bins;
        for (int64_t c = 0; c < n; ++c) {
          loops.backward(data<T>(dout) + at + c * bins, places + at + c * bins, bins, planes + c * area);
        }
      }
      if constexpr (!direct) rows_for(dtype).narrow(planes, 1, n * area, target);
    });
  });
  return grad;
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("roi_pool", TORCH_BOX(&pymm::forward));
  m.impl("roi_pool_backward", TORCH_BOX(&pymm::backward));
}

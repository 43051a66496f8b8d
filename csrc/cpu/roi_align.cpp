// Region pooling by bilinear samples: out_k = Y_k F_n X_k^T for each box k of image n and each channel.
//
// Parallel over blocks of planes, which are an image's channels. On chip: a block of planes stays in L2 while the
// image's boxes pass; a box's weights, made once, serve the planes of the block. Bytes: each plane is read once and
// each bin written once, and backward the other way round. Features whose channels are neighbours in memory are read as
// they lie, box by box, in parallel over the boxes; a pixel is read for every box that it is in. Backward adds the
// boxes to a plane in their order, in the thread that owns it, so there are no atomics and the result does not depend
// on the threads. Ragged edges: spans of columns are whole registers wherever the plane is as wide as one.
#include <algorithm>
#include <cmath>

#include "cpu/roi.h"
#include "cpu/simd/roi_align.h"

namespace pymm {
namespace {

constexpr const char* kOp = "roi_align";
constexpr int64_t kRegister = 64;  // bytes, of the widest instruction set

struct Options {
  int64_t bins_h, bins_w;
  double scale;
  int64_t sampling;
  bool aligned;
};

struct Tap {
  int64_t bin;
  int32_t at;
  double weight;
};

// The taps of the bins of one axis: sample i of bin b is at start + b size + (i + 1/2) size / grid, and counts 1 /
// grid. In double for every type: a float's place in a plane of 200 columns is known to 1e-5, and so is its weight. The
// order of the operations is torchvision's, so that samples fall on the same side of every border.
void add_taps(double start, double extent, int64_t bins, int64_t sampling, int64_t length, std::vector<Tap>& taps) {
  taps.clear();
  const double size = extent / static_cast<double>(bins);
  const double samples = sampling > 0 ? static_cast<double>(sampling) : std::ceil(size);
  if (!(samples > 0) || !std::isfinite(samples) || !std::isfinite(start)) return;
  const double step = size / samples;
  for (int64_t bin = 0; bin < bins; ++bin) {
    const double origin = start + static_cast<double>(bin) * size;
    double from = 0, to = samples;
    if (sampling <= 0) {  // of a box far larger than the plane, only the samples that may be inside
      from = std::max(0.0, std::floor((-1 - origin) / step) - 2);
      to = std::min(samples, std::ceil((static_cast<double>(length) - origin) / step) + 2);
    }
    const size_t first = taps.size();
    const auto add = [&](int64_t at, double weight) {
      const size_t begin = std::max(first, taps.size() < 2 ? 0 : taps.size() - 2);
      for (size_t t = begin; t < taps.size(); ++t) {
        if (taps[t].at == at) {
          taps[t].weight += weight;
          return;
        }
      }
      taps.push_back({bin, static_cast<int32_t>(at), weight});
    };
    for (double i = from; i < to; ++i) {
      double x = origin + (i + 0.5) * size / samples;
      if (!(x >= -1 && x <= static_cast<double>(length))) continue;
      x = std::max(x, 0.0);
      int64_t low = static_cast<int64_t>(x);
      const double part = low >= length - 1 ? 0 : x - static_cast<double>(low);
      low = std::min(low, length - 1);
      add(low, (1 - part) / samples);
      if (part > 0) add(low + 1, part / samples);
    }
  }
}

// The boxes of a call, in the order of their images.
template <class Acc>
class Boxes {
 public:
  Boxes(const Tensor& boxes, const Options& o, int64_t images, int64_t height, int64_t width, bool backward)
      : given_(boxes, images, kOp), height_(height), width_(width) {
    for (const int64_t k : given_.index) add(given_.values.data() + k * 5, o, backward);
    weights_.resize(weights_.size() + kRegister / sizeof(Acc));
    for (size_t i = 0; i < boxes_.size(); ++i) {
      boxes_[i].first_tap = ints_.data() + places_[i].first_tap;
      boxes_[i].tap_row = ints_.data() + places_[i].tap_row;
      boxes_[i].tap_weight = weights_.data() + places_[i].tap_weight;
      boxes_[i].column = ints_.data() + places_[i].column;
      boxes_[i].by_column = boxes_[i].by_bin = weights_.data() + places_[i].matrix;
    }
  }

  int64_t most_rows() const { return most_rows_; }  // accumulators that forward needs for its rows of bins

  int64_t most_columns() const { return most_columns_; }  // of a box, that have a weight

  // f(box, its index in the call, its image) for boxes [begin, end) of the order.
  template <class F>
  void some(int64_t begin, int64_t end, F&& f) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = given_.index[static_cast<size_t>(i)];
      f(boxes_[static_cast<size_t>(i)], k, static_cast<int64_t>(given_.values[static_cast<size_t>(k * 5)]));
    }
  }

  // f(box, its index in the call) for each box of an image, in order.
  template <class F>
  void each(int64_t image, F&& f) const {
    const size_t end = static_cast<size_t>(given_.start[static_cast<size_t>(image) + 1]);
    for (size_t i = static_cast<size_t>(given_.start[static_cast<size_t>(image)]); i < end; ++i) {
      f(boxes_[i], given_.index[i]);
    }
  }

 private:
  struct Place {
    size_t first_tap, tap_row, tap_weight, column, matrix;
  };

  void add(const double* values, const Options& o, bool backward) {
    const double shift = o.aligned ? 0.5 : 0;
    const double x = values[1] * o.scale - shift, y = values[2] * o.scale - shift;
    double w = values[3] * o.scale - shift - x, h = values[4] * o.scale - shift - y;
    if (!o.aligned) {
      w = std::max(w, 1.0);
      h = std::max(h, 1.0);
    }
    add_taps(y, h, o.bins_h, o.sampling, height_, rows_);
    add_taps(x, w, o.bins_w, o.sampling, width_, columns_);
    if (columns_.empty() || !std::isfinite(w) || !std::isfinite(h)) rows_.clear();
    if (rows_.empty()) columns_.clear();

    Place place{ints_.size(), 0, weights_.size(), 0, 0};
    RoiBox<Acc> box{};
    box.bins_h = o.bins_h;
    box.bins_w = o.bins_w;
    ints_.push_back(0);
    for (int64_t bin = 0, t = 0; bin < o.bins_h; ++bin) {
      while (t < static_cast<int64_t>(rows_.size()) && rows_[static_cast<size_t>(t)].bin == bin) ++t;
      ints_.push_back(static_cast<int32_t>(t));
    }
    place.tap_row = ints_.size();
    for (const Tap& t : rows_) {
      ints_.push_back(t.at);
      weights_.push_back(static_cast<Acc>(t.weight));
    }
    place.column = ints_.size();
    place.matrix = weights_.size();
    if (!columns_.empty()) matrix(box, backward);
    most_rows_ = max_of(most_rows_, box.bins_h * box.span);
    most_columns_ = max_of(most_columns_, box.columns);
    boxes_.push_back(box);
    places_.push_back(place);
  }

  // X, by columns that have a weight or by bins.
  void matrix(RoiBox<Acc>& box, bool backward) {
    int64_t low = width_, high = 0;
    for (const Tap& t : columns_) {
      low = min_of(low, t.at);
      high = max_of(high, t.at + 1);
    }
    box.span = min_of(width_, round_up(high - low, kRegister / static_cast<int64_t>(sizeof(Acc))));
    box.x = min_of(low, width_ - box.span);
    const size_t base = weights_.size();
    if (backward) {
      weights_.resize(base + static_cast<size_t>(box.bins_w * box.span));
      for (const Tap& t : columns_)
        weights_[base + static_cast<size_t>(t.bin * box.span + t.at - box.x)] += static_cast<Acc>(t.weight);
      return;
    }
    std::vector<int32_t> place(static_cast<size_t>(box.span), -1);
    for (const Tap& t : columns_) place[static_cast<size_t>(t.at - box.x)] = 0;
    for (int64_t c = 0; c < box.span; ++c) {
      if (place[static_cast<size_t>(c)] < 0) continue;
      place[static_cast<size_t>(c)] = static_cast<int32_t>(box.columns++);
      ints_.push_back(static_cast<int32_t>(c));
    }
    weights_.resize(base + static_cast<size_t>(box.columns * box.bins_w));
    for (const Tap& t : columns_) {
      weights_[base + static_cast<size_t>(place[static_cast<size_t>(t.at - box.x)] * box.bins_w + t.bin)] +=
          static_cast<Acc>(t.weight);
    }
  }

  BoxRows<double> given_;
  int64_t height_, width_, most_rows_ = 0, most_columns_ = 0;
  std::vector<Tap> rows_, columns_;
  std::vector<int32_t> ints_;
  std::vector<Acc> weights_;
  std::vector<RoiBox<Acc>> boxes_;
  std::vector<Place> places_;
};

// Whether the channels of a pixel are neighbours, as in channels_last, and its pixels are not.
bool channels_last(const Tensor& features) { return features.stride(1) == 1 && !features.is_contiguous(); }

// Reads the features as they lie. Parallel over boxes, which share nothing that is written.
template <class T>
void forward_last(const Boxes<Accumulator<T>>& all, const Tensor& features, int64_t count, const Options& o,
                  const Tensor& out) {
  const RoiAlign& loops = roi_align_for(pymm::dtype_of(features, kOp));
  const int64_t channels = features.size(1), bins = o.bins_h * o.bins_w;
  const int64_t image_stride = features.stride(0), row_stride = features.stride(2), pixel_stride = features.stride(3);
  parallel_ranges(count, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch((all.most_columns() + bins) * kRegister);
    all.some(begin, end, [&](const RoiBox<Accumulator<T>>& box, int64_t k, int64_t image) {
      loops.forward_last(&box, data<T>(features) + image * image_stride, row_stride, pixel_stride, channels,
                         scratch.as<char>(), data<T>(out) + k * channels * bins);
    });
  });
}

Tensor forward(const Tensor& features_in, const Tensor& boxes_in, int64_t bins_h, int64_t bins_w, double scale,
               int64_t sampling, bool aligned) {
  const Options o{bins_h, bins_w, scale, sampling, aligned};
  check_regions(features_in, boxes_in, bins_h, bins_w, kOp);
  const int64_t count = boxes_in.size(0), channels = features_in.size(1);
  Tensor out = empty({count, channels, bins_h, bins_w}, features_in);
  if (out.numel() == 0) return out;
  const bool last = channels_last(features_in);
  const Tensor features = last ? features_in : dense(features_in), boxes = dense(boxes_in);
  const int64_t images = features.size(0), height = features.size(2), width = features.size(3);
  const DType dtype = pymm::dtype_of(features, kOp);
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    const Boxes<Acc> all(boxes, o, images, height, width, false);
    if (last) return forward_last<T>(all, features, count, o, out);
    const RoiAlign& loops = roi_align_for(dtype);
    const int64_t area = height * width, bins = bins_h * bins_w;
    each_plane_block(images, channels, area * static_cast<int64_t>(sizeof(T)),
                     [&](int64_t image, int64_t first, int64_t n) {
                       Scratch rows(all.most_rows() * static_cast<int64_t>(sizeof(Acc)) + kRegister);
                       const T* planes = data<T>(features) + (image * channels + first) * area;
                       all.each(image, [&](const RoiBox<Acc>& box, int64_t k) {
                         T* to = data<T>(out) + (k * channels + first) * bins;
                         for (int64_t c = 0; c < n; ++c)
                           loops.forward(&box, planes + c * area, width, rows.as<Acc>(), to + c * bins);
                       });
                     });
  });
  return out;
}

Tensor backward(const Tensor& dout_in, const Tensor& boxes_in, int64_t images, int64_t height, int64_t width,
                double scale, int64_t sampling, bool aligned) {
  PYMM_CHECK(dout_in.dim() == 4 && dout_in.size(0) == boxes_in.size(0), kOp, ": dout must be (K, C, h, w)");
  const Options o{dout_in.size(2), dout_in.size(3), scale, sampling, aligned};
  check_regions(dout_in, boxes_in, o.bins_h, o.bins_w, kOp);
  const int64_t channels = dout_in.size(1);
  Tensor grad = empty({images, channels, height, width}, dout_in);
  if (grad.numel() == 0) return grad;
  const Tensor dout = dense(dout_in), boxes = dense(boxes_in);
  const DType dtype = pymm::dtype_of(dout, kOp);
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    constexpr bool direct = std::is_same_v<T, Acc>;
    const Boxes<Acc> all(boxes, o, images, height, width, true);
    const RoiAlign& loops = roi_align_for(dtype);
    const int64_t area = height * width, bins = o.bins_h * o.bins_w;
    each_plane_block(images, channels, area * static_cast<int64_t>(sizeof(Acc)),
                     [&](int64_t image, int64_t first, int64_t n) {
                       T* target = data<T>(grad) + (image * channels + first) * area;
                       const Scratch scratch(direct ? 0 : n * area * static_cast<int64_t>(sizeof(Acc)));
                       Acc* planes = scratch.as<Acc>();
                       if constexpr (direct) planes = target;
                       std::fill_n(planes, n * area, Acc{0});
                       all.each(image, [&](const RoiBox<Acc>& box, int64_t k) {
                         const T* from = data<T>(dout) + (k * channels + first) * bins;
                         for (int64_t c = 0; c < n; ++c)
                           loops.backward(&box, from + c * bins, width, planes + c * area);
                       });
                       if constexpr (!direct) rows_for(dtype).narrow(planes, 1, n * area, target);
                     });
  });
  return grad;
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&pymm::forward));
  m.impl("roi_align_backward", TORCH_BOX(&pymm::backward));
}

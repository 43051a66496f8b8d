// What the two poolings of regions share on the host: the boxes of a call, and blocks of planes.
#pragma once

#include <algorithm>

#include "cpu/host.h"
#include "cpu/simd/rows.h"

namespace pymm {

inline void check_regions(const Tensor& features, const Tensor& boxes, int64_t bins_h, int64_t bins_w, const char* op) {
  PYMM_CHECK(features.dim() == 4 && boxes.dim() == 2 && boxes.size(1) == 5, op,
             ": features must be (N, C, H, W) and boxes (K, 5)");
  PYMM_CHECK(boxes.scalar_type() == features.scalar_type() ||
                 (boxes.scalar_type() == ScalarType::Float && features.scalar_type() != ScalarType::Double),
             op, ": boxes must be of features' type, or float32 for features of 16 bits");
  PYMM_CHECK(bins_h > 0 && bins_w > 0, op, ": output_size must be positive");
}

// The numbers of boxes (K, 5), dense, and their order by image.
template <class Acc>
struct BoxRows {
  std::vector<Acc> values;
  std::vector<int64_t> start;  // of an image's boxes in `index`, and one past the last image's
  std::vector<int64_t> index;  // in the call

  BoxRows(const Tensor& boxes, int64_t images, const char* op)
      : values(static_cast<size_t>(boxes.size(0) * 5)),
        start(static_cast<size_t>(images) + 1),
        index(static_cast<size_t>(boxes.size(0))) {
    read(boxes, op);
    const size_t count = index.size();
    std::vector<int64_t> image(count);
    for (size_t k = 0; k < count; ++k) {
      const Acc of = values[k * 5];
      PYMM_CHECK(of > -1 && of < static_cast<Acc>(images), op, ": a box names an image that is not there");
      image[k] = static_cast<int64_t>(of);
      ++start[static_cast<size_t>(of) + 1];
    }
    for (size_t n = 1; n < start.size(); ++n) start[n] += start[n - 1];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (size_t k = 0; k < count; ++k) {
      index[static_cast<size_t>(next[static_cast<size_t>(image[k])]++)] = static_cast<int64_t>(k);
    }
  }

 private:
  void read(const Tensor& boxes, const char* op) {
    const DType dtype = pymm::dtype_of(boxes, op);
    const auto count = static_cast<int64_t>(values.size());
    if (dtype == DType::f64) {
      std::copy_n(data<double>(boxes), count, values.data());
    } else if (dtype == DType::f32) {
      std::copy_n(data<float>(boxes), count, values.data());
    } else {
      std::vector<float> wide(values.size());
      rows_for(dtype).widen(data<char>(boxes), 1, count, wide.data());
      std::copy_n(wide.data(), count, values.data());
    }
  }
};

constexpr int64_t kPlaneBlockBytes = 384 << 10;
constexpr int64_t kMostPlanes = 16;
constexpr int64_t kTasksPerThread = 4;

// f(image, first channel, channels) for each block of planes that stays in L2.
template <class F>
void each_plane_block(int64_t images, int64_t channels, int64_t plane_bytes, F&& f) {
  const int64_t fair = max_of(1, images * channels / (kTasksPerThread * thread_count()));
  const int64_t block = min_of(min_of(kMostPlanes, fair), max_of(1, kPlaneBlockBytes / max_of(1, plane_bytes)));
  const int64_t blocks = ceil_div(channels, block);
  parallel_tasks(images * blocks, [&](int64_t task) {
    const int64_t first = task % blocks * block;
    f(task / blocks, first, min_of(block, channels - first));
  });
}

}  // namespace pymm

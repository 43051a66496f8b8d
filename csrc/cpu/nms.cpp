// Greedy non-maximum suppression: boxes in the order of their scores, each kept unless a kept one overlaps it too much.
//
// Not parallel: each decision needs those before it. A box is compared, a register of kept boxes at a time, until the
// first that overlaps it. Equal scores keep the order of their indices.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/host.h"
#include "cpu/simd/nms.h"
#include "cpu/simd/rows.h"

namespace pymm {
namespace {

constexpr const char* kOp = "nms";

template <class T>
std::vector<Accumulator<T>> widened(const Tensor& t) {
  std::vector<Accumulator<T>> values(static_cast<size_t>(t.numel()));
  rows_for(pymm::dtype_of<T>()).widen(data<T>(t), 1, t.numel(), values.data());
  return values;
}

// The largest number of the type that is not above x: for any y of the type, y > x is y > that.
template <class Acc>
Acc at_most(double x) {
  const Acc near = static_cast<Acc>(x);
  return static_cast<double>(near) > x ? std::nextafter(near, -std::numeric_limits<Acc>::infinity()) : near;
}

template <class T>
std::vector<int64_t> kept(const Tensor& boxes_in, const Tensor& scores_in, double iou_threshold) {
  using Acc = Accumulator<T>;
  const std::vector<Acc> boxes = widened<T>(boxes_in), scores = widened<T>(scores_in);
  const size_t n = scores.size();
  std::vector<int64_t> order(n), result;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {  // NaN first, as torch.sort has it
    const Acc x = scores[static_cast<size_t>(a)], y = scores[static_cast<size_t>(b)];
    return std::isnan(x) ? !std::isnan(y) : x > y;
  });
  std::vector<Acc> columns(5 * n);
  Acc* c[5];
  for (size_t i = 0; i < 5; ++i) c[i] = columns.data() + i * n;
  const BoxColumns<Acc> view{c[0], c[1], c[2], c[3], c[4]};
  const Acc threshold = at_most<Acc>(iou_threshold);
  Overlaps<Acc> overlaps;
  if constexpr (std::is_same_v<Acc, double>) {
    overlaps = nms_table().f64;
  } else {
    overlaps = nms_table().f32;
  }
  for (const int64_t i : order) {
    const Acc* b = boxes.data() + 4 * i;
    const Acc box[5] = {b[0], b[1], b[2], b[3], (b[2] - b[0]) * (b[3] - b[1])};
    const size_t count = result.size();
    if (overlaps(view, static_cast<int64_t>(count), box, threshold)) continue;
    for (size_t j = 0; j < 5; ++j) c[j][count] = box[j];
    result.push_back(i);
  }
  return result;
}

Tensor forward(const Tensor& boxes_in, const Tensor& scores_in, double iou_threshold) {
  PYMM_CHECK(boxes_in.dim() == 2 && boxes_in.size(1) == 4 && scores_in.dim() == 1 &&
                 scores_in.size(0) == boxes_in.size(0) && scores_in.scalar_type() == boxes_in.scalar_type(),
             kOp, ": boxes must be (K, 4), and scores (K,) of the same type");
  PYMM_CHECK(iou_threshold >= 0, kOp, ": iou_threshold must be from 0 to 1");
  const Tensor boxes = dense(boxes_in), scores = dense(scores_in);
  const std::vector<int64_t> result =
      dispatch(pymm::dtype_of(boxes, kOp), [&]<class T>() { return kept<T>(boxes, scores, iou_threshold); });
  Tensor out = empty({static_cast<int64_t>(result.size())}, boxes, ScalarType::Long);
  if (!result.empty()) std::copy(result.begin(), result.end(), data<int64_t>(out));
  return out;
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) { m.impl("nms", TORCH_BOX(&pymm::forward)); }

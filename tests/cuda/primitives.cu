// Products of one warp from each way of loading its operands, for test_primitives.py.
#include "cuda/tensor_core.h"

namespace pymm::cuda {
namespace {

constexpr int kRows = 16, kColumns = 16, kDepth = 32, kSteps = kDepth / 16;
// A row of each operand in memory: either its depth, or, transposed, its 16 rows or columns.
constexpr int kPlainChunks = kDepth / 8, kTransposedChunks = 2;

// What to leave out, to see that the emulation notices.
enum Fault : int64_t { kNone, kNoWait, kNoBarrier, kHalfWarp, kNoCommit };

// c (16, 16) = a (16, depth) b (depth, 16). `a` is (16, depth) in memory or, transposed, (depth, 16); b is (16, depth),
// the rows being its columns, or, transposed, (depth, 16).
template <class T>
PYMM_GLOBAL void product_kernel(const T* a, const T* b, float* c, int64_t depth, bool a_transposed, bool b_transposed,
                                int64_t fault) {
  PYMM_DYNAMIC_SHARED(shared);
  constexpr int kBytes = kRows * kDepth * 2;
  const int lane = lane_id();
  float sums[2][4] = {};
  const auto place = [&](int operand, bool transposed, int row, int chunk) {
    const int at = transposed ? swizzled<kTransposedChunks>(row, chunk) : swizzled<kPlainChunks>(row, chunk);
    return shared + operand * kBytes + at * kChunk;
  };
  for (int64_t first = 0; first < depth; first += kDepth) {
    for (int operand = 0; operand < 2; ++operand) {
      const T* from = operand == 0 ? a : b;
      const bool transposed = operand == 0 ? a_transposed : b_transposed;
      const int chunks = transposed ? kTransposedChunks : kPlainChunks;
      for (int i = lane; i < kBytes / kChunk; i += kWarp) {
        const int row = i / chunks, chunk = i % chunks;
        const int64_t k = first + (transposed ? row : chunk * 8);
        const int64_t left = transposed ? (k < depth ? 8 : 0) : depth - k;
        const int bytes = left >= 8 ? kChunk : left > 0 ? static_cast<int>(left) * 2 : 0;
        const T* source = from + (transposed ? k * 16 + chunk * 8 : row * depth + k);
        copy_async(place(operand, transposed, row, chunk), bytes > 0 ? source : from, bytes);
      }
    }
    if (fault != kNoCommit) commit_copies();
    if (fault != kNoWait) wait_for_copies<0>();
    if (fault != kNoBarrier) PYMM_SYNC();
    for (int step = 0; step < kSteps; ++step) {
      uint32_t left[4], right[4];
      if (a_transposed) {
        load_matrices_transposed(left, place(0, true, step * 16 + lane % 8 + lane / 16 * 8, lane / 8 % 2));
      } else {
        load_matrices(left, place(0, false, lane % 16, step * 2 + lane / 16));
      }
      if (b_transposed) {
        load_matrices_transposed(right, place(1, true, step * 16 + lane % 16, lane / 16));
      } else {
        load_matrices(right, place(1, false, lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
      }
      if (fault == kHalfWarp && lane < 16) continue;
      mma<T>(sums[0], left, {right[0], right[1]});
      mma<T>(sums[1], left, {right[2], right[3]});
    }
    PYMM_SYNC();
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      c[(lane / 4 + i / 2 * 8) * kColumns + half * 8 + lane % 4 * 2 + i % 2] = sums[half][i];
    }
  }
}

Tensor product(const Tensor& a, const Tensor& b, bool a_transposed, bool b_transposed, int64_t fault) {
  const int64_t depth = a_transposed ? a.size(0) : a.size(1);
  Tensor c = torch::stable::new_empty(a, {kRows, kColumns}, ScalarType::Float);
  const Stream stream(a);
  const auto launch = [&]<class T>() {
    PYMM_LAUNCH_SHARED(product_kernel<T>, dim3(1), dim3(kWarp), 2 * kRows * kDepth * 2, stream, data<T>(a), data<T>(b),
                       data<float>(c), depth, a_transposed, b_transposed, fault);
  };
  a.scalar_type() == ScalarType::BFloat16 ? launch.template operator()<bf16>() : launch.template operator()<f16>();
  return c;
}

// Of each row of 32: the sum, the largest, the sums of groups of 4, the row rotated by one, and how many before an
// element are positive.
PYMM_GLOBAL void warp_kernel(const float* x, float* out) {
  const int lane = lane_id();
  const float value = x[lane];
  out[lane] = warp_sum(value);
  out[kWarp + lane] = warp_max(value);
  out[2 * kWarp + lane] = warp_sum<4>(value);
  out[3 * kWarp + lane] = shuffle(value, (lane + 1) % kWarp);
  out[4 * kWarp + lane] = static_cast<float>(count_bits(ballot(value > 0) & ((1u << lane) - 1)));
}

Tensor warp(const Tensor& x) {
  Tensor out = torch::stable::new_empty(x, {5, kWarp}, ScalarType::Float);
  PYMM_LAUNCH(warp_kernel, dim3(1), dim3(kWarp), Stream(x), data<float>(x), data<float>(out));
  return out;
}

}  // namespace
}  // namespace pymm::cuda

STABLE_TORCH_LIBRARY(pymm_primitives, m) {
  m.def("product(Tensor a, Tensor b, bool a_transposed, bool b_transposed, int fault) -> Tensor");
  m.def("warp(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pymm_primitives, PYMM_DISPATCH_KEY, m) {
  m.impl("product", TORCH_BOX(&pymm::cuda::product));
  m.impl("warp", TORCH_BOX(&pymm::cuda::warp));
}

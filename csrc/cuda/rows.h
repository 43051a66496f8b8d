// What is done to rows of a matrix, one block of kRowThreads threads per row: sums, norms, and the gradient through a
// division by the norm.
#pragma once

#include "cuda/device.h"

namespace pymm::cuda {

constexpr int kRowThreads = 128;
constexpr double kSmallestNorm = 1e-12;  // the smallest norm divided by, torch.nn.functional.normalize's

// The sums over the block's threads, in one order; every thread gets them.
template <int kThreads, class Acc, int kCount>
PYMM_DEVICE void block_sums(Acc (&values)[kCount]) {
  PYMM_SHARED Acc sums[kCount][kThreads];
  const int thread = static_cast<int>(threadIdx.x);
  for (int c = 0; c < kCount; ++c) sums[c][thread] = values[c];
  PYMM_SYNC();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
      for (int c = 0; c < kCount; ++c) sums[c][thread] += sums[c][thread + half];
    }
    PYMM_SYNC();
  }
  for (int c = 0; c < kCount; ++c) values[c] = sums[c][0];
  PYMM_SYNC();
}

template <int kThreads, class Acc>
PYMM_DEVICE Acc block_sum(Acc value) {
  Acc values[1] = {value};
  block_sums<kThreads>(values);
  return values[0];
}

// 1 / max(||row||, eps). The squares of float32 are summed in double, which none of them leaves.
template <class T>
PYMM_GLOBAL void inverse_norms_kernel(const T* x, int64_t d, double eps, Accumulator<T>* out) {
  const T* row = x + static_cast<int64_t>(blockIdx.x) * d;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < d; i += kRowThreads) {
    const double value = to_float(row[i]);
    sum += value * value;
  }
  const double norm = sqrt(block_sum<kRowThreads>(sum));
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<Accumulator<T>>(1 / (norm < eps ? eps : norm));  // a NaN stays
}

template <class T>
void inverse_norms(const Stream& stream, const Tensor& x, int64_t d, double eps, Tensor& out) {
  if (out.numel() == 0) return;
  PYMM_LAUNCH(inverse_norms_kernel<T>, dim3(static_cast<unsigned>(out.numel())), dim3(kRowThreads), stream, data<T>(x),
              d, eps, data<Accumulator<T>>(out));
}

// dx = scale (t - <t, x^> x^) / ||x|| of one row, by all threads of a block, each of which has written its own part of
// t; where the norm is below eps, that is its inverse at or above `limit`, it is a constant.
template <class T>
PYMM_DEVICE void close_row(const Accumulator<T>* t, const T* x, Accumulator<T> inverse, int64_t d, double limit,
                           Accumulator<T> scale, T* dx) {
  using Acc = Accumulator<T>;
  Acc sum = 0;
  for (int64_t i = threadIdx.x; i < d; i += kRowThreads) sum += t[i] * to_float(x[i]);
  sum = block_sum<kRowThreads>(sum);
  const Acc along = inverse < Acc(limit) ? sum * inverse * inverse : Acc(0);
  for (int64_t i = threadIdx.x; i < d; i += kRowThreads) {
    dx[i] = from_float((t[i] - along * Acc(to_float(x[i]))) * (inverse * scale), T{});
  }
}

}  // namespace pymm::cuda

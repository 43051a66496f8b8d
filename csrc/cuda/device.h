// What every CUDA kernel needs: the launch, element types, and tensors of the stable ABI.
//
// The same source also compiles as C++, for tests on machines without a GPU (tests/cuda/emulation.h): there each
// block's threads are fibers, one block after another. So kernels use only what both have: the PYMM_ names and the
// plain C++ of this header, and the warp's instructions of tensor_core.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#define PYMM_DEVICE __device__ __forceinline__
#define PYMM_ANYWHERE __host__ __device__
#define PYMM_GLOBAL __global__
#define PYMM_SHARED __shared__
#define PYMM_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define PYMM_SYNC() __syncthreads()
#define PYMM_SYNC_WARP() __syncwarp()
#define PYMM_UNROLL _Pragma("unroll")
#define PYMM_PRAGMA(text) _Pragma(#text)
#define PYMM_UNROLL_BY(n) PYMM_PRAGMA(unroll n)
#define PYMM_LAUNCH_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
// A thread may have every register: otherwise the assembler may spill a few to fit another block beside this one.
#define PYMM_EVERY_REGISTER(threads) __launch_bounds__(threads, 1)
#define PYMM_TRAP() __trap()
#define PYMM_DISPATCH_KEY CUDA
#else
#include "emulation.h"
#endif

namespace pymm::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__CUDACC__)
using bf16 = __nv_bfloat16;
using f16 = __half;
PYMM_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
PYMM_DEVICE float to_float(f16 x) { return __half2float(x); }
PYMM_DEVICE bf16 from_float(float x, bf16) { return __float2bfloat16(x); }
PYMM_DEVICE f16 from_float(float x, f16) { return __float2half(x); }

// Makes the tensor's GPU the current one for a scope and knows the stream that torch uses there.
class Stream {
 public:
  explicit Stream(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": the launch failed: ", cudaGetErrorString(error));
}

// With dynamic shared memory, of which more than 48 KiB have to be asked for.
#define PYMM_LAUNCH_SHARED(kernel, grid, threads, bytes, stream, ...)                                  \
  do {                                                                                                 \
    const auto chosen_kernel = (kernel);                                                               \
    const int64_t dynamic_bytes = ::pymm::cuda::shared_bytes(bytes, #kernel);                          \
    if (dynamic_bytes > (48 << 10)) {                                                                  \
      cudaFuncSetAttribute(chosen_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,                 \
                           static_cast<int>(dynamic_bytes));                                           \
    }                                                                                                  \
    chosen_kernel<<<grid, threads, static_cast<size_t>(dynamic_bytes), (stream).get()>>>(__VA_ARGS__); \
    ::pymm::cuda::check_launch(#kernel);                                                               \
  } while (0)
#endif

#define PYMM_LAUNCH(kernel, grid, threads, stream, ...) \
  PYMM_LAUNCH_SHARED(kernel, grid, threads, 0, stream, __VA_ARGS__)

// The dynamic shared memory of a launch: what every GPU of compute capability 8.0 or later than 8.9 has for one block,
// less what kernels may hold beside it.
constexpr int64_t kMostShared = (163 << 10) - (2 << 10);
inline int64_t shared_bytes(int64_t bytes, const char* kernel) {
  STD_TORCH_CHECK(bytes <= kMostShared, kernel, ": ", bytes, " bytes of shared memory are more than a block has");
  return bytes;
}

PYMM_DEVICE float to_float(float x) { return x; }
PYMM_DEVICE double to_float(double x) { return x; }
PYMM_DEVICE float from_float(float x, float) { return x; }
PYMM_DEVICE double from_float(double x, double) { return x; }

// At least so many blocks of 256 threads at once on a multiprocessor, for PYMM_LAUNCH_BOUNDS. One where sums are
// doubles: left alone, the assembler spills some of them to fit a second block.
template <class T>
constexpr int kBlocksAtOnce = std::is_same_v<T, double> ? 1 : 2;

// float for the types of up to 32 bits, double for double.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

PYMM_ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// The type in which a tensor's sums and statistics are kept.
inline ScalarType accumulator_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls `f.template operator()<T>()` with the element type of `t`.
template <class F>
void dispatch(const Tensor& t, const char* op, F&& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return f.template operator()<float>();
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<bf16>();
    case ScalarType::Half:
      return f.template operator()<f16>();
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float64, bfloat16 or float16");
  }
}

}  // namespace pymm::cuda

// What every op's host code needs: tensors of the stable ABI, checks, allocation, scratch memory and the parallel loop.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/types.h"

namespace pymm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Shapes and types are checked in Python with full sentences; these checks keep a direct call through torch.ops safe.
#define PYMM_CHECK(condition, ...) STD_TORCH_CHECK(condition, __VA_ARGS__)

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Asks for large pages where Linux leaves that to the program ("madvise"): memory of many MB that was just allocated
// spends longer on its page faults, one for every 4 KB, than on the stores that cause them.
inline void in_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kWorthwhile = int64_t{4} << 20, kPage = int64_t{2} << 20;
  if (bytes < kWorthwhile) return;
  const auto begin = round_up(reinterpret_cast<int64_t>(memory), kPage);
  const auto end = (reinterpret_cast<int64_t>(memory) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#endif
}

// A result that was just allocated and is about to be written.
inline Tensor fresh(Tensor t) {
  const auto bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (bytes > 0) in_large_pages(t.data_ptr(), bytes);
  return t;
}

// Uninitialized memory of the device and type of `like`.
inline Tensor empty(std::initializer_list<int64_t> sizes, const Tensor& like,
                    std::optional<ScalarType> dtype = std::nullopt) {
  const std::vector<int64_t> shape(sizes);
  return fresh(torch::stable::new_empty(like, shape, dtype.value_or(like.scalar_type())));
}

inline Tensor zeros(std::initializer_list<int64_t> sizes, const Tensor& like,
                    std::optional<ScalarType> dtype = std::nullopt) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::new_zeros(like, shape, dtype.value_or(like.scalar_type()));
}

template <class T>
inline T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline DType dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      break;
  }
  STD_TORCH_CHECK(false, op, ": expected float32, float64, bfloat16 or float16");
  return DType::f32;
}

// The type in which a tensor of type `dtype` is accumulated and its statistics are kept.
inline ScalarType accumulator_type(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// Calls `f.template operator()<T>()` with the element type of `dtype`.
template <class F>
inline auto dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f64:
      return f.template operator()<double>();
    case DType::bf16:
      return f.template operator()<bf16>();
    case DType::f16:
      return f.template operator()<f16>();
    default:
      return f.template operator()<float>();
  }
}

// Aligned scratch memory of one thread or one call. Each allocation begins on a cache line of its own, and ends with
// one to spare, so that two threads never write to one line.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : memory_(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(bytes, 64) + 64))), &std::free) {
    if (!memory_) throw std::bad_alloc();
    in_large_pages(memory_.get(), bytes);
  }
  template <class T>
  T* as(int64_t byte_offset = 0) const {
    return reinterpret_cast<T*>(memory_.get() + byte_offset);
  }

 private:
  std::unique_ptr<char, void (*)(void*)> memory_;
};

inline int64_t thread_count() { return torch::stable::get_num_threads(); }

// Splits `tasks` over the threads; f(i) for each i, in no order, each exactly once. Must not throw.
template <class F>
inline void parallel_tasks(int64_t tasks, F&& f) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Splits [0, count) into contiguous ranges; f(begin, end) once per range. Must not throw.
template <class F>
inline void parallel_ranges(int64_t count, int64_t grain, F&& f) {
  torch::stable::parallel_for(0, count, grain, f);
}

}  // namespace pymm

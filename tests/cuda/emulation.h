// CUDA's execution model on a CPU, for testing csrc/cuda without a GPU: the threads of a block are real threads that
// meet at a barrier, blocks run one after another, shared memory is static.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define PYMM_DEVICE inline
#define PYMM_GLOBAL
#define PYMM_SHARED static
#define PYMM_SYNC() ::pymm::emulation::current_barrier->arrive_and_wait()
#define PYMM_DISPATCH_KEY CPU

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx;

namespace pymm::emulation {

inline thread_local std::barrier<>* current_barrier = nullptr;

template <class F>
void launch(dim3 grid, dim3 threads, F&& body) {
  const int64_t count = static_cast<int64_t>(threads.x) * threads.y * threads.z;
  std::barrier<> barrier(count);
  std::vector<std::thread> pool;
  for (int64_t t = 0; t < count; ++t) {
    pool.emplace_back([&, t] {
      threadIdx = dim3(static_cast<unsigned>(t % threads.x), static_cast<unsigned>(t / threads.x % threads.y),
                       static_cast<unsigned>(t / threads.x / threads.y));
      current_barrier = &barrier;
      for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
          for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y, z);
            body();
            barrier.arrive_and_wait();
          }
        }
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
}

}  // namespace pymm::emulation

namespace pymm::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 value;
};
inline float to_float(bf16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}
inline bf16 from_float(float x, bf16) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return bf16{0x7fff};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float to_float(f16 x) { return static_cast<float>(x.value); }
inline f16 from_float(float x, f16) { return f16{static_cast<_Float16>(x)}; }

class Stream {
 public:
  template <class Tensor>
  explicit Stream(const Tensor&) {}
};

}  // namespace pymm::cuda

#define PYMM_LAUNCH(kernel, grid, threads, stream, ...)                      \
  do {                                                                       \
    (void)(stream);                                                          \
    ::pymm::emulation::launch(grid, threads, [&] { (kernel)(__VA_ARGS__); }); \
  } while (0)

// CUDA's execution model on a CPU, for testing csrc/cuda without a GPU. The threads of a block are fibers of one OS
// thread: each runs until it waits for others, then the next one does, and blocks run one after another. So a missing
// barrier shows as a wrong result, every time: a thread sees nothing of what the ones behind it write before it waits.
// Stricter than a GPU: barriers and warp instructions that not all threads reach raise, dynamic shared memory starts
// as NaN, and asynchronous copies arrive when they are waited for, not before.
#pragma once

#include <ucontext.h>
#include <csetjmp>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define PYMM_DEVICE inline
#define PYMM_ANYWHERE
#define PYMM_GLOBAL
#define PYMM_SHARED static
#define PYMM_DYNAMIC_SHARED(name) unsigned char* const name = ::pymm::emulation::machine.shared()
#define PYMM_SYNC() ::pymm::emulation::machine.wait_for_block()
#define PYMM_SYNC_WARP() ::pymm::emulation::sync_warp()
#define PYMM_UNROLL
#define PYMM_UNROLL_BY(n)
#define PYMM_LAUNCH_BOUNDS(...)
#define PYMM_EVERY_REGISTER(threads)
#define PYMM_TRAP() ::pymm::emulation::machine.fail("a kernel trapped")
#define PYMM_DISPATCH_KEY CPU

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pymm::emulation {

constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;
  int bytes;  // of 16; the rest becomes 0
  bool committed;
  int group;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  std::unique_ptr<char[]> stack;
  bool entered = false, done = false, ready = true;
  std::deque<Copy> copies;  // those that have not arrived
  int groups = 0;
};

struct Warp {
  const char* instruction = nullptr;
  void* operands[kWarp];
  int arrived = 0;
};

class Machine {
 public:
  unsigned char* shared() { return shared_.data() + align_; }
  Fiber& current() { return *fibers_[thread_]; }
  int lane() const { return thread_ % kWarp; }
  Warp& warp() { return warps_[thread_ / kWarp]; }

  void launch(dim3 grid, dim3 threads, int64_t shared_bytes, const std::function<void()>& body) {
    const std::lock_guard lock(mutex_);
    count_ = static_cast<int>(threads.x * threads.y * threads.z);
    body_ = &body;
    blockDim = threads;
    gridDim = grid;
    while (static_cast<int>(fibers_.size()) < count_) fibers_.push_back(std::make_unique<Fiber>());
    warps_.assign((count_ + kWarp - 1) / kWarp, Warp{});
    shared_.resize(shared_bytes + 128);
    align_ = (128 - reinterpret_cast<uintptr_t>(shared_.data()) % 128) % 128;
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          run_block();
        }
      }
    }
  }

  void wait_for_block() {
    if (++waiting_ == count_) {
      waiting_ = 0;
      for (int t = 0; t < count_; ++t) fibers_[t]->ready = true;
      return;
    }
    current().ready = false;
    leave();
  }

  void wait_for_warp() {
    current().ready = false;
    leave();
  }

  void release_warp() {
    const int first = thread_ / kWarp * kWarp;
    for (int t = first; t < first + kWarp; ++t) fibers_[t]->ready = true;
  }

  // The program is wrong: ends the launch with an exception, from within a fiber.
  void fail(const std::string& why) {
    problem_ = why;
    leave();
  }

 private:
  void run_block() {
    std::memset(shared_.data(), 0xff, shared_.size());
    waiting_ = 0;
    int alive = count_;
    for (int t = 0; t < count_; ++t) fibers_[t]->done = false, fibers_[t]->ready = true;
    while (alive > 0) {
      bool moved = false;
      for (int first = 0; first < count_; first += kWarp) {
        for (bool again = true; again;) {
          again = false;
          for (int t = first; t < first + kWarp && t < count_; ++t) {
            Fiber& fiber = *fibers_[t];
            if (fiber.done || !fiber.ready) continue;
            again = moved = true;
            thread_ = t;
            threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
            enter(fiber);
            if (!problem_.empty()) raise();
            if (fiber.done) --alive;
          }
        }
      }
      if (!moved) {
        problem_ = "some threads of a block wait where the others never come";
        raise();
      }
    }
  }

  void raise() {
    fibers_.clear();  // they stand in the middle of a kernel
    throw std::runtime_error("emulation: " + std::exchange(problem_, {}));
  }

  void enter(Fiber& fiber) {
    if (_setjmp(main_) != 0) return;
    if (fiber.entered) _longjmp(fiber.at, 1);
    fiber.entered = true;
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, &Machine::run_fiber, 0);
    setcontext(&fiber.start);
  }

  void leave() {
    if (_setjmp(current().at) == 0) _longjmp(main_, 1);
  }

  static void run_fiber();

  static constexpr size_t kStack = 128 << 10;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> shared_;
  size_t align_ = 0;
  const std::function<void()>* body_ = nullptr;
  std::string problem_;
  jmp_buf main_;
  int count_ = 0, thread_ = 0, waiting_ = 0;
};

inline Machine machine;

inline void Machine::run_fiber() {
  for (;;) {
    (*machine.body_)();
    if (!machine.current().copies.empty()) machine.fail("a thread ended before its asynchronous copies");
    machine.current().done = true;
    machine.leave();
  }
}

// What all lanes of a warp do together: the last one that arrives runs `all(Operands* [32])`.
template <class Operands, class F>
void warp_instruction(const char* name, Operands&& operands, F&& all) {
  Warp& warp = machine.warp();
  if (warp.arrived > 0 && warp.instruction != name) {
    machine.fail(std::string("lanes of a warp disagree: ") + warp.instruction + " and " + name);
  }
  warp.instruction = name;
  warp.operands[machine.lane()] = &operands;
  if (++warp.arrived < kWarp) return machine.wait_for_warp();
  warp.arrived = 0;
  all(reinterpret_cast<std::remove_reference_t<Operands>**>(warp.operands));
  machine.release_warp();
}

inline void sync_warp() {
  int nothing = 0;
  warp_instruction("warp sync", nothing, [](int**) {});
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

#define PYMM_LAUNCH_SHARED(kernel, grid, threads, bytes, stream, ...)                            \
  do {                                                                                           \
    (void)(stream);                                                                              \
    ::pymm::emulation::machine.launch(grid, threads, ::pymm::cuda::shared_bytes(bytes, #kernel), \
                                      [&] { (kernel)(__VA_ARGS__); });                           \
  } while (0)

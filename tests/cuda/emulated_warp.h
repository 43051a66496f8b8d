// The warp's instructions of csrc/cuda/warp.h and csrc/cuda/tensor_core.h on emulated threads. Which lane holds which
// element is the PTX ISA's: "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix".
#pragma once

#include "emulation.h"

namespace pymm::cuda {

inline int lane_id() { return emulation::machine.lane(); }

template <class V>
V shuffle(V value, int from) {
  struct Operands {
    V value, result;
    int from;
  } mine{value, value, from};
  emulation::warp_instruction("shuffle", mine, [](Operands** all) {
    for (int lane = 0; lane < 32; ++lane) all[lane]->result = all[all[lane]->from]->value;
  });
  return mine.result;
}

template <class V>
V shuffle_xor(V value, int mask) {
  return shuffle(value, lane_id() ^ mask);
}

inline uint32_t ballot(bool holds) {
  struct Operands {
    bool holds;
    uint32_t result;
  } mine{holds, 0};
  emulation::warp_instruction("ballot", mine, [](Operands** all) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(all[lane]->holds) << lane;
    for (int lane = 0; lane < 32; ++lane) all[lane]->result = bits;
  });
  return mine.result;
}
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

template <class T>
uint32_t pack(float low, float high) {
  const T both[2] = {from_float(low, T{}), from_float(high, T{})};
  uint32_t bits;
  std::memcpy(&bits, both, sizeof(bits));
  return bits;
}

namespace emulated {

// A table, because processors without a float16 unit convert slowly.
template <class T>
float value_of(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (uint32_t i = 0; i < values.size(); ++i) {
      const auto half = static_cast<uint16_t>(i);
      T value;
      std::memcpy(&value, &half, sizeof(half));
      values[i] = to_float(value);
    }
    return values;
  }();
  return table[bits];
}

template <class T>
float element(const uint32_t* registers, int i) {
  return value_of<T>(static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16)));
}

}  // namespace emulated

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    const uint32_t *a, *b;
    float* c;
  } mine{a, b, c};
  emulation::warp_instruction("mma", mine, [](Operands** all) {
    using Row = float __attribute__((vector_size(32)));
    float left[16][16];
    Row right[16];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, in_group = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        left[row][in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)] = emulated::element<T>(all[lane]->a, i);
      }
      for (int i = 0; i < 4; ++i) {
        right[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = emulated::element<T>(all[lane]->b, i);
      }
    }
    for (int half = 0; half < 2; ++half) {
      for (int group = 0; group < 8; ++group) {
        Row sum;
        for (int j = 0; j < 8; ++j) sum[j] = all[group * 4 + j / 2]->c[half * 2 + j % 2];
        for (int k = 0; k < 16; ++k) sum += left[half * 8 + group][k] * right[k];
        for (int j = 0; j < 8; ++j) all[group * 4 + j / 2]->c[half * 2 + j % 2] = sum[j];
      }
    }
  });
}

namespace emulated {

inline void load_matrices(uint32_t (&registers)[4], const void* row, bool transposed) {
  struct Operands {
    uint16_t row[8];
    uint32_t* registers;
    bool transposed;
  } mine{{}, registers, transposed};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::machine.fail("ldmatrix: a row is not aligned to 16 bytes");
  // Now, and not when the last lane is here: what that one writes before it comes has had no barrier.
  std::memcpy(mine.row, row, sizeof(mine.row));
  emulation::warp_instruction(transposed ? "ldmatrix.trans" : "ldmatrix", mine, [](Operands** all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t found[2];
        for (int i = 0; i < 2; ++i) {
          int r = lane >> 2, c = lane % 4 * 2 + i;
          if (all[lane]->transposed) std::swap(r, c);
          found[i] = all[matrix * 8 + r]->row[c];
        }
        all[lane]->registers[matrix] = found[0] | static_cast<uint32_t>(found[1]) << 16;
      }
    }
  });
}

// The copies of all groups but the last `left` arrive.
inline void wait_for_copies(int left) {
  emulation::Fiber& fiber = emulation::machine.current();
  while (!fiber.copies.empty()) {
    const emulation::Copy copy = fiber.copies.front();
    if (!copy.committed || copy.group >= fiber.groups - left) return;
    std::memset(copy.to, 0, 16);
    std::memcpy(copy.to, copy.from, copy.bytes);
    fiber.copies.pop_front();
  }
}

}  // namespace emulated

inline void load_matrices(uint32_t (&registers)[4], const void* row) { emulated::load_matrices(registers, row, false); }
inline void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  emulated::load_matrices(registers, row, true);
}

// Until the copy is waited for, its place holds NaNs.
inline void copy_async(void* shared, const void* global, int bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(global) % 16 != 0)) {
    emulation::machine.fail("cp.async: an address is not aligned to 16 bytes");
  }
  std::memset(shared, 0xff, 16);
  emulation::Fiber& fiber = emulation::machine.current();
  fiber.copies.push_back({shared, global, bytes, false, fiber.groups});
}
inline void commit_copies() {
  emulation::Fiber& fiber = emulation::machine.current();
  for (emulation::Copy& copy : fiber.copies) copy.committed = true;
  ++fiber.groups;
}
template <int left>
void wait_for_copies() {
  emulated::wait_for_copies(left);
}

}  // namespace pymm::cuda

// One accumulator per element of a gradient that grows over several passes, in little memory beside the gradient.
//
// float and double accumulate in the gradient itself. bfloat16 is the upper half of a float: the gradient's memory
// holds the upper halves while it grows, and 2 bytes per element beside it the lower ones; a block is joined before a
// product adds to it and split after. float16 has no such split and keeps floats beside it.
#pragma once

#include "cpu/host.h"
#include "cpu/simd/halves.h"

namespace pymm {

template <class T>
class RowSums {
 public:
  using Acc = Accumulator<T>;

  // `out` (n, d) becomes the gradient; at most `block_rows` rows are open at a time in each of `parts` parts.
  RowSums(T* out, int64_t n, int64_t d, int64_t parts, int64_t block_rows)
      : out_(out),
        d_(d),
        block_bytes_(round_up(block_rows * d * 4, 64) + 64),
        beside_(kSplit    ? n * d * 2
                : kDirect ? 0
                          : n * d * 4),
        blocks_(kSplit ? parts * block_bytes_ : 0) {}

  // The sums of rows [row, row + rows), (rows, d); undefined when `fresh`, when nothing has been added yet.
  Acc* open(int64_t part, int64_t row, int64_t rows, bool fresh) const {
    if constexpr (kDirect) return out_ + row * d_;
    if constexpr (!kSplit && !kDirect) return beside_.as<Acc>() + row * d_;
    if constexpr (kSplit) {
      float* const block = blocks_.as<float>(part * block_bytes_);
      if (!fresh) halves().join(out_ + row * d_, beside_.as<uint16_t>() + row * d_, rows * d_, block);
      return block;
    }
  }
  void close(int64_t part, int64_t row, int64_t rows) const {
    if constexpr (kSplit) {
      halves().split(blocks_.as<float>(part * block_bytes_), rows * d_, out_ + row * d_,
                     beside_.as<uint16_t>() + row * d_);
    }
  }
  // f(first, rows, sums) for all n rows, in parallel blocks.
  template <class F>
  void each_block(int64_t n, int64_t parts, int64_t block_rows, F&& f) const {
    parallel_tasks(parts, [&](int64_t part) {
      for (int64_t row = n * part / parts; row < n * (part + 1) / parts; row += block_rows) {
        const int64_t rows = min_of(block_rows, n * (part + 1) / parts - row);
        f(row, rows, open(part, row, rows, false));
      }
    });
  }

 private:
  static constexpr bool kSplit = std::is_same_v<T, bf16>, kDirect = std::is_same_v<T, Acc>;

  T* out_;
  int64_t d_, block_bytes_;
  Scratch beside_, blocks_;
};

}  // namespace pymm

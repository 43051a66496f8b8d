// What the kernels of attention share: the numbers of a call, the scores after masks, and dropout.
#pragma once

#include "cuda/device.h"

namespace pymm::cuda {

constexpr int kNoMask = 0, kBoolMask = 1, kBias = 2, kWideBias = 3;  // kWideBias: in the accumulator's type

// Rows of one tensor (batch, heads, rows, width), dense in the last dimension.
template <class T>
struct HeadRows {
  T* p;
  int64_t batch, head, row;  // strides
  bool aligned;              // every row begins at a multiple of 16 bytes
  PYMM_DEVICE T* at(int64_t b, int64_t h) const { return p + b * batch + h * head; }
};

struct Call {
  int64_t batch, heads, groups, rows, columns, width, value_width;
  int mask_kind = kNoMask;
  const void* mask = nullptr;
  int64_t mask_strides[4] = {};      // 0 where it is broadcast
  const uint8_t* padding = nullptr;  // (batch, columns), 0 where a key is none
  int causal = 0;                    // a row t attends to columns up to t + surplus
  int64_t surplus = 0;
  const int64_t* seed = nullptr;
  int64_t threshold = 0;  // the least random word of a weight that is kept
  double keep = 1, scale = 1;

  PYMM_DEVICE int64_t key_head(int64_t head) const { return head / (heads / groups); }
  // The first column that none of the rows up to `last` attends to.
  PYMM_DEVICE int64_t columns_of(int64_t last) const {
    if (causal == 0 || last + surplus + 1 >= columns) return columns;
    return last + surplus + 1 > 0 ? last + surplus + 1 : 0;
  }
  // The first row that attends to a column from `first` on.
  PYMM_DEVICE int64_t first_row(int64_t first) const { return causal == 0 || first <= surplus ? 0 : first - surplus; }
  // Whether the rows from t to t_end attend to all columns from s to s_end, with nothing added.
  PYMM_DEVICE bool plain(int64_t t, int64_t t_end, int64_t s, int64_t s_end) const {
    return mask_kind == kNoMask && padding == nullptr && t_end <= rows && s_end <= columns &&
           (causal == 0 || s_end - 1 <= t + surplus);
  }
};

// The scores of one head: `scale q . k` and what is added to it; -inf where t may not attend to s.
template <class T>
struct Head {
  using Acc = Accumulator<T>;
  const Call& c;
  const uint8_t* padding;
  int64_t mask_at;
  uint64_t number;  // of the head, for dropout

  PYMM_DEVICE Head(const Call& call, int64_t b, int64_t h)
      : c(call),
        padding(call.padding == nullptr ? nullptr : call.padding + b * call.columns),
        mask_at(b * call.mask_strides[0] + h * call.mask_strides[1]),
        number(static_cast<uint64_t>(b * call.heads + h)) {}

  PYMM_DEVICE Acc logit(int64_t t, int64_t s, Acc dot) const {
    const Acc none = -static_cast<Acc>(INFINITY);
    if (t >= c.rows || s >= c.columns || (c.causal != 0 && s > t + c.surplus)) return none;
    if (padding != nullptr && padding[s] == 0) return none;
    const Acc x = dot * static_cast<Acc>(c.scale);
    const int64_t at = mask_at + t * c.mask_strides[2] + s * c.mask_strides[3];
    if (c.mask_kind == kBoolMask) return static_cast<const uint8_t*>(c.mask)[at] != 0 ? x : none;
    if (c.mask_kind == kBias) return x + Acc(to_float(static_cast<const T*>(c.mask)[at]));
    if (c.mask_kind == kWideBias) return x + static_cast<const Acc*>(c.mask)[at];
    return x;
  }

  // What dropout multiplies a weight by: Philox-4x32-10 of its place (pymm/ops/_attention_reference.py).
  PYMM_DEVICE Acc factor(int64_t t, int64_t s) const {
    if (c.seed == nullptr) return Acc(1);
    const uint64_t seed = static_cast<uint64_t>(*c.seed);
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    uint32_t c0 = static_cast<uint32_t>(s / 64 * 16 + s % 16), c1 = static_cast<uint32_t>(t);
    uint32_t c2 = static_cast<uint32_t>(number), c3 = static_cast<uint32_t>(number >> 32);
    PYMM_UNROLL_BY(1)
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{c0} * 0xD2511F53u, b = uint64_t{c2} * 0xCD9E8D57u;
      c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
      c1 = static_cast<uint32_t>(b);
      c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
      c3 = static_cast<uint32_t>(a);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    const int word = static_cast<int>(s / 16 % 4);
    const uint32_t low = word % 2 == 0 ? c0 : c1, high = word % 2 == 0 ? c2 : c3;
    return static_cast<int64_t>(word < 2 ? low : high) >= c.threshold ? static_cast<Acc>(c.keep) : Acc(0);
  }
};

// What backward reads and writes; `delta` and `lse` are dense (batch, heads, rows).
template <class T>
struct Gradients {
  using Acc = Accumulator<T>;
  HeadRows<const T> q, k, v, dout;
  const Acc *lse, *delta;
  HeadRows<T> dq, dk, dv;
};

// The gradient of a mask (batch, heads, rows, columns), each of them 1 or the call's; dense.
struct MaskShape {
  int64_t batch, heads, rows, columns;
};

// Stores a tile of it from (t, s) on, whose sums are in shared memory. Where the mask is broadcast, its one row is the
// tile's sum over rows, its one column that over columns. `wide`: the mask is of the accumulator's type, not T.
template <class T, class Acc, int kRows, int kStride>
PYMM_DEVICE void store_mask(const MaskShape& m, int64_t b, int64_t h, int64_t t, int64_t s,
                            const Acc (&sums)[kRows][kStride], int thread, int threads, bool wide, void* dmask) {
  const int rows = m.rows == 1 ? 1 : kRows, columns = m.columns == 1 ? 1 : kRows;
  for (int i = thread; i < rows * columns; i += threads) {
    const int r = i / columns, column = i % columns;
    Acc sum = 0;
    for (int of_r = r; of_r < (rows == 1 ? kRows : r + 1); ++of_r) {
      for (int of_c = column; of_c < (columns == 1 ? kRows : column + 1); ++of_c) sum += sums[of_r][of_c];
    }
    if (t + r >= m.rows || s + column >= m.columns) continue;
    const int64_t at = ((b * m.heads + h) * m.rows + t + r) * m.columns + s + column;
    if (wide) {
      static_cast<Acc*>(dmask)[at] = sum;
    } else {
      static_cast<T*>(dmask)[at] = from_float(sum, T{});
    }
  }
}

}  // namespace pymm::cuda

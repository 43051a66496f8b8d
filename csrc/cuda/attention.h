// What the kernels of attention share: the numbers of a call, the sequences it consists of, the scores after masks, and
// dropout.
#pragma once

#include "cuda/tile.h"

namespace pymm::cuda {

constexpr int kNoMask = 0, kBoolMask = 1, kBias = 2, kWideBias = 3;  // kWideBias: in the accumulator's type

// Rows of one tensor (batch, heads, rows, width), dense in the last dimension; of packed sequences the batch's stride
// is 0.
template <class T>
struct HeadRows {
  T* p;
  int64_t batch, head, row;  // strides
  bool aligned;              // every row begins at a multiple of 16 bytes
  PYMM_DEVICE T* at(int64_t b, int64_t h) const { return p + b * batch + h * head; }
};

// Where packed sequences begin, N + 1 numbers, and the sequence of each of their tiles of 64. A table has total / 64 +
// N of these: those of sequence n begin at begins[n] / 64 + n, and its last one may be beyond its end.
struct Packing {
  const int64_t* begins = nullptr;
  const int32_t* sequences = nullptr;
};

// `batch` is 1, and rows and columns are those of all sequences, where they are packed.
struct Call {
  int64_t batch, heads, groups, rows, columns, width, value_width;
  int64_t sequences = 0;
  Packing of_rows, of_columns;  // null where every batch element is a sequence
  int mask_kind = kNoMask;
  const void* mask = nullptr;
  int64_t mask_strides[4] = {};      // 0 where it is broadcast
  const uint8_t* padding = nullptr;  // (batch, columns), 0 where a key is none
  int causal = 0;                    // 1: a row t attends to columns up to t; 2: up to t + columns - rows
  const int64_t* seed = nullptr;
  int64_t threshold = 0;  // the least random word of a weight that is kept
  double keep = 1, scale = 1;

  bool packed() const { return of_rows.begins != nullptr; }
  int64_t row_tiles() const { return packed() ? rows / kTile + sequences : ceil_div(rows, kTile); }
  int64_t column_tiles() const { return packed() ? columns / kTile + sequences : ceil_div(columns, kTile); }
  PYMM_DEVICE int64_t key_head(int64_t head) const { return head / (heads / groups); }
};

// A block's place: its tile of rows (or of columns), a chunk of the width, head, and batch element or sequence.
struct Place {
  int64_t h, of;
  int row, first;
  PYMM_DEVICE Place(const Packing& packing, int64_t tiles, int64_t heads, int64_t chunks = 1) {
    const int64_t tile = blockIdx.x % tiles, i = blockIdx.x / tiles;
    first = static_cast<int>(i % chunks * kTile);
    h = i / chunks % heads;
    of = packing.begins == nullptr ? i / chunks / heads : packing.sequences[tile];
    const int64_t before = packing.begins == nullptr ? 0 : packing.begins[of] / kTile + of;
    row = static_cast<int>((tile - before) * kTile);
  }
};

// One sequence: a batch element, or a part of packed rows and columns.
struct Span {
  const Call& c;
  int64_t number;
  int row_begin = 0, column_begin = 0, rows, columns;
  int surplus;  // where it is causal, a row t attends to columns up to t + surplus

  PYMM_DEVICE Span(const Call& call, int64_t of) : c(call), number(of) {
    rows = static_cast<int>(c.rows);
    columns = static_cast<int>(c.columns);
    if (c.of_rows.begins != nullptr) {
      row_begin = static_cast<int>(c.of_rows.begins[of]);
      column_begin = static_cast<int>(c.of_columns.begins[of]);
      rows = static_cast<int>(c.of_rows.begins[of + 1]) - row_begin;
      columns = static_cast<int>(c.of_columns.begins[of + 1]) - column_begin;
    }
    surplus = c.causal == 2 ? columns - rows : 0;
  }

  template <class T>
  PYMM_DEVICE T* row_at(const HeadRows<T>& x, int64_t h, int64_t t) const {
    return x.at(number, h) + (row_begin + t) * x.row;
  }
  template <class T>
  PYMM_DEVICE T* column_at(const HeadRows<T>& x, int64_t h, int64_t s) const {
    return x.at(number, h) + (column_begin + s) * x.row;
  }
  // Where a head's statistics begin in a tensor (batch, heads, rows).
  PYMM_DEVICE int64_t statistics(int64_t h) const {
    return c.of_rows.begins == nullptr ? (number * c.heads + h) * c.rows : h * c.rows + row_begin;
  }
  // The first column that none of the rows up to `last` attends to.
  PYMM_DEVICE int columns_of(int last) const {
    if (c.causal == 0 || last + surplus + 1 >= columns) return columns;
    return last + surplus + 1 > 0 ? last + surplus + 1 : 0;
  }
  // The first row that attends to a column from `first` on.
  PYMM_DEVICE int first_row(int first) const { return c.causal == 0 || first <= surplus ? 0 : first - surplus; }
  // Whether the rows from t to t_end attend to all columns from s to s_end, with nothing added.
  PYMM_DEVICE bool plain(int t, int t_end, int s, int s_end) const {
    return c.mask_kind == kNoMask && c.padding == nullptr && t_end <= rows && s_end <= columns &&
           (c.causal == 0 || s_end - 1 <= t + surplus);
  }
};

// The scores of one head: `scale q . k` and what is added to it; -inf where t may not attend to s.
template <class T>
struct Head {
  using Acc = Accumulator<T>;
  const Call& c;
  const Span& span;
  const uint8_t* padding;
  int64_t mask_at;
  uint64_t number;  // of the head, for dropout

  PYMM_DEVICE Head(const Span& of, int64_t h)
      : c(of.c),
        span(of),
        padding(c.padding == nullptr ? nullptr : c.padding + of.number * c.columns),
        mask_at(of.number * c.mask_strides[0] + h * c.mask_strides[1]),
        number(static_cast<uint64_t>(of.number * c.heads + h)) {}

  PYMM_DEVICE Acc logit(int t, int s, Acc dot) const {
    const Acc none = -static_cast<Acc>(INFINITY);
    if (t >= span.rows || s >= span.columns || (c.causal != 0 && s > t + span.surplus)) return none;
    if (padding != nullptr && padding[s] == 0) return none;
    const Acc x = dot * static_cast<Acc>(c.scale);
    const int64_t at = mask_at + t * c.mask_strides[2] + s * c.mask_strides[3];
    if (c.mask_kind == kBoolMask) return static_cast<const uint8_t*>(c.mask)[at] != 0 ? x : none;
    if (c.mask_kind == kBias) return x + Acc(to_float(static_cast<const T*>(c.mask)[at]));
    if (c.mask_kind == kWideBias) return x + static_cast<const Acc*>(c.mask)[at];
    return x;
  }

  // What dropout multiplies a weight by: Philox-4x32-10 of its place (pymm/ops/_attention_reference.py).
  PYMM_DEVICE Acc factor(int t, int s) const {
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

// Inner loops that choose among the similarities of a row. Acc is float or double.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

// Integers as wide as an accumulator, for labels and positions that stand beside it in a register.
template <class Acc>
struct IndexOf {
  using type = int32_t;
};
template <>
struct IndexOf<double> {
  using type = int64_t;
};
template <class Acc>
using Index = typename IndexOf<Acc>::type;

// For each row, its positive of lowest and its negative of highest similarity, and where they are; -1 where there is
// none. Equal similarities: the lowest position.
template <class Acc>
struct Extremes {
  Acc* positive;
  Index<Acc>* positive_at;
  Acc* negative;
  Index<Acc>* negative_at;
};

template <class Acc>
struct Select {
  // Finds every v_j = c[j] * scale * column_scale[j] that is not below or equal to `threshold` (a NaN is not), writes
  // the values and their j, in order, and returns how many there are.
  int64_t (*above)(const Acc* c, Acc scale, const Acc* column_scale, int64_t n, Acc threshold, Acc* values,
                   int32_t* columns);

  // Updates the extremes of one row, and of the columns, with one stretch of a tile: c[j] is the product of `row` with
  // column first + j, which counts if that is above `after`. Column arrays are padded to whole vectors, with NaN in
  // column_scale. Rows must come in ascending order for each column, columns for each row.
  void (*extremes)(const Acc* c, Acc scale, const Acc* column_scale, const Index<Acc>* column_labels, Index<Acc> label,
                   Index<Acc> row, Index<Acc> first, int64_t n, Index<Acc> after, const Extremes<Acc>& rows,
                   const Extremes<Acc>& columns);

  // ranks[j] = how many of the `count` ascending values in `sorted` are below values[j] + shift, or equal to it where
  // `inclusive`. `sorted` is padded with infinities to 2^b - 1 numbers, the least that hold `count`.
  void (*ranks)(const Acc* sorted, int64_t count, const Acc* values, Acc shift, bool inclusive, int64_t n,
                Index<Acc>* ranks);
};

struct SelectTable {
  Select<float> f;
  Select<double> d;
};

PYMM_DECLARE_KERNELS(SelectTable, select_table)

template <class Acc>
const Select<Acc>& select_for();
template <>
inline const Select<float>& select_for<float>() {
  return select_table().f;
}
template <>
inline const Select<double>& select_for<double>() {
  return select_table().d;
}

}  // namespace pymm

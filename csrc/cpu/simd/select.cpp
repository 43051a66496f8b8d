// Parallel: nothing here; callers split rows over threads. On chip: a stretch of a row is in L1, where the product left
// it; what changes rarely (a new best, a new candidate) is guarded by one test per vector. Ragged edges: arrays that
// are the kernels' own are padded, the others are read lane by lane at their end.
#include "cpu/simd/select.h"

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {
namespace {

template <class Acc>
struct Impl {
  using V = Vector<Acc>;
  using I = Index<Acc>;
  using VI = Integers<Acc>;
  static constexpr int lanes = lanes_of<Acc>();

  static VI load_index(const I* p) {
    VI v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store_index(I* p, VI v) { memcpy(p, &v, sizeof(v)); }

  static int64_t above(const Acc* c, Acc scale, const Acc* column_scale, int64_t n, Acc threshold, Acc* values,
                       int32_t* columns) {
    int64_t found = 0;
    const auto take = [&](V v, int64_t i, int64_t count) {
      if (!any((VI)(v <= threshold) ^ -1)) return;
      for (int64_t lane = 0; lane < count; ++lane) {
        if (v[lane] <= threshold) continue;
        values[found] = v[lane];
        columns[found++] = static_cast<int32_t>(i + lane);
      }
    };
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) take(load(c + i) * scale * load(column_scale + i), i, lanes);
    if (i < n) take(load_some(c + i, n - i) * scale * load_some(column_scale + i, n - i), i, n - i);
    return found;
  }

  static void extremes(const Acc* c, Acc scale, const Acc* column_scale, const I* column_labels, I label, I row,
                       I first, int64_t n, I after, const Extremes<Acc>& rows, const Extremes<Acc>& columns) {
    VI lane;
    for (int i = 0; i < lanes; ++i) lane[i] = i;
    const VI none = lane * 0 - 1;
    V lowest = broadcast(rows.positive[row]), highest = broadcast(rows.negative[row]);
    VI lowest_at = none, highest_at = none;
    const int64_t start = after < first ? 0 : (after + 1 - first) / lanes * lanes;
    for (int64_t i = start; i < n; i += lanes) {
      const int64_t column = first + i;
      const V v = load(c + i) * scale * load(column_scale + column);
      const VI at = lane + static_cast<I>(column);
      const VI counts = at > after;
      const VI same = (load_index(column_labels + column) == label) & counts;
      const VI other = counts & ~same;

      const VI higher = (VI)(v > highest) & other;
      highest = higher ? v : highest;
      highest_at = higher ? at : highest_at;
      const V column_highest = load(columns.negative + column);
      const VI column_higher = (VI)(v > column_highest) & other;
      if (any(column_higher)) {
        store(columns.negative + column, column_higher ? v : column_highest);
        store_index(columns.negative_at + column,
                    column_higher ? none + 1 + row : load_index(columns.negative_at + column));
      }

      if (!any(same)) continue;
      const VI lower = (VI)(v < lowest) & same;
      lowest = lower ? v : lowest;
      lowest_at = lower ? at : lowest_at;
      const V column_lowest = load(columns.positive + column);
      const VI column_lower = (VI)(v < column_lowest) & same;
      store(columns.positive + column, column_lower ? v : column_lowest);
      store_index(columns.positive_at + column,
                  column_lower ? none + 1 + row : load_index(columns.positive_at + column));
    }
    if (any(highest_at > none)) {
      for (int i = 0; i < lanes; ++i) {
        if (highest_at[i] >= 0) keep(highest[i], highest_at[i], 1, rows.negative[row], rows.negative_at[row], first);
      }
    }
    if (any(lowest_at > none)) {
      for (int i = 0; i < lanes; ++i) {
        if (lowest_at[i] >= 0) keep(lowest[i], lowest_at[i], -1, rows.positive[row], rows.positive_at[row], first);
      }
    }
  }

  // Takes a lane's best if it is better than what is kept, or equal and before it within this stretch.
  static void keep(Acc value, I at, int sign, Acc& kept, I& kept_at, I first) {
    const bool better = sign > 0 ? value > kept : value < kept;
    if (better || (value == kept && kept_at >= first && at < kept_at)) {
      kept = value;
      kept_at = at;
    }
  }

  static void ranks(const Acc* sorted, int64_t count, const Acc* values, Acc shift, bool inclusive, int64_t n, I* out) {
    I top = 1;
    while (top <= count / 2) top *= 2;
    constexpr int64_t block = 256;  // values whose ranks advance together: the search of one waits for no other
    for (int64_t first = 0; first < n; first += block) {
      const int64_t some = min_of(block, n - first);
      const Acc* v = values + first;
      I* at = out + first;
      for (int64_t j = 0; j < some; ++j) at[j] = 0;
      for (I step = top; step > 0 && count > 0; step /= 2) {
        const Acc* probe = sorted + step - 1;
        if (inclusive) {
          for (int64_t j = 0; j < some; ++j) at[j] += probe[at[j]] <= v[j] + shift ? step : 0;
        } else {
          for (int64_t j = 0; j < some; ++j) at[j] += probe[at[j]] < v[j] + shift ? step : 0;
        }
      }
    }
  }

  static constexpr Select<Acc> table{&above, &extremes, &ranks};
};

}  // namespace

const SelectTable& select_table() {
  static constexpr SelectTable table{Impl<float>::table, Impl<double>::table};
  return table;
}

}  // namespace pymm::PYMM_ISA

// Parallel: nothing here; a tile belongs to one thread and is in its L1 or L2. Ragged edges: the last vector of a row
// is loaded in part, and a mask keeps its empty lanes out of maxima and sums.
#include "cpu/simd/info_nce.h"

#include "cpu/simd/scores.h"

namespace pymm::PYMM_ISA {
namespace {

template <class Acc>
struct Loops {
  using V = Vector<Acc>;
  using M = Mask<Acc>;
  static constexpr int lanes = lanes_of<Acc>();
  static constexpr Acc kLowest = -__builtin_huge_val();

  static void cosines(ScoreTile<Acc> t, const Acc* row_factor, const Acc* column_factor, Acc* row_max, Acc* column_max,
                      Acc* lowest, Acc* highest) {
    Acc low = -kLowest, high = kLowest;
    const auto widen = [&](Acc value) {
      low = value < low ? value : low;
      high = value > high ? value : high;
    };
    alignas(64) Acc best[kMaxColumns];
    for (int64_t j = 0; j < t.columns; ++j) best[j] = column_max ? column_max[j] : kLowest;
    for (int64_t r = 0; r < t.rows; ++r) {
      Acc* row = t.data + r * t.ld;
      const V factor = broadcast(row_factor[r]);
      V top = broadcast(kLowest);
      each_vector<Acc>(t.columns, [&](int64_t j, int64_t count, M keep) {
        const V c = load_some(row + j, count) * factor * load_some(column_factor + j, count);
        store_some(row + j, c, count);
        const V kept = keep ? c : broadcast(kLowest);
        top = vmax(kept, top);
        store_some(best + j, vmax(kept, load_some(best + j, count)), count);
      });
      if (row_max) {
        const Acc value = reduce_max(top);
        row_max[r] = value > row_max[r] ? value : row_max[r];
        widen(row_max[r]);
      }
    }
    if (column_max) {
      for (int64_t j = 0; j < t.columns; ++j) {
        column_max[j] = best[j];
        widen(best[j]);
      }
    }
    *lowest = low;
    *highest = high;
  }

  template <bool shared, bool weighted>
  static void exp_sums_of(ScoreTile<Acc> t, Acc scale, const References<Acc>& reference, const ExpSums<Acc>& sums) {
    alignas(64) Acc by_column[kMaxColumns] = {}, by_column_weighted[kMaxColumns] = {};
    const V s = broadcast(scale);
    for (int64_t r = 0; r < t.rows; ++r) {
      const Acc* row = t.data + r * t.ld;
      V sum{}, sum_weighted{};
      const V row_reference = broadcast(shared ? reference.tile : sums.rows ? reference.row[r] : Acc{0});
      each_vector<Acc>(t.columns, [&](int64_t j, int64_t count, M keep) {
        const V c = load_some(row + j, count);
        const V weight = weighted ? load_some(sums.weights + r * t.ld + j, count) : V{};
        V e{};
        if (shared || sums.rows) {
          e = exp_bounded(c * s - row_reference);
          e = keep ? e : V{};
          sum += e;
          if (weighted) sum_weighted += e * weight;
        }
        if (!sums.columns) return;
        if (!shared) e = exp_bounded(c * s - load_some(reference.column + j, count));
        store_some(by_column + j, load_some(by_column + j, count) + e, count);
        if (weighted) {
          store_some(by_column_weighted + j, load_some(by_column_weighted + j, count) + e * weight, count);
        }
      });
      if (sums.rows) {
        sums.row[r] += static_cast<double>(reduce_add(sum));
        if (weighted) sums.row_weighted[r] += static_cast<double>(reduce_add(sum_weighted));
      }
    }
    if (!sums.columns) return;
    for (int64_t j = 0; j < t.columns; ++j) {
      sums.column[j] += static_cast<double>(by_column[j]);
      if (weighted) sums.column_weighted[j] += static_cast<double>(by_column_weighted[j]);
    }
  }

  static void exp_sums(ScoreTile<Acc> t, Acc scale, const References<Acc>& reference, const ExpSums<Acc>& sums) {
    if (reference.shared) {
      sums.weights ? exp_sums_of<true, true>(t, scale, reference, sums)
                   : exp_sums_of<true, false>(t, scale, reference, sums);
    } else {
      sums.weights ? exp_sums_of<false, true>(t, scale, reference, sums)
                   : exp_sums_of<false, false>(t, scale, reference, sums);
    }
  }

  static V same_id(int32_t id, const int32_t* ids, int64_t count, V value) {
    V result{};
    for (int i = 0; i < count; ++i) result[i] = ids[i] == id ? value[i] : Acc{0};
    return result;
  }

  static void sums(ScoreTile<Acc> t, const int32_t* row_ids, const int32_t* column_ids, double* row_equal,
                   double* column_equal, double* row_all, double* column_all) {
    alignas(64) Acc equal[kMaxColumns] = {}, all[kMaxColumns] = {};
    for (int64_t r = 0; r < t.rows; ++r) {
      const Acc* row = t.data + r * t.ld;
      V sum_equal{}, sum_all{};
      each_vector<Acc>(t.columns, [&](int64_t j, int64_t count, M) {
        const V c = load_some(row + j, count);
        sum_all += c;
        store_some(all + j, load_some(all + j, count) + c, count);
        if (!row_ids) return;
        const V match = same_id(row_ids[r], column_ids + j, count, c);
        sum_equal += match;
        store_some(equal + j, load_some(equal + j, count) + match, count);
      });
      if (row_all) row_all[r] += static_cast<double>(reduce_add(sum_all));
      if (row_ids && row_equal) row_equal[r] += static_cast<double>(reduce_add(sum_equal));
    }
    for (int64_t j = 0; j < t.columns; ++j) {
      if (column_all) column_all[j] += static_cast<double>(all[j]);
      if (row_ids && column_equal) column_equal[j] += static_cast<double>(equal[j]);
    }
  }

  // The softmax terms of both sides for one vector of scores.
  template <bool shared>
  static inline V terms(V c, V s, const References<Acc>& reference, const TileGradient<Acc>& g, int64_t r, int64_t j,
                        int64_t count) {
    V sum{};
    if (shared) {
      const V e = exp_bounded(c * s - broadcast(reference.tile));
      V weight = broadcast(g.row_weight ? g.row_weight[r] : Acc{0});
      if (g.column_weight) weight += load_some(g.column_weight + j, count);
      return e * weight;
    }
    if (g.row_weight) sum += exp_bounded(c * s - broadcast(reference.row[r])) * broadcast(g.row_weight[r]);
    if (g.column_weight) {
      sum += exp_bounded(c * s - load_some(reference.column + j, count)) * load_some(g.column_weight + j, count);
    }
    return sum;
  }

  template <bool shared>
  static void soft_targets_of(ScoreTile<Acc> t, Acc scale, const References<Acc>& reference,
                              const TileGradient<Acc>& g) {
    const V s = broadcast(scale);
    for (int64_t r = 0; r < t.rows; ++r) {
      Acc* row = t.data + r * t.ld;
      const V factor = broadcast(g.row_factor[r]);
      each_vector<Acc>(t.columns, [&](int64_t j, int64_t count, M) {
        const V c = load_some(row + j, count) * factor * load_some(g.column_factor + j, count);
        store_some(row + j, terms<shared>(c, s, reference, g, r, j, count), count);
      });
    }
  }
  static void soft_targets(ScoreTile<Acc> t, Acc scale, const References<Acc>& reference, const TileGradient<Acc>& g) {
    reference.shared ? soft_targets_of<true>(t, scale, reference, g) : soft_targets_of<false>(t, scale, reference, g);
  }

  template <bool shared, bool general>
  static double gradient_of(ScoreTile<Acc> t, Acc scale, const References<Acc>& reference, const TileGradient<Acc>& g) {
    const V s = broadcast(scale);
    double total = 0;
    for (int64_t r = 0; r < t.rows; ++r) {
      Acc* row = t.data + r * t.ld;
      const V factor = broadcast(g.row_factor[r]);
      const int64_t partner = r + g.diagonal;
      V sum{};
      each_vector<Acc>(t.columns, [&](int64_t j, int64_t count, M keep) {
        const V column_factor = load_some(g.column_factor + j, count);
        const V c = load_some(row + j, count) * factor * column_factor;  // rounded as in `cosines`
        V d = terms<shared>(c, s, reference, g, r, j, count);
        if (general) {
          if (g.row_smooth) d -= broadcast(g.row_smooth[r]) + load_some(g.column_smooth + j, count);
          if (g.soft) d -= load_some(g.soft + r * t.ld + j, count);
          if (g.row_ids) {
            d -= same_id(g.row_ids[r], g.column_ids + j, count,
                         broadcast(g.row_hard[r]) + load_some(g.column_hard + j, count));
          }
          if (g.has_diagonal && partner >= j && partner < j + lanes) keep[partner - j] = 0;
        }
        const V weighted = d * c;
        sum += keep ? weighted : V{};
        store_some(row + j, d * factor * column_factor, count);
      });
      total += static_cast<double>(reduce_add(sum));
    }
    return total;
  }
  static double gradient(ScoreTile<Acc> t, Acc scale, const References<Acc>& reference, const TileGradient<Acc>& g) {
    const bool general = g.row_smooth || g.soft || g.row_ids || g.has_diagonal;
    if (reference.shared) {
      return general ? gradient_of<true, true>(t, scale, reference, g)
                     : gradient_of<true, false>(t, scale, reference, g);
    }
    return general ? gradient_of<false, true>(t, scale, reference, g)
                   : gradient_of<false, false>(t, scale, reference, g);
  }

  static constexpr InfoNceLoops<Acc> table{&cosines, &exp_sums, &sums, &soft_targets, &gradient};
};

}  // namespace

const InfoNceTable& info_nce_table() {
  static constexpr InfoNceTable table{Loops<float>::table, Loops<double>::table};
  return table;
}

}  // namespace pymm::PYMM_ISA

// Parallel: nothing here; a tile belongs to one thread and is in its L1 or L2. Ragged edges: the last vector of a row
// is loaded in part, and a mask keeps its empty lanes out of the sums.
#include "cpu/simd/sigmoid_contrastive.h"

#include "cpu/simd/scores.h"

namespace pymm::PYMM_ISA {
namespace {

template <class Acc>
struct Loops {
  using V = Vector<Acc>;
  using M = Mask<Acc>;
  static constexpr int lanes = lanes_of<Acc>();

  // step(row, column, count, keep, cosine, z) for each vector of the tile.
  template <bool diagonal, class Step>
  static inline __attribute__((always_inline)) void each_score(const SigmoidTile<Acc>& t, Step&& step) {
    M index;
    for (int i = 0; i < lanes; ++i) index[i] = i;
    for (int64_t r = 0; r < t.rows; ++r) {
      const V factor = broadcast(t.row_factor[r]);
      const int64_t partner = r + t.diagonal;
      each_vector<Acc>(t.columns, [&](int64_t j, int64_t count, M keep) {
        const V c = load_some(t.data + r * t.ld + j, count) * factor * load_some(t.column_factor + j, count);
        V z = broadcast(Acc{-1});
        if (diagonal && partner >= j && partner < j + lanes) {
          z = index == (M{} + static_cast<decltype(index[0] + 0)>(partner - j)) ? -z : z;
        }
        step(r, j, count, keep, c, z);
      });
    }
  }

  template <bool diagonal>
  static double loss_of(const SigmoidTile<Acc>& t) {
    const V scale = broadcast(t.scale), bias = broadcast(t.bias);
    double total = 0;
    V sum{};
    int64_t row = 0;
    each_score<diagonal>(t, [&](int64_t r, int64_t, int64_t, M keep, V c, V z) {
      if (r != row) {
        total += static_cast<double>(reduce_add(sum));
        sum = V{};
        row = r;
      }
      const V v = -z * (c * scale + bias);
      const V magnitude = v > V{} ? v : -v;
      const V softplus = log1p_bounded(exp_bounded(-magnitude)) + (v > V{} ? v : V{});
      sum += keep ? softplus : V{};
    });
    return total + static_cast<double>(reduce_add(sum));
  }
  static double loss(const SigmoidTile<Acc>& t) { return meets_diagonal(t) ? loss_of<true>(t) : loss_of<false>(t); }

  template <bool diagonal>
  static SigmoidSums gradient_of(const SigmoidTile<Acc>& t, Acc share) {
    const V scale = broadcast(t.scale), bias = broadcast(t.bias), shares = broadcast(share), one = broadcast(Acc{1});
    SigmoidSums total{0, 0};
    V sum{}, sum_scale{};
    int64_t row = 0;
    const auto flush = [&] {
      total.bias += static_cast<double>(reduce_add(sum));
      total.scale += static_cast<double>(reduce_add(sum_scale));
      sum = sum_scale = V{};
    };
    each_score<diagonal>(t, [&](int64_t r, int64_t j, int64_t count, M keep, V c, V z) {
      if (r != row) {
        flush();
        row = r;
      }
      // d/dl log(1 + exp(v)) with v = -z l is -z sigma(v), and sigma(v) is exp(-|v|) / (1 + exp(-|v|)) or 1 over it.
      const V v = -z * (c * scale + bias);
      const V e = exp_bounded(v > V{} ? -v : v);
      const V d = -z * (v > V{} ? one : e) / (one + e) * shares;
      const V weighted = d * c;
      sum += keep ? d : V{};
      sum_scale += keep ? weighted : V{};
      store_some(t.data + r * t.ld + j, d * broadcast(t.row_factor[r]) * load_some(t.column_factor + j, count), count);
    });
    flush();
    return total;
  }
  static SigmoidSums gradient(const SigmoidTile<Acc>& t, Acc share) {
    return meets_diagonal(t) ? gradient_of<true>(t, share) : gradient_of<false>(t, share);
  }

  static bool meets_diagonal(const SigmoidTile<Acc>& t) { return t.diagonal < t.columns && t.diagonal + t.rows > 0; }

  static constexpr SigmoidLoops<Acc> table{&loss, &gradient};
};

}  // namespace

const SigmoidTable& sigmoid_contrastive_table() {
  static constexpr SigmoidTable table{Loops<float>::table, Loops<double>::table};
  return table;
}

}  // namespace pymm::PYMM_ISA

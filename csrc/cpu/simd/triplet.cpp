// Parallel: nothing here; callers split triplets over threads. On chip: each row is read once, in registers, for all
// sums; the gradient reads and writes each row once. Ragged edges: missing lanes are read as zeros and not written.
#include "cpu/simd/triplet.h"

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {
namespace {

template <class T>
struct Impl {
  using Acc = Accumulator<T>;
  using V = Vector<Acc>;
  static constexpr int lanes = lanes_of<Acc>();

  // Calls f(a, p, n, offset, count) for each vector of the three rows.
  template <class F>
  static void each(const void* a, const void* p, const void* n, int64_t d, F&& f) {
    const auto *ta = static_cast<const T*>(a), *tp = static_cast<const T*>(p), *tn = static_cast<const T*>(n);
    int64_t i = 0;
    for (; i + lanes <= d; i += lanes) f(load(ta + i), load(tp + i), load(tn + i), i, lanes);
    if (i < d) f(load_some(ta + i, d - i), load_some(tp + i, d - i), load_some(tn + i, d - i), i, d - i);
  }

  static void products(const void* a, const void* p, const void* n, int64_t d, double* sums) {
    V ap{}, an{}, aa{}, pp{}, nn{};
    each(a, p, n, d, [&](V va, V vp, V vn, int64_t, int64_t) {
      ap += va * vp;
      an += va * vn;
      aa += va * va;
      pp += vp * vp;
      nn += vn * vn;
    });
    const V all[5] = {ap, an, aa, pp, nn};
    for (int i = 0; i < 5; ++i) sums[i] = static_cast<double>(reduce_add(all[i]));
  }

  static void square_distances(const void* a, const void* p, const void* n, int64_t d, double* sums) {
    V ap{}, an{};
    each(a, p, n, d, [&](V va, V vp, V vn, int64_t, int64_t) {
      ap += (va - vp) * (va - vp);
      an += (va - vn) * (va - vn);
    });
    sums[0] = static_cast<double>(reduce_add(ap));
    sums[1] = static_cast<double>(reduce_add(an));
  }

  static void combine(const void* a, const void* p, const void* n, int64_t d, const double* w, void* da, void* dp,
                      void* dn) {
    V v[7];
    for (int i = 0; i < 7; ++i) v[i] = broadcast(static_cast<Acc>(w[i]));
    each(a, p, n, d, [&](V va, V vp, V vn, int64_t i, int64_t count) {
      store_some(static_cast<T*>(da) + i, v[0] * va + v[1] * vp + v[2] * vn, count);
      store_some(static_cast<T*>(dp) + i, v[3] * va + v[4] * vp, count);
      store_some(static_cast<T*>(dn) + i, v[5] * va + v[6] * vn, count);
    });
  }

  static void differences(const void* a, const void* p, const void* n, int64_t d, const double* w, void* da, void* dp,
                          void* dn) {
    const V wp = broadcast(static_cast<Acc>(w[0])), wn = broadcast(static_cast<Acc>(w[1]));
    each(a, p, n, d, [&](V va, V vp, V vn, int64_t i, int64_t count) {
      const V u = wp * (va - vp), v = wn * (va - vn);
      store_some(static_cast<T*>(da) + i, u - v, count);
      store_some(static_cast<T*>(dp) + i, -u, count);
      store_some(static_cast<T*>(dn) + i, v, count);
    });
  }

  static constexpr Triplet table{&products, &square_distances, &combine, &differences};
};

}  // namespace

const TripletTable& triplet_table() {
  static constexpr TripletTable table{{Impl<float>::table, Impl<double>::table, Impl<bf16>::table, Impl<f16>::table}};
  return table;
}

}  // namespace pymm::PYMM_ISA

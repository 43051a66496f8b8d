#include "cpu/simd/rows.h"

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {
namespace {

template <class T>
struct Impl {
  using Acc = Accumulator<T>;
  using V = Vector<Acc>;
  static constexpr int lanes = lanes_of<Acc>();

  // Calls f(vector offset, count) over n lanes, count below `lanes` only for the last.
  template <class F>
  static void each(int64_t n, F&& f) {
    for (int64_t i = 0; i < n; i += lanes) f(i, min_of(lanes, n - i));
  }

  static void inverse_norms(const void* x, int64_t row_stride, int64_t rows, int64_t n, double eps, void* out) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = static_cast<const T*>(x) + r * row_stride;
      V sums[2] = {V{}, V{}};
      int64_t i = 0;
      for (; i + 2 * lanes <= n; i += 2 * lanes) {
        const V a = load(row + i), b = load(row + i + lanes);
        sums[0] += a * a;
        sums[1] += b * b;
      }
      for (; i < n; i += lanes) {
        const V a = load_some(row + i, n - i);
        sums[0] += a * a;
      }
      const double norm = __builtin_sqrt(static_cast<double>(reduce_add(sums[0] + sums[1])));
      static_cast<Acc*>(out)[r] = static_cast<Acc>(1.0 / (norm > eps ? norm : eps));
    }
  }

  static void widen(const void* source, double scale, int64_t n, void* accumulators) {
    const V s = broadcast<Acc>(static_cast<Acc>(scale));
    each(n, [&](int64_t i, int64_t count) {
      store_some(static_cast<Acc*>(accumulators) + i, load_some(static_cast<const T*>(source) + i, count) * s, count);
    });
  }

  static void narrow(const void* accumulators, double scale, int64_t n, void* target) {
    const V s = broadcast<Acc>(static_cast<Acc>(scale));
    each(n, [&](int64_t i, int64_t count) {
      store_some(static_cast<T*>(target) + i, load_some(static_cast<const Acc*>(accumulators) + i, count) * s, count);
    });
  }

  static void narrow_columns(const void* accumulators, double scale, const void* column_scale, int64_t n,
                             void* target) {
    const V s = broadcast<Acc>(static_cast<Acc>(scale));
    each(n, [&](int64_t i, int64_t count) {
      const V c = load_some(static_cast<const Acc*>(column_scale) + i, count);
      store_some(static_cast<T*>(target) + i, load_some(static_cast<const Acc*>(accumulators) + i, count) * s * c,
                 count);
    });
  }

  static double dot(const void* accumulators, const void* b, int64_t n) {
    V sum{};
    each(n, [&](int64_t i, int64_t count) {
      sum +=
          load_some(static_cast<const Acc*>(accumulators) + i, count) * load_some(static_cast<const T*>(b) + i, count);
    });
    return static_cast<double>(reduce_add(sum));
  }

  static void add_scaled(void* accumulators, double scale, const void* x, int64_t n) {
    const V s = broadcast<Acc>(static_cast<Acc>(scale));
    Acc* target = static_cast<Acc*>(accumulators);
    each(n, [&](int64_t i, int64_t count) {
      store_some(target + i, load_some(target + i, count) + s * load_some(static_cast<const T*>(x) + i, count), count);
    });
  }

  static constexpr Rows table{&inverse_norms, &widen, &narrow, &narrow_columns, &dot, &add_scaled};
};

}  // namespace

const RowsTable& rows_table() {
  static constexpr RowsTable table{{Impl<float>::table, Impl<double>::table, Impl<bf16>::table, Impl<f16>::table}};
  return table;
}

}  // namespace pymm::PYMM_ISA

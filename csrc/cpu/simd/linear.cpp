#include "cpu/simd/linear.h"

#include "cpu/simd/activation.h"

namespace pymm::PYMM_ISA {
namespace {

template <class T, class F>
struct Impl {
  using Acc = Accumulator<T>;
  using V = Vector<Acc>;
  static constexpr int lanes = lanes_of<Acc>();

  static void epilogue(const void* c, const void* bias, const void* residual, int64_t n, void* pre, void* out) {
    for (int64_t i = 0; i < n; i += lanes) {
      const int64_t count = min_of(lanes, n - i);
      V z = load_some(static_cast<const Acc*>(c) + i, count);
      if (bias) z += load_some(static_cast<const T*>(bias) + i, count);
      if (pre) store_some(static_cast<T*>(pre) + i, z, count);
      V y = F::value(z);
      if (residual) y += load_some(static_cast<const T*>(residual) + i, count);
      store_some(static_cast<T*>(out) + i, y, count);
    }
  }

  static void backward(const void* dout, const void* pre, int64_t n, void* dz, void* sums) {
    for (int64_t i = 0; i < n; i += lanes) {
      const int64_t count = min_of(lanes, n - i);
      const V g = load_some(static_cast<const T*>(dout) + i, count);
      const V d = g * F::slope(load_some(static_cast<const T*>(pre) + i, count));
      T* target = static_cast<T*>(dz) + i;
      store_some(target, d, count);
      if (!sums) continue;
      Acc* sum = static_cast<Acc*>(sums) + i;
      store_some(sum, load_some(sum, count) + load_some(target, count), count);
    }
  }
};

template <class T>
constexpr LinearLoops loops() {
  return {{&Impl<T, Identity>::epilogue, &Impl<T, Gelu>::epilogue, &Impl<T, GeluTanh>::epilogue,
           &Impl<T, QuickGelu>::epilogue, &Impl<T, Relu>::epilogue, &Impl<T, Silu>::epilogue},
          {&Impl<T, Identity>::backward, &Impl<T, Gelu>::backward, &Impl<T, GeluTanh>::backward,
           &Impl<T, QuickGelu>::backward, &Impl<T, Relu>::backward, &Impl<T, Silu>::backward}};
}

}  // namespace

const LinearTable& linear_table() {
  static constexpr LinearTable table{{loops<float>(), loops<double>(), loops<bf16>(), loops<f16>()}};
  return table;
}

}  // namespace pymm::PYMM_ISA

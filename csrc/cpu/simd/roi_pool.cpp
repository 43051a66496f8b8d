// Parallel: nothing here; callers split planes over threads. On chip: of a row of bins, the largest value of each
// column and the row that it is in; then each bin looks at its columns. Ragged edges: a span that ends before a whole
// register is read in part, and lanes beyond it hold anything and are not looked at.
#include "cpu/simd/roi_pool.h"

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {
namespace {

template <class T>
struct Impl {
  using Acc = Accumulator<T>;
  using V = Vector<Acc>;
  using I = Integers<Acc>;
  using Integer = decltype(I{}[0] + 0);
  static constexpr int lanes = lanes_of<Acc>();

  // The first of the largest values, or the first NaN, of rows [top, bottom) in each column, and its row.
  static void columns(const T* plane, int64_t width, int64_t span, int32_t top, int32_t bottom, Acc* values,
                      Integer* rows) {
    for (int64_t i = 0; i < span; i += lanes) {
      const int64_t count = min_of(lanes, span - i);
      V best = load_some(plane + top * width + i, count);
      I at = top - I{};
      for (int32_t row = top + 1; row < bottom; ++row) {
        const V x = load_some(plane + row * width + i, count);
        const I better = (x > best) | ((x != x) & (best == best));
        best = better ? x : best;
        at = better ? row - I{} : at;
      }
      memcpy(values + i, &best, sizeof(best));
      memcpy(rows + i, &at, sizeof(at));
    }
  }

  static void forward(const RoiPoolBox* box, const void* plane_in, int64_t width, void* scratch, void* out_in,
                      int32_t* argmax) {
    const T* plane = static_cast<const T*>(plane_in) + box->x;
    Acc* values = static_cast<Acc*>(scratch);
    Integer* rows = reinterpret_cast<Integer*>(values + (box->span + lanes));
    T* out = static_cast<T*>(out_in);
    for (int64_t r = 0; r < box->bins_h; ++r, out += box->bins_w, argmax += box->bins_w) {
      const int32_t top = box->top[r], bottom = box->bottom[r];
      if (top < bottom) columns(plane, width, box->span, top, bottom, values, rows);
      for (int64_t q = 0; q < box->bins_w; ++q) {
        int32_t c = box->left[q];
        if (top >= bottom || c >= box->right[q]) {
          out[q] = from_acc<T>(0);
          argmax[q] = -1;
          continue;
        }
        Acc best = values[c];
        Integer at = rows[c];
        int32_t column = c;
        for (++c; c < box->right[q]; ++c) {
          const Acc x = values[c];
          const bool nan = x != x, was = best != best;
          // Of equal ones the upper, and in a row the left.
          const bool better = (x > best && !was) || (nan && !was) || ((x == best || (nan && was)) && rows[c] < at);
          best = better ? x : best;
          at = better ? rows[c] : at;
          column = better ? c : column;
        }
        out[q] = from_acc<T>(best);
        argmax[q] = static_cast<int32_t>(at * width + box->x + column);
      }
    }
  }

  static void backward(const void* dout_in, const int32_t* argmax, int64_t bins, void* grad_in) {
    const T* dout = static_cast<const T*>(dout_in);
    Acc* grad = static_cast<Acc*>(grad_in);
    for (int64_t i = 0; i < bins; ++i) {
      if (argmax[i] >= 0) grad[argmax[i]] += to_acc(dout[i]);
    }
  }

  static constexpr RoiPool table{&forward, &backward};
};

}  // namespace

const RoiPoolTable& roi_pool_table() {
  static constexpr RoiPoolTable table{{Impl<float>::table, Impl<double>::table, Impl<bf16>::table, Impl<f16>::table}};
  return table;
}

}  // namespace pymm::PYMM_ISA

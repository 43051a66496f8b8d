// Parallel: nothing here; callers split planes over threads. On chip: the rows of bins of one box and one plane, and a
// register for each row of bins while the columns pass. Ragged edges: a span that ends before a whole register is read
// and written in part; lanes beyond the bins of a row hold anything and are not written.
#include "cpu/simd/roi_align.h"

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {
namespace {

constexpr int kBinRows = 7;  // in registers at once: the usual 7 and 14 divide into them

template <class T>
struct Impl {
  using Acc = Accumulator<T>;
  using V = Vector<Acc>;
  using Box = RoiBox<Acc>;
  static constexpr int lanes = lanes_of<Acc>();

  // rows[r][i] = sum of the taps of bin row r of w F[row][x + i].
  static void sum_taps(const Box& box, const T* plane, int64_t width, Acc* rows) {
    for (int64_t r = 0; r < box.bins_h; ++r) {
      const int32_t begin = box.first_tap[r], end = box.first_tap[r + 1];
      for (int64_t i = 0; i < box.span; i += lanes) {
        const int64_t count = min_of(lanes, box.span - i);
        V sum{};
        for (int32_t t = begin; t < end; ++t) {
          const T* from = plane + box.tap_row[t] * width + box.x + i;
          sum += broadcast(box.tap_weight[t]) * load_some(from, count);
        }
        store_some(rows + r * box.span + i, sum, count);
      }
    }
  }

  // `count` rows of bins from bin row r on, bins [bin, bin + lanes) of each.
  template <int count>
  static void sum_columns(const Box& box, const Acc* rows, int64_t r, int64_t bin, T* out) {
    V sums[count]{};
    const Acc* row = rows + r * box.span;
    for (int64_t c = 0; c < box.columns; ++c) {
      const V w = load(box.by_column + c * box.bins_w + bin);
      const Acc* at = row + box.column[c];
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) sums[i] += broadcast(at[i * box.span]) * w;
    }
    for (int i = 0; i < count; ++i) store_some(out + (r + i) * box.bins_w + bin, sums[i], box.bins_w - bin);
  }

  template <int count>
  static void sum_columns_of(int64_t left, const Box& box, const Acc* rows, int64_t r, int64_t bin, T* out) {
    if (left >= count) return sum_columns<count>(box, rows, r, bin, out);
    if constexpr (count > 1) sum_columns_of<count - 1>(left, box, rows, r, bin, out);
  }

  static void forward(const void* box_in, const void* plane, int64_t width, void* rows_in, void* out) {
    const Box& box = *static_cast<const Box*>(box_in);
    Acc* rows = static_cast<Acc*>(rows_in);
    sum_taps(box, static_cast<const T*>(plane), width, rows);
    for (int64_t r = 0; r < box.bins_h; r += kBinRows) {
      for (int64_t bin = 0; bin < box.bins_w; bin += lanes) {
        sum_columns_of<kBinRows>(box.bins_h - r, box, rows, r, bin, static_cast<T*>(out));
      }
    }
  }

  static void backward(const void* box_in, const void* dout_in, int64_t width, void* grad_in) {
    const Box& box = *static_cast<const Box*>(box_in);
    for (int64_t i = 0; i < box.span; i += lanes) {
      const int64_t count = min_of(lanes, box.span - i);
      Acc* grad = static_cast<Acc*>(grad_in) + box.x + i;
      for (int64_t r = 0; r < box.bins_h; ++r) {
        const T* dout = static_cast<const T*>(dout_in) + r * box.bins_w;
        V sum{};
        for (int64_t bin = 0; bin < box.bins_w; ++bin) {
          sum += broadcast(to_acc(dout[bin])) * load_some(box.by_bin + bin * box.span + i, count);
        }
        for (int32_t t = box.first_tap[r]; t < box.first_tap[r + 1]; ++t) {
          Acc* to = grad + box.tap_row[t] * width;
          store_some(to, load_some(to, count) + broadcast(box.tap_weight[t]) * sum, count);
        }
      }
    }
  }

  static constexpr RoiAlign table{&forward, &backward};
};

}  // namespace

const RoiAlignTable& roi_align_table() {
  static constexpr RoiAlignTable table{{Impl<float>::table, Impl<double>::table, Impl<bf16>::table, Impl<f16>::table}};
  return table;
}

}  // namespace pymm::PYMM_ISA

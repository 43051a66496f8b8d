// Parallel: nothing here; callers split planes over threads. On chip: the rows of bins of one box and one plane, and a
// register for each row of bins while the columns pass; or, where channels are neighbours, of one row of bins the
// columns of a register of channels, and a tile of bins that is turned when it is written. Ragged edges: a span that
// ends before a whole register is read and written in part; lanes beyond the bins of a row hold anything and are not
// written.
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

  // `count` bins from `bin` on of one row of them, a register of channels each.
  template <int count>
  static void sum_bins(const Box& box, const Acc* rows, int64_t bin, Acc* out) {
    V sums[count]{};
    for (int64_t c = 0; c < box.columns; ++c) {
      const V x = load(rows + c * lanes);
      const Acc* w = box.by_column + c * box.bins_w + bin;
#pragma GCC unroll 8
      for (int i = 0; i < count; ++i) sums[i] += broadcast(w[i]) * x;
    }
    for (int i = 0; i < count; ++i) store(out + (bin + i) * lanes, sums[i]);
  }

  template <int count>
  static void sum_bins_of(int64_t left, const Box& box, const Acc* rows, int64_t bin, Acc* out) {
    if (left >= count) return sum_bins<count>(box, rows, bin, out);
    if constexpr (count > 1) sum_bins_of<count - 1>(left, box, rows, bin, out);
  }

  static void forward_last(const void* box_in, const void* image_in, int64_t row_stride, int64_t pixel_stride,
                           int64_t channels, void* scratch, void* out_in) {
    const Box& box = *static_cast<const Box*>(box_in);
    const int64_t bins = box.bins_h * box.bins_w;
    Acc* tile = static_cast<Acc*>(scratch);
    Acc* rows = tile + bins * lanes;
    for (int64_t channel = 0; channel < channels; channel += lanes) {
      const int64_t count = min_of(lanes, channels - channel);
      const T* image = static_cast<const T*>(image_in) + box.x * pixel_stride + channel;
      for (int64_t r = 0; r < box.bins_h; ++r) {
        for (int64_t c = 0; c < box.columns; ++c) {
          const T* column = image + box.column[c] * pixel_stride;
          V sum{};
          for (int32_t t = box.first_tap[r]; t < box.first_tap[r + 1]; ++t) {
            sum += broadcast(box.tap_weight[t]) * load_some(column + box.tap_row[t] * row_stride, count);
          }
          store(rows + c * lanes, sum);
        }
        for (int64_t bin = 0; bin < box.bins_w; bin += kBinRows) {
          sum_bins_of<kBinRows>(box.bins_w - bin, box, rows, bin, tile + r * box.bins_w * lanes);
        }
      }
      T* out = static_cast<T*>(out_in) + channel * bins;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t bin = 0; bin < bins; ++bin) out[i * bins + bin] = from_acc<T>(tile[bin * lanes + i]);
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

  static constexpr RoiAlign table{&forward, &forward_last, &backward};
};

}  // namespace

const RoiAlignTable& roi_align_table() {
  static constexpr RoiAlignTable table{{Impl<float>::table, Impl<double>::table, Impl<bf16>::table, Impl<f16>::table}};
  return table;
}

}  // namespace pymm::PYMM_ISA

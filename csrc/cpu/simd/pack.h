// Packing into panels [rows / group][K / unit][group][unit], zero-padded, with conversion to the panel's element type.
#pragma once

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {

template <class From, class To>
inline To convert(From x) {
  return from_acc<To>(static_cast<Accumulator<To>>(to_acc(x)));
}
template <>
inline bf16 convert<bf16, bf16>(bf16 x) {
  return x;
}

template <class From, class To>
inline void convert_run(const From* source, To* target, int64_t count) {
  if constexpr (__is_same(From, To)) {
    memcpy(target, source, count * sizeof(To));
  } else {
    constexpr int lanes = lanes_of<Accumulator<From>>();
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store(target + i, load(source + i));
    for (; i < count; ++i) target[i] = convert<From, To>(source[i]);
  }
}

// One panel whose rows are contiguous along K. Blocks of `lanes` units of 32 bits are turned in registers.
template <class From, class To, int group, int unit>
inline void pack_panel_along_k(const From* source, int64_t row_stride, int64_t rows, int64_t k, int64_t depth,
                               To* panel) {
  constexpr bool turnable = unit * sizeof(To) == 4;
  int64_t done = 0;
  if constexpr (turnable) {
    constexpr int block = kLanes * unit;  // elements of K in one block
    for (; done + block <= k; done += block) {
      for (int first = 0; first < group; first += kLanes) {
        vuint lines[kLanes];
        for (int r = 0; r < kLanes; ++r) {
          const int64_t row = first + r;
          lines[r] = vuint{};
          if (row >= min_of(group, rows)) continue;
          alignas(64) To line[block];
          convert_run(source + row * row_stride + done, line, block);
          memcpy(&lines[r], line, sizeof(vuint));
        }
        transpose(lines);
        const size_t bytes = min_of(group - first, kLanes) * 4;
        for (int q = 0; q < kLanes; ++q) memcpy(panel + (done + q * unit) * group + first * unit, &lines[q], bytes);
      }
    }
  } else if constexpr (unit > 2) {
    for (; done + unit <= k; done += unit) {
      for (int64_t r = 0; r < group; ++r) {
        To* target = panel + done * group + r * unit;
        if (r < rows) {
          convert_run(source + r * row_stride + done, target, unit);
        } else {
          memset(static_cast<void*>(target), 0, unit * sizeof(To));
        }
      }
    }
  }
  for (int64_t p = done; p < depth; ++p) {
    for (int64_t r = 0; r < group; ++r) {
      To value{};
      if (r < rows && p < k) value = convert<From, To>(source[r * row_stride + p]);
      panel[(p / unit * group + r) * unit + p % unit] = value;
    }
  }
}

// One panel whose rows lie side by side in memory (row_stride 1): lines of K are copied, pairs interleaved.
template <class From, class To, int group, int unit>
inline void pack_panel_along_rows(const From* source, int64_t k_stride, int64_t rows, int64_t k, int64_t depth,
                                  To* panel) {
  constexpr To zero{};
  for (int64_t p = 0; p < depth; p += unit) {
    alignas(64) To lines[unit][group];
    for (int u = 0; u < unit; ++u) {
      const bool inside = p + u < k;
      if (inside) convert_run(source + (p + u) * k_stride, lines[u], rows);
      for (int64_t r = inside ? rows : 0; r < group; ++r) lines[u][r] = zero;
    }
    To* target = panel + p * group;
    for (int r = 0; r < group; ++r) {
      for (int u = 0; u < unit; ++u) target[r * unit + u] = lines[u][r];
    }
  }
}

template <class From, class To, int group, int unit, int k_unit>
void pack(const void* source, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k, void* panels) {
  const int64_t depth = round_up(k, k_unit);
  const auto* from = static_cast<const From*>(source);
  auto* to = static_cast<To*>(panels);
  for (int64_t first = 0; first < rows; first += group, to += group * depth) {
    const From* start = from + first * row_stride;
    const int64_t inside = min_of(group, rows - first);
    if (k_stride == 1) {
      pack_panel_along_k<From, To, group, unit>(start, row_stride, inside, k, depth, to);
    } else if (row_stride == 1) {
      pack_panel_along_rows<From, To, group, unit>(start, k_stride, inside, k, depth, to);
    } else {
      for (int64_t p = 0; p < depth; ++p) {
        for (int64_t r = 0; r < group; ++r) {
          To value{};
          if (r < inside && p < k) value = convert<From, To>(start[r * row_stride + p * k_stride]);
          to[(p / unit * group + r) * unit + p % unit] = value;
        }
      }
    }
  }
}

}  // namespace pymm::PYMM_ISA

// Packing into panels [rows / group][K / unit][group][unit], zero-padded, with conversion to the panel's element type.
#pragma once

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {

template <class From, class To>
inline To convert(From x) {
  if constexpr (__is_same(From, To)) {
    return x;
  } else {
    return from_acc<To>(static_cast<Accumulator<To>>(to_acc(x)));
  }
}

template <class From, class To>
inline void convert_run(const From* source, To* target, int64_t count) {
  if constexpr (__is_same(From, To) || __is_base_of(To, From)) {
    memcpy(target, source, count * sizeof(To));
  } else {
    constexpr int lanes = lanes_of<Accumulator<From>>();
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) store(target + i, load(source + i));
    if (i < count) store_some(target + i, load_some(source + i, count - i), count - i);
  }
}

// Turns one block of `group` rows and kLanes units in registers; `k` elements of it exist, the rest is zero. A line of
// the panel that is shorter than a register runs over into the next, which is written later, unless it is the last.
template <class From, class To, int group, int unit, bool full>
inline void turn_block(const From* source, int64_t row_stride, int64_t rows, int64_t k, bool last, To* panel) {
  constexpr int block = kLanes * unit;
  const int64_t units = full ? kLanes : ceil_div(k, unit);
  for (int first = 0; first < group; first += kLanes) {
    vuint lines[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      const int row = first + r;
      const bool inside = row < group && row < rows;
#if PYMM_ISA_LEVEL >= 2
      if constexpr (__is_same(From, To) && full) {  // without a branch, so that the lines stay in registers
        lines[r] = (vuint)_mm512_maskz_loadu_epi32(inside ? 0xffff : 0, source + (inside ? row * row_stride : 0));
        continue;
      }
#endif
      lines[r] = vuint{};
      if (inside) {
        alignas(64) To line[block] = {};
        convert_run(source + row * row_stride, line, full ? block : k);
        memcpy(&lines[r], line, sizeof(vuint));
      }
    }
    transpose(lines);
    constexpr int whole = sizeof(vuint);
    const int part = min_of(kLanes, group - first) * 4;
#pragma GCC unroll 16
    for (int q = 0; q < kLanes; ++q) {
      To* line = panel + q * unit * group + first * unit;
      if constexpr (full) {
        memcpy(line, &lines[q], q + 1 < kLanes || !last ? whole : part);
      } else if (q < units) {
        memcpy(line, &lines[q], part);
      }
    }
  }
}

// One panel whose rows are contiguous along K. Units of 32 bits are turned in registers, larger ones copied, doubles
// taken one by one.
template <class From, class To, int group, int unit>
inline void pack_panel_along_k(const From* source, int64_t row_stride, int64_t rows, int64_t k, int64_t depth,
                               To* panel) {
  if constexpr (unit * sizeof(To) == 4) {
    constexpr int block = kLanes * unit;
    int64_t done = 0;
    for (; done + block <= k; done += block) {
      turn_block<From, To, group, unit, true>(source + done, row_stride, rows, block, done + block == depth,
                                              panel + done * group);
    }
    if (done < k)
      turn_block<From, To, group, unit, false>(source + done, row_stride, rows, k - done, true, panel + done * group);
    for (int64_t p = round_up(k, unit); p < depth; ++p) {
      for (int r = 0; r < group; ++r) panel[p * group + r] = To{};
    }
  } else {
    for (int64_t done = 0; done < depth; done += unit, panel += unit * group) {
      const int64_t count = max_of(0, min_of(unit, k - done));
      for (int64_t r = 0; r < group; ++r) {
        To* target = panel + r * unit;
        if (r < rows && count == unit) {
          convert_run(source + r * row_stride + done, target, unit);
          continue;
        }
        for (int64_t u = 0; u < unit; ++u) {
          target[u] = r < rows && u < count ? convert<From, To>(source[r * row_stride + done + u]) : To{};
        }
      }
    }
  }
}

#if PYMM_ISA_LEVEL >= 3
// Two vectors rounded to 16 bits, `low` in the lower half.
inline __m512i narrow(bf16, vfloat low, vfloat high) { return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
inline __m512i narrow(f16, vfloat low, vfloat high) {
  const __m256i lower = _mm512_cvtps_ph((__m512)low, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_inserti64x4(_mm512_castsi256_si512(lower), _mm512_cvtps_ph((__m512)high, _MM_FROUND_TO_NEAREST_INT), 1);
}
// The numbers of the lower half, each beside one of the upper half.
inline __m512i interleave(__m512i halves) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}

// The pairs (a[i], b[i]) of To for i < count <= 16, zero beyond; b may be null.
template <class To>
inline vuint pairs(const To* a, const To* b, int64_t count) {
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
  if (!b) return (vuint)low;
  return (vuint)low | (vuint)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, b)) << 16;
}
template <class To>
inline vuint pairs(const float* a, const float* b, int64_t count) {
  const auto mask = static_cast<__mmask16>((1u << count) - 1);
  const __m512 low = _mm512_maskz_loadu_ps(mask, a), high = b ? _mm512_maskz_loadu_ps(mask, b) : _mm512_setzero_ps();
  return (vuint)interleave(narrow(To{}, (vfloat)low, (vfloat)high));
}

template <class From, class To, int group, int unit>
inline void pack_pairs_along_rows(const From* source, int64_t k_stride, int64_t rows, int64_t k, int64_t depth,
                                  To* panel) {
  const auto pair_at = [&](int64_t p, int64_t first) {
    const From* a = source + p * k_stride + first;
    const int64_t count = p < k ? max_of(0, min_of(kLanes, rows - first)) : 0;
    return count > 0 ? pairs<To>(a, p + 1 < k ? a + k_stride : nullptr, count) : vuint{};
  };
  if constexpr (unit == 2) {
    for (int64_t p = 0; p < depth; p += 2, panel += 2 * group) {
      for (int first = 0; first < group; first += kLanes) {
        const vuint line = pair_at(p, first);
        const bool whole = group - first >= kLanes || p + 2 < depth;  // what runs over is written by the next line
        memcpy(panel + 2 * first, &line, whole ? sizeof(line) : 4 * (group - first));
      }
    }
  } else {
    static_assert(unit == 2 * kLanes && group % kLanes == 0);
    for (int64_t p = 0; p < depth; p += unit, panel += unit * group) {
      for (int first = 0; first < group; first += kLanes) {
        vuint lines[kLanes];
        for (int q = 0; q < kLanes; ++q) lines[q] = pair_at(p + 2 * q, first);
        transpose(lines);
        memcpy(panel + first * unit, lines, sizeof(lines));
      }
    }
  }
}
#endif

// One panel whose rows lie side by side in memory (row_stride 1): lines of K are copied, pairs interleaved.
template <class From, class To, int group, int unit>
inline void pack_panel_along_rows(const From* source, int64_t k_stride, int64_t rows, int64_t k, int64_t depth,
                                  To* panel) {
  if constexpr (sizeof(To) == 2) {
#if PYMM_ISA_LEVEL >= 3
    pack_pairs_along_rows<From, To, group, unit>(source, k_stride, rows, k, depth, panel);
#endif
  } else {
    static_assert(unit == 1);
    for (int64_t p = 0; p < depth; ++p, panel += group) {
      if (p < k && rows == group) {
        convert_run(source + p * k_stride, panel, group);
      } else {
        if (p < k) convert_run(source + p * k_stride, panel, rows);
        for (int64_t r = p < k ? rows : 0; r < group; ++r) panel[r] = To{};
      }
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

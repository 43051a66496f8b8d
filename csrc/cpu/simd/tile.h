// Products of small blocks that were just computed: C[m, n] (+)= A[m, :] . B[:, n], with A row-major and B in rows of
// units, both of the panel's element type.
//
// gemm.h packs both operands into panels; that pays for operands that are used many times. Attention multiplies blocks
// that exist only for a moment, so its operands have the layouts that an epilogue can write front to back:
//   A: row i at a + i * lda, K contiguous, zero-padded to kUnit.
//   B: [K / kPair][columns][kPair], row of units p at b + p * ldb; either whole (`panel` = kColumns * kPair) or as
//   panels of
//      kColumns columns (`panel` = the elements of one), zero-padded to kUnit along K.
//   C: row-major accumulators. Rows and columns are multiples of kRowUnit and kColumnUnit: the caller pads its buffers.
#pragma once

#include "cpu/simd/amx.h"
#include "cpu/simd/pack.h"
#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {

#if PYMM_ISA_LEVEL >= 4
// float16 that the tiles multiply as it is, where f16 is multiplied as float. In memory there is no difference.
struct tiled_f16 : f16 {};
template <>
inline tiled_f16 from_acc<tiled_f16>(float x) {
  return {from_acc<f16>(x)};
}
#endif

// Element type and register tile for inputs of type T.
template <class T>
struct TileOf {
  using Acc = Accumulator<T>;
  using Element = Acc;
  static constexpr int kPair = 1, kUnit = 1;
};
#if PYMM_ISA_LEVEL >= 3
template <>
struct TileOf<bf16> {
  using Acc = float;
  using Element = bf16;
  static constexpr int kPair = 2, kUnit = PYMM_ISA_LEVEL >= 4 ? 32 : 2;
};
#endif
#if PYMM_ISA_LEVEL >= 4
template <>
struct TileOf<tiled_f16> {
  using Acc = float;
  using Element = f16;
  static constexpr int kPair = 2, kUnit = 32;
};
#endif

// One step of K for a register tile: the vector of B, and its product with an element (or pair) of A.
inline void multiply_add(vfloat& c, const float* a, vfloat b) { c += broadcast<float>(*a) * b; }
inline void multiply_add(vdouble& c, const double* a, vdouble b) { c += broadcast<double>(*a) * b; }
inline vfloat load_units(const float* b) { return load(b); }
inline vdouble load_units(const double* b) { return load(b); }
#if PYMM_ISA_LEVEL >= 3
inline void multiply_add(vfloat& c, const bf16* a, vfloat b) {
  int32_t pair;
  memcpy(&pair, a, sizeof(pair));
  c = (vfloat)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
}
inline vfloat load_units(const bf16* b) { return (vfloat)_mm512_loadu_ps(b); }
#endif

template <class T>
struct VectorTile {
  using Acc = Accumulator<T>;
  using E = typename TileOf<T>::Element;
  static constexpr int kPair = TileOf<T>::kPair, lanes = lanes_of<Acc>();
  static constexpr int kRowUnit = 4, kRows = PYMM_ISA_LEVEL >= 2 ? 8 : 4;
  static constexpr int kColumnUnit = lanes, kColumns = 3 * lanes;

  static void begin() {}
  static void end() {}

  template <int rows, int vectors>
  static void block(int64_t units, const E* a, int64_t lda, const E* b, int64_t ldb, Acc* c, int64_t ldc,
                    bool accumulate) {
    using V = Vector<Acc>;
    V acc[rows][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < vectors; ++j) acc[i][j] = accumulate ? load(c + i * ldc + j * lanes) : V{};
    }
    for (int64_t p = 0; p < units; ++p, a += kPair, b += ldb) {
      V row[vectors];
#pragma GCC unroll 3
      for (int j = 0; j < vectors; ++j) row[j] = load_units(b + j * lanes * kPair);
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 3
        for (int j = 0; j < vectors; ++j) multiply_add(acc[i][j], a + i * lda, row[j]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 3
      for (int j = 0; j < vectors; ++j) store(c + i * ldc + j * lanes, acc[i][j]);
    }
  }

  template <int rows>
  static void columns(int n, int64_t units, const E* a, int64_t lda, const E* b, int64_t ldb, Acc* c, int64_t ldc,
                      bool accumulate) {
    if (n > 2 * lanes) return block<rows, 3>(units, a, lda, b, ldb, c, ldc, accumulate);
    if (n > lanes) return block<rows, 2>(units, a, lda, b, ldb, c, ldc, accumulate);
    block<rows, 1>(units, a, lda, b, ldb, c, ldc, accumulate);
  }
  static void run(int rows, int n, int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb, Acc* c, int64_t ldc,
                  bool accumulate) {
    const int64_t units = ceil_div(k, kPair);
    if (rows > kRowUnit) return columns<kRows>(n, units, a, lda, b, ldb, c, ldc, accumulate);
    columns<kRowUnit>(n, units, a, lda, b, ldb, c, ldc, accumulate);
  }
};

#if PYMM_ISA_LEVEL >= 4
// AMX: up to 2 x 2 accumulator tiles of 16 x 16, each fed with 16 rows of 32 K and 16 pairs of K by 16 columns.
template <class Element>
struct AmxTile {
  using Acc = float;
  using E = Element;
  static constexpr int kRowUnit = 16, kRows = 32, kColumnUnit = 16, kColumns = 32;

  static void begin() { configure_tiles(); }
  static void end() { release_tiles(); }

  static void run(int rows, int n, int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb, float* c, int64_t ldc,
                  bool accumulate) {
    const bool below = rows > 16, right = n > 16;
    const int64_t a_bytes = lda * 2, b_bytes = ldb * 2, c_bytes = ldc * 4;
    float *c_below = c + 16 * ldc, *c_right = c + 16, *c_last = c_below + 16;
    if (accumulate) {
      load_tile<0>(c, c_bytes);
      if (right) load_tile<1>(c_right, c_bytes);
      if (below) load_tile<2>(c_below, c_bytes);
      if (below && right) load_tile<3>(c_last, c_bytes);
    } else {
      zero_tile<0>();
      zero_tile<1>();
      zero_tile<2>();
      zero_tile<3>();
    }
    for (int64_t p = 0; p < k; p += 32, a += 32, b += 16 * ldb) {
      load_tile<4>(a, a_bytes);
      load_tile<6>(b, b_bytes);
      dot_tiles<E, 0, 4, 6>();
      if (right) {
        load_tile<7>(b + 32, b_bytes);
        dot_tiles<E, 1, 4, 7>();
      }
      if (below) {
        load_tile<5>(a + 16 * lda, a_bytes);
        dot_tiles<E, 2, 5, 6>();
        if (right) dot_tiles<E, 3, 5, 7>();
      }
    }
    store_tile<0>(c, c_bytes);
    if (right) store_tile<1>(c_right, c_bytes);
    if (below) store_tile<2>(c_below, c_bytes);
    if (below && right) store_tile<3>(c_last, c_bytes);
  }
};
template <class T>
struct ChosenTile {
  using type = VectorTile<T>;
};
template <>
struct ChosenTile<bf16> {
  using type = AmxTile<bf16>;
};
template <>
struct ChosenTile<tiled_f16> {
  using type = AmxTile<f16>;
};
template <class T>
using Tile = typename ChosenTile<T>::type;
#else
template <class T>
using Tile = VectorTile<T>;
#endif

// The columns of the next register tile, `left` still to do: of four vectors two and two, not three and one.
template <class T>
inline int64_t next_columns(int64_t left) {
  return left == 4 * Tile<T>::kColumnUnit ? 2 * Tile<T>::kColumnUnit : min_of(left, Tile<T>::kColumns);
}

// A part of K; its ends are multiples of kUnit.
struct Span {
  int64_t from, to;
};

// C[m x n] (+)= A . B for B whole; m and n are rounded up to the tile's units. `span(i, j, width)` is the part of K
// that the register tile of columns [j, j + width) needs whose first row is i.
template <class T, class F>
inline void multiply(int64_t m, int64_t n, F&& span, const typename TileOf<T>::Element* a, int64_t lda,
                     const typename TileOf<T>::Element* b, int64_t ldb, Accumulator<T>* c, int64_t ldc,
                     bool accumulate) {
  const int64_t rows = round_up(m, Tile<T>::kRowUnit), columns = round_up(n, Tile<T>::kColumnUnit);
  for (int64_t j = 0; j < columns;) {
    const int64_t width = next_columns<T>(columns - j);
    for (int64_t i = 0; i < rows; i += Tile<T>::kRows) {
      const Span k = span(i, j, width);
      Tile<T>::run(static_cast<int>(min_of(rows - i, Tile<T>::kRows)), static_cast<int>(width), k.to - k.from,
                   a + i * lda + k.from, lda, b + k.from / TileOf<T>::kPair * ldb + j * TileOf<T>::kPair, ldb,
                   c + i * ldc + j, ldc, accumulate);
    }
    j += width;
  }
}

// Packing, from rows of the input type T whose elements are dense, into the element type E of the tile. A unit is one
// number, or a pair of 16 bits each; a vuint holds kLanes units. Everything outside the source becomes zero.

// Units along a row: kLanes numbers widened, or kLanes pairs.
template <class T, class E>
inline vuint units_along(const T* p, int64_t count) {
  if (count <= 0) return vuint{};
  if constexpr (sizeof(E) == 2) {
    vuint line{};
    if (count >= 2 * kLanes) {
      memcpy(&line, p, sizeof(line));
    } else {
      memcpy(&line, p, static_cast<size_t>(count) * sizeof(T));
    }
    return line;
  } else {
    return bit_cast<vuint>(load_some(p, count));
  }
}

// Units across rows: one number of each of kLanes columns, or a pair of it and the one below.
template <class T, class E>
inline vuint units_across(const T* p, int64_t stride, int64_t rows, int64_t count) {
  if (count <= 0 || rows <= 0) return vuint{};
  if constexpr (sizeof(E) == 2) {
#if PYMM_ISA_LEVEL >= 3
    if (rows > 1 && count >= kLanes) {
      const __m256i upper = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      const __m256i lower = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + stride));
      return (vuint)interleave(_mm512_inserti64x4(_mm512_castsi256_si512(upper), lower, 1));
    }
#endif
    const auto* halves = reinterpret_cast<const bf16*>(p);  // to the upper half of a float, bit for bit
    const vuint upper = bit_cast<vuint>(load_some(halves, count));
    const vuint lower = rows > 1 ? bit_cast<vuint>(load_some(halves + stride, count)) : vuint{};
    return (upper >> 16) | lower;
  } else {
    return bit_cast<vuint>(load_some(p, count));
  }
}

// Calls f(q, line) for the lines of the transpose of kLanes lines, source(r) being line r.
template <class Source, class F>
inline void turn(Source&& source, int64_t count, F&& f) {
  vuint lines[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) lines[r] = source(r);
  transpose(lines);
#pragma GCC unroll 16
  for (int q = 0; q < kLanes; ++q) {
    if (q < count) f(q, lines[q]);
  }
}

// The first `bytes` of a line.
inline void put_line(void* target, vuint line, size_t bytes) {
  if (bytes == sizeof(line)) {
    memcpy(target, &line, sizeof(line));
  } else {
    memcpy(target, &line, bytes);
  }
}

// A: `padded` rows of `ld`.
template <class T>
inline void pack_rows(const T* source, int64_t stride, int64_t rows, int64_t columns, int64_t padded,
                      typename TileOf<T>::Element* target, int64_t ld) {
  for (int64_t i = 0; i < padded; ++i, target += ld) {
    const int64_t inside = i < rows ? columns : 0;
    int64_t done = 0;
    if constexpr (sizeof(T) == sizeof(*target)) {  // rows are short: no call for their whole lines
      constexpr int64_t line = sizeof(vuint) / sizeof(T);
      for (; done + line <= inside; done += line) {
        memcpy(static_cast<void*>(target + done), source + i * stride + done, sizeof(vuint));
      }
    }
    if (done < inside) convert_run(source + i * stride + done, target + done, inside - done);
    memset(static_cast<void*>(target + inside), 0, static_cast<size_t>(ld - inside) * sizeof(*target));
  }
}

// A turned, from packed rows: `padded` rows, one per column of the source, of `ld`, a multiple of kUnit.
template <class T>
inline void pack_rows_turned(const typename TileOf<T>::Element* source, int64_t stride, int64_t rows, int64_t columns,
                             int64_t padded, typename TileOf<T>::Element* target, int64_t ld) {
  using E = typename TileOf<T>::Element;
  constexpr int pair = TileOf<T>::kPair;
  if constexpr (__is_same(E, double)) {
    for (int64_t d = 0; d < padded; ++d) {
      for (int64_t i = 0; i < ld; ++i) target[d * ld + i] = d < columns && i < rows ? source[i * stride + d] : 0.0;
    }
  } else {
    for (int64_t i = 0; i < ld; i += kLanes * pair) {
      const size_t bytes = static_cast<size_t>(min_of(ld - i, kLanes * pair)) * sizeof(E);
      for (int64_t d = 0; d < padded; d += kLanes) {
        if (i + kLanes * pair <= min_of(rows, ld) && d + kLanes <= columns) {
          turn([&](int r) { return units_across<E, E>(source + (i + r * pair) * stride + d, stride, pair, kLanes); },
               kLanes, [&](int q, vuint line) { memcpy(target + (d + q) * ld + i, &line, sizeof(line)); });
          continue;
        }
        turn(
            [&](int r) {
              const int64_t row = i + r * pair;
              return units_across<E, E>(source + row * stride + d, stride, rows - row, min_of(columns - d, kLanes));
            },
            padded - d, [&](int q, vuint line) { put_line(target + (d + q) * ld + i, line, bytes); });
      }
    }
  }
}

// B whole, K over the rows of the source: `padded` rows (a multiple of kUnit) of `width` columns, in units.
template <class T>
inline void pack_units(const T* source, int64_t stride, int64_t rows, int64_t columns, int64_t padded,
                       typename TileOf<T>::Element* target, int64_t width) {
  using E = typename TileOf<T>::Element;
  if constexpr (sizeof(E) == 2) {
    for (int64_t i = 0; i < padded; i += 2, target += 2 * width) {
      int64_t j = 0;
      for (; i + 1 < rows && j + kLanes <= columns; j += kLanes) {
        const vuint line = units_across<T, E>(source + i * stride + j, stride, 2, kLanes);
        memcpy(target + 2 * j, &line, sizeof(line));
      }
      for (; j < width; j += kLanes) {
        const vuint line = units_across<T, E>(source + i * stride + j, stride, rows - i, min_of(columns - j, kLanes));
        memcpy(target + 2 * j, &line, sizeof(line));
      }
    }
  } else {
    pack_rows<T>(source, stride, rows, columns, padded, target, width);
  }
}

// B in panels of Tile::kColumns columns, K along the rows of the source, padded to `depth`; panel_elements apart.
template <class T>
constexpr int64_t panel_elements(int64_t depth) {
  return depth * Tile<T>::kColumns;
}
template <class T>
inline void pack_panels(const T* source, int64_t stride, int64_t rows, int64_t columns, int64_t depth,
                        typename TileOf<T>::Element* target) {
  using E = typename TileOf<T>::Element;
  constexpr int pair = TileOf<T>::kPair;
  constexpr int64_t width = Tile<T>::kColumns;
  for (int64_t first = 0; first < rows; first += width, target += panel_elements<T>(depth)) {
    if constexpr (__is_same(T, double)) {
      for (int64_t p = 0; p < depth; ++p) {
        for (int64_t j = 0; j < width; ++j) {
          target[p * width + j] = first + j < rows && p < columns ? source[(first + j) * stride + p] : 0.0;
        }
      }
    } else {
      const int64_t units = depth / pair;
      for (int64_t j = 0; j < min_of(width, rows - first); j += kLanes) {
        for (int64_t p = 0; p < units; p += kLanes) {
          const T* block = source + (first + j) * stride + p * pair;
          if (first + j + kLanes <= rows && (p + kLanes) * pair <= columns) {
            turn([&](int r) { return units_along<T, E>(block + r * stride, pair * kLanes); }, kLanes,
                 [&](int q, vuint line) { memcpy(target + ((p + q) * width + j) * pair, &line, sizeof(line)); });
            continue;
          }
          turn(
              [&](int r) {
                const int64_t row = first + j + r;
                return row < rows ? units_along<T, E>(source + row * stride + p * pair, columns - p * pair) : vuint{};
              },
              units - p,
              [&](int q, vuint line) { memcpy(target + ((p + q) * width + j) * pair, &line, sizeof(line)); });
        }
      }
    }
  }
}

}  // namespace pymm::PYMM_ISA

// Parallel: nothing here; callers split blocks over threads. On chip: the mr x nr accumulators stay in registers for
// the whole of K, a B panel (nr x K) stays in L1 while the A panels pass, the packed block of B in L2. Ragged edges:
// panels are zero-padded, so a full register tile is always computed; only its valid part is copied out.
#include "cpu/simd/gemm.h"

#include "cpu/simd/amx.h"
#include "cpu/simd/pack.h"
#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {
namespace {

// Register tiles: the accumulators, one row of B and a broadcast fill the register file.
#if PYMM_ISA_LEVEL >= 2
constexpr int kMr = 12, kVectors = 2;
#elif PYMM_ISA_LEVEL == 1
constexpr int kMr = 6, kVectors = 2;
#else
constexpr int kMr = 4, kVectors = 2;
#endif

template <class Acc>
struct FmaTile {
  using Element = Acc;
  static constexpr int mr = kMr, nr = kVectors * lanes_of<Acc>(), ka = 1, kb = 1, k_unit = 1;

  static void run(int64_t k, const Acc* a, const Acc* b, Acc* c, int64_t ldc, bool accumulate) {
    using V = Vector<Acc>;
    constexpr int lanes = lanes_of<Acc>();
    V acc[mr][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[i][j] = V{};
    }
    for (int64_t p = 0; p < k; ++p, a += mr, b += nr) {
      V row[kVectors];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) row[j] = load(b + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < mr; ++i) {
        const V value = broadcast<Acc>(a[i]);
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) acc[i][j] += value * row[j];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        Acc* target = c + i * ldc + j * lanes;
        store(target, accumulate ? load(target) + acc[i][j] : acc[i][j]);
      }
    }
  }
  static void begin() {}
  static void end() {}
};

#if PYMM_ISA_LEVEL == 3
// VDPBF16PS: each lane adds two products of neighbouring K, so panels hold pairs.
struct Bf16Tile {
  using Element = bf16;
  static constexpr int mr = kMr, nr = 2 * kLanes, ka = 2, kb = 2, k_unit = 2;

  static void run(int64_t k, const bf16* a, const bf16* b, float* c, int64_t ldc, bool accumulate) {
    __m512 acc[mr][2];
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i) acc[i][0] = acc[i][1] = _mm512_setzero_ps();
    for (int64_t p = 0; p < k; p += 2, a += 2 * mr, b += 2 * nr) {
      const __m512bh low = (__m512bh)_mm512_loadu_si512(b), high = (__m512bh)_mm512_loadu_si512(b + 2 * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < mr; ++i) {
        int32_t pair;
        memcpy(&pair, a + 2 * i, sizeof(pair));
        const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
        acc[i][0] = _mm512_dpbf16_ps(acc[i][0], value, low);
        acc[i][1] = _mm512_dpbf16_ps(acc[i][1], value, high);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < mr; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        float* target = c + i * ldc + j * kLanes;
        _mm512_storeu_ps(target, accumulate ? _mm512_add_ps(_mm512_loadu_ps(target), acc[i][j]) : acc[i][j]);
      }
    }
  }
  static void begin() {}
  static void end() {}
};
#elif PYMM_ISA_LEVEL >= 4
// AMX: 2 x 2 accumulator tiles of 16 x 16. A tile of A is 16 rows of 32 K; a tile of B is 16 pairs of K by 16 columns.
template <class E>
struct AmxTile {
  using Element = E;
  static constexpr int mr = 32, nr = 32, ka = 32, kb = 2, k_unit = 32;

  static void run(int64_t k, const E* a, const E* b, float* c, int64_t ldc, bool accumulate) {
    const int64_t stride = ldc * static_cast<int64_t>(sizeof(float));
    if (accumulate) {
      load_tile<0>(c, stride);
      load_tile<1>(c + 16, stride);
      load_tile<2>(c + 16 * ldc, stride);
      load_tile<3>(c + 16 * ldc + 16, stride);
    } else {
      zero_tile<0>();
      zero_tile<1>();
      zero_tile<2>();
      zero_tile<3>();
    }
    for (int64_t p = 0; p < k; p += k_unit, a += mr * ka, b += nr * k_unit) {
      load_tile<4>(a, 64);
      load_tile<5>(a + 16 * ka, 64);
      load_tile<6>(b, 128);
      load_tile<7>(b + 32, 128);
      dot_tiles<E, 0, 4, 6>();
      dot_tiles<E, 1, 4, 7>();
      dot_tiles<E, 2, 5, 6>();
      dot_tiles<E, 3, 5, 7>();
    }
    store_tile<0>(c, stride);
    store_tile<1>(c + 16, stride);
    store_tile<2>(c + 16 * ldc, stride);
    store_tile<3>(c + 16 * ldc + 16, stride);
  }
  static void begin() { configure_tiles(); }
  static void end() { release_tiles(); }
};
#endif

template <class Tile, class Acc>
void multiply(int64_t m, int64_t n, int64_t k, const void* a, const void* b, void* c, int64_t ldc, bool accumulate) {
  using Element = typename Tile::Element;
  constexpr int mr = Tile::mr, nr = Tile::nr;
  const int64_t depth = round_up(k, Tile::k_unit);
  const auto* a_panels = static_cast<const Element*>(a);
  const auto* b_panels = static_cast<const Element*>(b);
  auto* out = static_cast<Acc*>(c);
  alignas(64) Acc edge[mr * nr];
  Tile::begin();
  for (int64_t j = 0; j < n; j += nr) {
    const int64_t columns = min_of(nr, n - j);
    for (int64_t i = 0; i < m; i += mr) {
      const int64_t rows = min_of(mr, m - i);
      const Element* a_panel = a_panels + i * depth;
      const Element* b_panel = b_panels + j * depth;
      Acc* target = out + i * ldc + j;
      if (rows == mr && columns == nr) {
        Tile::run(depth, a_panel, b_panel, target, ldc, accumulate);
        continue;
      }
      Tile::run(depth, a_panel, b_panel, edge, nr, false);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t s = 0; s < columns; ++s) {
          target[r * ldc + s] = accumulate ? target[r * ldc + s] + edge[r * nr + s] : edge[r * nr + s];
        }
      }
    }
  }
  Tile::end();
}

template <class Tile, class In>
constexpr Gemm make() {
  using Acc = Accumulator<In>;
  using Element = typename Tile::Element;
  return Gemm{Tile::mr,
              Tile::nr,
              Tile::k_unit,
              sizeof(Element),
              &pack<In, Element, Tile::mr, Tile::ka, Tile::k_unit>,
              &pack<In, Element, Tile::nr, Tile::kb, Tile::k_unit>,
              &pack<Acc, Element, Tile::mr, Tile::ka, Tile::k_unit>,
              &pack<Acc, Element, Tile::nr, Tile::kb, Tile::k_unit>,
              &multiply<Tile, Acc>};
}

}  // namespace

const GemmTable& gemm_table() {
#if PYMM_ISA_LEVEL >= 4
  using ForBf16 = AmxTile<bf16>;
#elif PYMM_ISA_LEVEL == 3
  using ForBf16 = Bf16Tile;
#else
  using ForBf16 = FmaTile<float>;
#endif
  constexpr Gemm of_float = make<FmaTile<float>, float>(), of_double = make<FmaTile<double>, double>();
  constexpr Gemm of_bf16 = make<ForBf16, bf16>(), of_f16 = make<FmaTile<float>, f16>();
  static constexpr GemmTable table{{of_float, of_double, of_bf16, of_f16}, of_f16};
#if PYMM_ISA_LEVEL >= 4
  static constexpr GemmTable with_f16{{of_float, of_double, of_bf16, make<AmxTile<f16>, f16>()}, of_f16};
  if (current_isa() >= Isa::amx_fp16) return with_f16;
#endif
  return table;
}

}  // namespace pymm::PYMM_ISA

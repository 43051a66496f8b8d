// The backward pass of a loss on the products of two sets of rows: a block of the gradient G of those products, of
// bounded size, feeds G . C and G^T . A, so that the products are recomputed once and memory stays O(N).
//
// G is kept in the type that is multiplied: bf16 for bf16, the type itself for float32 and float64. float16 would lose
// the small gradients of a mean over many pairs, so there G and the features are each the sum of two bf16, and three
// products on tensor cores make the one (the fourth is below float32's last digit).
#pragma once

#include "cuda/rows.h"
#include "cuda/warp_tile.h"

namespace pymm::cuda {

// At most: of a block of G, and of groups of tiles in each direction of a forward pass, of which 16 x 16 occupy the
// largest GPUs of today. The emulation's are so small that the tests' samples have several of each.
#if defined(__CUDACC__)
constexpr int64_t kGradientRows = 8192, kGradientBytes = 128 << 20, kGroups = 16;
#else
constexpr int64_t kGradientRows = 192, kGradientBytes = 64 << 10, kGroups = 2;
#endif
inline int64_t groups_of(int64_t rows, int64_t of_tile) {
  const int64_t tiles = ceil_div(rows, of_tile);
  return tiles < kGroups ? tiles : kGroups;
}

template <class T>
struct GradientType {
  using type = T;
};
template <>
struct GradientType<f16> {
  using type = bf16;
};
template <class T>
using Gradient = typename GradientType<T>::type;
template <class T>
constexpr int kPlanes = std::is_same_v<T, f16> ? 2 : 1;

// Tiles of the products of two sets of rows: the usual one, and where a thread keeps two sets of sums. A double takes
// two registers.
template <class T>
using PlainTile = std::conditional_t<std::is_same_v<T, double>, Tile<T, 1, 2>, Tile<T, 4, 4>>;
template <class T>
using SlimTile = std::conditional_t<std::is_same_v<T, double>, Tile<T, 1, 2>, Tile<T, 2, 4>>;

// dx = scale (t - <t, x^> x^) with x^ = x * inverse, one block per row; where the norm is below eps, that is its
// inverse at or above `limit`, it is a constant. `t` is the gradient of x^ divided by the norms. A null inverse: rows
// as they are.
template <class T>
PYMM_GLOBAL void through_norms_kernel(const Accumulator<T>* t, const T* x, const Accumulator<T>* inverse, int64_t d,
                                      double limit, const Accumulator<T>* scale, T* dx) {
  using Acc = Accumulator<T>;
  const Acc factor = scale != nullptr ? *scale : Acc(1);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * d;
  const Acc inv = inverse != nullptr && inverse[blockIdx.x] < Acc(limit) ? inverse[blockIdx.x] : Acc(0);
  Acc along = 0;
  for (int64_t i = threadIdx.x; i < d; i += kRowThreads) along += t[begin + i] * (Acc(to_float(x[begin + i])) * inv);
  along = block_sum<kRowThreads>(along) * inv;
  for (int64_t i = threadIdx.x; i < d; i += kRowThreads) {
    dx[begin + i] = from_float((t[begin + i] - along * Acc(to_float(x[begin + i]))) * factor, T{});
  }
}

// to += sum(parts), by one block and in one order.
template <class V>
PYMM_GLOBAL void add_sum_kernel(const V* parts, int64_t count, double* to) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kRowThreads) sum += static_cast<double>(parts[i]);
  sum = block_sum<kRowThreads>(sum);
  if (threadIdx.x == 0) *to += sum;
}

// to = from * factor
template <class V>
PYMM_GLOBAL void convert_kernel(const double* from, double factor, V* to) {
  *to = static_cast<V>(*from * factor);
}

inline dim3 grid_of(int64_t blocks, int64_t more = 1, int64_t last = 1) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31) && more < (1 << 16) && last < (1 << 16), "a GPU's grid has no ", blocks,
                  " x ", more, " x ", last, " blocks");
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(more), static_cast<unsigned>(last));
}

// A block of G and where it stands in the whole.
template <class T>
struct GradientBlock {
  Gradient<T>* data;
  int64_t plane, stride;  // elements from plane to plane and from row to row
  int64_t first_a, first_c, end_a, end_c;

  PYMM_DEVICE void set(int64_t row, int64_t column, Accumulator<T> value) const {
    const int64_t at = (row - first_a) * stride + column - first_c;
    const Gradient<T> high = from_float(value, Gradient<T>{});
    data[at] = high;
    if constexpr (kPlanes<T> == 2) data[plane + at] = from_float(value - to_float(high), bf16{});
  }
};

// sums[row, e] (+)= sum_k G[row, k] features[k, e], or with G transposed.
template <class T, bool transposed>
PYMM_GLOBAL PYMM_LAUNCH_BOUNDS(kTileThreads, kBlocksAtOnce<T>) void gradient_product_kernel(Operand<T> g,
                                                                                            Operand<T> features,
                                                                                            int64_t depth, bool add,
                                                                                            Accumulator<T>* sums) {
  PYMM_DYNAMIC_SHARED(shared);
  PlainTile<T> tile;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * tile.kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * tile.kColumns;
  tile.template multiply<transposed, true>(g, row, features, column, depth, shared);
  tile.each([&](int m, int n, int half, int j, Accumulator<T>& sum) {
    const int64_t r = row + tile.row(m, half), e = column + tile.column(n, j);
    if (r >= g.rows || e >= features.rows) return;
    Accumulator<T>& to = sums[r * features.stride + e];
    to = add ? to + sum : sum;
  });
}

// x = high + low, of bf16 each.
template <class T>
PYMM_GLOBAL void split_kernel(const T* x, int64_t count, bf16* planes) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kTileThreads + threadIdx.x;
  if (i >= count) return;
  const float value = to_float(x[i]);
  planes[i] = from_float(value, bf16{});
  planes[count + i] = from_float(value - to_float(planes[i]), bf16{});
}

// The features of one set of rows as the products take them, and the sums that they collect.
template <class T>
class GradientRows {
 public:
  GradientRows(const Stream& stream, const Tensor& features, bool wanted) : features_(features), planes_(features) {
    if (wanted)
      sums_ = torch::stable::new_empty(features, {features.size(0), features.size(1)}, accumulator_type(features));
    if constexpr (kPlanes<T> == 2) {
      planes_ = torch::stable::new_empty(features, {2, features.size(0), features.size(1)}, ScalarType::BFloat16);
      if (features.numel() > 0) {
        PYMM_LAUNCH(split_kernel<f16>, grid_of(ceil_div(features.numel(), kTileThreads)), dim3(kTileThreads), stream,
                    data<f16>(features), features.numel(), data<bf16>(planes_));
      }
    }
  }

  bool wanted() const { return sums_.has_value(); }

  // Adds the product of a block of G with the rows `first...` of `other`; `transposed`, of its transpose.
  template <bool transposed>
  void add(const Stream& stream, const GradientBlock<T>& g, const GradientRows& other) {
    if (!wanted() || features_.size(1) == 0) return;
    const int64_t e = features_.size(1);
    const int64_t first = transposed ? g.first_c : g.first_a, rows = (transposed ? g.end_c : g.end_a) - first;
    const int64_t first_k = transposed ? g.first_a : g.first_c, depth = (transposed ? g.end_a : g.end_c) - first_k;
    using Kept = Gradient<T>;
    const int64_t plane = other.features_.numel();
    bool add = first_k > 0 || started_;
    const auto product = [&](int of_g, int of_features) {
      const Operand<Kept> left{g.data + of_g * g.plane, rows, g.stride};
      const Operand<Kept> right{data<Kept>(other.planes_) + of_features * plane + first_k * e, e, e};
      PYMM_LAUNCH_SHARED((gradient_product_kernel<Kept, transposed>),
                         grid_of(ceil_div(rows, PlainTile<Kept>::kRows), ceil_div(e, PlainTile<Kept>::kColumns)),
                         dim3(kTileThreads), PlainTile<Kept>::kBytes, stream, left, right, depth, add,
                         data<Accumulator<T>>(*sums_) + first * e);
      add = true;
    };
    product(0, 0);
    if constexpr (kPlanes<T> == 2) product(0, 1), product(1, 0);
  }

  // The next block of G starts a new set of partners: its products add to what is there.
  void go_on() { started_ = true; }

  // The gradient of the features, times `scale` unless that is null; a null inverse means that they were not divided by
  // their norms. The sums are given back, so that the gradients of two large sets never lie beside both their sums.
  Tensor finish(const Stream& stream, const Accumulator<T>* inverse, double eps, const Accumulator<T>* scale) {
    Tensor out = torch::stable::new_empty(features_, {wanted() ? features_.size(0) : 0, features_.size(1)});
    if (out.numel() > 0 && started_) {
      PYMM_LAUNCH(through_norms_kernel<T>, grid_of(out.size(0)), dim3(kRowThreads), stream,
                  data<Accumulator<T>>(*sums_), data<T>(features_), inverse, out.size(1), (1.0 - 1e-6) / eps, scale,
                  data<T>(out));
    } else if (out.numel() > 0) {
      torch::stable::zero_(out);  // they met no partners
    }
    sums_.reset();
    return out;
  }

 private:
  Tensor features_, planes_;
  std::optional<Tensor> sums_;
  bool started_ = false;
};

// f(block) fills each block of G, which then goes into the sums of both sets of rows.
template <class T, class F>
void each_gradient_block(const Stream& stream, const Tensor& a, const Tensor& c, GradientRows<T>& rows,
                         GradientRows<T>& columns, F&& f) {
  const int64_t count_a = a.size(0), count_c = c.size(0);
  if (count_a == 0 || count_c == 0) return;
  using Kept = Gradient<T>;
  const int64_t step_a = count_a < kGradientRows ? count_a : kGradientRows;
  const int64_t most = kGradientBytes / (step_a * static_cast<int64_t>(sizeof(Kept)) * kPlanes<T>) / 8 * 8;
  const int64_t fits = most > 8 ? most : 8, stride = ceil_div(count_c < fits ? count_c : fits, 8) * 8;
  const Tensor buffer = torch::stable::new_empty(a, {kPlanes<T>, step_a, stride},
                                                 std::is_same_v<Kept, bf16> ? ScalarType::BFloat16 : a.scalar_type());
  for (int64_t first_a = 0; first_a < count_a; first_a += step_a) {
    const int64_t end_a = first_a + step_a < count_a ? first_a + step_a : count_a;
    for (int64_t first_c = 0; first_c < count_c; first_c += stride) {
      const int64_t end_c = first_c + stride < count_c ? first_c + stride : count_c;
      const GradientBlock<T> block{data<Kept>(buffer), step_a * stride, stride, first_a, first_c, end_a, end_c};
      f(block);
      rows.template add<false>(stream, block, columns);
      columns.template add<true>(stream, block, rows);
    }
  }
  rows.go_on();
  columns.go_on();
}

}  // namespace pymm::cuda

// Pairwise cosine similarity, out[n, m] = <x_n, y_m> / (max(||x_n||, eps) max(||y_m||, eps)).
//
// Parallel: one block per tile of the result and batch (warp_tile.h): bf16 and f16 on tensor cores, the norms in the
// epilogue. Bytes: x and y once per tile row or column (L2 serves the repeats), the result once.
//
// Backward: with T = dout . y^, dx = (T - <T, x^> x^) / ||x||. bf16 and f16 without a batch: dout over both norms,
// block by block, feeds both gradients on tensor cores (pair_gradient.h). Else one kernel on float units makes T in the
// accumulator's type (tile.h), one closes each row; the same pair serves dy with the roles exchanged.
#include "cuda/pair_gradient.h"
#include "cuda/tile.h"

namespace pymm::cuda {
namespace {

constexpr const char* kOp = "cosine_similarity";

template <class T>
PYMM_GLOBAL void close_rows_kernel(const Accumulator<T>* t, const T* x, const Accumulator<T>* inverse, int64_t d,
                                   double limit, T* dx) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * d;
  close_row(t + begin, x + begin, inverse[blockIdx.x], d, limit, Accumulator<T>(1), dx + begin);
}

struct Shape {
  int64_t batch, n, m, d;  // with one y for all, the leading dimensions are rows like any other
};

Shape shape_of(const Tensor& x, const Tensor& y) {
  STD_TORCH_CHECK(x.dim() >= 2 && y.dim() >= 2 && x.scalar_type() == y.scalar_type(), kOp,
                  ": x and y need two dimensions and one type");
  const bool shared = y.dim() == 2;
  Shape s{1, x.size(-2), y.size(-2), x.size(-1)};
  for (int64_t i = 0; i + 2 < x.dim(); ++i) (shared ? s.n : s.batch) *= x.size(i);
  STD_TORCH_CHECK(y.size(-1) == s.d && y.numel() == s.batch * s.m * s.d, kOp, ": y does not fit x");
  return s;
}

std::vector<int64_t> sizes_of(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < x.dim(); ++i) sizes.push_back(x.size(i));
  return sizes;
}

template <class T>
PYMM_GLOBAL PYMM_LAUNCH_BOUNDS(kTileThreads, kBlocksAtOnce<T>) void cosines_kernel(const T* x, const T* y,
                                                                                   const Accumulator<T>* inv_x,
                                                                                   const Accumulator<T>* inv_y, Shape s,
                                                                                   T* out) {
  PYMM_DYNAMIC_SHARED(shared);
  using Sums = PlainTile<T>;
  const int64_t batch = blockIdx.z, row = static_cast<int64_t>(blockIdx.x) * Sums::kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * Sums::kColumns;
  Sums tile;
  tile.multiply({x + batch * s.n * s.d, s.n, s.d}, row, {y + batch * s.m * s.d, s.m, s.d}, column, s.d, shared);
  tile.each([&](int m, int n, int half, int j, Accumulator<T>& sum) {
    const int64_t r = row + Sums::row(m, half), c = column + Sums::column(n, j);
    if (r >= s.n || c >= s.m) return;
    out[(batch * s.n + r) * s.m + c] = from_float(sum * inv_x[batch * s.n + r] * inv_y[batch * s.m + c], T{});
  });
}

// G = dout / (||x|| ||y||)
template <class T>
PYMM_GLOBAL void divide_kernel(const T* dout, int64_t columns, const Accumulator<T>* inv_x, const Accumulator<T>* inv_y,
                               GradientBlock<T> g) {
  const int64_t row = g.first_a + blockIdx.x;
  for (int64_t column = g.first_c + threadIdx.x; column < g.end_c; column += kTileThreads) {
    g.set(row, column, to_float(dout[row * columns + column]) * inv_x[row] * inv_y[column]);
  }
}

Tensor with_last(const Tensor& x, int64_t drop, std::optional<int64_t> last, ScalarType dtype) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + drop < x.dim(); ++i) sizes.push_back(x.size(i));
  if (last) sizes.push_back(*last);
  return torch::stable::new_empty(x, sizes, dtype);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_in, const Tensor& y_in, double eps) {
  const Tensor x = dense(x_in), y = dense(y_in);
  const Shape s = shape_of(x, y);
  const Stream stream(x);
  Tensor out = with_last(x, 1, s.m, x.scalar_type());
  Tensor inv_x = with_last(x, 1, std::nullopt, accumulator_type(x));
  Tensor inv_y = with_last(y, 1, std::nullopt, accumulator_type(x));
  dispatch(x, kOp, [&]<class T>() {
    using Acc = Accumulator<T>;
    inverse_norms<T>(stream, x, s.d, eps, inv_x);
    inverse_norms<T>(stream, y, s.d, eps, inv_y);
    if (out.numel() == 0) return;
    const dim3 grid = grid_of(ceil_div(s.n, PlainTile<T>::kRows), ceil_div(s.m, PlainTile<T>::kColumns), s.batch);
    PYMM_LAUNCH_SHARED(cosines_kernel<T>, grid, dim3(kTileThreads), PlainTile<T>::kBytes, stream, data<T>(x),
                       data<T>(y), data<Acc>(inv_x), data<Acc>(inv_y), s, data<T>(out));
  });
  return {out, inv_x, inv_y};
}

// The gradient of x (n rows): g is dout as seen from x, element (i, j) of a batch at i * g_row + j * g_column.
template <class T>
void side(const Stream& stream, const Tensor& g, int64_t g_row, int64_t g_column, const Tensor& x, const Tensor& y,
          const Tensor& inv_x, const Tensor& inv_y, Shape s, double eps, Tensor& dx) {
  using Acc = Accumulator<T>;
  if (dx.numel() == 0) return;
  const Tensor t = torch::stable::new_empty(x, std::vector<int64_t>{s.batch, s.n, s.d}, accumulator_type(x));
  const Product p{s.n, s.d, s.m, s.n * s.m, g_row, g_column, s.m * s.d, 1, s.d, s.n * s.d};
  const Acc* no_scale = nullptr;
  PYMM_LAUNCH((product_kernel<T, T, Acc, Acc>), tiles(s.n, s.d, s.batch), dim3(kSide, kSide), stream, data<T>(g),
              data<T>(y), data<Acc>(t), no_scale, no_scale, data<Acc>(inv_y), p);
  PYMM_LAUNCH(close_rows_kernel<T>, grid_of(s.batch * s.n), dim3(kRowThreads), stream, data<Acc>(t), data<T>(x),
              data<Acc>(inv_x), s.d, (1.0 - 1e-6) / eps, data<T>(dx));
}

// Both gradients, of matrices.
template <class T>
std::tuple<Tensor, Tensor> both_sides(const Stream& stream, const Tensor& dout, const Tensor& x, const Tensor& y,
                                      const Tensor& inv_x, const Tensor& inv_y, double eps) {
  using Acc = Accumulator<T>;
  GradientRows<T> rows(stream, x, true), columns(stream, y, true);
  each_gradient_block<T>(stream, x, y, rows, columns, [&](const GradientBlock<T>& g) {
    PYMM_LAUNCH(divide_kernel<T>, grid_of(g.end_a - g.first_a), dim3(kTileThreads), stream, data<T>(dout), y.size(0),
                data<Acc>(inv_x), data<Acc>(inv_y), g);
  });
  Tensor dx = rows.finish(stream, data<Acc>(inv_x), eps, nullptr);
  return {dx, columns.finish(stream, data<Acc>(inv_y), eps, nullptr)};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dout_in, const Tensor& x_in, const Tensor& y_in, const Tensor& inv_x,
                                    const Tensor& inv_y, double eps) {
  const Tensor dout = dense(dout_in), x = dense(x_in), y = dense(y_in);
  const Shape s = shape_of(x, y);
  STD_TORCH_CHECK(dout.scalar_type() == x.scalar_type() && dout.numel() == s.batch * s.n * s.m, kOp,
                  ": dout must have the shape and type of the result");
  const Stream stream(x);
  Tensor dx = torch::stable::empty_like(x), dy = torch::stable::empty_like(y);
  dispatch(x, kOp, [&]<class T>() {
    if constexpr (on_tensor_cores<T>) {
      if (s.batch == 1 && dx.numel() > 0 && dy.numel() > 0) {
        const Tensor rows = torch::stable::view(x, {s.n, s.d}), columns = torch::stable::view(y, {s.m, s.d});
        const auto [du, dv] = both_sides<T>(stream, dout, rows, columns, inv_x, inv_y, eps);
        dx = torch::stable::view(du, sizes_of(x));
        dy = torch::stable::view(dv, sizes_of(y));
        return;
      }
    }
    side<T>(stream, dout, s.m, 1, x, y, inv_x, inv_y, s, eps, dx);
    side<T>(stream, dout, 1, s.m, y, x, inv_y, inv_x, Shape{s.batch, s.m, s.n, s.d}, eps, dy);
  });
  return {dx, dy};
}

}  // namespace
}  // namespace pymm::cuda

STABLE_TORCH_LIBRARY_IMPL(pymm_cuda, PYMM_DISPATCH_KEY, m) {
  m.impl("cosine_similarity", TORCH_BOX(&pymm::cuda::forward));
  m.impl("cosine_similarity_backward", TORCH_BOX(&pymm::cuda::backward));
}

// Pairwise cosine similarity, out[n, m] = <x_n, y_m> / (max(||x_n||, eps) max(||y_m||, eps)).
//
// Parallel over leading dimensions and blocks of rows. x and y are packed as they are; the norms enter in the
// epilogue, in float32, so no normalized copy exists. Backward: with T = dout . y^ (y^ the normalized rows),
// dx = (T - <T, x^> x^) / ||x||, and the same with the roles exchanged.
#include "cpu/product.h"
#include "cpu/simd/rows.h"

namespace pymm {
namespace {

constexpr const char* kOp = "cosine_similarity";

struct Shape {
  int64_t batch, n, m, d;
  bool shared_y;
};

Shape shape_of(const Tensor& x, const Tensor& y) {
  PYMM_CHECK(x.dim() >= 2 && y.dim() >= 2, kOp, ": x and y need at least two dimensions");
  PYMM_CHECK(x.scalar_type() == y.scalar_type(), kOp, ": x and y must have one type");
  Shape s{1, x.size(-2), y.size(-2), x.size(-1), y.dim() == 2 && x.dim() > 2};
  PYMM_CHECK(y.size(-1) == s.d, kOp, ": x and y must have one width");
  PYMM_CHECK(s.shared_y || x.dim() == y.dim(), kOp, ": y must be (M, D) or have x's leading dimensions");
  for (int64_t i = 0; i + 2 < x.dim(); ++i) {
    s.batch *= x.size(i);
    PYMM_CHECK(s.shared_y || x.size(i) == y.size(i), kOp, ": leading dimensions differ");
  }
  return s;
}

Tensor with_last(const Tensor& x, int64_t drop, std::initializer_list<int64_t> last, ScalarType dtype) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + drop < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.insert(sizes.end(), last);
  return fresh(torch::stable::new_empty(x, sizes, dtype));
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_in, const Tensor& y_in, double eps) {
  const Tensor x = dense(x_in), y = dense(y_in);
  const Shape s = shape_of(x, y);
  const DType dtype = dtype_of(x, kOp);
  const ScalarType acc_type = accumulator_type(dtype);
  Tensor out = with_last(x, 2, {s.n, s.m}, x.scalar_type());
  Tensor inv_x = with_last(x, 1, {}, acc_type), inv_y = with_last(y, 1, {}, acc_type);
  const Gemm& gemm = gemm_for(dtype);
  const Rows& rows_of = rows_for(dtype);
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    const int64_t x_rows = s.batch * s.n, y_rows = (s.shared_y ? 1 : s.batch) * s.m;
    const auto norms = [&](const Tensor& from, Tensor& to, int64_t rows) {
      parallel_ranges(rows, 64, [&](int64_t begin, int64_t end) {
        rows_of.inverse_norms(data<T>(from) + begin * s.d, s.d, end - begin, s.d, eps, data<Acc>(to) + begin);
      });
    };
    norms(x, inv_x, x_rows);
    norms(y, inv_y, y_rows);
    if (s.n == 0 || s.m == 0) return;
    if (s.d == 0) {
      torch::stable::zero_(out);
      return;
    }
    // With one y for all, the leading dimensions are rows like any other.
    const int64_t products = s.shared_y ? 1 : s.batch, n = s.shared_y ? x_rows : s.n;
    for (int64_t b = 0; b < products; ++b) {
      const PackedB packed(gemm, s.m, s.d, matrix(data<T>(y) + b * s.m * s.d, s.d, 1));
      const Acc* scale_x = data<Acc>(inv_x) + b * n;
      const Acc* scale_y = data<Acc>(inv_y) + b * s.m;
      T* target = data<T>(out) + b * n * s.m;
      blocked_product<Acc>(n, matrix(data<T>(x) + b * n * s.d, s.d, 1), packed,
                           [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const Acc* c, int64_t ldc) {
                             for (int64_t r = 0; r < rows; ++r) {
                               rows_of.narrow_columns(c + r * ldc, scale_x[row + r], scale_y + column, columns,
                                                      target + (row + r) * s.m + column);
                             }
                           });
    }
  });
  return {out, inv_x, inv_y};
}

// The gradient of `x` (n rows): g is dout as seen from x, element (i, j) at g[i * g_row + j * g_column], j over m rows
// of y. `into` may hold a sum over several calls (a shared y), kept in accumulators.
template <class T>
void side(const T* g, int64_t g_row, int64_t g_column, const T* x, const T* y, const Accumulator<T>* inv_x,
          const Accumulator<T>* inv_y, int64_t n, int64_t m, int64_t d, double eps, T* dx) {
  using Acc = Accumulator<T>;
  const Gemm& gemm = gemm_for(dtype_of<T>());
  const Rows& rows_of = rows_for(dtype_of<T>());
  // B^T = y^: K runs over the rows of y, which are scaled while they are packed.
  const PackedB packed(gemm, d, m, [&](int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) {
    Scratch scaled(count * rows * static_cast<int64_t>(sizeof(Acc)));
    for (int64_t j = 0; j < count; ++j) {
      rows_of.widen(y + (k + j) * d + row, inv_y[k + j], rows, scaled.as<Acc>() + j * rows);
    }
    gemm.pack_b_accumulators(scaled.as<Acc>(), 1, rows, rows, count, panels);
  });
  // A chunk of dout is packed when its turn comes, and meets all of y^ while it is in L2.
  const int64_t tiles = ceil_div(n, gemm.mr), tasks = Split(tiles, gemm.mr, 1, thread_count()).rows;
  parallel_ranges(tasks, 1, [&](int64_t begin, int64_t end) {
    Scratch panels(gemm.a_bytes(kRows, kDepth));
    Scratch sums(kRows * d * static_cast<int64_t>(sizeof(Acc)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = tiles * task / tasks * gemm.mr;
      const int64_t rows = min_of(n, tiles * (task + 1) / tasks * gemm.mr) - row;
      for (int64_t first = 0; first < m; first += kDepth) {
        const int64_t depth = min_of(kDepth, m - first);
        matrix(g, g_row, g_column).pack_a(gemm, row, rows, first, depth, panels.as<char>());
        for (int64_t block = 0; block < packed.blocks(); ++block) {
          gemm.multiply(rows, packed.columns(block), depth, panels.as<char>(), packed.chunk(block, first),
                        sums.as<Acc>() + block * kColumns, d, first > 0);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        Acc* t = sums.as<Acc>() + r * d;
        const T* x_row = x + (row + r) * d;
        const double inverse = inv_x[row + r];
        const bool clamped = inverse >= (1.0 - 1e-6) / eps;  // max(||x||, eps) = eps: the norm is a constant
        if (!clamped) rows_of.add_scaled(t, -rows_of.dot(t, x_row, d) * inverse * inverse, x_row, d);
        rows_of.narrow(t, inverse, d, dx + (row + r) * d);
      }
    }
  });
}

std::tuple<Tensor, Tensor> backward(const Tensor& dout_in, const Tensor& x_in, const Tensor& y_in, const Tensor& inv_x,
                                    const Tensor& inv_y, double eps) {
  const Tensor dout = dense(dout_in), x = dense(x_in), y = dense(y_in);
  const Shape s = shape_of(x, y);
  const DType dtype = dtype_of(x, kOp);
  PYMM_CHECK(dout.scalar_type() == x.scalar_type() && dout.numel() == s.batch * s.n * s.m, kOp,
             ": dout must have the shape and type of the result");
  Tensor dx = fresh(torch::stable::empty_like(x)), dy = fresh(torch::stable::empty_like(y));
  if (s.n == 0 || s.m == 0 || s.d == 0) {
    torch::stable::zero_(dx);
    torch::stable::zero_(dy);
    return {dx, dy};
  }
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    const int64_t products = s.shared_y ? 1 : s.batch, n = s.shared_y ? s.batch * s.n : s.n;
    for (int64_t b = 0; b < products; ++b) {
      const T* g = data<T>(dout) + b * n * s.m;
      const T *xb = data<T>(x) + b * n * s.d, *yb = data<T>(y) + b * s.m * s.d;
      const Acc *ix = data<Acc>(inv_x) + b * n, *iy = data<Acc>(inv_y) + b * s.m;
      side<T>(g, s.m, 1, xb, yb, ix, iy, n, s.m, s.d, eps, data<T>(dx) + b * n * s.d);
      side<T>(g, 1, s.m, yb, xb, iy, ix, s.m, n, s.d, eps, data<T>(dy) + b * s.m * s.d);
    }
  });
  return {dx, dy};
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("cosine_similarity", TORCH_BOX(&pymm::forward));
  m.impl("cosine_similarity_backward", TORCH_BOX(&pymm::backward));
}

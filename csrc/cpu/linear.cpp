// A linear layer, out = f(x W^T + b) + r.
//
// Parallel over blocks of rows, and of columns where the rows are few. Bias, activation and residual are applied to
// each block of accumulators while it is in cache; the input of f is written beside the result where backward needs
// it. Backward: dz = dout f'(z) and the column sums of it (db) in one pass over memory, then dx = dz W and
// dW = dz^T x from the same packing. Every sum runs over fixed blocks in a fixed order, whatever the number of threads.
#include "cpu/simd/linear.h"
#include "cpu/product.h"
#include "cpu/simd/rows.h"

namespace pymm {
namespace {

constexpr const char* kOp = "linear";
constexpr int64_t kSumRows = 64;  // rows whose sum is one term of db

int index_of(const std::optional<std::string>& activation) {
  if (!activation) return static_cast<int>(Activation::none);
  constexpr const char* names[] = {"gelu", "gelu_tanh", "quick_gelu", "relu", "silu"};
  for (int i = 0; i < kActivations - 1; ++i) {
    if (*activation == names[i]) return i + 1;
  }
  PYMM_CHECK(false, kOp, ": activation must be one of gelu, gelu_tanh, quick_gelu, relu, silu, got ", *activation);
  return 0;
}

struct Shape {
  int64_t m, n, k;
};

Shape shape_of(const Tensor& x, const Tensor& weight) {
  PYMM_CHECK(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == x.size(-1), kOp,
             ": weight must be (N, K), K the last size of x");
  PYMM_CHECK(weight.scalar_type() == x.scalar_type(), kOp, ": weight must have x's type");
  Shape s{1, weight.size(0), x.size(-1)};
  for (int64_t i = 0; i + 1 < x.dim(); ++i) s.m *= x.size(i);
  return s;
}

std::optional<Tensor> checked(const std::optional<Tensor>& t, const Tensor& x, int64_t elements, const char* name) {
  if (!t) return t;
  PYMM_CHECK(t->scalar_type() == x.scalar_type() && t->numel() == elements, kOp, ": ", name,
             " must have x's type and fit the result");
  return dense(*t);
}

// (rows, columns) with any strides stays where it is; more dimensions are made dense.
Tensor as_rows(const Tensor& x) { return x.dim() == 2 ? x : dense(x); }
template <class T>
Matrix rows_matrix(const Tensor& x, int64_t columns) {
  return x.dim() == 2 ? matrix(data<T>(x), x.stride(0), x.stride(1)) : matrix(data<T>(x), columns, 1);
}
Matrix transposed(const Matrix& a) {
  Matrix t = a;
  t.row_stride = a.k_stride;
  t.k_stride = a.row_stride;
  return t;
}

template <class T>
T* pointer(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias_in,
                                   const std::optional<std::string>& activation,
                                   const std::optional<Tensor>& residual_in, bool keep) {
  const Shape s = shape_of(x_in, weight);
  const int f = index_of(activation);
  const DType dtype = dtype_of(x_in, kOp);
  const Tensor x = as_rows(x_in);
  const std::optional<Tensor> bias = checked(bias_in, x, s.n, "bias");
  const std::optional<Tensor> residual = checked(residual_in, x, s.m * s.n, "residual");
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(s.n);
  Tensor out = fresh(torch::stable::new_empty(x, sizes, x.scalar_type()));
  Tensor pre = keep && f != 0 ? fresh(torch::stable::empty_like(out)) : empty({0}, x);
  if (s.m == 0 || s.n == 0) return {out, pre};
  const auto epilogue = linear_for(dtype).epilogue[f];
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    const T *b = pointer<T>(bias), *r = pointer<T>(residual);
    T *to = data<T>(out), *z = keep && f != 0 ? data<T>(pre) : nullptr;
    const auto row_of = [&](int64_t row, int64_t column, int64_t columns, const Acc* c) {
      const int64_t at = row * s.n + column;
      epilogue(c, b ? b + column : nullptr, r ? r + at : nullptr, columns, z ? z + at : nullptr, to + at);
    };
    if (s.k == 0) {
      const Tensor sums = zeros({s.n}, x, accumulator_type(dtype));
      for (int64_t row = 0; row < s.m; ++row) row_of(row, 0, s.n, data<Acc>(sums));
      return;
    }
    const PackedB packed(gemm_for(dtype), s.n, s.k, matrix(data<T>(weight), weight.stride(0), weight.stride(1)));
    blocked_product<Acc>(s.m, rows_matrix<T>(x, s.k), packed,
                         [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const Acc* c, int64_t ldc) {
                           for (int64_t i = 0; i < rows; ++i) row_of(row + i, column, columns, c + i * ldc);
                         });
  });
  return {out, pre};
}

// C = A . B^T (m x n, dense) in the type T.
template <class T>
void product(int64_t m, int64_t n, int64_t k, const Matrix& a, const Matrix& b, T* c) {
  using Acc = Accumulator<T>;
  const Rows& rows_of = rows_for(dtype_of<T>());
  const PackedB packed(gemm_for(dtype_of<T>()), n, k, b);
  blocked_product<Acc>(m, a, packed,
                       [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const Acc* sums, int64_t ldc) {
                         for (int64_t i = 0; i < rows; ++i) {
                           rows_of.narrow(sums + i * ldc, 1, columns, c + (row + i) * n + column);
                         }
                       });
}

// dz of all rows and, in `db` unless null, its column sums.
template <class T>
void through_activation(const T* dout, const T* pre, const Shape& s, int f, T* dz, T* db) {
  using Acc = Accumulator<T>;
  const auto loop = linear_for(dtype_of<T>()).backward[f];
  const Rows& rows_of = rows_for(dtype_of<T>());
  const int64_t blocks = ceil_div(s.m, kSumRows), stride = round_up(s.n, 16);
  const Scratch partial(db ? blocks * stride * static_cast<int64_t>(sizeof(Acc)) : 0);
  parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      Acc* sums = db ? partial.as<Acc>() + block * stride : nullptr;
      if (sums) memset(sums, 0, s.n * sizeof(Acc));
      for (int64_t row = block * kSumRows; row < min_of(s.m, (block + 1) * kSumRows); ++row) {
        if (f == 0) {
          rows_of.add_scaled(sums, 1, dout + row * s.n, s.n);
        } else {
          loop(dout + row * s.n, pre + row * s.n, s.n, dz + row * s.n, sums);
        }
      }
    }
  });
  if (!db) return;
  constexpr int64_t kStripe = 256;
  parallel_tasks(ceil_div(s.n, kStripe), [&](int64_t task) {
    const int64_t column = task * kStripe, columns = min_of(kStripe, s.n - column);
    Acc sums[kStripe] = {};
    for (int64_t block = 0; block < blocks; ++block) {
      const Acc* part = partial.as<Acc>() + block * stride + column;
      for (int64_t j = 0; j < columns; ++j) sums[j] += part[j];
    }
    rows_of.narrow(sums, 1, columns, db + column);
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout_in, const Tensor& x_in, const Tensor& weight,
                                            const std::optional<Tensor>& bias, const std::optional<Tensor>& pre_in,
                                            const std::optional<std::string>& activation, bool need_x, bool need_weight,
                                            bool need_bias) {
  const Shape s = shape_of(x_in, weight);
  const int f = index_of(activation);
  const DType dtype = dtype_of(x_in, kOp);
  const Tensor x = as_rows(x_in);
  const Tensor dout = *checked(dout_in, x, s.m * s.n, "dout");
  const std::optional<Tensor> pre =
      f == 0 ? std::nullopt
             : checked(pre_in ? *pre_in : std::get<0>(forward(x, weight, bias, std::nullopt, std::nullopt, false)), x,
                       s.m * s.n, "pre");
  Tensor dx = need_x ? fresh(torch::stable::new_empty(x, x.sizes(), x.scalar_type())) : empty({0}, x);
  Tensor dweight = empty({need_weight ? s.n : 0, s.k}, x), dbias = empty({need_bias ? s.n : 0}, x);
  if (!need_weight) dweight = empty({0}, x);
  if (s.m == 0 || s.n == 0 || s.k == 0) {
    for (Tensor* t : {&dx, &dweight, &dbias}) torch::stable::zero_(*t);
    if (s.m == 0 || s.n == 0 || !need_bias) return {dx, dweight, dbias};
  }
  dispatch(dtype, [&]<class T>() {
    const Tensor dz = f == 0 ? dout : fresh(torch::stable::empty_like(dout));
    T* db = need_bias ? data<T>(dbias) : nullptr;
    if (f != 0 || need_bias) through_activation(data<T>(dout), pointer<T>(pre), s, f, data<T>(dz), db);
    if (s.k == 0) return;
    const Matrix rows = matrix(data<T>(dz), s.n, 1);
    const Matrix w = matrix(data<T>(weight), weight.stride(0), weight.stride(1));
    if (need_x) product<T>(s.m, s.k, s.n, rows, transposed(w), data<T>(dx));
    if (need_weight) product<T>(s.n, s.k, s.m, transposed(rows), transposed(rows_matrix<T>(x, s.k)), data<T>(dweight));
  });
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("linear", TORCH_BOX(&pymm::forward));
  m.impl("linear_backward", TORCH_BOX(&pymm::backward));
}

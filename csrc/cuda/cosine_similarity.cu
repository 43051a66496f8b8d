// Pairwise cosine similarity, out[n, m] = <x_n, y_m> / (max(||x_n||, eps) max(||y_m||, eps)).
//
// Parallel: one block of 16 x 16 threads per 64 x 64 tile of the result and batch, 4 x 4 sums per thread. On chip: a
// 64 x 16 slab of each operand in shared memory, sums in registers. Bytes: x and y once per tile row or column (L2
// serves the repeats), the result once. Ragged edges: slabs are filled up with zeros, which change no sum. Products run
// on the float units, in float32 (float64 for float64); the tensor cores are Triton's part.
//
// Backward: with T = dout . y^, dx = (T - <T, x^> x^) / ||x||. One kernel makes T in the accumulator's type, one closes
// each row; the same pair serves dy with the roles exchanged.
#include "cuda/device.h"

namespace pymm::cuda {
namespace {

constexpr const char* kOp = "cosine_similarity";
constexpr int kTile = 64, kDepth = 16, kSide = 16, kEach = kTile / kSide, kRowThreads = 128;

// 1 / max(||row||, eps), one block per row.
template <class T>
PYMM_GLOBAL void inverse_norms_kernel(const T* x, int64_t d, double eps, Accumulator<T>* out) {
  using Acc = Accumulator<T>;
  PYMM_SHARED Acc sums[kRowThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const T* row = x + static_cast<int64_t>(blockIdx.x) * d;
  Acc sum = 0;
  for (int64_t i = thread; i < d; i += kRowThreads) {
    const Acc value = to_float(row[i]);
    sum += value * value;
  }
  sums[thread] = sum;
  PYMM_SYNC();
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    PYMM_SYNC();
  }
  if (thread == 0) {
    const Acc norm = sqrt(sums[0]);
    out[blockIdx.x] = Acc(1) / (norm > Acc(eps) ? norm : Acc(eps));
  }
}

// C[b, i, j] = row_scale[i] * column_scale[j] * sum_k A[b, i, k] * depth_scale[k] * B[b, j, k]; a null scale is 1.
struct Product {
  int64_t rows, columns, depth;
  int64_t a_batch, a_row, a_k, b_batch, b_row, b_k, c_batch;
};

template <class T, class Out>
PYMM_GLOBAL void product_kernel(const T* a, const T* b, Out* c, const Accumulator<T>* row_scale,
                                const Accumulator<T>* column_scale, const Accumulator<T>* depth_scale, Product p) {
  using Acc = Accumulator<T>;
  // One spare column: threads that walk down a slab then hit different banks.
  PYMM_SHARED Acc slab_a[kDepth][kTile + 1];
  PYMM_SHARED Acc slab_b[kDepth][kTile + 1];
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const int64_t batch = blockIdx.z, row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kTile;
  a += batch * p.a_batch;
  b += batch * p.b_batch;
  Acc sums[kEach][kEach] = {};
  for (int64_t first = 0; first < p.depth; first += kDepth) {
    for (int i = ty * kSide + tx; i < kTile * kDepth; i += kSide * kSide) {
      const int r = i / kDepth, k = i % kDepth;
      const bool inside = first + k < p.depth;
      Acc value_a = 0, value_b = 0;
      if (inside && row + r < p.rows) value_a = to_float(a[(row + r) * p.a_row + (first + k) * p.a_k]);
      if (inside && column + r < p.columns) value_b = to_float(b[(column + r) * p.b_row + (first + k) * p.b_k]);
      if (inside && depth_scale != nullptr) value_b *= depth_scale[batch * p.depth + first + k];
      slab_a[k][r] = value_a;
      slab_b[k][r] = value_b;
    }
    PYMM_SYNC();
    for (int k = 0; k < kDepth; ++k) {
      for (int i = 0; i < kEach; ++i) {
        for (int j = 0; j < kEach; ++j) sums[i][j] += slab_a[k][ty + i * kSide] * slab_b[k][tx + j * kSide];
      }
    }
    PYMM_SYNC();
  }
  for (int i = 0; i < kEach; ++i) {
    const int64_t r = row + ty + i * kSide;
    if (r >= p.rows) continue;
    const Acc scale = row_scale != nullptr ? row_scale[batch * p.rows + r] : Acc(1);
    for (int j = 0; j < kEach; ++j) {
      const int64_t s = column + tx + j * kSide;
      if (s >= p.columns) continue;
      const Acc value = sums[i][j] * scale * (column_scale != nullptr ? column_scale[batch * p.columns + s] : Acc(1));
      c[batch * p.c_batch + r * p.columns + s] = from_float(value, Out{});
    }
  }
}

// dx = (t - <t, x^> x^) / ||x||, one block per row; where the norm is below eps it is a constant.
template <class T>
PYMM_GLOBAL void close_rows_kernel(const Accumulator<T>* t, const T* x, const Accumulator<T>* inverse, int64_t d,
                                   double limit, T* dx) {
  using Acc = Accumulator<T>;
  PYMM_SHARED Acc sums[kRowThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * d;
  const Acc inv = inverse[blockIdx.x];
  Acc sum = 0;
  for (int64_t i = thread; i < d; i += kRowThreads) sum += t[begin + i] * to_float(x[begin + i]);
  sums[thread] = sum;
  PYMM_SYNC();
  for (int half = kRowThreads / 2; half > 0; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    PYMM_SYNC();
  }
  const Acc along = inv < Acc(limit) ? sums[0] * inv * inv : Acc(0);
  for (int64_t i = thread; i < d; i += kRowThreads) {
    dx[begin + i] = from_float((t[begin + i] - along * Acc(to_float(x[begin + i]))) * inv, T{});
  }
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

Tensor with_last(const Tensor& x, int64_t drop, std::optional<int64_t> last, ScalarType dtype) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + drop < x.dim(); ++i) sizes.push_back(x.size(i));
  if (last) sizes.push_back(*last);
  return torch::stable::new_empty(x, sizes, dtype);
}

dim3 tiles(int64_t rows, int64_t columns, int64_t batch) {
  return dim3(static_cast<unsigned>(ceil_div(columns, kTile)), static_cast<unsigned>(ceil_div(rows, kTile)),
              static_cast<unsigned>(batch));
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
    const auto norms = [&](const Tensor& from, Tensor& to) {
      if (to.numel() == 0) return;
      PYMM_LAUNCH(inverse_norms_kernel<T>, dim3(static_cast<unsigned>(to.numel())), dim3(kRowThreads), stream,
                  data<T>(from), s.d, eps, data<Acc>(to));
    };
    norms(x, inv_x);
    norms(y, inv_y);
    if (out.numel() == 0) return;
    const Product p{s.n, s.m, s.d, s.n * s.d, s.d, 1, s.m * s.d, s.d, 1, s.n * s.m};
    const Acc* no_scale = nullptr;
    PYMM_LAUNCH((product_kernel<T, T>), tiles(s.n, s.m, s.batch), dim3(kSide, kSide), stream, data<T>(x), data<T>(y),
                data<T>(out), data<Acc>(inv_x), data<Acc>(inv_y), no_scale, p);
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
  PYMM_LAUNCH((product_kernel<T, Acc>), tiles(s.n, s.d, s.batch), dim3(kSide, kSide), stream, data<T>(g), data<T>(y),
              data<Acc>(t), no_scale, no_scale, data<Acc>(inv_y), p);
  PYMM_LAUNCH(close_rows_kernel<T>, dim3(static_cast<unsigned>(s.batch * s.n)), dim3(kRowThreads), stream, data<Acc>(t),
              data<T>(x), data<Acc>(inv_x), s.d, (1.0 - 1e-6) / eps, data<T>(dx));
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

// Pairwise cosine similarity, out[n, m] = <x_n, y_m> / (max(||x_n||, eps) max(||y_m||, eps)).
//
// Parallel: one block per 64 x 64 tile of the result and batch (tile.h). Bytes: x and y once per tile row or column (L2
// serves the repeats), the result once. Products run on the float units; the tensor cores are Triton's part.
//
// Backward: with T = dout . y^, dx = (T - <T, x^> x^) / ||x||. One kernel makes T in the accumulator's type, one closes
// each row; the same pair serves dy with the roles exchanged.
#include "cuda/rows.h"
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
    const Product p{s.n, s.m, s.d, s.n * s.d, s.d, 1, s.m * s.d, s.d, 1, s.n * s.m};
    const Acc* no_scale = nullptr;
    PYMM_LAUNCH((product_kernel<T, T, T, Acc>), tiles(s.n, s.m, s.batch), dim3(kSide, kSide), stream, data<T>(x),
                data<T>(y), data<T>(out), data<Acc>(inv_x), data<Acc>(inv_y), no_scale, p);
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

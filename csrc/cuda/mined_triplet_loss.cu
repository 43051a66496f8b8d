// Triplet loss of mined triplets: the mean of max(0, margin + s(a, n) - s(a, p)) over what the miner selects, s the
// cosine.
//
// Two roads, each described in its header: "hard" in one pass over tiles, with a sparse backward (mining_hard.h);
// "semi-hard" and "all" in panels of anchors, once more in backward (mining_panels.h). Neither holds N x N numbers, and
// neither waits for the device. Products run on the float units.
#include "cuda/mining_panels.h"

namespace pymm::cuda {
namespace {

constexpr const char* kOp = "mined_triplet_loss";
constexpr int kSumThreads = 256;

enum class Mining { hard, semi_hard, all };

Mining mining_of(const std::string& name) {
  if (name == "hard") return Mining::hard;
  if (name == "semi-hard") return Mining::semi_hard;
  STD_TORCH_CHECK(name == "all", kOp, ": mining must be 'hard', 'semi-hard' or 'all'");
  return Mining::all;
}

// One block: the mean over the selected triplets. A row with a NaN or an infinity has no cosine, and no comparison of
// the miners lets it through: its inverse norm, NaN or 0, makes the loss NaN.
template <class Acc>
PYMM_GLOBAL void mean_kernel(const double* losses, const int64_t* counts, int64_t anchors, const Acc* inv_x,
                             int64_t rows_x, const Acc* inv_y, int64_t rows_y, Acc* loss, int64_t* count) {
  double sums[3] = {};  // a count is exact up to 2^53
  for (int64_t i = threadIdx.x; i < anchors; i += kSumThreads) {
    sums[0] += losses[i];
    sums[1] += static_cast<double>(counts[i]);
  }
  for (int64_t i = threadIdx.x; i < rows_x + rows_y; i += kSumThreads) {
    const Acc inverse = i < rows_x ? inv_x[i] : inv_y[i - rows_x];
    sums[2] += inverse > 0 ? 0 : 1;
  }
  block_sums<kSumThreads>(sums);
  if (threadIdx.x != 0) return;
  *loss = static_cast<Acc>(sums[2] > 0 ? sqrt(-1.0) : sums[0] / (sums[1] > 0 ? sums[1] : 1));
  *count = static_cast<int64_t>(sums[1]);
}

// One block per row: the gradient of the row from its sum t.
template <class T>
PYMM_GLOBAL void close_rows_kernel(const Accumulator<T>* t, Side<T> side, int64_t d, const Accumulator<T>* dloss,
                                   const int64_t* count, T* out) {
  using Acc = Accumulator<T>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * d;
  const Acc g = *dloss / static_cast<Acc>(*count > 0 ? *count : 1);
  close_row(t + at, side.rows + at, side.inverse[blockIdx.x], d, (1 - 1e-6) / kSmallestNorm, g, out + at);
}

struct Inputs {
  Inputs(const Tensor& x_in, const std::optional<Tensor>& y_in, const Tensor& labels_in)
      : x(dense(x_in)), labels(dense(labels_in)), crossed(y_in.has_value()) {
    STD_TORCH_CHECK(x.dim() == 2, kOp, ": x must be (N, D)");
    n = x.size(0);
    d = x.size(1);
    STD_TORCH_CHECK(labels.numel() == n && labels.scalar_type() == ScalarType::Long, kOp,
                    ": labels must be (N,) of int64");
    STD_TORCH_CHECK(n <= INT32_MAX / 4, kOp, ": x has too many rows");
    y = crossed ? dense(*y_in) : x;
    STD_TORCH_CHECK(y.numel() == x.numel() && y.scalar_type() == x.scalar_type(), kOp,
                    ": y must have the shape and type of x");
  }
  int64_t anchors() const { return crossed ? 2 * n : n; }
  Tensor empty(std::vector<int64_t> sizes, ScalarType dtype) const { return torch::stable::new_empty(x, sizes, dtype); }

  Tensor x, y, labels;
  bool crossed;
  int64_t n, d;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& y,
                                                           const Tensor& labels, double margin, std::string mining) {
  const Inputs in(x, y, labels);
  const Mining kind = mining_of(mining);
  const Stream stream(in.x);
  const ScalarType acc_type = accumulator_type(in.x);
  Tensor loss = in.empty({}, acc_type), count = in.empty({}, ScalarType::Long);
  Tensor triplets = in.empty({kind == Mining::hard ? in.anchors() : 0, 2}, ScalarType::Long);
  Tensor inv_x = in.empty({in.n}, acc_type), inv_y = in.empty({in.crossed ? in.n : 0}, acc_type);
  const Tensor losses = in.empty({in.anchors()}, ScalarType::Double),
               counts = in.empty({in.anchors()}, ScalarType::Long);
  dispatch(in.x, kOp, [&]<class T>() {
    using Acc = Accumulator<T>;
    inverse_norms<T>(stream, in.x, in.d, kSmallestNorm, inv_x);
    inverse_norms<T>(stream, in.y, in.d, kSmallestNorm, inv_y);
    const Side<T> xs{data<T>(in.x), data<Acc>(inv_x)};
    const Side<T> ys{data<T>(in.y), data<Acc>(in.crossed ? inv_y : inv_x)};
    for (int way = 0; in.n > 0 && way < (in.crossed ? 2 : 1); ++way) {
      const Side<T>&anchors = way == 0 ? xs : ys, &candidates = way == 0 ? ys : xs;
      double* to_losses = data<double>(losses) + way * in.n;
      int64_t* to_counts = data<int64_t>(counts) + way * in.n;
      if (kind == Mining::hard) {
        mine_hard<T>(stream, in.x, anchors, candidates, data<int64_t>(in.labels), in.crossed, in.n, in.d, margin,
                     data<int64_t>(triplets) + way * 2 * in.n, to_losses, to_counts);
      } else {
        Panels<T>(stream, in.x, data<int64_t>(in.labels), in.crossed, in.n, in.d, margin, kind == Mining::semi_hard)
            .loss(anchors, candidates, to_losses, to_counts);
      }
    }
    PYMM_LAUNCH(mean_kernel<Acc>, dim3(1), dim3(kSumThreads), stream, data<double>(losses), data<int64_t>(counts),
                in.anchors(), data<Acc>(inv_x), inv_x.numel(), data<Acc>(inv_y), inv_y.numel(), data<Acc>(loss),
                data<int64_t>(count));
  });
  return {loss, count, triplets, inv_x, inv_y};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dloss, const Tensor& x, const std::optional<Tensor>& y,
                                    const Tensor& labels, const Tensor& count, const Tensor& triplets_in,
                                    const Tensor& inv_x, const Tensor& inv_y, double margin, std::string mining) {
  const Inputs in(x, y, labels);
  const Mining kind = mining_of(mining);
  const Tensor triplets = dense(triplets_in);
  const ScalarType acc_type = accumulator_type(in.x);
  STD_TORCH_CHECK(dloss.numel() == 1 && dloss.scalar_type() == acc_type && count.numel() == 1 &&
                      count.scalar_type() == ScalarType::Long && inv_x.numel() == in.n &&
                      inv_x.scalar_type() == acc_type && inv_y.numel() == (in.crossed ? in.n : 0) &&
                      inv_y.scalar_type() == acc_type && inv_x.is_contiguous() && inv_y.is_contiguous() &&
                      (kind != Mining::hard || triplets.numel() == 2 * in.anchors()),
                  kOp, ": dloss and the statistics must be those of forward");
  const Stream stream(in.x);
  Tensor dx = torch::stable::empty_like(in.x),
         dy = in.crossed ? torch::stable::empty_like(in.y) : in.empty({0}, in.x.scalar_type());
  if (dx.numel() == 0) return {dx, dy};
  Tensor sums = in.empty({in.crossed ? 2 : 1, in.n, in.d}, acc_type);
  if (kind != Mining::hard) torch::stable::zero_(sums);
  dispatch(in.x, kOp, [&]<class T>() {
    using Acc = Accumulator<T>;
    const Side<T> xs{data<T>(in.x), data<Acc>(inv_x)};
    const Side<T> ys = in.crossed ? Side<T>{data<T>(in.y), data<Acc>(inv_y)} : xs;
    Acc *of_x = data<Acc>(sums), *of_y = in.crossed ? of_x + in.n * in.d : of_x;
    const dim3 rows(static_cast<unsigned>(in.n));
    const int64_t* of_triplets = data<int64_t>(triplets);
    if (kind == Mining::hard) {
      const int64_t* second = of_triplets + (in.crossed ? 2 * in.n : 0);
      PYMM_LAUNCH(hard_gradient_kernel<T>, rows, dim3(kRowThreads), stream, xs, ys, of_triplets, second, in.n, in.d,
                  data<Acc>(dloss), data<int64_t>(count), of_x, data<T>(dx));
      if (!in.crossed) return;
      PYMM_LAUNCH(hard_gradient_kernel<T>, rows, dim3(kRowThreads), stream, ys, xs, second, of_triplets, in.n, in.d,
                  data<Acc>(dloss), data<int64_t>(count), of_y, data<T>(dy));
      return;
    }
    const Panels<T> panels(stream, in.x, data<int64_t>(in.labels), in.crossed, in.n, in.d, margin,
                           kind == Mining::semi_hard);
    panels.gradient(xs, ys, of_x, of_y);
    if (in.crossed) panels.gradient(ys, xs, of_y, of_x);
    PYMM_LAUNCH(close_rows_kernel<T>, rows, dim3(kRowThreads), stream, data<Acc>(sums), xs, in.d, data<Acc>(dloss),
                data<int64_t>(count), data<T>(dx));
    if (!in.crossed) return;
    PYMM_LAUNCH(close_rows_kernel<T>, rows, dim3(kRowThreads), stream, of_y, ys, in.d, data<Acc>(dloss),
                data<int64_t>(count), data<T>(dy));
  });
  return {dx, dy};
}

}  // namespace
}  // namespace pymm::cuda

STABLE_TORCH_LIBRARY_IMPL(pymm_cuda, PYMM_DISPATCH_KEY, m) {
  m.impl("mined_triplet_loss", TORCH_BOX(&pymm::cuda::forward));
  m.impl("mined_triplet_loss_backward", TORCH_BOX(&pymm::cuda::backward));
}

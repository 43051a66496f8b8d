// Triplet loss, the mean over rows of max(0, margin + d(a, p) - d(a, n)), with d = 1 - cos or the Euclidean norm of
// a - b.
//
// Parallel: one block per row; one block adds up the rows' losses, in one order. On chip: the row's sums. Bytes:
// forward reads each input once; backward reads each twice, the second time from L2, and writes each gradient once.
// Ragged edges: a thread takes every 128th number of a row, however many there are.
#include "cuda/rows.h"

namespace pymm::cuda {
namespace {

constexpr const char* kOp = "triplet_loss";
constexpr int kSumThreads = 256;

// One side of a cosine triplet: cos(a, b) and what its gradient needs.
struct Cosine {
  PYMM_DEVICE Cosine(double ab, double aa, double bb)
      : inv_a(inverse(aa)), inv_b(inverse(bb)), value(ab * inv_a * inv_b) {}
  PYMM_DEVICE static double inverse(double square) {
    const double norm = sqrt(square);
    return 1 / (norm < kSmallestNorm ? kSmallestNorm : norm);
  }
  // 1 where max(norm, eps) is the norm and not eps.
  PYMM_DEVICE static double free(double inverse) { return inverse < (1 - 1e-6) / kSmallestNorm ? 1 : 0; }
  // Weights of the rows in the gradients: da = a_self a + cross b, db = cross a + b_self b.
  PYMM_DEVICE double cross() const { return inv_a * inv_b; }
  PYMM_DEVICE double a_self() const { return -free(inv_a) * value * inv_a * inv_a; }
  PYMM_DEVICE double b_self() const { return -free(inv_b) * value * inv_b * inv_b; }

  double inv_a, inv_b, value;
};

// The hinge of one row before it is cut at 0, and the weights of its gradients: da = aa a + ap p + an n, dp = ap a +
// pp p, dn = an a + nn n.
struct Row {
  double z, aa, ap, an, pp, nn;
};

template <class T>
PYMM_DEVICE Row row_of(const T* a, const T* p, const T* n, int64_t d, double margin, bool cosine) {
  using Acc = Accumulator<T>;
  Acc sums[5] = {};
  for (int64_t i = threadIdx.x; i < d; i += kRowThreads) {
    const Acc of_a = to_float(a[i]), of_p = to_float(p[i]), of_n = to_float(n[i]);
    if (cosine) {
      sums[0] += of_a * of_p;
      sums[1] += of_a * of_n;
      sums[2] += of_a * of_a;
      sums[3] += of_p * of_p;
      sums[4] += of_n * of_n;
    } else {
      sums[0] += (of_a - of_p) * (of_a - of_p);
      sums[1] += (of_a - of_n) * (of_a - of_n);
    }
  }
  block_sums<kRowThreads>(sums);
  if (cosine) {
    const Cosine to_p(sums[0], sums[2], sums[3]), to_n(sums[1], sums[2], sums[4]);
    return {margin + to_n.value - to_p.value,
            to_n.a_self() - to_p.a_self(),
            -to_p.cross(),
            to_n.cross(),
            -to_p.b_self(),
            to_n.b_self()};
  }
  const double d_p = sqrt(static_cast<double>(sums[0])), d_n = sqrt(static_cast<double>(sums[1]));
  const double w_p = d_p == 0 ? 0 : 1 / d_p, w_n = d_n == 0 ? 0 : 1 / d_n;
  return {margin + d_p - d_n, w_p - w_n, -w_p, w_n, w_p, -w_n};
}

template <class T>
PYMM_GLOBAL void hinges_kernel(const T* a, const T* p, const T* n, int64_t d, double margin, bool cosine,
                               double* losses) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * d;
  const double z = row_of(a + at, p + at, n + at, d, margin, cosine).z;
  if (threadIdx.x == 0) losses[blockIdx.x] = z <= 0 ? 0 : z;  // a NaN stays
}

template <class Acc>
PYMM_GLOBAL void mean_kernel(const double* losses, int64_t rows, Acc* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < rows; i += kSumThreads) sum += losses[i];
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) *loss = static_cast<Acc>(sum / static_cast<double>(rows > 0 ? rows : 1));
}

template <class T>
PYMM_GLOBAL void gradients_kernel(const Accumulator<T>* dloss, const T* a, const T* p, const T* n, int64_t rows,
                                  int64_t d, double margin, bool cosine, T* da, T* dp, T* dn) {
  using Acc = Accumulator<T>;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * d;
  const Row w = row_of(a + at, p + at, n + at, d, margin, cosine);
  const double g = static_cast<double>(*dloss) / static_cast<double>(rows);
  const bool none = w.z <= 0;
  for (int64_t i = at + threadIdx.x; i < at + d; i += kRowThreads) {
    const Acc of_a = to_float(a[i]), of_p = to_float(p[i]), of_n = to_float(n[i]);
    Acc to_a, to_p, to_n;
    if (cosine) {
      to_a = Acc(g * w.aa) * of_a + Acc(g * w.ap) * of_p + Acc(g * w.an) * of_n;
      to_p = Acc(g * w.ap) * of_a + Acc(g * w.pp) * of_p;
      to_n = Acc(g * w.an) * of_a + Acc(g * w.nn) * of_n;
    } else {  // of the differences, which may be much smaller than the rows
      to_p = Acc(g * w.ap) * (of_a - of_p);
      to_n = Acc(g * w.an) * (of_a - of_n);
      to_a = -to_p - to_n;
    }
    da[i] = from_float(none ? Acc(0) : to_a, T{});
    dp[i] = from_float(none ? Acc(0) : to_p, T{});
    dn[i] = from_float(none ? Acc(0) : to_n, T{});
  }
}

struct Inputs {
  Inputs(const Tensor& a_in, const Tensor& p_in, const Tensor& n_in) : a(dense(a_in)), p(dense(p_in)), n(dense(n_in)) {
    STD_TORCH_CHECK(a.dim() >= 1 && p.numel() == a.numel() && n.numel() == a.numel() &&
                        p.scalar_type() == a.scalar_type() && n.scalar_type() == a.scalar_type(),
                    kOp, ": the inputs must have one shape and one type");
    d = a.size(-1);
    for (int64_t i = 0; i + 1 < a.dim(); ++i) rows *= a.size(i);
  }
  Tensor a, p, n;
  int64_t rows = 1, d;
};

Tensor forward(const Tensor& anchor, const Tensor& positive, const Tensor& negative, double margin, bool cosine) {
  const Inputs in(anchor, positive, negative);
  const Stream stream(in.a);
  Tensor loss = torch::stable::new_empty(in.a, std::vector<int64_t>{}, accumulator_type(in.a));
  const Tensor losses = torch::stable::new_empty(in.a, std::vector<int64_t>{in.rows}, ScalarType::Double);
  dispatch(in.a, kOp, [&]<class T>() {
    if (in.rows > 0) {
      PYMM_LAUNCH(hinges_kernel<T>, dim3(static_cast<unsigned>(in.rows)), dim3(kRowThreads), stream, data<T>(in.a),
                  data<T>(in.p), data<T>(in.n), in.d, margin, cosine, data<double>(losses));
    }
    PYMM_LAUNCH(mean_kernel<Accumulator<T>>, dim3(1), dim3(kSumThreads), stream, data<double>(losses), in.rows,
                data<Accumulator<T>>(loss));
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dloss, const Tensor& anchor, const Tensor& positive,
                                            const Tensor& negative, double margin, bool cosine) {
  const Inputs in(anchor, positive, negative);
  STD_TORCH_CHECK(dloss.numel() == 1 && dloss.scalar_type() == accumulator_type(in.a), kOp,
                  ": dloss must be the loss's type and shape");
  const Stream stream(in.a);
  Tensor da = torch::stable::empty_like(in.a), dp = torch::stable::empty_like(in.a),
         dn = torch::stable::empty_like(in.a);
  if (da.numel() == 0) return {da, dp, dn};
  dispatch(in.a, kOp, [&]<class T>() {
    PYMM_LAUNCH(gradients_kernel<T>, dim3(static_cast<unsigned>(in.rows)), dim3(kRowThreads), stream,
                data<Accumulator<T>>(dloss), data<T>(in.a), data<T>(in.p), data<T>(in.n), in.rows, in.d, margin, cosine,
                data<T>(da), data<T>(dp), data<T>(dn));
  });
  return {da, dp, dn};
}

}  // namespace
}  // namespace pymm::cuda

STABLE_TORCH_LIBRARY_IMPL(pymm_cuda, PYMM_DISPATCH_KEY, m) {
  m.impl("triplet_loss", TORCH_BOX(&pymm::cuda::forward));
  m.impl("triplet_loss_backward", TORCH_BOX(&pymm::cuda::backward));
}

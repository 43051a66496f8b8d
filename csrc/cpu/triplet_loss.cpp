// Triplet loss, mean over rows of max(0, margin + d(a, p) - d(a, n)), with d = 1 - cos or the Euclidean norm of a - b.
//
// Parallel over rows. Bytes: forward reads each input once; backward reads each once, computes the distances again
// from rows that are in cache, and writes each gradient once. Losses of rows are summed in order, in double, so the
// result does not depend on the threads.
#include <cmath>
#include <cstring>

#include "cpu/host.h"
#include "cpu/simd/triplet.h"

namespace pymm {
namespace {

constexpr const char* kOp = "triplet_loss";
constexpr double kEps = 1e-12;          // the smallest norm divided by
constexpr int64_t kGrainBytes = 65536;  // read by one thread before it pays to wake another

struct Inputs {
  Inputs(const Tensor& a_in, const Tensor& p_in, const Tensor& n_in)
      : a(dense(a_in)), p(dense(p_in)), n(dense(n_in)), dtype(pymm::dtype_of(a, kOp)) {
    PYMM_CHECK(a.dim() >= 1 && p.dim() == a.dim() && n.dim() == a.dim(), kOp, ": the inputs must have one shape");
    for (int64_t i = 0; i < a.dim(); ++i) {
      PYMM_CHECK(p.size(i) == a.size(i) && n.size(i) == a.size(i), kOp, ": the inputs must have one shape");
    }
    PYMM_CHECK(p.scalar_type() == a.scalar_type() && n.scalar_type() == a.scalar_type(), kOp,
               ": the inputs must have one type");
    d = a.size(-1);
    rows = 1;
    for (int64_t i = 0; i + 1 < a.dim(); ++i) rows *= a.size(i);
  }
  // f(begin, end) over ranges of rows.
  template <class F>
  void parallel(int64_t element_bytes, F&& f) const {
    parallel_ranges(rows, max_of(1, kGrainBytes / max_of(1, 3 * d * element_bytes)), f);
  }

  Tensor a, p, n;
  DType dtype;
  int64_t rows, d;
};

// One side of a cosine triplet: cos(a, b) and what its gradient needs.
struct Cosine {
  Cosine(double ab, double aa, double bb) : inv_a(inverse(aa)), inv_b(inverse(bb)), value(ab * inv_a * inv_b) {
    free_a = inv_a < (1 - 1e-6) / kEps ? 1 : 0;  // max(|a|, eps) is the norm and not eps
    free_b = inv_b < (1 - 1e-6) / kEps ? 1 : 0;
  }
  static double inverse(double square) {
    const double norm = std::sqrt(square);
    return 1 / (norm < kEps ? kEps : norm);
  }
  // Weights of the rows in the gradients: da = a_self a + cross b, db = cross a + b_self b.
  double cross() const { return inv_a * inv_b; }
  double a_self() const { return -free_a * value * inv_a * inv_a; }
  double b_self() const { return -free_b * value * inv_b * inv_b; }

  double inv_a, inv_b, value, free_a, free_b;
};

Tensor forward(const Tensor& anchor, const Tensor& positive, const Tensor& negative, double margin, bool cosine) {
  const Inputs in(anchor, positive, negative);
  Tensor loss = empty({}, in.a, accumulator_type(in.dtype));
  const Triplet& rows_of = triplet_for(in.dtype);
  dispatch(in.dtype, [&]<class T>() {
    const T *a = data<T>(in.a), *p = data<T>(in.p), *n = data<T>(in.n);
    std::vector<double> losses(static_cast<size_t>(in.rows));
    in.parallel(sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * in.d;
        double s[5], z;
        if (cosine) {
          rows_of.products(a + at, p + at, n + at, in.d, s);
          z = margin + Cosine(s[1], s[2], s[4]).value - Cosine(s[0], s[2], s[3]).value;
        } else {
          rows_of.square_distances(a + at, p + at, n + at, in.d, s);
          z = margin + std::sqrt(s[0]) - std::sqrt(s[1]);
        }
        losses[static_cast<size_t>(r)] = z <= 0 ? 0 : z;  // a NaN stays
      }
    });
    double sum = 0;
    for (const double value : losses) sum += value;
    *data<Accumulator<T>>(loss) = static_cast<Accumulator<T>>(sum / static_cast<double>(max_of(1, in.rows)));
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dloss, const Tensor& anchor, const Tensor& positive,
                                            const Tensor& negative, double margin, bool cosine) {
  const Inputs in(anchor, positive, negative);
  PYMM_CHECK(dloss.numel() == 1 && dloss.scalar_type() == accumulator_type(in.dtype), kOp,
             ": dloss must be the loss's type and shape");
  Tensor da = torch::stable::empty_like(in.a), dp = torch::stable::empty_like(in.a),
         dn = torch::stable::empty_like(in.a);
  const Triplet& rows_of = triplet_for(in.dtype);
  dispatch(in.dtype, [&]<class T>() {
    const T *a = data<T>(in.a), *p = data<T>(in.p), *n = data<T>(in.n);
    T *to_a = data<T>(da), *to_p = data<T>(dp), *to_n = data<T>(dn);
    const double g = static_cast<double>(*data<Accumulator<T>>(dloss)) / static_cast<double>(max_of(1, in.rows));
    in.parallel(sizeof(T), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t at = r * in.d;
        double s[5], z;
        if (cosine) {
          rows_of.products(a + at, p + at, n + at, in.d, s);
          const Cosine to_neg(s[1], s[2], s[4]), to_pos(s[0], s[2], s[3]);
          z = margin + to_neg.value - to_pos.value;
          const double w[7] = {g * (to_neg.a_self() - to_pos.a_self()),
                               -g * to_pos.cross(),
                               g * to_neg.cross(),
                               -g * to_pos.cross(),
                               -g * to_pos.b_self(),
                               g * to_neg.cross(),
                               g * to_neg.b_self()};
          if (!(z <= 0)) rows_of.combine(a + at, p + at, n + at, in.d, w, to_a + at, to_p + at, to_n + at);
        } else {
          rows_of.square_distances(a + at, p + at, n + at, in.d, s);
          const double d_p = std::sqrt(s[0]), d_n = std::sqrt(s[1]);
          z = margin + d_p - d_n;
          const double w[2] = {d_p == 0 ? 0 : g / d_p, d_n == 0 ? 0 : g / d_n};
          if (!(z <= 0)) rows_of.differences(a + at, p + at, n + at, in.d, w, to_a + at, to_p + at, to_n + at);
        }
        if (z <= 0) {
          for (T* target : {to_a, to_p, to_n}) {
            std::memset(static_cast<void*>(target + at), 0, static_cast<size_t>(in.d) * sizeof(T));
          }
        }
      }
    });
  });
  return {da, dp, dn};
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("triplet_loss", TORCH_BOX(&pymm::forward));
  m.impl("triplet_loss_backward", TORCH_BOX(&pymm::backward));
}

// The sigmoid loss of pairs: the mean over rows of sum_j log(1 + exp(-z_ij (s x^_i . y^_j + b))).
//
// Forward and backward each pass once over tiles of scores (pairs.h); nothing is kept between them but the arguments.
// Backward: each tile of dS feeds both G . Y and G^T . X while it is in cache; the norms enter in the epilogue, so
// no normalized copy exists: G = dS / (||x|| ||y||) and dx = s (u - <u, x^> x^) with u = G . y.
#include "cpu/simd/sigmoid_contrastive.h"

#include <limits>

#include "cpu/gradient_range.h"
#include "cpu/pairs.h"
#include "cpu/unit_rows.h"

namespace pymm {
namespace {

constexpr const char* kOp = "sigmoid_contrastive";

const SigmoidLoops<float>& loops_of(float) { return sigmoid_contrastive_table().of_float; }
const SigmoidLoops<double>& loops_of(double) { return sigmoid_contrastive_table().of_double; }

template <class T>
struct Problem {
  using Acc = Accumulator<T>;

  Tensor x, y;
  Pairs<T> pairs;
  std::vector<Acc> x_factors, y_factors;
  Acc scale, bias;

  Problem(const Tensor& x_in, const Tensor& y_in, const Tensor& logit_scale, const Tensor& logit_bias)
      : x(dense(x_in)), y(dense(y_in)) {
    PYMM_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && x.size(1) == y.size(1), kOp,
               ": x and y must be (N, E)");
    PYMM_CHECK(x.scalar_type() == y.scalar_type(), kOp, ": x and y must have one type");
    for (const Tensor* number : {&logit_scale, &logit_bias}) {
      PYMM_CHECK(number->numel() == 1 && number->scalar_type() == accumulator_type(dtype_of<T>()), kOp,
                 ": logit_scale and logit_bias must each be one accumulator");
    }
    const int64_t n = x.size(0);
    pairs.d = x.size(1);
    pairs.rows[0] = {data<T>(x), nullptr, n};
    pairs.columns[0] = {data<T>(y), nullptr, n};
    x_factors = unit_factors(data<T>(x), n, pairs.d, true);
    y_factors = unit_factors(data<T>(y), n, pairs.d, true);
    scale = *data<Acc>(logit_scale);
    bias = *data<Acc>(logit_bias);
  }

  SigmoidTile<Acc> tile(const PairTile<Acc>& t) const {
    return {t.scores, t.ld, t.rows, t.columns, &x_factors[t.row], &y_factors[t.column], scale, bias, t.row - t.column};
  }
};

Tensor forward(const Tensor& x, const Tensor& y, const Tensor& logit_scale, const Tensor& logit_bias) {
  const DType dtype = dtype_of(x, kOp);
  Tensor loss = empty({}, x, accumulator_type(dtype));
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    const Problem<T> problem(x, y, logit_scale, logit_bias);
    const auto nothing = [](int, int64_t, int64_t, int64_t) {};
    PartSums sums;
    scan_pairs(
        problem.pairs, nothing, [&](const PairTile<Acc>& t) { sums[t.part] += loops_of(Acc{}).loss(problem.tile(t)); },
        nothing);
    *data<Acc>(loss) = static_cast<Acc>(sums.total() / static_cast<double>(problem.pairs.rows[0].n));  // 0 / 0 is NaN
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dloss, const Tensor& x, const Tensor& y,
                                                    const Tensor& logit_scale, const Tensor& logit_bias) {
  const DType dtype = dtype_of(x, kOp);
  PYMM_CHECK(dloss.numel() == 1 && dloss.scalar_type() == accumulator_type(dtype), kOp,
             ": dloss must be one accumulator");
  Tensor dx = empty({x.size(0), x.size(1)}, x), dy = empty({y.size(0), y.size(1)}, y);
  Tensor dscale = empty({}, logit_scale), dbias = empty({}, logit_bias);
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    const Problem<T> problem(x, y, logit_scale, logit_bias);
    const int64_t n = problem.pairs.rows[0].n, d = problem.pairs.d, parts = thread_count();
    const double mean = static_cast<double>(*data<Acc>(dloss)) / static_cast<double>(max_of(1, n));
    const GradientRange range =
        GradientRange::of<T>(Magnitudes{}.add(std::initializer_list<double>{mean}), Magnitudes{}.add(problem.x_factors),
                             Magnitudes{}.add(problem.y_factors));
    const Acc share = static_cast<Acc>(mean * range.power);
    const double scale = problem.scale / range.power;
    const RowSums<T> row_sums(data<T>(dx), n, d, parts, kGradientRows);
    PartSums scale_sums, bias_sums;
    differentiate_pairs(
        problem.pairs, Wanted<T>{{&row_sums, nullptr}, {true, false}, true, range.wide},
        [&](const PairTile<Acc>& t) {
          const SigmoidSums sums = loops_of(Acc{}).gradient(problem.tile(t), share);
          scale_sums[t.part] += sums.scale;
          bias_sums[t.part] += sums.bias;
        },
        [&](int, int64_t first, int64_t rows, Acc* u) {
          through_unit(u, data<T>(problem.y) + first * d, &problem.y_factors[first], scale, rows, d,
                       data<T>(dy) + first * d);
        });
    row_sums.each_block(n, parts, kGradientRows, [&](int64_t first, int64_t rows, Acc* u) {
      through_unit(u, data<T>(problem.x) + first * d, &problem.x_factors[first], scale, rows, d,
                   data<T>(dx) + first * d);
    });
    *data<Acc>(dscale) = static_cast<Acc>(scale_sums.total() / range.power);
    *data<Acc>(dbias) = static_cast<Acc>(bias_sums.total() / range.power);
  });
  return {dx, dy, dscale, dbias};
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("sigmoid_contrastive", TORCH_BOX(&pymm::forward));
  m.impl("sigmoid_contrastive_backward", TORCH_BOX(&pymm::backward));
}

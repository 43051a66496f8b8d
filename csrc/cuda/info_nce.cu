// The contrastive loss of pairs: row i of x among the candidates [y; negatives_y], row i of y among [x; negatives_x].
//
// Forward, parallel: a grid of groups of row tiles x groups of column tiles. On chip: a tile of logits (two with a
// teacher) and the running statistics of its rows; those of its columns wait in a slot that only this block writes, so
// one pass gives both log-sum-exps. Slots are combined in a fixed order, so nothing is added atomically. Bytes: the
// features once per tile, which L2 serves; 4 (or 7) statistics per row and group. Backward: pair_gradient.h. Ragged
// edges: what is outside counts as a logit of -inf.
#include "cuda/info_nce_backward.h"

namespace pymm::cuda {
namespace {

using MaybeTensor = std::optional<Tensor>;

constexpr const char* kInfoNce = "info_nce";

struct Options {
  bool normalize, symmetric;
  double label_smoothing, alpha;
};

// One set of features with its factors, and the teacher's in its place.
template <class T>
struct Features {
  Tensor features, inverse, teacher, teacher_inverse;

  Features(const Stream& stream, const Tensor& x, const MaybeTensor& teacher_x, bool normalize)
      : features(dense(x)), inverse(factors(stream, features, normalize)), teacher(features), teacher_inverse(inverse) {
    if (!teacher_x) return;
    teacher = dense(*teacher_x);
    teacher_inverse = factors(stream, teacher, normalize);
  }

  static Tensor factors(const Stream& stream, const Tensor& x, bool normalize) {
    Tensor found = torch::stable::new_empty(x, {x.size(0)}, accumulator_type(x));
    if (normalize) {
      inverse_norms<T>(stream, x, x.size(1), kSmallestNorm, found);
    } else {
      torch::stable::fill_(found, 1.0);
    }
    return found;
  }
  int64_t rows() const { return features.size(0); }
  Operand<T> operand(const Tensor& t) const { return {data<T>(t), t.size(0), t.size(1)}; }
};

template <class T>
struct Call {
  using Acc = Accumulator<T>;
  Features<T> x, y;
  std::optional<Features<T>> nx, ny;
  Tensor scale;
  std::optional<Tensor> ids, share;
  bool teacher;
  Mixture mixture;

  Call(const Stream& stream, const Tensor& x_in, const Tensor& y_in, const Tensor& scale_in, const MaybeTensor& nx_in,
       const MaybeTensor& ny_in, const MaybeTensor& ids_in, const MaybeTensor& teacher_x, const MaybeTensor& teacher_y,
       const Options& o)
      : x(stream, x_in, teacher_x, o.normalize),
        y(stream, y_in, teacher_y, o.normalize),
        scale(scale_in),
        teacher(teacher_x.has_value()) {
    STD_TORCH_CHECK(x_in.dim() == 2 && y_in.dim() == 2 && y_in.numel() == x_in.numel(), kInfoNce,
                    ": x and y must be (N, E)");
    STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == accumulator_type(x_in), kInfoNce,
                    ": logit_scale must be one accumulator");
    if (nx_in) nx.emplace(stream, *nx_in, std::nullopt, o.normalize);
    if (ny_in) ny.emplace(stream, *ny_in, std::nullopt, o.normalize);
    const int64_t n = x.rows();
    if (ids_in && n > 0) {
      ids = dense(*ids_in);
      share = torch::stable::new_empty(x_in, {n}, accumulator_type(x_in));
      PYMM_LAUNCH(shares_kernel<Acc>, grid_of(ceil_div(n, kRowThreads)), dim3(kRowThreads), stream, data<int64_t>(*ids),
                  n, data<Acc>(*share));
    }
    const double kept = 1 - o.label_smoothing;
    const auto even = [&](const std::optional<Features<T>>& queue) {
      return o.label_smoothing / static_cast<double>(n + (queue ? queue->rows() : 0));
    };
    mixture = {kept * (1 - o.alpha), kept * o.alpha, {even(ny), even(nx)}};
  }

  LogitBlock<T> block(const Features<T>& a, const Features<T>& c, bool pairs) const {
    return {a.operand(a.features),
            c.operand(c.features),
            a.operand(a.teacher),
            c.operand(c.teacher),
            data<Acc>(a.inverse),
            data<Acc>(c.inverse),
            data<Acc>(a.teacher_inverse),
            data<Acc>(c.teacher_inverse),
            data<Acc>(scale),
            a.features.size(1),
            pairs,
            ids ? data<int64_t>(*ids) : nullptr};
  }
  const Acc* shares() const { return share ? data<Acc>(*share) : nullptr; }
};

template <class T, bool teacher>
void forward_of(const Stream& stream, const Call<T>& c, const Options& o, Tensor& losses, Tensor& lse) {
  using Acc = Accumulator<T>;
  using Sums = LogitTile<T, teacher>;
  constexpr int64_t kCount = Statistics<Acc, teacher>::kCount;
  const int64_t n = c.x.rows();
  const auto along = [&](const Features<T>& f) { return groups_of(f.rows(), Sums::kColumns); };
  const int64_t down = groups_of(n, Sums::kRows);
  const int64_t slots_x = along(c.y) + (c.ny ? along(*c.ny) : 0);
  const int64_t slots_y = o.symmetric ? down + (c.nx ? along(*c.nx) : 0) : 0;
  const Tensor of_x = torch::stable::new_empty(c.x.features, {slots_x, kCount, n}, accumulator_type(c.x.features));
  const Tensor of_y = torch::stable::new_empty(c.x.features, {slots_y, kCount, n}, accumulator_type(c.x.features));
  const auto pass = [&](const Features<T>& a, const Features<T>& b, bool pairs, Acc* of_rows, Acc* of_columns) {
    if (b.rows() == 0) return;
    PYMM_LAUNCH_SHARED((statistics_kernel<T, teacher>), grid_of(along(b), down), dim3(kTileThreads),
                       (kStatisticsBytes<T, teacher>), stream, c.block(a, b, pairs), of_rows, of_columns);
  };
  Acc* const rows_x = data<Acc>(of_x);
  Acc* const rows_y = o.symmetric ? data<Acc>(of_y) : nullptr;
  pass(c.x, c.y, true, rows_x, rows_y);
  if (c.ny) pass(c.x, *c.ny, false, rows_x + along(c.y) * kCount * n, nullptr);
  if (c.nx) pass(c.y, *c.nx, false, rows_y + down * kCount * n, nullptr);
  PYMM_LAUNCH((losses_kernel<Acc, teacher>), grid_of(ceil_div(n, kRowThreads)), dim3(kRowThreads), stream, rows_x,
              slots_x, rows_y, slots_y, n, c.shares(), c.mixture, data<Acc>(losses), data<double>(lse));
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& y, const Tensor& scale, const MaybeTensor& nx,
                                   const MaybeTensor& ny, const MaybeTensor& ids, const MaybeTensor& teacher_x,
                                   const MaybeTensor& teacher_y, bool normalize, bool symmetric, double label_smoothing,
                                   double alpha) {
  const Options o{normalize, symmetric, label_smoothing, alpha};
  const int64_t n = x.size(0);
  const Stream stream(x);
  Tensor losses = torch::stable::new_empty(x, {n}, accumulator_type(x));
  Tensor lse = torch::stable::new_empty(x, {(symmetric ? 2 : 1) * (teacher_x ? 2 : 1), n}, ScalarType::Double);
  if (n == 0) return {losses, lse};
  dispatch(x, kInfoNce, [&]<class T>() {
    const Call<T> call(stream, x, y, scale, nx, ny, ids, teacher_x, teacher_y, o);
    call.teacher ? forward_of<T, true>(stream, call, o, losses, lse)
                 : forward_of<T, false>(stream, call, o, losses, lse);
  });
  return {losses, lse};
}

template <class T, bool teacher>
void block_gradients(const Stream& stream, const Call<T>& call, const Features<T>& a, const Features<T>& c, bool pairs,
                     const Targets<Accumulator<T>>& targets, GradientRows<T>& rows, GradientRows<T>& columns,
                     double* dscale) {
  using Acc = Accumulator<T>;
  using Sums = LogitTile<T, teacher>;
  std::optional<Tensor> parts;
  each_gradient_block<T>(stream, a.features, c.features, rows, columns, [&](const GradientBlock<T>& g) {
    const int64_t across = ceil_div(g.end_c - g.first_c, Sums::kColumns),
                  down = ceil_div(g.end_a - g.first_a, Sums::kRows);
    if (!parts) parts = torch::stable::new_empty(a.features, {across * down}, accumulator_type(a.features));
    PYMM_LAUNCH_SHARED((gradient_kernel<T, teacher>), grid_of(across, down), dim3(kTileThreads), Sums::kBytes, stream,
                       call.block(a, c, pairs), targets, g, data<Acc>(*parts));
    PYMM_LAUNCH(add_sum_kernel<Acc>, dim3(1), dim3(kRowThreads), stream, data<Acc>(*parts), across * down, dscale);
  });
}

template <class T, bool teacher>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_of(const Stream& stream, const Call<T>& call,
                                                               const Options& o, const Tensor& dlosses,
                                                               const Tensor& lse, const std::vector<bool>& needs) {
  using Acc = Accumulator<T>;
  const int64_t n = call.x.rows();
  const int sides = o.symmetric ? 2 : 1;
  // Two numbers in float64: the sum of the pairs' cosines, and the gradient of the scale.
  Tensor numbers = torch::stable::new_empty(call.x.features, {2}, ScalarType::Double);
  torch::stable::zero_(numbers);
  double* const cosines = data<double>(numbers);
  const Tensor of_pairs = torch::stable::new_empty(call.x.features, {n}, accumulator_type(call.x.features));
  PYMM_LAUNCH(pairs_kernel<T>, grid_of(n), dim3(kRowThreads), stream, data<T>(call.x.features),
              data<T>(call.y.features), data<Acc>(call.x.inverse), data<Acc>(call.y.inverse), call.x.features.size(1),
              data<Acc>(of_pairs));
  PYMM_LAUNCH(add_sum_kernel<Acc>, dim3(1), dim3(kRowThreads), stream, data<Acc>(of_pairs), n, cosines);

  const auto targets = [&](int side, bool both) {
    const double* const own = data<double>(lse);
    const auto row = [&](int i) { return own + i * n; };
    return Targets<Acc>{row(side),
                        both ? row(1) : nullptr,
                        teacher ? row(sides + side) : nullptr,
                        teacher && both ? row(sides + 1) : nullptr,
                        data<Acc>(dlosses),
                        call.shares(),
                        cosines,
                        1.0 / sides,
                        call.mixture.hard,
                        call.mixture.soft,
                        call.mixture.even[side],
                        call.mixture.even[1]};
  };
  const auto finish = [&](GradientRows<T>& rows, const Features<T>& f) {
    return rows.finish(stream, o.normalize ? data<Acc>(f.inverse) : nullptr, kSmallestNorm, data<Acc>(call.scale));
  };
  GradientRows<T> x(stream, call.x.features, needs[0]), y(stream, call.y.features, needs[1]);
  block_gradients<T, teacher>(stream, call, call.x, call.y, true, targets(0, o.symmetric), x, y, cosines + 1);
  const auto with_queue = [&](const Features<T>& a, const std::optional<Features<T>>& queue, int side, bool needed,
                              GradientRows<T>& rows) {
    if (!queue) return torch::stable::new_empty(a.features, {0, a.features.size(1)});
    GradientRows<T> columns(stream, queue->features, needed);
    block_gradients<T, teacher>(stream, call, a, *queue, false, targets(side, false), rows, columns, cosines + 1);
    return finish(columns, *queue);
  };
  Tensor dny = with_queue(call.x, call.ny, 0, needs[4], x);
  Tensor dnx = with_queue(call.y, call.nx, 1, needs[3], y);
  Tensor dscale = torch::stable::new_empty(call.scale, {});
  PYMM_LAUNCH(convert_kernel<Acc>, dim3(1), dim3(1), stream, cosines + 1, 1.0, data<Acc>(dscale));
  return {finish(x, call.x), finish(y, call.y), dscale, dnx, dny};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dlosses_in, const Tensor& lse_in,
                                                            const Tensor& x, const Tensor& y, const Tensor& scale,
                                                            const MaybeTensor& nx, const MaybeTensor& ny,
                                                            const MaybeTensor& ids, const MaybeTensor& teacher_x,
                                                            const MaybeTensor& teacher_y, bool normalize,
                                                            bool symmetric, double label_smoothing, double alpha,
                                                            const std::vector<bool>& needs) {
  const Options o{normalize, symmetric, label_smoothing, alpha};
  const Tensor dlosses = dense(dlosses_in), lse = dense(lse_in);
  const int64_t n = x.size(0), rows = (symmetric ? 2 : 1) * (teacher_x ? 2 : 1);
  STD_TORCH_CHECK(needs.size() == 5 && dlosses.numel() == n && dlosses.scalar_type() == accumulator_type(x) &&
                      lse.numel() == rows * n && lse.scalar_type() == ScalarType::Double,
                  kInfoNce, ": dlosses, lse and needs must fit x");
  const Stream stream(x);
  if (n == 0) {
    const auto zeros = [&](const MaybeTensor& t, bool needed) {
      Tensor out = torch::stable::new_empty(x, {t && needed ? t->size(0) : 0, x.size(1)});
      return torch::stable::zero_(out);
    };
    Tensor dscale = torch::stable::new_empty(scale, {});
    return {zeros(x, needs[0]), zeros(y, needs[1]), torch::stable::zero_(dscale), zeros(nx, needs[3]),
            zeros(ny, needs[4])};
  }
  std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>> found;
  dispatch(x, kInfoNce, [&]<class T>() {
    const Call<T> call(stream, x, y, scale, nx, ny, ids, teacher_x, teacher_y, o);
    found = call.teacher ? backward_of<T, true>(stream, call, o, dlosses, lse, needs)
                         : backward_of<T, false>(stream, call, o, dlosses, lse, needs);
  });
  return *found;
}

}  // namespace
}  // namespace pymm::cuda

STABLE_TORCH_LIBRARY_IMPL(pymm_cuda, PYMM_DISPATCH_KEY, m) {
  m.impl("info_nce", TORCH_BOX(&pymm::cuda::forward));
  m.impl("info_nce_backward", TORCH_BOX(&pymm::cuda::backward));
}

// The contrastive loss of pairs: row i of x among the candidates [y; negatives_y], row i of y among [x; negatives_x].
//
// Forward: one pass over tiles of scores (pairs.h) keeps the running maximum and the sum of exponentials of every row
// and, per part, of every column. Backward: the tiles again; with P and Q the softmax of rows and columns and t the
// targets, dS = g_i (P - t) + g_j (Q - t'), and each tile of dS feeds both G . Y and G^T . X while it is in cache.
// The norms enter in the epilogue: G = dS / (||x|| ||y||) is the gradient of the plain dot product, so x and y are
// multiplied as they are and no normalized copy exists; then dx = s (u - <u, x^> x^) with u = G . y.
#include "cpu/info_nce_problem.h"

#include <cmath>
#include <limits>

#include "cpu/gradient_range.h"
#include "cpu/info_nce_sides.h"
#include "cpu/pairs.h"
#include "cpu/unit_rows.h"

namespace pymm {
namespace {

const InfoNceLoops<float>& loops_of(float) { return info_nce_table().of_float; }
const InfoNceLoops<double>& loops_of(double) { return info_nce_table().of_double; }

// f(i, score) for the scores of rows with the columns of the same index.
template <class Acc, class F>
void each_partner(const PairTile<Acc>& t, F&& f) {
  for (int64_t i = max_of(t.row, t.column); i < min_of(t.row + t.rows, t.column + t.columns); ++i) {
    f(i, t.scores[(i - t.row) * t.ld + i - t.column]);
  }
}

// The tiles' scale: with a positive one, the logit of a cosine of -infinity is -infinity.
template <class T>
Accumulator<T> tile_scale(const InfoNceProblem<T>& p) {
  using Acc = Accumulator<T>;
  return std::max(static_cast<Acc>(p.scale), std::numeric_limits<Acc>::min());
}

template <class T>
void forward_of(const InfoNceProblem<T>& p, Accumulator<T>* losses, double* lse) {
  using Acc = Accumulator<T>;
  const InfoNceLoops<Acc>& loops = loops_of(Acc{});
  const Acc scale = tile_scale(p);
  const bool smooth = p.smooth[0] > 0;
  Side<Acc> x(p.n, p.teacher), y(p.symmetric ? p.n : 0, p.teacher);
  std::vector<Acc> partner(p.n);  // the cosine of each pair
  std::vector<Side<Acc>> columns;
  std::vector<SharedReference<Acc>> reference(thread_count()), teacher_reference(thread_count());

  const auto softmax = [&](const ScoreTile<Acc>& tile, const Acc* row_factor, const Acc* column_factor,
                           Softmax<Acc>* rows, int64_t row, Softmax<Acc>* cols, int64_t column,
                           SharedReference<Acc>& shared, const Acc* weights, auto&& between) {
    Acc low, high;
    loops.cosines(tile, row_factor, column_factor, rows ? &rows->max[row] : nullptr,
                  cols ? &cols->max[column] : nullptr, &low, &high);
    References<Acc> r = shared.choose(scale * low, scale * high);
    if (rows) rows->refer(row, tile.rows, scale, r);
    if (cols) cols->refer(column, tile.columns, scale, r);
    r.row = rows ? &rows->reference[row] : nullptr;
    r.column = cols ? &cols->reference[column] : nullptr;
    between();
    loops.exp_sums(
        tile, scale, r,
        ExpSums<Acc>{rows != nullptr, cols != nullptr, rows ? &rows->sum[row] : nullptr,
                     cols ? &cols->sum[column] : nullptr, weights, rows && weights ? &rows->weighted[row] : nullptr,
                     cols && weights ? &cols->weighted[column] : nullptr});
  };

  scan_pairs(
      p.pairs,
      [&](int set, int64_t, int64_t count, int64_t parts) {
        columns.assign(set == 0 && p.symmetric ? parts : 0, Side<Acc>(count, p.teacher));
      },
      [&](const PairTile<Acc>& t) {
        Side<Acc>* const rows = p.has_rows(t) ? &x : nullptr;
        Side<Acc>* const cols = p.has_columns(t) ? &columns[t.part] : nullptr;
        const ScoreTile<Acc> tile{t.scores, t.ld, t.rows, t.columns};
        const bool own_partners = p.of_pairs(t) && p.ids.empty();
        softmax(tile, p.factor_of(0, t.row_set, t.row), p.factor_of(1, t.column_set, t.column),
                rows ? &rows->student : nullptr, t.row, cols ? &cols->student : nullptr, t.strip_column,
                reference[t.part], nullptr, [&] {
                  if (!own_partners) return;
                  // The partner stays out of the sums, so that a loss near 0 keeps its digits.
                  each_partner(t, [&](int64_t i, Acc& c) {
                    partner[i] = c;
                    c = -std::numeric_limits<Acc>::infinity();
                  });
                });
        if (own_partners) each_partner(t, [&](int64_t i, Acc& c) { c = partner[i]; });
        const bool ids = p.of_pairs(t) && !p.ids.empty();
        if (ids || smooth) {
          loops.sums(tile, ids ? &p.ids[t.row] : nullptr, ids ? &p.ids[t.column] : nullptr,
                     rows ? &rows->equal[t.row] : nullptr, cols ? &cols->equal[t.strip_column] : nullptr,
                     rows ? &rows->all[t.row] : nullptr, cols ? &cols->all[t.strip_column] : nullptr);
        }
        if (!t.teacher) return;
        softmax(ScoreTile<Acc>{t.teacher, t.ld, t.rows, t.columns}, p.teacher_factor_of(0, t.row_set, t.row),
                p.teacher_factor_of(1, t.column_set, t.column), rows ? &rows->teacher : nullptr, t.row,
                cols ? &cols->teacher : nullptr, t.strip_column, teacher_reference[t.part], t.scores, [] {});
      },
      [&](int set, int64_t first, int64_t count, int64_t) {
        if (set == 0 && p.symmetric) {
          parallel_ranges(count, kLeastRows, [&](int64_t begin, int64_t end) {
            for (const Side<Acc>& part : columns) y.add(first, begin, end, part);
          });
        }
      });

  const Side<Acc>* const sides[] = {&x, &y};
  const int count = p.symmetric ? 2 : 1;
  parallel_ranges(p.n, kLeastRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double loss = 0;
      for (int side = 0; side < count; ++side) {
        const Side<Acc>& s = *sides[side];
        const double positive = p.ids.empty() ? static_cast<double>(partner[i]) : s.equal[i] * p.share[i];
        const double excess =
            p.ids.empty() ? s.student.excess(i, p.scale * positive) : s.student.lse(i) - p.scale * positive;
        double target = (p.hard - 1) * positive;
        if (smooth) target += p.smooth[side] * s.all[i];
        if (p.teacher) target += p.soft * (s.teacher.weighted[i] / s.teacher.sum[i]);
        loss += excess - p.scale * target;
        lse[side * p.n + i] = p.scale * positive + excess;
        if (p.teacher) lse[(count + side) * p.n + i] = s.teacher.lse(i);
      }
      losses[i] = static_cast<Acc>(loss / count);
    }
  });
}

template <class T>
double backward_of(const InfoNceProblem<T>& p, const Accumulator<T>* dlosses, const double* lse, T* const (&row_out)[2],
                   T* const (&column_out)[2]) {
  using Acc = Accumulator<T>;
  const InfoNceLoops<Acc>& loops = loops_of(Acc{});
  const Acc scale = tile_scale(p);
  const int count = p.symmetric ? 2 : 1;
  std::vector<double> weight(dlosses, dlosses + p.n);
  Magnitudes factors[2];
  for (int side = 0; side < 2; ++side) factors[side].add(p.factor[side][0]).add(p.factor[side][1]);
  const GradientRange range = GradientRange::of<T>(Magnitudes{}.add(weight), factors[0], factors[1]);
  for (double& w : weight) w *= range.power / count;
  const std::vector<Acc> nothing(max_of(kGradientRows, kGradientColumns));
  const GradientWeights<Acc> student(weight, lse, count, 1.0);
  const GradientWeights<Acc> teacher(weight, lse + count * p.n, p.teacher ? count : 0, p.soft);
  std::vector<Acc> hard(p.n), smooth[2];
  for (int64_t i = 0; i < p.n; ++i) hard[i] = static_cast<Acc>(weight[i] * p.hard * p.share[i]);
  for (int side = 0; side < 2 && p.smooth[0] > 0; ++side) {
    for (const double w : weight) smooth[side].push_back(static_cast<Acc>(w * p.smooth[side]));
  }
  PartSums totals;

  const int64_t parts = thread_count();
  std::optional<RowSums<T>> sums[2];
  Wanted<T> wanted;
  wanted.wide = range.wide;
  for (int set = 0; set < 2; ++set) {
    if (row_out[set])
      wanted.rows[set] = &sums[set].emplace(row_out[set], p.pairs.rows[set].n, p.pairs.d, parts, kGradientRows);
    wanted.columns[set] = column_out[set] != nullptr;
  }
  const auto finish = [&](int side, int set, int64_t first, int64_t rows, Acc* u, T* out) {
    const T* const x = (side == 0 ? p.pairs.rows[set] : p.pairs.columns[set]).data;
    through_unit(u, x + first * p.pairs.d, p.normalize ? &p.inverse[side][set][first] : nullptr, p.scale / range.power,
                 rows, p.pairs.d, out + first * p.pairs.d);
  };

  differentiate_pairs(
      p.pairs, wanted,
      [&](const PairTile<Acc>& t) {
        const bool rows = p.has_rows(t), cols = p.has_columns(t), pairs = p.of_pairs(t), ids = pairs && !p.ids.empty();
        const ScoreTile<Acc> tile{t.scores, t.ld, t.rows, t.columns};
        const auto weights = [&](const GradientWeights<Acc>& w, const Acc* row_factor, const Acc* column_factor,
                                 References<Acc>& r) {
          r = {w.shared, w.tile, rows ? &w.reference[0][t.row] : nullptr, cols ? &w.reference[1][t.column] : nullptr};
          TileGradient<Acc> g{};
          g.row_factor = row_factor;
          g.column_factor = column_factor;
          g.row_weight = rows ? &w.weight[0][t.row] : nullptr;
          g.column_weight = cols ? &w.weight[1][t.column] : nullptr;
          return g;
        };
        References<Acc> r;
        if (t.teacher) {
          const TileGradient<Acc> g = weights(teacher, p.teacher_factor_of(0, t.row_set, t.row),
                                              p.teacher_factor_of(1, t.column_set, t.column), r);
          loops.soft_targets(ScoreTile<Acc>{t.teacher, t.ld, t.rows, t.columns}, scale, r, g);
        }
        TileGradient<Acc> g =
            weights(student, p.factor_of(0, t.row_set, t.row), p.factor_of(1, t.column_set, t.column), r);
        g.soft = t.teacher;
        if (ids) {
          g.row_hard = &hard[t.row];
          g.column_hard = cols ? &hard[t.column] : nothing.data();
          g.row_ids = &p.ids[t.row];
          g.column_ids = &p.ids[t.column];
        }
        if (!smooth[0].empty()) {
          g.row_smooth = rows ? &smooth[0][t.row] : nothing.data();
          g.column_smooth = cols ? &smooth[1][t.column] : nothing.data();
        }
        const bool partners = pairs && !ids && t.row < t.column + t.columns && t.column < t.row + t.rows;
        g.has_diagonal = partners;
        g.diagonal = t.row - t.column;
        Acc dots[kGradientRows];
        if (partners) each_partner(t, [&](int64_t i, Acc& dot) { dots[i - t.row] = dot; });
        double total = loops.gradient(tile, scale, r, g);
        if (partners) {
          // P - 1 = expm1(logit - lse): a partner found for certain keeps the digits of its gradient.
          each_partner(t, [&](int64_t i, Acc& gradient) {
            const Acc row_factor = p.factor[0][0][i], column_factor = p.factor[1][0][i];
            const Acc c = dots[i - t.row] * row_factor * column_factor;
            double d = 0;
            for (int side = 0; side < count; ++side) {
              d += weight[i] * (std::expm1(p.scale * static_cast<double>(c) - lse[side * p.n + i]) + 1 - p.hard);
              if (!smooth[side].empty()) d -= static_cast<double>(smooth[side][i]);
            }
            if (t.teacher) d -= static_cast<double>(t.teacher[(i - t.row) * t.ld + i - t.column]);
            total += d * static_cast<double>(c);
            gradient = static_cast<Acc>(d) * row_factor * column_factor;
          });
        }
        totals[t.part] += total;
      },
      [&](int set, int64_t first, int64_t rows, Acc* u) { finish(1, set, first, rows, u, column_out[set]); });
  for (int set = 0; set < 2; ++set) {
    if (wanted.rows[set]) {
      wanted.rows[set]->each_block(p.pairs.rows[set].n, parts, kGradientRows, [&](int64_t first, int64_t rows, Acc* u) {
        finish(0, set, first, rows, u, row_out[set]);
      });
    }
  }
  return p.sign * totals.total() / range.power;
}

using MaybeTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                                   const MaybeTensor& negatives_x, const MaybeTensor& negatives_y,
                                   const MaybeTensor& ids, const MaybeTensor& teacher_x, const MaybeTensor& teacher_y,
                                   bool normalize, bool symmetric, double label_smoothing, double alpha) {
  const DType dtype = dtype_of(x, kInfoNce);
  PYMM_CHECK(x.dim() == 2, kInfoNce, ": x must be (N, E)");
  const int64_t rows = (symmetric ? 2 : 1) * (teacher_x ? 2 : 1);
  Tensor losses = empty({x.size(0)}, x, accumulator_type(dtype));
  Tensor lse = empty({rows, x.size(0)}, x, ScalarType::Double);
  dispatch(dtype, [&]<class T>() {
    const InfoNceProblem<T> problem = info_nce_problem<T>({x, y, logit_scale, negatives_x, negatives_y, ids, teacher_x,
                                                           teacher_y, normalize, symmetric, label_smoothing, alpha});
    if (problem.n > 0) forward_of(problem, data<Accumulator<T>>(losses), data<double>(lse));
  });
  return {losses, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dlosses_in, const Tensor& lse_in,
                                                            const Tensor& x, const Tensor& y, const Tensor& logit_scale,
                                                            const MaybeTensor& negatives_x,
                                                            const MaybeTensor& negatives_y, const MaybeTensor& ids,
                                                            const MaybeTensor& teacher_x, const MaybeTensor& teacher_y,
                                                            bool normalize, bool symmetric, double label_smoothing,
                                                            double alpha, const std::vector<bool>& needs) {
  const DType dtype = dtype_of(x, kInfoNce);
  PYMM_CHECK(x.dim() == 2 && needs.size() == 5, kInfoNce, ": x must be (N, E), needs have five elements");
  const int64_t n = x.size(0), d = x.size(1), rows = (symmetric ? 2 : 1) * (teacher_x ? 2 : 1);
  const Tensor dlosses = dense(dlosses_in), lse = dense(lse_in);
  PYMM_CHECK(dlosses.numel() == n && dlosses.scalar_type() == accumulator_type(dtype), kInfoNce,
             ": dlosses must be (N,) accumulators");
  PYMM_CHECK(lse.numel() == rows * n && lse.scalar_type() == ScalarType::Double, kInfoNce, ": lse does not fit");
  const auto gradient = [&](bool needed, int64_t count) { return empty({needed ? count : 0, d}, x); };
  Tensor dx = gradient(needs[0], n), dy = gradient(needs[1], n);
  Tensor dnx = gradient(needs[3] && negatives_x, negatives_x ? negatives_x->size(0) : 0);
  Tensor dny = gradient(needs[4] && negatives_y, negatives_y ? negatives_y->size(0) : 0);
  Tensor dscale = zeros({}, logit_scale);
  if (n == 0) {
    torch::stable::zero_(dnx);
    torch::stable::zero_(dny);
    return {dx, dy, dscale, dnx, dny};
  }
  dispatch(dtype, [&]<class T>() {
    const InfoNceProblem<T> problem = info_nce_problem<T>({x, y, logit_scale, negatives_x, negatives_y, ids, teacher_x,
                                                           teacher_y, normalize, symmetric, label_smoothing, alpha});
    const auto memory = [](const Tensor& t) { return t.numel() > 0 ? data<T>(t) : nullptr; };
    const double total = backward_of<T>(problem, data<Accumulator<T>>(dlosses), data<double>(lse),
                                        {memory(dx), memory(dnx)}, {memory(dy), memory(dny)});
    *data<Accumulator<T>>(dscale) = static_cast<Accumulator<T>>(total);
  });
  return {dx, dy, dscale, dnx, dny};
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("info_nce", TORCH_BOX(&pymm::forward));
  m.impl("info_nce_backward", TORCH_BOX(&pymm::backward));
}

// The arguments of info_nce, checked, and what its tiles need of them.
#pragma once

#include <cmath>
#include <unordered_map>

#include "cpu/pairs.h"
#include "cpu/unit_rows.h"

namespace pymm {

constexpr const char* kInfoNce = "info_nce";

template <class T>
struct InfoNceProblem {
  using Acc = Accumulator<T>;

  Pairs<T> pairs;
  int64_t n = 0;
  bool normalize = true, symmetric = true, teacher = false;
  double scale = 0, sign = 1;                 // |logit_scale| and its sign
  double hard = 1, soft = 0, smooth[2] = {};  // weights of the targets' parts; smooth per candidate of x, of y
  std::vector<Acc> inverse[2][2];             // [rows, columns][set]: 1 / norm, or 1
  std::vector<int32_t> ids;                   // 0.. in order of appearance; empty: all differ
  std::vector<double> share;                  // 1 / the number of pairs of equal id
  std::vector<Tensor> alive;

  // What tiles of dot products are multiplied by; the sign of the scale is in the rows' factors.
  std::vector<Acc> factor[2][2], teacher_factor[2][2];

  const Acc* factor_of(int side, int set, int64_t i) const { return factor[side][set].data() + i; }
  const Acc* teacher_factor_of(int side, int set, int64_t i) const {
    return set == 0 ? teacher_factor[side][0].data() + i : factor_of(side, set, i);
  }
  bool has_rows(const PairTile<Acc>& tile) const { return tile.row_set == 0; }
  bool has_columns(const PairTile<Acc>& tile) const { return symmetric && tile.column_set == 0; }
  bool of_pairs(const PairTile<Acc>& tile) const { return tile.row_set == 0 && tile.column_set == 0; }
};

struct InfoNceArguments {
  const Tensor &x, &y, &logit_scale;
  const std::optional<Tensor>&negatives_x, &negatives_y, &ids, &teacher_x, &teacher_y;
  bool normalize, symmetric;
  double label_smoothing, alpha;
};

template <class T>
InfoNceProblem<T> info_nce_problem(const InfoNceArguments& a) {
  using Acc = Accumulator<T>;
  InfoNceProblem<T> p;
  p.n = a.x.size(0);
  const int64_t d = a.x.size(1);
  p.normalize = a.normalize;
  p.symmetric = a.symmetric;
  p.teacher = a.teacher_x.has_value();
  const auto features = [&](const Tensor& t, int64_t rows, const char* name) -> const T* {
    PYMM_CHECK(
        t.dim() == 2 && t.size(1) == d && (rows < 0 || t.size(0) == rows) && t.scalar_type() == a.x.scalar_type(),
        kInfoNce, ": ", name, " does not fit x");
    p.alive.push_back(dense(t));
    return data<T>(p.alive.back());
  };
  p.pairs.d = d;
  p.pairs.rows[0] = {features(a.x, p.n, "x"), nullptr, p.n};
  p.pairs.columns[0] = {features(a.y, p.n, "y"), nullptr, p.n};
  PYMM_CHECK(!a.negatives_x || a.symmetric, kInfoNce, ": negatives_x needs symmetric");
  PYMM_CHECK(a.teacher_x.has_value() == a.teacher_y.has_value(), kInfoNce, ": one teacher without the other");
  // The negatives are their own teachers.
  if (a.negatives_x) {
    const T* const negatives = features(*a.negatives_x, -1, "negatives_x");
    p.pairs.rows[1] = {negatives, p.teacher ? negatives : nullptr, a.negatives_x->size(0)};
  }
  if (a.negatives_y) {
    const T* const negatives = features(*a.negatives_y, -1, "negatives_y");
    p.pairs.columns[1] = {negatives, p.teacher ? negatives : nullptr, a.negatives_y->size(0)};
  }
  if (p.teacher) {
    p.pairs.rows[0].teacher = features(*a.teacher_x, p.n, "teacher_x");
    p.pairs.columns[0].teacher = features(*a.teacher_y, p.n, "teacher_y");
  }

  PYMM_CHECK(a.logit_scale.numel() == 1 && a.logit_scale.scalar_type() == accumulator_type(dtype_of<T>()), kInfoNce,
             ": logit_scale must be one accumulator");
  const double scale = *data<Acc>(a.logit_scale);
  p.scale = std::fabs(scale);
  p.sign = scale < 0 ? -1 : 1;
  const double alpha = p.teacher ? a.alpha : 0;
  p.hard = (1 - a.label_smoothing) * (1 - alpha);
  p.soft = (1 - a.label_smoothing) * alpha;
  p.smooth[0] = a.label_smoothing / static_cast<double>(max_of(1, p.n + p.pairs.columns[1].n));
  p.smooth[1] = a.label_smoothing / static_cast<double>(max_of(1, p.n + p.pairs.rows[1].n));

  const auto signed_for = [&](int side, std::vector<Acc> inverse) {
    if (side == 0 && p.sign < 0) {
      for (Acc& value : inverse) value = -value;
    }
    return inverse;
  };
  for (int side = 0; side < 2; ++side) {
    for (int set = 0; set < 2; ++set) {
      const Features<T>& f = side == 0 ? p.pairs.rows[set] : p.pairs.columns[set];
      p.inverse[side][set] = unit_factors(f.data, f.n, d, p.normalize);
      p.factor[side][set] = signed_for(side, p.inverse[side][set]);
      if (set == 0 && f.teacher) {
        p.teacher_factor[side][0] = signed_for(side, unit_factors(f.teacher, f.n, d, p.normalize));
      }
    }
  }

  p.share.assign(p.n, 1.0);
  if (a.ids) {
    PYMM_CHECK(a.ids->dim() == 1 && a.ids->size(0) == p.n && a.ids->scalar_type() == ScalarType::Long, kInfoNce,
               ": ids must be (N,) int64");
    const Tensor ids = dense(*a.ids);
    std::unordered_map<int64_t, int32_t> seen;
    std::vector<int64_t> count;
    for (int64_t i = 0; i < p.n; ++i) {
      const auto [at, added] = seen.emplace(data<int64_t>(ids)[i], static_cast<int32_t>(seen.size()));
      if (added) count.push_back(0);
      p.ids.push_back(at->second);
      ++count[at->second];
    }
    for (int64_t i = 0; i < p.n; ++i) p.share[i] = 1.0 / static_cast<double>(count[p.ids[i]]);
    if (static_cast<int64_t>(seen.size()) == p.n) p.ids.clear();
  }
  return p;
}

}  // namespace pymm

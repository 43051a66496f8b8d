// What info_nce keeps per row of one side: the streaming softmax forward, the weights of its terms backward.
//
// An exponential is taken as exp(logit - reference) in the accumulators' type, so the reference has to lie close
// enough to the logits that matter: kAbove below the largest at most, kBelow above the smallest maximum. One reference
// for everything halves the number of exponentials; it is used where the maxima (forward) or the log-sum-exps
// (backward) of all rows and columns concerned lie within a window that leaves no such term to underflow.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "cpu/host.h"
#include "cpu/simd/info_nce.h"
#include "cpu/types.h"

namespace pymm {

constexpr int64_t kLeastRows = 64;          // whose exponentials and logarithms are worth a thread
constexpr double kAbove = 60, kBelow = 40;  // e^60 summed a million times is finite; e^-87 * e^40 is nothing

// The reference of the last tile, kept as long as it serves.
template <class Acc>
struct SharedReference {
  Acc tile = std::numeric_limits<Acc>::quiet_NaN();

  // For a tile whose rows and columns have maxima between `low` and `high`.
  References<Acc> choose(Acc low, Acc high) {
    const bool serves = low >= tile - static_cast<Acc>(kBelow) && high <= tile + static_cast<Acc>(kAbove);
    const bool possible = high - low <= static_cast<Acc>(kAbove + kBelow - 20);  // maxima grow: leave room
    if (!serves && possible) tile = (low + high) / 2 - static_cast<Acc>((kAbove - kBelow) / 2);
    return {serves || possible, tile, nullptr, nullptr};
  }
};

template <class Acc>
struct Softmax {
  std::vector<Acc> max;               // of the cosines
  std::vector<Acc> reference;         // of the sums
  std::vector<double> sum, weighted;  // of exp(logit - reference), and times a weight

  Softmax(int64_t n, bool with_weights)
      : max(n, -std::numeric_limits<Acc>::infinity()),
        reference(n, -std::numeric_limits<Acc>::infinity()),
        sum(n),
        weighted(with_weights ? n : 0) {}

  void refer(int64_t i, Acc to) {
    if (reference[i] == to) return;
    if (sum[i] != 0) {
      const double factor = std::exp(static_cast<double>(reference[i]) - static_cast<double>(to));
      sum[i] *= factor;
      if (!weighted.empty()) weighted[i] *= factor;
    }
    reference[i] = to;
  }
  // Moves rows to the reference of a tile, or to their own maxima.
  void refer(int64_t first, int64_t count, Acc scale, const References<Acc>& to) {
    for (int64_t i = first; i < first + count; ++i) refer(i, to.shared ? to.tile : scale * max[i]);
  }
  // Adds the sums that another part made of the same row.
  void add(int64_t i, const Softmax& other, int64_t j) {
    if (!(other.reference[j] <= reference[i])) refer(i, other.reference[j]);
    const bool same = other.reference[j] == reference[i];
    const double factor =
        same ? 1.0 : std::exp(static_cast<double>(other.reference[j]) - static_cast<double>(reference[i]));
    sum[i] += other.sum[j] * factor;
    if (!weighted.empty()) weighted[i] += other.weighted[j] * factor;
    max[i] = max[i] > other.max[j] ? max[i] : other.max[j];
  }
  double lse(int64_t i) const { return static_cast<double>(reference[i]) + std::log(sum[i]); }
  // log(exp(logit) + sum) - logit, for a logit that is not in the sum.
  double excess(int64_t i, double logit) const {
    const double others = lse(i) - logit;
    return others > 0 ? others + std::log1p(std::exp(-others)) : std::log1p(std::exp(others));
  }
};

template <class Acc>
struct Side {
  Softmax<Acc> student, teacher;
  std::vector<double> equal, all;  // sums of the cosines of equal ids, and of all candidates

  Side(int64_t n, bool with_teacher)
      : student(n, false), teacher(with_teacher ? n : 0, with_teacher), equal(n), all(n) {}

  // Adds rows [begin, end) of what a part found; its row 0 is row `first` here.
  void add(int64_t first, int64_t begin, int64_t end, const Side& part) {
    for (int64_t i = begin; i < end; ++i) {
      student.add(first + i, part.student, i);
      if (!teacher.sum.empty()) teacher.add(first + i, part.teacher, i);
      equal[first + i] += part.equal[i];
      all[first + i] += part.all[i];
    }
  }
};

// The softmax terms of the gradient, share * g_i exp(logit - lse_i), as exp(logit - reference) * weight.
template <class Acc>
struct GradientWeights {
  bool shared = true;
  Acc tile = 0;
  std::vector<Acc> reference[2], weight[2];  // of rows, of columns

  // `lse` holds `sides` rows of g.size() numbers.
  GradientWeights(const std::vector<double>& g, const double* lse, int sides, double share) {
    const int64_t n = static_cast<int64_t>(g.size());
    double low = std::numeric_limits<double>::infinity(), high = -low;
    for (int64_t i = 0; i < sides * n; ++i) {
      low = lse[i] < low ? lse[i] : low;
      high = lse[i] > high ? lse[i] : high;
    }
    shared = high - low <= kAbove + kBelow;
    tile = static_cast<Acc>(low + kBelow);
    for (int side = 0; side < sides; ++side) {
      reference[side].resize(n);
      weight[side].resize(n);
      parallel_ranges(n, kLeastRows, [&, side](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const double own = lse[side * n + i];
          reference[side][i] = static_cast<Acc>(own);
          const double to = static_cast<double>(shared ? tile : reference[side][i]);
          weight[side][i] = static_cast<Acc>(share * g[i] * std::exp(to - own));
        }
      });
    }
  }
};

}  // namespace pymm

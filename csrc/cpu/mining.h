// What the miners of triplets share: labels as groups, the rows of one side, the outcome.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/chosen.h"
#include "cpu/product.h"
#include "cpu/simd/select.h"

namespace pymm {

// Rows grouped by label: `group[i]` is the label of row i as a small number, and the rows of group g are
// members[start[g]], ..., members[start[g + 1] - 1], in order.
struct Labels {
  Labels(const int64_t* labels, int64_t n) : group(static_cast<size_t>(n)), members(static_cast<size_t>(n)) {
    for (int64_t i = 0; i < n; ++i) members[static_cast<size_t>(i)] = i;
    std::stable_sort(members.begin(), members.end(), [&](int64_t a, int64_t b) { return labels[a] < labels[b]; });
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = members[static_cast<size_t>(i)];
      if (i == 0 || labels[row] != labels[members[static_cast<size_t>(i - 1)]]) start.push_back(i);
      group[static_cast<size_t>(row)] = static_cast<int64_t>(start.size()) - 1;
    }
    start.push_back(n);
  }
  int64_t rows() const { return static_cast<int64_t>(group.size()); }
  const int64_t* begin(int64_t row) const {
    return members.data() + start[static_cast<size_t>(group[static_cast<size_t>(row)])];
  }
  const int64_t* end(int64_t row) const {
    return members.data() + start[static_cast<size_t>(group[static_cast<size_t>(row)]) + 1];
  }

  std::vector<int64_t> group, members, start;
};

// The rows of x or of y, with their inverse norms.
template <class T>
struct Side {
  const T* rows;
  const Accumulator<T>* inverse;
  int64_t n, d;
  const T* row(int64_t i) const { return rows + i * d; }
};

struct Mined {
  double loss = 0;    // the sum of the positive hinges
  int64_t count = 0;  // the selected triplets
};

}  // namespace pymm

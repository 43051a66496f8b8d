// The farthest positive and the nearest negative of every anchor, and the gradient through them.
//
// Parallel: forward, one block per 64 anchors and group of tiles of candidates, so that few anchors fill a GPU too;
// then one thread per anchor joins the groups. On chip: a tile of cosines in registers, and each thread's best so far.
// Bytes: the rows once per tile of anchors, which L2 serves, and two candidates per anchor and group; no N x N numbers.
// Backward: one block per row adds up the rows that its triplets point to, and finds the anchors that point to it by
// reading all of the other side's triplets, in order: nothing is added atomically.
#pragma once

#include "cuda/rows.h"
#include "cuda/tile.h"

namespace pymm::cuda {

constexpr int kAnchorThreads = 128;

// Rows of one side with their inverse norms, as anchors or as candidates.
template <class T>
struct Side {
  const T* rows;
  const Accumulator<T>* inverse;
};

// A cosine and the candidate that has it; `at` is -1 where there is none.
template <class Acc>
struct Found {
  Acc value;
  int32_t at;
  // Keeps the better of two: the smaller (`sign` 1) or the larger (-1) cosine, the lower index of equal ones.
  PYMM_DEVICE void keep(Acc other, int32_t other_at, int sign) {
    const bool better = sign > 0 ? other < value : other > value;
    if (other_at >= 0 && (at < 0 || better || (other == value && other_at < at))) {
      value = other;
      at = other_at;
    }
  }
};

// What every group of candidates found for every anchor: (2, groups, n), positives first.
template <class Acc>
struct Hardest {
  Acc* values;
  int32_t* at;
};

template <class T>
PYMM_GLOBAL PYMM_LAUNCH_BOUNDS(kSide* kSide) void hardest_kernel(Side<T> anchors, Side<T> candidates,
                                                                 const int64_t* labels, bool crossed, int64_t n,
                                                                 int64_t d, Hardest<Accumulator<T>> out) {
  using Acc = Accumulator<T>;
  PYMM_SHARED Slabs<Acc> slabs;
  PYMM_SHARED Acc values[kTile][kSide];
  PYMM_SHARED int32_t at[kTile][kSide];
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile, group = blockIdx.y, groups = gridDim.y;
  const Rows<Acc, T> of_a{anchors.rows + first * d, n - first, d, 1};
  Acc inverse[kEach];
  int64_t label[kEach];
  PYMM_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int64_t row = first + ty + i * kSide;
    inverse[i] = row < n ? anchors.inverse[row] : Acc(0);
    label[i] = row < n ? labels[row] : 0;
  }
  Found<Acc> positive[kEach], negative[kEach];
  PYMM_UNROLL
  for (int i = 0; i < kEach; ++i) positive[i] = negative[i] = {Acc(0), -1};
  for (int64_t column = group * kTile; column < n; column += groups * kTile) {
    Acc sums[kEach][kEach] = {};
    add_product(slabs, d, false, of_a, false, Rows<Acc, T>{candidates.rows + column * d, n - column, d, 1}, sums);
    PYMM_UNROLL
    for (int j = 0; j < kEach; ++j) {
      const int64_t candidate = column + tx + j * kSide;
      if (candidate >= n) continue;
      const Acc of_candidate = candidates.inverse[candidate];
      const int64_t own = labels[candidate];
      PYMM_UNROLL
      for (int i = 0; i < kEach; ++i) {
        const Acc s = sums[i][j] * inverse[i] * of_candidate;
        if (own != label[i]) {
          negative[i].keep(s, static_cast<int32_t>(candidate), -1);
        } else if (crossed || candidate != first + ty + i * kSide) {
          positive[i].keep(s, static_cast<int32_t>(candidate), 1);
        }
      }
    }
  }
  const auto store = [&](const Found<Acc>(&best)[kEach], int side) {
    PYMM_UNROLL
    for (int i = 0; i < kEach; ++i) {
      values[ty + i * kSide][tx] = best[i].value;
      at[ty + i * kSide][tx] = best[i].at;
    }
    PYMM_SYNC();
    const int row = ty * kSide + tx;
    if (row < kTile && first + row < n) {
      Found<Acc> found{Acc(0), -1};
      for (int i = 0; i < kSide; ++i) found.keep(values[row][i], at[row][i], side == 0 ? 1 : -1);
      const int64_t slot = (side * groups + group) * n + first + row;
      out.values[slot] = found.value;
      out.at[slot] = found.at;
    }
    PYMM_SYNC();
  };
  store(positive, 0);
  store(negative, 1);
}

// Joins the groups: the triplet of each anchor, -1 where its hinge is 0 or it has none; its loss; whether it counts.
template <class Acc>
PYMM_GLOBAL void close_hardest_kernel(Hardest<Acc> in, int64_t groups, int64_t n, double margin, int64_t* triplets,
                                      double* losses, int64_t* counts) {
  const int64_t anchor = static_cast<int64_t>(blockIdx.x) * kAnchorThreads + threadIdx.x;
  if (anchor >= n) return;
  Found<Acc> best[2] = {{Acc(0), -1}, {Acc(0), -1}};
  for (int side = 0; side < 2; ++side) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t slot = (side * groups + group) * n + anchor;
      best[side].keep(in.values[slot], in.at[slot], side == 0 ? 1 : -1);
    }
  }
  const bool valid = best[0].at >= 0 && best[1].at >= 0;
  const bool active = valid && Acc(margin) + best[1].value > best[0].value;
  triplets[2 * anchor] = active ? best[0].at : -1;
  triplets[2 * anchor + 1] = active ? best[1].at : -1;
  losses[anchor] = active ? margin + static_cast<double>(best[1].value) - static_cast<double>(best[0].value) : 0;
  counts[anchor] = valid ? 1 : 0;
}

template <class T>
void mine_hard(const Stream& stream, const Tensor& like, Side<T> anchors, Side<T> candidates, const int64_t* labels,
               bool crossed, int64_t n, int64_t d, double margin, int64_t* triplets, double* losses, int64_t* counts) {
  using Acc = Accumulator<T>;
  constexpr int64_t kBlocks = 512;  // that fill a GPU
  const int64_t row_tiles = ceil_div(n, kTile);
  const int64_t wanted = kBlocks / row_tiles, groups = wanted < 1 ? 1 : wanted < row_tiles ? wanted : row_tiles;
  const Tensor values = torch::stable::new_empty(like, std::vector<int64_t>{2, groups, n}, accumulator_type(like));
  const Tensor at = torch::stable::new_empty(like, std::vector<int64_t>{2, groups, n}, ScalarType::Int);
  const Hardest<Acc> found{data<Acc>(values), data<int32_t>(at)};
  PYMM_LAUNCH(hardest_kernel<T>, dim3(static_cast<unsigned>(row_tiles), static_cast<unsigned>(groups)),
              dim3(kSide, kSide), stream, anchors, candidates, labels, crossed, n, d, found);
  PYMM_LAUNCH(close_hardest_kernel<Acc>, dim3(static_cast<unsigned>(ceil_div(n, kAnchorThreads))), dim3(kAnchorThreads),
              stream, found, groups, n, margin, triplets, losses, counts);
}

// The gradient of the rows of one side. Its own triplets (p, n) add other[n] - other[p] to the row's sum; the triplets
// of the other side add, or take, their anchor where they point to the row. Without a second side, other is itself.
template <class T>
PYMM_GLOBAL void hard_gradient_kernel(Side<T> side, Side<T> other, const int64_t* own, const int64_t* others, int64_t n,
                                      int64_t d, const Accumulator<T>* dloss, const int64_t* count,
                                      Accumulator<T>* sums, T* out) {
  using Acc = Accumulator<T>;
  constexpr int kBits = 16;  // triplets that a thread looks at before all come together
  PYMM_SHARED uint32_t hits[kRowThreads];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  Acc* t = sums + row * d;
  const auto add = [&](int64_t from, Acc sign) {
    const Acc factor = sign * other.inverse[from];
    for (int64_t i = thread; i < d; i += kRowThreads) t[i] += factor * to_float(other.rows[from * d + i]);
  };
  for (int64_t i = thread; i < d; i += kRowThreads) t[i] = 0;
  if (own[2 * row] >= 0) {
    add(own[2 * row], Acc(-1));
    add(own[2 * row + 1], Acc(1));
  }
  for (int64_t first = 0; first < n; first += kRowThreads * kBits) {
    uint32_t found = 0;  // bit i: triplet i's positive is the row; bit 16 + i: its negative is
    for (int i = 0; i < kBits; ++i) {
      const int64_t anchor = first + i * kRowThreads + thread;
      if (anchor >= n) continue;
      if (others[2 * anchor] == row) found |= uint32_t{1} << i;
      if (others[2 * anchor + 1] == row) found |= uint32_t{1} << (kBits + i);
    }
    hits[thread] = found;
    PYMM_SYNC();
    for (int i = 0; i < kRowThreads; ++i) {
      if (hits[i] == 0) continue;
      for (int bit = 0; bit < 2 * kBits; ++bit) {
        if ((hits[i] >> bit & 1) != 0) add(first + bit % kBits * kRowThreads + i, Acc(bit < kBits ? -1 : 1));
      }
    }
    PYMM_SYNC();
  }
  const Acc g = *dloss / static_cast<Acc>(*count > 0 ? *count : 1);
  close_row(t, side.rows + row * d, side.inverse[row], d, (1 - 1e-6) / kSmallestNorm, g, out + row * d);
}

}  // namespace pymm::cuda

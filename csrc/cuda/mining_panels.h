// Mining that needs all candidates of an anchor at once ("semi-hard", "all"), a panel of anchors at a time.
//
// A panel holds the cosines of some anchors with every candidate, in a buffer of bounded size; never N x N numbers.
// Parallel: a block per tile of the panel's product, then a block per anchor. An anchor's candidates are sorted,
// positives before negatives, and everything follows from bisections: how often the cosine of a candidate enters the
// loss is its weight W, of a negative with plus and of a positive with minus. The loss is the sum of W s plus the
// margin for every triplet. Backward mines again, with W in the place of the cosines, and adds W y^ to the anchors'
// sums and W^T x^ to the candidates', one panel after the other: nothing is added atomically.
#pragma once

#include "cuda/mining_hard.h"

namespace pymm::cuda {

constexpr int kMineThreads = 256;
// Candidates that are sorted in shared memory, and the size of a panel. Tests make both small, to see what is beyond.
#if !defined(PYMM_SORTED_ON_CHIP)
#define PYMM_SORTED_ON_CHIP 2048
#define PYMM_PANEL_BYTES (int64_t{64} << 20)
#endif
constexpr int kSortedOnChip = PYMM_SORTED_ON_CHIP;
constexpr int64_t kPanelBytes = PYMM_PANEL_BYTES;

// A candidate: a positive `at`, a negative n + `at`, or what is neither, which is sorted last.
template <class Acc>
struct Candidate {
  Acc value;
  int32_t at;
};
constexpr int32_t kNeither = INT32_MAX;

// Positives, negatives, neither; by rising cosine; of equal ones the lowest index last, so that it is the nearest.
template <class Acc>
PYMM_DEVICE bool before(const Candidate<Acc>& a, const Candidate<Acc>& b, int32_t n) {
  const int kind_a = a.at == kNeither ? 2 : a.at >= n, kind_b = b.at == kNeither ? 2 : b.at >= n;
  if (kind_a != kind_b) return kind_a < kind_b;
  return a.value != b.value ? a.value < b.value : a.at > b.at;
}

// Bitonic sort of a power of two of candidates by one block.
template <class Acc>
PYMM_DEVICE void sort(Candidate<Acc>* items, int32_t count, int32_t n) {
  for (int32_t run = 2; run <= count; run *= 2) {
    for (int32_t step = run / 2; step > 0; step /= 2) {
      for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += kMineThreads) {
        const int32_t other = i ^ step;
        if (other < i) continue;
        const Candidate<Acc> low = items[i], high = items[other];
        if ((i & run) == 0 ? before(high, low, n) : before(low, high, n)) {
          items[i] = high;
          items[other] = low;
        }
      }
      PYMM_SYNC();
    }
  }
}

// How many of the sorted candidates fulfil what holds for the first ones only.
template <class Acc, class F>
PYMM_DEVICE int32_t leading(const Candidate<Acc>* items, int32_t count, const F& holds) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (holds(items[middle].value)) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The weights of one anchor's sorted candidates.
template <class Acc>
struct Weights {
  const Candidate<Acc>*positives, *negatives;
  int32_t count_p, count_n;
  Acc margin;

  // "all": the positives whose cosine is below that of the negative plus the margin.
  PYMM_DEVICE int32_t all_negative(int32_t i) const {
    const Acc near = negatives[i].value + margin;
    return leading(positives, count_p, [&](Acc p) { return p < near; });
  }
  PYMM_DEVICE int32_t all_positive(int32_t i) const {
    const Acc p = positives[i].value;
    return leading(negatives, count_n, [&](Acc n) { return !(n + margin > p); }) - count_n;
  }
  // "semi-hard": the positives whose nearest farther negative it is, if it is within the margin.
  PYMM_DEVICE int32_t semi_negative(int32_t i) const {
    const Acc n = negatives[i].value;
    const bool last = i + 1 == count_n;
    const Acc next = last ? n : negatives[i + 1].value;
    if (!last && next == n) return 0;  // an equal one of a lower index is chosen
    const int32_t from = leading(positives, count_p, [&](Acc p) { return p <= n; });
    int32_t to = leading(positives, count_p, [&](Acc p) { return n + margin > p; });
    if (!last) {
      const int32_t others = leading(positives, count_p, [&](Acc p) { return p <= next; });
      to = to < others ? to : others;
    }
    return to > from ? to - from : 0;
  }
  PYMM_DEVICE int32_t semi_positive(int32_t i) const {
    const Acc p = positives[i].value;
    const int32_t farther = leading(negatives, count_n, [&](Acc n) { return n < p; });
    return farther > 0 && negatives[farther - 1].value + margin > p ? -1 : 0;
  }
};

// One block per anchor of the panel, `first` the first of them. With `losses` the loss and the number of triplets of
// each; without, W in the place of the cosines. `scratch`: where candidates that do not fit on chip are sorted.
template <class Acc>
PYMM_GLOBAL void mine_panel_kernel(Acc* panel, const int64_t* labels, bool crossed, int64_t first, int32_t n,
                                   int32_t sorted, double margin, bool semi_hard, Candidate<Acc>* scratch,
                                   double* losses, int64_t* counts) {
  PYMM_SHARED Candidate<Acc> on_chip[kSortedOnChip];
  const int64_t anchor = first + blockIdx.x, label = labels[anchor];
  Acc* s = panel + static_cast<int64_t>(blockIdx.x) * n;
  Candidate<Acc>* items = sorted <= kSortedOnChip ? on_chip : scratch + static_cast<int64_t>(blockIdx.x) * sorted;
  double number[2] = {};
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < sorted; i += kMineThreads) {
    const bool own = i < n && labels[i] == label;
    const bool neither = i >= n || (own && !crossed && i == anchor);
    items[i] = {i < n ? s[i] : Acc(0), neither ? kNeither : own ? i : n + i};
    number[0] += !neither && own;
    number[1] += !neither && !own;
    if (i < n && neither && losses == nullptr) s[i] = 0;
  }
  block_sums<kMineThreads>(number);
  sort(items, sorted, n);
  const int32_t count_p = static_cast<int32_t>(number[0]), count_n = static_cast<int32_t>(number[1]);
  const Weights<Acc> weights{items, items + count_p, count_p, count_n, static_cast<Acc>(margin)};
  double sums[2] = {};  // of W s, and of the triplets
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count_p + count_n; i += kMineThreads) {
    const bool positive = i < count_p;
    int32_t w;
    if (semi_hard) {
      w = positive ? weights.semi_positive(i) : weights.semi_negative(i - count_p);
    } else {
      w = positive ? weights.all_positive(i) : weights.all_negative(i - count_p);
    }
    sums[0] += static_cast<double>(w) * static_cast<double>(items[i].value);
    if (!positive) sums[1] += w;
    if (losses == nullptr) s[positive ? items[i].at : items[i].at - n] = static_cast<Acc>(w);
  }
  if (losses == nullptr) return;
  block_sums<kMineThreads>(sums);
  if (threadIdx.x == 0) {
    losses[anchor] = sums[0] + margin * sums[1];
    counts[anchor] = static_cast<int64_t>(sums[1]);
  }
}

// The anchors of one side, mined among the candidates of the other, which is itself unless `crossed`.
template <class T>
class __attribute__((visibility("hidden"))) Panels {  // as its tensors are
 public:
  using Acc = Accumulator<T>;

  Panels(const Stream& stream, const Tensor& like, const int64_t* labels, bool crossed, int64_t n, int64_t d,
         double margin, bool semi_hard)
      : stream_(stream), labels_(labels), crossed_(crossed), n_(n), d_(d), margin_(margin), semi_hard_(semi_hard) {
    while (sorted_ < n) sorted_ *= 2;
    const bool on_chip = sorted_ <= kSortedOnChip;
    const int64_t row = n * int64_t{sizeof(Acc)} + (on_chip ? 0 : sorted_ * int64_t{sizeof(Candidate<Acc>)});
    rows_ = kPanelBytes / row < 1 ? 1 : kPanelBytes / row < n ? kPanelBytes / row : n;
    panel_ = torch::stable::new_empty(like, std::vector<int64_t>{rows_, n}, accumulator_type(like));
    const int64_t scratch = on_chip ? 0 : rows_ * sorted_ * int64_t{sizeof(Candidate<Acc>)};
    scratch_ = torch::stable::new_empty(like, std::vector<int64_t>{scratch}, ScalarType::Byte);
  }

  void loss(Side<T> anchors, Side<T> candidates, double* losses, int64_t* counts) const {
    for (int64_t first = 0; first < n_; first += rows_) mine(anchors, candidates, first, losses, counts);
  }

  // Adds to the sums (n, d) of both sides, which may be one.
  void gradient(Side<T> anchors, Side<T> candidates, Acc* of_anchors, Acc* of_candidates) const {
    const Acc* no_scale = nullptr;
    for (int64_t first = 0; first < n_; first += rows_) {
      const int64_t rows = mine(anchors, candidates, first, nullptr, nullptr);
      const Product forth{rows, d_, n_, 0, n_, 1, 0, 1, d_, 0, true};
      PYMM_LAUNCH((product_kernel<Acc, T, Acc, Acc>), tiles(rows, d_), dim3(kSide, kSide), stream_, data<Acc>(panel_),
                  candidates.rows, of_anchors + first * d_, no_scale, no_scale, candidates.inverse, forth);
      const Product back{n_, d_, rows, 0, 1, n_, 0, 1, d_, 0, true};
      PYMM_LAUNCH((product_kernel<Acc, T, Acc, Acc>), tiles(n_, d_), dim3(kSide, kSide), stream_, data<Acc>(panel_),
                  anchors.rows + first * d_, of_candidates, no_scale, no_scale, anchors.inverse + first, back);
    }
  }

 private:
  int64_t mine(Side<T> anchors, Side<T> candidates, int64_t first, double* losses, int64_t* counts) const {
    const int64_t rows = n_ - first < rows_ ? n_ - first : rows_;
    const Acc* no_scale = nullptr;
    const Product cosines{rows, n_, d_, 0, d_, 1, 0, d_, 1, 0};
    PYMM_LAUNCH((product_kernel<T, T, Acc, Acc>), tiles(rows, n_), dim3(kSide, kSide), stream_,
                anchors.rows + first * d_, candidates.rows, data<Acc>(panel_), anchors.inverse + first,
                candidates.inverse, no_scale, cosines);
    PYMM_LAUNCH(mine_panel_kernel<Acc>, dim3(static_cast<unsigned>(rows)), dim3(kMineThreads), stream_,
                data<Acc>(panel_), labels_, crossed_, first, static_cast<int32_t>(n_), static_cast<int32_t>(sorted_),
                margin_, semi_hard_, data<Candidate<Acc>>(scratch_), losses, counts);
    return rows;
  }

  const Stream& stream_;
  const int64_t* labels_;
  bool crossed_;
  int64_t n_, d_;
  double margin_;
  bool semi_hard_;
  int64_t sorted_ = 1, rows_;
  Tensor panel_, scratch_;
};

}  // namespace pymm::cuda

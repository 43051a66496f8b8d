// The k largest cosines of every query x_n among the rows of a bank y, without the matrix of similarities.
//
// Parallel: over blocks of queries and stretches of the bank. On chip: a block of queries, packed once, stays in L2
// while the bank streams past it, kColumns rows at a time, packed in the thread that uses them; a tile of products is
// filtered, while it is in cache, against each query's k-th best so far, and only what passes leaves it. Bytes: the
// bank is read once per block of queries; beside it O(N k) candidates. Ragged edges: the filter sees valid
// columns only. Candidates are ordered by value and then by index, a total order, so the result does not depend on how
// the work is split.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/chosen.h"
#include "cpu/product.h"
#include "cpu/simd/select.h"

namespace pymm {
namespace {

constexpr const char* kOp = "cosine_topk";
constexpr int64_t kBlockBytes = 384 << 10;  // of packed queries
constexpr int64_t kTasksPerThread = 4;

template <class Acc>
struct Candidate {
  Acc value;
  int64_t index;
};

// Larger values first, NaN before all, equal ones by index.
template <class Acc>
bool before(const Candidate<Acc>& a, const Candidate<Acc>& b) {
  const bool a_nan = std::isnan(a.value), b_nan = std::isnan(b.value);
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.index < b.index;
}

// The best k of what one query has seen, among up to as many others: these are dropped when they outnumber the k.
template <class Acc>
class Best {
 public:
  explicit Best(int64_t k) : k_(static_cast<size_t>(k)) {}

  // NaN until k candidates are known, so that everything passes; new ones come later and lose to an equal value.
  Acc threshold() const { return threshold_; }

  void add(const Acc* values, const int32_t* columns, int64_t count, int64_t first) {
    for (int64_t i = 0; i < count; ++i) list_.push_back({values[i], first + columns[i]});
    if (list_.size() >= 2 * k_) drop();
  }
  void add(const Best& other) { list_.insert(list_.end(), other.list_.begin(), other.list_.end()); }
  void drop() {
    if (list_.size() < k_) return;
    const auto last = list_.begin() + static_cast<std::ptrdiff_t>(k_ - 1);
    std::nth_element(list_.begin(), last, list_.end(), before<Acc>);
    list_.resize(k_);
    threshold_ = list_.back().value;
  }
  const std::vector<Candidate<Acc>>& sorted() {
    drop();
    std::sort(list_.begin(), list_.end(), before<Acc>);
    return list_;
  }

 private:
  size_t k_;
  Acc threshold_ = std::numeric_limits<Acc>::quiet_NaN();
  std::vector<Candidate<Acc>> list_;
};

// The bank: rows of the queries' type, or of 16 bits that are widened while they are packed.
struct Bank {
  RowsOf y;
  const Gemm& gemm;
  bool widen;

  void pack(int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) const {
    const int64_t bytes = y.row_bytes() / y.d;
    const char* source = static_cast<const char*>(y.row(row)) + k * bytes;
    if (!widen) {
      gemm.pack_b(source, y.d, 1, rows, count, panels);
      return;
    }
    const Rows& rows_of = rows_for(y.dtype);
    Scratch wide(rows * count * static_cast<int64_t>(sizeof(float)));
    for (int64_t r = 0; r < rows; ++r) {
      rows_of.widen(source + r * y.row_bytes(), 1, count, wide.as<float>() + r * count);
    }
    gemm.pack_b(wide.as<float>(), count, 1, rows, count, panels);
  }
};

// One task: queries [first, first + queries) against rows [begin, end) of the bank.
template <class T, class Acc>
void search(const T* x, int64_t d, int64_t queries, const Acc* inv_x, const Bank& bank, int64_t begin, int64_t end,
            Best<Acc>* best) {
  const Select<Acc>& select = select_for<Acc>();
  const Rows& bank_rows = rows_for(bank.y.dtype);
  std::vector<PackedA> packed;
  for (int64_t row = 0; row < queries; row += kRows) {
    packed.emplace_back(bank.gemm, d);
    packed.back().fill(row, min_of(kRows, queries - row), matrix(x, d, 1));
  }
  Scratch tile(kRows * kColumns * static_cast<int64_t>(sizeof(Acc)));
  alignas(64) Acc inv_y[kColumns], values[kColumns];
  int32_t columns[kColumns];
  for (int64_t column = begin; column < end; column += kColumns) {
    const int64_t count = min_of(kColumns, end - column);
    bank_rows.inverse_norms(bank.y.row(column), d, count, d, kSmallestNorm, inv_y);
    const PackedB block(bank.gemm, count, d, [&](int64_t row, int64_t rows, int64_t k, int64_t depth, void* panels) {
      bank.pack(column + row, rows, k, depth, panels);
    });
    for (int64_t row = 0; row < queries; row += kRows) {
      packed[static_cast<size_t>(row / kRows)].multiply(block, 0, tile.as<Acc>(), kColumns);
      for (int64_t q = row; q < min_of(row + kRows, queries); ++q) {
        const Acc* products = tile.as<Acc>() + (q - row) * kColumns;
        const int64_t found = select.above(products, inv_x[q], inv_y, count, best[q].threshold(), values, columns);
        if (found > 0) best[q].add(values, columns, found, column);
      }
    }
  }
}

template <class T>
void run(const Tensor& x, const Tensor& y, int64_t k, Tensor& values, Tensor& indices) {
  using Acc = Accumulator<T>;
  const int64_t n = x.size(0), m = y.size(0), d = x.size(1);
  const DType bank_type = pymm::dtype_of(y, kOp);
  const bool widen = bank_type != pymm::dtype_of<T>();
  const Bank bank{{data<char>(y), bank_type, m, d}, gemm_for(pymm::dtype_of<T>()), widen};
  Scratch norms(n * static_cast<int64_t>(sizeof(Acc)));
  Acc* inv_x = norms.as<Acc>();
  parallel_ranges(n, 64, [&](int64_t begin, int64_t end) {
    rows_for(pymm::dtype_of<T>())
        .inverse_norms(data<T>(x) + begin * d, d, end - begin, d, kSmallestNorm, inv_x + begin);
  });

  const int64_t per_block = kRows * max_of(1, kBlockBytes / bank.gemm.a_bytes(kRows, max_of(1, d)));
  const int64_t blocks = ceil_div(n, per_block), bank_blocks = ceil_div(m, kColumns);
  const int64_t groups = min_of(bank_blocks, ceil_div(kTasksPerThread * thread_count(), blocks));
  std::vector<Best<Acc>> best(static_cast<size_t>(n * groups), Best<Acc>(k));  // [groups][n]
  parallel_tasks(blocks * groups, [&](int64_t task) {
    const int64_t group = task % groups, first = task / groups * per_block;
    const int64_t begin = bank_blocks * group / groups * kColumns;
    const int64_t end = min_of(m, bank_blocks * (group + 1) / groups * kColumns);
    search<T, Acc>(data<T>(x) + first * d, d, min_of(per_block, n - first), inv_x + first, bank, begin, end,
                   best.data() + group * n + first);
  });
  parallel_ranges(n, 16, [&](int64_t begin, int64_t end) {
    const Rows& rows_of = rows_for(pymm::dtype_of<T>());
    std::vector<Acc> row(static_cast<size_t>(k));
    for (int64_t q = begin; q < end; ++q) {
      Best<Acc>& all = best[static_cast<size_t>(q)];
      for (int64_t g = 1; g < groups; ++g) all.add(best[static_cast<size_t>(g * n + q)]);
      const auto& list = all.sorted();
      for (int64_t i = 0; i < k; ++i) {
        row[static_cast<size_t>(i)] = list[static_cast<size_t>(i)].value;
        data<int64_t>(indices)[q * k + i] = list[static_cast<size_t>(i)].index;
      }
      rows_of.narrow(row.data(), 1, k, data<T>(values) + q * k);
    }
  });
}

void check(const Tensor& x, const Tensor& y) {
  PYMM_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), kOp, ": x must be (N, D) and y (M, D)");
  const DType query = pymm::dtype_of(x, kOp), bank = pymm::dtype_of(y, kOp);
  PYMM_CHECK(bank == query || (query == DType::f32 && bank != DType::f64), kOp,
             ": y must be of x's type, or of 16 bits for a float32 x");
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Tensor& y_in, int64_t k) {
  const Tensor x = dense(x_in), y = dense(y_in);
  check(x, y);
  const int64_t n = x.size(0), m = y.size(0), d = x.size(1);
  PYMM_CHECK(k >= 1 && k <= m, kOp, ": k must be from 1 to M");
  Tensor values = empty({n, k}, x), indices = empty({n, k}, x, ScalarType::Long);
  if (n == 0) return {values, indices};
  if (d == 0) {  // every similarity is 0
    torch::stable::zero_(values);
    for (int64_t i = 0; i < n * k; ++i) data<int64_t>(indices)[i] = i % k;
    return {values, indices};
  }
  dispatch(pymm::dtype_of(x, kOp), [&]<class T>() { run<T>(x, y, k, values, indices); });
  return {values, indices};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dvalues_in, const Tensor& x_in, const Tensor& y_in,
                                    const Tensor& indices_in, bool need_dy) {
  const Tensor dvalues = dense(dvalues_in), x = dense(x_in), y = dense(y_in), indices = dense(indices_in);
  check(x, y);
  PYMM_CHECK(indices.dim() == 2 && indices.size(0) == x.size(0) && indices.scalar_type() == ScalarType::Long &&
                 dvalues.numel() == indices.numel() && dvalues.scalar_type() == x.scalar_type(),
             kOp, ": dvalues and indices must be (N, k)");
  const int64_t n = x.size(0), m = y.size(0), k = indices.size(1);
  Tensor dx = torch::stable::empty_like(x), dy = need_dy ? torch::stable::empty_like(y) : empty({0}, y);
  const DType dtype = pymm::dtype_of(x, kOp);
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    std::vector<Pair> pairs(static_cast<size_t>(n * k));
    std::vector<Acc> row(static_cast<size_t>(k));
    for (int64_t i = 0; i < n; ++i) {
      rows_for(dtype).widen(data<T>(dvalues) + i * k, 1, k, row.data());
      for (int64_t j = 0; j < k; ++j) {
        const int64_t chosen = data<int64_t>(indices)[i * k + j];
        PYMM_CHECK(chosen >= 0 && chosen < m, kOp, ": an index is out of range");
        pairs[static_cast<size_t>(i * k + j)] = {i, chosen, static_cast<double>(row[static_cast<size_t>(j)])};
      }
    }
    const RowsOf queries{data<T>(x), dtype, n, x.size(1)};
    const RowsOf bank{data<char>(y), pymm::dtype_of(y, kOp), m, y.size(1)};
    chosen_gradient<Acc>(Groups(pairs, n), queries, bank, data<T>(dx));
    if (!need_dy) return;
    for (Pair& pair : pairs) std::swap(pair.row, pair.other);
    chosen_gradient<Acc>(Groups(pairs, m), bank, queries, data<char>(dy));
  });
  return {dx, dy};
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("cosine_topk", TORCH_BOX(&pymm::forward));
  m.impl("cosine_topk_backward", TORCH_BOX(&pymm::backward));
}

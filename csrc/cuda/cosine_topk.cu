// The k largest cosines of every query x_n among the rows of a bank y, without the matrix of similarities.
//
// Parallel: one block per tile of queries and part of the bank, then one warp per query joins the parts. On chip: a
// tile of similarities (warp_tile.h: bf16 and f16 on tensor cores, float32 with any bank and float64 on float units,
// in their own precision), the norms in its epilogue, which each warp filters against the k-th best of its queries;
// the best so far too, where k is small (best_keys.h). Bytes: the bank once per tile of queries, of which L2 serves the
// neighbours; k keys per query and part. Ragged edges: rows beyond the end have the smallest key. Any k works, but
// one warp sorts what a query keeps, which is made for up to some hundreds.
//
// Similarities do not depend on the parts, and keys have one order: the result does not depend on the parts either.
//
// Backward is a gather and a scatter of the chosen rows, which the reference does.
#include "cuda/best_keys.h"
#include "cuda/rows.h"
#include "cuda/warp_tile.h"

namespace pymm::cuda {
namespace {

constexpr const char* kOp = "cosine_topk";
constexpr int kWarps = kTileThreads / kWarp;
constexpr int64_t kMostNeighbours = int64_t{1} << 29;  // twice as many keys are counted in 32 bits

// Blocks that fill a GPU, and at most so many bytes of lists that do not fit on chip, if those of one tile of queries
// do not need more. The emulation's are so small that tests see parts of several tiles, and queries in several goes.
#if defined(__CUDACC__)
constexpr int64_t kBlocks = 512, kListBytes = 256 << 20;
#else
constexpr int64_t kBlocks = 3, kListBytes = 64 << 10;
#endif

// T of the queries, B of the bank. A double takes two registers.
template <class T, class B>
using TopTile = std::conditional_t<std::is_same_v<T, double>, Tile<T, 1, 2, B>, Tile<T, 2, 4, B>>;

// The product's slabs make room for its similarities. Eight spare columns: rows that one warp writes hit other banks.
template <class Sums>
constexpr int kPitch = Sums::kColumns + 8;
template <class Sums>
constexpr int kOrderBytes = Sums::kRows * kPitch<Sums> * static_cast<int>(sizeof(typename Sums::Acc));
template <class Sums>
constexpr int kWorkBytes = Sums::kBytes > kOrderBytes<Sums> ? Sums::kBytes : kOrderBytes<Sums>;

// `parts` (n, parts, k): what each part of the bank has of the best of each query, from the best on. `lists` (n, parts,
// 2 size), or null where they are on chip.
template <class T, class B>
PYMM_GLOBAL PYMM_LAUNCH_BOUNDS(kTileThreads, kBlocksAtOnce<T>) void part_kernel(Operand<T> x, Operand<B> y, int64_t d,
                                                                                const Accumulator<T>* inv_x,
                                                                                const Accumulator<T>* inv_y, int k,
                                                                                int size, Key<Accumulator<T>>* lists,
                                                                                Key<Accumulator<T>>* parts) {
  using Acc = Accumulator<T>;
  using Sums = TopTile<T, B>;
  PYMM_DYNAMIC_SHARED(shared);
  PYMM_SHARED Order<Acc> worst[Sums::kRows];
  PYMM_SHARED int waiting[Sums::kRows];
  Order<Acc>* const orders = reinterpret_cast<Order<Acc>*>(shared);
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * Sums::kRows, part = blockIdx.y, count = gridDim.y;
  const int rows = x.rows - first < Sums::kRows ? static_cast<int>(x.rows - first) : Sums::kRows;
  const int64_t tiles = ceil_div(y.rows, Sums::kColumns), end = tiles * (part + 1) / count;
  const auto best_of = [&](int row) {
    Key<Acc>* const keys = lists != nullptr
                               ? lists + ((first + row) * count + part) * 2 * size
                               : reinterpret_cast<Key<Acc>*>(shared + kWorkBytes<Sums>) + int64_t{row} * 2 * size;
    return Best<Acc>{keys, size, k};
  };

  for (int row = warp; row < rows; row += kWarps) {
    best_of(row).clear();
    if (lane == 0) worst[row] = kNoOrder<Acc>, waiting[row] = 0;
  }
  Acc of_row[Sums::MI][2];
  PYMM_UNROLL
  for (int i = 0; i < Sums::MI * 2; ++i) {
    const int row = Sums::row(i / 2, i % 2);
    of_row[i / 2][i % 2] = row < rows ? inv_x[first + row] : Acc(0);
  }

  Sums tile;
  for (int64_t at = tiles * part / count; at < end; ++at) {
    const int64_t column = at * Sums::kColumns;
    tile.multiply(x, first, y, column, d, shared);
    Acc of_column[Sums::NI][2];
    PYMM_UNROLL
    for (int i = 0; i < Sums::NI * 2; ++i) {
      const int64_t c = column + Sums::column(i / 2, i % 2);
      of_column[i / 2][i % 2] = c < y.rows ? inv_y[c] : Acc(0);
    }
    tile.each([&](int m, int n, int half, int j, Acc& sum) {
      const int c = Sums::column(n, j);
      orders[Sums::row(m, half) * kPitch<Sums> + c] =
          column + c < y.rows ? order_of(sum * of_row[m][half] * of_column[n][j]) : kNoOrder<Acc>;
    });
    PYMM_SYNC();
    for (int row = warp; row < rows; row += kWarps) {
      const Order<Acc>* const of_query = orders + row * kPitch<Sums>;
      Best<Acc> best = best_of(row);
      best.worst = worst[row], best.waiting = waiting[row];
      bool any = false;
      PYMM_UNROLL
      for (int c = 0; c < Sums::kColumns; c += kWarp) any = any || of_query[c + lane] > best.worst;
      if (ballot(any) == 0) continue;
      PYMM_UNROLL_BY(1)
      for (int c = 0; c < Sums::kColumns; c += kWarp) {
        best.offer(of_query[c + lane], static_cast<int32_t>(column + c + lane));
      }
      if (lane == 0) worst[row] = best.worst, waiting[row] = best.waiting;
      PYMM_SYNC_WARP();
    }
    PYMM_SYNC();
  }

  for (int row = warp; row < rows; row += kWarps) {
    Best<Acc> best = best_of(row);
    best.waiting = waiting[row];
    best.join();
    Key<Acc>* const to = parts + ((first + row) * count + part) * k;
    for (int i = lane; i < k; i += kWarp) to[i] = best.keys[i];
  }
}

// The best of all parts, one warp per query. Where lists are not on chip each query takes its first.
template <class T>
PYMM_GLOBAL PYMM_LAUNCH_BOUNDS(kTileThreads) void join_parts_kernel(const Key<Accumulator<T>>* parts, int64_t n,
                                                                    int64_t count, int k, int size,
                                                                    Key<Accumulator<T>>* lists, T* values,
                                                                    int64_t* indices) {
  using Acc = Accumulator<T>;
  PYMM_DYNAMIC_SHARED(shared);
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t query = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (query >= n) return;
  Best<Acc> best{lists != nullptr ? lists + query * count * 2 * size
                                  : reinterpret_cast<Key<Acc>*>(shared) + int64_t{warp} * 2 * size,
                 size, k};
  best.clear();
  for (int64_t part = 0; part < count; ++part) {
    const Key<Acc>* const from = parts + (query * count + part) * k;
    for (int i = 0; i < k; i += kWarp) {
      const Key<Acc> key = i + lane < k ? from[i + lane] : Key<Acc>{kNoOrder<Acc>, 0};
      if (!best.offer(key.order, key.at)) break;  // and none of this part that follows
    }
  }
  best.join();
  for (int i = lane; i < k; i += kWarp) {
    values[query * k + i] = from_float(value_of<Acc>(best.keys[i].order), T{});
    indices[query * k + i] = best.keys[i].at;
  }
}

template <class T, class B>
void search(const Stream& stream, const Tensor& x, const Tensor& y, int64_t k, Tensor& values, Tensor& indices) {
  using Acc = Accumulator<T>;
  using Sums = TopTile<T, B>;
  constexpr int64_t kKey = sizeof(Key<Acc>);
  static_assert(kWorkBytes<Sums> % 16 == 0);
  const int64_t n = x.size(0), m = y.size(0), d = x.size(1);
  Tensor inv_x = torch::stable::new_empty(x, std::vector<int64_t>{n}, accumulator_type(x));
  Tensor inv_y = torch::stable::new_empty(x, std::vector<int64_t>{m}, accumulator_type(x));
  inverse_norms<T>(stream, x, d, kSmallestNorm, inv_x);
  inverse_norms<B>(stream, y, d, kSmallestNorm, inv_y);

  int64_t size = kWarp;
  while (size < k) size *= 2;
  const int64_t list = 2 * size * kKey, tiles = ceil_div(m, Sums::kColumns);
  const bool on_chip = kWorkBytes<Sums> + Sums::kRows * list <= kMostShared;
  const int64_t affordable = on_chip ? INT64_MAX : kListBytes / list;
  const auto clamp = [](int64_t value, int64_t high) { return value < 1 ? 1 : value < high ? value : high; };
  const int64_t rows = n < Sums::kRows ? n : clamp(affordable / Sums::kRows, ceil_div(n, Sums::kRows)) * Sums::kRows;
  const int64_t count = clamp(affordable / rows, clamp(kBlocks / ceil_div(rows, Sums::kRows), tiles));
  const auto bytes = [&](int64_t number) {
    return torch::stable::new_empty(x, std::vector<int64_t>{number}, ScalarType::Byte);
  };
  const Tensor parts = bytes(rows * count * k * kKey), beside = bytes(on_chip ? 0 : rows * count * list);
  Key<Acc>* const lists = on_chip ? nullptr : data<Key<Acc>>(beside);
  const int kept = static_cast<int>(k), room = static_cast<int>(size);
  for (int64_t first = 0; first < n; first += rows) {
    const int64_t queries = n - first < rows ? n - first : rows;
    const dim3 grid(static_cast<unsigned>(ceil_div(queries, Sums::kRows)), static_cast<unsigned>(count));
    const Operand<T> of_x{data<T>(x) + first * d, queries, d};
    const Operand<B> of_y{data<B>(y), m, d};
    PYMM_LAUNCH_SHARED((part_kernel<T, B>), grid, dim3(kTileThreads),
                       kWorkBytes<Sums> + (on_chip ? Sums::kRows * list : 0), stream, of_x, of_y, d,
                       data<Acc>(inv_x) + first, data<Acc>(inv_y), kept, room, lists, data<Key<Acc>>(parts));
    PYMM_LAUNCH_SHARED(join_parts_kernel<T>, dim3(static_cast<unsigned>(ceil_div(queries, kWarps))), dim3(kTileThreads),
                       on_chip ? kWarps * list : 0, stream, data<Key<Acc>>(parts), queries, count, kept, room, lists,
                       data<T>(values) + first * k, data<int64_t>(indices) + first * k);
  }
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Tensor& y_in, int64_t k) {
  const Tensor x = dense(x_in), y = dense(y_in);
  const ScalarType of_x = x.scalar_type(), of_y = y.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1), kOp, ": x must be (N, D) and y (M, D)");
  STD_TORCH_CHECK(of_x == of_y || (of_x == ScalarType::Float && of_y != ScalarType::Double), kOp,
                  ": y must be of x's type, or of 16 bits for a float32 x");
  STD_TORCH_CHECK(k >= 1 && k <= y.size(0), kOp, ": k must be from 1 to M");
  STD_TORCH_CHECK(y.size(0) <= INT32_MAX && k <= kMostNeighbours, kOp, ": the CUDA kernel finds at most ",
                  kMostNeighbours, " neighbours among ", INT32_MAX, " rows, not ", k, " among ", y.size(0));
  Tensor values = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), k}, of_x);
  Tensor indices = torch::stable::new_empty(x, std::vector<int64_t>{x.size(0), k}, ScalarType::Long);
  if (values.numel() == 0) return {values, indices};
  const Stream stream(x);
  dispatch(x, kOp, [&]<class T>() {
    if constexpr (std::is_same_v<T, float>) {
      dispatch(y, kOp, [&]<class B>() {
        if constexpr (!std::is_same_v<B, double>) search<T, B>(stream, x, y, k, values, indices);
      });
    } else {
      search<T, T>(stream, x, y, k, values, indices);
    }
  });
  return {values, indices};
}

}  // namespace
}  // namespace pymm::cuda

STABLE_TORCH_LIBRARY_IMPL(pymm_cuda, PYMM_DISPATCH_KEY, m) { m.impl("cosine_topk", TORCH_BOX(&pymm::cuda::forward)); }

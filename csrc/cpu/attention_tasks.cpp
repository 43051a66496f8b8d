// The tasks of attention, see attention.h.
#include <atomic>

#include "cpu/attention.h"

namespace pymm {
namespace {

constexpr int64_t kFewestRows = 128, kMostRows = 2048;  // of a forward task
constexpr int64_t kDecodedRows = 16;                    // of a problem whose columns are shared out, not its rows
constexpr int64_t kDecodedColumns = 512;                // of a part of it at least
constexpr int64_t kMostParts = 64;
constexpr int64_t kColumnStep = 64;  // dropout draws 64 columns at a time
constexpr int64_t kLeastTasks = 8;   // so that up to four threads share work, and bits, alike

// f(task, scratch) for every task, the next one to whoever is free.
template <class F>
void run_tasks(int64_t tasks, int64_t scratch_bytes, F&& f) {
  std::atomic<int64_t> next{0};
  parallel_ranges(min_of(tasks, thread_count()), 1, [&](int64_t, int64_t) {
    const Scratch scratch(scratch_bytes);
    for (int64_t task = next++; task < tasks; task = next++) f(task, scratch.as<void>());
  });
}

struct Range {
  int64_t problem, first, count;
};

// A task of the forward pass: a range of a problem's rows, or, where it has few, of its columns into part `part`.
struct ForwardTask {
  Range range;
  int64_t part = -1;
};

}  // namespace

Tensor last_dense(const Tensor& t) {
  return t.size(t.dim() - 1) < 2 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t);
}

int64_t causal_offset(int64_t causal, int64_t rows, int64_t columns) { return causal == 2 ? columns - rows : 0; }

AttentionCall attention_call(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& seed,
                             double dropout_p, double scale, int64_t causal, int64_t head_dim, const char* op) {
  PYMM_CHECK(k.dim() == q.dim() && v.dim() == q.dim(), op, ": q, k and v must have the same number of dimensions");
  PYMM_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op,
             ": q, k and v must have one type");
  const int64_t last = q.dim() - 1, heads = q.size(head_dim), groups = k.size(head_dim);
  PYMM_CHECK(k.size(last) == q.size(last), op, ": q and k must have one width");
  for (int64_t i = 0; i < last; ++i) PYMM_CHECK(v.size(i) == k.size(i), op, ": k and v must have the same keys");
  PYMM_CHECK(groups == heads || (groups > 0 && heads % groups == 0), op,
             ": the heads of q must be a multiple of those of k");
  PYMM_CHECK(dropout_p >= 0 && dropout_p <= 1, op, ": dropout_p must be in [0, 1]");
  PYMM_CHECK(seed.has_value() || dropout_p == 0, op, ": dropout needs a seed");
  AttentionCall call{q.size(last), v.size(last), groups ? heads / groups : 0, scale, causal != 0, 0, 0};
  if (seed.has_value()) {
    PYMM_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 1, op, ": seed must be one int64");
    call.dropout_p = dropout_p;
    call.seed = static_cast<uint64_t>(*data<int64_t>(*seed));
  }
  return call;
}

void attention_forward(const AttentionProblems& problems, const std::function<AttentionForward(int64_t)>& target) {
  const AttentionCall& call = problems.call;
  const auto& by_rows = kernels_for(attention_forward_table(), problems.dtype, call);
  const auto& by_columns = attention_decode_table().for_dtype[static_cast<int>(problems.dtype)];
  const int64_t wanted = problems.count ? ceil_div(4 * thread_count(), problems.count) : 1;
  std::vector<ForwardTask> tasks;
  std::vector<int64_t> first_part(problems.count), parts_of(problems.count);
  int64_t bytes = 0, part_bytes = 0, parts = 0;
  for (int64_t i = 0; i < problems.count; ++i) {
    const AttentionHead head = problems.head(i);
    const int64_t rows = call.heads * head.rows;
    if (rows > kDecodedRows) {
      const int64_t step = min_of(kMostRows, max_of(kFewestRows, round_up(ceil_div(rows, wanted), 64)));
      for (int64_t first = 0; first < rows; first += step) tasks.push_back({{i, first, min_of(step, rows - first)}});
      bytes = max_of(bytes, by_rows.bytes(call, head, min_of(step, rows)));
    } else if (rows > 0) {
      const int64_t step = max_of(kDecodedColumns, round_up(ceil_div(head.columns, kMostParts), kColumnStep));
      first_part[i] = parts;
      parts_of[i] = max_of(1, ceil_div(head.columns, step));
      for (int64_t part = 0; part < parts_of[i]; ++part) {
        tasks.push_back({{i, part * step, min_of(step, head.columns - part * step)}, parts++});
      }
      bytes = max_of(bytes, by_columns.bytes(call, head));
      part_bytes = max_of(part_bytes, by_columns.part_bytes(call, head));
    }
  }
  const Scratch results(parts * part_bytes);
  std::vector<std::atomic<int64_t>> done(problems.count);
  run_tasks(static_cast<int64_t>(tasks.size()), bytes, [&](int64_t task, void* scratch) {
    const auto& [range, part] = tasks[task];
    const int64_t problem = range.problem;
    const AttentionHead head = problems.head(problem);
    if (part < 0) {
      by_rows.run(call, head, target(problem), range.first, range.count, scratch);
      return;
    }
    by_columns.run(call, head, range.first, range.count, results.as<void>(part * part_bytes), scratch);
    // Whoever computes the last part of a problem joins all of them, in their order.
    if (++done[problem] < parts_of[problem]) return;
    by_columns.join(call, head, target(problem), results.as<void>(first_part[problem] * part_bytes), part_bytes,
                    parts_of[problem]);
  });
}

void attention_backward(const AttentionProblems& problems, const std::function<AttentionBackward(int64_t)>& target,
                        const MaskGradientTasks& mask) {
  const AttentionCall& call = problems.call;
  const auto& kernels = kernels_for(attention_backward_table(), problems.dtype, call);
  const int64_t owners = mask.owners.empty() ? problems.count : static_cast<int64_t>(mask.owners.size());
  if (problems.count == 0) return;

  const int64_t least = max_of(kLeastTasks, 2 * thread_count());
  const int64_t wanted = owners >= least ? 1 : ceil_div(least, owners);
  int64_t columns = 0, rows = 0, bytes = 0;
  std::vector<int64_t> first_row(problems.count);  // of each problem among the rows of all
  for (int64_t i = 0; i < problems.count; ++i) {
    const AttentionHead head = problems.head(i);
    columns = max_of(columns, head.columns);
    first_row[i] = rows;
    rows += call.heads * head.rows;
  }
  const int64_t step = max_of(kColumnStep, round_up(ceil_div(columns, wanted), kColumnStep));
  const int64_t ranges = max_of(1, ceil_div(columns, step));
  for (int64_t i = 0; i < problems.count; ++i) {
    const AttentionHead head = problems.head(i);
    bytes = max_of(bytes, kernels.bytes(call, head, min_of(step, head.columns)));
  }

  const int64_t acc_bytes = problems.dtype == DType::f64 ? 8 : 4;
  const int64_t part_elements = rows * call.d;
  const Scratch parts(ranges > 1 ? ranges * part_elements * acc_bytes : 0);
  if (mask.prepare) mask.prepare(ranges);
  run_tasks(owners * ranges, bytes, [&](int64_t task, void* scratch) {
    const int64_t owner = task / ranges, range = task % ranges, first = range * step;
    const int64_t count = mask.owners.empty() ? 1 : static_cast<int64_t>(mask.owners[owner].size());
    for (int64_t n = 0; n < count; ++n) {
      const int64_t problem = mask.owners.empty() ? owner : mask.owners[owner][n];
      const AttentionHead head = problems.head(problem);
      if (range > 0 && first >= head.columns) continue;
      AttentionBackward with = target(problem);
      if (mask.place) mask.place(problem, range, with);
      if (ranges > 1) {
        with.dq_partial = parts.as<char>((range * part_elements + first_row[problem] * call.d) * acc_bytes);
      }
      kernels.run(call, head, with, first, min_of(step, head.columns - first), scratch);
    }
  });
  if (ranges == 1) return;
  parallel_tasks(problems.count, [&](int64_t problem) {
    const AttentionHead head = problems.head(problem);
    const AttentionBackward with = target(problem);
    const int64_t seen = max_of(1, ceil_div(head.columns, step));
    for (int64_t h = 0; h < call.heads; ++h) {
      for (int64_t t = 0; t < head.rows; ++t) {
        const int64_t row = first_row[problem] + h * head.rows + t;
        char* to = with.dq.at<char>(0, 0);
        const int64_t element = problems.dtype == DType::f64 ? 8 : problems.dtype == DType::f32 ? 4 : 2;
        kernels.join(parts.as<char>(row * call.d * acc_bytes), seen, part_elements, call.scale, call.d,
                     to + (h * with.dq.head_stride + t * with.dq.row_stride) * element);
      }
    }
  });
}

}  // namespace pymm

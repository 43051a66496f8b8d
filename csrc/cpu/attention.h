// What attention and attention_varlen share: how a call's problems, one per key head, become tasks.
//
// Forward: a task is a range of the rows of one problem, or of its columns where it has few rows (decoding); then the
// parts are joined in their order, and ranges depend on nothing but the shapes. Backward: a task is a range of the
// columns of one problem, or of several that add to one mask gradient; so nothing is added to by two threads. Where
// tasks see only some of the columns, their parts of dq are kept apart and joined in a fixed order. Ranges depend on
// the number of threads only when there are fewer problems than twice the threads.
#pragma once

#include <functional>
#include <vector>

#include "cpu/host.h"
#include "cpu/simd/attention.h"

namespace pymm {

// Problems of a call, numbered from 0.
struct AttentionProblems {
  AttentionCall call;
  DType dtype;
  int64_t count;
  std::function<AttentionHead(int64_t)> head;
};

// Widths, types and dropout's seed; q, k and v have (.., heads, .., width) with heads at `head_dim`.
AttentionCall attention_call(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& seed,
                             double dropout_p, double scale, int64_t causal, int64_t head_dim, const char* op);

// Column t + offset is the last one that row t sees.
int64_t causal_offset(int64_t causal, int64_t rows, int64_t columns);

// The tensor itself where its last dimension is dense.
Tensor last_dense(const Tensor& t);

void attention_forward(const AttentionProblems& problems, const std::function<AttentionForward(int64_t)>& target);

// The gradient of a float mask: where each problem's part is added, and which problems share it.
struct MaskGradientTasks {
  // owners[o]: the problems that add to one part of the gradient, in order. Empty: each problem for itself.
  std::vector<std::vector<int64_t>> owners;
  // Sets mask_gradient and its strides for a problem and the range of columns number `range` (of `ranges`).
  std::function<void(int64_t problem, int64_t range, AttentionBackward&)> place;
  // Called once the number of ranges is known.
  std::function<void(int64_t ranges)> prepare;
};

void attention_backward(const AttentionProblems& problems, const std::function<AttentionBackward(int64_t)>& target,
                        const MaskGradientTasks& mask);

}  // namespace pymm

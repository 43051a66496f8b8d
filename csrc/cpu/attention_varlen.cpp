// Softmax attention within sequences that are stored one after the other, (total, H, D), forward and backward. Each
// sequence and key head is a problem of its own; tasks as attention.h has them.
#include "cpu/attention.h"

namespace pymm {
namespace {

constexpr const char* kOp = "attention_varlen";

HeadView view(const Tensor& t, int64_t row, int64_t head) {
  const int64_t offset = (row * t.stride(0) + head * t.stride(1)) * static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(t.data_ptr()) + offset, t.stride(1), t.stride(0)};
}

std::vector<int64_t> offsets_of(const Tensor& offsets_in, int64_t total, const char* name) {
  PYMM_CHECK(offsets_in.dim() == 1 && offsets_in.size(0) >= 1 && offsets_in.scalar_type() == ScalarType::Long, kOp,
             ": ", name, " must be int64 (N + 1,)");
  const Tensor offsets = dense(offsets_in);
  const std::vector<int64_t> values(data<int64_t>(offsets), data<int64_t>(offsets) + offsets.numel());
  bool fits = values.front() == 0 && values.back() == total;
  for (size_t i = 1; i < values.size(); ++i) fits = fits && values[i] >= values[i - 1];
  PYMM_CHECK(fits, kOp, ": ", name, " must be 0 first, ", total, " last and never falling");
  return values;
}

struct Sequences {
  std::vector<int64_t> q, k;
  AttentionProblems problems;
  int64_t groups, heads;  // of a group

  int64_t row_of(int64_t problem) const { return q[problem / groups]; }
  int64_t column_of(int64_t problem) const { return k[problem / groups]; }
  int64_t head_of(int64_t problem) const { return problem % groups * heads; }
};

Sequences sequences_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q, const Tensor& cu_k,
                       const std::optional<Tensor>& seed, double dropout_p, double scale, int64_t causal) {
  PYMM_CHECK(q.dim() == 3, kOp, ": q, k and v must have three dimensions");
  Sequences s{
      offsets_of(cu_q, q.size(0), "cu_seqlens_q"), offsets_of(cu_k, k.size(0), "cu_seqlens_k"), {}, k.size(1), 0};
  PYMM_CHECK(s.q.size() == s.k.size(), kOp, ": cu_seqlens_q and cu_seqlens_k must have one length");
  const AttentionCall call = attention_call(q, k, v, seed, dropout_p, scale, causal, 1, kOp);
  s.heads = call.heads;
  const int64_t groups = s.groups, heads = s.heads;
  s.problems = {call, dtype_of(q, kOp), static_cast<int64_t>(s.q.size() - 1) * groups,
                [=, starts_q = s.q, starts_k = s.k](int64_t problem) {
                  const int64_t n = problem / groups, group = problem % groups;
                  AttentionHead head{};
                  head.rows = starts_q[n + 1] - starts_q[n];
                  head.columns = starts_k[n + 1] - starts_k[n];
                  head.causal_offset = causal_offset(causal, head.rows, head.columns);
                  head.first_head = problem * heads;
                  head.q = view(q, starts_q[n], group * heads);
                  head.k = view(k, starts_k[n], group);
                  head.v = view(v, starts_k[n], group);
                  return head;
                }};
  return s;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cu_q,
                                   const Tensor& cu_k, std::optional<Tensor> seed, double dropout_p, double scale,
                                   int64_t causal) {
  const Tensor q = last_dense(q_in), k = last_dense(k_in), v = last_dense(v_in);
  const Sequences s = sequences_of(q, k, v, cu_q, cu_k, seed, dropout_p, scale, causal);
  const int64_t total = q.size(0), heads = q.size(1);
  Tensor out = empty({total, heads, v.size(2)}, q);
  Tensor lse = empty({heads, total}, q, accumulator_type(s.problems.dtype));
  attention_forward(s.problems, [&](int64_t problem) {
    void* at = static_cast<char*>(lse.data_ptr()) +
               (s.head_of(problem) * total + s.row_of(problem)) * static_cast<int64_t>(lse.element_size());
    return AttentionForward{view(out, s.row_of(problem), s.head_of(problem)), at, total};
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout_in, std::optional<Tensor> dlse_in, const Tensor& q_in,
                                            const Tensor& k_in, const Tensor& v_in, const Tensor& out_in,
                                            const Tensor& lse_in, const Tensor& cu_q, const Tensor& cu_k,
                                            std::optional<Tensor> seed, double dropout_p, double scale,
                                            int64_t causal) {
  const Tensor q = last_dense(q_in), k = last_dense(k_in), v = last_dense(v_in);
  const Tensor dout = last_dense(dout_in), out = last_dense(out_in), lse = dense(lse_in);
  const std::optional<Tensor> dlse = dlse_in.has_value() ? std::optional(dense(*dlse_in)) : std::nullopt;
  const Sequences s = sequences_of(q, k, v, cu_q, cu_k, seed, dropout_p, scale, causal);
  const int64_t total = q.size(0), heads = q.size(1);
  const ScalarType acc_type = accumulator_type(s.problems.dtype);
  for (const Tensor* t : {&dout, &out}) {
    PYMM_CHECK(t->dim() == 3 && t->size(0) == total && t->size(1) == heads && t->size(2) == v.size(2) &&
                   t->scalar_type() == q.scalar_type(),
               kOp, ": out and dout must be (total_q, H, Dv) of q's type");
  }
  PYMM_CHECK(lse.numel() == heads * total && lse.scalar_type() == acc_type, kOp, ": lse must be (H, total_q)");
  PYMM_CHECK(!dlse || (dlse->numel() == lse.numel() && dlse->scalar_type() == acc_type), kOp, ": dlse must be as lse");
  Tensor dq = empty({total, heads, q.size(2)}, q);
  Tensor dk = empty({k.size(0), k.size(1), k.size(2)}, k);
  Tensor dv = empty({v.size(0), v.size(1), v.size(2)}, v);
  const auto target = [&](int64_t problem) {
    const int64_t row = s.row_of(problem), head = s.head_of(problem);
    const int64_t column = s.column_of(problem), group = problem % s.groups;
    const int64_t at = (head * total + row) * static_cast<int64_t>(lse.element_size());
    AttentionBackward with{};
    with.dout = view(dout, row, head);
    with.out = view(out, row, head);
    with.dq = view(dq, row, head);
    with.dk = view(dk, column, group);
    with.dv = view(dv, column, group);
    with.lse = static_cast<const char*>(lse.data_ptr()) + at;
    with.dlse = dlse ? static_cast<const char*>(dlse->data_ptr()) + at : nullptr;
    with.lse_stride = total;
    return with;
  };
  attention_backward(s.problems, target, {});
  return {dq, dk, dv};
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("attention_varlen", TORCH_BOX(&pymm::forward));
  m.impl("attention_varlen_backward", TORCH_BOX(&pymm::backward));
}

// Attention's calls, of batches and of packed sequences. attention.cu has the launches: the kernels are compiled once.
#pragma once

#include "cuda/attention.h"

namespace pymm::cuda {

// A call and its tensors: q, k and v are (B, H, T, width), or (T, H, width) of packed sequences.
struct __attribute__((visibility("hidden"))) AttentionInputs {  // as its tensors are
  AttentionInputs(const char* op_in, int64_t dimensions, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                  const std::optional<Tensor>& seed_in, double dropout_p, double scale, int64_t causal)
      : op(op_in), q(heads(q_in, dimensions)), k(heads(k_in, dimensions)), v(heads(v_in, dimensions)), seed(seed_in) {
    const bool batched = dimensions == 4;
    const int64_t rows = batched ? 2 : 0, last = dimensions - 1;
    c.batch = batched ? q.size(0) : 1;
    c.heads = q.size(1);
    c.rows = q.size(rows);
    c.width = q.size(last);
    c.groups = k.size(1);
    c.columns = k.size(rows);
    c.value_width = v.size(last);
    STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                        k.size(last) == c.width && (!batched || (k.size(0) == c.batch && v.size(0) == c.batch)) &&
                        v.size(1) == c.groups && v.size(rows) == c.columns &&
                        (c.groups > 0 ? c.heads % c.groups == 0 : c.heads == 0),
                    op, ": q, k and v do not fit");
    STD_TORCH_CHECK(c.rows <= kMostRows && c.columns <= kMostRows, op, ": q or k has too many rows");
    if (seed.has_value()) {
      c.seed = data<int64_t>(*seed);
      c.threshold = static_cast<int64_t>(nearbyint(dropout_p * 4294967296.0));
      c.keep = dropout_p < 1 ? 1 / (1 - dropout_p) : 1;
    }
    c.causal = static_cast<int>(causal);
    c.scale = scale;
  }

  // A tensor of heads whose last dimension is dense; a copy where it was not.
  Tensor heads(const Tensor& x, int64_t dimensions) const {
    STD_TORCH_CHECK(x.dim() == dimensions, op, ": q, k, v, out and dout must have ", dimensions, " dimensions");
    return x.size(dimensions - 1) <= 1 || x.stride(dimensions - 1) == 1 ? x : torch::stable::contiguous(x);
  }

  const char* op;
  Tensor q, k, v;
  std::optional<Tensor> seed;
  Call c;

 private:
  static constexpr int64_t kMostRows = int64_t{1} << 30;  // kernels count them, and some more, in 32 bits
};

void attention_forward(const Stream& stream, const AttentionInputs& in, Tensor& out, Tensor& lse);

// What backward is given, and what it fills in; the mask's gradient only where there is one.
struct __attribute__((visibility("hidden"))) AttentionBackward {
  Tensor dout, out, lse;
  std::optional<Tensor> dlse;
  Tensor dq, dk, dv;
  std::optional<Tensor> dmask;

  // Makes them dense and looks whether they fit the call.
  void check(const AttentionInputs& in) {
    const Call& c = in.c;
    dout = in.heads(dout, in.q.dim());
    out = in.heads(out, in.q.dim());
    lse = dense(lse);
    if (dlse.has_value()) dlse = dense(*dlse);
    const int64_t rows = c.batch * c.heads * c.rows;
    STD_TORCH_CHECK(dout.scalar_type() == in.q.scalar_type() && out.scalar_type() == in.q.scalar_type() &&
                        dout.numel() == rows * c.value_width && out.numel() == dout.numel() && lse.numel() == rows &&
                        lse.scalar_type() == accumulator_type(in.q),
                    in.op, ": dout, out and lse must be those of forward");
  }
};

void attention_backward(const Stream& stream, const AttentionInputs& in, AttentionBackward& tensors);

}  // namespace pymm::cuda

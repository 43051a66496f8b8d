// Scaled dot-product attention: which kernel runs which call.
//
// bfloat16 and float16 with heads of up to 128 numbers run on tensor cores (attention_tensor.h), everything else on the
// float units (attention_exact.h), packed sequences too. Parallel: one launch over batch, heads and tiles. Backward
// makes the scores again from q, k and the log-sum-exp, and each gradient is written by the block that owns it.
#include "cuda/attention_exact.h"
#include "cuda/attention_launch.h"
#include "cuda/attention_tensor_backward.h"
#include "cuda/attention_tensor_forward.h"

namespace pymm::cuda {
namespace {

constexpr const char* kOp = "attention";
constexpr int kDeltaThreads = 128;

// delta = sum of dout . out over a row, minus dlse; one warp per row.
template <class T>
PYMM_GLOBAL void delta_kernel(Call c, HeadRows<const T> dout, HeadRows<const T> out, const Accumulator<T>* dlse,
                              Accumulator<T>* delta) {
  using Acc = Accumulator<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kDeltaThreads / kWarp) + threadIdx.x / kWarp;
  const bool inside = row < c.batch * c.heads * c.rows;
  const int64_t t = row % c.rows, h = row / c.rows % c.heads, b = inside ? row / c.rows / c.heads : 0;
  const T *left = dout.at(b, h) + t * dout.row, *right = out.at(b, h) + t * out.row;
  Acc sum = 0;
  for (int64_t d = threadIdx.x % kWarp; inside && d < c.value_width; d += kWarp) {
    sum += Acc(to_float(left[d])) * Acc(to_float(right[d]));
  }
  sum = warp_sum(sum);
  if (inside && threadIdx.x % kWarp == 0) delta[row] = dlse == nullptr ? sum : sum - dlse[row];
}

template <class T>
HeadRows<T> heads_of(const Tensor& x) {
  constexpr int64_t kAligned = 16 / sizeof(T);
  const int64_t last = x.dim() - 1;
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (x.size(i) == 1 || x.stride(i) % kAligned == 0);
  T* p = data<std::remove_const_t<T>>(x);
  return last == 3 ? HeadRows<T>{p, x.stride(0), x.stride(1), x.stride(2), aligned}
                   : HeadRows<T>{p, 0, x.stride(1), x.stride(0), aligned};
}

dim3 blocks(int64_t count) {
  STD_TORCH_CHECK(count <= INT32_MAX, "attention: the call has too many tiles");
  return dim3(static_cast<unsigned>(count));
}

template <class T>
void exact_forward(const Stream& stream, const AttentionInputs& in, Tensor& out, Tensor& lse) {
  const Call& c = in.c;
  const int64_t tiles = c.row_tiles(), chunks = c.value_width > kTile ? ceil_div(c.value_width, kTile) : 1;
  PYMM_LAUNCH(exact_forward_kernel<T>, blocks(c.batch * c.heads * tiles * chunks), dim3(kSide, kSide), stream, c,
              heads_of<const T>(in.q), heads_of<const T>(in.k), heads_of<const T>(in.v), heads_of<T>(out),
              data<Accumulator<T>>(lse), tiles, chunks);
}

bool fits_tensor_cores(const Call& c) { return c.width <= 128 && c.value_width <= 128; }

// Calls `f` with the width of the tiles that hold the heads.
template <class F>
void by_width(const Call& c, F&& f) {
  const int64_t wide = c.width > c.value_width ? c.width : c.value_width;
  if (wide <= 64) return f.template operator()<64>();
  if (wide <= 96) return f.template operator()<96>();
  return f.template operator()<128>();
}

template <class T, int kWidth, int kColumns, bool kWhole>
void launch_forward(const Stream& stream, const AttentionInputs& in, Tensor& out, Tensor& lse) {
  const int64_t tiles = in.c.row_tiles();
  PYMM_LAUNCH_SHARED((tensor_forward_kernel<T, kWidth, kColumns, kWhole>), blocks(in.c.batch * in.c.heads * tiles),
                     dim3(kAttentionThreads), (forward_bytes<kWidth, kColumns, kWhole>()), stream, in.c,
                     heads_of<const T>(in.q), heads_of<const T>(in.k), heads_of<const T>(in.v), heads_of<T>(out),
                     data<float>(lse), tiles);
}

template <class T, int kWidth>
void tensor_forward(const Stream& stream, const AttentionInputs& in, Tensor& out, Tensor& lse) {
  if constexpr (kWidth == 64) {
    const Call& c = in.c;
    if (!c.packed() && c.columns > 64 && c.columns <= kWholeColumns && c.mask_kind == kNoMask && c.padding == nullptr &&
        c.seed == nullptr) {
      return launch_forward<T, kWidth, kWholeColumns, true>(stream, in, out, lse);
    }
  }
  launch_forward<T, kWidth, 64, false>(stream, in, out, lse);
}

template <class T>
void exact_backward(const Stream& stream, const Call& c, const Gradients<T>& g) {
  const int64_t tiles_t = c.row_tiles(), tiles_s = c.column_tiles();
  const int64_t chunks = c.width > kTile ? ceil_div(c.width, kTile) : 1;
  const int64_t wide = c.width > c.value_width ? c.width : c.value_width;
  const int64_t chunks_s = wide > kTile ? ceil_div(wide, kTile) : 1;
  if (tiles_t > 0) {
    PYMM_LAUNCH(exact_rows_kernel<T>, blocks(c.batch * c.heads * tiles_t * chunks), dim3(kSide, kSide), stream, c, g,
                tiles_t, chunks);
  }
  if (tiles_s > 0) {
    PYMM_LAUNCH(exact_columns_kernel<T>, blocks(c.batch * c.groups * tiles_s * chunks_s), dim3(kSide, kSide), stream, c,
                g, tiles_s, chunks_s);
  }
}

template <class T, int kWidth>
void tensor_backward(const Stream& stream, const Call& c, const Gradients<T>& g) {
  constexpr int kStream = kWidth == 64 ? 64 : 32;  // what registers hold beside the gradients
  const int64_t tiles_t = c.row_tiles(), tiles_s = c.column_tiles();
  if (tiles_t > 0) {
    PYMM_LAUNCH_SHARED((tensor_backward_kernel<T, kWidth, kStream, false>), blocks(c.batch * c.heads * tiles_t),
                       dim3(kAttentionThreads), (backward_bytes<kWidth, kStream>()), stream, c, g, tiles_t);
  }
  if (tiles_s > 0) {
    PYMM_LAUNCH_SHARED((tensor_backward_kernel<T, kWidth, kStream, true>), blocks(c.batch * c.groups * tiles_s),
                       dim3(kAttentionThreads), (backward_bytes<kWidth, kStream>()), stream, c, g, tiles_s);
  }
}

template <class T>
void mask_gradient(const Stream& stream, const Call& c, const Gradients<T>& g, const Tensor& dmask) {
  const MaskShape m{dmask.size(0), dmask.size(1), dmask.size(2), dmask.size(3)};
  const int64_t tiles_t = ceil_div(m.rows, kTile), tiles_s = ceil_div(m.columns, kTile);
  if constexpr (sizeof(T) == 2) {
    const auto launch = [&]<int kWidth>() {
      PYMM_LAUNCH_SHARED((tensor_mask_kernel<T, kWidth>), blocks(m.batch * m.heads * tiles_t * tiles_s),
                         dim3(kAttentionThreads), mask_bytes<kWidth>(), stream, c, g, m, dmask.data_ptr(), tiles_t,
                         tiles_s);
    };
    if (c.width <= 64 && c.value_width <= 64) return launch.template operator()<64>();
    if (fits_tensor_cores(c)) return launch.template operator()<128>();
  }
  PYMM_LAUNCH(exact_mask_kernel<T>, blocks(m.batch * m.heads * tiles_t * tiles_s), dim3(kSide, kSide), stream, c, g, m,
              dmask.data_ptr(), tiles_t, tiles_s);
}

}  // namespace

void attention_forward(const Stream& stream, const AttentionInputs& in, Tensor& out, Tensor& lse) {
  if (lse.numel() == 0) return;
  dispatch(in.q, in.op, [&]<class T>() {
    if constexpr (sizeof(T) == 2) {
      if (fits_tensor_cores(in.c)) {
        by_width(in.c, [&]<int kWidth>() { tensor_forward<T, kWidth>(stream, in, out, lse); });
        return;
      }
    }
    exact_forward<T>(stream, in, out, lse);
  });
}

void attention_backward(const Stream& stream, const AttentionInputs& in, AttentionBackward& tensors) {
  const Call& c = in.c;
  tensors.check(in);
  if (c.batch * c.heads == 0) return;
  const Tensor delta = torch::stable::empty_like(tensors.lse);
  dispatch(in.q, in.op, [&]<class T>() {
    using Acc = Accumulator<T>;
    const Gradients<T> g{heads_of<const T>(in.q),         heads_of<const T>(in.k), heads_of<const T>(in.v),
                         heads_of<const T>(tensors.dout), data<Acc>(tensors.lse),  data<Acc>(delta),
                         heads_of<T>(tensors.dq),         heads_of<T>(tensors.dk), heads_of<T>(tensors.dv)};
    if (delta.numel() > 0) {
      PYMM_LAUNCH(delta_kernel<T>, blocks(ceil_div(delta.numel(), kDeltaThreads / kWarp)), dim3(kDeltaThreads), stream,
                  c, g.dout, heads_of<const T>(tensors.out),
                  tensors.dlse.has_value() ? data<Acc>(*tensors.dlse) : nullptr, data<Acc>(delta));
    }
    if constexpr (sizeof(T) == 2) {
      if (fits_tensor_cores(c)) {
        by_width(c, [&]<int kWidth>() { tensor_backward<T, kWidth>(stream, c, g); });
      } else {
        exact_backward(stream, c, g);
      }
    } else {
      exact_backward(stream, c, g);
    }
    if (tensors.dmask.has_value() && tensors.dmask->numel() > 0) mask_gradient(stream, c, g, *tensors.dmask);
  });
}

namespace {

// (B, H, T, width), stored as (B, T, H, width).
Tensor rows_first(const Tensor& like, int64_t width) {
  const std::vector<int64_t> sizes{like.size(0), like.size(2), like.size(1), width};
  return torch::stable::transpose(torch::stable::new_empty(like, sizes), 1, 2);
}

struct Inputs : AttentionInputs {
  Inputs(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const std::optional<Tensor>& mask_in,
         const std::optional<Tensor>& padding_in, const std::optional<Tensor>& seed_in, double dropout_p, double scale,
         int64_t causal)
      : AttentionInputs(kOp, 4, q_in, k_in, v_in, seed_in, dropout_p, scale, causal), mask(mask_in) {
    if (mask.has_value()) set_mask();
    if (padding_in.has_value()) {
      padding = dense(*padding_in);
      STD_TORCH_CHECK(padding->numel() == c.batch * c.columns, kOp, ": key_padding_mask must be (B, S)");
      c.padding = data<uint8_t>(*padding);
    }
  }

  std::optional<Tensor> mask, padding;

 private:
  void set_mask() {
    const ScalarType type = mask->scalar_type();
    c.mask_kind = type == ScalarType::Bool ? kBoolMask : type == q.scalar_type() ? kBias : kWideBias;
    STD_TORCH_CHECK(mask->dim() == 4 && (c.mask_kind != kWideBias || type == accumulator_type(q)), kOp,
                    ": attn_mask must have four dimensions, and be bool, of q's type or of its accumulator's");
    c.mask = mask->data_ptr();
    const int64_t full[4] = {c.batch, c.heads, c.rows, c.columns};
    for (int i = 0; i < 4; ++i) {
      STD_TORCH_CHECK(mask->size(i) == 1 || mask->size(i) == full[i], kOp, ": attn_mask does not fit the scores");
      c.mask_strides[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
    }
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<Tensor>& attn_mask,
                                   const std::optional<Tensor>& key_padding_mask, const std::optional<Tensor>& seed,
                                   double dropout_p, double scale, int64_t causal) {
  const Inputs in(q, k, v, attn_mask, key_padding_mask, seed, dropout_p, scale, causal);
  const Call& c = in.c;
  Tensor out = rows_first(in.q, c.value_width);
  Tensor lse = torch::stable::new_empty(in.q, std::vector<int64_t>{c.batch, c.heads, c.rows}, accumulator_type(in.q));
  attention_forward(Stream(in.q), in, out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dout, const std::optional<Tensor>& dlse,
                                                    const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const Tensor& out, const Tensor& lse,
                                                    const std::optional<Tensor>& attn_mask,
                                                    const std::optional<Tensor>& key_padding_mask,
                                                    const std::optional<Tensor>& seed, double dropout_p, double scale,
                                                    int64_t causal, bool want_mask) {
  const Inputs in(q, k, v, attn_mask, key_padding_mask, seed, dropout_p, scale, causal);
  const Call& c = in.c;
  std::vector<int64_t> mask_sizes{0};
  if (want_mask) mask_sizes = {in.mask->size(0), in.mask->size(1), in.mask->size(2), in.mask->size(3)};
  const Tensor dmask = torch::stable::new_empty(want_mask ? *in.mask : in.q, mask_sizes);
  AttentionBackward tensors{
      dout, out, lse, dlse, rows_first(in.q, c.width), rows_first(in.k, c.width), rows_first(in.v, c.value_width),
      dmask};
  attention_backward(Stream(in.q), in, tensors);
  return {tensors.dq, tensors.dk, tensors.dv, dmask};
}

}  // namespace
}  // namespace pymm::cuda

STABLE_TORCH_LIBRARY_IMPL(pymm_cuda, PYMM_DISPATCH_KEY, m) {
  m.impl("attention", TORCH_BOX(&pymm::cuda::forward));
  m.impl("attention_backward", TORCH_BOX(&pymm::cuda::backward));
}

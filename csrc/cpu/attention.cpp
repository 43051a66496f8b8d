// Softmax attention over (B, H, T, D), forward and backward. Tasks: attention.h; what stays on chip:
// simd/attention_*.cpp.
#include "cpu/attention.h"

#include "cpu/simd/rows.h"

namespace pymm {
namespace {

constexpr const char* kOp = "attention";

HeadView view(const Tensor& t, int64_t batch, int64_t head) {
  const int64_t offset = (batch * t.stride(0) + head * t.stride(1)) * static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(t.data_ptr()) + offset, t.stride(1), t.stride(2)};
}

// Stored as (B, T, H, D), so that joining the heads again copies nothing.
Tensor rows_first(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  return torch::stable::transpose(empty({batch, rows, heads, width}, like), 1, 2);
}

struct Masks {
  std::optional<Tensor> mask, valid;
  Bias bias = Bias::none;
};

Masks masks_of(const Tensor& q, const Tensor& k, const std::optional<Tensor>& attn_mask,
               const std::optional<Tensor>& key_padding_mask) {
  Masks masks{attn_mask, key_padding_mask};
  if (attn_mask.has_value()) {
    const int64_t full[] = {q.size(0), q.size(1), q.size(2), k.size(2)};
    PYMM_CHECK(attn_mask->dim() == 4, kOp, ": attn_mask must have four dimensions");
    for (int i = 0; i < 4; ++i) {
      PYMM_CHECK(attn_mask->size(i) == 1 || attn_mask->size(i) == full[i], kOp,
                 ": attn_mask must be broadcastable to (B, H, T, S)");
    }
    if (attn_mask->scalar_type() == q.scalar_type()) {
      masks.bias = Bias::input_type;
    } else if (attn_mask->scalar_type() != ScalarType::Bool) {
      PYMM_CHECK(attn_mask->scalar_type() == accumulator_type(dtype_of(q, kOp)), kOp,
                 ": attn_mask must be bool, of q's type or of the accumulators'");
      masks.bias = Bias::accumulators;
    }
  }
  if (key_padding_mask.has_value()) {
    PYMM_CHECK(key_padding_mask->dim() == 2 && key_padding_mask->size(0) == q.size(0) &&
                   key_padding_mask->size(1) == k.size(2) && key_padding_mask->scalar_type() == ScalarType::Bool,
               kOp, ": key_padding_mask must be bool (B, S)");
  }
  return masks;
}

MaskView mask_view(const Tensor& mask, int64_t batch, int64_t head) {
  const auto stride = [&](int64_t dim) { return mask.size(dim) == 1 ? 0 : mask.stride(dim); };
  const int64_t offset = (batch * stride(0) + head * stride(1)) * static_cast<int64_t>(mask.element_size());
  return {static_cast<const char*>(mask.data_ptr()) + offset, stride(1), stride(2), stride(3)};
}

AttentionProblems problems_of(const Tensor& q, const Tensor& k, const Tensor& v, const Masks& masks,
                              const std::optional<Tensor>& seed, double dropout_p, double scale, int64_t causal) {
  PYMM_CHECK(q.dim() == 4, kOp, ": q, k and v must have four dimensions");
  const AttentionCall call = attention_call(q, k, v, seed, dropout_p, scale, causal, 1, kOp);
  PYMM_CHECK(k.size(0) == q.size(0), kOp, ": q and k must have one batch size");
  const int64_t groups = k.size(1), rows = q.size(2), columns = k.size(2), heads = call.heads;
  return {call, dtype_of(q, kOp), q.size(0) * groups, [=](int64_t problem) {
            const int64_t batch = problem / groups, group = problem % groups, first = group * heads;
            AttentionHead head{};
            head.rows = rows;
            head.columns = columns;
            head.causal_offset = causal_offset(causal, rows, columns);
            head.first_head = batch * groups * heads + first;
            head.q = view(q, batch, first);
            head.k = view(k, batch, group);
            head.v = view(v, batch, group);
            head.bias_type = masks.bias;
            if (masks.mask.has_value()) {
              (masks.bias == Bias::none ? head.allowed : head.bias) = mask_view(*masks.mask, batch, first);
            }
            if (masks.valid.has_value()) {
              const Tensor& valid = *masks.valid;
              head.valid = {data<const uint8_t>(valid) + batch * valid.stride(0), 0, 0, valid.stride(1)};
            }
            return head;
          }};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                   std::optional<Tensor> attn_mask, std::optional<Tensor> key_padding_mask,
                                   std::optional<Tensor> seed, double dropout_p, double scale, int64_t causal) {
  const Tensor q = last_dense(q_in), k = last_dense(k_in), v = last_dense(v_in);
  const Masks masks = masks_of(q, k, attn_mask, key_padding_mask);
  const AttentionProblems problems = problems_of(q, k, v, masks, seed, dropout_p, scale, causal);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), groups = k.size(1);
  Tensor out = rows_first(q, batch, heads, rows, v.size(3));
  Tensor lse = empty({batch, heads, rows}, q, accumulator_type(problems.dtype));
  attention_forward(problems, [&](int64_t problem) {
    const int64_t b = problem / groups, first = problem % groups * problems.call.heads;
    void* at = static_cast<char*>(lse.data_ptr()) + (b * heads + first) * rows * lse.element_size();
    return AttentionForward{view(out, b, first), at, rows};
  });
  return {out, lse};
}

// The gradient of a float mask. Where the mask tells rows and columns apart, problems that share a part of it belong to
// one owner and add to it in place; where it does not, it is small, so each problem and range has its own.
class MaskGradient {
 public:
  MaskGradient(const Tensor& mask, const AttentionProblems& problems, int64_t batch, int64_t groups, int64_t rows,
               int64_t columns)
      : mask_(mask),
        dtype_(problems.dtype),
        acc_type_(accumulator_type(problems.dtype)),
        groups_(groups),
        heads_(problems.call.heads),
        problems_(problems.count),
        per_head_(mask.size(1) > 1 || groups * heads_ == 1),
        in_place_(mask.size(2) == rows && mask.size(3) == columns),
        turned_(in_place_ && heads_ == 1),
        ld_(round_up(rows, kTurnedRows)),
        kernels_(kernels_for(attention_backward_table(), problems.dtype, problems.call)),
        sums_(turned_ ? zeros({mask.size(0), mask.size(1), columns, ld_}, mask, acc_type_)
                      : zeros({mask.size(0), mask.size(1), mask.size(2), mask.size(3)}, mask, acc_type_)) {
    if (in_place_) find_owners(batch);
    tasks_.place = [this](int64_t problem, int64_t range, AttentionBackward& with) { place(problem, range, with); };
    tasks_.prepare = [this](int64_t ranges) {
      ranges_ = ranges;
      if (!in_place_) parts_ = zeros({problems_ * ranges, part_elements()}, mask_, acc_type_);
    };
  }
  MaskGradient(const MaskGradient&) = delete;
  MaskGradient& operator=(const MaskGradient&) = delete;

  const MaskGradientTasks& tasks() const { return tasks_; }

  Tensor result() {
    if (!in_place_) {
      dispatch(dtype_, [&]<class T>() { join_parts<Accumulator<T>>(); });
    }
    const bool widened = mask_.scalar_type() == acc_type_;
    if (widened && !turned_) return sums_;
    Tensor gradient = empty({mask_.size(0), mask_.size(1), mask_.size(2), mask_.size(3)}, mask_);
    const Rows& rows_of = rows_for(dtype_);
    const int64_t element = mask_.element_size();
    if (turned_) {
      parallel_tasks(mask_.size(0) * mask_.size(1), [&](int64_t i) {
        kernels_.turn_mask(static_cast<const char*>(sums_.data_ptr()) + i * matrix() * sums_.element_size(), ld_,
                           mask_.size(2), mask_.size(3), widened,
                           static_cast<char*>(gradient.data_ptr()) + i * mask_.size(2) * mask_.size(3) * element);
      });
      return gradient;
    }
    parallel_ranges(sums_.numel(), 4096, [&](int64_t begin, int64_t end) {
      rows_of.narrow(data<float>(sums_) + begin, 1.0, end - begin,
                     static_cast<char*>(gradient.data_ptr()) + begin * element);
    });
    return gradient;
  }

 private:
  int64_t matrix() const { return turned_ ? mask_.size(3) * ld_ : mask_.size(2) * mask_.size(3); }
  int64_t part_elements() const { return (per_head_ ? heads_ : 1) * matrix(); }
  int64_t first_element(int64_t problem) const {
    const int64_t b = mask_.size(0) > 1 ? problem / groups_ : 0;
    const int64_t h = per_head_ ? problem % groups_ * heads_ : 0;
    return (b * mask_.size(1) + h) * matrix();
  }

  void find_owners(int64_t batch) {
    const bool by_batch = mask_.size(0) > 1 || batch == 1;
    tasks_.owners.resize(static_cast<size_t>((by_batch ? batch : 1) * (per_head_ ? groups_ : 1)));
    for (int64_t problem = 0; problem < problems_; ++problem) {
      const int64_t b = by_batch ? problem / groups_ : 0, g = per_head_ ? problem % groups_ : 0;
      tasks_.owners[static_cast<size_t>(b * (per_head_ ? groups_ : 1) + g)].push_back(problem);
    }
  }

  void place(int64_t problem, int64_t range, AttentionBackward& with) const {
    const int64_t element = sums_.element_size();
    with.mask_gradient =
        in_place_ ? static_cast<char*>(sums_.data_ptr()) + first_element(problem) * element
                  : static_cast<char*>(parts_->data_ptr()) + (problem * ranges_ + range) * part_elements() * element;
    with.mask_head_stride = per_head_ ? matrix() : 0;
    with.mask_row_stride = mask_.size(2) > 1 ? mask_.size(3) : 0;
    with.mask_column_stride = mask_.size(3) > 1 || in_place_ ? 1 : 0;
    if (!turned_) return;
    with.mask_turned = true;
    with.mask_row_stride = 1;
    with.mask_column_stride = ld_;
  }

  template <class Acc>
  void join_parts() {
    const int64_t n = part_elements();
    for (int64_t problem = 0; problem < problems_; ++problem) {
      Acc* to = data<Acc>(sums_) + first_element(problem);
      for (int64_t range = 0; range < ranges_; ++range) {
        const Acc* from = data<Acc>(*parts_) + (problem * ranges_ + range) * n;
        for (int64_t i = 0; i < n; ++i) to[i] += from[i];
      }
    }
  }

  Tensor mask_;
  DType dtype_;
  ScalarType acc_type_;
  int64_t groups_, heads_, problems_, ranges_ = 1;
  bool per_head_, in_place_, turned_;
  int64_t ld_;
  const AttentionBackwardKernels& kernels_;
  Tensor sums_;
  std::optional<Tensor> parts_;
  MaskGradientTasks tasks_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout_in, std::optional<Tensor> dlse_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
    const Tensor& out_in, const Tensor& lse_in, std::optional<Tensor> attn_mask, std::optional<Tensor> key_padding_mask,
    std::optional<Tensor> seed, double dropout_p, double scale, int64_t causal, bool mask_gradient) {
  const Tensor q = last_dense(q_in), k = last_dense(k_in), v = last_dense(v_in);
  const Tensor dout = last_dense(dout_in), out = last_dense(out_in), lse = dense(lse_in);
  const std::optional<Tensor> dlse = dlse_in.has_value() ? std::optional(dense(*dlse_in)) : std::nullopt;
  const Masks masks = masks_of(q, k, attn_mask, key_padding_mask);
  const AttentionProblems problems = problems_of(q, k, v, masks, seed, dropout_p, scale, causal);
  const int64_t batch = q.size(0), heads = q.size(1), rows = q.size(2), groups = k.size(1);
  const ScalarType acc_type = accumulator_type(problems.dtype);
  for (const Tensor* t : {&dout, &out}) {
    PYMM_CHECK(t->dim() == 4 && t->size(0) == batch && t->size(1) == heads && t->size(2) == rows &&
                   t->size(3) == v.size(3) && t->scalar_type() == q.scalar_type(),
               kOp, ": out and dout must be (B, H, T, Dv) of q's type");
  }
  PYMM_CHECK(lse.numel() == batch * heads * rows && lse.scalar_type() == acc_type, kOp, ": lse must be (B, H, T)");
  PYMM_CHECK(!dlse || (dlse->numel() == lse.numel() && dlse->scalar_type() == acc_type), kOp, ": dlse must be as lse");
  PYMM_CHECK(!mask_gradient || masks.bias != Bias::none, kOp, ": only a float mask has a gradient");
  Tensor dq = rows_first(q, batch, heads, rows, q.size(3));
  Tensor dk = rows_first(k, batch, groups, k.size(2), k.size(3));
  Tensor dv = rows_first(v, batch, groups, v.size(2), v.size(3));

  std::optional<MaskGradient> of_mask;
  if (mask_gradient) of_mask.emplace(*attn_mask, problems, batch, groups, rows, k.size(2));
  const auto target = [&](int64_t problem) {
    const int64_t b = problem / groups, group = problem % groups, first = group * problems.call.heads;
    const int64_t at = (b * heads + first) * rows * lse.element_size();
    AttentionBackward with{};
    with.dout = view(dout, b, first);
    with.out = view(out, b, first);
    with.dq = view(dq, b, first);
    with.dk = view(dk, b, group);
    with.dv = view(dv, b, group);
    with.lse = static_cast<const char*>(lse.data_ptr()) + at;
    with.dlse = dlse ? static_cast<const char*>(dlse->data_ptr()) + at : nullptr;
    with.lse_stride = rows;
    return with;
  };
  attention_backward(problems, target, of_mask ? of_mask->tasks() : MaskGradientTasks{});
  return {dq, dk, dv, of_mask ? of_mask->result() : empty({0}, q)};
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("attention", TORCH_BOX(&pymm::forward));
  m.impl("attention_backward", TORCH_BOX(&pymm::backward));
}

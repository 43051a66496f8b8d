// Scaled dot-product attention over packed sequences: attention's kernels, whose blocks find their sequence in a table
// that is made here, on the device, so that nothing waits for the lengths.
#include "cuda/attention_launch.h"

namespace pymm::cuda {
namespace {

constexpr const char* kOp = "attention_varlen";
constexpr int kTableThreads = 128;

// The offsets of one side, whose last is `total`, and the table of its tiles.
struct Table {
  const int64_t* begins;
  int64_t total;
  int32_t* sequences;
};

// Fills in both tables, q's where blockIdx.y is 0; one thread per tile. Ends the launch where offsets begin elsewhere
// than at 0, fall or end elsewhere than at the total.
PYMM_GLOBAL void sequences_kernel(Table of_rows, Table of_columns, int64_t sequences) {
  const Table& table = blockIdx.y == 0 ? of_rows : of_columns;
  const int64_t* begins = table.begins;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kTableThreads + threadIdx.x;
  if (tile < sequences && begins[tile] > begins[tile + 1]) PYMM_TRAP();
  if (tile == 0 && (begins[0] != 0 || begins[sequences] != table.total)) PYMM_TRAP();
  if (tile >= table.total / kTile + sequences) return;
  int64_t low = 0, high = sequences - 1;  // the last sequence whose tiles begin here or before
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (begins[middle] / kTile + middle <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  table.sequences[tile] = static_cast<int32_t>(low);
}

struct PackedInputs : AttentionInputs {
  PackedInputs(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cu_q_in, const Tensor& cu_k_in,
               const std::optional<Tensor>& seed_in, double dropout_p, double scale, int64_t causal)
      : AttentionInputs(kOp, 3, q_in, k_in, v_in, seed_in, dropout_p, scale, causal),
        cu_q(dense(cu_q_in)),
        cu_k(dense(cu_k_in)) {
    for (const Tensor* cu : {&cu_q, &cu_k}) {
      STD_TORCH_CHECK(cu->dim() == 1 && cu->numel() >= 1 && cu->scalar_type() == ScalarType::Long, kOp,
                      ": cu_seqlens must be int64 (N + 1,)");
    }
    c.sequences = cu_q.numel() - 1;
    STD_TORCH_CHECK(cu_k.numel() == cu_q.numel() && c.sequences <= INT32_MAX, kOp,
                    ": cu_seqlens_q and cu_seqlens_k must have one length");
    STD_TORCH_CHECK(c.sequences > 0 || c.rows + c.columns == 0, kOp, ": rows without a sequence");
    c.of_rows.begins = data<int64_t>(cu_q);
    c.of_columns.begins = data<int64_t>(cu_k);
  }

  void find_sequences(const Stream& stream) {
    const int64_t of_rows = c.row_tiles(), of_columns = c.column_tiles();
    tables = torch::stable::new_empty(q, std::vector<int64_t>{of_rows + of_columns}, ScalarType::Int);
    const Table rows{c.of_rows.begins, c.rows, data<int32_t>(*tables)};
    const Table columns{c.of_columns.begins, c.columns, rows.sequences + of_rows};
    c.of_rows.sequences = rows.sequences;
    c.of_columns.sequences = columns.sequences;
    const int64_t most = of_rows > of_columns ? of_rows : of_columns;
    if (most == 0) return;
    PYMM_LAUNCH(sequences_kernel, dim3(static_cast<unsigned>(ceil_div(most, kTableThreads)), 2), dim3(kTableThreads),
                stream, rows, columns, c.sequences);
  }

 private:
  Tensor cu_q, cu_k;
  std::optional<Tensor> tables;
};

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                                   const Tensor& cu_seqlens_k, const std::optional<Tensor>& seed, double dropout_p,
                                   double scale, int64_t causal) {
  PackedInputs in(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, dropout_p, scale, causal);
  const Call& c = in.c;
  const Stream stream(in.q);
  in.find_sequences(stream);
  Tensor out = torch::stable::new_empty(in.q, std::vector<int64_t>{c.rows, c.heads, c.value_width});
  Tensor lse = torch::stable::new_empty(in.q, std::vector<int64_t>{c.heads, c.rows}, accumulator_type(in.q));
  attention_forward(stream, in, out, lse);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                                            const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                            const std::optional<Tensor>& seed, double dropout_p, double scale,
                                            int64_t causal) {
  PackedInputs in(q, k, v, cu_seqlens_q, cu_seqlens_k, seed, dropout_p, scale, causal);
  const Call& c = in.c;
  const Stream stream(in.q);
  in.find_sequences(stream);
  const auto packed = [&](int64_t rows, int64_t heads, int64_t width) {
    return torch::stable::new_empty(in.q, std::vector<int64_t>{rows, heads, width});
  };
  AttentionBackward tensors{dout,
                            out,
                            lse,
                            dlse,
                            packed(c.rows, c.heads, c.width),
                            packed(c.columns, c.groups, c.width),
                            packed(c.columns, c.groups, c.value_width),
                            std::nullopt};
  attention_backward(stream, in, tensors);
  return {tensors.dq, tensors.dk, tensors.dv};
}

}  // namespace
}  // namespace pymm::cuda

STABLE_TORCH_LIBRARY_IMPL(pymm_cuda, PYMM_DISPATCH_KEY, m) {
  m.impl("attention_varlen", TORCH_BOX(&pymm::cuda::forward));
  m.impl("attention_varlen_backward", TORCH_BOX(&pymm::cuda::backward));
}

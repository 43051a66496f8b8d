// Patch embedding: tokens = patches W^T + b, then mask token, positions and prefix rows.
//
// Parallel over blocks of tokens. No patch matrix exists: a few patches at a time are gathered (and bytes converted)
// into a buffer that stays in L1 and packed from there. Only tokens that are kept and not masked are multiplied; the
// epilogue adds bias and position to each block of accumulators while it is in cache. Bytes: pixels, weight and
// positions are read once and tokens written once; the packed weight is written and read besides.
#include "cpu/patches.h"

namespace pymm {
namespace {

Tensor forward(const Tensor& pixels, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
               const std::optional<Tensor>& prefix_in, const std::optional<Tensor>& position_in,
               const std::optional<Tensor>& keep, const std::optional<Tensor>& mask,
               const std::optional<Tensor>& mask_token_in, const std::optional<Tensor>& mean,
               const std::optional<Tensor>& std) {
  const PatchShape s = patch_shape(pixels, weight_in, prefix_in ? prefix_in->size(0) : 0, keep);
  const DType dtype = dtype_of(weight_in, kPatchEmbed);
  const Tensor weight = dense(weight_in);
  const auto bias = checked(bias_in, weight, s.width, "bias");
  const auto prefix = checked(prefix_in, weight, s.prefix * s.width, "prefix");
  const auto mask_token = checked(mask_token_in, weight, s.width, "mask_token");
  const int64_t position_rows = position_in ? position_in->size(0) : s.patches();
  PYMM_CHECK(position_rows == s.patches() || position_rows == s.prefix + s.patches(), kPatchEmbed,
             ": position must be (N, C) or (P+N, C)");
  const auto position = checked(position_in, weight, position_rows * s.width, "position");
  PYMM_CHECK(!mask || mask_token, kPatchEmbed, ": mask needs mask_token");
  const Tokens tokens = tokens_of(s, keep, mask);
  const Normalization normal(pixels, weight, mean, std);
  Tensor out = empty({s.batch, s.rows(), s.width}, weight);
  dispatch(dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    const PatchLoops& loops = patch_loops_for(dtype);
    T* to = data<T>(out);
    const T *b = pointer<T>(bias), *all_positions = pointer<T>(position);
    const T* positions = all_positions ? all_positions + (position_rows - s.patches()) * s.width : nullptr;
    const auto position_of = [&](const Token& t) { return positions ? positions + t.patch * s.width : nullptr; };

    const bool prefix_moves = positions != all_positions;
    parallel_ranges(s.batch * s.prefix, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / s.prefix, row = i % s.prefix;
        loops.add(nullptr, pointer<T>(prefix) + row * s.width, prefix_moves ? all_positions + row * s.width : nullptr,
                  s.width, to + (image * s.rows() + row) * s.width);
      }
    });
    parallel_ranges(static_cast<int64_t>(tokens.hidden.size()), 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Token& t = tokens.hidden[static_cast<size_t>(i)];
        loops.add(nullptr, pointer<T>(mask_token), position_of(t), s.width, to + t.row * s.width);
      }
    });
    const auto finish = [&](int64_t index, int64_t column, int64_t columns, const Acc* c) {
      const Token& t = tokens.shown[static_cast<size_t>(index)];
      const T* p = position_of(t);
      loops.add(c, b ? b + column : nullptr, p ? p + column : nullptr, columns, to + t.row * s.width + column);
    };
    const int64_t m = static_cast<int64_t>(tokens.shown.size());
    if (m == 0 || s.width == 0) return;
    if (s.depth() == 0) {
      for (int64_t i = 0; i < m; ++i) finish(i, 0, s.width, nullptr);
      return;
    }
    const Gemm& gemm = gemm_for(dtype);
    const PackedB packed(gemm, s.width, s.depth(), matrix(data<T>(weight), s.depth(), 1));
    const Patches<T> patches(pixels, s, tokens.shown, normal);
    blocked_product<Acc>(
        m, packed,
        [&](int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) {
          patches.pack_a(gemm, row, rows, k, count, panels);
        },
        [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const Acc* c, int64_t ldc) {
          for (int64_t i = 0; i < rows; ++i) finish(row + i, column, columns, c + i * ldc);
        });
  });
  return out;
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) { m.impl("patch_embed", TORCH_BOX(&pymm::forward)); }

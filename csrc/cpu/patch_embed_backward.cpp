// The gradients of patch_embed.
//
// dW = dtokens^T patches gathers the patches again, parallel over rows of W; dpixels = dtokens W is written straight
// to the pixels, each of them by one token, parallel over tokens; the gradients of bias, prefix, positions and mask
// token are sums over rows of dout, parallel over their elements. Every sum has one order, whatever the threads.
#include "cpu/patches.h"
#include "cpu/simd/rows.h"

namespace pymm {
namespace {

// Rows of dout in groups, each of which is summed to one row.
struct Groups {
  std::vector<int64_t> start, rows;  // group g is rows[start[g]] up to rows[start[g + 1]]

  int64_t count() const { return static_cast<int64_t>(start.size()) - 1; }
};

Groups prefix_groups(const PatchShape& s) {
  Groups groups;
  for (int64_t i = 0; i < s.prefix; ++i) {
    groups.start.push_back(i * s.batch);
    for (int64_t image = 0; image < s.batch; ++image) groups.rows.push_back(image * s.rows() + i);
  }
  groups.start.push_back(s.prefix * s.batch);
  return groups;
}

Groups one_group(const std::vector<Token>& tokens) {
  Groups groups{{0, static_cast<int64_t>(tokens.size())}, {}};
  for (const Token& t : tokens) groups.rows.push_back(t.row);
  return groups;
}

// Groups the tokens by key(token) in [0, keys), in the order that they have.
template <class Key>
Groups grouped(const std::vector<const std::vector<Token>*>& lists, int64_t keys, Key&& key) {
  Groups groups{std::vector<int64_t>(static_cast<size_t>(keys) + 1), {}};
  for (const auto* list : lists) {
    for (const Token& t : *list) ++groups.start[static_cast<size_t>(key(t)) + 1];
  }
  for (size_t i = 1; i < groups.start.size(); ++i) groups.start[i] += groups.start[i - 1];
  groups.rows.resize(static_cast<size_t>(groups.start.back()));
  std::vector<int64_t> next(groups.start.begin(), groups.start.end() - 1);
  for (const auto* list : lists) {
    for (const Token& t : *list) groups.rows[static_cast<size_t>(next[static_cast<size_t>(key(t))]++)] = t.row;
  }
  return groups;
}

template <class T>
void sum_groups(const T* dout, int64_t width, const Groups& groups, T* sums) {
  using Acc = Accumulator<T>;
  constexpr int64_t kStripe = 128;
  const int64_t stripes = ceil_div(width, kStripe);
  parallel_ranges(groups.count() * stripes, 8, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / stripes, column = task % stripes * kStripe,
                    columns = min_of(kStripe, width - column);
      const int64_t start = groups.start[static_cast<size_t>(group)];
      alignas(64) Acc sum[kStripe];
      patch_loops_for(dtype_of<T>())
          .sum_rows(dout + column, width, groups.rows.data() + start,
                    groups.start[static_cast<size_t>(group) + 1] - start, columns, sum);
      rows_for(dtype_of<T>()).narrow(sum, 1, columns, sums + group * width + column);
    }
  });
}

// dW (width x depth) = dtokens^T . patches
template <class T>
void weight_gradient(const T* dout, const PatchShape& s, const std::vector<Token>& tokens, const Patches<T>& patches,
                     T* dw) {
  using Acc = Accumulator<T>;
  const Gemm& gemm = gemm_for(dtype_of<T>());
  const Rows& rows_of = rows_for(dtype_of<T>());
  const PackedB packed(gemm, s.depth(), static_cast<int64_t>(tokens.size()),
                       [&](int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) {
                         patches.pack_b_transposed(gemm, row, rows, k, count, panels);
                       });
  blocked_product<Acc>(
      s.width, packed,
      [&](int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) {
        const Scratch stage(count * rows * static_cast<int64_t>(sizeof(T)));
        for (int64_t t = 0; t < count; ++t) {
          memcpy(stage.as<T>() + t * rows, dout + tokens[static_cast<size_t>(k + t)].row * s.width + row,
                 static_cast<size_t>(rows) * sizeof(T));
        }
        gemm.pack_a(stage.as<T>(), 1, rows, rows, count, panels);
      },
      [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const Acc* c, int64_t ldc) {
        for (int64_t i = 0; i < rows; ++i) {
          rows_of.narrow(c + i * ldc, 1, columns, dw + (row + i) * s.depth() + column);
        }
      });
}

// dpixels (dense) = dtokens . W; a patch that was kept twice has the sum of two rows of dout.
template <class T>
void pixel_gradient(const T* dout, const T* weight, const PatchShape& s, const std::vector<Token>& tokens,
                    const std::optional<Tensor>& std, T* dpixels) {
  using Acc = Accumulator<T>;
  const Gemm& gemm = gemm_for(dtype_of<T>());
  const Rows& rows_of = rows_for(dtype_of<T>());
  const PatchLoops& loops = patch_loops_for(dtype_of<T>());
  const int64_t all = s.batch * s.patches();
  const Groups by_patch = grouped({&tokens}, all, [&](const Token& t) { return t.image * s.patches() + t.patch; });
  std::vector<int64_t> shown;  // the patches with a gradient
  for (int64_t i = 0; i < all; ++i) {
    if (by_patch.start[static_cast<size_t>(i)] < by_patch.start[static_cast<size_t>(i) + 1]) shown.push_back(i);
  }
  const int64_t height = s.grid_height * s.patch_height, width = s.grid_width * s.patch_width;
  if (static_cast<int64_t>(shown.size()) < all) memset(dpixels, 0, static_cast<size_t>(all * s.depth()) * sizeof(T));
  if (shown.empty()) return;
  std::vector<Acc> scale;
  for (int64_t c = 0; std && c < s.channels; ++c) scale.push_back(1 / data<Acc>(*std)[c]);
  const PatchLayout layout{s.patch_height, s.patch_width, height * width, width, 1};
  const PackedB packed(gemm, s.depth(), s.width, matrix(weight, 1, s.depth()));
  blocked_product<Acc>(
      static_cast<int64_t>(shown.size()), packed,
      [&](int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) {
        const Scratch stage(rows * count * static_cast<int64_t>(sizeof(T)));
        const Scratch sum(count * static_cast<int64_t>(sizeof(Acc)));
        for (int64_t r = 0; r < rows; ++r) {
          const auto patch = static_cast<size_t>(shown[static_cast<size_t>(row + r)]);
          const int64_t start = by_patch.start[patch], copies = by_patch.start[patch + 1] - start;
          const int64_t* sources = by_patch.rows.data() + start;
          T* target = stage.as<T>() + r * count;
          if (copies == 1) {
            memcpy(target, dout + sources[0] * s.width + k, static_cast<size_t>(count) * sizeof(T));
          } else {
            loops.sum_rows(dout + k, s.width, sources, copies, count, sum.as<Acc>());
            rows_of.narrow(sum.as<Acc>(), 1, count, target);
          }
        }
        gemm.pack_a(stage.as<T>(), count, 1, rows, count, panels);
      },
      [&](int64_t row, int64_t rows, int64_t column, int64_t columns, const Acc* c, int64_t ldc) {
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t index = shown[static_cast<size_t>(row + i)], patch = index % s.patches();
          const int64_t y = patch / s.grid_width * s.patch_height, x = patch % s.grid_width * s.patch_width;
          T* origin = dpixels + index / s.patches() * s.channels * height * width + y * width + x;
          loops.scatter(c + i * ldc, layout, scale.empty() ? nullptr : scale.data(), column, columns, origin);
        }
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout_in, const Tensor& pixels, const Tensor& weight_in, const std::optional<Tensor>& keep,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& mean, const std::optional<Tensor>& std_in,
    int64_t prefix_rows, int64_t position_rows, bool need_pixels, bool need_weight, bool need_bias, bool need_prefix,
    bool need_position, bool need_mask_token) {
  const PatchShape s = patch_shape(pixels, weight_in, prefix_rows, keep);
  const DType dtype = dtype_of(weight_in, kPatchEmbed);
  const Tensor weight = dense(weight_in);
  const Tensor dout = *checked(dout_in, weight, s.batch * s.rows() * s.width, "dout");
  PYMM_CHECK(!need_pixels || pixels.scalar_type() == weight.scalar_type(), kPatchEmbed,
             ": uint8 pixels have no gradient");
  PYMM_CHECK(!need_position || position_rows == s.patches() || position_rows == s.prefix + s.patches(), kPatchEmbed,
             ": position must have N or P+N rows");
  const Tokens tokens = tokens_of(s, keep, mask);
  const Normalization normal(pixels, weight, mean, std_in);
  const std::optional<Tensor> std = dense_if_given(std_in);
  Tensor dpixels =
      need_pixels ? torch::stable::new_empty(weight, pixels.sizes(), weight.scalar_type()) : empty({0}, weight);
  Tensor dweight =
      need_weight ? torch::stable::new_empty(weight, weight.sizes(), weight.scalar_type()) : empty({0}, weight);
  Tensor dbias = empty({need_bias ? s.width : 0}, weight);
  Tensor dprefix = need_prefix ? empty({s.prefix, s.width}, weight) : empty({0}, weight);
  Tensor dposition = need_position ? empty({position_rows, s.width}, weight) : empty({0}, weight);
  Tensor dmask_token = empty({need_mask_token ? s.width : 0}, weight);
  dispatch(dtype, [&]<class T>() {
    const T* g = data<T>(dout);
    if (need_bias) sum_groups(g, s.width, one_group(tokens.shown), data<T>(dbias));
    if (need_mask_token) sum_groups(g, s.width, one_group(tokens.hidden), data<T>(dmask_token));
    if (need_prefix) sum_groups(g, s.width, prefix_groups(s), data<T>(dprefix));
    if (need_position) {
      T* to = data<T>(dposition);
      if (position_rows > s.patches()) sum_groups(g, s.width, prefix_groups(s), to);
      const Groups own = grouped({&tokens.shown, &tokens.hidden}, s.patches(), [](const Token& t) { return t.patch; });
      sum_groups(g, s.width, own, to + (position_rows - s.patches()) * s.width);
    }
    if (need_weight) {
      if (tokens.shown.empty() || s.depth() == 0 || s.width == 0) {
        torch::stable::zero_(dweight);
      } else {
        weight_gradient(g, s, tokens.shown, Patches<T>(pixels, s, tokens.shown, normal), data<T>(dweight));
      }
    }
    if (need_pixels) {
      if (tokens.shown.empty() || s.depth() == 0 || s.width == 0) {
        torch::stable::zero_(dpixels);
      } else {
        pixel_gradient(g, data<T>(weight), s, tokens.shown, std, data<T>(dpixels));
      }
    }
  });
  return {dpixels, dweight, dbias, dprefix, dposition, dmask_token};
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) { m.impl("patch_embed_backward", TORCH_BOX(&pymm::backward)); }

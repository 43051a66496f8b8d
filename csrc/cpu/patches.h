// What the forward and the backward pass of patch_embed share: which patches become tokens, and how they are read.
#pragma once

#include "cpu/product.h"
#include "cpu/simd/patch_embed.h"

namespace pymm {

constexpr const char* kPatchEmbed = "patch_embed";

struct PatchShape {
  int64_t batch, channels, grid_height, grid_width, patch_height, patch_width, width, prefix, slots;

  int64_t patches() const { return grid_height * grid_width; }
  int64_t depth() const { return channels * patch_height * patch_width; }
  int64_t rows() const { return prefix + slots; }  // of the result, per image
};

inline PatchShape patch_shape(const Tensor& pixels, const Tensor& weight, int64_t prefix,
                              const std::optional<Tensor>& keep) {
  PYMM_CHECK(pixels.dim() == 4 && weight.dim() == 4 && weight.size(1) == pixels.size(1), kPatchEmbed,
             ": pixels must be (B, Cin, H, W) and weight (C, Cin, ph, pw)");
  const int64_t ph = weight.size(2), pw = weight.size(3);
  PYMM_CHECK(ph > 0 && pw > 0 && pixels.size(2) % ph == 0 && pixels.size(3) % pw == 0, kPatchEmbed,
             ": the image must be a multiple of the patch");
  PYMM_CHECK(pixels.scalar_type() == ScalarType::Byte || pixels.scalar_type() == weight.scalar_type(), kPatchEmbed,
             ": pixels must be uint8 or of weight's type");
  PatchShape s{
      pixels.size(0), pixels.size(1), pixels.size(2) / ph, pixels.size(3) / pw, ph, pw, weight.size(0), prefix, 0};
  PYMM_CHECK(!keep || (keep->scalar_type() == ScalarType::Long && keep->dim() == 2 && keep->size(0) == s.batch),
             kPatchEmbed, ": keep must be (B, K) of int64");
  s.slots = keep ? keep->size(1) : s.patches();
  return s;
}

inline std::optional<Tensor> dense_if_given(const std::optional<Tensor>& t) {
  if (!t) return std::nullopt;
  return dense(*t);
}

// A dense tensor of weight's type with `elements` elements, or nothing.
inline std::optional<Tensor> checked(const std::optional<Tensor>& t, const Tensor& weight, int64_t elements,
                                     const char* name) {
  if (!t) return std::nullopt;
  PYMM_CHECK(t->scalar_type() == weight.scalar_type() && t->numel() == elements, kPatchEmbed, ": ", name,
             " has the wrong type or size");
  return dense(*t);
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

struct Token {
  int64_t row;    // of the result, all images after one another
  int64_t patch;  // in its image
  int64_t image;
};

// The tokens that are multiplied, and those that the mask token replaces.
struct Tokens {
  std::vector<Token> shown, hidden;
};

inline Tokens tokens_of(const PatchShape& s, const std::optional<Tensor>& keep_in,
                        const std::optional<Tensor>& mask_in) {
  const std::optional<Tensor> keep = dense_if_given(keep_in);
  const std::optional<Tensor> mask = dense_if_given(mask_in);
  PYMM_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->numel() == s.batch * s.patches()), kPatchEmbed,
             ": mask must be (B, N) bool");
  const int64_t* kept = pointer<int64_t>(keep);
  const bool* masked = pointer<bool>(mask);
  Tokens tokens;
  tokens.shown.reserve(static_cast<size_t>(s.batch * s.slots));
  for (int64_t image = 0; image < s.batch; ++image) {
    for (int64_t slot = 0; slot < s.slots; ++slot) {
      const int64_t patch = kept ? kept[image * s.slots + slot] : slot;
      PYMM_CHECK(patch >= 0 && patch < s.patches(), kPatchEmbed, ": keep must be in [0, ", s.patches(), "), got ",
                 patch);
      const bool hidden = masked && masked[image * s.patches() + patch];
      (hidden ? tokens.hidden : tokens.shown).push_back({image * s.rows() + s.prefix + slot, patch, image});
    }
  }
  return tokens;
}

// x * scale + shift of each channel, with which pixels are normalized; empty where they are taken as they are.
struct Normalization {
  std::optional<Tensor> scale, shift;

  Normalization(const Tensor& pixels, const Tensor& weight, const std::optional<Tensor>& mean_in,
                const std::optional<Tensor>& std_in) {
    const bool bytes = pixels.scalar_type() == ScalarType::Byte;
    if (!bytes && !mean_in && !std_in) return;
    const int64_t channels = pixels.size(1);
    const ScalarType type = accumulator_type(dtype_of(weight, kPatchEmbed));
    for (const auto* t : {&mean_in, &std_in}) {
      PYMM_CHECK(!*t || ((*t)->scalar_type() == type && (*t)->numel() == channels), kPatchEmbed,
                 ": mean and std must be (Cin,) in the accumulator's type");
    }
    scale = empty({channels}, weight, type);
    shift = empty({channels}, weight, type);
    const std::optional<Tensor> mean = dense_if_given(mean_in);
    const std::optional<Tensor> deviation = dense_if_given(std_in);
    const auto fill = [&]<class Acc>() {
      for (int64_t c = 0; c < channels; ++c) {
        const double m = mean ? data<Acc>(*mean)[c] : 0, d = deviation ? data<Acc>(*deviation)[c] : 1;
        data<Acc>(*scale)[c] = static_cast<Acc>((bytes ? 1.0 / 255 : 1.0) / d);
        data<Acc>(*shift)[c] = static_cast<Acc>(-m / d);
      }
    };
    type == ScalarType::Double ? fill.template operator()<double>() : fill.template operator()<float>();
  }
};

// Reads patches of the pixels, and packs them as rows of A (tokens x depth) or of B^T (depth x tokens).
template <class T>
class Patches {
 public:
  using Acc = Accumulator<T>;

  Patches(const Tensor& pixels, const PatchShape& s, const std::vector<Token>& tokens, const Normalization& normal)
      : pixels_(static_cast<const char*>(pixels.data_ptr())),
        bytes_(pixels.scalar_type() == ScalarType::Byte),
        shape_(s),
        strides_{pixels.stride(0), pixels.stride(1), pixels.stride(2), pixels.stride(3)},
        layout_{s.patch_height, s.patch_width, strides_[1], strides_[2], strides_[3]},
        tokens_(tokens),
        scale_(pointer<Acc>(normal.scale)),
        shift_(pointer<Acc>(normal.shift)) {}

  void pack_a(const Gemm& g, int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) const {
    const int64_t stride = count + 64 / static_cast<int64_t>(sizeof(T)), depth = round_up(count, g.k_unit);
    const Scratch stage(g.mr * stride * static_cast<int64_t>(sizeof(T)));
    for (int64_t first = 0; first < rows; first += g.mr) {
      const int64_t some = min_of(g.mr, rows - first);
      for (int64_t r = 0; r < some; ++r) gather(row + first + r, k, count, stage.as<T>() + r * stride);
      g.pack_a(stage.as<T>(), stride, 1, some, count, static_cast<char*>(panels) + first * depth * g.element_bytes);
    }
  }
  void pack_b_transposed(const Gemm& g, int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) const {
    const Scratch stage(count * rows * static_cast<int64_t>(sizeof(T)));
    for (int64_t t = 0; t < count; ++t) gather(k + t, row, rows, stage.as<T>() + t * rows);
    g.pack_b(stage.as<T>(), 1, rows, rows, count, panels);
  }

 private:
  void gather(int64_t index, int64_t k, int64_t count, T* target) const {
    const Token& token = tokens_[static_cast<size_t>(index)];
    const int64_t y = token.patch / shape_.grid_width, x = token.patch % shape_.grid_width;
    const int64_t offset =
        token.image * strides_[0] + y * shape_.patch_height * strides_[2] + x * shape_.patch_width * strides_[3];
    const int64_t element = bytes_ ? 1 : static_cast<int64_t>(sizeof(T));
    const PatchLoops& loops = patch_loops_for(dtype_of<T>());
    (bytes_ ? loops.gather_bytes : loops.gather)(pixels_ + offset * element, layout_, scale_, shift_, k, count, target);
  }

  const char* pixels_;
  bool bytes_;
  const PatchShape& shape_;
  int64_t strides_[4];
  PatchLayout layout_;
  const std::vector<Token>& tokens_;
  const Acc *scale_, *shift_;
};

}  // namespace pymm

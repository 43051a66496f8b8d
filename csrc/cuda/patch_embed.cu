// Patch embedding: gather, product and epilogue in one kernel, without a patch matrix.
//
// Forward is one product whose first operand is read from the pixels where they lie, normalized and rounded to the
// weight's type on the way, and whose results get bias, mask token and position before they are rounded. Backward: the
// weight's gradient is a product with the same pixels, the pixels' one whose results go where the pixels lie; the rest
// are sums over tokens in one order. Each is written by the block that owns it (gathered_product.h, patches.h). Bytes:
// pixels once per 64 channels and the weight once per 64 tokens (L2 serves the repeats), the result once.
#include "cuda/gathered_product.h"

namespace pymm::cuda {
namespace {

constexpr const char* kOp = "patch_embed";
constexpr int kThreads = 128, kSlices = 128;

// out[:, :P] = prefix, and position's first rows where it has them.
template <class T>
PYMM_GLOBAL void prefix_kernel(const T* prefix, const T* position, int64_t numbers, int64_t image, T* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= numbers) return;
  Accumulator<T> value = to_float(prefix[i]);
  if (position != nullptr) value += to_float(position[i]);
  out[static_cast<int64_t>(blockIdx.y) * image + i] = from_float(value, T{});
}

// The sums over images of the first `count` numbers of each: of prefix tokens, for either of two gradients; of others,
// for position's rows. Null: not wanted.
template <class T>
PYMM_GLOBAL void sum_images_kernel(const T* dout, int64_t images, int64_t image, int64_t count, int64_t of_prefix,
                                   T* dprefix, T* of_prefix_too, T* dposition) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  Accumulator<T> sum = 0;
  for (int64_t b = 0; b < images; ++b) sum += to_float(dout[b * image + i]);
  if (i >= of_prefix) {
    dposition[i - of_prefix] = from_float(sum, T{});
    return;
  }
  if (dprefix != nullptr) dprefix[i] = from_float(sum, T{});
  if (of_prefix_too != nullptr) of_prefix_too[i] = from_float(sum, T{});
}

// out[g, n] = the sum of the tokens of patch n, in their order, among the `count` tokens of group g.
template <class T>
PYMM_GLOBAL void sum_patches_kernel(Tokens<T> tokens, int64_t count, T* out) {
  const int64_t n = blockIdx.x, c = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x, group = blockIdx.z;
  if (c >= tokens.width) return;
  Accumulator<T> sum = 0;
  for (int64_t row = group * count; row < (group + 1) * count; ++row) {
    if (tokens.grid.keep[row] == n) sum += tokens.number(row, c);
  }
  out[(group * tokens.grid.patches + n) * tokens.width + c] = from_float(sum, T{});
}

// The sums over tokens, seen and masked ones apart: a slice of the tokens each, (slices, 2, C), then all slices.
template <class T>
PYMM_GLOBAL void sum_tokens_kernel(Tokens<T> tokens, Accumulator<T>* parts) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= tokens.width) return;
  Accumulator<T> sums[2] = {};
  for (int64_t row = blockIdx.y; row < tokens.rows; row += gridDim.y) {
    const Accumulator<T> value = to_float(tokens.at(row)[c]);
    const bool hidden = tokens.hidden(row);
    sums[0] += hidden ? Accumulator<T>(0) : value;
    sums[1] += hidden ? value : Accumulator<T>(0);
  }
  parts[(2 * blockIdx.y) * tokens.width + c] = sums[0];
  parts[(2 * blockIdx.y + 1) * tokens.width + c] = sums[1];
}
template <class T>
PYMM_GLOBAL void sum_slices_kernel(const Accumulator<T>* parts, int64_t slices, int64_t width, T* seen, T* masked) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (c >= width) return;
  Accumulator<T> sums[2] = {};
  for (int64_t i = 0; i < slices; ++i) {
    sums[0] += parts[2 * i * width + c];
    sums[1] += parts[(2 * i + 1) * width + c];
  }
  if (seen != nullptr) seen[c] = from_float(sums[0], T{});
  if (masked != nullptr) masked[c] = from_float(sums[1], T{});
}

unsigned blocks(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

bool at_16_bytes(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

// What forward and backward are called with, dense where the kernels need it.
struct Inputs {
  Inputs(const Tensor& pixels_in, const Tensor& weight_in, const std::optional<Tensor>& keep_in,
         const std::optional<Tensor>& mask_in, const std::optional<Tensor>& mean_in,
         const std::optional<Tensor>& std_in)
      : pixels(pixels_in),
        weight(dense(weight_in)),
        keep(optional(keep_in)),
        mask(optional(mask_in)),
        mean(optional(mean_in)),
        std(optional(std_in)) {
    STD_TORCH_CHECK(weight.dim() == 4 && pixels.dim() == 4 && pixels.size(1) == weight.size(1), kOp,
                    ": weight must be (C, Cin, ph, pw) and pixels (B, Cin, H, W)");
    const bool bytes = pixels.scalar_type() == ScalarType::Byte;
    STD_TORCH_CHECK(bytes || pixels.scalar_type() == weight.scalar_type(), kOp,
                    ": pixels must be uint8 or of weight's type");
    channels = weight.size(0);
    numbers = weight.size(1) * weight.size(2) * weight.size(3);
    STD_TORCH_CHECK(numbers <= INT32_MAX, kOp, ": a patch has too many numbers");
    grid = {pixels.size(0),
            0,
            0,
            pixels.size(3) / weight.size(3),
            weight.size(1),
            weight.size(2),
            weight.size(3),
            keep ? data<int64_t>(*keep) : nullptr};
    grid.patches = grid.columns * (pixels.size(2) / grid.height);
    grid.shown = keep ? keep->size(1) : grid.patches;
    for (const std::optional<Tensor>& t : {mean, std}) {
      STD_TORCH_CHECK(!t || (t->numel() == weight.size(1) && t->scalar_type() == accumulator_type(weight)), kOp,
                      ": mean and std must be Cin numbers of the accumulator's type");
    }
    STD_TORCH_CHECK(!mask || mask->numel() == grid.images * grid.patches, kOp, ": mask must be (B, N)");
    STD_TORCH_CHECK(!keep || (keep->size(0) == grid.images && keep->scalar_type() == ScalarType::Long), kOp,
                    ": keep must be (B, K) of int64");
  }
  static std::optional<Tensor> optional(const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(dense(*t)) : std::nullopt;
  }
  template <class V>
  static const V* pointer(const std::optional<Tensor>& t) {
    return t.has_value() ? data<V>(*t) : nullptr;
  }
  int64_t tokens() const { return grid.images * grid.shown; }
  const uint8_t* hidden() const { return mask ? data<uint8_t>(*mask) : nullptr; }

  template <class T>
  Pixels<T> pixels_of() const {
    using Acc = Accumulator<T>;
    Pixels<T> p{pixels.data_ptr(),
                pixels.scalar_type() == ScalarType::Byte,
                false,
                pixels.stride(0),
                pixels.stride(1),
                pixels.stride(2),
                pixels.stride(3),
                pointer<Acc>(mean),
                pointer<Acc>(std),
                grid,
                tokens(),
                numbers};
    const bool plain = !p.bytes && p.mean == nullptr && p.std == nullptr;
    p.eight = plain && p.column == 1 && grid.width % 8 == 0 && p.line % 8 == 0 && p.channel % 8 == 0 &&
              p.batch % 8 == 0 && at_16_bytes(pixels);
    return p;
  }
  template <class T>
  Matrix<T> weight_of() const {
    return {data<T>(weight), channels, numbers, numbers % 8 == 0 && at_16_bytes(weight)};
  }
  Tensor empty(std::vector<int64_t> sizes) const { return torch::stable::new_empty(weight, sizes); }

  Tensor pixels, weight;
  std::optional<Tensor> keep, mask, mean, std;
  Grid grid;
  int64_t channels, numbers;
};

Tensor forward(const Tensor& pixels, const Tensor& weight, const std::optional<Tensor>& bias_in,
               const std::optional<Tensor>& prefix_in, const std::optional<Tensor>& position_in,
               const std::optional<Tensor>& keep, const std::optional<Tensor>& mask,
               const std::optional<Tensor>& token_in, const std::optional<Tensor>& mean,
               const std::optional<Tensor>& std) {
  const Inputs in(pixels, weight, keep, mask, mean, std);
  const auto bias = Inputs::optional(bias_in), prefix = Inputs::optional(prefix_in);
  const auto position = Inputs::optional(position_in), token = Inputs::optional(token_in);
  for (const std::optional<Tensor>& t : {bias, prefix, position, token}) {
    STD_TORCH_CHECK(!t || (t->size(-1) == in.channels && t->scalar_type() == in.weight.scalar_type()), kOp,
                    ": bias, prefix, position and mask_token must have C channels and weight's type");
  }
  STD_TORCH_CHECK(!mask || token, kOp, ": mask_token must be given with mask");
  const int64_t before = prefix ? prefix->size(0) : 0, image = (before + in.grid.shown) * in.channels;
  STD_TORCH_CHECK(!position || position->size(0) == in.grid.patches || position->size(0) == before + in.grid.patches,
                  kOp, ": position must be (N, C) or (P+N, C)");
  const Stream stream(in.weight);
  Tensor out = in.empty({in.grid.images, before + in.grid.shown, in.channels});
  if (out.numel() == 0) return out;
  dispatch(in.weight, kOp, [&]<class T>() {
    const T* positions = Inputs::pointer<T>(position);
    const bool both = position && position->size(0) > in.grid.patches;
    if (before > 0) {
      PYMM_LAUNCH(prefix_kernel<T>, dim3(blocks(before * in.channels), static_cast<unsigned>(in.grid.images)),
                  dim3(kThreads), stream, data<T>(*prefix), both ? positions : nullptr, before * in.channels, image,
                  data<T>(out));
    }
    if (both) positions += before * in.channels;
    const StoreTokens<T> store{
        data<T>(out), Inputs::pointer<T>(bias), Inputs::pointer<T>(token), positions, in.hidden(), in.grid, before,
        in.channels};
    gathered_product<T, false, false>(stream, in.pixels_of<T>(), in.weight_of<T>(), store, in.tokens(), in.channels,
                                      in.numbers);
  });
  return out;
}

// The gradient of the pixels; patches that are not kept have none, and one that is kept twice has the sum.
template <class T>
void pixels_gradient(const Stream& stream, const Inputs& in, const Tokens<T>& tokens, Tensor& dpixels) {
  Grid every = in.grid;
  every.keep = nullptr;
  every.shown = every.patches;
  Pixels<T> place = in.pixels_of<T>();
  place.grid = every;
  const int64_t lines = in.pixels.size(2), columns = in.pixels.size(3), area = lines * columns;
  place.batch = in.grid.channels * area;
  place.channel = area;
  place.line = columns;
  place.column = 1;
  const StorePixels<T> store{place, data<T>(dpixels)};
  const int64_t rows = every.images * every.patches;
  if (!in.keep) {
    gathered_product<T, false, true>(stream, tokens, in.weight_of<T>(), store, rows, in.numbers, in.channels);
    return;
  }
  const Tensor sums = in.empty({rows, in.channels});
  if (sums.numel() > 0) {
    PYMM_LAUNCH(sum_patches_kernel<T>,
                dim3(static_cast<unsigned>(every.patches), blocks(in.channels), static_cast<unsigned>(every.images)),
                dim3(kThreads), stream, tokens, in.grid.shown, data<T>(sums));
  }
  const Matrix<T> of_patches{data<T>(sums), rows, in.channels, in.channels % 8 == 0 && at_16_bytes(sums)};
  gathered_product<T, false, true>(stream, of_patches, in.weight_of<T>(), store, rows, in.numbers, in.channels);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& dout_in, const Tensor& pixels, const Tensor& weight, const std::optional<Tensor>& keep,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& mean, const std::optional<Tensor>& std,
    int64_t prefix_rows, int64_t position_rows, bool need_pixels, bool need_weight, bool need_bias, bool need_prefix,
    bool need_position, bool need_token) {
  const Inputs in(pixels, weight, keep, mask, mean, std);
  const Tensor dout = dense(dout_in);
  const int64_t image = (prefix_rows + in.grid.shown) * in.channels, of_prefix = prefix_rows * in.channels;
  STD_TORCH_CHECK(dout.numel() == in.grid.images * image && dout.scalar_type() == in.weight.scalar_type(), kOp,
                  ": dout must have the shape and type of the result");
  const Stream stream(in.weight);
  const auto wanted = [&](bool need, std::vector<int64_t> sizes) {
    return need ? in.empty(std::move(sizes)) : in.empty({0});
  };
  const Tensor& w = in.weight;
  Tensor dpixels = wanted(need_pixels, {pixels.size(0), pixels.size(1), pixels.size(2), pixels.size(3)});
  Tensor dweight = wanted(need_weight, {w.size(0), w.size(1), w.size(2), w.size(3)});
  Tensor dbias = wanted(need_bias, {in.channels}), dtoken = wanted(need_token, {in.channels});
  Tensor dprefix = wanted(need_prefix, {prefix_rows, in.channels});
  Tensor dposition = wanted(need_position, {position_rows, in.channels});
  dispatch(in.weight, kOp, [&]<class T>() {
    using Acc = Accumulator<T>;
    Tokens<T> tokens{data<T>(dout),
                     in.hidden(),
                     in.grid,
                     prefix_rows,
                     in.tokens(),
                     in.channels,
                     in.channels % 8 == 0 && at_16_bytes(dout)};
    const bool both = need_position && position_rows > in.grid.patches;
    T* const of_patches = need_position ? data<T>(dposition) + (both ? of_prefix : 0) : nullptr;
    const bool kept = in.keep.has_value();
    const int64_t summed = need_position && !kept ? image : need_prefix || both ? of_prefix : 0;
    if (summed > 0) {
      PYMM_LAUNCH(sum_images_kernel<T>, dim3(blocks(summed)), dim3(kThreads), stream, data<T>(dout), in.grid.images,
                  image, summed, of_prefix, need_prefix ? data<T>(dprefix) : nullptr,
                  both ? data<T>(dposition) : nullptr, of_patches);
    }
    if (need_position && kept && in.grid.patches * in.channels > 0) {
      Tokens<T> unmasked = tokens;
      unmasked.mask = nullptr;
      PYMM_LAUNCH(sum_patches_kernel<T>, dim3(static_cast<unsigned>(in.grid.patches), blocks(in.channels)),
                  dim3(kThreads), stream, unmasked, in.tokens(), of_patches);
    }
    if ((need_bias || need_token) && in.channels > 0) {
      const int64_t slices = in.tokens() < kSlices ? in.tokens() : kSlices;
      const Tensor parts =
          torch::stable::new_empty(w, std::vector<int64_t>{slices, 2, in.channels}, accumulator_type(w));
      if (slices > 0) {
        PYMM_LAUNCH(sum_tokens_kernel<T>, dim3(blocks(in.channels), static_cast<unsigned>(slices)), dim3(kThreads),
                    stream, tokens, data<Acc>(parts));
      }
      PYMM_LAUNCH(sum_slices_kernel<T>, dim3(blocks(in.channels)), dim3(kThreads), stream, data<Acc>(parts), slices,
                  in.channels, need_bias ? data<T>(dbias) : nullptr, need_token ? data<T>(dtoken) : nullptr);
    }
    if (need_weight) {
      gathered_product<T, true, true>(stream, tokens, in.pixels_of<T>(), StoreMatrix<T>{data<T>(dweight), in.numbers},
                                      in.channels, in.numbers, in.tokens());
    }
    if (need_pixels) pixels_gradient(stream, in, tokens, dpixels);
  });
  return {dpixels, dweight, dbias, dprefix, dposition, dtoken};
}

}  // namespace
}  // namespace pymm::cuda

STABLE_TORCH_LIBRARY_IMPL(pymm_cuda, PYMM_DISPATCH_KEY, m) {
  m.impl("patch_embed", TORCH_BOX(&pymm::cuda::forward));
  m.impl("patch_embed_backward", TORCH_BOX(&pymm::cuda::backward));
}

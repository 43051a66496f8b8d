// The sigmoid loss of pairs: the mean over rows of sum_j log(1 + exp(-z_ij (s x^_i . y^_j + b))).
//
// Forward, parallel: a grid of groups of row tiles x groups of column tiles. On chip: a tile of logits, and one sum per
// thread; a block leaves one number, and these are added in one order. Bytes: the features once per tile, which L2
// serves. Backward: pair_gradient.h. Ragged edges: zeros that the sums leave out.
#include <cmath>
#include <limits>

#include "cuda/pair_gradient.h"

namespace pymm::cuda {
namespace {

constexpr const char* kSigmoid = "sigmoid_contrastive";

// All pairs of rows, whose logits are scale inv_x[i] inv_y[j] <x_i, y_j> + bias.
template <class T>
struct Pairs {
  using Acc = Accumulator<T>;
  Operand<T> x, y;
  const Acc *inv_x, *inv_y, *scale, *bias;
  int64_t depth;
};

// The loss of one pair and its derivative by -z (logit).
template <class Acc>
struct Judged {
  Acc sign, loss, sigmoid;
  PYMM_DEVICE Judged(Acc logit, bool partners) {
    sign = partners ? Acc(1) : Acc(-1);
    const Acc wrong = -sign * logit, small = exp(wrong < 0 ? wrong : -wrong);  // at most 1
    loss = (wrong > 0 ? wrong : Acc(0)) + log1p(small);
    sigmoid = (wrong >= 0 ? Acc(1) : small) / (Acc(1) + small);
  }
};

template <class T>
PYMM_GLOBAL PYMM_LAUNCH_BOUNDS(kTileThreads, kBlocksAtOnce<T>) void losses_kernel(Pairs<T> p, double* parts) {
  using Acc = Accumulator<T>;
  using Sums = PlainTile<T>;
  PYMM_DYNAMIC_SHARED(shared);
  const int64_t tiles_x = ceil_div(p.x.rows, Sums::kRows), tiles_y = ceil_div(p.y.rows, Sums::kColumns);
  const int64_t begin_x = tiles_x * blockIdx.y / gridDim.y, end_x = tiles_x * (blockIdx.y + 1) / gridDim.y;
  const int64_t begin_y = tiles_y * blockIdx.x / gridDim.x, end_y = tiles_y * (blockIdx.x + 1) / gridDim.x;
  const Acc scale = *p.scale, bias = *p.bias;
  Sums tile;
  double total = 0;
  for (int64_t row = begin_x * Sums::kRows; row < end_x * Sums::kRows; row += Sums::kRows) {
    for (int64_t column = begin_y * Sums::kColumns; column < end_y * Sums::kColumns; column += Sums::kColumns) {
      tile.multiply(p.x, row, p.y, column, p.depth, shared);
      Acc here = 0;
      tile.each([&](int m, int n, int half, int j, Acc& sum) {
        const int64_t r = row + Sums::row(m, half), c = column + Sums::column(n, j);
        if (r >= p.x.rows || c >= p.y.rows) return;
        here += Judged<Acc>(sum * p.inv_x[r] * p.inv_y[c] * scale + bias, r == c).loss;
      });
      total += static_cast<double>(here);
    }
  }
  total = block_sum<kTileThreads>(total);
  if (threadIdx.x == 0) parts[blockIdx.y * gridDim.x + blockIdx.x] = total;
}

// G = dlogits / (||x|| ||y||), and a tile's sums of dlogits cosine and of dlogits.
template <class T>
PYMM_GLOBAL PYMM_LAUNCH_BOUNDS(kTileThreads,
                               kBlocksAtOnce<T>) void gradients_kernel(Pairs<T> p, const Accumulator<T>* dloss,
                                                                       GradientBlock<T> g, Accumulator<T>* of_scale,
                                                                       Accumulator<T>* of_bias) {
  using Acc = Accumulator<T>;
  using Sums = PlainTile<T>;
  PYMM_DYNAMIC_SHARED(shared);
  const int64_t row = g.first_a + static_cast<int64_t>(blockIdx.y) * Sums::kRows;
  const int64_t column = g.first_c + static_cast<int64_t>(blockIdx.x) * Sums::kColumns;
  const Acc scale = *p.scale, bias = *p.bias, weight = *dloss / static_cast<Acc>(p.x.rows);
  Sums tile;
  tile.multiply(p.x, row, p.y, column, p.depth, shared);
  Acc sums[2] = {};
  tile.each([&](int m, int n, int half, int j, Acc& sum) {
    const int64_t r = row + Sums::row(m, half), c = column + Sums::column(n, j);
    if (r >= g.end_a || c >= g.end_c) return;
    const Acc factor = p.inv_x[r] * p.inv_y[c], cosine = sum * p.inv_x[r] * p.inv_y[c];
    const Judged<Acc> judged(cosine * scale + bias, r == c);
    const Acc d = -judged.sign * judged.sigmoid * weight;
    sums[0] += d * cosine;
    sums[1] += d;
    g.set(r, c, d * factor);
  });
  block_sums<kTileThreads>(sums);
  if (threadIdx.x == 0) {
    const int64_t part = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    of_scale[part] = sums[0];
    of_bias[part] = sums[1];
  }
}

template <class T>
struct Call {
  using Acc = Accumulator<T>;
  Tensor x, y, inv_x, inv_y, scale, bias;

  Call(const Stream& stream, const Tensor& x_in, const Tensor& y_in, const Tensor& scale_in, const Tensor& bias_in)
      : x(dense(x_in)),
        y(dense(y_in)),
        inv_x(torch::stable::new_empty(x, {x.size(0)}, accumulator_type(x))),
        inv_y(torch::stable::new_empty(y, {y.size(0)}, accumulator_type(x))),
        scale(scale_in),
        bias(bias_in) {
    STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(0) == y.size(0) && x.size(1) == y.size(1), kSigmoid,
                    ": x and y must be (N, E)");
    for (const Tensor* number : {&scale, &bias}) {
      STD_TORCH_CHECK(number->numel() == 1 && number->scalar_type() == accumulator_type(x), kSigmoid,
                      ": logit_scale and logit_bias must each be one accumulator");
    }
    inverse_norms<T>(stream, x, x.size(1), kSmallestNorm, inv_x);
    inverse_norms<T>(stream, y, y.size(1), kSmallestNorm, inv_y);
  }

  Pairs<T> pairs() const {
    const int64_t n = x.size(0), e = x.size(1);
    return {{data<T>(x), n, e},
            {data<T>(y), n, e},
            data<Acc>(inv_x),
            data<Acc>(inv_y),
            data<Acc>(scale),
            data<Acc>(bias),
            e};
  }
};

Tensor zeros(const Tensor& like, int64_t count) {
  Tensor out = torch::stable::new_empty(like, {count}, ScalarType::Double);
  return torch::stable::zero_(out);
}

Tensor forward(const Tensor& x, const Tensor& y, const Tensor& scale, const Tensor& bias) {
  const int64_t n = x.size(0);
  const Stream stream(x);
  Tensor loss = torch::stable::new_empty(scale, {});
  if (n == 0) return torch::stable::fill_(loss, std::numeric_limits<double>::quiet_NaN());
  dispatch(x, kSigmoid, [&]<class T>() {
    using Acc = Accumulator<T>;
    using Sums = PlainTile<T>;
    const Call<T> call(stream, x, y, scale, bias);
    const int64_t across = groups_of(n, Sums::kColumns), down = groups_of(n, Sums::kRows);
    const Tensor parts = torch::stable::new_empty(x, {across * down}, ScalarType::Double), total = zeros(x, 1);
    PYMM_LAUNCH_SHARED(losses_kernel<T>, grid_of(across, down), dim3(kTileThreads), Sums::kBytes, stream, call.pairs(),
                       data<double>(parts));
    PYMM_LAUNCH(add_sum_kernel<double>, dim3(1), dim3(kRowThreads), stream, data<double>(parts), across * down,
                data<double>(total));
    PYMM_LAUNCH(convert_kernel<Acc>, dim3(1), dim3(1), stream, data<double>(total), 1.0 / static_cast<double>(n),
                data<Acc>(loss));
  });
  return loss;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dloss, const Tensor& x, const Tensor& y,
                                                    const Tensor& scale, const Tensor& bias) {
  STD_TORCH_CHECK(dloss.numel() == 1 && dloss.scalar_type() == accumulator_type(x), kSigmoid,
                  ": dloss must be one accumulator");
  const int64_t n = x.size(0);
  const Stream stream(x);
  Tensor dx = torch::stable::new_empty(x, {n, x.size(1)}), dy = torch::stable::new_empty(x, {n, x.size(1)});
  Tensor dscale = torch::stable::new_empty(scale, {}), dbias = torch::stable::new_empty(bias, {});
  if (n == 0) return {dx, dy, torch::stable::zero_(dscale), torch::stable::zero_(dbias)};
  dispatch(x, kSigmoid, [&]<class T>() {
    using Acc = Accumulator<T>;
    using Sums = PlainTile<T>;
    const Call<T> call(stream, x, y, scale, bias);
    const Tensor totals = zeros(x, 2);
    std::optional<Tensor> parts;
    GradientRows<T> rows(stream, call.x, true), columns(stream, call.y, true);
    each_gradient_block<T>(stream, call.x, call.y, rows, columns, [&](const GradientBlock<T>& g) {
      const int64_t across = ceil_div(g.end_c - g.first_c, Sums::kColumns);
      const int64_t down = ceil_div(g.end_a - g.first_a, Sums::kRows), count = across * down;
      if (!parts) parts = torch::stable::new_empty(x, {2, count}, accumulator_type(x));
      Acc* const of_scale = data<Acc>(*parts);
      PYMM_LAUNCH_SHARED(gradients_kernel<T>, grid_of(across, down), dim3(kTileThreads), Sums::kBytes, stream,
                         call.pairs(), data<Acc>(dloss), g, of_scale, of_scale + count);
      for (int i = 0; i < 2; ++i) {
        PYMM_LAUNCH(add_sum_kernel<Acc>, dim3(1), dim3(kRowThreads), stream, of_scale + i * count, count,
                    data<double>(totals) + i);
      }
    });
    dx = rows.finish(stream, data<Acc>(call.inv_x), kSmallestNorm, data<Acc>(scale));
    dy = columns.finish(stream, data<Acc>(call.inv_y), kSmallestNorm, data<Acc>(scale));
    PYMM_LAUNCH(convert_kernel<Acc>, dim3(1), dim3(1), stream, data<double>(totals), 1.0, data<Acc>(dscale));
    PYMM_LAUNCH(convert_kernel<Acc>, dim3(1), dim3(1), stream, data<double>(totals) + 1, 1.0, data<Acc>(dbias));
  });
  return {dx, dy, dscale, dbias};
}

}  // namespace
}  // namespace pymm::cuda

STABLE_TORCH_LIBRARY_IMPL(pymm_cuda, PYMM_DISPATCH_KEY, m) {
  m.impl("sigmoid_contrastive", TORCH_BOX(&pymm::cuda::forward));
  m.impl("sigmoid_contrastive_backward", TORCH_BOX(&pymm::cuda::backward));
}

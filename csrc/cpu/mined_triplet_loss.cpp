// Triplet loss of mined triplets: the mean of max(0, margin + s(a, n) - s(a, p)) over what the miner selects, s the
// cosine.
//
// Two roads, each described in its header: "hard" in one pass over tiles, with a sparse backward (mining_hard.h);
// "semi-hard" and "all" in panels of anchors, once more in backward (mining_panels.h). Neither holds N x N numbers.
#include "cpu/mining_hard.h"
#include "cpu/mining_panels.h"

namespace pymm {
namespace {

constexpr const char* kOp = "mined_triplet_loss";
enum class Mining { hard, semi_hard, all };

Mining mining_of(const std::string& name) {
  if (name == "hard") return Mining::hard;
  if (name == "semi-hard") return Mining::semi_hard;
  PYMM_CHECK(name == "all", kOp, ": mining must be 'hard', 'semi-hard' or 'all'");
  return Mining::all;
}

struct Inputs {
  Inputs(const Tensor& x_in, const std::optional<Tensor>& y_in, const Tensor& labels_in)
      : x(dense(x_in)), labels(dense(labels_in)) {
    PYMM_CHECK(x.dim() == 2, kOp, ": x must be (N, D)");
    n = x.size(0);
    d = x.size(1);
    PYMM_CHECK(labels.dim() == 1 && labels.size(0) == n && labels.scalar_type() == ScalarType::Long, kOp,
               ": labels must be (N,) of int64");
    PYMM_CHECK(n < std::numeric_limits<int32_t>::max(), kOp, ": x has too many rows");
    if (y_in.has_value()) {
      y = dense(*y_in);
      PYMM_CHECK(y->dim() == 2 && y->size(0) == n && y->size(1) == d && y->scalar_type() == x.scalar_type(), kOp,
                 ": y must have the shape and type of x");
    }
    dtype = dtype_of(x, kOp);
    if (d == 0) widen_nothing();
  }
  // Rows of no numbers are rows of one zero: every cosine is 0.
  void widen_nothing() {
    x = zeros({n, 1}, x);
    if (y) y = zeros({n, 1}, *y);
    d = 1;
  }
  template <class T>
  Side<T> side(const Tensor& rows, const Tensor& inverse) const {
    return {data<T>(rows), data<Accumulator<T>>(inverse), n, d};
  }

  Tensor x, labels;
  std::optional<Tensor> y;
  int64_t n, d;
  DType dtype;
};

// Inverse norms of the rows, and whether all of them are finite: a NaN must reach the loss, and no comparison of the
// miners would let it.
template <class T>
bool inverse_norms(const T* rows, int64_t n, int64_t d, Accumulator<T>* inverse) {
  using Acc = Accumulator<T>;
  std::atomic<bool> finite{true};
  parallel_ranges(n, 64, [&](int64_t begin, int64_t end) {
    const Rows& rows_of = rows_for(dtype_of<T>());
    rows_of.inverse_norms(rows + begin * d, d, end - begin, d, kSmallestNorm, inverse + begin);
    Scratch row(max_of(1, d) * static_cast<int64_t>(sizeof(Acc)));
    for (int64_t i = begin; i < end; ++i) {
      // Only a row of zeros, of huge or of broken numbers has one of these.
      if (inverse[i] > 0 && norm_is_free(inverse[i])) continue;
      rows_of.widen(rows + i * d, 1, d, row.as<Acc>());
      for (int64_t c = 0; c < d; ++c) {
        if (!std::isfinite(row.as<Acc>()[c])) finite = false;
      }
    }
  });
  return finite;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& y,
                                                           const Tensor& labels, double margin, std::string mining) {
  const Inputs in(x, y, labels);
  const Mining kind = mining_of(mining);
  const ScalarType acc_type = accumulator_type(in.dtype);
  const int64_t anchors = in.y ? 2 * in.n : in.n;
  Tensor loss = empty({}, in.x, acc_type), count = empty({}, in.labels);
  Tensor triplets = empty({kind == Mining::hard ? anchors : 0, 2}, in.labels);
  Tensor inv_x = empty({in.n}, in.x, acc_type), inv_y = empty({in.y ? in.n : 0}, in.x, acc_type);
  dispatch(in.dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    bool finite = inverse_norms<T>(data<T>(in.x), in.n, in.d, data<Acc>(inv_x));
    if (in.y) finite &= inverse_norms<T>(data<T>(*in.y), in.n, in.d, data<Acc>(inv_y));
    Mined mined;
    if (in.n > 0) {
      const Labels groups(data<int64_t>(in.labels), in.n);
      const Side<T> xs = in.side<T>(in.x, inv_x), ys = in.y ? in.side<T>(*in.y, inv_y) : xs;
      const bool crossed = in.y.has_value();
      if (kind == Mining::hard) {
        mined = mine_hard<T>(xs, crossed ? &ys : nullptr, groups, margin, data<int64_t>(triplets));
      } else {
        const bool semi_hard = kind == Mining::semi_hard;
        mined = Panels<T>(xs, ys, crossed, groups, margin, semi_hard).loss();
        if (crossed) {
          const Mined back = Panels<T>(ys, xs, crossed, groups, margin, semi_hard).loss();
          mined = {mined.loss + back.loss, mined.count + back.count};
        }
      }
    }
    const double mean = mined.loss / static_cast<double>(max_of(1, mined.count));
    *data<Acc>(loss) = finite ? static_cast<Acc>(mean) : std::numeric_limits<Acc>::quiet_NaN();
    *data<int64_t>(count) = mined.count;
  });
  return {loss, count, triplets, inv_x, inv_y};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dloss, const Tensor& x, const std::optional<Tensor>& y,
                                    const Tensor& labels, const Tensor& count, const Tensor& triplets_in,
                                    const Tensor& inv_x, const Tensor& inv_y, double margin, std::string mining) {
  const Inputs in(x, y, labels);
  const Mining kind = mining_of(mining);
  const Tensor triplets = dense(triplets_in);
  const bool crossed = in.y.has_value();
  const ScalarType acc_type = accumulator_type(in.dtype);
  PYMM_CHECK(dloss.numel() == 1 && dloss.scalar_type() == acc_type && count.numel() == 1 &&
                 count.scalar_type() == ScalarType::Long && inv_x.numel() == in.n && inv_x.scalar_type() == acc_type &&
                 inv_y.numel() == (crossed ? in.n : 0) && inv_y.scalar_type() == acc_type && inv_x.is_contiguous() &&
                 inv_y.is_contiguous(),
             kOp, ": dloss and the statistics must be those of forward");
  Tensor dx = empty({x.size(0), x.size(1)}, x), dy = crossed ? empty({x.size(0), x.size(1)}, x) : empty({0}, x);
  dispatch(in.dtype, [&]<class T>() {
    using Acc = Accumulator<T>;
    if (dx.numel() == 0) return;
    const double selected = static_cast<double>(max_of(1, *data<int64_t>(count)));
    const double g = static_cast<double>(*data<Acc>(dloss)) / selected;
    const Side<T> xs = in.side<T>(in.x, inv_x), ys = crossed ? in.side<T>(*in.y, inv_y) : xs;
    if (kind == Mining::hard) {
      const int64_t anchors = crossed ? 2 * in.n : in.n;
      PYMM_CHECK(triplets.numel() == 2 * anchors && triplets.scalar_type() == ScalarType::Long, kOp,
                 ": triplets must be (anchors, 2)");
      for (int64_t i = 0; i < 2 * anchors; ++i) {
        PYMM_CHECK(data<int64_t>(triplets)[i] >= -1 && data<int64_t>(triplets)[i] < in.n, kOp,
                   ": a triplet is out of range");
      }
      hard_gradient<T>(xs, crossed ? &ys : nullptr, data<int64_t>(triplets), g, data<T>(dx), data<T>(dy));
      return;
    }
    const Labels groups(data<int64_t>(in.labels), in.n);
    const bool semi_hard = kind == Mining::semi_hard;
    std::vector<Acc> t_x(static_cast<size_t>(in.n * in.d)), t_y(crossed ? t_x.size() : 0);
    Acc* of_y = crossed ? t_y.data() : t_x.data();
    Panels<T>(xs, ys, crossed, groups, margin, semi_hard).gradient(t_x.data(), of_y);
    if (crossed) Panels<T>(ys, xs, crossed, groups, margin, semi_hard).gradient(of_y, t_x.data());
    finish_gradient<T>(xs, g, t_x.data(), data<T>(dx));
    if (crossed) finish_gradient<T>(ys, g, of_y, data<T>(dy));
  });
  return {dx, dy};
}

}  // namespace
}  // namespace pymm

STABLE_TORCH_LIBRARY_IMPL(pymm, CPU, m) {
  m.impl("mined_triplet_loss", TORCH_BOX(&pymm::forward));
  m.impl("mined_triplet_loss_backward", TORCH_BOX(&pymm::backward));
}

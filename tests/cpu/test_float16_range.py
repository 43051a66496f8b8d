"""float16 at both ends of its range: what is computed on the way may lie beyond them, the results do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pymm import ops
from pymm.ops import attention, info_nce, linear, sigmoid_contrastive
from pymm.ops._extension import EXTENSION
from tests.ops.harness import instruction_set

ISAS = EXTENSION.available_isas() if EXTENSION is not None else []
every_isa = pytest.mark.parametrize("isa", ISAS)
BOUND = 4 * torch.finfo(torch.float16).eps  # relative to the largest of a row


def halves(*shape: int, size: float | Tensor = 1.0) -> Tensor:
    return (torch.randn(*shape) * size).to(torch.float16)


def gradients(function: Callable[..., Tensor], dout: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    leaves = [a.detach().requires_grad_() for a in args]
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, dout.to(out.dtype))


def true_gradients(function: Callable[..., Tensor], dout: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
    with ops.backend("reference"):
        return gradients(function, dout.double(), *(a.double() for a in args))


def assert_rows_close(got: Tensor, truth: Tensor, bound: float = BOUND) -> None:
    """Row by row, so that the large ones do not hide the small; the truth must be where float16 is dense."""
    sizes = truth.abs().amax(-1)
    assert sizes.min() > 2**-14, "a bad example"
    assert sizes.max() < 2**15, "a bad example"
    assert bool(got.isfinite().all())
    worst = ((got.double() - truth).abs().amax(-1) / sizes).max().item()
    assert worst <= bound, f"error {worst:.2e}, allowed {bound:.2e}"


@every_isa
def test_subnormal_numbers_count_in_full(isa: str) -> None:
    torch.manual_seed(0)
    x, weight = halves(40, 96, size=2**-21), halves(33, 96, size=256)
    assert bool((x.abs() < 2**-14).all())
    with instruction_set(isa):
        got = linear(x, weight)
    assert_rows_close(got, x.double() @ weight.double().T)


@every_isa
@pytest.mark.parametrize("norms", ["large", "small", "apart"])
@pytest.mark.parametrize("loss", [info_nce, sigmoid_contrastive])
def test_gradients_of_a_mean_over_many_pairs(
    loss: Callable[..., Tensor], norms: str, isa: str, poisoned
) -> None:
    """G = dS / (‖x‖ ‖y‖) is below float16, or above, or both in one tile."""
    torch.manual_seed(1)
    n = 300
    apart = torch.logspace(-2, 3, n)[torch.randperm(n), None]
    size = {"large": torch.tensor(1000.0), "small": torch.tensor(1e-3), "apart": apart}[norms]
    x, y = halves(n, 40, size=size), halves(n, 40, size=size)
    dloss = torch.tensor({"large": 2.0**14, "small": 2.0**4, "apart": 2.0**11}[norms])
    scale, bias = torch.tensor(10.0), torch.tensor(-5.0)

    def function(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        more = (bias.to(scale.dtype),) if loss is sigmoid_contrastive else ()
        return loss(x, y, scale, *more)

    truth = true_gradients(function, dloss, x, y, scale)
    with instruction_set(isa):
        got = gradients(function, dloss, x, y, scale)
    assert got[2].item() == pytest.approx(truth[2].item(), rel=1e-2)
    for i in range(2):
        keep = (truth[i].abs().amax(-1) > 2**-14) & (truth[i].abs().amax(-1) < 2**15)
        assert keep.sum() > n / 2
        assert_rows_close(got[i][keep], truth[i][keep], 4 * BOUND)


@every_isa
@pytest.mark.parametrize("zero", ["x", "y"])
def test_a_row_of_zeros_leaves_the_others_alone(zero: str, isa: str) -> None:
    """Its factor is 1 / eps, beside which every other row's vanishes."""
    torch.manual_seed(2)
    x, y = halves(64, 24), halves(64, 24)
    (x if zero == "x" else y)[7] = 0
    rows = torch.arange(64) != 7
    dloss, scale = torch.tensor(2.0**8), torch.tensor(5.0)
    truth = true_gradients(info_nce, dloss, x, y, scale)
    with instruction_set(isa):
        got = gradients(info_nce, dloss, x, y, scale)
    for i in range(2):
        assert_rows_close(got[i][rows], truth[i][rows], 4 * BOUND)


@every_isa
@pytest.mark.parametrize("case", ["below", "above"])
@pytest.mark.parametrize("columns", [90, 300])
def test_gradient_of_scores_beyond_the_range(case: str, columns: int, isa: str, poisoned) -> None:
    torch.manual_seed(3)
    t, d = 70, 64
    sizes = {"below": (1e-4, 1e4, 1.0, 1e-6), "above": (100.0, 0.003, 1e3, 1e4)}[case]
    q, k, v, dout = (
        halves(1, 2, n, d, size=size) for n, size in zip((t, columns, columns, t), sizes, strict=True)
    )
    (truth, *_), dp = true_gradients(attention, dout, q, k, v), dout.double() @ v.double().mT
    assert dp.abs().max() / columns < 2**-20 if case == "below" else dp.abs().median() / columns > 65504
    with instruction_set(isa):
        got, *_ = gradients(attention, dout, q, k, v)
    assert_rows_close(got, truth, 4 * BOUND)


@every_isa
def test_dropout_that_keeps_next_to_nothing(isa: str) -> None:
    """1 / (1 - p) alone is beyond float16."""
    torch.manual_seed(4)
    q, k, v, dout = (
        halves(1, 8, 100, 32),
        halves(1, 8, 400, 32),
        halves(1, 8, 400, 32, size=0.1),
        halves(1, 8, 100, 32),
    )

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(11)
        return attention(q, k, v, dropout_p=0.99999)

    with ops.backend("reference"):
        expected = function(q.double(), k.double(), v.double())
    truth = true_gradients(function, dout, q, k, v)
    assert 0 < int((expected.abs().amax(-1) > 0).sum()) < 20
    with instruction_set(isa):
        got = [function(q, k, v), *gradients(function, dout, q, k, v)]
    for a, b in zip(got, [expected, *truth], strict=True):
        assert bool(a.isfinite().all())
        assert (a.double() - b).abs().max() <= BOUND * b.abs().max()

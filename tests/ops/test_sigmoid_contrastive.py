"""sigmoid_contrastive against SigLIP's formula, and its promises beyond those of every op."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pymm import ops
from pymm.ops import sigmoid_contrastive
from tests.ops.memory import peak_beside_gradients
from tests.ops.test_info_nce import assert_same, features, gradients


@pytest.fixture(params=("auto", "reference"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.backend(request.param):
        yield request.param


def siglip_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Algorithm 1 of the paper, and open_clip's SigLipLoss."""
    logits = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T * scale + bias
    labels = 2 * torch.eye(image.shape[0], dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / image.shape[0]


@pytest.mark.parametrize("n", [1, 6, 131, 300])
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (117.0, -12.9), (0.0, 0.3), (-3.0, 20.0)])
def test_equals_siglip(backend: str, n: int, scale: float, bias: float) -> None:
    leaves = [*features(n, n), torch.tensor(scale), torch.tensor(bias)]
    truth = [t.double().requires_grad_() for t in leaves]
    mine = [t.clone().requires_grad_() for t in leaves]
    expected = siglip_loss(*truth)
    got = sigmoid_contrastive(*mine)
    assert_same(got, expected)
    for a, b in zip(gradients(got, *mine), gradients(expected, *truth), strict=True):
        assert_same(a, b, 2e-5 if scale > 100 else 1e-5)


def test_small_losses_keep_their_digits() -> None:
    x = torch.eye(2)
    got = sigmoid_contrastive(x, x, 60.0, -30.0)
    expected = 2 * torch.tensor(-30.0, dtype=torch.float64).exp().log1p()
    assert abs(got.item() / expected.item() - 1) < 1e-5


def test_nothing(backend: str) -> None:
    x, y = (t.requires_grad_() for t in features(0, 0))
    loss = sigmoid_contrastive(x, y, 1.0, 0.0)
    assert loss.isnan()
    assert gradients(loss, x)[0].shape == x.shape


def test_nan_is_not_hidden(backend: str) -> None:
    x, y = features(40, 40)
    x[17, 3] = torch.nan
    assert sigmoid_contrastive(x, y, 10.0, -10.0).isnan()


def test_second_derivatives() -> None:
    x, y = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, -1.0))
    assert torch.autograd.gradgradcheck(sigmoid_contrastive, (x, y, scale, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_on_a_rerun(dtype: torch.dtype, threads) -> None:
    leaves = [torch.randn(700, 40).to(dtype).requires_grad_() for _ in range(2)]
    leaves += [torch.tensor(v, requires_grad=True) for v in (30.0, -10.0)]

    def run() -> list[Tensor]:
        loss = sigmoid_contrastive(*leaves)
        return [loss, *gradients(loss, *leaves)]

    for count in (1, 2, 3):
        threads(count)
        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to tell")
def test_memory() -> None:
    assert (
        peak_beside_gradients("sigmoid_contrastive", 8192, 512, "bfloat16", [10.0, -10.0], threads=2) < 20e6
    )


X = torch.randn(4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, "x must be (N, E), got (4,)"),
        ({"y": torch.zeros(5, 8)}, "y must be (4, 8), got (5, 8)"),
        ({"y": X.bfloat16()}, "y must be of x's type torch.float32, got torch.bfloat16"),
        ({"logit_scale": torch.ones(2)}, "logit_scale must be a number or a tensor of one element, got (2,)"),
        ({"logit_bias": None}, "logit_bias must be a number or a tensor of one element, got NoneType"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        sigmoid_contrastive(**{"x": X, "y": X, "logit_scale": 1.0, "logit_bias": 0.0, **change})
    assert str(error.value).startswith(f"sigmoid_contrastive: {message}")

"""The warp's instructions and the emulation that stands for them: values, and faults that must be noticed."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.compiled import FOLDER, load_emulated

NONE, NO_WAIT, NO_BARRIER, HALF_WARP, NO_COMMIT = range(5)


@pytest.fixture(scope="module")
def primitives(tmp_path_factory):
    load_emulated([FOLDER / "primitives.cu"], tmp_path_factory.mktemp("primitives"))
    return torch.ops.pymm_primitives


def operands(depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(16, depth).to(dtype), torch.randn(depth, 16).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("depth", [32, 40, 96])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
def test_product_of_a_warp(primitives, dtype, depth, a_transposed, b_transposed) -> None:
    a, b = operands(depth, dtype)
    in_memory = a.mT.contiguous() if a_transposed else a, b if b_transposed else b.mT.contiguous()
    got = primitives.product(*in_memory, a_transposed, b_transposed, NONE)
    torch.testing.assert_close(got.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_shuffles_and_sums(primitives) -> None:
    x = torch.randn(32)
    total, largest, of_four, rotated, positive = primitives.warp(x)
    torch.testing.assert_close(total, x.sum().expand(32))
    assert torch.equal(largest, x.max().expand(32))
    torch.testing.assert_close(of_four, x.reshape(8, 4).sum(1).repeat_interleave(4))
    assert torch.equal(rotated, x.roll(-1))
    assert torch.equal(positive, (x > 0).cumsum(0) - (x > 0).float())


def test_a_missing_barrier_shows_in_the_result(primitives) -> None:
    a, b = operands(32, torch.bfloat16)
    got = primitives.product(a, b.mT.contiguous(), False, False, NO_BARRIER)
    assert not torch.allclose(got.double(), a.double() @ b.double(), rtol=1e-2)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (NO_WAIT, "ended before its asynchronous copies"),
        (NO_COMMIT, "ended before its asynchronous copies"),
        (HALF_WARP, "lanes of a warp disagree|never come"),
    ],
)
def test_faults_raise(primitives, fault: int, message: str) -> None:
    a, b = operands(32, torch.float16)
    with pytest.raises(RuntimeError, match=message):
        primitives.product(a, b.mT.contiguous(), False, False, fault)
    torch.testing.assert_close(  # the emulation is usable again
        primitives.product(a, b.mT.contiguous(), False, False, NONE).double(),
        a.double() @ b.double(),
        rtol=1e-5,
        atol=1e-5,
    )

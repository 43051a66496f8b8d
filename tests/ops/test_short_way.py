"""Public functions reach the kernel the short way, unless something else has to see the op."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pymm import ops
from pymm.ops import _autograd
from pymm.ops._record import REGISTRY, Sample, entry
from tests.ops.harness import samples


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(5, 7), torch.randn(4, 7), torch.randn(4)


def gradients(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = ops.linear(*leaves, "gelu")
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def test_is_there() -> None:
    assert _autograd._SHORT, "torch has renamed what the short way is made of"


def test_equals_the_long_way(inputs: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    short = gradients(*inputs)
    monkeypatch.setattr(_autograd, "_SHORT", False)
    long = gradients(*inputs)
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)


def test_records_only_what_is_asked_for(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    weight.requires_grad_()
    assert ops.linear(x, weight).requires_grad
    assert not ops.linear(x, weight.detach()).requires_grad
    with torch.no_grad():
        assert not ops.linear(x, weight).requires_grad
    with torch.inference_mode():
        assert ops.linear(x, weight).is_inference()


def test_second_derivatives(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias = (t.double().requires_grad_() for t in inputs)
    assert torch.autograd.gradgradcheck(lambda *a: ops.linear(*a, "gelu"), (x, weight, bias))


def test_a_dispatch_mode_sees_forward_and_backward(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with Seen() as mode:
        gradients(*inputs)
    assert "pymm.linear.default" in mode.names
    assert "pymm.linear_backward.default" in mode.names


def test_a_function_mode_and_a_subclass_see_the_op(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with Functions() as mode:
        ops.linear(*inputs)
    assert "pymm.linear.default" in mode.names
    Subclass.seen.clear()
    out = ops.linear(inputs[0].as_subclass(Subclass), *inputs[1:])
    assert isinstance(out, Subclass)
    assert "pymm.linear.default" in Subclass.seen


def test_traces_hold_the_op(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    for pre_dispatch in (False, True):
        graph = make_fx(lambda x: ops.linear(x, *inputs[1:]), pre_dispatch=pre_dispatch)(inputs[0])
        assert "torch.ops.pymm.linear.default" in graph.code
    x = inputs[0].clone().requires_grad_()
    traced = torch.jit.trace(lambda x: ops.linear(x, *inputs[1:]), (x,))
    assert "pymm::linear" in str(traced.graph)


def test_forward_mode_and_transforms_are_no_silent_zero(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            ops.linear(dual, weight)
        ops.linear(x, weight)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: ops.linear(x, weight), (x,), (x,))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.jacrev(torch.func.jacrev(lambda x: ops.linear(x, weight).pow(2).sum()))(x)


DIFFERENTIABLE = sorted(name for name, op in REGISTRY.items() if op.backward is not None)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_torch_func_differentiates(name: str) -> None:
    op = REGISTRY[name]
    compared = 0
    for sample in samples(op, torch.float64):
        x, *others = sample.args
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
            continue

        def loss(x: Tensor, others: list[Any] = others, sample: Sample = sample) -> Tensor:
            torch.manual_seed(1)
            got = op.function(x, *others, **sample.kwargs)
            parts = got if isinstance(got, (tuple, list)) else (got,)
            return sum(p.square().sum() for p in parts if p.is_floating_point() and p.requires_grad)

        leaf = x.detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(x), expected, equal_nan=True)
        compared += 1
    assert compared


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_per_sample(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias = inputs

    def loss(function: Any, weight: Tensor, x: Tensor) -> Tensor:
        return function(x, weight, bias).square().sum()

    got, expected = (
        torch.func.vmap(torch.func.grad(partial(loss, function)), (None, 0))(weight, x)
        for function in (ops.linear, torch.nn.functional.linear)
    )
    assert got.shape == (5, 4, 7)
    torch.testing.assert_close(got, expected)


def test_a_backend_without_a_gradient_is_the_op_alone() -> None:
    assert entry("cpu", "cosine_topk").op is torch.ops.pymm.cosine_topk.default

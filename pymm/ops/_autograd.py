"""How an op's gradient is connected, and the short way to it.

The dispatcher's way serves every caller: direct calls of the torch op, `torch.compile`, export, transforms,
modes. It enters Python once for autograd and once more for the kernel's redispatch, which costs more than a
small op itself; the public functions take the short way where nothing but autograd watches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

if TYPE_CHECKING:
    from pymm.ops._record import Op

# What torch.library itself uses to reach a kernel below autograd; without one of them there is no short way.
_NAMES = (
    "_AutoDispatchBelowAutograd",
    "_are_functorch_transforms_active",
    "_get_tracing_state",
    "_is_torch_function_mode_enabled",
    "_len_torch_dispatch_stack",
)
_SHORT = all(hasattr(torch._C, name) for name in _NAMES) and hasattr(forward_ad, "_current_level")


@dataclass(frozen=True)
class Entry:
    """The ways to a torch op.

    Args:
        op: through the dispatcher.
        node: straight to autograd's graph.
        transformed: the same for `torch.func`, whose form of a Function costs more.
    """

    op: Callable[..., Any]
    node: type[torch.autograd.Function] | None = None
    transformed: type[torch.autograd.Function] | None = None

    def __call__(self, *arguments: Any) -> Any:
        recorded = _recorded(arguments)
        if recorded is None:
            if self.transformed is not None and _transforms():
                return self.transformed.apply(*arguments)
            return self.op(*arguments)
        if not recorded:
            return _below(self.op, arguments)
        return self.op(*arguments) if self.node is None else self.node.apply(*arguments)


def _recorded(arguments: tuple[Any, ...]) -> bool | None:
    """Whether autograd records a call; None where something else may watch it, and it goes the long way."""
    if torch.compiler.is_compiling() or not _SHORT:
        return None
    state = torch._C
    if state._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        _refuse_tangents(arguments)
        return None
    if (
        state._len_torch_dispatch_stack() != 0
        or state._is_torch_function_mode_enabled()
        or state._get_tracing_state() is not None
    ):
        return None
    recorded = False
    for x in arguments:
        kind = type(x)
        if kind is Tensor or kind is Parameter:
            recorded = recorded or x.requires_grad
        elif isinstance(x, Tensor):
            return None
    return recorded and torch.is_grad_enabled()


def _transforms() -> bool:
    return not torch.compiler.is_compiling() and _SHORT and torch._C._are_functorch_transforms_active()


def _refuse_tangents(arguments: tuple[Any, ...]) -> None:
    """Without this, a derivative in forward mode would silently be zero."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) or any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in arguments
    ):
        raise NotImplementedError(
            "pymm.ops: expected no forward-mode differentiation, which the ops do not have, got a tensor with"
            " a tangent; use reverse mode"
        )


def connect(library: torch.library.Library, namespace: str, op: Op) -> Entry:
    """Make an op and its backward op differentiable in a namespace."""
    forward = _overload(namespace, op.name)
    if op.backward is None:
        return Entry(forward, None)
    assert op.setup_context is not None
    assert op.backward_call is not None
    setup_context, backward_call = op.setup_context, op.backward_call
    run = _double_backward(library, namespace, f"{op.name}_backward", op.backward.reference)

    def backward(ctx: Any, *grads: Any) -> Any:
        return backward_call(ctx, run, *grads)

    torch.library.register_autograd(
        f"{namespace}::{op.name}", backward, setup_context=setup_context, lib=library
    )

    def record(ctx: Any, *arguments: Any) -> Any:
        output = _below(forward, arguments)
        setup_context(ctx, arguments, output)
        return output

    parts = {"forward": staticmethod(record), "backward": staticmethod(backward)}
    node = type(f"{namespace}_{op.name}", (torch.autograd.Function,), parts)
    return Entry(forward, node, _transformed(forward, setup_context, backward))


def _transformed(
    op: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    parts = {
        "forward": staticmethod(lambda *arguments: _below(op, arguments)),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    return type("transformed", (torch.autograd.Function,), parts)


def _below(op: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def _overload(namespace: str, name: str) -> Callable[..., Any]:
    overload: Callable[..., Any] = getattr(getattr(torch.ops, namespace), name).default
    return overload


def _double_backward(
    library: torch.library.Library, namespace: str, name: str, reference: Callable[..., Any]
) -> Entry:
    """Differentiate a backward op through its reference formula, which is plain torch."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.layout = tuple(None if isinstance(x, torch.Tensor) else (x,) for x in inputs)

    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        arguments = [next(saved) if slot is None else slot[0] for slot in ctx.layout]
        with torch.enable_grad():
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
            for i in wanted:
                arguments[i] = arguments[i].detach().requires_grad_()
            outputs = reference(*arguments)
            outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [arguments[i] for i in wanted],
                [g for _, g in pairs],
                allow_unused=True,
            )
        result: list[Any] = [None] * len(arguments)
        for i, gradient in zip(wanted, found, strict=True):
            result[i] = gradient
        return tuple(result)

    torch.library.register_autograd(
        f"{namespace}::{name}", backward, setup_context=setup_context, lib=library
    )
    op = _overload(namespace, name)
    return Entry(op, None, _transformed(op, setup_context, backward))

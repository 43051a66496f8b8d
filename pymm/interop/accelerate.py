"""pymm's ops inside the models of other libraries."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pymm.interop import transformers_attention
from pymm.interop.patterns import (
    ACTIVATION,
    FACTS,
    LINEAR,
    PATTERNS,
    Pattern,
    pairs,
    parameters_of,
)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class AccelerateReport:
    """What `accelerate` did.

    Args:
        changed: names of modules, each with the part that an op of pymm computes now.
        left: names of modules that looked alike and were left, each with the reason.
    """

    changed: dict[str, str]
    left: dict[str, str]
    _model: nn.Module = field(repr=False)

    def undo(self) -> None:
        """`restore` the model."""
        restore(self._model)

    def __str__(self) -> str:
        counts = Counter(self.changed.values())
        lines = [f"{part}: {count} modules run pymm's ops" for part, count in counts.items()]
        kinds = Counter(self.left.values())
        first = {reason: name for name, reason in reversed(self.left.items())}
        lines += [f"left, {count} like {first[reason]}: {reason}" for reason, count in kinds.items()]
        return "\n".join(lines) or "nothing to change"


def accelerate(model: nn.Module) -> AccelerateReport:
    """Let a model of timm, transformers, open_clip or torchvision compute with pymm's ops.

    Patch embeddings, attention, linear layers with the activation behind them, and open_clip's contrastive
    loss are swapped in place; the rest runs as before. Parameters, their names, hooks and the training mode
    stay as they are, dropout and drop path too, and results change by rounding only (under attention dropout,
    the random numbers are others). Modules are known by what they are made of, and where that leaves doubt, a
    copy with random weights has to give the same result before the swap is made. A linear layer with its
    activation gives the activated result to whoever calls it outside of its parent, too; a hook on either
    keeps them apart. Compile the model after the swap, not before.

    Args:
        model: any module; a loss such as `open_clip.ClipLoss()` by itself.

    Returns:
        The report, whose `undo()` takes everything back, as `restore(model)` does.
    """
    report = AccelerateReport({}, {}, model)
    shared = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    names = {id(m): name for name, m in model.named_modules()}
    tried: dict[Any, bool] = {}
    for name, module in model.named_modules():
        reason = _swap(module, tried)
        if reason is None:
            continue
        if isinstance(reason, Pattern):
            report.changed[name] = reason.part
        else:
            report.left[name] = reason
    for parent in model.modules():
        for linear, act, kind in pairs(parent):
            why = _fuse(parent, linear, act, kind, shared, tried)
            if why is None:
                report.changed[names[id(linear)]] = f"linear with {kind}"
                report.changed[names[id(act)]] = "activation, inside its linear"
            else:
                report.left[names[id(act)]] = why
    transformers_attention.swap(model, report.changed, report.left)
    return report


def restore(model: nn.Module) -> None:
    """Take back what `accelerate` did to a model; its results are again the same bits as before."""
    for module in model.modules():
        if FACTS in module.__dict__:
            del module.__dict__[FACTS], module.__dict__["forward"]
    transformers_attention.restore(model)


def _set(module: nn.Module, pattern: Pattern, **facts: Any) -> None:
    module.__dict__[FACTS] = facts
    module.__dict__["forward"] = MethodType(pattern.forward, module)


def _swap(module: nn.Module, tried: dict[Any, bool]) -> Pattern | str | None:
    """The pattern that took the module, the reason why none did, or None where there was none."""
    if FACTS in module.__dict__:
        return "it runs pymm's ops already"
    found = ((p, reason) for p in PATTERNS if (reason := p.fits(module)) is not None)
    pattern, reason = next(found, (None, None))
    if pattern is None or reason:
        return reason
    if "forward" in module.__dict__:
        return "its forward has been replaced by somebody else"
    if pattern.example is not None:
        example = pattern.example
        if not _agree(module, lambda m: _set(m, pattern), lambda: example(module), tried):
            return f"it computes something else than {pattern.part} of this form"
    _set(module, pattern)
    return pattern


def _fuse(
    parent: nn.Module,
    linear: nn.Linear,
    act: nn.Module,
    kind: str,
    shared: Counter[int],
    tried: dict[Any, bool],
) -> str | None:
    """Let the linear apply the activation; the reason where it cannot."""
    if FACTS not in linear.__dict__ or "forward" in act.__dict__:
        return "its forward has been replaced by somebody else"
    if shared[id(act)] > 1 or shared[id(linear)] > 1:
        return "several modules share it"
    if any(getattr(m, hooks) for m in (linear, act) for hooks in _HOOKS):
        return "a hook looks between the linear layer and its activation"
    if len(parameters_of(type(parent).forward)) != 1:
        return "its parent takes more than one argument"
    places = [list(parent.children()).index(m) for m in (linear, act)]

    def change(copied: nn.Module) -> None:
        children = list(copied.children())
        _set(children[places[0]], LINEAR, activation=kind)
        _set(children[places[1]], ACTIVATION)

    if not _agree(parent, change, lambda: (torch.randn(2, 3, linear.in_features),), tried):
        return "its parent does not apply it to the linear layer's result"
    change(parent)
    return None


def _agree(
    module: nn.Module,
    change: Callable[[nn.Module], None],
    example: Callable[[], tuple[Any, ...]],
    tried: dict[Any, bool],
) -> bool:
    """Whether copies with the same random float32 weights, one of them changed, give the same."""
    plain = {k: v for k, v in module.__dict__.items() if isinstance(v, (int, float, str))}
    key = type(module), repr(module), str(plain)
    if key not in tried:
        with torch.random.fork_rng(devices=()), torch.no_grad():
            torch.manual_seed(0)
            before = _copy(module)
            after = copy.deepcopy(before)
            change(after)
            arguments = example()
            try:
                a, b = before.forward(*arguments), after.forward(*arguments)
            except Exception:  # a module that does not run on the example is not what it looked like
                tried[key] = False
            else:
                tried[key] = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
                tried[key] = tried[key] and bool((a - b).abs().max() <= 1e-4 * a.abs().max())
    return tried[key]


def _copy(module: nn.Module) -> nn.Module:
    """The module in evaluation mode with random parameters, on the CPU, without hooks and swaps."""
    memo: dict[int, Any] = {}
    for p in module.parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        memo[id(p)] = nn.Parameter(torch.randn(p.shape) * fan_in**-0.5)
    copied = copy.deepcopy(module, memo).float().cpu().eval()
    for m in copied.modules():
        for hooks in _HOOKS:
            getattr(m, hooks).clear()
        if FACTS in m.__dict__:
            del m.__dict__[FACTS], m.__dict__["forward"]
    return copied

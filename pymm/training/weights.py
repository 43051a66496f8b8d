"""The float32 truth of a model's parameters, and their moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pymm.training.errors import CheckpointError


class Weights:
    """A model's parameters as the optimizer sees them.

    For a float32 model these are the parameters themselves. With `low_precision` the model is cast to
    bfloat16 and
    float32 masters are kept: bfloat16 has 8 bits of mantissa, so a weight of 1 would not move by an update
        below 0.004. Batch norms and the scalars (logit scale and bias) stay in float32.

    Args:
        model: float32; cast in place when `low_precision`.
        low_precision: keep the model in bfloat16.
    """

    def __init__(self, model: nn.Module, low_precision: bool = False) -> None:
        self.model, self.low_precision = model, low_precision
        parameters = dict(model.named_parameters())
        for name, p in parameters.items():
            if p.dtype != torch.float32:
                raise ValueError(f"Weights: {name} must be float32, got {p.dtype}")
        self.masters: dict[str, nn.Parameter] = dict(parameters)
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []  # (in the model, its master)
        if low_precision:
            for name, p in parameters.items():
                self.masters[name] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
            _cast(model)
            for name, p in model.named_parameters():
                if p.dtype == torch.float32:
                    self.masters[name] = p
                else:
                    self._copies.append((p, self.masters[name]))
        self.trainable = {name: p for name, p in self.masters.items() if p.requires_grad}

    def collect_gradients(self) -> None:
        """Add the gradients of low-precision parameters to their masters', in float32, and free them."""
        for p, master in self._copies:
            if p.grad is None:
                continue
            if master.grad is None:
                master.grad = p.grad.float()
            else:
                master.grad += p.grad
            p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        for p, master in self._copies:
            p.copy_(master)

    def zero_grad(self) -> None:
        for p in self.masters.values():
            p.grad = None
        for p, _ in self._copies:
            p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """The model's state with every low-precision parameter replaced by its master: what is saved.

        The tensors are the live ones. A tied parameter stands under its first name only, as safetensors
        wants it.
        """
        master_of = {id(p): master for p, master in self._copies}
        state = self.model.state_dict(keep_vars=True)
        first = {id(t): key for key, t in reversed(state.items())}
        return {key: master_of.get(id(t), t).detach() for key, t in state.items() if first[id(t)] == key}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave.

        Raises:
            CheckpointError: when names or shapes are not the model's.
        """
        own = self.state_dict()
        check_names(own, state, "the model")
        for key, t in own.items():
            t.copy_(state[key])
        self.publish()


class Average:
    r"""An exponential moving average of weights, in float32.

    .. math:: \bar\theta_t = d_t \bar\theta_{t-1} + (1 - d_t)\,\theta_t,
              \quad d_t = \min(d, (1 + t) / (10 + t))

    The small decays at the start let the average forget the random initial weights (as TensorFlow's
    ExponentialMovingAverage does with its `num_updates`). Running statistics are averaged as well, for they
    have to fit the averaged weights; counts are copied.

    Args:
        weights: what to average.
        decay: d, in (0, 1).
    """

    def __init__(self, weights: Weights, decay: float) -> None:
        self.weights, self.decay, self.updates = weights, decay, 0
        self.state = {
            key: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True)
            for key, t in weights.state_dict().items()
        }

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, t in self.weights.state_dict().items():
            if t.is_floating_point():
                self.state[key].lerp_(t.float(), 1 - decay)
            else:
                self.state[key].copy_(t)

    def load_state_dict(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Take back `state` and `updates`.

        Raises:
            CheckpointError: when names or shapes are not the model's.
        """
        check_names(self.state, state, "the average")
        for key, t in self.state.items():
            t.copy_(state[key])
        self.updates = updates


@contextmanager
def evaluating(weights: Weights, average: Average | None) -> Iterator[nn.Module]:
    """The model as it would be saved and loaded again: in float32, averaged where there is an average, in
    eval mode.

    Its own weights, types and mode come back afterwards, bit for bit.
    """
    model = weights.model
    modes = {m: m.training for m in model.modules()}
    before = {key: t.clone() for key, t in weights.state_dict().items()}
    state = before if average is None else average.state
    if weights.low_precision:
        model.float()
    with torch.no_grad():
        for key, t in model.state_dict().items():
            if key in state:
                t.copy_(state[key])
    model.eval()
    try:
        yield model
    finally:
        if weights.low_precision:
            _cast(model)
        weights.load_state_dict(before)
        for m, training in modes.items():
            m.training = training


def set_training_mode(model: nn.Module) -> None:
    """Training mode, but for modules whose parameters are all frozen: their batch norms keep their statistics
    and their dropout rests."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def check_names(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], what: str) -> None:
    """Require the same names and shapes."""
    missing, extra = sorted(own.keys() - loaded.keys()), sorted(loaded.keys() - own.keys())
    if missing or extra:
        parts = [
            f"{len(names)} {word} ({names[0]} ...)"
            for names, word in ((missing, "missing"), (extra, "unknown"))
            if names
        ]
        raise CheckpointError(f"checkpoint: its names do not fit {what}: {', '.join(parts)}")
    for key, t in own.items():
        if t.shape != loaded[key].shape:
            raise CheckpointError(
                f"checkpoint: {key} must be {tuple(t.shape)} for {what}, got {tuple(loaded[key].shape)}"
            )


def _cast(model: nn.Module) -> None:
    """To bfloat16 in place, but for scalars and for modules whose buffers move by small steps.

    These are batch norms, and those that say `stays_float32`.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "stays_float32", False):
            continue
        for p in module.parameters(recurse=False):
            if p.ndim > 0:
                p.data = p.data.to(torch.bfloat16)
        for name, b in module.named_buffers(recurse=False):
            if b.is_floating_point() and b.ndim > 0:
                module._buffers[name] = b.to(torch.bfloat16)

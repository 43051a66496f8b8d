"""AdamW with the usual exclusions from decay, the schedule of its learning rate, and what bounds a step."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pymm.training.task_settings import AdamWSettings, ScheduleSettings
from pymm.training.weights import Weights, check_names

# Class, register, mask and position parameters of models that do not name them in `no_weight_decay()`.
_TOKENS = re.compile(
    r"(^|[._])(class|cls|register|reg|mask|prefix|position|positional|pos|relative_position_bias)"
    r"([._]?(embedding|embed|token|tokens|table|bias))?$"
)


def is_decayed(name: str, parameter: Tensor, excluded: Iterable[str] = ()) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to biases, norms, tokens and positions."""
    return (
        parameter.ndim >= 2
        and name not in excluded
        and not _TOKENS.search(name)
        and not name.endswith("bias")
    )


def parameter_groups(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    weight_decay: float,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, object]]:
    """AdamW's groups: for each share of the learning rate one that is decayed and one that is not.

    Args:
        model: asked for `no_weight_decay()`, in itself and its parts.
        parameters: name -> what the optimizer moves.
        weight_decay: of the decayed groups.
        rates: name -> the parameter's share of the learning rate, 1 where there is none; a group's stands in
            it as `"rate"`.
    """
    excluded = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()
    }
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, p in parameters.items():
        rate = 1.0 if rates is None else rates.get(name, 1.0)
        groups.setdefault((rate, is_decayed(name, p, excluded)), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay if decayed else 0.0, "rate": rate}
        for (rate, decayed), params in sorted(groups.items(), key=lambda group: group[0], reverse=True)
    ]


def build_optimizer(
    weights: Weights, settings: AdamWSettings, rates: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; `rates` as in `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(weights.model, weights.trainable, settings.weight_decay, rates),
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def optimizer_state(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The moments by name, `exp_avg.<parameter>`; a parameter that has had no gradient has none."""
    return {
        f"{moment}.{name}": optimizer.state[p][moment]
        for name, p in parameters.items()
        if p in optimizer.state
        for moment in MOMENTS
    }


def load_optimizer_state(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Take back what `optimizer_state` gave.

    Raises:
        CheckpointError: when names or shapes are not those of the parameters.
    """
    named = {name: p for name, p in parameters.items() if f"{MOMENTS[0]}.{name}" in state}
    like = {
        f"{m}.{name}": torch.empty(()) if m == "step" else p for name, p in named.items() for m in MOMENTS
    }
    check_names(like, state, "the optimizer")
    for name, p in named.items():
        optimizer.state[p] = {m: state[f"{m}.{name}"].to(p.device).clone() for m in MOMENTS}


def share_done(step: int, elapsed_s: float, settings: ScheduleSettings) -> float:
    """The share of the run that is over, in [0, 1]: by steps or by time, whichever is more."""
    return min(1.0, max(_by_steps(step, settings), _by_time(elapsed_s, settings)))


def progress(step: int, elapsed_s: float, settings: ScheduleSettings) -> float:
    r"""Where the learning rate is on its way, in [0, 1].

    By steps alone where there is no time budget, by time alone where there is no number of steps. With both
    it is :math:`\max(s, 2t - 1)` for the shares s of steps and t of time: a run that keeps ahead of its
    budget is driven by its steps and repeats bit for bit; one that would be cut off comes down in time, in
    the second half of the budget.
    """
    by_steps, by_time = _by_steps(step, settings), _by_time(elapsed_s, settings)
    return min(1.0, max(by_steps, by_time if settings.steps is None else 2 * by_time - 1))


def _by_steps(step: int, settings: ScheduleSettings) -> float:
    return step / settings.steps if settings.steps is not None else 0.0


def _by_time(elapsed_s: float, settings: ScheduleSettings) -> float:
    return elapsed_s / settings.max_seconds if settings.max_seconds is not None else 0.0


def rate_factor(done: float, settings: ScheduleSettings) -> float:
    r"""The learning rate of the next step as a share of the peak, when the share `done` of the run is over.

    A line to 1 while `done < warmup`, then :math:`f + (1 - f)\,(1 + \cos \pi u) / 2` with floor f and u the
    share of the rest (Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts).
    """
    if done < settings.warmup:
        # The next step, not the last one: the first step has a rate above 0.
        ahead = 1 / settings.steps if settings.steps is not None else 0.0
        return min(1.0, (done + ahead) / settings.warmup)
    u = (done - settings.warmup) / (1 - settings.warmup)
    return settings.floor + (1 - settings.floor) * (1 + math.cos(math.pi * min(1.0, u))) / 2


def gradient_norm(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
    """The global norm of the gradient, and the gradient scaled to `clip_norm` where it is larger.

    A norm that is not finite leaves the gradient as it is.
    """
    parameters = list(parameters)
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_norm is not None and bool(torch.isfinite(norm)):
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


@torch.no_grad()
def clamp_logit_scale(parameters: Mapping[str, nn.Parameter], maximum: float) -> None:
    """Keep the logit scale at most `maximum` (Radford et al. 2021, arXiv:2103.00020, section 2.5)."""
    scale = parameters.get("logit_scale")
    if scale is not None:
        scale.clamp_(max=math.log(maximum))

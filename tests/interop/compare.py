"""The donor's weights in our model, then outputs and gradients side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pymm.interop import load_state, to_donor
from pymm.interop.key_maps import KEY_MAPS

OUTPUT, GRADIENT = 1e-5, 1e-4


def randomize(model: nn.Module) -> None:
    """Small random values everywhere, so that no zero scale and no unit norm hides a mistake."""
    generator = torch.Generator().manual_seed(7)

    def noise(t: Tensor, std: float) -> Tensor:
        return torch.randn(t.shape, generator=generator) * std

    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                norm = isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)) and name == "weight"
                fan_in = p[0].numel() if p.ndim > 1 else 100
                p.copy_(noise(p, 0.1) + 1 if norm else noise(p, fan_in**-0.5))
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(noise(module.running_mean, 0.1))
                module.running_var.copy_(noise(module.running_var, 0.1).abs() + 0.5)


def error(got: Tensor, truth: Tensor, floor: float = 1e-12) -> float:
    """Largest difference over the largest element, or over `floor` where that is more."""
    assert got.shape == truth.shape
    return ((got - truth).abs().max() / truth.abs().max().clamp_min(floor)).item()


def compare(ours: nn.Module, donor: nn.Module, run: Callable[[nn.Module], tuple[Tensor, ...]]) -> None:
    """Load, run and differentiate both; every output and the gradient of every parameter must agree.

    What was loaded must come back out as the donor has it.
    """
    randomize(donor)
    state = donor.state_dict()
    report = load_state(ours, state)
    assert report.complete, report
    key_map = next(m for m in KEY_MAPS if m.donor == report.donor and isinstance(ours, m.model))
    written = (
        m for m in KEY_MAPS if isinstance(ours, m.model) and key_map.donors[0] in m.donors and m.fits(ours)
    )
    if next(written) is key_map:
        check_way_back(ours, key_map.donors[0], {k: v for k, v in state.items() if not key_map.ignores(k)})
    outputs, truths = run(ours), run(donor)
    for i, (output, truth) in enumerate(zip(outputs, truths, strict=True)):
        assert error(output, truth) < OUTPUT, f"output {i}"
    for values in (outputs, truths):
        generator = torch.Generator().manual_seed(1)
        torch.stack([(v * torch.randn(v.shape, generator=generator)).sum() for v in values]).sum().backward()

    gradients = {name: p.grad for name, p in donor.named_parameters() if p.requires_grad}
    assert all(g is not None for g in gradients.values())
    # A bias before a batch norm in training has a gradient of rounding alone, which no two programs share.
    floor = 1e-9 * max(g.abs().max().item() for g in gradients.values() if g is not None)
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        placed = (
            (r, names)
            for r in key_map.rules
            if (names := r.names(name)) and all(n in gradients for n in names)
        )
        rule, names = next(placed)
        truth = rule.join([gradients[n] for n in names])
        assert error(parameter.grad, truth, floor) < GRADIENT, name


def check_way_back(ours: nn.Module, donor: str, state: Mapping[str, Tensor]) -> None:
    """`to_donor` gives the state that was loaded, bit for bit."""
    back = to_donor(ours, donor)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert back[name].shape == value.shape, name
        assert torch.equal(back[name], value), name

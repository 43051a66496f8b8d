"""What BEiT promises without a donor."""

from __future__ import annotations

import pytest
import torch

from pymm.interop import load_state
from pymm.layers import RelativePositionBias, relative_position_index, resample_relative_position
from pymm.models.beit import BEiTSpec, build

ROW = BEiTSpec("test", 8, 48, 3, 3, 0.1, 0, "", 32, num_classes=10)
PRETRAINING = BEiTSpec("test", 8, 48, 3, 3, 0.1, 0, "", 32, num_classes=0, purpose="pretraining")


def test_index() -> None:
    """Pairs at the same distance share a row, others do not; the class token has three rows of its own."""
    h, w = 3, 4
    index = relative_position_index((h, w))
    assert index.shape == (13, 13)
    places = [(r, c) for r in range(h) for c in range(w)]
    seen: dict[tuple[int, int], int] = {}
    for i, (r, c) in enumerate(places):
        for j, (r2, c2) in enumerate(places):
            row = int(index[1 + i, 1 + j])
            assert seen.setdefault((r - r2, c - c2), row) == row
    assert sorted(seen.values()) == list(range(5 * 7))
    assert index[0, 0] == 37
    assert index[0, 1:].eq(35).all()
    assert index[1:, 0].eq(36).all()


def test_bias_and_its_gradient() -> None:
    bias, index = RelativePositionBias(4, 2), relative_position_index((4, 4))
    assert not bias((4, 4), index).any()
    with torch.no_grad():
        bias.table.normal_()
    got = bias((4, 4), index)
    assert got.shape == (2, 17, 17)
    assert torch.equal(got, bias.table.T[:, index])
    got.sum().backward()
    assert bias.table.grad is not None
    uses = torch.bincount(index.flatten(), minlength=52).float()
    assert torch.equal(bias.table.grad, uses[:, None].expand(52, 2))


def test_resampled_table() -> None:
    table = torch.randn(52, 2)
    assert resample_relative_position(table, (4, 4)) is table
    got = resample_relative_position(table, (2, 6))
    assert got.shape == (3 * 11 + 3, 2)
    assert torch.equal(got[-3:], table[-3:])
    flat = torch.ones(52, 1)
    torch.testing.assert_close(resample_relative_position(flat, (5, 3)), torch.ones(9 * 5 + 3, 1))
    with pytest.raises(
        ValueError, match=r"resample_relative_position: table must be \(\(2g - 1\)\^2 \+ 3, H\)"
    ):
        resample_relative_position(torch.randn(50, 2), (4, 4))


@pytest.mark.parametrize("row", [ROW, PRETRAINING])
def test_gradients_reach_everything(row: BEiTSpec) -> None:
    model, token = build(row), torch.randn(48, requires_grad=True)
    mask = torch.rand(2, 16) < 0.4
    named: dict[str, torch.Tensor] = {}
    x = model.forward_features(torch.randn(2, 3, 32, 32), mask=mask, mask_token=token, intermediates=named)
    assert list(named) == ["embed", "blocks.0", "blocks.1", "blocks.2", "norm"]
    (model.forward_head(x).square().sum() + x.square().sum()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    assert token.grad is not None
    assert token.grad.abs().sum() > 0


def test_checkpointing_changes_nothing() -> None:
    model, pixels = build(ROW), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for bias in model.biases:
            bias.table.normal_()

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(pixels).square().sum(), list(model.parameters())))

    plain = gradients()
    model.set_grad_checkpointing()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b)


def test_pretrained_becomes_a_classifier() -> None:
    """Each block begins with the shared bias; the features in front of the final norm are the same."""
    pretrained, model = build(PRETRAINING), build(ROW)
    with torch.no_grad():
        for p in pretrained.parameters():
            p.normal_(std=0.2)
    report = load_state(model, pretrained.state_dict())
    assert report.missing == ("head.weight", "head.bias")
    assert not report.unused
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(
        pretrained.norm(model.forward_features(pixels)), pretrained.forward_features(pixels)
    )
    torch.testing.assert_close(model.pool.norm.weight, pretrained.norm.weight)


def test_starts_as_its_authors_say() -> None:
    model = build(BEiTSpec("", 8, 96, 4, 3, 0.1, 0, "", 32))
    for i, block in enumerate(model.blocks):
        assert block.attn.proj.weight.std().item() == pytest.approx(0.02 / (2 * i + 2) ** 0.5, rel=0.1)
        assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert not block.attn.qkv.q_bias.any()
    assert model.head.weight.abs().max() < 1e-4


def test_layers_of_learning_rates() -> None:
    assert build(ROW).stage_names()[1] == ("blocks.0", "biases.0")
    assert build(PRETRAINING).stage_names()[0] == ("embed", "biases")

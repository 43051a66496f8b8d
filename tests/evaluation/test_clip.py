"""The table of seen and unseen concepts, against one made by hand, and over the loader."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pymm.data import unseen_concepts
from pymm.evaluation import evaluate_clip
from tests.data.shards import TOKENIZER as CAPTIONS
from tests.data.shards import loader
from tests.evaluation.toy import NAMES, TOKENIZER, Toy, batch

CORNERS = torch.eye(6)


def test_seen_and_unseen_by_hand() -> None:
    """Six concepts, the last two unseen. Unseen images are drawn to a seen caption, then to their own."""
    model = Toy(dict(zip(NAMES, CORNERS, strict=True)))
    drawn = CORNERS.clone()
    drawn[2] = 0.9 * CORNERS[2] + CORNERS[3]  # a seen image nearer to another seen caption
    drawn[4] = CORNERS[4] + 1.1 * CORNERS[0]  # right among the unseen captions, second among all
    drawn[5] = CORNERS[5] + 1.1 * CORNERS[4] + 1.2 * CORNERS[1]  # second among the unseen, third among all
    data = [batch(drawn[:4], [0, 1, 2, 3]), batch(drawn[4:], [4, 5])]
    model.train()
    found = evaluate_clip(model, TOKENIZER, data, unseen={"key4", "key5"}, ks=(1, 2))
    assert model.training
    there = {
        name: [part[key] for key in ("r1", "r2", "chance_r1", "chance_r2", "queries", "candidates")]
        for name, part in found.items()
    }
    assert there == {
        "seen_concepts": [0.75, 1.0, pytest.approx(1 / 6), pytest.approx(2 / 6), 4, 6],
        "unseen_concepts": [0.5, 1.0, pytest.approx(1 / 2), 1.0, 2, 2],
        "unseen_concepts_among_all": [0.0, 0.5, pytest.approx(1 / 6), pytest.approx(2 / 6), 2, 6],
    }
    back = found["unseen_concepts"]["text_to_image"]
    assert (back["queries"], back["candidates"]) == (2, 2)
    assert found["seen_concepts"]["text_to_image"]["candidates"] == 6


def test_parts_without_images_are_left_out() -> None:
    model = Toy(dict(zip(NAMES, CORNERS, strict=True)))
    data = [batch(CORNERS, list(range(6)))]
    assert list(evaluate_clip(model, TOKENIZER, data)) == ["seen_concepts"]
    everything = evaluate_clip(model, TOKENIZER, data, unseen={f"key{i}" for i in range(6)})
    assert list(everything) == ["unseen_concepts", "unseen_concepts_among_all"]


def test_several_images_of_a_concept() -> None:
    model = Toy(dict(zip(NAMES, CORNERS, strict=True)))
    data = [batch(torch.cat((CORNERS, 2 * CORNERS)), [*range(6), *range(6)])]
    found = evaluate_clip(model, TOKENIZER, data, unseen={"key1"})
    assert found["seen_concepts"]["queries"] == 10
    assert found["seen_concepts"]["candidates"] == 6
    assert found["seen_concepts"]["r1"] == 1
    assert found["seen_concepts"]["text_to_image"]["candidates"] == 12
    assert found["seen_concepts"]["text_to_image"]["r1"] == 1
    assert found["seen_concepts"]["text_to_image"]["chance_r1"] == pytest.approx(2 / 12)


class Random(nn.Module):
    """Features that know nothing: a random projection of pixels and of token counts."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(3 * 8 * 8, 32), nn.EmbeddingBag(vocab_size, 32)

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        return self.image(pixels.flatten(1))

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        return self.text(tokens)


def test_the_embedded_pack_with_a_model_that_knows_nothing() -> None:
    unseen = unseen_concepts()
    batches = loader("emoji:noto", batch_size=512)
    found = evaluate_clip(Random(CAPTIONS.vocab_size), CAPTIONS, batches, unseen=unseen)
    sizes = {name: (part["queries"], part["candidates"]) for name, part in found.items()}
    assert sizes == {
        "seen_concepts": (1667, 1852),
        "unseen_concepts": (185, 185),
        "unseen_concepts_among_all": (185, 1852),
    }
    for part in found.values():
        assert part["chance_r1"] == pytest.approx(1 / part["candidates"])
        assert part["r1"] < 0.05


def test_a_loader_that_leaves_samples_out_is_refused() -> None:
    with pytest.raises(ValueError, match="batches must be a loader with drop_last=False"):
        evaluate_clip(Random(CAPTIONS.vocab_size), CAPTIONS, loader("emoji:noto", drop_last=True))

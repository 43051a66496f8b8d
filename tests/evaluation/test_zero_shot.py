"""Zero-shot classification by hand-made features."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pymm.evaluation import class_embeddings, encode_images, encode_texts, zero_shot
from tests.evaluation.toy import NAMES, TOKENIZER, Toy, batch


def prompts(template: str) -> list[str]:
    return [template.replace("{object}", name) for name in NAMES]


@pytest.fixture
def model() -> Toy:
    torch.manual_seed(1)
    texts = prompts("{object}") + prompts("A photo of a {object}") + prompts("a drawing of a {object}")
    return Toy({text: torch.randn(8) * 3 for text in texts})


def test_an_ensemble_is_the_mean_of_unit_vectors(model: Toy) -> None:
    templates = ["A photo of a {object}", "a drawing of a {}", lambda name: name]
    out = class_embeddings(model, TOKENIZER, NAMES, templates, batch_size=5)
    for name, row in zip(NAMES, out, strict=True):
        texts = [f"A photo of a {name}", f"a drawing of a {name}", name]
        units = [F.normalize(model.table[model._row(text)], dim=0) for text in texts]
        torch.testing.assert_close(row, F.normalize(torch.stack(units).mean(0), dim=0))
    single = class_embeddings(model, TOKENIZER, NAMES, "A photo of a {object}")
    torch.testing.assert_close(single.norm(dim=1), torch.ones(6))


def test_top1_and_top5(model: Toy) -> None:
    centres = class_embeddings(model, TOKENIZER, NAMES, "{object}")
    order = (centres @ centres.T).argsort(1, descending=True)
    # Images at the class centres; labels are the 1st, 2nd, 5th and 6th nearest class.
    labels = torch.stack([order[0, 0], order[1, 1], order[2, 4], order[3, 5]])
    pixels = batch(5 * centres[:4], [0, 1, 2, 3]).pixels
    found = zero_shot(
        model, TOKENIZER, NAMES, "{object}", [(pixels[:3], labels[:3]), (pixels[3:], labels[3:])]
    )
    assert found == {
        "top1": 0.25,
        "top5": 0.75,
        "chance_top1": pytest.approx(1 / 6),
        "chance_top5": pytest.approx(5 / 6),
        "images": 4,
        "classes": 6,
    }


def test_batches_with_ids(model: Toy) -> None:
    centres = class_embeddings(model, TOKENIZER, NAMES, "{object}")
    data = batch(centres, [3, 4, 5, 0, 1, 2])
    class_ids = torch.tensor([3, 4, 5, 0, 1, 2])
    assert zero_shot(model, TOKENIZER, NAMES, "{object}", [data], class_ids)["top1"] == 1
    assert zero_shot(model, TOKENIZER, NAMES, "{object}", [data], class_ids.flip(0))["top1"] == 0
    with pytest.raises(ValueError, match="class_ids must be given"):
        zero_shot(model, TOKENIZER, NAMES, "{object}", [data])


def test_classes_that_tie_are_not_told_apart() -> None:
    same = Toy({name: torch.ones(4) for name in NAMES})
    data = (batch(torch.ones(6, 4), list(range(6))).pixels, torch.arange(6))
    found = zero_shot(same, TOKENIZER, NAMES, "{object}", [data])
    assert found["top1"] == found["top5"] == 0


def test_the_model_is_left_as_it_was(model: Toy) -> None:
    model.train()
    model.towers[1].eval()
    data = batch(torch.randn(6, 8), list(range(6)))
    first = encode_images(model, [data]).features
    assert torch.equal(first, encode_images(model, [data]).features)  # no dropout
    assert not first.requires_grad
    assert [model.training, model.towers[0].training, model.towers[1].training] == [True, True, False]
    model.table.clear()
    with pytest.raises(KeyError):
        encode_texts(model, TOKENIZER, NAMES)
    assert [model.training, model.towers[0].training, model.towers[1].training] == [True, True, False]


def test_what_is_not_finite_is_named(model: Toy) -> None:
    data = batch(torch.randn(6, 8), list(range(6)))
    data.pixels[4, 0, 0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"encode_images: image features must be finite, .* first in row 4 \(key4\)"
    ):
        encode_images(model, [data])
    with pytest.raises(ValueError, match="zero_shot: image features must be finite"):
        zero_shot(model, TOKENIZER, NAMES, "{object}", [(data.pixels, data.ids)])
    model.table[model._row("blue dog")] = torch.full((8,), torch.inf)
    with pytest.raises(
        ValueError, match=r"encode_texts: text features must be finite, .* row 1 \(blue dog\)"
    ):
        encode_texts(model, TOKENIZER, NAMES)


def test_wrong_arguments_are_named(model: Toy) -> None:
    for batches in ([], iter(())):
        with pytest.raises(ValueError, match="zero_shot: batches must hold at least one batch"):
            zero_shot(model, TOKENIZER, NAMES, "{object}", batches)
    with pytest.raises(ValueError, match="encode_images: batches must hold at least one batch"):
        encode_images(model, [])
    with pytest.raises(ValueError, match=r"templates must hold \{object\} or \{\}"):
        class_embeddings(model, TOKENIZER, NAMES, "a photo")
    with pytest.raises(ValueError, match="encode_texts: texts must hold at least one text"):
        encode_texts(model, TOKENIZER, [])
    with pytest.raises(ValueError, match="templates must hold at least one template"):
        class_embeddings(model, TOKENIZER, NAMES, [])
    with pytest.raises(ValueError, match="names must hold at least one name"):
        class_embeddings(model, TOKENIZER, [], "{object}")
    with pytest.raises(ValueError, match="class_ids must be 6 different ids"):
        zero_shot(model, TOKENIZER, NAMES, "{object}", [], torch.zeros(6, dtype=torch.int64))
    pixels = batch(torch.randn(6, 8), list(range(6))).pixels
    with pytest.raises(ValueError, match="must be among candidate_ids"):
        zero_shot(model, TOKENIZER, NAMES, "{object}", [(pixels, torch.arange(6) + 1)])

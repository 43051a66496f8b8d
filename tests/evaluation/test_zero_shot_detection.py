"""Zero-shot detection with a model that sees the mean colour, and average precision by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pymm import cli, detect
from pymm.data import SceneDetection, Tokenizer
from pymm.evaluation import (
    ProposedRegions,
    Windows,
    ZeroShotDetector,
    average_precision,
    evaluate_detection,
)
from pymm.evaluation.zero_shot_detection import region_pixels
from pymm.models import rcnn
from pymm.models.rcnn import Detections

NAMES = ("red thing", "blue thing", "green thing")
TOKENIZER = Tokenizer.train(["A photo of a red thing, blue thing, green thing, grey wall"] * 3, 300, 40)
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0), "grey": (128, 128, 128)}
SQUARES = {"red": (8, 8, 24, 24), "blue": (36, 30, 56, 50)}


class Colours(nn.Module):
    """An image is its mean colour, a text the colour that it names."""

    image_size = 8
    context_length = 40

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def encode_image(self, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1:] == (3, 8, 8)
        return pixels.float().mean((2, 3)) / 255

    def encode_text(self, tokens: Tensor) -> Tensor:
        texts = [TOKENIZER.decode(row.tolist()) for row in tokens]
        named = [next(name for name in COLOURS if name in text) for text in texts]
        return torch.tensor([COLOURS[name] for name in named]) / 255


@pytest.fixture
def picture() -> Tensor:
    pixels = torch.full((3, 60, 60), 128, dtype=torch.uint8)
    for name, (x1, y1, x2, y2) in SQUARES.items():
        pixels[:, y1:y2, x1:x2] = torch.tensor(COLOURS[name], dtype=torch.uint8)[:, None, None]
    return pixels


def detector(**options: object) -> ZeroShotDetector:
    settings: dict[str, object] = {
        "background": ("grey wall",),
        "proposals": Windows((16 / 60, 20 / 60), step=0.1),
        "threshold": 0.9,
        "iou_threshold": 0.0,
        "context": 1.0,
    }
    return ZeroShotDetector(Colours(), TOKENIZER, NAMES, **(settings | options))  # type: ignore[arg-type]


def test_squares_are_found_and_named(picture: Tensor) -> None:
    found = detector()(picture)
    assert sorted(found.labels.tolist()) == [0, 1]
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    truth = [SQUARES["red"], SQUARES["blue"]]
    for box, label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True):
        assert max(abs(a - b) for a, b in zip(box, truth[label], strict=True)) < 5


def test_scores_are_the_softmax_by_hand(picture: Tensor) -> None:
    boxes = torch.tensor([SQUARES["red"], SQUARES["blue"], (0, 50, 10, 60)]).float()
    one = detector()
    rows = one.scores(picture, boxes)
    assert rows.shape == (3, 3)
    colours = torch.tensor([COLOURS[name] for name in ("red", "blue", "grey")]) / 255
    bank = torch.tensor([COLOURS[name] for name in ("red", "blue", "green", "grey")]) / 255
    cosines = nn.functional.cosine_similarity(colours[:, None], bank[None], dim=-1)
    truth = (cosines * torch.tensor(2.5).exp()).softmax(1)[:, :3]
    torch.testing.assert_close(rows, truth, atol=1e-3, rtol=1e-2)
    assert rows[2].sum() < 0.1
    assert len(one(picture, boxes[2:]).labels) == 0
    assert len(one(picture, boxes[:0]).labels) == 0
    given = one(picture, boxes)
    assert given.boxes.tolist() == boxes[given.labels].tolist()


def test_the_best_detections_are_kept(picture: Tensor) -> None:
    many, few = detector(threshold=0.0, iou_threshold=1.0)(picture), detector(most=1)(picture)
    assert len(many.labels) == 100
    assert len(few.labels) == 1
    assert torch.equal(few.scores, detector()(picture).scores[:1])


def test_windows_cover_the_picture() -> None:
    boxes = Windows((0.3, 1.0), (0.5, 2.0), 0.25)(torch.zeros(3, 40, 60))
    covered = torch.zeros(40, 60, dtype=torch.bool)
    for x1, y1, x2, y2 in boxes.tolist():
        assert 0 <= x1 < x2 <= 60 + 1e-4
        assert 0 <= y1 < y2 <= 40 + 1e-4
        covered[int(y1) : round(y2), int(x1) : round(x2)] = True
    assert covered.all()
    first = boxes[0]
    assert ((first[2] - first[0]) / (first[3] - first[1])).item() == pytest.approx(0.5)
    assert Windows((1.0,))(torch.zeros(3, 20, 20)).tolist() == [[0, 0, 20, 20]]


def test_regions_of_a_proposal_network(picture: Tensor) -> None:
    """The boxes of the network, in the picture's pixels, best first; its mode is left as it was."""
    torch.manual_seed(0)
    row = next(one for one in rcnn.ROWS if one.anchors is not None and one.norm_eps is None)
    network = rcnn.build(replace(row, image_size=64, max_size=64)).train()
    boxes = ProposedRegions(network, 20)(picture)
    assert network.training
    assert boxes.shape[1] == 4
    assert 0 < len(boxes) <= 20
    assert boxes.min() >= 0
    assert boxes.max() <= 60 + 1e-3
    every = ProposedRegions(network, 1000)(picture)
    assert len(every) > 20
    assert torch.equal(every[:20], boxes)
    network.eval()
    with torch.no_grad():
        pictures = network.prepare(picture[None])
        truth = network.propose(network.maps(pictures.pixels), pictures).boxes[0]
    torch.testing.assert_close(boxes * (64 / 60), truth[:20])
    assert detector(proposals=ProposedRegions(network, 20), threshold=0.0)(picture).boxes.shape[1] == 4


def test_regions_are_squares_of_the_picture() -> None:
    pixels = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    boxes = torch.tensor([[4, 6, 12, 14], [25, 15, 30, 20], [0, 0, 30, 20]]).float()
    assert torch.equal(region_pixels(pixels, boxes[:1], 8)[0], pixels[:, 6:14, 4:12])
    # 1.6 times 5 is 8, moved back inside from the corner.
    assert torch.equal(region_pixels(pixels, boxes[1:2], 8, 1.6)[0], pixels[:, 12:20, 22:30])
    # Wider than high: the middle square, averaged.
    middle = pixels[:, :, 5:25].float()
    mean = nn.functional.avg_pool2d(middle, 2)
    assert (region_pixels(pixels, boxes[2:], 10)[0].float() - mean).abs().max() <= 0.5


def boxes_of(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows).reshape(-1, 4).float()


def test_average_precision_by_hand() -> None:
    pytest.importorskip("pycocotools")
    truth = [
        (boxes_of((0, 0, 10, 10), (20, 20, 40, 40)), torch.tensor([3, 5])),
        (boxes_of((5, 5, 25, 25)), torch.tensor([3])),
    ]

    def scored(*rows: tuple[Tensor, list[int]]) -> dict[str, float]:
        found = [
            Detections(boxes, torch.linspace(0.9, 0.8, len(labels)), torch.tensor(labels, dtype=torch.int64))
            for boxes, labels in rows
        ]
        return average_precision(found, truth)

    assert scored((truth[0][0], [3, 5]), (truth[1][0], [3])) == {
        "ap": pytest.approx(1.0), "ap50": pytest.approx(1.0), "ap75": pytest.approx(1.0),
        "recall": pytest.approx(1.0), "objects": 3,
    }  # fmt: skip
    assert scored((truth[0][0], [5, 3]), (truth[1][0], [5]))["ap50"] == 0
    # Class 5 is found, of class 3 one object of two: 51 of 101 recalls, precision 1.
    half = scored((truth[0][0], [3, 5]), (boxes_of(), []))
    assert half["ap"] == pytest.approx((51 / 101 + 1) / 2)
    assert half["recall"] == pytest.approx(0.75)
    # An overlap of 0.6 counts at 0.5, 0.55 and 0.6.
    moved = scored((boxes_of((0, 0, 10, 6), (20, 20, 40, 32)), [3, 5]), (boxes_of((5, 5, 25, 17)), [3]))
    assert (moved["ap50"], moved["ap75"]) == (pytest.approx(1.0), 0)
    assert moved["ap"] == pytest.approx(0.3)
    assert scored((boxes_of(), []), (boxes_of(), []))["ap"] == 0
    none = Detections(boxes_of(), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert average_precision([none], [(boxes_of(), torch.zeros(0))])["objects"] == 0
    with pytest.raises(ValueError, match="found must hold 2 pictures, got 1"):
        average_precision([none], truth)
    with pytest.raises(ValueError, match="found must hold finite scores"):
        average_precision(
            [Detections(boxes_of((0, 0, 1, 1)), torch.tensor([torch.nan]), torch.tensor([1]))] * 2, truth
        )


def test_evaluation_beside_chance(picture: Tensor) -> None:
    pytest.importorskip("pycocotools")
    truth = boxes_of(SQUARES["red"], SQUARES["blue"])
    scores = evaluate_detection(detector(), [(picture, truth, torch.tensor([0, 1]))])
    assert scores["true_boxes"]["ap"] == pytest.approx(1.0)
    assert scores["proposals"]["ap50"] == pytest.approx(1.0)
    assert scores["chance"]["ap50"] == 0
    with pytest.raises(ValueError, match="samples must hold at least one picture"):
        evaluate_detection(detector(), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.0}, "threshold must be in [0, 1), got 1.0"),
        ({"iou_threshold": 2}, "iou_threshold must be in [0, 1], got 2"),
        ({"context": 0.5}, "context must be at least 1, got 0.5"),
        ({"most": 0}, "most must be at least 1, got 0"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"ZeroShotDetector: {message}")):
        detector(**options)


def test_wrong_inputs(picture: Tensor) -> None:
    with pytest.raises(ValueError, match=re.escape("pixels must be uint8 (3, H, W), got torch.float32")):
        detector()(picture.float())
    with pytest.raises(ValueError, match=re.escape("boxes must be (R, 4), got (2, 3)")):
        detector()(picture, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=re.escape("Windows: step must be in (0, 1], got 0")):
        Windows(step=0)


def test_the_command_draws_and_lists(
    picture: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(detect, "_detector", lambda settings, names: detector())
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "in.png")
    out, listed = str(tmp_path / "out.png"), tmp_path / "found.json"
    words = ["detect", str(tmp_path / "in.png"), "--run", "run", "--names", *NAMES]
    assert cli.main([*words, "--out", out, "--json", str(listed)]) == 0
    assert {one["name"] for one in json.loads(listed.read_text())} == {"red thing", "blue thing"}
    assert "red thing" in capsys.readouterr().out
    with Image.open(out) as drawn:
        assert drawn.size == (480, 480)
    with pytest.raises(ValueError, match="detect: names must be given for a picture"):
        detect.run(detect.DetectSettings(str(tmp_path / "in.png"), "run"))
    with pytest.raises(ValueError, match="detect: names must be left out for scenes"):
        detect.run(detect.DetectSettings("scenes:count=2", "run", NAMES))


def test_the_command_scores_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A detector that knows the truth of the first scene's boxes and names gets all of it."""
    pytest.importorskip("pycocotools")

    class Knows(ZeroShotDetector):
        def __init__(self) -> None:
            self.most, self.names = 100, data.classes[1:]

        def __call__(self, pixels: Tensor, boxes: Tensor | None = None) -> Detections:
            one = next(sample for sample in data if torch.equal(sample.pixels, pixels))  # type: ignore[attr-defined]
            return Detections(one.boxes, torch.ones(len(one.labels)), one.labels - 1)

    source = "scenes:count=3,size=48,classes=8"
    data = SceneDetection(source)
    monkeypatch.setattr(detect, "_detector", lambda settings, names: Knows())
    out = tmp_path / "scenes.png"
    assert (
        cli.main(["detect", source, "--run", "run", "--out", str(out), "--json", str(tmp_path / "s.json")])
        == 0
    )
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["proposals"]["ap"] == pytest.approx(1.0)
    assert scores["chance"]["ap50"] < 0.5
    assert "true boxes" in capsys.readouterr().out
    assert out.stat().st_size > 1000

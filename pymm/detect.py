"""`pymm detect`: find named things in a picture by a CLIP run, or score that on synthetic scenes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from pymm.evaluation import ZeroShotDetector
    from pymm.models.rcnn import Detections

SHOWN, LARGEST = 12, 512


@dataclass(frozen=True)
class DetectSettings:
    """Find named things in a picture, or score that on synthetic scenes."""

    image: tyro.conf.Positional[str]
    """A picture, or "scenes:count=100,classes=20": synthetic scenes, on which average precision is computed
    (needs pymm[detect])."""
    run: str
    """A CLIP run: its directory, a checkpoint of it, or a safetensors file in either."""
    names: tuple[str, ...] = ()
    """What to look for in a picture; in scenes it is their concepts."""
    templates: tuple[str, ...] = ("A photo of a {object}",)
    """Prompts around a name; {object} stands for it. Several are averaged."""
    background: tuple[str, ...] = ()
    """Names of what is no object; regions nearest to one of them are left out."""
    regions: str | None = None
    """A run of a detector, whose region proposals take the windows' place; its names are not used."""
    scales: tuple[float, ...] = (0.2, 0.28, 0.4)
    """Sides of the windows as shares of the picture's short side."""
    step: float = 0.2
    """Distance of neighbouring windows as a share of their side."""
    threshold: float = 0.1
    """Smallest score that is shown, in [0, 1)."""
    iou_threshold: float = 0.3
    """Of two boxes of one name that overlap more than this, the better one is kept."""
    context: float = 1.1
    """Side of what the model sees of a region, as a multiple of the region's longer side."""
    most: int = 100
    """Detections per picture."""
    threads: int | None = None
    """CPU threads; by default torch's."""
    device: str = "cpu"
    """Where the model is."""
    out: str = "detections.png"
    """The picture with its boxes; of scenes, the first twelve."""
    json: str | None = None
    """A file for the boxes or the scores."""


def run(settings: DetectSettings) -> int:
    """1 when nothing was found in the picture."""
    import torch

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    found = _scenes(settings) if settings.image.startswith("scenes:") else _picture(settings)
    if settings.json is not None:
        Path(settings.json).write_text(json.dumps(found, indent=1) + "\n")
    print(settings.out)
    return 0 if found else 1


def _detector(settings: DetectSettings, names: tuple[str, ...]) -> ZeroShotDetector:
    from pymm.evaluation import ProposedRegions, Windows, ZeroShotDetector
    from pymm.models.rcnn import RCNN
    from pymm.training import clip, runs

    trained = clip.load_run(settings.run)
    proposals: ProposedRegions | Windows = Windows(settings.scales, step=settings.step)
    if settings.regions is not None:
        found = runs.load_run(settings.regions)
        detector = getattr(found, "model", None)
        if not isinstance(detector, RCNN) or detector.proposals is None:
            raise ValueError(
                f"detect: regions must be a run of Faster R-CNN, got one of {found.settings.task}"
            )
        proposals = ProposedRegions(detector, settings.most)
    return ZeroShotDetector(
        trained.model.to(settings.device),
        trained.tokenizer,
        names,
        settings.templates,
        background=settings.background,
        proposals=proposals,
        threshold=settings.threshold,
        iou_threshold=settings.iou_threshold,
        context=settings.context,
        most=settings.most,
    )


def _picture(settings: DetectSettings) -> list[dict[str, Any]]:
    import numpy as np
    import torch

    from pymm.data.images import BadImage, decode_image
    from pymm.data.samples import Limits
    from pymm.data.scenes_picture import draw_boxes

    if not settings.names:
        raise ValueError("detect: names must be given for a picture, got none")
    try:
        image = decode_image(Path(settings.image).read_bytes(), Limits().max_pixels).convert("RGB")
    except BadImage as error:
        raise ValueError(
            f"detect: image must be a readable picture, got {settings.image}: {error}"
        ) from error
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    found = _detector(settings, settings.names)(pixels)
    listed = _listed(found, settings.names)
    for one in listed:
        box = ", ".join(f"{side:.0f}" for side in one["box"])
        print(f"{one['name']:<24} {one['score']:.2f}  {box}")
    enlarge = max(1, LARGEST // max(image.size))
    names, scores = [one["name"] for one in listed], [one["score"] for one in listed]
    draw_boxes(image, [one["box"] for one in listed], names, scores, enlarge).save(settings.out)
    return listed


def _listed(found: Detections, names: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return [{"name": names[label], "score": score, "box": box} for box, score, label in rows]


def _scenes(settings: DetectSettings) -> dict[str, dict[str, float]]:
    from pymm.data import SceneDetection
    from pymm.data.scenes_picture import draw_boxes, page_of
    from pymm.evaluation import evaluate_detection

    if settings.names:
        raise ValueError(f"detect: names must be left out for scenes, got {', '.join(settings.names)}")
    data = SceneDetection(settings.image)
    names = data.classes[1:]
    detector = _detector(settings, names)
    pictures = [data[i] for i in range(len(data))]
    scores = evaluate_detection(detector, ((one.pixels, one.boxes, one.labels - 1) for one in pictures))
    for what, values in scores.items():
        shown = "  ".join(f"{name} {values[name]:.3f}" for name in ("ap", "ap50", "ap75", "recall"))
        print(f"{what.replace('_', ' '):<12} {shown}")
    drawn = []
    for i, one in enumerate(pictures[:SHOWN]):
        listed = _listed(detector(one.pixels), names)
        found, sure = [row["name"] for row in listed], [row["score"] for row in listed]
        enlarge = max(1, LARGEST // 2 // one.pixels.shape[1])
        scene = data.scenes[data.start + i]
        drawn.append(draw_boxes(scene.image, [row["box"] for row in listed], found, sure, enlarge))
    title = f"Synthetic scenes, regions named by CLIP: AP50 {scores['proposals']['ap50']:.3f}"
    page_of(drawn, ["" for _ in drawn], title).save(settings.out)
    return scores

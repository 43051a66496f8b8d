"""Scenes in memory for detection: pixels, boxes and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pymm.data._errors import fail
from pymm.data.scenes import Scenes, SceneSettings

BACKGROUND = "background"


class Detection(NamedTuple):
    """One picture with its objects.

    `pixels` `(3, H, W)` uint8; `boxes` `(R, 4)` float32, left, top, right, bottom in pixels; `labels` `(R,)`
    int64 in [1, K]; `visible` `(R,)` float32, the share of each object that is not hidden.
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor
    visible: Tensor


class Truth(NamedTuple):
    """What is in a picture, for its score.

    `boxes (R, 4)`, left, top, right, bottom in pixels; `labels (R,)` int64 from 1; `crowd (R,)` bool, boxes
    around many objects, in which a detection is neither right nor wrong.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor


@dataclass
class DetectionBatch:
    """Pictures of one size with their objects, of which each has its own number; fields as in `Detection`."""

    pixels: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    visible: list[Tensor]

    def __len__(self) -> int:
        return len(self.boxes)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> DetectionBatch:
        """The same batch with its tensors on `device`."""

        def moved(tensors: list[Tensor]) -> list[Tensor]:
            return [t.to(device, non_blocking=non_blocking) for t in tensors]

        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=non_blocking),
            boxes=moved(self.boxes),
            labels=moved(self.labels),
            visible=moved(self.visible),
        )


class SceneDetection(Dataset[Detection]):
    """Synthetic scenes `start` to `start + count − 1` as detection samples.

    Args:
        settings: see `SceneSettings`, or a source such as `"scenes:count=1000,classes=20"`, which names the
            count too.
        count: scenes; by default the source's, or 1000.
        start: index of the first scene: another start, other scenes.
        keep: keep what was made, as bytes, for the next epoch.

    `classes[label]` is a label's name; `classes[0]` is the background, as torchvision counts them. The
    classes are those of all parts, so that labels mean the same for seen and held-out concepts.

    Raises:
        ValueError: for settings that do not fit.
    """

    def __init__(
        self,
        settings: SceneSettings | str | None = None,
        count: int | None = None,
        start: int = 0,
        keep: bool = True,
    ) -> None:
        asked = 1000
        if isinstance(settings, str):
            settings, asked = SceneSettings.parse(settings)
        self.count, self.start = asked if count is None else count, start
        if self.count < 1 or start < 0:
            fail("SceneDetection", "count and start", "at least 1 and 0", (self.count, start))
        self.scenes = Scenes(settings)
        names = [c.name for c in self.scenes.vocabulary]
        self.classes = (BACKGROUND, *names)
        self._label = {c.key: label for label, c in enumerate(self.scenes.vocabulary, start=1)}
        self._kept: dict[int, Detection] | None = {} if keep else None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Detection:
        if not 0 <= index < self.count:
            raise IndexError(f"SceneDetection: index must be in [0, {self.count}), got {index}")
        if self._kept is not None and index in self._kept:
            return self._kept[index]
        scene = self.scenes[self.start + index]
        sample = Detection(
            torch.from_numpy(np.array(scene.image)).permute(2, 0, 1).contiguous(),
            torch.tensor([one.box for one in scene.objects], dtype=torch.float32),
            torch.tensor([self._label[one.key] for one in scene.objects]),
            torch.tensor([one.visible for one in scene.objects], dtype=torch.float32),
        )
        if self._kept is not None:
            self._kept[index] = sample
        return sample

    def truth(self, index: int) -> Truth:
        """What is in a scene."""
        sample = self[index]
        return Truth(sample.boxes, sample.labels, torch.zeros(len(sample.labels), dtype=torch.bool))

    def name(self, index: int) -> str:
        """What a scene is called."""
        return f"scene {self.start + index}"


def collate(samples: Sequence[Detection]) -> DetectionBatch:
    """A batch of samples of one size, for `DataLoader(..., collate_fn=collate)`."""
    return DetectionBatch(
        torch.stack([one.pixels for one in samples]),
        [one.boxes for one in samples],
        [one.labels for one in samples],
        [one.visible for one in samples],
    )

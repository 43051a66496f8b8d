"""The systems of the results table: what each is trained on, by which command, and what it is to beat.

A row is added to ROWS and nowhere else. `pymm results NAME` trains it, judges it by `pymm eval`, does the
same for its baseline, and writes the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pymm.benchmarks.systems_baselines import (
    logistic_on_pixels,
    most_frequent_token,
    nearest_concept_on_pixels,
    neighbours_on_pixels,
    nothing_explained,
)
from pymm.benchmarks.systems_detection import ap50_of_one_name, ap50_of_wrong_names, ap50_on_scenes


@dataclass(frozen=True)
class Baseline:
    """What a row is compared with: a function of its finished run, or another run of the same task.

    Attributes:
        label: as the table says it.
        score: the run's directory -> the metric, for the same training and test data.
        train: arguments of `pymm train`, judged as the row is.
    """

    label: str
    score: Callable[[Path], float] | None = None
    train: tuple[str, ...] = ()


@dataclass(frozen=True)
class System:
    """A row.

    Attributes:
        name: on the command line and of the run's folder.
        system: the name in the survey, and the size.
        data: what it is trained and tested on; drawn data is called synthetic here.
        train: arguments of `pymm train`, without where the run goes. `{fashion}` is the folder of
            Fashion-MNIST, `{runs}` that of all runs.
        baseline: what it is to beat.
        metric: dotted key of what `pymm eval` gives; more is better.
        needs: the row whose run is used; it is trained first.
        evaluate: further arguments of `pymm eval`.
        judge: the run's directory -> the metric, where `pymm eval` does not give it.
    """

    name: str
    system: str
    data: str
    train: tuple[str, ...]
    baseline: Baseline
    metric: str = "top1"
    needs: str | None = None
    evaluate: tuple[str, ...] = ()
    judge: Callable[[Path], float] | None = None


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_LOGISTIC = Baseline("logistic regression on 16×16 pixels", logistic_on_pixels)
_NEIGHBOURS = Baseline("20 nearest neighbours on 28×28 pixels, cosine", neighbours_on_pixels)
_DIGITS = "scikit-learn's digits, 8×8, 20 % of them tested"
_FASHION = "Fashion-MNIST, 60,000 and 10,000 pictures"
_STYLES = "emoji of two drawing styles, tested on a third"
_EMOJI = f"{_STYLES}, 9 groups"
_SHIFTS = "--data.augment.crop-scale 0.8 1.0 --data.augment.rotate 10 --data.augment.translate 0.06"
_COLOURS = "--data.augment.saturation 0.4 --data.augment.brightness 0.2 --data.augment.random-background 0.1"
_DIGIT_RECIPE = f"--data.source digits --data.batch-size 64 --data.augment.background 0 0 0 {_SHIFTS}"
_FASHION_RECIPE = "--data.source fashion-mnist:{fashion} --data.augment.flip 0.5"
_EMOJI_RECIPE = f"--data.source emoji:twemoji,fluent --objective.label-smoothing 0.1 {_COLOURS} {_SHIFTS}"
_NEAREST = Baseline("the caption of the nearest picture in 16×16 pixels, cosine", nearest_concept_on_pixels)
_PAIRS = (
    "--data.source emoji:twemoji,fluent --data.captions name --data.batch-size 128 "
    "--evaluation.source emoji:noto"
)
# At 32 × 32 what a drawing is counts more than how it is drawn, and a step costs less.
_CAPTIONS = (
    f"clip {_PAIRS} --data.holdout 0.1 --model.image-size 32 --precision bf16-autocast "
    "--optimizer.learning-rate 1e-3 --optimizer.weight-decay 0.3 --data.augment.crop-scale 0.85 1.0 "
    "--data.augment.crop-ratio 0.9 1.11 --data.augment.rotate 8 --data.augment.translate 0.05 "
    "--data.augment.zoom 0.9 1.12 --data.augment.brightness 0.3 --data.augment.contrast 0.3 "
    "--data.augment.saturation 0.6 --data.augment.hue 0.1 --data.augment.grayscale 0.2 "
    "--data.augment.random-background 0.1"
)


def _clip(name: str, system: str, arguments: str) -> System:
    """CLIP by some objective and with some tower, on the captions of emoji."""
    train = f"{_CAPTIONS} {arguments}"
    return System(name, system, f"{_STYLES}, captions", _words(train), _NEAREST, metric="seen_concepts.r1")


_TUNE = f"classify --backbone clip_rn_tiny --data.batch-size 64 --schedule.steps 120 {_EMOJI_RECIPE}"
_PICTURES = f"--data.source emoji:twemoji,fluent {_COLOURS} {_SHIFTS}"
_AFTER = f"--data.batch-size 64 --schedule.steps 150 --optimizer.learning-rate 1e-3 {_EMOJI_RECIPE}"
_VIT, _BEIT = (f"classify --backbone {name}_mini_patch8_64 {_AFTER}" for name in ("vit", "beit"))
_SCRATCH = "the same network and steps from random weights"

ROWS = (
    System(
        "lenet5-digits", "LeNet-5", _DIGITS,
        _words(
            f"classify --backbone lenet5 {_DIGIT_RECIPE} --optimizer.learning-rate 3e-3 --schedule.steps 600"
        ),
        _LOGISTIC,
    ),
    System(
        "lenet5-fashion", "LeNet-5", _FASHION,
        _words(
            "classify --backbone lenet5 --optimizer.learning-rate 3e-3 --data.batch-size 128 "
            f"--schedule.steps 2000 {_FASHION_RECIPE}"
        ), _NEIGHBOURS,
    ),
    System(
        "alexnet-digits", "AlexNet, tiny", _DIGITS,
        _words(f"classify --backbone alexnet_tiny {_DIGIT_RECIPE} --schedule.steps 2500"),
        _LOGISTIC,
    ),
    System(
        "vgg-fashion", "VGG, tiny, batch norm", _FASHION,
        _words(
            "classify --backbone vgg_tiny --optimizer.learning-rate 2e-3 --data.batch-size 128 "
            f"--schedule.steps 1500 {_FASHION_RECIPE}"
        ), _NEIGHBOURS,
    ),
    System(
        "resnet18-emoji", "ResNet-18", _EMOJI,
        _words(
            "classify --backbone resnet18 --model.image-size 64 --data.batch-size 64 --schedule.steps 300 "
            f"--optimizer.learning-rate 1e-3 {_EMOJI_RECIPE}"
        ), _LOGISTIC,
    ),
    System(
        "vit-emoji", "ViT, CLIP-tiny's tower: 4 blocks of width 128", _EMOJI,
        _words(
            "classify --backbone clip_tiny --data.batch-size 128 --schedule.steps 500 "
            f"--optimizer.learning-rate 1e-3 {_EMOJI_RECIPE}"
        ), _LOGISTIC,
    ),
    _clip(
        "clip-resnet", "CLIP with a ResNet tower, tiny",
        "--schedule.steps 2000 --objective.label-smoothing 0.1",
    ),
    _clip(
        "clip-resnet-triplet", "CLIP with a ResNet tower, tiny, by semi-hard triplets",
        "--schedule.steps 2000 --objective.kind triplet",
    ),
    _clip(
        "clip-resnet-sigmoid", "CLIP with a ResNet tower, tiny, by the sigmoid loss",
        "--schedule.steps 2000 --model.name clip_rn_tiny_sigmoid --objective.kind sigmoid",
    ),
    _clip(
        "clip-vit", "CLIP with a ViT tower, tiny",
        "--schedule.steps 3000 --objective.label-smoothing 0.1 --model.name clip_tiny",
    ),
    _clip(
        "clip-vit-triplet", "CLIP with a ViT tower, tiny, by semi-hard triplets",
        "--schedule.steps 3000 --model.name clip_tiny --objective.kind triplet",
    ),
    _clip(
        "clip-vit-sigmoid", "CLIP with a ViT tower, tiny, by the sigmoid loss",
        "--schedule.steps 3000 --model.name clip_tiny_sigmoid --objective.kind sigmoid",
    ),
    System(
        "zero-shot-detection", "CLIP with a ResNet tower, tiny, over windows",
        "emoji of two drawing styles; 40 synthetic scenes of 20 classes in a third",
        _words(
            f"clip {_PAIRS} --optimizer.weight-decay 0.1 --schedule.steps 1250 "
            "--data.augment.crop-scale 0.7 1.0 --data.augment.crop-ratio 0.85 1.18 "
            "--data.augment.rotate 15 --data.augment.translate 0.12 --data.augment.zoom 0.7 1.25 "
            "--data.augment.brightness 0.2 --data.augment.contrast 0.2 "
            "--data.augment.saturation 0.3 --data.augment.hue 0.04 --data.augment.random-background 1.0"
        ),
        Baseline("the same windows and scores, each with the next class's name", ap50_of_wrong_names),
        metric="AP50",
        judge=ap50_on_scenes,
    ),
    System(
        "rcnn-scenes", "Faster R-CNN, tiny", "2,000 synthetic scenes of 20 classes, 200 others tested",
        _words("detect --data.source scenes:count=2000,classes=20 --schedule.steps 2000"),
        Baseline("the true boxes, all with the most frequent name", ap50_of_one_name),
        metric="ap50",
    ),
    System(
        "resnet-transfer", "ResNet, tiny, fine-tuned from the CLIP above", _EMOJI,
        _words(
            f"{_TUNE} --init {{runs}}/clip-resnet --optimizer.learning-rate 5e-4 --optimizer.head-rate 4 "
            "--optimizer.layer-decay 0.8"
        ),
        Baseline(
            _SCRATCH,
            train=_words(f"{_TUNE} --optimizer.learning-rate 1e-3"),
        ),
        needs="clip-resnet",
    ),
    System(
        "resnet-probe", "ResNet, tiny, of the CLIP above, frozen but for its head", _EMOJI,
        _words(f"{_TUNE} --init {{runs}}/clip-resnet --freeze all --optimizer.learning-rate 5e-3"),
        _LOGISTIC,
        needs="clip-resnet",
    ),
    System(
        "mae-emoji", "MAE, 6 blocks of width 192", _STYLES,
        _words(
            f"mae --data.batch-size 128 --optimizer.learning-rate 2e-3 --schedule.steps 1000 {_PICTURES}"
        ),
        Baseline("the mean of each hidden patch", nothing_explained),
        metric="explained",
    ),
    System(
        "vit-mae", "ViT, 6 blocks of width 192, fine-tuned from the MAE above", _EMOJI,
        _words(f"{_VIT} --init {{runs}}/mae-emoji --optimizer.layer-decay 0.75"),
        Baseline(_SCRATCH, train=_words(_VIT)),
        needs="mae-emoji",
    ),
    System(
        "vit-mae-probe", "ViT of the MAE above, frozen but for its head", _EMOJI,
        _words(f"{_VIT} --init {{runs}}/mae-emoji --freeze all"),
        _LOGISTIC,
        needs="mae-emoji",
    ),
    System(
        "tokenizer-emoji", "Image tokenizer, VQ-VAE of 512 codes, stride 8", _STYLES,
        _words(
            "tokenizer --data.batch-size 64 --optimizer.learning-rate 2e-3 --schedule.steps 500 "
            f"{_PICTURES}"
        ),
        Baseline("the mean colour of each picture", nothing_explained),
        metric="explained",
    ),
    System(
        "beit-emoji", "BEiT on the tokens above, 6 blocks of width 192", _STYLES,
        _words(
            "beit --tokenizer {runs}/tokenizer-emoji --data.batch-size 128 "
            f"--optimizer.learning-rate 2e-3 --schedule.steps 500 {_PICTURES}"
        ),
        Baseline("the token that is hidden most often", most_frequent_token),
        metric="accuracy",
        needs="tokenizer-emoji",
    ),
    System(
        "beit-classifier", "BEiT above, fine-tuned", _EMOJI,
        _words(f"{_BEIT} --init {{runs}}/beit-emoji --optimizer.layer-decay 0.75"),
        Baseline(_SCRATCH, train=_words(_BEIT)),
        needs="beit-emoji",
    ),
    System(
        "beit-probe", "BEiT above, frozen but for its head", _EMOJI,
        _words(f"{_BEIT} --init {{runs}}/beit-emoji --freeze all"),
        _LOGISTIC,
        needs="beit-emoji",
    ),
)  # fmt: skip

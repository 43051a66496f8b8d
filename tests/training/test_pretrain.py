"""From pictures to a masked autoencoder, a tokenizer and a BEiT, and from these to a classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pymm import cli
from pymm.training import SettingsError, load_run, train_classify
from pymm.training.beit import BEiTRun, train_beit
from pymm.training.classify_settings import BackboneSettings, ClassifySettings, PictureSettings
from pymm.training.log import LOG, read_log
from pymm.training.mae import MAERun, train_mae
from pymm.training.pretrain_settings import (
    BEiTModelSettings,
    BEiTSettings,
    MAEModelSettings,
    MAESettings,
    PretrainOptimizerSettings,
    TokenizerModelSettings,
    TokenizerSettings,
)
from pymm.training.task_settings import AdamWSettings, RunSettings, ScheduleSettings
from pymm.training.tokenizer import TokenizerRun, train_tokenizer
from tests.data.shards import samples, write

SIDE = 32


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gradients in two directions, of many colours, in two classes."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    ramp = np.linspace(0, 1, SIDE)
    for part, n in (("train", 24), ("test", 8)):
        for name in ("across", "down"):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                way = ramp[None, :, None] if name == "across" else ramp[:, None, None]
                first, last = rng.integers(0, 256, (2, 3))
                pixels = np.broadcast_to(first + (last - first) * way, (SIDE, SIDE, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


def common(pictures: Path, out: Path, steps: int) -> dict[str, Any]:
    return {
        "data": PictureSettings(source=str(pictures), batch_size=16),
        "schedule": ScheduleSettings(steps=steps),
        "run": RunSettings(out=str(out), checkpoint_every=steps // 2, log_every=1, threads=1),
    }


def mae_settings(pictures: Path, out: Path, steps: int = 24) -> MAESettings:
    optimizer = PretrainOptimizerSettings(learning_rate=2e-3)
    return MAESettings(
        model=MAEModelSettings(image_size=SIDE), optimizer=optimizer, **common(pictures, out, steps)
    )


@pytest.fixture(scope="module")
def mae_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mae") / "run"
    result = train_mae(mae_settings(pictures, out))
    assert result.status == "completed"
    assert result.evaluation is not None
    assert result.evaluation["pictures"] == 16
    assert result.evaluation["loss_of_zeros"] > 0.9
    assert result.evaluation["explained"] > 0.1
    return out


@pytest.fixture(scope="module")
def tokenizer_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "run"
    settings = TokenizerSettings(
        model=TokenizerModelSettings(image_size=SIDE),
        optimizer=AdamWSettings(learning_rate=3e-3),
        **common(pictures, out, 40),
    )
    result = train_tokenizer(settings)
    assert result.evaluation is not None
    assert result.evaluation["codes"] > 8
    assert 1 < result.evaluation["perplexity"] <= result.evaluation["codes"]
    losses = [line["loss"] for line in read_log(out / LOG) if "loss" in line]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    return out


def beit_settings(pictures: Path, tokenizer: Path, out: Path) -> BEiTSettings:
    return BEiTSettings(
        model=BEiTModelSettings(image_size=SIDE, tokenizer=str(tokenizer)),
        optimizer=PretrainOptimizerSettings(learning_rate=2e-3),
        **common(pictures, out, 20),
    )


@pytest.fixture(scope="module")
def beit_run(pictures: Path, tokenizer_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("beit") / "run"
    result = train_beit(beit_settings(pictures, tokenizer_run, out))
    assert result.evaluation is not None
    losses = [line["loss"] for line in read_log(out / LOG) if "loss" in line]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    return out


def test_mae_loads_and_scores_as_at_its_end(mae_run: Path) -> None:
    run = load_run(mae_run)
    assert isinstance(run, MAERun)
    last = [line["evaluation"] for line in read_log(mae_run / LOG) if "evaluation" in line][-1]
    assert run.evaluate() == pytest.approx(last, rel=1e-5)
    assert not run.model.encoder.embed.position.requires_grad


def test_shards_need_no_classes(tmp_path: Path) -> None:
    """As those of `pymm data scenes`, whose pictures have captions and boxes."""
    source = str(write(tmp_path / "scenes.tar", samples(0, 40)))
    settings = mae_settings(Path(source), tmp_path / "run", 2)
    result = train_mae(settings)
    assert result.evaluation is not None
    assert 1 <= result.evaluation["pictures"] < 24


def test_mae_is_continued_in_the_same_bits(mae_run: Path, pictures: Path, tmp_path: Path) -> None:
    """The masks are a function of the seed and the step."""
    settings = mae_settings(pictures, tmp_path / "again")
    whole = load_file(mae_run / "model.safetensors")
    steps = 0

    def stop(line: dict[str, Any]) -> None:
        nonlocal steps
        steps = line["step"]
        if steps == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_mae(settings, on_step=stop)
    assert steps == 15
    train_mae(settings)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.parametrize(
    ("backbone", "kind"), [("vit_mini_patch8_64", "mae"), ("beit_mini_patch8_64", "beit")]
)
def test_a_classifier_begins_with_what_was_pretrained(
    request: pytest.FixtureRequest, pictures: Path, tmp_path: Path, backbone: str, kind: str, capsys: Any
) -> None:
    init = request.getfixturevalue(f"{kind}_run")
    settings = ClassifySettings(
        model=BackboneSettings(backbone, init=str(init), image_size=SIDE, freeze="all", drop_path=0.5),
        **common(pictures, tmp_path / "classifier", 2),
    )
    train_classify(settings)
    assert "tensors placed from" in capsys.readouterr().out
    state, before = (load_file(p / "model.safetensors") for p in (tmp_path / "classifier", init))
    prefix = {"mae": "encoder.", "beit": "model."}[kind]
    assert torch.equal(state["blocks.3.mlp.fc1.weight"], before[f"{prefix}blocks.3.mlp.fc1.weight"])
    if kind == "beit":
        for i in range(6):
            assert torch.equal(state[f"biases.{i}.table"], before["model.biases.0.table"])


def test_drop_path_changes_what_is_learned(pictures: Path, tmp_path: Path) -> None:
    losses = []
    for rate in (0.0, 0.5):
        settings = ClassifySettings(
            model=BackboneSettings("vit_mini_patch8_64", image_size=SIDE, drop_path=rate),
            **common(pictures, tmp_path / str(rate), 2),
        )
        train_classify(settings)
        losses.append([line["loss"] for line in read_log(tmp_path / str(rate) / LOG) if "loss" in line])
    assert losses[0] != losses[1]


def test_beit_loads_and_scores_as_at_its_end(beit_run: Path) -> None:
    run = load_run(beit_run)
    assert isinstance(run, BEiTRun)
    last = [line["evaluation"] for line in read_log(beit_run / LOG) if "evaluation" in line][-1]
    assert run.evaluate() == pytest.approx(last, rel=1e-5)
    assert not any(name.startswith("tokenizer") for name in run.model.state_dict())


def test_beit_needs_a_tokenizer(pictures: Path, mae_run: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"model\.tokenizer must be a run of the task tokenizer, got"):
        train_beit(beit_settings(pictures, mae_run, tmp_path))
    with pytest.raises(FileNotFoundError):
        train_beit(beit_settings(pictures, tmp_path / "nothing", tmp_path))


def test_other_models_are_refused(pictures: Path, tokenizer_run: Path, tmp_path: Path) -> None:
    settings = mae_settings(pictures, tmp_path)
    with pytest.raises(
        SettingsError, match=r"model.name must be one of `pymm list 'mae_\*'`, got 'resnet18'"
    ):
        train_mae(replace(settings, model=MAEModelSettings("resnet18")))
    asked = beit_settings(pictures, tokenizer_run, tmp_path)
    wrong = replace(asked, model=replace(asked.model, name="beit_mini_patch8_64"))
    with pytest.raises(SettingsError, match=r"beit_\*_pretraining'`, got 'beit_mini_patch8_64'"):
        train_beit(wrong)


@pytest.mark.parametrize("kind", ["mae", "tokenizer"])
def test_eval_draws(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "picture.png"
    assert cli.main(["eval", str(request.getfixturevalue(f"{kind}_run")), "--picture", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.width > 400
        assert len(image.convert("RGB").getcolors(1 << 20) or ()) > 50


@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16"])
def test_half_precision(pictures: Path, tokenizer_run: Path, tmp_path: Path, precision: Any) -> None:
    """Two steps of each, and weights that are finite."""
    small = [
        (train_mae, mae_settings(pictures, tmp_path / "mae", 2)),
        (train_beit, beit_settings(pictures, tokenizer_run, tmp_path / "beit")),
        (
            train_tokenizer,
            TokenizerSettings(
                model=TokenizerModelSettings(image_size=SIDE), **common(pictures, tmp_path / "tokenizer", 2)
            ),
        ),
    ]
    for train, settings in small:
        asked: Any = replace(settings, precision=precision, schedule=ScheduleSettings(steps=2))
        result = train(asked)
        assert result.weights is not None
        assert all(t.isfinite().all() for t in load_file(result.weights).values())


def test_tokenizer_gives_back_its_run(tokenizer_run: Path) -> None:
    run = load_run(tokenizer_run)
    assert isinstance(run, TokenizerRun)
    last = [line["evaluation"] for line in read_log(tokenizer_run / LOG) if "evaluation" in line][-1]
    assert run.evaluate() == pytest.approx(last, rel=1e-5)

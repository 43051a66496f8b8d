"""From shards to a model that loads again: the whole road, with the real model and the real loader."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pymm.data import Tokenizer
from pymm.models import CLIPSpec, bert, clip, describe, vit
from pymm.training import (
    CheckpointError,
    ClipSettings,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
    SettingsError,
    train_clip,
)
from pymm.training.clip import load_run
from pymm.training.log import read_log
from pymm.training.parts import evaluate
from pymm.training.towers import begin_towers

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "grey": (128, 128, 128)}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of 16 pictures in four colours."""
    folder = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "0000.tar", "w") as tar:
        for number in range(16):
            colour = list(COLOURS)[number % 4]
            pixels = np.full((20, 20, 3), COLOURS[colour]) + rng.integers(-20, 20, (20, 20, 3))
            picture = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(picture, "PNG")
            caption = json.dumps({"caption": f"{colour} thing {number}", "tags": [colour]}).encode()
            for ending, data in (("png", picture.getvalue()), ("json", caption)):
                header = tarfile.TarInfo(f"{number:04}.{ending}")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    return folder


def settings(shards: Path, out: Path, **sections: Any) -> ClipSettings:
    base = ClipSettings(
        model=ModelSettings("clip_tiny", image_size=16),
        data=DataSettings(source=(str(shards),), batch_size=8, context_length=8),
        optimizer=OptimizerSettings(ema=0.5),
        schedule=ScheduleSettings(steps=4),
        evaluation=EvaluationSettings(source=(str(shards),)),
        run=RunSettings(out=str(out), checkpoint_every=2, log_every=1, threads=2),
    )
    changes = {
        name: replace(getattr(base, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return replace(base, **changes)


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipSettings, Any]:
    given = settings(shards, tmp_path_factory.mktemp("run") / "a")
    return given, train_clip(given)


def test_a_run_leaves_what_it_promises(run: tuple[ClipSettings, Any]) -> None:
    given, result = run
    out = Path(given.run.out)
    assert result.status == "completed"
    names = {"settings.json", "tokenizer.json", "log.jsonl", "model.safetensors", "checkpoints", ".lock"}
    assert {p.name for p in out.iterdir()} == names
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]
    assert [line["step"] for line in read_log(out / "log.jsonl")] == [1, 2, 3, 4, 4]
    assert 0 <= result.evaluation["seen_concepts"]["r1"] <= 1
    assert result.evaluation["seen_concepts"]["queries"] == 16


def test_it_loads_in_a_new_process_and_scores_the_same(run: tuple[ClipSettings, Any], tmp_path: Path) -> None:
    given, result = run
    command = [
        sys.executable,
        "-m",
        "pymm.cli",
        "eval",
        given.run.out,
        "--out",
        str(tmp_path / "scores.json"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(result.evaluation))
    assert "seen" in done.stdout


def test_every_part_of_a_run_loads(run: tuple[ClipSettings, Any]) -> None:
    given, result = run
    whole = load_run(given.run.out)
    assert whole.settings == given
    assert not whole.model.training
    assert whole.weights.name == "model.safetensors"
    assert evaluate(whole.model, whole.tokenizer, given) == result.evaluation
    state = whole.model.state_dict()
    for path in (result.checkpoint, result.checkpoint / "average.safetensors", result.weights):
        other = load_run(path).model.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in other.items())
    raw = load_run(result.checkpoint / "model.safetensors").model.state_dict()
    assert not torch.equal(raw["text.head.weight"], state["text.head.weight"])


def test_an_interrupted_run_loads_and_goes_on(
    run: tuple[ClipSettings, Any], shards: Path, tmp_path: Path
) -> None:
    given = settings(shards, tmp_path / "b")

    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train_clip(given, on_step=interrupt)
    assert (result.status, result.step) == ("interrupted", 3)
    assert load_run(given.run.out).weights.parent == result.checkpoint
    tokenizer = (tmp_path / "b/tokenizer.json").read_bytes()
    result = train_clip(given)
    assert (tmp_path / "b/tokenizer.json").read_bytes() == tokenizer
    assert result.weights.read_bytes() == run[1].weights.read_bytes()
    assert result.evaluation == run[1].evaluation


@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16"])
def test_low_precision_and_micro_batches(
    precision: str, run: tuple[ClipSettings, Any], shards: Path, tmp_path: Path
) -> None:
    given = settings(shards, tmp_path, precision=precision, data={"micro_batch_size": 4})
    result = train_clip(given)
    assert {t.dtype for t in load_file(result.weights).values()} == {torch.float32}
    loaded = load_run(result.directory)
    assert evaluate(loaded.model, loaded.tokenizer, given) == result.evaluation
    low, full = read_log(tmp_path / "log.jsonl"), read_log(Path(run[0].run.out) / "log.jsonl")
    assert low[0]["loss"] == pytest.approx(full[0]["loss"], rel=0.02)
    assert low[0]["loss"] != full[0]["loss"]


def test_the_sigmoid_objective(shards: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"objective": {"kind": "sigmoid"}, "schedule": {"steps": 1}}
    with pytest.raises(SettingsError, match=r"model\.name must be a model with a logit bias"):
        train_clip(settings(shards, tmp_path / "e", **sections))
    name = {"name": "clip_tiny_sigmoid"}
    result = train_clip(settings(shards, tmp_path / "e", model=name, **sections))
    assert result.loss is not None


def test_the_embedded_pack_and_its_unseen_concepts(tmp_path: Path) -> None:
    given = ClipSettings(
        model=ModelSettings("clip_tiny", image_size=16),
        data=DataSettings(
            source=("emoji:fluent",), batch_size=4, holdout=0.98, vocab_size=300, context_length=8
        ),
        schedule=ScheduleSettings(steps=1),
        run=RunSettings(out=str(tmp_path)),
    )
    assert train_clip(given).status == "completed"
    loaded = load_run(tmp_path)
    assert loaded.tokenizer.vocab_size <= 300
    assert loaded.tokenizer.context_length == 8
    with pytest.raises(SettingsError, match=r"evaluation\.source must be at least one source"):
        evaluate(loaded.model, loaded.tokenizer, given)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name": "clip_tinny"}}, "clip_tiny"),
        ({"model": {"name": "vit_tiny_patch16_224", "image_size": None}}, "model.name must be a CLIP model"),
        ({"data": {"context_length": 99}}, "data.context_length must be at most the model's 24, got 99"),
        ({"data": {"source": ("/nowhere/*.tar",)}}, "/nowhere"),
        ({"data": {"batch_size": 17}}, "at least 17 usable samples"),
    ],
)
def test_what_does_not_fit_is_named(
    sections: dict[str, Any], message: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_clip(settings(shards, tmp_path / "f", **sections))


def test_a_tokenizer_from_a_file(run: tuple[ClipSettings, Any], shards: Path, tmp_path: Path) -> None:
    given, _ = run
    file = f"{given.run.out}/tokenizer.json"
    train_clip(settings(shards, tmp_path / "g", data={"tokenizer": file}, schedule={"steps": 1}))
    kept = Tokenizer.load(tmp_path / "g")
    assert kept("red thing 4").tolist() == Tokenizer.load(file)("red thing 4").tolist()


def test_loading_says_what_is_missing(run: tuple[ClipSettings, Any], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        load_run(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no settings\.json there"):
        load_run(tmp_path)
    (tmp_path / "settings.json").write_bytes((Path(run[0].run.out) / "settings.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"holds neither model\.safetensors nor a checkpoint"):
        load_run(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_run(tmp_path)


@pytest.mark.parametrize("kind", ["triplet", "sigmoid"])
def test_other_objectives_train(shards: Path, tmp_path: Path, kind: str) -> None:
    name = "clip_tiny_sigmoid" if kind == "sigmoid" else "clip_tiny"
    given = settings(shards, tmp_path / kind, objective={"kind": kind}, model={"name": name})
    result = train_clip(given)
    assert result.status == "completed"
    lines = [line for line in read_log(tmp_path / kind / "log.jsonl") if "loss" in line]
    assert ("logit_scale" in lines[0]) == (kind == "sigmoid")
    if kind == "triplet":  # cosines alone: the temperature is not asked, and stays
        scale = load_run(tmp_path / kind).model.logit_scale
        assert scale.item() == pytest.approx(np.log(1 / 0.07))


def test_frozen_towers_keep_their_weights(
    shards: Path, tmp_path: Path, run: tuple[ClipSettings, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """LiT: an image tower of another run stays as it is; a new projection for it is trained."""
    begun = {"image_init": run[0].run.out, "freeze": ("image",)}
    lines = {}
    for name in ("clip_tiny", "clip_tiny_bert"):
        given = settings(shards, tmp_path / name, model={"name": name, **begun})
        train_clip(given)
        lines[name] = capsys.readouterr().out
        before = load_run(run[0].run.out).model.visual.state_dict()
        after = load_run(tmp_path / name).model.visual.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        frozen = {f"visual.{key}" for key in before}
        kept = load_file(max((tmp_path / name / "checkpoints").iterdir()) / "optimizer.safetensors")
        assert not any(key in named for key in frozen for named in kept)
    assert "835,328 parameters frozen" in lines["clip_tiny"]
    text = {"name": "clip_tiny", "text_init": run[0].run.out, "freeze": ("text",)}
    given = settings(shards, tmp_path / "text", model=text)
    train_clip(given)
    before, after = load_run(run[0].run.out).model, load_run(tmp_path / "text").model
    assert torch.equal(before.text.embed.weight, after.text.embed.weight)
    assert not torch.equal(before.visual.embed.weight, after.visual.embed.weight)


def test_a_tower_alone_brings_no_projection(tmp_path: Path) -> None:
    """A BERT and a ViT that classifies: their heads stay new and are trained."""
    torch.manual_seed(5)
    spec = describe("clip_lit_vit_base_patch16")
    assert isinstance(spec, CLIPSpec)
    small = replace(
        spec,
        image=replace(spec.image, width=32, depth=1, heads=2, mlp_width=64, image_size=32),
        text=replace(spec.text, width=32, depth=1, heads=2, mlp_width=64, vocab_size=50),
        embed=24,
    )
    save_file(vit.build(replace(small.image, num_classes=10)).state_dict(), tmp_path / "vit.safetensors")
    save_file(bert.build(small.text).state_dict(), tmp_path / "bert.safetensors")
    model = clip.build(small)
    told = begin_towers(
        model,
        ModelSettings(
            "x",
            image_init=str(tmp_path / "vit.safetensors"),
            text_init=str(tmp_path / "bert.safetensors"),
            freeze=("image", "text"),
        ),
    )
    assert told.count("tensors from") == 2
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"visual.head.weight", "visual.head.bias", "text.head.weight", "logit_scale"}
    torch.manual_seed(5)
    assert torch.equal(
        model.visual.blocks[0].attn.qkv.weight,
        vit.build(replace(small.image, num_classes=10)).blocks[0].attn.qkv.weight,
    )
    with pytest.raises(SettingsError, match=r"model.text_init must be a checkpoint with all of the tower"):
        begin_towers(model, ModelSettings("x", text_init=str(tmp_path / "vit.safetensors")))
    broken = bert.build(small.text).state_dict()
    broken["types"][0, 0] = float("nan")
    save_file(broken, tmp_path / "nan.safetensors")
    with pytest.raises(SettingsError, match=r"model.text_init must hold finite weights"):
        begin_towers(model, ModelSettings("x", text_init=str(tmp_path / "nan.safetensors")))


def test_a_tower_without_an_init_is_not_frozen() -> None:
    with pytest.raises(SettingsError, match=r"model.image_init must be given where model.freeze holds image"):
        ModelSettings(freeze=("image",))


def test_clips_own_text_tower_needs_its_own_tokenizer(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "thing"]))
    given = settings(shards, tmp_path / "run", data={"tokenizer": str(tmp_path / "vocab.txt")})
    with pytest.raises(SettingsError, match=r"data.tokenizer must be of CLIP's kind"):
        train_clip(given)
    bert_text = settings(
        shards,
        tmp_path / "bert",
        model={"name": "clip_tiny_bert"},
        data={"tokenizer": str(tmp_path / "vocab.txt")},
    )
    assert train_clip(bert_text).status == "completed"
    assert load_run(tmp_path / "bert").tokenizer.start == 2

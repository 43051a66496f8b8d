"""`pymm demo`: train CLIP on emoji of two drawing styles, then let it name those of a third one."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymm.training.settings import (
    AugmentSettings,
    ClipSettings,
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
)

if TYPE_CHECKING:
    from pymm.evaluation.pictures import Retrieval
    from pymm.models import CLIP
    from pymm.training.clip import ClipRun

TRAINED, UNSEEN_STYLE = "emoji:twemoji,fluent", "emoji:noto"
MODEL = "clip_rn_tiny"
IMAGE_SIZE = 32  # what a drawing is counts more there than how it is drawn
STEPS, QUICK_STEPS = 1500, 3
QUERIES, SHOWN = 6, 5


@dataclass(frozen=True)
class DemoSettings:
    """Train on Twemoji and Fluent, and name Noto's emoji, a style that was never seen."""

    out: str = "runs/demo"
    """Receives the run, metrics.json, loss.png and retrievals.png."""
    seed: int = 0
    """Of everything random."""
    steps: int = STEPS
    """Optimizer steps."""
    max_seconds: float = 240.0
    """Training ends by then on a slow machine too; where it would have to end early, the learning rate
    falls sooner and the run does not repeat bit for bit."""
    threads: int | None = None
    """CPU threads; by default torch's."""
    device: str = "cpu"
    """Where the model is."""
    quick: bool = False
    """A few steps only, which teach nothing: for tests."""


def recipe(settings: DemoSettings) -> ClipSettings:
    """The run that the demo makes: `pymm train clip` with these settings is the same one."""
    steps = QUICK_STEPS if settings.quick else settings.steps
    return ClipSettings(
        model=ModelSettings(name=MODEL, image_size=IMAGE_SIZE),
        data=DataSettings(
            source=(TRAINED,),
            batch_size=32 if settings.quick else 128,
            captions=("name",),
            holdout=0.1,
            augment=AugmentSettings(
                crop_scale=(0.85, 1.0),
                crop_ratio=(0.9, 1.11),
                rotate=8,
                translate=0.05,
                zoom=(0.9, 1.12),
                brightness=0.3,
                contrast=0.3,
                saturation=0.6,
                hue=0.1,
                grayscale=0.2,
                random_background=0.1,
            ),
        ),
        objective=ObjectiveSettings(label_smoothing=0.1),
        optimizer=OptimizerSettings(learning_rate=1e-3, weight_decay=0.3),
        schedule=ScheduleSettings(steps=steps, max_seconds=settings.max_seconds),
        evaluation=EvaluationSettings(source=(UNSEEN_STYLE,)),
        run=RunSettings(
            out=settings.out,
            seed=settings.seed,
            checkpoint_every=max(1, steps // 3),
            log_every=5,
            threads=settings.threads,
            device=settings.device,
        ),
        precision="bf16-autocast",
    )


def run(settings: DemoSettings) -> int:
    """0 when everything is written, 128 + the signal's number when it was interrupted and can go on."""
    from pymm.evaluation.pictures import require_matplotlib

    require_matplotlib()
    import torch
    from rich.console import Console

    from pymm.training.clip import load_run, train_clip
    from pymm.training.environment import reproducible
    from pymm.training.files import write_atomically
    from pymm.training.parts import build_model, evaluate

    began = time.monotonic()
    console, chosen, out = Console(), recipe(settings), Path(settings.out)
    console.print(f"Training on {TRAINED}, 90 % of the concepts; {UNSEEN_STYLE} is kept for the end.")
    result = train_clip(chosen)
    if result.signal is not None:
        return 128 + result.signal
    trained, device = load_run(out), torch.device(settings.device)
    with reproducible(device, settings.threads):
        untrained = build_model(chosen.model, chosen.run.seed)
        before = evaluate(untrained.to(device), trained.tokenizer, chosen)
        after = evaluate(trained.model.to(device), trained.tokenizer, chosen)
        kernels = _kernels(trained.model)
        sheet = _retrievals(trained)
    _print(console, before, after, kernels)
    _draw(out, sheet)
    metrics = {
        "unseen_style": after,
        "before_training": before,
        "run": {
            "model": MODEL,
            "parameters": sum(p.numel() for p in trained.model.parameters()),
            "steps": result.step,
            "training_s": round(result.elapsed_s, 1),
            "total_s": round(time.monotonic() - began, 1),
            "seed": settings.seed,
            "threads": settings.threads or torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": kernels,
        },
        "settings": asdict(settings),
    }
    write_atomically(out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    console.print(f"{out}: metrics.json, loss.png, retrievals.png, model.safetensors, log.jsonl")
    return 0


def _kernels(model: CLIP) -> dict[str, str]:
    """Which backend serves the ops of the run, asked with tensors of the run's kind."""
    import torch

    from pymm import ops

    device = model.logit_scale.device
    width, rows = model.text.num_features, 8
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(4 * width, width, dtype=torch.bfloat16, device=device)
    bias = torch.zeros(4 * width, dtype=torch.bfloat16, device=device)
    heads = torch.zeros(rows, 4, model.context_length, width // 4, dtype=torch.bfloat16, device=device)
    features = torch.zeros(rows, model.embed_dim, device=device)
    asked = (
        ops.explain(ops.linear, x, weight, bias, activation="gelu"),
        ops.explain(ops.attention, heads, heads, heads, is_causal=True),
        ops.explain(ops.info_nce, features, features, model.logit_scale.detach().exp()),
        ops.explain(ops.cosine_topk, features, features, 1),
    )
    return {answer.op: f"{answer.backend} ({answer.reason})" for answer in asked}


def _print(console: Any, before: dict[str, Any], after: dict[str, Any], kernels: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(title="Naming pictures in a style never seen", title_justify="left")
    table.add_column("concepts")
    for heading in ("among", "", "chance", "before", "after"):
        table.add_column(heading, justify="right")
    for name in ("seen_concepts", "unseen_concepts"):
        old, new = before[name], after[name]
        for key in ("r1", "r5"):
            numbers = (new[f"chance_{key}"], old[key], new[key])
            texts = [f"{number:.4f}" if number < 0.01 else f"{number:.3f}" for number in numbers]
            table.add_row(name.replace("_", " "), str(new["candidates"]), f"R@{key[1:]}", *texts)
    console.print(table)
    for op, answer in kernels.items():
        console.print(f"{op}: {answer}", markup=False, highlight=False)


def _retrievals(trained: ClipRun) -> list[tuple[str, str, list[Retrieval]]]:
    """Queries drawn by a hash, half from concepts seen in training, half from the others."""
    from pymm.data import EvalTransform, ImageTextLoader
    from pymm.data.samples import stable_hash
    from pymm.evaluation import encode_images, encode_texts
    from pymm.ops import cosine_topk
    from pymm.training.parts import unseen_of

    def batches(size: int) -> ImageTextLoader:
        return ImageTextLoader(
            UNSEEN_STYLE,
            transform=EvalTransform(size=size, output="uint8"),
            tokenizer=trained.tokenizer,
            batch_size=256,
            shuffle=False,
            drop_last=False,
            caption_mode="name",
        )

    model, unseen = trained.model, unseen_of(trained.settings.data)
    images = encode_images(model, batches(model.image_size).epoch(0))
    pictures = [picture for batch in batches(64).epoch(0) for picture in batch.pixels]
    columns = []
    for heading, new in (("Concepts seen in training", False), ("Concepts never seen", True)):
        own = [i for i, key in enumerate(images.keys) if (key in unseen) == new]
        among = own if new else list(range(len(images.keys)))
        asked = sorted(own, key=lambda i: stable_hash("query", images.keys[i]))[:QUERIES]
        texts = encode_texts(model, trained.tokenizer, [images.captions[i] for i in asked])
        order = cosine_topk(texts, images.features[among], len(among))[1]
        found = []
        for i, places in zip(asked, order.tolist(), strict=True):
            ranked = [among[place] for place in places]
            found.append(_retrieval(i, ranked, images.captions, pictures))
        columns.append((heading, f"the best {SHOWN} of {len(among)} pictures", found))
    return columns


def _retrieval(asked: int, ranked: list[int], captions: list[str], pictures: list[Any]) -> Retrieval:
    import torch

    from pymm.evaluation.pictures import Retrieval

    top = ranked[:SHOWN]
    shown = torch.stack([pictures[i] for i in top])
    return Retrieval(captions[asked], shown, [i == asked for i in top], ranked.index(asked) + 1)


def _draw(out: Path, sheet: list[tuple[str, str, list[Retrieval]]]) -> None:
    from pymm.evaluation.pictures import loss_curve, retrieval_sheet
    from pymm.training.log import LOG, read_log

    lines = [line for line in read_log(out / LOG) if "loss" in line]
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    loss_curve(out / "loss.png", steps, losses, "CLIP learns emoji: the loss of the training batches")
    title = "From words to pictures in a style never seen"
    note = (
        "Noto Emoji, Google, Apache-2.0. Right ones in green; at the right, the place of the right picture."
    )
    retrieval_sheet(out / "retrievals.png", sheet, title, note)

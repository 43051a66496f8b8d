"""Two processes on the loopback equal one process on the same batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymm import ops
from pymm.objectives import ContrastiveObjective
from pymm.training import train_classify
from pymm.training.classify_settings import BackboneSettings, ClassifySettings, PictureSettings
from pymm.training.distributed import World, gather, info_nce, process_group
from pymm.training.log import read_log
from pymm.training.task_settings import AugmentSettings, RunSettings, ScheduleSettings
from tests.training.small import PairLoader, fit, model, settings

ROOT = Path(__file__).parents[2]
# name -> micro-batch size, objective, precision
RUNS = {
    "whole": (None, "infonce", "fp32"),
    "cached": (2, "infonce", "fp32"),
    "sigmoid": (None, "sigmoid", "fp32"),
    "autocast": (None, "infonce", "bf16-autocast"),
}


def classifier(out: Path) -> ClassifySettings:
    """LeNet has no batch norm and these pictures no random changes: any number of processes does the same."""
    return ClassifySettings(
        model=BackboneSettings("lenet5"),
        data=PictureSettings(
            source="emoji:noto", batch_size=8, augment=AugmentSettings(crop_scale=(1, 1), crop_ratio=(1, 1))
        ),
        schedule=ScheduleSettings(steps=3),
        run=RunSettings(out=str(out), log_every=1, threads=1),
    )


# All that needs two processes, as starting them takes longer than what they do.
PROGRAM = """
import os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from pymm.objectives import ContrastiveObjective
from pymm.training import distributed
from tests.training.small import PairLoader, fit, model, settings
from pymm.training import train_classify
from tests.training.test_distributed import RUNS, classifier

out = Path(sys.argv[1])
torch.set_num_threads(1)


def weights(world):
    loader = PairLoader(batch_size=8, rank=world.rank, size=world.size)
    for name, (micro, kind, precision) in RUNS.items():
        data = dict(micro_batch_size=micro)
        given = settings(out / name, schedule=dict(steps=3), data=data, precision=precision)
        small = model(dropout=0.0, bias=kind == "sigmoid")
        result = fit(given, loader, small, objective=ContrastiveObjective(kind))
        assert result.status == "completed"
        assert result.weights.exists()
        assert result.checkpoint.exists()


def gradients(world):
    batch = PairLoader(batch_size=8, rank=world.rank, size=2).batch(0, 0)
    small = model(dropout=0.0)
    parallel = torch.nn.parallel.DistributedDataParallel(small)
    outputs = parallel(batch.pixels, batch.tokens)
    distributed.info_nce(*outputs, ids=batch.ids, label_smoothing=0.1).backward()
    ddp = {name: p.grad.clone() for name, p in small.named_parameters()}
    small = model(dropout=0.0)
    loss = distributed.info_nce(*small(batch.pixels, batch.tokens), ids=batch.ids, label_smoothing=0.1)
    loss.backward()
    unused, mine = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    if world.is_main:
        mine.grad = torch.ones(3)
    distributed.average_gradients([unused, *small.parameters(), mine])
    assert unused.grad is None
    assert mine.grad.tolist() == [0.5] * 3
    ours = {name: p.grad for name, p in small.named_parameters()}
    for name in ours:
        torch.testing.assert_close(ours[name], ddp[name])
    if world.is_main:
        save_file({**ours, "loss": loss.detach()}, out / "gradients.safetensors")


def interruption(world):
    loader = PairLoader(batch_size=8, rank=world.rank, size=world.size)

    def interrupt(line):  # in the main process alone
        if line["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    for name, parts in (("straight", 1), ("parts", 2)):
        given = settings(out / name, schedule=dict(steps=4))
        if parts == 2:
            result = fit(given, loader, model(batch_norm=True), on_step=interrupt)
            assert (result.status, result.step, result.signal) == ("interrupted", 2, signal.SIGTERM), result
        result = fit(given, loader, model(batch_norm=True))
        assert (result.status, result.step) == ("completed", 4), result


with distributed.process_group() as world:
    assert world.size == 2
    weights(world)
    gradients(world)
    interruption(world)
    train_classify(classifier(out / "classifier"))
    print("rank", world.rank, "done")
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The directory that two processes with torchrun's variables left behind, and what each printed."""
    out = tmp_path_factory.mktemp("two")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PROGRAM, str(out)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT, text=True, **pipes))
    texts = [p.communicate(timeout=150)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], "\n".join(texts)
    return out, texts


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name: str, two: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Weights after three steps: with the whole batch, with cached micro-batches, with the sigmoid loss."""
    micro, kind, precision = RUNS[name]
    small = model(dropout=0.0, bias=kind == "sigmoid")
    start = small.embed.weight.detach().clone()
    objective = ContrastiveObjective(kind)  # type: ignore[arg-type]
    # The products of two rows and of eight round differently, and AdamW makes much of it: hence the same cut.
    data = {"micro_batch_size": micro}
    given = settings(tmp_path, schedule={"steps": 3}, data=data, precision=precision)
    fit(given, PairLoader(batch_size=8), small, objective=objective)
    logs = [read_log(out / "log.jsonl") for out in (two[0] / name, tmp_path)]
    losses = [[line["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 1e-2)
    if precision != "fp32":  # AdamW makes a whole step of a sign, and bfloat16 decides signs
        return
    path = "checkpoints/step_00000003/model.safetensors"
    both = load_file(two[0] / name / path)
    for key, t in load_file(tmp_path / path).items():
        torch.testing.assert_close(both[key], t, rtol=0, atol=1e-6, msg=key)
    assert (both["embed.weight"] - start).abs().max() > 1e-3


def test_two_processes_train_the_classifier_of_one(two: tuple[Path, list[str]], tmp_path: Path) -> None:
    train_classify(classifier(tmp_path))
    logs = [read_log(out / "log.jsonl")[:3] for out in (two[0] / "classifier", tmp_path)]
    losses = [[line["loss"] for line in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(set(losses[0])) == 3


def test_gradients_are_those_of_one_process(two: tuple[Path, list[str]]) -> None:
    """AdamW hides a factor in the gradient, so the gradients themselves are compared, ours and DDP's."""
    small = model(dropout=0.0)
    batch = PairLoader(batch_size=8).batch(0, 0)
    image, text, scale = small(batch.pixels, batch.tokens)
    loss = ops.info_nce(image, text, scale, ids=batch.ids, label_smoothing=0.1)
    loss.backward()
    both = load_file(two[0] / "gradients.safetensors")
    torch.testing.assert_close(both.pop("loss"), loss.detach())
    for name, p in small.named_parameters():
        torch.testing.assert_close(both[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_distributed_run_goes_on_where_it_was_interrupted(two: tuple[Path, list[str]]) -> None:
    """One process alone is told to stop; both stop at the same step, and go on to the same bytes."""
    out, texts = two
    assert (out / "straight/model.safetensors").read_bytes() == (out / "parts/model.safetensors").read_bytes()
    assert texts[1].splitlines()[-1] == "rank 1 done"
    assert "step" not in texts[1]  # the main process alone speaks


def test_a_world_of_one_needs_no_group() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with process_group() as world:
        assert world == World(0, 1)
        assert gather(x) is x
        torch.testing.assert_close(info_nce(x, x, 5.0), ops.info_nce(x, x, 5.0))


def test_a_batch_must_be_shared_evenly() -> None:
    assert World(2, 4).rows(8) == slice(4, 6)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes, got 8"):
        World(0, 3).rows(8)

"""A run that is killed at any moment ends as if it had not been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pymm.training import rundir
from pymm.training.checkpoint import list_checkpoints
from pymm.training.errors import CheckpointError, SettingsError, TrainingError
from pymm.training.log import read_log
from tests.training.small import PairLoader, fit, settings

ROOT = Path(__file__).parents[2]
STEPS = 90

# A server that forks a run per line of its input, as importing torch takes longer than the run. Steps and
# checkpoint writes take about the same time there, so that a kill hits either.
SERVER = """
import os, sys, time
from pathlib import Path
import pymm.training.checkpoint as checkpoint
from tests.training.small import fit, settings

def slow(function):
    def wrapped(*args, **kwargs):
        time.sleep(0.003)
        return function(*args, **kwargs)
    return wrapped

checkpoint.sync_file = slow(checkpoint.sync_file)
checkpoint.save_tensors = slow(checkpoint.save_tensors)
while line := sys.stdin.readline():
    pid = os.fork()
    if pid == 0:
        directory, steps = line.split()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        given = settings(Path(directory), run=dict(checkpoint_every=3), schedule=dict(steps=int(steps)))
        result = fit(given, on_step=lambda line: time.sleep(0.005))
        os._exit(0 if result.status == "completed" else 3)
    print(pid, flush=True)
    sys.stdin.readline()  # until it is waited for, a run that has ended can still be sent a signal
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def losses(directory: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_log(directory / "log.jsonl") if "loss" in line]


def test_killed_at_random_moments_gives_the_same_bytes(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fit(settings(whole, run={"checkpoint_every": 3}, schedule={"steps": STEPS}))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert server.stdin is not None
    assert server.stdout is not None
    kills = 0
    for attempt in range(30):
        print(killed, STEPS, file=server.stdin, flush=True)
        pid = int(server.stdout.readline())
        if attempt < 8:
            time.sleep(rng.uniform(0.02, 0.4))
            os.kill(pid, signal.SIGKILL)
        print("wait", file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        kills += status == -signal.SIGKILL
        if status == 0:
            break
        assert status == -signal.SIGKILL, f"seed {seed}"
    server.communicate()
    assert status == 0
    assert kills > 0
    for name in ("model.safetensors", f"checkpoints/step_{STEPS:08d}/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), f"seed {seed}"
    assert losses(killed) == losses(whole), f"seed {seed}"
    assert [step for step, _ in losses(killed)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_cleanly(tmp_path: Path, number: int) -> None:
    loader = PairLoader()

    def interrupt(line: dict[str, object]) -> None:
        if line["step"] == 6:  # it arrives while the sixth step is over, and acts after the next
            os.kill(os.getpid(), number)

    given = settings(tmp_path / "run")
    before = signal.getsignal(number)
    result = fit(given, loader, on_step=interrupt)
    assert (result.status, result.step, result.signal, result.weights) == ("interrupted", 7, number, None)
    assert signal.getsignal(number) is before
    assert result.checkpoint is not None
    assert result.checkpoint.name == "step_00000007"
    result = fit(given)
    assert result.status == "completed"
    fit(settings(tmp_path / "whole"))
    assert (tmp_path / "run/model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_resume_reads_only_the_batches_that_are_left(tmp_path: Path) -> None:
    def stop(line: dict[str, object]) -> None:
        if line["step"] == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(settings(tmp_path), PairLoader(batches=6), on_step=stop)
    assert list_checkpoints(tmp_path / "checkpoints")[0].name == "step_00000010"
    loader = PairLoader(batches=6)
    fit(settings(tmp_path), loader)
    assert loader.drawn == 2


def test_same_seed_same_bytes_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(settings(tmp_path / name, run={"seed": seed}))
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c  # the seed reaches dropout: the model and the data are the same


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
        return
    if how == "truncated":
        data = data[: len(data) // 2]
    else:
        data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_damage_falls_back_to_the_one_before(
    tmp_path: Path, how: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(tmp_path / "run")
    fit(given)
    expected = (tmp_path / "run/model.safetensors").read_bytes()
    damage(tmp_path / "run/checkpoints/step_00000012" / name, how)
    capsys.readouterr()
    result = fit(given)
    shown = capsys.readouterr().out
    assert "step_00000012" in shown
    if (name, how) != ("manifest.json", "flipped"):  # which says then that another file is damaged
        assert name in shown
    assert "falling back" in shown
    assert result.loss is not None  # it had steps to do
    assert (tmp_path / "run/model.safetensors").read_bytes() == expected
    assert [p.name for p in list_checkpoints(tmp_path / "run/checkpoints")] == [
        "step_00000012",
        "step_00000010",
    ]


def test_all_damaged_is_an_error_and_not_a_new_run(tmp_path: Path) -> None:
    fit(settings(tmp_path))
    for path in list_checkpoints(tmp_path / "checkpoints"):
        damage(path / "model.safetensors", "flipped")
    with pytest.raises(CheckpointError, match=r"all 2 in .* are damaged"):
        fit(settings(tmp_path))


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    fit(settings(tmp_path))
    with pytest.raises(SettingsError, match=r"optimizer\.learning_rate must be 0\.003 .* got 0\.1"):
        fit(settings(tmp_path, optimizer={"learning_rate": 0.1}))
    with pytest.raises(SettingsError, match=r"schedule\.steps"):
        fit(settings(tmp_path, schedule={"steps": 13}))
    with pytest.raises(SettingsError, match=r"resume must be 'auto'"):
        fit(settings(tmp_path, run={"resume": "never"}))
    assert fit(settings(tmp_path, run={"log_every": 3, "keep": 1})).status == "completed"


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    def second(line: dict[str, object]) -> None:
        if line["step"] == 2:
            with pytest.raises(TrainingError, match="another process is training"):
                fit(settings(tmp_path))
        if line["step"] == 3:  # that attempt has not let go of the lock
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    rundir._HELD.clear()  # another process does not know what this one holds
                    with rundir.open_run(tmp_path, settings(tmp_path)):
                        pass
                except TrainingError:
                    code = 42
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42

    fit(settings(tmp_path), on_step=second)


def test_the_workers_of_a_killed_run_do_not_keep_its_directory(tmp_path: Path) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with rundir.open_run(tmp_path, settings(tmp_path)):
            worker = os.fork()
            if worker == 0:
                time.sleep(30)
                os._exit(0)
            os.write(write, str(worker).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    worker = int(os.read(read, 100))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    try:
        os.kill(worker, 0)  # it is still there
        assert fit(settings(tmp_path)).status == "completed"
    finally:
        os.kill(worker, signal.SIGKILL)


def test_completed_run_gives_its_result_again(tmp_path: Path) -> None:
    scores = []

    def evaluate(model: object, step: int) -> dict[str, float]:
        scores.append(step)
        return {"score": float(step)}

    given = settings(tmp_path, run={"evaluate_every": 5})
    first = fit(given, evaluate=evaluate)
    assert scores == [5, 10, 12]
    (tmp_path / "model.safetensors").unlink()
    again = fit(given, evaluate=evaluate)
    assert scores == [5, 10, 12]
    assert again.evaluation == first.evaluation == {"score": 12.0}
    assert again.weights is not None
    assert load_file(again.weights).keys() == load_file(again.checkpoint / "average.safetensors").keys()
    lines = [line for line in read_log(tmp_path / "log.jsonl") if "evaluation" in line]
    assert [line["step"] for line in lines] == [5, 10, 12]


def test_a_directory_of_an_unstarted_run_is_taken_over(tmp_path: Path) -> None:
    def stop(line: dict[str, object]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(settings(tmp_path), on_step=stop)
    assert fit(settings(tmp_path, optimizer={"learning_rate": 0.1})).status == "completed"


def test_waiting_is_not_counted(tmp_path: Path) -> None:
    def stop(line: dict[str, object]) -> None:
        if line["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(settings(tmp_path), on_step=stop)
    time.sleep(0.5)
    assert fit(settings(tmp_path)).elapsed_s < 0.5

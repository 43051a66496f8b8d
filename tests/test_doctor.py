from __future__ import annotations

import json

import pytest

from pymm import doctor, ops
from pymm.ops._extension import require_extension


def test_json_names_every_op_and_the_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run(doctor.DoctorSettings(json=True)) == 0
    state = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in state["ops"]} == set(ops.REGISTRY)
    assert state["instruction sets"]["in use"] == require_extension().isa()
    assert state["build"]["stable_abi"] == "2.10"


def test_tables_say_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(doctor.OPTIONAL, "no_such_module", ("nothing at all", "pip install nothing"))
    assert doctor.run(doctor.DoctorSettings()) == 0
    shown = capsys.readouterr().out
    assert "no_such_module" in shown
    assert "pip install nothing" in shown
    assert "no kernel of pymm has run on a GPU yet" in " ".join(shown.split()).replace("│", "")


def test_without_the_extension(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTENSION", None)
    monkeypatch.setattr(doctor, "PROBLEM", "it does not load")
    assert doctor.run(doctor.DoctorSettings(json=True)) == 1
    state = json.loads(capsys.readouterr().out)
    assert state["build"]["extension"] == "it does not load"
    assert state["missing"][0]["missing"] == "pymm._C"


def test_explicit_choice_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.backend("reference"):
        assert doctor.served("cosine_similarity").backend == "reference"

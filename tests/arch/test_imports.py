"""Dependencies point one way, and `import pymm` is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What each part may import from pymm; nothing lower imports anything higher.
ALLOWED: dict[str, set[str]] = {
    "ops": set(),
    "triton_kernels": set(),
    "layers": {"ops"},
    "models": {"ops", "layers"},
    "data": set(),
    "objectives": {"ops", "layers", "models"},
    "interop": {"ops", "layers", "models"},
    "training": {"ops", "layers", "models", "data", "objectives", "evaluation", "interop"},
    "evaluation": {"ops", "layers", "models", "data", "objectives"},
    "benchmarks": {"ops", "layers", "models", "data", "objectives", "evaluation", "training", "interop"},
}
HEAVY = [
    "matplotlib",
    "triton",
    "transformers",
    "timm",
    "open_clip",
    "tensorboard",
    "webdataset",
    "tokenizers",
    "PIL",
]


def _files() -> list[Path]:
    return sorted(
        p for folder in ("pymm", "benchmarks", "triton_kernels") for p in (ROOT / folder).rglob("*.py")
    )


def _part(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "pymm" else parts[0]


def _imported(path: Path) -> set[str]:
    """The parts of pymm that a file imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("pymm.")}
    return found


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    part = _part(path)
    if part not in ALLOWED:
        return  # the package's front: the command line, the demo, the doctor
    parts = ALLOWED.keys() | {"cli", "commands", "demo", "doctor"}
    wrong = (_imported(path) & parts) - ALLOWED[part] - {part}
    assert not wrong, f"{part} must not import {', '.join(sorted(wrong))}"


def test_every_part_has_a_rule() -> None:
    parts = {p.name for p in (ROOT / "pymm").iterdir() if (p / "__init__.py").exists()}
    assert parts <= set(ALLOWED), f"no rule for {parts - set(ALLOWED)}"


def test_import_is_light() -> None:
    code = (
        "import sys, pymm, torch; "
        f"loaded = [m for m in {HEAVY} if m in sys.modules]; "
        "assert not loaded, loaded; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

"""Settings that every test shares: two threads, and no memory that looks initialized by luck."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys

import pytest
import torch

from tests.torchvision_shim import prepare

THREADS = 2
M_PERTURB = -6  # mallopt: fill what malloc hands out and what is freed

# Another build of the C++ extension to test instead of the installed one, for example with AMX emulated.
if os.environ.get("PYMM_TEST_EXTENSION"):
    _spec = importlib.util.spec_from_file_location("pymm._C", os.environ["PYMM_TEST_EXTENSION"])
    assert _spec is not None
    assert _spec.loader is not None
    sys.modules["pymm._C"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["pymm._C"])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    torch.set_num_threads(THREADS)


def pytest_sessionstart(session: pytest.Session) -> None:
    prepare()  # before a test imports torchvision, and does it half


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Fill uninitialized memory: torch.empty with NaN, malloc with a huge number in every float type."""
    libc = ctypes.CDLL(None)
    perturb = getattr(libc, "mallopt", None)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if perturb is not None:
        perturb(M_PERTURB, 0x80)
    yield
    if perturb is not None:
        perturb(M_PERTURB, 0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Set torch's thread count inside a test; it is put back afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(THREADS)

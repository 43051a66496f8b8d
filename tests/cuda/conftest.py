"""The CUDA kernels, compiled once as C++ for all tests of this folder."""

from __future__ import annotations

import pytest

from pymm.ops._record import REGISTRY, library_of
from tests.cuda.compiled import SOURCES, load_emulated


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The kernels of every op, registered for tensors on the CPU."""
    load_emulated(SOURCES, tmp_path_factory.mktemp("cuda"))
    for source in SOURCES:
        library_of("cuda", REGISTRY[source.stem])

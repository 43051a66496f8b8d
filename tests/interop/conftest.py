"""Makes torchvision importable beside a CPU build of torch; timm, open_clip and transformers import it."""

from __future__ import annotations

import pytest

from tests.torchvision_shim import prepare


@pytest.fixture(scope="session", autouse=True)
def _torchvision() -> None:
    problem = prepare()
    if problem is not None:
        pytest.skip(problem)

"""mined_triplet_loss beyond its record: an oracle of loops, edges of labels, memory, threads, errors."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pymm import ops
from pymm.ops import mined_triplet_loss
from tests.ops.harness import instruction_set
from tests.ops.test_records import ISAS

ROOT = Path(__file__).parents[2]
MININGS = ["hard", "semi-hard", "all"]
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
each_mining = pytest.mark.parametrize("mining", MININGS)


def select(
    s: list[list[float]], labels: list[int], crossed: bool, margin: float, mining: str
) -> list[tuple[int, int, int]]:
    """The triplets (a, p, n) of the docstring's definitions, in loops over distances."""
    chosen = []
    rows = range(len(labels))
    for a in rows:
        d = [1 - v for v in s[a]]
        positives = [p for p in rows if labels[p] == labels[a] and (crossed or p != a)]
        negatives = [n for n in rows if labels[n] != labels[a]]
        if mining == "hard" and positives and negatives:
            chosen.append((a, max(positives, key=lambda p: d[p]), min(negatives, key=lambda n: d[n])))
        for p in positives if mining != "hard" else []:
            if mining == "semi-hard":
                between = [n for n in negatives if d[p] < d[n] < d[p] + margin]
                chosen += [(a, p, min(between, key=lambda n: d[n]))] if between else []
            else:
                chosen += [(a, p, n) for n in negatives if margin + d[p] - d[n] > 0]
    return chosen


def oracle(x: Tensor, labels: Tensor, y: Tensor | None, margin: float, mining: str) -> Tensor:
    """Differentiable through torch's cosine of the chosen triplets."""
    s = F.normalize(x, dim=-1) @ F.normalize(x if y is None else y, dim=-1).mT
    terms = []
    for side in [s] if y is None else [s, s.mT]:
        chosen = select(side.tolist(), labels.tolist(), y is not None, margin, mining)
        terms += [(margin + side[a, n] - side[a, p]).clamp_min(0) for a, p, n in chosen]
    return torch.stack(terms).mean() if terms else s.sum() * 0


def _inputs(n: int, d: int, groups: int, crossed: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(n, d, dtype=torch.float64, requires_grad=True)
    y = torch.randn(n, d, dtype=torch.float64, requires_grad=True) if crossed else None
    return x, torch.randint(0, groups, (n,)) * 1_000_003 - 5, y


@each_backend
@each_mining
@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize(("n", "d", "groups", "margin"), [(2, 3, 2, 0.2), (61, 6, 11, 0.2), (30, 4, 3, 0.7)])
def test_equals_loops(
    backend: str, mining: str, crossed: bool, n: int, d: int, groups: int, margin: float
) -> None:
    x, labels, y = _inputs(n, d, groups, crossed)
    leaves = [x] if y is None else [x, y]
    expected = oracle(x, labels, y, margin, mining)
    with ops.backend(backend):
        loss = mined_triplet_loss(x, labels, y, margin=margin, mining=mining)
        got = torch.autograd.grad(2 * loss, leaves)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, torch.autograd.grad(2 * expected, leaves))


@each_mining
@pytest.mark.parametrize("isa", ISAS)
def test_more_rows_than_a_panel_holds(mining: str, isa: str) -> None:
    # Backward's panel has 2^20 numbers, so 1700 rows need several; the last blocks are ragged.
    x, labels, _ = _inputs(1700, 4, 400, False)
    with instruction_set(isa):
        loss = mined_triplet_loss(x, labels, mining=mining)
        (got,) = torch.autograd.grad(loss, x)
    with ops.backend("reference"):
        expected = mined_triplet_loss(x, labels, mining=mining)
        (truth,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, truth)


@each_backend
@each_mining
@pytest.mark.parametrize("crossed", [False, True])
def test_one_label_selects_nothing(backend: str, mining: str, crossed: bool) -> None:
    x, _, y = _inputs(9, 5, 1, crossed)
    with ops.backend(backend):
        loss = mined_triplet_loss(x, torch.full((9,), 3), y, mining=mining)
        loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert bool((x.grad == 0).all())


@each_backend
@each_mining
def test_no_label_twice(backend: str, mining: str) -> None:
    x, _, y = _inputs(9, 5, 1, True)
    with ops.backend(backend):
        assert mined_triplet_loss(x, torch.arange(9), mining=mining).item() == 0
        loss = mined_triplet_loss(x, torch.arange(9), y, mining=mining)
    torch.testing.assert_close(loss, oracle(x, torch.arange(9), y, 0.2, mining))


def test_hard_equals_the_max_of_hinges_of_vse() -> None:
    """VSE++, arXiv:1707.05612, eq. 6: both directions of each pair, summed over the batch."""
    x, _, y = _inputs(40, 8, 1, True)
    assert y is not None
    s = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
    off = s.masked_fill(torch.eye(40, dtype=torch.bool), -math.inf)
    per_pair = F.relu(0.2 + off.amax(1) - s.diagonal()) + F.relu(0.2 + off.amax(0) - s.diagonal())
    loss = mined_triplet_loss(x, torch.arange(40), y)
    torch.testing.assert_close(loss, per_pair.sum() / 2 / 40)


@each_backend
def test_anchors_without_positives_do_not_count(backend: str) -> None:
    x, labels, _ = _inputs(20, 5, 4, False)
    alone = torch.cat([x.detach(), torch.randn(5, 5, dtype=torch.float64)])
    lonely = torch.cat([labels, torch.arange(100, 105)])
    s = F.normalize(alone, dim=-1) @ F.normalize(alone, dim=-1).mT
    chosen = select(s.tolist(), lonely.tolist(), False, 0.2, "hard")
    assert len(chosen) < 25
    with ops.backend(backend):
        got = mined_triplet_loss(alone, lonely)
    torch.testing.assert_close(got, oracle(alone, lonely, None, 0.2, "hard"))


@each_backend
def test_equal_candidates_give_the_lowest_index(backend: str) -> None:
    # Rows 1 and 2 are equal positives of row 0, rows 3 and 4 equal negatives: 1 and 3 take its gradient.
    x = torch.tensor([[1.0, 0, 0, 0], [0.5] * 4, [0.5] * 4, [0, 1.0, 0, 0], [0, 1.0, 0, 0]])
    labels = torch.tensor([0, 0, 0, 1, 2])  # rows 3 and 4 have no positive: they are no anchors
    x.requires_grad_()
    with ops.backend(backend):
        loss = mined_triplet_loss(x, labels, margin=1.0)
        loss.backward()
    weight = torch.zeros(5, 5)
    for a, p, n in ((0, 1, 3), (1, 0, 3), (2, 0, 3)):
        weight[a, p] -= 1
        weight[a, n] += 1
    y = x.detach().requires_grad_()
    unit = F.normalize(y, dim=-1)
    ((weight * (unit @ unit.mT)).sum() / 3).backward()
    torch.testing.assert_close(x.grad, y.grad)


@each_backend
@each_mining
def test_all_rows_equal(backend: str, mining: str) -> None:
    x = torch.tensor([[1.0, 1, 1, 1]]).repeat(12, 1).requires_grad_()
    with ops.backend(backend):
        loss = mined_triplet_loss(x, torch.arange(12) // 3, margin=0.25, mining=mining)
        loss.backward()
    # No negative is farther than a positive, so there is no semi-hard triplet.
    assert loss.item() == (0 if mining == "semi-hard" else 0.25)
    torch.testing.assert_close(x.grad, torch.zeros(12, 4))


@each_backend
@each_mining
def test_nan_reaches_the_loss(backend: str, mining: str) -> None:
    x = torch.randn(20, 6)
    x[7, 2] = float("nan")
    with ops.backend(backend):
        assert math.isnan(mined_triplet_loss(x, torch.arange(20) % 5, mining=mining).item())
        y = torch.randn(20, 6)
        assert math.isnan(mined_triplet_loss(y, torch.arange(20) % 5, x, mining=mining).item())
        x[7, 2] = float("-inf")
        assert math.isnan(mined_triplet_loss(x, torch.arange(20) % 5, mining=mining).item())


@each_backend
@each_mining
def test_no_columns(backend: str, mining: str) -> None:
    x = torch.zeros(6, 0, requires_grad=True)
    with ops.backend(backend):
        loss = mined_triplet_loss(x, torch.arange(6) // 2, mining=mining)
        loss.backward()
    assert loss.item() == pytest.approx(0 if mining == "semi-hard" else 0.2)
    assert x.grad is not None
    assert x.grad.shape == (6, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_of_any_integer_type(dtype: torch.dtype) -> None:
    x, labels = torch.randn(30, 7), torch.randint(0, 5, (30,))
    assert torch.equal(mined_triplet_loss(x, labels.to(dtype)), mined_triplet_loss(x, labels))


@each_mining
@pytest.mark.parametrize("crossed", [False, True])
def test_same_bits_on_any_number_of_threads(mining: str, crossed: bool, threads) -> None:
    x, labels, y = _inputs(700, 24, 150, crossed)
    x = x.detach().float().requires_grad_()
    y = None if y is None else y.detach().float().requires_grad_()
    leaves = [x] if y is None else [x, y]
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        loss = mined_triplet_loss(x, labels, y, mining=mining)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@each_mining
def test_double_backward(mining: str) -> None:
    x, labels, y = _inputs(6, 4, 3, True)
    assert torch.autograd.gradgradcheck(
        lambda a, b: mined_triplet_loss(a, labels, b, margin=0.5, mining=mining), (x, y)
    )


@each_mining
def test_memory_is_not_that_of_the_matrix(mining: str) -> None:
    code = f"""
import resource, torch
from pymm.ops import mined_triplet_loss
torch.set_num_threads(2)
def run(n):
    x = torch.randn(n, 64, requires_grad=True)
    mined_triplet_loss(x, torch.arange(n) // 4, mining="{mining}").backward()
run(300)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(4096)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # KiB. One matrix of similarities would be 65536; rows and gradient are 1024 each.
    assert int(done.stdout) < (8 if mining == "hard" else 20) * 1024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4)}, r"mined_triplet_loss: x must be \(N, D\), got \(4,\)"),
        ({"labels": torch.zeros(3).long()}, r"mined_triplet_loss: labels must be \(4,\), got \(3,\)"),
        ({"labels": torch.zeros(4)}, r"mined_triplet_loss: labels must be integers, got torch.float32"),
        ({"labels": torch.zeros(4).bool()}, r"mined_triplet_loss: labels must be integers, got torch.bool"),
        ({"labels": [0, 0, 1, 1]}, r"mined_triplet_loss: labels must be a tensor, got list"),
        ({"y": torch.ones(5, 3)}, r"mined_triplet_loss: y must be \(4, 3\), got \(5, 3\)"),
        (
            {"y": torch.ones(4, 3).half()},
            r"mined_triplet_loss: y must be of x's type torch.float32, got torch.float16",
        ),
        (
            {"labels": torch.zeros(4, device="meta").long()},
            r"mined_triplet_loss: labels must be on x's device cpu, got meta",
        ),
        ({"margin": None}, r"mined_triplet_loss: margin must be a number, got NoneType"),
        (
            {"mining": "easy"},
            r"mined_triplet_loss: mining must be 'hard', 'semi-hard', 'all', got 'easy'",
        ),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.ones(4, 3), "labels": torch.zeros(4).long()} | change
    with pytest.raises(ValueError, match=f"^{message}$"):
        mined_triplet_loss(**arguments)

"""info_nce against formulas that others wrote down, and its promises beyond those of every op."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pymm import ops
from pymm.ops import info_nce
from tests.ops.memory import peak_beside_gradients


@pytest.fixture(params=("auto", "reference"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with ops.backend(request.param):
        yield request.param


def features(*sizes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(n, 24, dtype=dtype) for n in sizes]


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def assert_same(got: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    bound = relative * max(expected.abs().max().item(), 1e-3)
    assert (got.double() - expected.double()).abs().max().item() <= bound


def clip_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's ClipLoss on normalized features."""
    logits_per_image = scale * image @ text.T
    logits_per_text = scale * text @ image.T
    labels = torch.arange(image.shape[0])
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


@pytest.mark.parametrize("n", [1, 7, 130, 400])
def test_equals_clip(backend: str, n: int) -> None:
    leaves = [*features(n, n), torch.tensor(14.3)]
    truth = [t.double().requires_grad_() for t in leaves]
    x, y, scale = truth
    expected = clip_loss(F.normalize(x, dim=1), F.normalize(y, dim=1), scale)
    mine = [t.clone().requires_grad_() for t in leaves]
    got = info_nce(*mine)
    assert_same(got, expected)
    for a, b in zip(gradients(got, *mine), gradients(expected, *truth), strict=True):
        assert_same(a, b)


def test_features_may_be_normalized_already(backend: str) -> None:
    x, y = (F.normalize(t, dim=1) for t in features(50, 50))
    assert_same(info_nce(x, y, 20.0, normalize=False), clip_loss(x.double(), y.double(), torch.tensor(20.0)))


def test_reductions(backend: str) -> None:
    x, y = features(31, 31)
    each = info_nce(x, y, 5.0, reduction="none")
    assert each.shape == (31,)
    assert_same(info_nce(x, y, 5.0), each.mean())
    assert_same(info_nce(x, y, 5.0, reduction="sum"), each.sum())


def test_one_way_is_half_of_both(backend: str) -> None:
    x, y = features(31, 31)
    there = info_nce(x, y, 5.0, symmetric=False, reduction="none")
    back = info_nce(y, x, 5.0, symmetric=False, reduction="none")
    assert_same(info_nce(x, y, 5.0, reduction="none"), (there + back) / 2)
    logits = 5.0 * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    assert_same(there, F.cross_entropy(logits, torch.arange(31), reduction="none"))


def test_smoothing_is_cross_entropys(backend: str) -> None:
    x, y = features(40, 40, dtype=torch.float64)
    logits = 9.0 * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    labels = torch.arange(40)
    expected = sum(F.cross_entropy(s, labels, label_smoothing=0.15) for s in (logits, logits.T)) / 2
    assert_same(info_nce(x, y, 9.0, label_smoothing=0.15), expected, 1e-12)


def test_equal_ids_share_the_target(backend: str) -> None:
    x, y = features(6, 6, dtype=torch.float64)
    ids = torch.tensor([4, -9, 4, 2**40, -9, 4])
    logits = 3.0 * F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    log_p, log_q = logits.log_softmax(1), logits.T.log_softmax(1)
    expected = torch.zeros(6, dtype=torch.float64)
    for i in range(6):
        same = [j for j in range(6) if ids[j] == ids[i]]
        expected[i] = -sum(log_p[i, j] + log_q[i, j] for j in same) / len(same) / 2
    assert_same(info_nce(x, y, 3.0, ids=ids, reduction="none"), expected, 1e-12)
    assert_same(info_nce(x, y, 3.0, ids=ids.to(torch.int64)), expected.mean(), 1e-12)
    assert_same(info_nce(x, y, 3.0, ids=torch.arange(6, dtype=torch.int32)), info_nce(x, y, 3.0), 1e-12)


def test_queue_of_moco(backend: str) -> None:
    q, k, queue = features(20, 20, 70, dtype=torch.float64)
    q, k, queue = (F.normalize(t, dim=1) for t in (q, k, queue))
    positive, negative = (q * k).sum(1, keepdim=True), q @ torch.cat([k, queue]).T
    others = negative.masked_fill(torch.eye(20, 90, dtype=torch.bool), -torch.inf)
    logits = torch.cat([positive, others], 1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(20, dtype=torch.int64))
    assert_same(info_nce(q, k, 1 / 0.07, symmetric=False, negatives_y=queue), expected, 1e-12)


def albef_half(
    image: Tensor, image_m: Tensor, text_m: Tensor, queue: Tensor, temp: float, alpha: float
) -> Tensor:
    """The image-to-text half of ALBEF's ITC as its paper and code compute it, on normalized features."""
    text_all = torch.cat([text_m.T, queue.T], 1)
    with torch.no_grad():
        targets = torch.zeros(image.shape[0], text_all.shape[1], dtype=image.dtype)
        targets.fill_diagonal_(1)
        targets = alpha * F.softmax(image_m @ text_all / temp, 1) + (1 - alpha) * targets
    return -torch.sum(F.log_softmax(image @ text_all / temp, 1) * targets, 1).mean()


def test_albef(backend: str) -> None:
    image, text, image_m, text_m, image_queue, text_queue = (
        F.normalize(t, dim=1) for t in features(15, 15, 15, 15, 50, 50, dtype=torch.float64)
    )
    leaves = [image.requires_grad_(), text.requires_grad_()]
    expected = (
        albef_half(image, image_m, text_m, text_queue, 0.07, 0.4)
        + albef_half(text, text_m, image_m, image_queue, 0.07, 0.4)
    ) / 2

    def half(a: Tensor, a_m: Tensor, b_m: Tensor, queue: Tensor) -> Tensor:
        options = {"symmetric": False, "normalize": False, "alpha": 0.4, "negatives_y": queue}
        return info_nce(a, b_m, 1 / 0.07, teacher_x=a_m, teacher_y=b_m, **options)

    got = (half(image, image_m, text_m, text_queue) + half(text, text_m, image_m, image_queue)) / 2
    assert_same(got, expected, 1e-12)
    for a, b in zip(gradients(got, *leaves), gradients(expected, *leaves), strict=True):
        assert_same(a, b, 1e-11)


def test_all_options_against_cross_entropy_with_soft_targets(backend: str) -> None:
    x, y, tx, ty, nx, ny = features(27, 27, 27, 27, 11, 300, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, y, nx, ny)]
    scale = torch.tensor(12.0, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(27) % 10
    hard = (ids[:, None] == ids).double()
    hard = hard / hard.sum(1, keepdim=True)
    unit = [F.normalize(t, dim=1) for t in (x, y, tx, ty, nx, ny)]
    x_, y_, tx_, ty_, nx_, ny_ = unit
    expected = torch.zeros(())
    for a, b, more, ta, tb in ((x_, y_, ny_, tx_, ty_), (y_, x_, nx_, ty_, tx_)):
        teacher = (scale * ta @ torch.cat([tb, more]).T).softmax(1).detach()
        targets = 0.3 * teacher + 0.7 * F.pad(hard, (0, more.shape[0]))
        logits = scale * a @ torch.cat([b, more]).T
        expected = expected + F.cross_entropy(logits, targets, label_smoothing=0.1) / 2
    options = {"negatives_x": nx, "negatives_y": ny, "teacher_x": tx, "teacher_y": ty}
    got = info_nce(x, y, scale, ids=ids, alpha=0.3, label_smoothing=0.1, **options)
    assert_same(got, expected, 1e-12)
    for a, b in zip(gradients(got, *leaves, scale), gradients(expected, *leaves, scale), strict=True):
        assert_same(a, b, 1e-10)


def test_teacher_gets_no_gradient(backend: str) -> None:
    x, y, tx, ty = (t.requires_grad_() for t in features(9, 9, 9, 9))
    loss = info_nce(x, y, 4.0, teacher_x=tx, teacher_y=ty, alpha=0.5)
    assert torch.autograd.grad(loss, [tx, ty], allow_unused=True) == (None, None)


def test_only_wanted_gradients(backend: str) -> None:
    x, y, nx, ny = features(30, 30, 50, 20)
    names = ("x", "y", "negatives_x", "negatives_y")
    full = {k: v.clone().requires_grad_() for k, v in zip(names, (x, y, nx, ny), strict=True)}
    info_nce(logit_scale=6.0, **full).backward()
    for wanted in names:
        some = {k: v.detach().clone().requires_grad_(k == wanted) for k, v in full.items()}
        info_nce(logit_scale=6.0, **some).backward()
        for name in names:
            expected = full[name].grad if name == wanted else None
            assert (some[name].grad is None) == (expected is None)
            if expected is not None:
                assert_same(some[name].grad, expected)


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"symmetric": False, "label_smoothing": 0.2}])
def test_second_derivatives(options: dict) -> None:
    x, y, ny = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def function(*leaves: Tensor) -> Tensor:
        x, y, scale, ny = leaves
        return info_nce(x, y, scale, negatives_y=ny, ids=torch.tensor([0, 1, 0, 2]), **options)

    assert torch.autograd.gradgradcheck(function, (x, y, scale, ny))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 100.0, -100.0])
@pytest.mark.parametrize("kind", ["random", "aligned", "opposed", "clusters"])
def test_any_scale_of_unit_features(backend: str, scale: float, kind: str) -> None:
    x, y = features(150, 150)
    if kind == "aligned":
        y = x + 0.05 * y
    elif kind == "opposed":
        x = x[:1] + 0.01 * x
        y = -x
    elif kind == "clusters":  # maxima of rows 200 apart: no one reference serves a tile
        x[::2] = x[:1]
        y = -x[:1] + 0.01 * y
        y[:3] = x[:1]
    leaves = [x, y, torch.tensor(scale)]

    def run(dtype: torch.dtype, name: str) -> list[Tensor]:
        mine = [t.to(dtype).requires_grad_() for t in leaves]
        with ops.backend(name):
            loss = info_nce(*mine)
            return [loss.detach(), *gradients(loss, *mine)]

    right, found, plain = (
        run(torch.float64, "reference"),
        run(torch.float32, backend),
        run(torch.float32, "reference"),
    )
    assert_same(found[0], right[0])
    # At a scale of 100 a probability inherits 100 roundings of its cosine: twice what plain torch loses.
    for a, b, c in zip(found[1:3], right[1:3], plain[1:3], strict=True):
        lost = (c.double() - b).abs().max().item() / max(b.abs().max().item(), 1e-3)
        assert_same(a, b, max(1e-5, 2 * lost))
    # The gradient of the scale is a difference of mean cosines, which here may agree in four digits.
    assert abs(found[3].item() - right[3].item()) < 1e-6


def test_huge_scale(backend: str) -> None:
    x, y = features(64, 64)
    scale = torch.tensor(1e4, requires_grad=True)
    x.requires_grad_()
    loss = info_nce(x, y, scale)
    cosines = F.normalize(x.double(), dim=1) @ F.normalize(y.double(), dim=1).T
    expected = clip_loss(F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1), 1e4)
    assert_same(loss, expected)
    dx, dscale = gradients(loss, x, scale)
    # At this temperature each row's softmax is its maximum.
    own = cosines.diagonal()
    assert_same(dscale, (cosines.max(1).values + cosines.max(0).values - 2 * own).mean() / 2, 1e-3)
    assert dx.isfinite().all()


def test_small_losses_keep_their_digits(backend: str) -> None:
    x = torch.eye(40)
    expected = torch.tensor(39 * torch.tensor(-25.0, dtype=torch.float64).exp()).log1p()
    got = info_nce(x, x, 25.0)
    if backend == "auto":
        assert abs(got.item() / expected.item() - 1) < 1e-5
    else:
        assert got.item() < 1e-6


def test_nothing(backend: str) -> None:
    x, y = (t.requires_grad_() for t in features(0, 0))
    scale = torch.tensor(3.0, requires_grad=True)
    assert info_nce(x, y, scale).isnan()
    assert F.cross_entropy(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)).isnan()
    assert info_nce(x, y, scale, reduction="none").shape == (0,)
    queue = torch.randn(5, 24, requires_grad=True)
    total = info_nce(x, y, scale, negatives_y=queue, reduction="sum")
    assert total == 0
    dx, dscale, dqueue = gradients(total, x, scale, queue)
    assert dx.shape == x.shape
    assert dscale == 0
    assert torch.equal(dqueue, torch.zeros_like(queue))
    single = torch.randn(1, 24)
    for options in ({}, {"negatives_y": torch.zeros(0, 24)}):
        assert info_nce(single, torch.randn(1, 24), scale, **options) < 1e-30
    width = torch.zeros(5, 0)
    assert_same(info_nce(width, width, scale), torch.tensor(5.0).log())


def test_nan_is_not_hidden(backend: str) -> None:
    x, y = features(40, 40)
    x[17, 3] = torch.nan
    each = info_nce(x, y, 10.0, reduction="none")
    assert each[17].isnan()
    assert info_nce(x, y, 10.0).isnan()
    y[5] = torch.inf
    assert info_nce(x, y, 10.0).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gives_a_float32_loss(backend: str, dtype: torch.dtype) -> None:
    x, y = (t.to(dtype).requires_grad_() for t in features(300, 300))
    loss = info_nce(x, y, 20.0)
    assert loss.dtype == torch.float32
    expected = info_nce(x.double(), y.double(), 20.0)
    assert_same(loss, expected)
    for a, b in zip(gradients(loss, x, y), gradients(expected, x, y), strict=True):
        assert a.dtype == dtype
        assert_same(a, b, 2 * torch.finfo(dtype).eps)


def test_autocast() -> None:
    x, y = (t.requires_grad_() for t in features(20, 20))
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(x, y, 10.0)
    assert_same(loss, info_nce(x.bfloat16(), y.bfloat16(), 10.0), 1e-6)
    assert gradients(loss, x)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_on_a_rerun(dtype: torch.dtype, threads) -> None:
    leaves = [torch.randn(700, 40).to(dtype).requires_grad_() for _ in range(2)]
    leaves += [torch.tensor(30.0, requires_grad=True), torch.randn(600, 40).to(dtype).requires_grad_()]

    def run() -> list[Tensor]:
        x, y, scale, queue = leaves
        loss = info_nce(x, y, scale, negatives_x=queue, negatives_y=queue, ids=torch.arange(700) // 2)
        return [loss, *gradients(loss, *leaves)]

    for count in (1, 2, 3):
        threads(count)
        first = run()
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's to tell")
@pytest.mark.parametrize(("dtype", "megabytes"), [("bfloat16", 20), ("float32", 25)])
def test_memory(dtype: str, megabytes: int) -> None:
    """N^2 logits would take 134 MB in bfloat16; the issue's bar is 40 MB."""
    assert peak_beside_gradients("info_nce", 8192, 512, dtype, [14.0], threads=2) < megabytes * 1e6


def test_memory_of_a_long_queue() -> None:
    """The queue needs no gradient, so it costs strips only."""
    x, y = features(8, 8)
    queue = torch.randn(20_000, 24)
    loss = info_nce(x.requires_grad_(), y, 5.0, negatives_y=queue, symmetric=False)
    candidates = F.normalize(torch.cat([y, queue]).double(), dim=1)
    logits = 5.0 * F.normalize(x.double(), dim=1) @ candidates.T
    expected = F.cross_entropy(logits, torch.arange(8))
    assert_same(loss, expected)
    assert_same(gradients(loss, x)[0], gradients(expected, x)[0])


X = torch.randn(4, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, "x must be (N, E), got (4,)"),
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, "x must be float32, bfloat16, float16 or float64"),
        ({"y": torch.zeros(5, 8)}, "y must be (4, 8), got (5, 8)"),
        ({"y": X.double()}, "y must be of x's type torch.float32, got torch.float64"),
        ({"logit_scale": torch.ones(2)}, "logit_scale must be a number or a tensor of one element, got (2,)"),
        ({"logit_scale": "1"}, "logit_scale must be a number or a tensor of one element, got str"),
        (
            {"logit_scale": torch.tensor(3)},
            "logit_scale must be a number or a floating tensor, got torch.int64",
        ),
        ({"label_smoothing": 1.5}, "label_smoothing must be in [0, 1], got 1.5"),
        ({"ids": torch.zeros(4)}, "ids must be integers, got torch.float32"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "ids must be (4,), got (3,)"),
        ({"ids": [0, 1, 2, 3]}, "ids must be a tensor, got list"),
        ({"negatives_y": torch.zeros(9, 7)}, "negatives_y must be (K, 8), got (9, 7)"),
        ({"negatives_x": torch.zeros(9)}, "negatives_x must be (K, 8), got (9,)"),
        (
            {"negatives_x": torch.zeros(9, 8), "symmetric": False},
            "negatives_x must be None when symmetric is False, got (9, 8)",
        ),
        ({"teacher_x": X}, "teacher_y must be given together with teacher_x, got None"),
        ({"teacher_y": X}, "teacher_x must be given together with teacher_y, got None"),
        ({"teacher_x": X, "teacher_y": X[:3]}, "teacher_y must be (4, 8), got (3, 8)"),
        ({"alpha": -0.1}, "alpha must be in [0, 1], got -0.1"),
        ({"alpha": 0.4}, "alpha must be 0 without teacher_x and teacher_y, got 0.4"),
        ({"reduction": "avg"}, 'reduction must be "mean", "sum" or "none", got \'avg\''),
        ({"y": X.to("meta")}, "y must be on x's device cpu, got meta"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        info_nce(**{"x": X, "y": X, "logit_scale": 1.0, **change})
    assert str(error.value).startswith(f"info_nce: {message}")

"""The contrastive loss of CLIP, with the options of MoCo, ALBEF and supervised contrastive learning."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import autocast, check_device, check_same, check_shape, fail, shape
from pymm.ops._contrastive import as_scalar
from pymm.ops._dispatch import call
from pymm.ops._info_nce_reference import backward_reference, hard_targets, reference, statistics_type
from pymm.ops._record import Kernel, Op, Sample, Workload, register

NAME = "info_nce"
REDUCTIONS = ("mean", "sum", "none")


def info_nce(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    *,
    normalize: bool = True,
    symmetric: bool = True,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    negatives_x: Tensor | None = None,
    negatives_y: Tensor | None = None,
    teacher_x: Tensor | None = None,
    teacher_y: Tensor | None = None,
    alpha: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r"""Contrastive loss of pairs: row i of `x` is to find row i of `y` among all candidates, and back.

    .. math:: \ell_i = \tfrac12 \Big(-\sum_j t_{ij} \log \mathrm{softmax}_j(s\, \hat x_i \cdot c_j)
              - \sum_j t'_{ij} \log \mathrm{softmax}_j(s\, \hat y_i \cdot c'_j)\Big)

    with `s` the logit scale, the candidates c = [ŷ; negatives_y] of x and c' = [x̂; negatives_x] of y, and
    targets t that are 1 for the partner and 0 elsewhere. This is InfoNCE (van den Oord et al. 2018,
    arXiv:1807.03748, eq. 4) in CLIP's symmetric form (Radford et al. 2021, arXiv:2103.00020, fig. 3).

    Args:
        x, y: `(N, E)`, the features of N pairs.
        logit_scale: multiplies the similarities (it is not their logarithm); a number, or a tensor of one
            element that may require a gradient.
        normalize: divide every row by `max(norm, 1e-12)` first, as `F.normalize` does; of the negatives and
            the teacher's features too.
        symmetric: False leaves only the half in which x finds y, without the factor one half.
        label_smoothing: in [0, 1]; the targets become `(1 - label_smoothing) t + label_smoothing / C` over
            all C candidates, as in `F.cross_entropy`.
        ids: `(N,)` integers. Pairs of equal id are each other's positives, all with equal weight. Negatives
            have no id: they are never positives.
        negatives_x: `(K', E)`, further candidates of y. Needs `symmetric`.
        negatives_y: `(K, E)`, further candidates of x: the queue of MoCo (He et al. 2020, arXiv:1911.05722).
        teacher_x, teacher_y: `(N, E)`, features of a momentum model, both or neither. They receive no
            gradient.
        alpha: in [0, 1], the weight of the teacher: the targets are `alpha softmax(teacher) + (1 - alpha) t`,
            before smoothing (Li et al. 2021, ALBEF, arXiv:2107.07651, eq. 6). The teacher's logits are those
            of teacher_x over [teacher_y; negatives_y], and of teacher_y over [teacher_x; negatives_x], at the
            same scale and without a gradient to it. Must be 0 without a teacher.
        reduction: `"mean"` over the N pairs, `"sum"`, or `"none"`.

    Returns:
        A scalar, or `(N,)` for `"none"`; float64 for float64 inputs, float32 for all others: a loss rounded
        to bfloat16 has three digits. The mean over no pairs is NaN, as in `F.cross_entropy`, their sum is 0.

    Raises:
        ValueError: when shapes, types or devices do not fit, or a number is out of its range.

    Numerics:
        Products, norms, exponentials and sums are float32 at least, and features are never normalized in low
        precision. The log-sum-exp is exact at any scale. On a CPU the logits are computed in tiles and never
        exist as a matrix; the tiles of the gradient are rounded to the features' type where the machine
        multiplies it.

    Kept for backward: the arguments and the log-sum-exp of both sides in float64, 2N numbers; 4N with a
    teacher.

    ALBEF contrasts the model with the momentum features, so its image-to-text half is
    `info_nce(image, text_m, scale, symmetric=False, negatives_y=text_queue, teacher_x=image_m,
    teacher_y=text_m, alpha=0.4)`, and the other half is the same with image and text exchanged.
    """
    x, y, negatives_x, negatives_y, teacher_x, teacher_y = autocast(
        x, y, negatives_x, negatives_y, teacher_x, teacher_y
    )
    check_same(
        NAME,
        "x",
        x,
        y=y,
        negatives_x=negatives_x,
        negatives_y=negatives_y,
        teacher_x=teacher_x,
        teacher_y=teacher_y,
    )
    check_shape(NAME, "x", x, ("N", "E"))
    check_shape(NAME, "y", y, tuple(x.shape))
    if negatives_x is not None:
        check_shape(NAME, "negatives_x", negatives_x, ("K", x.shape[1]))
        if not symmetric:
            fail(NAME, "negatives_x", "None when symmetric is False", shape(negatives_x))
    if negatives_y is not None:
        check_shape(NAME, "negatives_y", negatives_y, ("K", x.shape[1]))
    if (teacher_x is None) != (teacher_y is None):
        missing = "teacher_x" if teacher_x is None else "teacher_y"
        fail(NAME, missing, f"given together with {'teacher_y' if teacher_x is None else 'teacher_x'}", None)
    for name, teacher in (("teacher_x", teacher_x), ("teacher_y", teacher_y)):
        if teacher is not None:
            check_shape(NAME, name, teacher, tuple(x.shape))
    if not 0 <= label_smoothing <= 1:
        fail(NAME, "label_smoothing", "in [0, 1]", label_smoothing)
    if not 0 <= alpha <= 1:
        fail(NAME, "alpha", "in [0, 1]", alpha)
    if alpha > 0 and teacher_x is None:
        fail(NAME, "alpha", "0 without teacher_x and teacher_y", alpha)
    if reduction not in REDUCTIONS:
        fail(NAME, "reduction", '"mean", "sum" or "none"', repr(reduction))
    ids = _check_ids(ids, x)
    scale = as_scalar(NAME, "logit_scale", logit_scale, x)
    if teacher_x is not None and teacher_y is not None:
        teacher_x, teacher_y = (teacher_x.detach(), teacher_y.detach()) if alpha > 0 else (None, None)
    losses, _ = call(
        NAME,
        *(x, y, scale, negatives_x, negatives_y, ids, teacher_x, teacher_y),
        *(normalize, symmetric, float(label_smoothing), float(alpha)),
    )
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _check_ids(ids: Tensor | None, x: Tensor) -> Tensor | None:
    if ids is None:
        return None
    if not isinstance(ids, Tensor):
        fail(NAME, "ids", "a tensor", type(ids).__name__)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        fail(NAME, "ids", "integers", ids.dtype)
    check_shape(NAME, "ids", ids, (x.shape[0],))
    check_device(NAME, "x", x, "ids", ids)
    return ids.to(torch.int64)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    teacher, symmetric = rest[5], rest[8]
    acc = torch.promote_types(x.dtype, torch.float32)
    rows = (2 if symmetric else 1) * (1 if teacher is None else 2)
    return x.new_empty(x.shape[:1], dtype=acc), x.new_empty((rows, x.shape[0]), dtype=statistics_type(x))


def _backward_fake(
    dlosses: Tensor,
    lse: Tensor,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    negatives_x: Tensor | None,
    negatives_y: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs = rest[-1]

    def like(source: Tensor | None, needed: bool) -> Tensor:
        return x.new_empty((source.shape[0] if needed and source is not None else 0, x.shape[1]))

    return (
        like(x, needs[0]),
        like(y, needs[1]),
        logit_scale.new_empty(()),
        like(negatives_x, needs[3]),
        like(negatives_y, needs[4]),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.options = inputs[8:]
    ctx.save_for_backward(output[1], *inputs[:8])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_call(ctx: Any, backward_op: Any, dlosses: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = (None,) * 12
    if dlosses is None:
        return nothing
    lse, *inputs = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:5])
    found = backward_op(dlosses, lse, *inputs, *ctx.options, needs)
    return (*(g if needed else None for g, needed in zip(found, needs, strict=True)), *nothing[5:])


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    def pairs(n: int, e: int, noise: float = 1.0) -> tuple[Tensor, Tensor]:
        a = torch.randn(n, e, dtype=torch.float64)
        return a.to(dtype), (a + noise * torch.randn(n, e, dtype=torch.float64)).to(dtype)

    def scale(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype)

    yield Sample("one pair", (*pairs(1, 5), scale(3.0)))
    yield Sample("no pairs", (rand(0, 5), rand(0, 5), 3.0), {"reduction": "sum"})
    yield Sample("ragged", (*pairs(37, 19), scale(14.0)))
    yield Sample("each loss", (*pairs(23, 12), torch.tensor([8.0], dtype=dtype)), {"reduction": "none"})
    yield Sample("scale 100", (*pairs(33, 24, 0.3), scale(100.0)))
    yield Sample("opposed at scale 100", (rand(1, 8).repeat(9, 1), -rand(9, 8).abs(), scale(100.0)))
    yield Sample("scale 0", (*pairs(11, 6), scale(0.0)), {"reduction": "sum"})
    yield Sample("extreme logits", (rand(17, 16) * 20, rand(17, 16), scale(1.0)), {"normalize": False})
    yield Sample("one way", (*pairs(21, 9), scale(5.0)), {"symmetric": False})
    yield Sample("smoothing", (*pairs(26, 14), scale(10.0)), {"label_smoothing": 0.1})
    yield Sample("equal ids", (*pairs(29, 13), scale(6.0)), {"ids": torch.arange(29) % 11 * 1000003})
    yield Sample(
        "queues", (*pairs(18, 10), scale(7.0)), {"negatives_x": rand(25, 10), "negatives_y": rand(40, 10)}
    )
    yield Sample(
        "one queue, one way, not normalized",
        (rand(13, 7), rand(13, 7), scale(0.7)),
        {"negatives_y": rand(31, 7), "symmetric": False, "normalize": False},
    )
    x, y = pairs(20, 11)
    yield Sample("teacher", (x, y, 9.0), {"teacher_x": rand(20, 11), "teacher_y": rand(20, 11), "alpha": 0.4})
    yield Sample(
        "everything",
        (*pairs(22, 15), scale(11.0)),
        {
            "label_smoothing": 0.2,
            "ids": torch.arange(22) // 3,
            "negatives_x": rand(9, 15),
            "negatives_y": rand(35, 15),
            "teacher_x": rand(22, 15),
            "teacher_y": rand(22, 15),
            "alpha": 0.3,
        },
        smooth=False,  # the teacher's logits move with the scale, and its gradient leaves that out
    )
    zero = rand(8, 16)
    zero[3] = 0
    yield Sample("a zero row", (zero, rand(8, 16), scale(4.0)), smooth=False)
    yield Sample("strided", (rand(19, 24).t(), rand(24, 38)[:, ::2], scale(4.0)))
    yield Sample("several tiles", (*pairs(300, 70), scale(20.0)))


def _eager(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor | float,
    *,
    normalize: bool = True,
    symmetric: bool = True,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    negatives_x: Tensor | None = None,
    negatives_y: Tensor | None = None,
    teacher_x: Tensor | None = None,
    teacher_y: Tensor | None = None,
    alpha: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    def prepared(*parts: Tensor | None) -> Tensor:
        present = [p for p in parts if p is not None]
        joined = torch.cat(present) if len(present) > 1 else present[0]
        return F.normalize(joined, dim=-1) if normalize else joined

    def way(a: Tensor, b: Tensor, negatives: Tensor | None, ta: Tensor | None, tb: Tensor | None) -> Tensor:
        logits = logit_scale * prepared(a) @ prepared(b, negatives).T
        targets = torch.arange(a.shape[0], device=a.device)
        if ids is not None or ta is not None:
            hard = hard_targets(a.shape[0], logits.shape[1], ids, logits)
            targets = hard
            if ta is not None:
                with torch.no_grad():
                    soft = (logit_scale * prepared(ta) @ prepared(tb, negatives).T).softmax(1)
                    targets = alpha * soft + (1 - alpha) * hard
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction=reduction)

    if not symmetric:
        return way(x, y, negatives_y, teacher_x, teacher_y)
    if negatives_x is None and negatives_y is None and ids is None and teacher_x is None:
        logits = logit_scale * prepared(x) @ prepared(y).T
        targets = torch.arange(x.shape[0], device=x.device)
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "reduction": reduction}
        return (
            F.cross_entropy(logits, targets, **options) + F.cross_entropy(logits.T, targets, **options)
        ) / 2
    return (way(x, y, negatives_y, teacher_x, teacher_y) + way(y, x, negatives_x, teacher_y, teacher_x)) / 2


def _workloads() -> Sequence[Workload]:
    def make(n: int, d: int) -> Any:
        def inputs(dtype: torch.dtype) -> Any:
            scale = torch.tensor(1 / 0.07, requires_grad=True)
            return (torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype), scale), {}

        return inputs

    def workload(n: int, d: int, dtype: torch.dtype, **more: Any) -> Workload:
        more |= {"family": f"D={d}", "size": n}
        return Workload(f"N={n} D={d}", dtype, make(n, d), gemm=(n, n, d), gemms=1, gemms_backward=3, **more)

    return [
        *(workload(n, 512, torch.bfloat16) for n in (256, 1024, 8192)),
        workload(8192, 512, torch.float32),
        workload(131072, 256, torch.bfloat16, alone=True),
        *(workload(n, 512, torch.bfloat16, sweep=True) for n in (512, 2048, 4096)),
        *(workload(n, 512, torch.float32, sweep=True) for n in (512, 1024, 2048, 4096)),
    ]


_ARGUMENTS = (
    "Tensor x, Tensor y, Tensor logit_scale, Tensor? negatives_x, Tensor? negatives_y, Tensor? ids, "
    "Tensor? teacher_x, Tensor? teacher_y, bool normalize, bool symmetric, float label_smoothing, float alpha"
)

OP = register(
    Op(
        name=NAME,
        function=info_nce,
        forward=Kernel(f"({_ARGUMENTS}) -> (Tensor, Tensor)", reference, _fake),
        backward=Kernel(
            f"(Tensor dlosses, Tensor lse, {_ARGUMENTS}, bool[] needs) "
            "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
            backward_reference,
            _backward_fake,
        ),
        setup_context=_setup_context,
        backward_call=_backward_call,
        samples=_samples,
        workloads=_workloads,
        eager=_eager,
    )
)

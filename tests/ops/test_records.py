"""What every op's record promises, tested for each of its samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymm import ops
from pymm.ops._extension import EXTENSION, require_extension
from pymm.ops._record import REGISTRY
from pymm.ops._tolerance import allowed, error
from tests.ops.harness import (
    DTYPES,
    Recorder,
    Result,
    cases,
    instruction_set,
    run,
    sample_of,
)

ISAS = EXTENSION.available_isas() if EXTENSION is not None else []
CASES = [pytest.param(name, i, id=f"{name}-{label}".replace(" ", "_")) for name, i, label in cases()]
every_sample = pytest.mark.parametrize(("name", "index"), CASES)
GRADCHECK_ELEMENTS = 20_000


def _bounds(op, sample, dtype: torch.dtype, truth: Result) -> dict[str, float]:
    """The error allowed for each output and gradient."""
    plain: dict[str, Tensor | None] = {}
    if dtype not in op.tolerance:
        try:
            plain = run(op, sample, function=op.eager, backend="reference").named()
        except NotImplementedError:
            plain = run(op, sample, backend="reference").named()
    return {
        name: allowed(op.tolerance, dtype, plain.get(name), value) for name, value in truth.named().items()
    }


def check(op, sample, dtype: torch.dtype, truth: Result, got: Result) -> None:
    bounds = _bounds(op, sample, dtype, truth)
    assert len(got.outputs) == len(truth.outputs)
    for name, value in truth.named().items():
        found = got.named()[name]
        if value is None:
            assert found is None, f"{name}: expected none"
            continue
        assert found is not None, f"{name}: missing"
        off = error(found, value)
        assert off <= bounds[name], f"{name}: error {off:.2e}, allowed {bounds[name]:.2e}"


def test_extension_is_built() -> None:
    assert require_extension().isa() in ISAS


@every_sample
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_kernel_equals_reference_in_float64(
    name: str, index: int, dtype: torch.dtype, isa: str, poisoned
) -> None:
    op, sample = sample_of(name, index, dtype)
    truth = run(op, sample, dtype=torch.float64, backend="reference")
    with instruction_set(isa):
        got = run(op, sample)
    for output, expected in zip(got.outputs, truth.outputs, strict=True):
        assert output.is_floating_point() == expected.is_floating_point()
    check(op, sample, dtype, truth, got)


@every_sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reference_equals_itself_in_float64(name: str, index: int, dtype: torch.dtype) -> None:
    op, sample = sample_of(name, index, dtype)
    truth = run(op, sample, dtype=torch.float64, backend="reference")
    check(op, sample, dtype, truth, run(op, sample, backend="reference"))


@every_sample
def test_threads(name: str, index: int, threads) -> None:
    op, sample = sample_of(name, index, torch.float32)
    truth = run(op, sample, dtype=torch.float64, backend="reference")
    for count in (1, 2, 3):
        threads(count)
        first, second = run(op, sample), run(op, sample)
        check(op, sample, torch.float32, truth, first)
        for key, value in first.named().items():
            again = second.named()[key]
            assert value is None or torch.equal(value.nan_to_num(), again.nan_to_num()), (
                f"{key}: bits differ on a rerun"
            )


@every_sample
def test_gradcheck(name: str, index: int) -> None:
    op, sample = sample_of(name, index, torch.float64)
    if op.backward is None:
        pytest.skip("the op has no gradient")
    numbers = sum(a.numel() for a in (*sample.args, *sample.kwargs.values()) if isinstance(a, Tensor))
    if numbers > GRADCHECK_ELEMENTS or not sample.smooth:
        pytest.skip("too large for finite differences, or not smooth")
    expected = run(op, sample).gradients
    names = [k for k, g in expected.items() if g is not None]
    values = {f"gradient of argument {i}": a for i, a in enumerate(sample.args)}
    values |= {f"gradient of {k}": v for k, v in sample.kwargs.items()}
    leaves = [values[k].detach().clone().requires_grad_() for k in names]

    def function(*changed: Tensor):
        at = dict(zip(names, changed, strict=True))
        args = [at.get(f"gradient of argument {i}", a) for i, a in enumerate(sample.args)]
        kwargs = {k: at.get(f"gradient of {k}", v) for k, v in sample.kwargs.items()}
        torch.manual_seed(1)
        got = op.function(*args, **kwargs)
        outputs = got if isinstance(got, tuple) else (got,)
        return tuple(o for o in outputs if o.is_floating_point() and bool(o.isfinite().all()))

    if any(leaf.numel() for leaf in leaves):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-6, rtol=1e-4)


@every_sample
def test_opcheck(name: str, index: int) -> None:
    op, sample = sample_of(name, index, torch.float32)
    with Recorder(op) as recorder:
        run(op, sample)
    assert recorder.calls, "the sample never reached the op"
    for function, args in recorder.calls:
        torch.library.opcheck(function, args)


@every_sample
def test_compile_fullgraph(name: str, index: int) -> None:
    op, sample = sample_of(name, index, torch.float32)
    torch._dynamo.reset()
    backend = "inductor" if index == 0 else "aot_eager"
    compiled = torch.compile(op.function, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # the size of nms's result
        expected, got = run(op, sample), run(op, sample, function=compiled)
    for key, value in expected.named().items():
        found = got.named()[key]
        assert (value is None) == (found is None), key
        assert value is None or error(found, value) <= 1e-5, key


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_explicit_backends(name: str) -> None:
    op, sample = sample_of(name, 0, torch.float32)
    with ops.backend("reference"):
        assert ops.explain(name, *sample.args, **sample.kwargs).backend == "reference"
    assert ops.explain(op.function, *sample.args, **sample.kwargs).backend == "cpu"
    with pytest.raises(ValueError, match=r"cuda.*chosen explicitly"), ops.backend("cuda"):
        op.function(*sample.args, **sample.kwargs)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_docstring_has_every_part(name: str) -> None:
    text = REGISTRY[name].function.__doc__ or ""
    for part in ("Args:", "Returns:", "Raises:", "Numerics:", "arXiv" if name != "linear" else "Args:"):
        assert part in text, f"{name}: docstring lacks {part}"

"""roi_pool beyond its record: torchvision's operator, threads, equal values, what is not a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pymm import ops
from pymm.ops import roi_pool
from tests.ops.test_roi_align import boxes_in, each_backend
from tests.torchvision_shim import require


@each_backend
def test_equals_torchvision_exactly(backend: str) -> None:
    """In float64, bit for bit, also where boxes stick out of the map, lie beside it, or are turned over."""
    theirs = require().ops.roi_pool
    for bins, scale in (((7, 7), 0.25), ((14, 3), 1.0), ((1, 20), 0.1), ((6, 49), 1 / 3)):
        features = torch.randn(3, 5, 21, 34, dtype=torch.float64)
        features[1] = features[1].round()  # equal values in many bins
        features.requires_grad_()
        boxes = boxes_in(60, 3, 34 / scale, 21 / scale).double()
        boxes[::7, 3:] -= 30
        boxes[::5] = boxes[::5].mul(2 * scale).round().div(2 * scale)  # halves of pixels
        boxes[:, 0] = torch.randint(0, 3, (60,))
        arguments = (features, boxes, bins, scale)
        expected = theirs(*arguments)
        with ops.backend(backend):
            got = roi_pool(*arguments)
        assert torch.equal(got, expected)
        cotangent = torch.randint(-8, 9, got.shape).double()  # sums of whole numbers, in whatever order
        (d_expected,) = torch.autograd.grad(expected, features, cotangent)
        (d_got,) = torch.autograd.grad(got, features, cotangent)
        assert torch.equal(d_got, d_expected)


@each_backend
def test_float32_and_lists_are_torchvisions(backend: str) -> None:
    features = torch.randn(3, 4, 12, 10).to(memory_format=torch.channels_last)
    boxes = [boxes_in(n, 1, 40, 48)[:, 1:] for n in (2, 0, 5)]
    with ops.backend(backend):
        got = roi_pool(features, boxes, 3, spatial_scale=0.25)
    assert torch.equal(got, require().ops.roi_pool(features, boxes, 3, spatial_scale=0.25))


@each_backend
def test_the_gradient_goes_to_the_first_of_equal_values(backend: str) -> None:
    features = torch.zeros(1, 1, 4, 6, requires_grad=True)
    with ops.backend(backend):
        roi_pool(features, torch.tensor([[0.0, 1, 1, 4, 2]]), 1).sum().backward()
    assert features.grad is not None
    assert features.grad.nonzero().tolist() == [[0, 0, 1, 1]]
    late = torch.tensor([[0.0, 0, 1, 2], [0, 2, 1, 2]])[None, None].requires_grad_()
    with ops.backend(backend):
        roi_pool(late, torch.tensor([[0.0, 0, 0, 3, 1]]), 1).sum().backward()
    assert late.grad is not None
    assert late.grad.nonzero().tolist() == [[0, 0, 0, 3]]  # the upper row, though further to the right


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_is_not_a_number_is_not_hidden(backend: str, dtype: torch.dtype) -> None:
    features = torch.randn(1, 2, 9, 40).to(dtype)
    features[0, 1, 3, 17] = features[0, 1, 5, 12] = float("nan")
    features[0, 0] = -float("inf")
    features.requires_grad_()
    boxes = torch.tensor([[0.0, 0, 0, 39, 8], [0, 0, 0, 5, 8]], dtype=dtype)
    with ops.backend(backend):
        out = roi_pool(features, boxes, 1)[:, :, 0, 0]
        (grad,) = torch.autograd.grad(out, features, torch.ones_like(out))
    assert out[0, 1].isnan()
    assert out[1, 1].isfinite()
    assert (out[:, 0] == -float("inf")).all()
    assert grad[0, 1, 3, 17] == 1  # the upper of the two
    assert grad[0, 1, 5, 12] == 0
    assert grad[0, 0, 0, 0] == 2


@each_backend
def test_boxes_beyond_all_numbers(backend: str) -> None:
    wide = [[0.0, -1e300, -1e300, 1e300, 1e300], [0, 1e300, 1, 1e308, 3], [0, 1, 1, float("inf"), 3]]
    features = torch.randn(1, 2, 6, 7, dtype=torch.float64)
    with ops.backend(backend):
        out = roi_pool(features, torch.tensor(wide, dtype=torch.float64), 1, 100.0)[:, :, 0, 0]
    assert torch.equal(out[0], features[0].amax((1, 2)))
    assert not out[1:].any()


def test_bits_do_not_depend_on_threads(threads: Any) -> None:
    features, boxes = torch.randn(2, 19, 50, 60), boxes_in(200, 2, 60, 50)
    found = []
    for count in (1, 2, 3):
        threads(count)
        leaf = features.clone().requires_grad_()
        out = roi_pool(leaf, boxes, 7)
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]))
    for out, grad in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(grad, found[0][1])


@each_backend
def test_an_image_that_is_not_there(backend: str) -> None:
    x, box = torch.randn(2, 3, 5, 5), torch.tensor([[2.0, 1, 1, 3, 3]])
    with pytest.raises(RuntimeError, match="names an image that is not there"), ops.backend(backend):
        roi_pool(x, box, 2)
    with pytest.raises(ValueError, match=r"^roi_pool: output_size must be a positive int or two, got 0"):
        roi_pool(x, box, 0)


def test_places_that_are_not_in_the_map() -> None:
    boxes, place = torch.zeros(1, 5), torch.full((1, 1, 1, 1), 20, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="argmax must be places of the map"):
        torch.ops.pymm.roi_pool_backward(torch.ones(1, 1, 1, 1), boxes, place, 1, 4, 5)

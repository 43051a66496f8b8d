"""roi_align beyond its record: torchvision's operator, threads, many images, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pymm import ops
from pymm.ops import roi_align
from pymm.ops._tolerance import error
from tests.torchvision_shim import require

each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def boxes_in(count: int, images: int, width: float, height: float) -> Tensor:
    corners = torch.rand(count, 4) * torch.tensor([width, height, width, height]) * 1.5 - 0.25 * width
    low, high = corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])
    return torch.cat([torch.randint(0, images, (count, 1)), low, high], 1)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 0, 1, 2, 5])
def test_equals_torchvision(backend: str, dtype: torch.dtype, aligned: bool, ratio: int) -> None:
    theirs = require().ops.roi_align
    for bins, scale in (((7, 7), 0.25), ((14, 3), 1.0), ((1, 20), 0.1)):
        features = torch.randn(3, 5, 21, 34, dtype=dtype, requires_grad=True)
        boxes = boxes_in(23, 3, 34 / scale, 21 / scale).to(dtype)
        arguments = (features, boxes, bins, scale, ratio, aligned)
        expected = theirs(*arguments)
        with ops.backend(backend):
            got = roi_align(*arguments)
        cotangent = torch.randn_like(got)
        assert error(got, expected) < 1e-5
        (d_expected,) = torch.autograd.grad(expected, features, cotangent)
        (d_got,) = torch.autograd.grad(got, features, cotangent)
        assert error(d_got, d_expected) < 1e-5


@each_backend
def test_lists_are_torchvisions(backend: str) -> None:
    theirs = require().ops.roi_align
    features = torch.randn(3, 4, 12, 10).to(memory_format=torch.channels_last)
    boxes = [boxes_in(n, 1, 40, 48)[:, 1:] for n in (2, 0, 5)]
    with ops.backend(backend):
        got = roi_align(features, boxes, 3, spatial_scale=0.25, sampling_ratio=2)
    assert error(got, theirs(features, boxes, 3, spatial_scale=0.25, sampling_ratio=2)) < 1e-6


@each_backend
def test_a_linear_map_is_sampled_exactly(backend: str) -> None:
    """Inside the map, the mean of the samples of a bin is the map's value at its centre."""
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(30.0), indexing="ij")
    box = torch.tensor([[0.0, 3.3, 2.1, 24.7, 17.5]])
    with ops.backend(backend):
        got = roi_align((2 * y + 3 * x)[None, None], box, (4, 5), aligned=True)[0, 0]
    centre_y = 2.1 - 0.5 + (torch.arange(4) + 0.5) * (17.5 - 2.1) / 4
    centre_x = 3.3 - 0.5 + (torch.arange(5) + 0.5) * (24.7 - 3.3) / 5
    torch.testing.assert_close(got, 2 * centre_y[:, None] + 3 * centre_x)


def test_many_images_in_sixteen_bits() -> None:
    """An image's index above 256, which bfloat16 cannot name, comes out of a list of boxes."""
    features = torch.arange(300.0)[:, None, None, None].expand(300, 1, 4, 4).to(torch.bfloat16)
    boxes = [torch.tensor([[0.0, 0, 3, 3]], dtype=torch.bfloat16)] * 300
    assert torch.equal(roi_align(features, boxes, 1)[:, 0, 0, 0], features[:, 0, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [2, 16, 37])
def test_channels_last_is_read_as_it_lies(dtype: torch.dtype, channels: int) -> None:
    """A part of a larger map, which is dense in no layout, of several images: the same values, no copy."""
    whole = torch.randn(3, 44, 50, channels + 5, dtype=torch.float64).to(dtype)
    features = whole[:, 1:-3, 2:-4, 3:-2].permute(0, 3, 1, 2)
    assert features.stride(1) == 1
    boxes = boxes_in(70, 3, 88, 80).to(dtype)
    boxes[:3, 1:] = torch.tensor([-90.0, -90, -50, -50])
    for bins, ratio in (((7, 7), 2), ((3, 20), -1)):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            got = roi_align(features, boxes, bins, 0.5, ratio)
        assert not {"aten::contiguous", "aten::clone", "aten::copy_"} & {e.key for e in seen.key_averages()}
        expected = roi_align(features.contiguous(), boxes, bins, 0.5, ratio)
        assert got.is_contiguous()
        torch.testing.assert_close(got, expected)


def test_float32_boxes_on_sixteen_bit_features() -> None:
    features = torch.randn(2, 3, 40, 40, dtype=torch.float64).to(torch.bfloat16)
    boxes = boxes_in(9, 2, 640, 640)
    got = roi_align(features, boxes, 5, 0.0625, 2)
    truth = roi_align(features.double(), boxes.double(), 5, 0.0625, 2)
    assert got.dtype == torch.bfloat16
    assert error(got, truth) < 2**-7


@each_backend
def test_boxes_that_are_not_finite_are_zero(backend: str) -> None:
    boxes = torch.tensor([[0.0, 1, 2, float("inf"), 4], [0, 1, float("nan"), 3, 4], [0, 1, 1, 3, 3]])
    features = torch.randn(1, 2, 8, 8, requires_grad=True)
    with ops.backend(backend):
        out = roi_align(features, boxes, 2)
    assert not out[:2].any()
    assert out[2].all()
    (grad,) = torch.autograd.grad(out[:2].sum(), features)
    assert not grad.any()


def test_a_box_as_large_as_the_world() -> None:
    """The number of samples inside the map decides the cost, not the number in the box."""
    boxes = torch.tensor([[0.0, -1e9, -1e9, 1e9, 1e9]])
    assert roi_align(torch.ones(1, 1, 8, 8), boxes, 2).abs().max() < 1e-6


def test_bits_do_not_depend_on_threads(threads: Any) -> None:
    features = torch.randn(2, 19, 50, 60)
    boxes = boxes_in(200, 2, 60, 50)
    found = []
    for count in (1, 2, 3):
        threads(count)
        leaf = features.clone().requires_grad_()
        out = roi_align(leaf, boxes, 7, 1.0, 2)
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]))
    for out, grad in found[1:]:
        assert torch.equal(out, found[0][0])
        assert torch.equal(grad, found[0][1])


X, BOX = torch.randn(2, 3, 5, 5), torch.tensor([[0.0, 1, 1, 3, 3]])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[0], BOX, 2), r"features must be \(N, C, H, W\), got \(3, 5, 5\)"),
        ((X[:, :, :0], BOX, 2), r"features must be .* above 0, got \(2, 3, 0, 5\)"),
        ((X, BOX[:, :4], 2), r"boxes must be \(K, 5\), got \(1, 4\)"),
        ((X, BOX.double(), 2), r"boxes must be of features' type torch.float32"),
        ((X, [BOX[:, 1:]], 2), r"boxes must be a list of N = 2 tensors, got 1"),
        ((X, [BOX, BOX], 2), r"boxes\[0\] must be \(L, 4\), got \(1, 5\)"),
        ((X, None, 2), r"boxes must be a tensor \(K, 5\) or a list"),
        ((X, BOX, 0), r"output_size must be a positive int or two, got 0"),
        ((X, BOX, (2, 2, 2)), r"output_size must be a positive int or two"),
        ((X, BOX, 2, 0.0), r"spatial_scale must be a finite number above 0, got 0.0"),
        ((X, BOX, 2, 1.0, 1.5), r"sampling_ratio must be an int, got float"),
    ],
)
def test_errors(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^roi_align: {message}"):
        roi_align(*args)


@each_backend
@pytest.mark.parametrize("image", [-1.0, 2.0, float("nan")])
def test_an_image_that_is_not_there(backend: str, image: float) -> None:
    box = BOX.clone()
    box[0, 0] = image
    with pytest.raises(RuntimeError, match="names an image that is not there"), ops.backend(backend):
        roi_align(X, box, 2)

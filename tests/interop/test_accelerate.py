"""`pymm.accelerate` on small models of every library: results, gradients, names, and the way back."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pymm
from pymm.interop.patterns import FACTS
from tests.interop.compare import error, randomize
from tests.interop.test_transformers import clip_donor, vit_donor


@dataclass
class Case:
    """A model, what to run of it, and how many modules of each part change."""

    make: Callable[[], Any]
    run: Callable[[Any], tuple[Tensor, ...]]
    changed: dict[str, int]


def timm_vit(**options: Any) -> Any:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    return timm.models.vision_transformer.VisionTransformer(**{**sizes, **options})


def pixels(model: nn.Module, size: int = 32) -> Tensor:
    """In the model's type."""
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3))
    return x.to(next(model.parameters()).dtype)


def tokens() -> Tensor:
    ids = torch.randint(1, 48, (3, 9), generator=torch.Generator().manual_seed(4))
    ids[:, 6] = 49
    return ids


def of_timm(**options: Any) -> Case:
    changed = {"patch embedding": 1, "attention": 2, "linear": 7, "linear with gelu": 2}
    return Case(lambda: timm_vit(**options), lambda m: (m(pixels(m)),), changed)


def of_transformers_clip() -> Case:
    def run(model: Any) -> tuple[Tensor, ...]:
        mask = torch.ones(3, 9, dtype=torch.int64)
        mask[1, 7:] = 0
        result = model(
            input_ids=tokens(), pixel_values=pixels(model, 24), attention_mask=mask, return_loss=True
        )
        return result.image_embeds, result.text_embeds, result.loss

    def make() -> Any:
        return clip_donor(pytest.importorskip("transformers"))

    return Case(make, run, {"patch embedding": 1, "attention": 3, "linear": 22, "linear with quick_gelu": 4})


def of_transformers_mae() -> Case:
    def make() -> Any:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
        decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
        sizes |= {f"decoder_{k}": v for k, v in decoder.items()} | {"decoder_num_attention_heads": 2}
        return transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**sizes, image_size=32, patch_size=8)
        )

    def run(model: Any) -> tuple[Tensor, ...]:
        noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(5))
        result = model(pixels(model), noise=noise)
        return result.loss, result.logits

    return Case(make, run, {"patch embedding": 1, "attention": 2, "linear": 17, "linear with gelu": 3})


def of_open_clip() -> Case:
    def make() -> Any:
        image = {"image_size": 24, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8}
        text = {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
        return pytest.importorskip("open_clip").CLIP(20, image, text, quick_gelu=True)

    changed = {"patch embedding": 1, "attention": 4, "linear": 4, "linear with quick_gelu": 4}
    return Case(make, lambda m: m(pixels(m, 24), tokens()), changed)


def of_torchvision() -> Case:
    def make() -> Any:
        vit = pytest.importorskip("torchvision").models.vision_transformer.VisionTransformer
        return vit(32, 8, num_layers=2, num_heads=3, hidden_dim=48, mlp_dim=96, num_classes=10)

    changed = {"patch embedding": 1, "attention": 2, "linear": 3, "linear with gelu": 2}
    return Case(make, lambda m: (m(pixels(m)),), changed)


def of_timm_beit(**options: Any) -> Case:
    def make() -> Any:
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 2,
            "num_heads": 3,
            "num_classes": 10,
        }
        beit = pytest.importorskip("timm").models.beit.Beit
        return beit(**{**sizes, "init_values": 0.1, "use_abs_pos_emb": False, **options})

    changed = {"patch embedding": 1, "attention": 2, "linear": 7, "linear with gelu": 2}
    return Case(make, lambda m: (m(pixels(m)),), changed)


def of_transformers_beit() -> Case:
    def make() -> Any:
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
        config = transformers.BeitConfig(
            **sizes, image_size=32, patch_size=8, use_relative_position_bias=True, num_labels=10
        )
        return transformers.BeitForImageClassification(config)

    changed = {"patch embedding": 1, "attention": 1, "linear": 11, "linear with gelu": 2}
    return Case(make, lambda m: (m(pixels(m)).logits,), changed)


CASES = {
    "timm BEiT": lambda: of_timm_beit(use_rel_pos_bias=True),
    "timm BEiT of a shared bias": lambda: of_timm_beit(use_shared_rel_pos_bias=True, qkv_bias=False),
    "transformers BEiT": of_transformers_beit,
    "timm": of_timm,
    "timm qk norm": lambda: of_timm(qk_norm=True, init_values=0.1),
    "timm registers": lambda: of_timm(reg_tokens=2, class_token=False, global_pool="avg"),
    "timm tanh": lambda: of_timm(act_layer=lambda: nn.GELU("tanh")),
    "transformers CLIP": of_transformers_clip,
    "transformers MAE": of_transformers_mae,
    "open_clip": of_open_clip,
    "torchvision": of_torchvision,
}


def outcome(case: Case, model: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """What the model gives, and the gradient of every parameter."""
    model.zero_grad()
    outputs = case.run(model)
    generator = torch.Generator().manual_seed(1)
    sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs).backward()
    return [y.detach() for y in outputs], {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def made(case: Case) -> Any:
    model = case.make()
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_same_results(name: str) -> None:
    """Gradients in float64: where they are zero but for rounding, float32 has nothing to compare."""
    case = CASES[name]()
    model = made(case)
    single = case.run(model)
    model.double()
    before, gradients = outcome(case, model)
    state = {k: (v.data_ptr(), v.clone()) for k, v in model.state_dict().items()}
    report = pymm.accelerate(model)
    counts: dict[str, int] = {}
    for part in report.changed.values():
        counts[part] = counts.get(part, 0) + 1
    counts.pop("activation, inside its linear")
    expected = dict(case.changed)
    if name == "timm tanh":
        expected["linear with gelu_tanh"] = expected.pop("linear with gelu")
    assert counts == expected, str(report)

    after, swapped = outcome(case, model)
    for a, b in zip(after, before, strict=True):
        assert error(a, b) < 1e-12
    assert swapped.keys() == gradients.keys()
    floor = 1e-6 * max(float(g.abs().max()) for g in gradients.values())
    for key, gradient in gradients.items():
        assert error(swapped[key], gradient, floor) < 1e-9, key
    for key, (place, value) in state.items():
        now = model.state_dict()[key]
        assert now.data_ptr() == place, key
        assert torch.equal(now, value), key
    assert model.state_dict().keys() == state.keys()

    report.undo()
    assert not any(FACTS in m.__dict__ or "forward" in m.__dict__ for m in model.modules())
    back, again = outcome(case, model)
    assert all(torch.equal(a, b) for a, b in zip(back, before, strict=True))
    assert all(torch.equal(again[key], g) for key, g in gradients.items())
    pymm.accelerate(model.float())
    for a, b in zip(case.run(model), single, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("name", ["timm", "open_clip", "transformers CLIP"])
def test_bfloat16(name: str) -> None:
    """Nearer to float32 than twice the distance of the model as it was."""
    case = CASES[name]()
    model = made(case)
    truth = case.run(model)
    low = copy.deepcopy(model).bfloat16()

    def run(m: Any) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            return case.run(m)

    with torch.no_grad():
        before = run(low)
        pymm.accelerate(low)
        after = run(low)
    for a, b, t in zip(after, before, truth, strict=True):
        assert a.dtype == b.dtype
        assert error(a.float(), t) < 2 * error(b.float(), t) + 2**-8


def test_training_with_drop_path() -> None:
    """The same random numbers decide which branches are dropped."""
    case = of_timm(proj_drop_rate=0.2, drop_path_rate=0.5)
    model = made(case).train()
    torch.manual_seed(7)
    before, gradients = outcome(case, model)
    pymm.accelerate(model)
    torch.manual_seed(7)
    after, swapped = outcome(case, model)
    assert error(after[0], before[0]) < 1e-5
    for key, gradient in gradients.items():
        assert error(swapped[key], gradient, 1e-6) < 1e-4, key


def test_attention_dropout_is_on_in_training_alone() -> None:
    model = timm_vit(attn_drop_rate=0.5)
    pymm.accelerate(model)
    x = pixels(model)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_hooks_stay_and_keep_their_view() -> None:
    """A hook between a linear layer and its activation sees what it saw."""
    model = timm_vit()
    randomize(model)
    seen: list[Tensor] = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda m, x, y: seen.append(y))
    model.blocks[1].attn.register_forward_hook(lambda m, x, y: seen.append(y))
    x = pixels(model)
    model(x)
    report = pymm.accelerate(model)
    assert report.left["blocks.0.mlp.act"] == "a hook looks between the linear layer and its activation"
    assert "blocks.0.mlp.fc1" in report.changed
    model(x)
    assert len(seen) == 4
    assert error(seen[2], seen[0]) < 1e-5
    assert error(seen[3], seen[1]) < 1e-5


class Tricky(nn.Module):
    """Looks like an MLP, and is none: the activation is before the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.act(x)))


class Swish(nn.Module):
    """Attention that timm's resembles, with another order of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 2, 3, 4).permute(3, 0, 2, 1, 4)
        return self.proj((q.mul(0.5) @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(b, t, c))


@pytest.mark.parametrize("kind", [Tricky, Swish])
def test_what_only_looks_alike_is_left(kind: type[nn.Module]) -> None:
    model, x = kind(), torch.randn(2, 5, 8)
    before = model(x)
    report = pymm.accelerate(model)
    assert any("it computes something else" in r or "does not apply it" in r for r in report.left.values())
    assert error(model(x), before) < 1e-5


def test_shared_activation_is_left() -> None:
    act = nn.GELU()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), nn.Sequential(act))
    before = model(x := torch.randn(3, 4))
    report = pymm.accelerate(model)
    assert report.left["1"] == "several modules share it"
    assert error(model(x), before) < 1e-5


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "float", "heads", "causal"])
@pytest.mark.parametrize("cross", [False, True])
def test_multihead_attention(mask: str, cross: bool, padding: bool) -> None:
    model = nn.MultiheadAttention(24, 3, batch_first=not cross)
    q = torch.randn(4, 4, 24)
    k = torch.randn(4, 4, 24) if cross else q
    masks: dict[str, Any] = {
        "none": None,
        "bool": torch.rand(4, 4) < 0.4,
        "float": torch.randn(4, 4),
        "heads": torch.rand(12, 4, 4) < 0.4,
        "causal": torch.ones(4, 4).triu(1).bool(),
    }
    if masks[mask] is not None and masks[mask].dtype == torch.bool:
        masks[mask][..., 0] = False  # where a row may attend nowhere torch gives NaN
    arguments: dict[str, Any] = {
        "attn_mask": masks[mask],
        "need_weights": False,
        "is_causal": mask == "causal",
    }
    if padding:
        arguments["key_padding_mask"] = torch.arange(4) >= torch.tensor([4, 2, 1, 3])[:, None]
    before = model(q, k, k, **arguments)[0]
    report = pymm.accelerate(model)
    assert report.changed[""] == "attention"
    assert error(model(q, k, k, **arguments)[0], before) < 1e-5
    weights = model(q, k, k)[1]  # asked for its weights, torch's own answers
    assert weights is not None


def test_open_clips_loss() -> None:
    open_clip = pytest.importorskip("open_clip")
    x, y = (nn.functional.normalize(torch.randn(12, 20), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(9.0, requires_grad=True)
    loss = open_clip.ClipLoss()

    def run() -> tuple[Tensor, ...]:
        value = loss(x, y, scale, output_dict=True)["contrastive_loss"]
        return value, *torch.autograd.grad(value, (x, y, scale))

    before = run()
    assert pymm.accelerate(loss).changed == {"": "contrastive loss"}
    for a, b in zip(run(), before, strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.parametrize("lengths", [(1.0, 1.0), (0.1, 3.0)])
def test_open_clips_sigmoid_loss(lengths: tuple[float, float]) -> None:
    """Value and all gradients, also of features that nobody has normalized."""
    loss = pytest.importorskip("open_clip").loss.SigLipLoss()
    x, y = (nn.functional.normalize(torch.randn(12, 20), dim=-1).double() for _ in range(2))
    stretch = torch.linspace(*lengths, 12, dtype=torch.float64)[:, None]
    x, y = (x * stretch).requires_grad_(), (y * stretch.flip(0)).requires_grad_()
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (9.0, -3.0))

    def run() -> tuple[Tensor, ...]:
        value = loss(x, y, scale, bias, output_dict=True)["contrastive_loss"]
        return value, *torch.autograd.grad(value, (x, y, scale, bias))

    before = run()
    single = loss(x.float(), y.float(), scale.float(), bias.float())
    assert pymm.accelerate(loss).changed == {"": "sigmoid loss"}
    for a, b in zip(run(), before, strict=True):
        assert error(a, b) < 1e-10
    assert error(loss(x.float(), y.float(), scale.float(), bias.float()), single) < 1e-5
    gathers = pytest.importorskip("open_clip").loss.SigLipLoss(world_size=2)
    assert list(pymm.accelerate(gathers).left.values()) == ["it gathers from several processes"]


def test_twice_once_back() -> None:
    model = timm_vit()
    first, second = pymm.accelerate(model), pymm.accelerate(model)
    assert first.changed
    assert not second.changed
    pymm.restore(model)
    assert not any(FACTS in m.__dict__ for m in model.modules())


def test_copies_and_pickles() -> None:
    """A copy runs the ops on its own parameters; a pickle holds the model as its library made it."""
    case = of_timm()
    model = made(case)
    pymm.accelerate(model)
    copied, before = copy.deepcopy(model), model(pixels(model))
    assert torch.equal(copied(pixels(model)), before)
    with torch.no_grad():
        copied.head.bias += 1
    assert torch.equal(model(pixels(model)), before)
    assert not torch.equal(copied(pixels(model)), before)
    loaded = pickle.loads(pickle.dumps(model))
    assert error(loaded(pixels(model)), before) < 1e-5
    fresh = case.make()
    fresh.load_state_dict(model.state_dict())
    assert error(fresh.eval()(pixels(model)), before) < 1e-5


def test_compiled_training() -> None:
    case = of_timm(depth=1)
    model = made(case)
    before, gradients = outcome(case, model)
    pymm.accelerate(model)
    compiled = torch.compile(model, fullgraph=True)
    after, swapped = outcome(Case(case.make, lambda m: case.run(compiled), {}), model)
    assert error(after[0], before[0]) < 1e-5
    for key, gradient in gradients.items():
        assert error(swapped[key], gradient, 1e-6) < 1e-4, key


def test_compiled_multihead_attention() -> None:
    model = made(of_open_clip())
    x = pixels(model, 24)
    with torch.no_grad():
        before = model.encode_image(x)
        pymm.accelerate(model)
        after = torch.compile(model.encode_image, fullgraph=True)(x)
    assert error(after, before) < 1e-5


def test_vit_of_transformers() -> None:
    model = vit_donor(pytest.importorskip("transformers")).eval()
    randomize(model)
    before = model(pixels(model)).logits
    report = pymm.accelerate(model)
    assert "attention" in report.changed.values()
    assert error(model(pixels(model)).logits, before) < 1e-5
    assert "left" not in str(report)


def test_benchmark_of_a_small_model(tmp_path: Path) -> None:
    """The script's row: both ways, the peak, and a file that keeps the newest row of a name."""
    from pymm.benchmarks import accelerate as script

    small = script.Workload(
        "small training",
        lambda: timm_vit(img_size=224, patch_size=32, num_classes=1000),
        script._training,
        2,
        None,
    )
    row = script.measure(small, torch.float32, script.Settings(seconds=0.01, compiled=False))
    assert row["times"].keys() == {"before, eager", "after, eager", "peak"}
    assert row["speedup"] == row["speedup_eager"]
    assert row["operations"] > 0
    assert "attention: 2 modules run pymm's ops" in row["report"]
    path = tmp_path / "rows.json"
    for _ in range(2):
        script._add(row, path)
    assert [r["name"] for r in json.loads(path.read_text())["rows"]] == ["small training float32"]

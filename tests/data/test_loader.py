"""The same batches whatever the workers, the skip and the past; every sample once; ranks that share."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pymm.data import Batch, ImageTextLoader, TrainTransform, unseen_concepts
from tests.data.shards import TOKENIZER, keys, loader, picture, sample, samples, write

TRAIN = TrainTransform(
    8,
    crop_scale=(0.3, 1.0),
    flip=0.5,
    rotate=20,
    translate=0.1,
    zoom=(0.8, 1.2),
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    grayscale=0.2,
    random_background=1.0,
)
CAPTIONS = ["name_or_tags", "a picture of a {caption}", "{caption} or {tag}"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards of seven, six good; images of two sizes, one of them transparent."""
    for shard in range(5):
        members = []
        for i in range(7 * shard, 7 * shard + 7):
            image, text = sample(f"s{i:03}", i, tags=["cat", f"tag{i}", "red"])
            if i % 3 == 0:
                image = (image[0], picture(i, (20, 14), "RGBA"))
            if i % 7 == 5:
                image = (image[0], image[1][:90])
            members += [image, text]
        write(tmp_path / f"{shard}.tar", members)
    return tmp_path


def train_loader(source: object, **settings: object) -> ImageTextLoader:
    defaults = {"transform": TRAIN, "shuffle": True, "drop_last": True, "caption_mode": CAPTIONS, "seed": 3}
    return loader(source, **(defaults | {"shuffle_buffer": 9} | settings))


def same(a: Batch, b: Batch) -> bool:
    tensors = ((a.pixels, b.pixels), (a.tokens, b.tokens), (a.ids, b.ids))
    return all(torch.equal(x, y) for x, y in tensors) and (a.keys, a.captions) == (b.keys, b.captions)


def all_same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("cache", ["none", "decoded"])
@pytest.mark.parametrize("shape", ["mixed", "stacked"])
def test_batches_do_not_depend_on_skip_workers_or_the_past(folder: Path, cache: str, shape: str) -> None:
    if shape == "stacked":
        for path in folder.iterdir():
            path.unlink()
        write(folder / "a.tar", samples(0, 31))
    reference = list(train_loader(folder, cache=cache).epoch(2))
    assert len(reference) >= 7
    used = train_loader(folder, cache=cache)
    assert all_same(list(used.epoch(2)), reference)
    report = used.report
    next(used.epoch(0))
    for skip in range(len(reference) + 2):
        assert all_same(list(used.epoch(2, skip)), reference[skip:])
    for workers in (1, 2):
        with_workers = train_loader(folder, cache=cache, workers=workers)
        assert all_same(list(with_workers.epoch(2)), reference)
        assert with_workers.report == report
        assert all_same(list(with_workers.epoch(2, 3)), reference[3:])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all_same(list(train_loader(folder, cache=cache).epoch(2)), reference)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_seed_and_epoch_change_everything(folder: Path, cache: str) -> None:
    first = list(train_loader(folder, cache=cache).epoch(0))
    for other in (
        list(train_loader(folder, cache=cache).epoch(1)),
        list(train_loader(folder, cache=cache, seed=4).epoch(0)),
    ):
        assert keys(first) != keys(other)
        assert not torch.equal(first[0].pixels, other[0].pixels)


def test_epochs_augment_anew_and_draw_other_captions(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", sample("a", 1, "alone", tags=["x", "y", "z", "v", "w"]))
    batches = train_loader(tmp_path, batch_size=1, caption_mode="name_or_tags")
    epochs = [next(batches.epoch(epoch)) for epoch in range(12)]
    assert len({batch.captions[0] for batch in epochs}) > 2
    assert not torch.equal(epochs[0].pixels, epochs[1].pixels)


@pytest.mark.parametrize("cache", ["none", "decoded"])
@pytest.mark.parametrize("workers", [0, 1])
def test_skipping_decodes_nothing(
    folder: Path, cache: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    transform = TRAIN.__class__.__call__

    def counted(self: TrainTransform, images: object, generator: torch.Generator) -> torch.Tensor:
        seen.append(len(images))  # type: ignore[arg-type]
        return transform(self, images, generator)  # type: ignore[arg-type]

    batches = train_loader(folder, cache=cache)
    total = len(list(batches.epoch(0)))
    monkeypatch.setattr(TrainTransform, "__call__", counted)
    assert len(list(batches.epoch(0, total - 1))) == 1
    assert seen == [4]


@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_the_program_s_random_state_stays(folder: Path, cache: str) -> None:
    import random

    import numpy as np

    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    for workers in (0, 1):
        list(train_loader(folder, cache=cache, workers=workers).epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002


@pytest.mark.parametrize("cache", ["none", "decoded"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_good_sample_comes_once(folder: Path, cache: str, shuffle: bool) -> None:
    batches = loader(folder, cache=cache, shuffle=shuffle)
    found = keys(batches.epoch(0))
    good = [f"s{i:03}" for i in range(35) if i % 7 != 5]
    assert sorted(found) == good
    assert (found == good) != shuffle
    assert batches.report.read == 30
    assert batches.report.skipped == {"damaged image": 5}


def test_a_stream_is_shuffled_across_shards(folder: Path) -> None:
    shards = [int(key[1:]) // 7 for key in keys(train_loader(folder, shuffle_buffer=15).epoch(0))]
    changes = sum(a != b for a, b in pairwise(shards))
    assert changes > 8  # 4 without a buffer
    orders = {tuple(keys(train_loader(folder, shuffle_buffer=1).epoch(epoch))) for epoch in range(5)}
    assert len(orders) > 1


def test_layout_of_a_batch(folder: Path) -> None:
    batch = next(loader(folder, context_length=7).epoch(0))
    assert batch.pixels.shape == (4, 3, 8, 8)
    assert batch.pixels.dtype == torch.float32
    assert torch.equal(batch.tokens, TOKENIZER(batch.captions, 7))
    assert batch.ids.dtype == torch.int64
    assert len(batch) == 4
    assert batch.captions == [f"picture {int(key[1:])}" for key in batch.keys]
    moved = batch.to("meta")
    assert moved.pixels.device.type == "meta"
    assert moved.keys == batch.keys


@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_select_leaves_out(folder: Path, cache: str) -> None:
    batches = loader(folder, cache=cache, select=lambda key, metadata: metadata["caption"].endswith("4"))
    assert keys(batches.epoch(0)) == ["s004", "s014", "s024", "s034"]
    assert batches.report.left_out == 31
    assert not batches.report.skipped


def test_ids(tmp_path: Path) -> None:
    write(
        tmp_path / "a.tar", [*sample("one", 1, "cat"), *sample("two", 2, "dog"), *sample("three", 3, "cat")]
    )
    write(tmp_path / "b.tar", [*sample("one", 4, "bird")])

    def ids(kind: str) -> list[int]:
        return [i for batch in loader(tmp_path, ids=kind).epoch(0) for i in batch.ids.tolist()]

    one, two, three, again = ids("key")
    assert one == again
    assert len({one, two, three}) == 3
    one, two, three, again = ids("caption")
    assert one == three
    assert len({one, two, again}) == 3
    assert len(set(ids("sample"))) == 4
    assert ids("key")[0] == 7232114797876383760  # the same on every machine and in every version


@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_ranks_share_the_source_and_end_together(folder: Path, cache: str) -> None:
    given = 6 if cache == "none" else None
    settings = {"cache": cache, "world_size": 2, "batch_size": 3, "batches_per_epoch": given}
    ranks = [list(train_loader(folder, rank=rank, **settings).epoch(0)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) >= 5
    assert not set(keys(ranks[0][:3])) & set(keys(ranks[1][:3]))
    if cache == "decoded":
        counts = Counter(keys(ranks[0] + ranks[1]))
        assert set(counts.values()) == {1}
        assert len(counts) == 30


@pytest.mark.parametrize("cache", ["none", "decoded"])
def test_batches_per_epoch_goes_round(folder: Path, cache: str) -> None:
    batches = train_loader(folder, cache=cache, batches_per_epoch=20)
    assert batches.batches_per_epoch == 20
    found = list(batches.epoch(0))
    assert len(found) == 20
    assert len(set(keys(found))) == 30
    assert keys(found[:7]) != keys(found[7:14])
    for skip in (3, 9, 19, 20):
        assert all_same(list(batches.epoch(0, skip)), found[skip:])
    assert len(list(train_loader(folder, cache=cache, batches_per_epoch=2).epoch(0))) == 2


def test_batches_per_epoch_is_known_where_it_can_be(folder: Path) -> None:
    assert train_loader(folder, cache="decoded").batches_per_epoch == 7
    assert loader(folder, cache="decoded").batches_per_epoch == 8
    assert train_loader(folder, cache="none").batches_per_epoch is None


def test_an_epoch_left_early_leaves_no_process(folder: Path) -> None:
    import multiprocessing

    epoch = train_loader(folder, workers=2).epoch(0)
    next(epoch)
    assert len(multiprocessing.active_children()) == 2
    epoch.close()  # type: ignore[attr-defined]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, world_size = 2\)"),
        ({"world_size": 2}, "batches_per_epoch must be given for a stream"),
        ({"world_size": 9, "batches_per_epoch": 1}, "at least 9 shards, one per rank, got 5"),
        ({"cache": "disk"}, 'cache must be "auto", "decoded" or "none"'),
        ({"ids": "name"}, "ids must be one of key, caption, sample"),
        ({"caption_mode": "{author}"}, "caption_mode must be"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be positive"),
    ],
)
def test_wrong_arguments_are_named(folder: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(folder, **settings)


def test_wrong_epoch_is_named_at_once(folder: Path) -> None:
    with pytest.raises(ValueError, match="epoch and skip must be at least 0"):
        loader(folder).epoch(-1)


def test_the_embedded_pack_needs_no_settings() -> None:
    unseen = unseen_concepts()
    batches = loader("emoji:noto,twemoji", select=lambda key, _: key in unseen, batch_size=370)
    (batch,) = batches.epoch(0)
    assert set(batch.keys) == unseen
    assert set(Counter(batch.ids.tolist()).values()) == {2}  # the concept in two styles is one id
    assert batches.report.left_out == 2 * (1852 - 185)

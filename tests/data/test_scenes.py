from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pymm import cli
from pymm.data import (
    EvalTransform,
    ImageTextLoader,
    SceneDetection,
    Scenes,
    SceneSettings,
    Tokenizer,
    collate,
    unseen_concepts,
)
from pymm.data.scenes import OPAQUE, _box
from pymm.data.scenes_cutouts import concepts, cutout, dominant_colour
from pymm.data.scenes_language import captions, confusable, counted, questions, relations
from pymm.data.scenes_picture import draw_boxes, sheet
from pymm.data.scenes_shards import WriteSettings, write_scenes
from pymm.data.scenes_textures import TEXTURES, texture

SMALL = SceneSettings(size=64, classes=40)


@pytest.fixture(scope="module")
def made() -> list:
    scenes = Scenes(replace(SMALL, objects=(2, 6), overlap=0.5))
    return [scenes[i] for i in range(60)]


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a.image), np.asarray(b.image)) and a.metadata() == b.metadata()


def test_a_scene_depends_on_settings_and_index_alone(made: list) -> None:
    again = Scenes(replace(SMALL, objects=(2, 6), overlap=0.5))
    for i in (41, 3, 17):
        assert same(again[i], made[i])
    other = Scenes(replace(SMALL, objects=(2, 6), overlap=0.5, seed=1))
    assert not same(other[3], made[3])
    assert not same(made[4], made[3])


def test_boxes_and_visibility_are_those_of_the_pixels() -> None:
    """On a plain background an object changes pixels inside its box only, and touches all its sides."""
    scenes = Scenes(replace(SMALL, objects=(1, 1), backgrounds=("plain",), rotate=40.0))
    for i in range(20):
        scene = scenes[i]
        (one,) = scene.objects
        pixels = np.asarray(scene.image).astype(int)
        left, top, right, bottom = one.box
        outside = np.ones(pixels.shape[:2], dtype=bool)
        outside[top:bottom, left:right] = False
        ground = np.median(pixels[outside], axis=0)
        # What is less than half opaque may lie outside, one or two pixels wide.
        wide = np.ones_like(outside)
        wide[max(0, top - 3) : bottom + 3, max(0, left - 3) : right + 3] = False
        assert (pixels[wide] == ground).all()
        changed = np.abs(pixels - ground).max(-1) > 0
        assert changed[top].any()
        assert changed[bottom - 1].any()
        assert changed[:, left].any()
        assert changed[:, right - 1].any()
        assert one.visible == 1.0


def test_hidden_shares_keep_the_limit(made: list) -> None:
    shares = [one.visible for scene in made for one in scene.objects]
    assert min(shares) >= 0.5
    assert min(shares) < 0.9
    assert all(scene.objects[-1].visible == 1 for scene in made)
    apart = Scenes(replace(SMALL, objects=(3, 6), overlap=0.0))
    assert all(one.visible == 1 for i in range(20) for one in apart[i].objects)


def test_a_known_mask_gives_its_box() -> None:
    mask = np.zeros((9, 9), dtype=bool)
    mask[2:5, 3] = mask[4, 3:8] = True
    assert _box(mask) == (3, 2, 8, 5)


def test_names_in_a_scene_cannot_be_taken_for_each_other(made: list) -> None:
    for scene in made:
        names = sorted({one.name for one in scene.objects})
        assert not any(confusable(a, b) for i, a in enumerate(names) for b in names[:i])
    assert confusable("cat", "black cat")
    assert confusable("cats", "cat face")
    assert not confusable("green apple", "green book")
    assert not confusable("glass of milk", "bowl with spoon")


def answer(question: str, scene) -> str:
    """The answer, found again from boxes and names by other means than the generator's."""
    counts = Counter(one.name for one in scene.objects)
    wheres = {"to the left of": (2, 0), "to the right of": (0, 2), "above": (3, 1), "below": (1, 3)}

    def those(where: str, name: str) -> set[str]:
        (box,) = [one.box for one in scene.objects if one.name == name]
        mine, other = wheres[where]
        sign = 1 if mine > other else -1
        return {one.name for one in scene.objects if sign * one.box[mine] <= sign * box[other]}

    asked = [one for one in counts if re.search(rf"\b{re.escape(one)}\b", question)]
    if found := re.fullmatch(
        r"(?:Is|Are) the (.+?) (to the left of|to the right of|above|below) the (.+)\?", question
    ):
        return "yes" if found[1] in those(found[2], found[3]) else "no"
    if question.startswith(("Is there", "Are there")):
        return "yes" if asked else "no"
    if question == "How many things are there?":
        return str(len(scene.objects))
    if question.startswith("How many"):
        named = [one for one in counts if counted(one, 2).removeprefix("two ") in question or one in question]
        (name,) = [one for one in named if one == max(named, key=len)]
        return str(counts[name])
    if found := re.fullmatch(r"What is (to the left of|to the right of|above|below) the (.+)\?", question):
        (name,) = those(found[1], found[2])
        return name
    if question == "What is in the picture?":
        (name,) = counts
        return name
    found = re.fullmatch(r"What colour (?:is|are) the (.+)\?", question)
    assert found is not None, question
    (one,) = [one for one in scene.objects if one.name == found[1]]
    return str(dominant_colour(one.style, one.key))


def test_every_answer_is_right(made: list) -> None:
    types: Counter[tuple[str, str]] = Counter()
    for scene in made:
        for one in scene.questions:
            assert answer(one.question, scene) == one.answer, (one, scene.objects)
            types[one.type, one.answer if one.answer in ("yes", "no") else "other"] += 1
    for wanted in ("existence", "relation"):
        assert types[wanted, "yes"] > 10
        assert types[wanted, "no"] > 10
    for wanted in ("count", "what", "colour"):
        assert types[wanted, "other"] > 10


def test_captions_are_true(made: list) -> None:
    for scene in made:
        counts = Counter(one.name for one in scene.objects)
        assert len(scene.captions) >= 3
        assert all(counted(name, count) in scene.captions[0] for name, count in counts.items())
        said = [c for c in scene.captions if re.search(r" (to the (left|right) of|above|below) ", c)]
        for text in said:
            a, how, b = re.fullmatch(r"(.+?) (?:to the )?(left of|right of|above|below) (.+)", text).groups()
            named = [(scene.objects[i].name, how_, scene.objects[j].name) for i, how_, j in scene.relations]
            assert any((counted(x, 1), y, counted(z, 1)) == (a, how, b) for x, y, z in named)


@pytest.mark.parametrize(
    ("name", "count", "said"),
    [
        ("dog", 1, "a dog"),
        ("orange book", 1, "an orange book"),
        ("unicorn", 1, "a unicorn"),
        ("umbrella", 1, "an umbrella"),
        ("cherry", 2, "two cherries"),
        ("day", 3, "three days"),
        ("mouse", 2, "two mice"),
        ("tropical fish", 2, "two tropical fish"),
        ("bread", 1, "bread"),
        ("glass of milk", 2, "two times glass of milk"),
        ("glasses", 2, "two times glasses"),
        ("cactus", 2, "two cactuses"),
        ("dog", 12, "12 dogs"),
    ],
)
def test_counting_in_words(name: str, count: int, said: str) -> None:
    assert counted(name, count) == said


def test_parts_share_no_concept_and_all_labels() -> None:
    parts = {part: Scenes(replace(SMALL, part=part, holdout=0.25)) for part in ("all", "seen", "unseen")}
    keys = {part: {c.key for c in scenes.shown} for part, scenes in parts.items()}
    assert len(keys["all"]) == 40
    assert len(keys["unseen"]) == 10
    assert keys["seen"] | keys["unseen"] == keys["all"]
    assert not keys["seen"] & keys["unseen"]
    shown = {one.key for i in range(30) for one in parts["unseen"][i].objects}
    assert shown <= keys["unseen"]
    assert len({scenes.vocabulary for scenes in parts.values()}) == 1
    assert unseen_concepts(0.25, 0, keys["all"]) == keys["unseen"]


def test_a_style_can_be_held_out() -> None:
    scenes = Scenes(replace(SMALL, styles=("noto",)))
    assert {one.style for i in range(20) for one in scenes[i].objects} == {"noto"}


def test_textures_differ_and_have_two_near_colours() -> None:
    for kind in TEXTURES:
        pixels = np.asarray(texture(kind, 48, np.random.RandomState(3))).astype(int)
        spread = pixels.reshape(-1, 3).max(0) - pixels.reshape(-1, 3).min(0)
        assert (spread.max() == 0) == (kind == "plain")
        assert spread.max() <= 71


def test_colours_of_cutouts() -> None:
    by_name = {c.name: c.key for c in concepts()}
    told = {"red circle": "red", "blue circle": "blue", "green circle": "green", "black circle": "black"}
    for name, colour in told.items():
        assert dominant_colour("twemoji", by_name[name]) == colour
    assert dominant_colour("twemoji", by_name["rainbow"]) is None
    picture = cutout("noto", by_name["red circle"])
    assert picture.getchannel("a").getbbox() == (0, 0, *picture.size)
    assert np.asarray(picture.getchannel("a")).max() >= OPAQUE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 8}, "size must be at least 16, got 8"),
        ({"objects": (3, 2)}, "objects must be two counts"),
        ({"overlap": 1.0}, "overlap must be in [0, 0.9], got 1.0"),
        ({"styles": ("oil",)}, "styles must be some of noto, twemoji, fluent"),
        ({"backgrounds": ()}, "backgrounds must be some of plain"),
        ({"classes": 0}, "classes must be at least 1"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SceneSettings(**settings)


def test_a_source_in_one_line() -> None:
    settings, count = SceneSettings.parse("scenes:count=7,size=48,objects=1+2,styles=noto+fluent,part=seen")
    assert (settings, count) == (
        SceneSettings(size=48, objects=(1, 2), styles=("noto", "fluent"), part="seen"),
        7,
    )
    assert SceneSettings.parse("scenes:classes=5")[0].classes == 5
    for wrong in ("scenes:sizes=3", "scenes:size=x", "scenes:count=0", "scenes:part=none"):
        with pytest.raises(ValueError, match="must be"):
            SceneSettings.parse(wrong)
    with pytest.raises(ValueError, match="classes must be at most"):
        Scenes(SceneSettings(classes=5000))
    with pytest.raises(ValueError, match="a concept is left"):
        Scenes(SceneSettings(classes=3, part="unseen"))


def test_detection_samples() -> None:
    data = SceneDetection("scenes:count=12,size=64,classes=40")
    assert len(data) == 12
    assert len(data.classes) == 41
    batch = next(iter(DataLoader(data, 4, collate_fn=collate))).to("cpu")
    scenes = Scenes(SMALL)
    assert len(batch) == 4
    assert batch.pixels.dtype == torch.uint8
    assert batch.pixels.shape == (4, 3, 64, 64)
    for i in range(4):
        scene = scenes[i]
        assert np.array_equal(batch.pixels[i].permute(1, 2, 0).numpy(), np.asarray(scene.image))
        assert batch.boxes[i].dtype == torch.float32
        assert batch.labels[i].dtype == torch.int64
        assert batch.boxes[i].tolist() == [list(one.box) for one in scene.objects]
        assert [data.classes[k] for k in batch.labels[i].tolist()] == [one.name for one in scene.objects]
        assert (batch.boxes[i][:, 2:] > batch.boxes[i][:, :2]).all()
    shifted = SceneDetection(SMALL, count=2, start=3, keep=False)
    assert torch.equal(shifted[0].pixels, data[3].pixels)
    with pytest.raises(IndexError):
        shifted[2]


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_are_whole_and_kept(tmp_path: Path) -> None:
    settings = WriteSettings(str(tmp_path / "a"), count=5, per_shard=2, scenes=SMALL)
    new = write_scenes(settings)
    assert [path.name for path in new] == [f"scenes-{i:08d}-{n}.tar" for i, n in ((0, 2), (2, 2), (4, 1))]
    first = written(tmp_path / "a")
    new[1].unlink()
    kept = new[0].stat().st_mtime_ns
    assert write_scenes(settings) == [new[1]]
    assert written(tmp_path / "a") == first
    assert new[0].stat().st_mtime_ns == kept
    write_scenes(replace(settings, out=str(tmp_path / "b"), workers=2))
    assert written(tmp_path / "b") == first
    with pytest.raises(ValueError, match="out must be a new folder, or one of the same settings"):
        write_scenes(replace(settings, scenes=replace(SMALL, seed=9)))
    with tarfile.open(new[0]) as tar:
        told = json.load(tar.extractfile("scene00000000.json"))
    scene = Scenes(SMALL)[0]
    assert told == json.loads(json.dumps(scene.metadata()))
    assert told["synthetic"] is True


def test_shards_and_memory_give_the_loader_the_same(tmp_path: Path) -> None:
    write_scenes(WriteSettings(str(tmp_path), count=6, per_shard=4, scenes=SMALL))
    tokenizer = Tokenizer.train([c.name for c in concepts()], 400, 32)

    def batches(source: str) -> list:
        loader = ImageTextLoader(
            source,
            transform=EvalTransform(64, output="uint8"),
            tokenizer=tokenizer,
            batch_size=3,
            shuffle=False,
            caption_mode="name_or_tags",
        )
        return list(loader.epoch(0))

    stored, made = batches(str(tmp_path)), batches("scenes:count=6,size=64,classes=40")
    assert [b.keys for b in stored] == [b.keys for b in made]
    assert len(made) == 2
    scenes = Scenes(SMALL)
    for a, b in zip(stored, made, strict=True):
        assert torch.equal(a.pixels, b.pixels)
        for key, caption in zip(b.keys, b.captions, strict=True):
            assert caption in scenes[int(key.removeprefix("scene"))].captions


def test_boxes_are_drawn_where_they_are() -> None:
    scene = Scenes(SMALL)[0]
    boxes = [one.box for one in scene.objects]
    drawn = draw_boxes(scene.image, boxes, [one.name for one in scene.objects], [0.5] * len(boxes), enlarge=2)
    assert drawn.size == (128, 128)
    left, _, _, bottom = boxes[-1]
    assert drawn.getpixel((2 * left, 2 * bottom - 1)) == (drawn.getpixel((2 * left + 1, 2 * bottom - 2)))
    page = sheet(Scenes(SMALL), rows=1, columns=2)
    assert page.width > 2 * 64
    assert np.asarray(page).min() < 60


def test_sentences_of_given_objects() -> None:
    dog = SimpleNamespace(name="dog", colour="brown", box=(0, 0, 10, 10))
    car = SimpleNamespace(name="car", colour=None, box=(20, 5, 30, 15))
    related = relations([dog, car])
    assert related == ((0, "left of", 1), (1, "right of", 0))
    said = captions([dog, car], related, np.random.RandomState(0))
    assert said[0] == "a dog and a car"
    assert "the dog is brown" in said
    assert "two things" in said
    asked = questions([dog, car], related, ["dog", "car", "house", "hot dog"], np.random.RandomState(0))
    assert {("Is there a house?", "no"), ("What colour is the dog?", "brown")} <= {
        (one.question, one.answer) for one in asked
    }
    assert all("hot dog" not in one.question for one in asked)


def test_the_command_writes_shards_and_a_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = str(tmp_path / "out"), tmp_path / "sheet.png"
    words = ["data", "scenes", "--out", out, "--count", "3", "--per-shard", "2", "--size", "32"]
    assert cli.main([*words, "--objects", "1", "2", "--sheet", str(picture)]) == 0
    assert "3 synthetic scenes, 2 new shards" in capsys.readouterr().out
    assert len(list(Path(out).glob("*.tar"))) == 2
    assert picture.stat().st_size > 1000
    assert cli.main([*words, "--objects", "2", "2"]) == 2
    assert "out must be a new folder, or one of the same settings" in " ".join(
        capsys.readouterr().err.split()
    )

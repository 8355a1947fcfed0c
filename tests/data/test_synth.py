"""The drawn data set: what a box promises about pixels, what is written, and what is refused."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from boxwright.data.synth import CLASSES, HARD, TINIEST, Scene, draw_clip, draw_scene, synthesize
from boxwright.types import UserError

CROWD = {"scale": (0.3, 0.5), "size": (120, 160)}


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    y, x = np.nonzero(mask)
    return x.min(), y.min(), x.max() + 1, y.max() + 1


def holds(outer: np.ndarray, inner: tuple[int, int, int, int], slack: int = 0) -> bool:
    x1, y1, x2, y2 = inner
    return bool(outer[0] <= x1 + slack and outer[1] <= y1 + slack and x2 - slack <= outer[2] and y2 - slack <= outer[3])


def assert_same(one: Scene, other: Scene) -> None:
    for name in ("image", "boxes", "labels", "difficult", "truncated"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def layers(seed: int, index: int, most: int) -> tuple[Scene, list[np.ndarray]]:
    """A crowded scene, and the pixels that each of its objects changed when it was added to those before."""
    scenes = [draw_scene(seed, index, objects=(n, n), **CROWD) for n in range(most + 1)]
    masks = [
        (after.image != before.image).any(axis=2)
        for before, after in itertools.pairwise(scenes)
        if len(after.boxes) > len(before.boxes)
    ]
    return scenes[-1], masks


# ---------------------------------------------------------------------------------------------------- scenes


def test_a_scene_is_a_function_of_its_arguments():
    scene = draw_scene(3, 5)
    assert_same(scene, draw_scene(3, 5))
    for other in (draw_scene(4, 5), draw_scene(3, 6), draw_scene(3, 5, split="valid")):
        assert (scene.image != other.image).mean() > 0.5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 10**6), st.tuples(*[st.integers(32, 200)] * 2), st.integers(0, 6))
def test_a_scene_keeps_the_conventions(seed: int, index: int, size: tuple[int, int], most: int):
    scene = draw_scene(seed, index, size=size, objects=(0, most))
    assert scene.image.shape == (*size, 3)
    assert scene.image.dtype == np.uint8
    assert (scene.boxes.dtype, scene.labels.dtype) == (np.float32, np.int64)
    assert scene.boxes.shape == (len(scene.labels), 4)
    assert len(scene.labels) == len(scene.difficult) == len(scene.truncated) <= most
    assert (scene.boxes[:, :2] >= 0).all()
    assert (scene.boxes[:, :2] < scene.boxes[:, 2:]).all()
    assert (scene.boxes[:, 2:] <= size[::-1]).all()
    assert (scene.boxes == scene.boxes.round()).all()
    assert np.isin(scene.labels, range(len(CLASSES))).all()


def test_without_objects_there_is_a_busy_background():
    scene = draw_scene(0, 0, objects=(0, 0))
    assert scene.boxes.shape == (0, 4)
    assert scene.image.std() > 8


@pytest.mark.parametrize("index", range(30))
def test_boxes_hold_every_visible_pixel_and_no_margin(index: int):
    scene, masks = layers(7, index, 5)
    assert len(masks) == len(scene.boxes)
    covered = np.zeros(scene.image.shape[:2], np.uint8)  # by later objects, last first
    for box, mask in list(zip(scene.boxes, masks, strict=True))[::-1]:
        assert holds(box, bounds(mask & (covered == 0)))
        surely_covered = cv2.erode(covered, np.ones((3, 3), np.uint8)) > 0  # without their soft edges
        # One pixel of slack, for an edge that happens to have the colour of what it hides.
        assert holds(np.array(bounds(mask & ~surely_covered)), tuple(box), slack=1)
        covered |= mask.astype(np.uint8)


def test_difficult_objects_are_those_that_are_mostly_hidden():
    seen: list[tuple[float, bool]] = []
    for index in range(60):
        scene, masks = layers(1, index, 6)
        for order, mask in enumerate(masks):
            if not scene.truncated[order]:
                hidden = np.any([np.zeros_like(mask), *masks[order + 1 :]], axis=0)
                seen.append(((mask & ~hidden).sum() / mask.sum(), bool(scene.difficult[order])))
    assert sum(difficult for _, difficult in seen) >= 5
    assert all(share < HARD + 0.05 for share, difficult in seen if difficult)
    assert all(share > HARD - 0.12 for share, difficult in seen if not difficult)  # soft edges count as hidden here


def test_truncated_objects_are_those_that_the_border_cuts():
    scenes = [draw_scene(2, index, objects=(1, 1), scale=(0.4, 0.4), size=(100, 130)) for index in range(150)]
    touches = np.array([(s.boxes[0] == (0, 0, 130, 100)).any() for s in scenes])
    sides = np.array([np.max(s.boxes[0, 2:] - s.boxes[0, :2]) for s in scenes])
    truncated = np.array([s.truncated[0] for s in scenes])
    assert 10 <= truncated.sum() <= 50
    assert touches[truncated].all()
    # Whole, the longer side is what `scale` says; a cut can only shorten it.
    assert (np.abs(sides[~truncated] - 40) <= 1).all()
    assert sides[truncated].mean() < 38


# --------------------------------------------------------------------------------------------------- classes


def test_there_are_twenty_odd_classes():
    assert 20 <= len(CLASSES) == len(set(CLASSES)) <= 24


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("size", [(32, 32), (33, 57), (120, 64), (240, 320)])
def test_every_class_can_be_drawn_at_every_size(name: str, size: tuple[int, int]):
    for least in (TINIEST / min(size), 0.5, 1.0):
        scene = draw_scene(0, 1, classes=(name,), objects=(1, 1), size=size, scale=(least, least))
        assert scene.labels.tolist() == [0]


def test_shapes_differ_in_their_outlines():
    """At 40 pixels and with the same turn, no two classes cover nearly the same part of their boxes."""
    before = draw_scene(0, 0, objects=(0, 0), size=(80, 80)).image
    outlines = {}
    for name in CLASSES:
        scene = draw_scene(0, 0, classes=(name,), objects=(1, 1), size=(80, 80), scale=(0.5, 0.5))
        assert not scene.truncated.any()
        x1, y1, x2, y2 = scene.boxes[0].astype(int)
        mask = (scene.image != before).any(axis=2)[y1:y2, x1:x2].astype(np.uint8)
        outlines[name] = cv2.resize(mask, (64, 64), interpolation=cv2.INTER_NEAREST) > 0
    for one, other in itertools.combinations(CLASSES, 2):
        overlap = (outlines[one] & outlines[other]).sum() / (outlines[one] | outlines[other]).sum()
        assert overlap < 0.9, (one, other, overlap)


def test_objects_stand_out_from_the_background():
    medians = []
    for index in range(80):
        without, scene = (draw_scene(5, index, objects=(n, n), size=(96, 96)) for n in (0, 1))
        gap = np.abs(scene.image.astype(int) - without.image).max(axis=2)
        medians.append(np.median(gap[gap > 0]))
    assert np.mean(np.array(medians) > 40) > 0.95


def test_labels_are_places_in_the_classes_that_were_asked_for():
    few = ("star", "circle")
    labels = np.concatenate([draw_scene(0, index, classes=few, size=(64, 64)).labels for index in range(20)])
    assert set(labels.tolist()) == {0, 1}


# --------------------------------------------------------------------------------------------------- writing


def annotations(folder: Path) -> dict[str, ET.Element]:
    return {path.stem: ET.parse(path).getroot() for path in sorted(folder.glob("*/labels/*.xml"))}


def number(node: ET.Element, path: str) -> int:
    return int(node.findtext(path, "missing"))


def voc_box(thing: ET.Element) -> list[int]:
    xmin, ymin, xmax, ymax = (number(thing, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
    return [xmin - 1, ymin - 1, xmax, ymax]


def test_what_is_written_is_what_was_drawn(tmp_path: Path):
    folder = tmp_path / "new" / "final_xml_dataset"
    drawn = {"size": (96, 128), "objects": (2, 6), "classes": CLASSES[3:9]}
    synthesize(folder, train=24, valid=8, seed=9, negatives=0, **drawn)
    assert len(annotations(folder)) == 32
    for stem, root in annotations(folder).items():
        split, index = stem.split("_")
        scene = draw_scene(9, int(index), split=split, **drawn)
        assert root.findtext("filename") == f"{stem}.jpg"
        assert [number(root, f"size/{key}") for key in ("height", "width", "depth")] == [96, 128, 3]
        things = root.findall("object")
        assert [voc_box(thing) for thing in things] == scene.boxes.tolist()
        assert [thing.findtext("name") for thing in things] == [drawn["classes"][i] for i in scene.labels]
        assert [number(thing, "difficult") for thing in things] == scene.difficult.tolist()
        assert [number(thing, "truncated") for thing in things] == scene.truncated.tolist()
        image = cv2.imread(str(folder / split / "images" / f"{stem}.jpg"))[..., ::-1]
        assert np.abs(image.astype(int) - scene.image).mean() < 8  # JPEG's loss; swapped channels make 30 and more


def test_the_folder_is_laid_out_as_the_article_has_it(tmp_path: Path):
    data = synthesize(tmp_path / "d", train=2, valid=1, size=(32, 32))
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "d/data.yaml",
        *(f"d/train/images/train_0000{i}.jpg" for i in (0, 1)),
        *(f"d/train/labels/train_0000{i}.xml" for i in (0, 1)),
        "d/valid/images/valid_00000.jpg",
        "d/valid/labels/valid_00000.xml",
    ]
    assert yaml.safe_load(data.read_text(encoding="utf-8")) == {
        "TRAIN_DIR_IMAGES": "train/images",
        "TRAIN_DIR_LABELS": "train/labels",
        "VALID_DIR_IMAGES": "valid/images",
        "VALID_DIR_LABELS": "valid/labels",
        "CLASSES": list(CLASSES),
        "NC": len(CLASSES),
    }


def test_a_picture_does_not_depend_on_how_many_are_drawn(tmp_path: Path):
    for name, count in (("few", 2), ("many", 5)):
        synthesize(tmp_path / name, train=count, valid=count, size=(48, 64), jitter=0.3, negatives=0.4)
    for few in (path for path in (tmp_path / "few").rglob("*") if path.is_file()):
        assert few.read_bytes() == (tmp_path / "many" / few.relative_to(tmp_path / "few")).read_bytes()


@pytest.mark.parametrize(("fraction", "empty"), [(0.0, 0), (0.25, 3), (0.5, 6), (1.0, 12)])
def test_a_fraction_of_the_pictures_has_no_objects(tmp_path: Path, fraction: float, empty: int):
    synthesize(tmp_path / "d", train=8, valid=4, size=(32, 32), negatives=fraction)
    assert sum(root.find("object") is None for root in annotations(tmp_path / "d").values()) == empty


def test_jitter_varies_the_size_of_the_pictures(tmp_path: Path):
    synthesize(tmp_path / "d", train=8, valid=4, size=(48, 64), jitter=0.25)
    sizes = {
        stem: (number(root, "size/height"), number(root, "size/width"))
        for stem, root in annotations(tmp_path / "d").items()
    }
    assert len(set(sizes.values())) > 6
    assert all(36 <= height <= 60 and 48 <= width <= 80 for height, width in sizes.values())
    for path in (tmp_path / "d").glob("*/images/*.jpg"):
        assert cv2.imread(str(path)).shape[:2] == sizes[path.stem]


def test_an_empty_folder_is_filled(tmp_path: Path):
    (tmp_path / "d").mkdir()
    assert synthesize(tmp_path / "d", train=1, valid=1, size=(32, 32)) == tmp_path / "d" / "data.yaml"
    assert (tmp_path / "d" / "data.yaml").is_file()


def test_what_is_there_is_left_alone(tmp_path: Path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("kept")
    for taken in (tmp_path / "d", tmp_path / "d" / "mine.txt"):
        with pytest.raises(UserError, match="already holds something; delete it or name another folder"):
            synthesize(taken, train=1, valid=1, size=(32, 32))
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "mine.txt"]
    assert (tmp_path / "d" / "mine.txt").read_text() == "kept"


def test_a_disk_that_refuses_is_left_as_it_was(tmp_path: Path):
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*d: .*make room"):
            synthesize(tmp_path / "d", train=3, valid=1)  # a picture of 240 x 320 takes more than 8 KiB
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        synthesize(tmp_path / "file" / "d", train=1, valid=1, size=(32, 32))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"classes": ("cicle",)}, "unknown class 'cicle'. Did you mean 'circle'"),
        ({"classes": ("zzzz",)}, "There are: circle, ring"),
        ({"classes": ()}, "classes must name at least one"),
        ({"classes": ("star", "star")}, "classes must differ"),
        ({"size": (31, 100)}, r"size must be .* 32 to 4096 pixels, not \(31, 100\)"),
        ({"size": (100000, 100)}, r"size must be .* 32 to 4096 pixels, not \(100000, 100\)"),
        ({"objects": (1, 10**12)}, "objects must be"),
        ({"size": (100,)}, "size must be"),
        ({"objects": (3, 2)}, "objects must be"),
        ({"objects": (-1, 2)}, "objects must be"),
        ({"scale": (0.0, 0.5)}, "scale must be"),
        ({"scale": (0.5, 1.5)}, "scale must be"),
        ({"scale": (0.01, 0.5)}, "too small to show; raise scale or size"),
        ({"seed": -1}, "seed must be"),
        ({"train": 0}, "train and valid must be"),
        ({"valid": -3}, "train and valid must be"),
        ({"negatives": 1.1}, "negatives must be"),
        ({"negatives": float("nan")}, "negatives must be"),
        ({"jitter": 1.0}, "jitter must be"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(tmp_path: Path, option: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        synthesize(tmp_path / "d", **option)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------------- clips


def test_a_clip_is_a_function_of_its_arguments():
    one, other, third = (np.stack(list(draw_clip(seed, frames=4, size=(64, 80)))) for seed in (1, 1, 2))
    assert one.shape == (4, 64, 80, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(one, other)
    assert (one != third).mean() > 0.5


@pytest.mark.parametrize("seed", range(6))
def test_an_object_drifts_whole_over_a_background_that_stands_still(seed: int):
    ground = next(draw_clip(seed, frames=1, objects=0))
    masks = [(frame != ground).any(axis=2) for frame in draw_clip(seed, frames=60, objects=1)]
    centres = np.array([np.argwhere(mask).mean(axis=0) for mask in masks])
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    assert steps.min() > 0.5
    assert steps.max() < 0.05 * 240
    assert np.linalg.norm(centres - centres[0], axis=1).max() > 30
    areas = np.array([mask.sum() for mask in masks])
    assert areas.min() > 0.85 * areas.max()  # the border throws it back


def test_a_clip_has_as_many_objects_as_asked_for():
    ground = next(draw_clip(0, frames=1, objects=0)).astype(int)
    changed = [
        (np.abs(next(draw_clip(0, frames=1, objects=count)) - ground).max(axis=2) > 0).sum() for count in range(5)
    ]
    assert changed == sorted(set(changed))


def test_a_wrong_clip_is_refused_before_its_first_frame():
    with pytest.raises(UserError, match="frames must be"):
        draw_clip(0, frames=0)
    with pytest.raises(UserError, match="Did you mean 'heart'"):
        draw_clip(0, classes=("hart",))

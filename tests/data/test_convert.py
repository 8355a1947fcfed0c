"""A dataset in any format, written in any other, reads the same; losses are said; a result is whole or not there."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from boxwright.__main__ import main
from boxwright.data import convert as module
from boxwright.data.convert import Converted, convert_dataset
from boxwright.data.dataset import Dataset, open_dataset
from boxwright.data.formats import FORMATS
from boxwright.data.formats.base import FormatName, class_name, is_class_name
from boxwright.data.formats.written import MARKS, WRITERS
from boxwright.data.layout import SplitName
from boxwright.data.shards import shard
from boxwright.folders import held
from boxwright.types import Record, UserError

NAMES: tuple[FormatName, ...] = tuple(WRITERS)
Thing = tuple[str, Sequence[float], Mapping[str, Any]]  # class, x1 y1 x2 y2, marks
Pictures = Mapping[str, tuple[tuple[int, int], Sequence[Thing]]]  # (height, width), objects, by the picture's path


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for a disk that others write to."""
    monkeypatch.setattr(os, "sync", lambda: None, raising=False)


# --- a source, written by hand as COCO's json


def write_source(folder: Path, splits: Mapping[str, Pictures], classes: Sequence[str]) -> Path:
    """A COCO json and a folder of pictures for each split, and a data.yaml."""
    keys: dict[str, Any] = {"format": "coco", "images": {}, "classes": list(classes)}
    shade = 0
    for split, pictures in splits.items():
        images: list[Any] = []
        annotations: list[Any] = []
        for name, ((height, width), things) in pictures.items():
            path = folder / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shade += 1  # every picture has bytes of its own
            Image.new("L", (width, height), shade).save(path, "JPEG" if path.suffix == ".dat" else None)
            images.append({"id": shade, "file_name": name, "width": width, "height": height})
            for label, (x1, y1, x2, y2), marks in things:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": shade,
                        "category_id": classes.index(label) + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "attributes": dict(marks),
                    }
                )
        categories = [{"id": number, "name": name} for number, name in enumerate(classes, 1)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{split}.json").write_text(json.dumps(document), "utf-8")
        keys[split] = f"{split}.json"
        keys["images"][split] = split
    (folder / "source.yaml").write_text(yaml.safe_dump(keys, allow_unicode=True), "utf-8")
    return folder / "source.yaml"


ALL_MARKS = {"difficult": True, "truncated": True, "crowd": True, "occluded": True, "pose": "Left & <Rear>"}
SPLITS: dict[str, Pictures] = {
    "train": {
        "a.jpg": ((64, 100), [("dog", (8.1, 16, 72.7, 48.3), {}), ("cat", (0, 0, 100, 64), {"truncated": True})]),
        "b.png": ((33, 64), []),
        "sub/c d.JPG": ((64, 33), [("dog", (1.5, 2.25, 30, 31.1), ALL_MARKS), ("zebra", (3, 3, 9, 9), {"pose": "Ä"})]),
    },
    "val": {
        "a.jpg": ((64, 64), [("cat", (1e-6, 20, 30, 40), {"occluded": True}), ("dog", (10, 20, 30, 41), {"crowd": 1})]),
        "é.png": ((64, 64), []),
    },
}
CLASSES = ("zebra", "dog", "unused", "cat")  # in an order of their own


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return write_source(tmp_path / "source", SPLITS, CLASSES)


def content(record: Record) -> str:
    return hashlib.sha256(Path(os.fspath(record.image)).read_bytes()).hexdigest()


def records_of(dataset: Dataset, split: SplitName) -> dict[str, Record]:
    """A split's records by what is in their pictures."""
    read = dataset.read(split)
    assert read.faults == ()
    found = {content(record): record for record in read.records}
    assert len(found) == len(read.records)
    return found


def assert_same(found: Dataset, wanted: Dataset, *, marks: Sequence[str] = MARKS, slack: float = 0) -> None:
    """Two datasets say the same, whatever their pictures are called."""
    assert found.classes == wanted.classes
    assert found.splits == wanted.splits
    for split in wanted.splits:
        ours, theirs = records_of(found, split), records_of(wanted, split)
        assert ours.keys() == theirs.keys()
        for key, record in theirs.items():
            assert ours[key].size == record.size
            for field in ("labels", *marks):
                assert np.array_equal(getattr(ours[key], field), getattr(record, field)), (record.id, field)
            np.testing.assert_allclose(ours[key].boxes, record.boxes, rtol=0, atol=slack)


def converted(data: Path, folder: Path, to: FormatName, **options: Any) -> Converted:
    if to == "yolo":
        options = {"difficult": "keep", **options}
    return convert_dataset(data, folder, to=to, **options)


def held_by(*names: FormatName) -> tuple[str, ...]:
    """The marks that are left after a way through formats."""
    return tuple(mark for mark in MARKS if all(mark in WRITERS[name].marks for name in names))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        converted(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the same records


@pytest.mark.parametrize("to", NAMES)
def test_a_folder_and_its_data_yaml_open_and_say_the_same(to: FormatName, source: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    done = converted(source, tmp_path / "made", to)
    wanted = open_dataset(source)
    for data in (tmp_path / "made", done.data):
        found = open_dataset(data)
        assert_same(found, wanted, marks=held_by(to))
        assert {record.id for record in found.read("val").records} == {"a", "é"}
        third = "sub/c d" if WRITERS[to].nested else "sub_c d"
        assert {record.id for record in found.read("train").records} == {"a", "b", third}
    assert done.pictures == {"train": 3, "val": 2}
    assert done.objects == {"train": 4, "val": 2}
    assert done.format == to
    assert done.faults == ()
    assert {name: data for name, data in tree(tmp_path).items() if not name.startswith("made")} == before
    assert not (tmp_path / "made.partial").exists()


@pytest.mark.parametrize("to", NAMES)
def test_the_folder_is_recognised_and_it_is_said(to: FormatName, source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "made", to)
    notes = "\n".join(open_dataset(tmp_path / "made").notes)
    assert f"{FORMATS[to].title}: " in notes or to == "voc"
    assert "data.yaml" in notes


ODD = st.text(st.sampled_from("ab Zé.,;:'\"&<>#%[]{}|\\/-_!?*@=~`^$()0159日\u2028\xa0🦒"), min_size=1, max_size=6)
PLACES = [
    "a", "b c", "é", "100%", "x[1]", "sub/a", "sub/deep/b", "a.b", "x,y", 'q"o', "it's", "se;mi", "images/k", "#1", "-",
    "<&>", "labels/images/z", "train/a", "no.jpg",
]  # fmt: skip


@st.composite
def boxes(draw: st.DrawFn, size: tuple[int, int]) -> tuple[float, ...]:
    """x1 y1 x2 y2 as float32 holds them, sides of more than a pixel, inside the picture."""
    edges: list[tuple[float, float]] = []
    for side in (size[1], size[0]):
        low = draw(st.one_of(st.just(0.0), st.floats(0, side - 2, width=32)))
        high = draw(st.one_of(st.just(float(side)), st.floats(float(np.float32(low + 1.001)), side, width=32)))
        edges.append((low, high))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


@st.composite
def datasets(draw: st.DrawFn) -> tuple[dict[str, Pictures], list[str]]:
    names = draw(st.lists(ODD.map(class_name).filter(is_class_name), min_size=1, max_size=4, unique=True))
    flags = st.fixed_dictionaries(
        {mark: st.booleans() for mark in MARKS if mark != "pose"} | {"pose": ODD | st.just("")}
    )
    places = draw(st.lists(st.sampled_from(PLACES), min_size=2, max_size=6, unique=True))
    splits: dict[str, dict[str, Any]] = {"train": {}, "val": {}}
    for number, place in enumerate(places):
        size = draw(st.sampled_from([(64, 48), (33, 100), (1500, 2001), (9, 8)]))
        things: dict[Any, Thing] = {}
        for _ in range(draw(st.integers(0, 3))):
            label, box = draw(st.sampled_from(names)), draw(boxes(size))
            things[label, tuple(round(edge, 4) for edge in box)] = (label, box, draw(flags))
        if number == 0:  # something to learn
            things[0] = (names[0], (0, 0, 7.5, 7.5), {})
        splits["val" if number % 2 else "train"][f"{place}.png"] = (size, list(things.values()))
    return splits, names  # type: ignore[return-value]


@pytest.mark.parametrize("first", NAMES)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(drawn=datasets())
def test_every_pair_of_formats_says_the_same(
    first: FormatName, drawn: tuple[dict[str, Pictures], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("pair")
    data = write_source(folder, *drawn)
    wanted = open_dataset(data)
    assert wanted.classes == tuple(drawn[1])
    for split, pictures in drawn[0].items():
        told = {len(record.labels): record for record in records_of(wanted, split).values()}  # type: ignore[arg-type]
        for _, things in pictures.values():
            if len(told) == len(pictures):  # the numbers of objects tell the pictures apart
                boxes = np.array([box for _, box, _ in things], np.float32).reshape(-1, 4)
                assert np.array_equal(told[len(things)].boxes, boxes)
    converted(data, folder / "first", first)
    assert_same(open_dataset(folder / "first"), wanted, marks=held_by(first), slack=WRITERS[first].slack)
    for second in NAMES:
        converted(folder / "first", folder / second, second)
        assert_same(
            open_dataset(folder / second), wanted, marks=held_by(first, second),
            slack=WRITERS[first].slack + WRITERS[second].slack,
        )  # fmt: skip
    shutil.rmtree(folder)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), width=st.integers(8, 60_000))
def test_edges_survive_yolo_and_voc_to_the_bit(data: st.DataObject, width: int) -> None:
    """From 2**-27 of the picture's width on, as docs/guides/convert.md says."""
    low = data.draw(st.one_of(st.just(0.0), st.floats(max(width, 1) * 2**-27, width - 2, width=32)))
    high = data.draw(st.floats(float(np.float32(low + 1.001)), width, width=32))
    centre, side = (low + high) / 2 / width, (high - low) / width
    centre, side = float(repr(centre)), float(repr(side))
    found = np.array([(centre - side / 2) * width, min((centre + side / 2) * width, width)], np.float32)
    assert found.tolist() == [low, high]
    assert np.float32(float(repr(low + 1)) - 1) == np.float32(low)


# --- what other tools read


def test_pycocotools_reads_the_coco_json(source: Path, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    converted(source, tmp_path / "made", "coco")
    with redirect_stdout(StringIO()):
        train = coco.COCO(tmp_path / "made/annotations/instances_train.json")
    assert [entry["name"] for entry in train.loadCats(train.getCatIds())] == list(CLASSES)
    assert train.getCatIds() == [1, 2, 3, 4]
    images = train.loadImgs(train.getImgIds())
    assert [image["file_name"] for image in images] == ["a.jpg", "b.png", "sub/c d.JPG"]
    for image in images:
        with Image.open(tmp_path / "made/train" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
    found = train.loadAnns(train.getAnnIds(imgIds=[3]))
    assert [entry["iscrowd"] for entry in found] == [1, 0]
    assert found[0] | {"id": 0} == {
        "id": 0, "image_id": 3, "category_id": 2, "bbox": [1.5, 2.25, 28.5, float(np.float32(31.1)) - 2.25],
        "area": 28.5 * (float(np.float32(31.1)) - 2.25), "iscrowd": 1, "segmentation": [], "difficult": 1, "ignore": 1,
        "truncated": 1, "occluded": 1, "pose": "Left & <Rear>",
    }  # fmt: skip


def test_an_xml_parser_reads_the_voc(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "made", "voc")
    root = ElementTree.parse(tmp_path / "made/train/labels/sub_c d.xml").getroot()
    assert root.findtext("filename") == "sub_c d.JPG"
    assert [root.findtext(f"size/{side}") for side in ("width", "height")] == ["33", "64"]
    first = root.findall("object")[0]
    said = {child.tag: child.text for child in first if child.tag != "bndbox"}
    ones = dict.fromkeys(("truncated", "occluded", "crowd", "difficult"), "1")
    assert said == {"name": "dog", "pose": "Left & <Rear>", **ones}
    assert [float(first.findtext(f"bndbox/{edge}") or 0) for edge in ("xmin", "ymin", "xmax", "ymax")] == [
        2.5, 3.25, 30, float(np.float32(31.1)),
    ]  # fmt: skip


def test_yolo_as_its_tools_expect_it(source: Path, tmp_path: Path) -> None:
    done = converted(source, tmp_path / "made", "yolo")
    said = yaml.safe_load(done.data.read_text("utf-8"))
    assert said == {
        "train": "images/train", "val": "images/val", "nc": 4, "names": dict(enumerate(CLASSES)),
    }  # fmt: skip
    for picture in (tmp_path / "made/images").rglob("*.*"):
        label = Path(str(picture).replace("/images/", "/labels/")).with_suffix(".txt")
        for line in label.read_text("ascii").splitlines():
            number, *fractions = line.split()
            assert int(number) < 4
            assert len(fractions) == 4
            assert all(0 <= float(fraction) <= 1 for fraction in fractions)


def test_csv_and_labelme_as_their_tools_expect_them(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "csv", "csv")
    with (tmp_path / "csv/train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["filename"], row["class"], row["xmin"], row["difficult"]) for row in rows][1:4] == [
        ("a.jpg", "cat", "0", "0"), ("b.png", "", "", ""), ("sub/c d.JPG", "dog", "1.5", "1"),
    ]  # fmt: skip
    converted(source, tmp_path / "labelme", "labelme")
    document = json.loads((tmp_path / "labelme/train/sub_c d.json").read_text("utf-8"))
    assert (document["imagePath"], document["imageData"], document["imageHeight"]) == ("sub_c d.JPG", None, 64)
    first = document["shapes"][0]
    assert (first["label"], first["shape_type"], first["points"][0]) == ("dog", "rectangle", [1.5, 2.25])
    assert first["flags"] == {"difficult": True, "truncated": True, "crowd": True, "occluded": True}


# --- what is lost


def test_what_yolo_loses_is_counted_and_said_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    said: list[str] = []
    message = refusal(source, tmp_path / "made", "yolo", difficult=None, say=said.append)
    lost = (
        "YOLO cannot hold: difficult (1 objects), truncated (2 objects), crowd (2 objects), occluded (2 objects), "
        "pose (2 objects)"
    )
    assert message.startswith(lost)
    assert "--difficult drop" in message
    assert "--difficult keep" in message
    assert not list(tmp_path.glob("made*"))
    kept = converted(source, tmp_path / "kept", "yolo", difficult="keep", say=said.append)
    assert kept.objects == {"train": 4, "val": 2}
    assert kept.lost == (lost, "objects marked difficult and crowd are ordinary objects there")
    assert set(kept.lost) <= set(said)
    dropped = converted(source, tmp_path / "dropped", "yolo", difficult="drop")
    assert dropped.objects == {"train": 3, "val": 1}
    assert "left out" in dropped.lost[1]
    assert dropped.pictures == kept.pictures


def test_marks_that_do_not_decide_need_no_choice(tmp_path: Path) -> None:
    splits: dict[str, Pictures] = {
        name: {f"{name}.png": ((64, 64), [("cat", (1, 1, 9, 9), {"pose": "Left"})])} for name in ("train", "val")
    }
    data = write_source(tmp_path, splits, ["cat"])
    assert convert_dataset(data, tmp_path / "made", to="yolo").lost == ("YOLO cannot hold: pose (2 objects)",)
    assert convert_dataset(data, tmp_path / "voc", to="voc").lost == ()
    with pytest.raises(UserError, match="--difficult drop: Pascal VOC can hold all marks"):
        convert_dataset(data, tmp_path / "other", to="voc", difficult="drop")


def test_what_cannot_be_read_is_told_and_not_made_up(source: Path, tmp_path: Path) -> None:
    document = json.loads((source.parent / "train.json").read_text("utf-8"))
    document["annotations"][0]["bbox"] = [8, 8, 0, 4]
    document["annotations"][1]["bbox"] = [-9, 0, 40, 30]
    (source.parent / "train.json").write_text(json.dumps(document), "utf-8")
    said: list[str] = []
    done = converted(source, tmp_path / "made", "voc", say=said.append)
    assert done.objects["train"] == 3
    assert [fault.action for fault in done.faults] == ["dropped box", "repaired"]
    assert any(line.startswith("1 objects left out: ") and "has no area" in line for line in said)
    assert any(line.startswith("1 repairs: ") for line in said)
    document["annotations"][0]["bbox"] = [8, 8, -3, 4]
    (source.parent / "train.json").write_text(json.dumps(document), "utf-8")
    assert "--skip-bad" in refusal(source, tmp_path / "other", "voc")
    assert converted(source, tmp_path / "other", "voc", skip_bad=True).objects["train"] == 3


def test_read_again_a_folder_that_says_something_else_gets_no_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(folder: Path, split: str, named: Sequence[Any], classes: Sequence[str]) -> Iterator[str]:
        fewer = [one._replace(record=replace(one.record, truncated=one.record.truncated & False)) for one in named]
        yield from WRITERS["voc"].write(folder, split, fewer, classes)

    monkeypatch.setattr(module, "WRITERS", {**WRITERS, "voc": replace(WRITERS["voc"], write=lossy)})
    assert "read again, truncated of a.jpg differ" in refusal(source, tmp_path / "made", "voc")
    assert not (tmp_path / "made").exists()


# --- pictures


@pytest.mark.parametrize("copy", [False, True])
def test_pictures_are_links_or_copies_of_the_same_bytes(source: Path, tmp_path: Path, *, copy: bool) -> None:
    said: list[str] = []
    done = converted(source, tmp_path / "made", "coco", copy=copy, say=said.append)
    mine, theirs = tmp_path / "made/train/a.jpg", source.parent / "train/a.jpg"
    assert mine.read_bytes() == theirs.read_bytes()
    assert mine.samefile(theirs) != copy
    assert (done.linked, done.written) == ((0, 5) if copy else (5, 0))
    assert any("hard links" in line for line in said) != copy
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "made").rglob("*.json"))


def test_a_picture_behind_a_link_is_put_there_itself(source: Path, tmp_path: Path) -> None:
    picture = source.parent / "train/a.jpg"
    picture.rename(tmp_path / "elsewhere.jpg")
    picture.symlink_to(tmp_path / "elsewhere.jpg")
    converted(source, tmp_path / "made", "yolo")
    made = tmp_path / "made/images/train/a.jpg"
    assert not made.is_symlink()
    assert made.read_bytes() == (tmp_path / "elsewhere.jpg").read_bytes()


@pytest.mark.parametrize("to", NAMES)
def test_exif_stays_and_sizes_are_as_shown(to: FormatName, source: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = source.parent / "train/a.jpg"
    Image.new("L", (64, 100), 1).save(path, exif=exif)  # shown as 100x64, as the json says
    stored = path.read_bytes()
    converted(source, tmp_path / "made", to)
    record = next(record for record in open_dataset(tmp_path / "made").read("train").records if record.id == "a")
    assert record.size == (64, 100)
    assert Path(os.fspath(record.image)).read_bytes() == stored
    assert_same(open_dataset(tmp_path / "made"), open_dataset(source), marks=held_by(to))


CLASHING = {
    "a/b.png": "a/b", "a_b.png": "a_b", "a_b_2.png": "a_b_2", "A.png": "A", "a.png": "a_2", "x.jpg.png": "x.jpg",
    "x.png": "x", "deep/images/y.png": "deep/images/y", "deep/labels/y.png": "deep/labels/y", "p.dat": "p.dat",
    f"{'n' * 249}.png": "n" * 249, "back\\slash.png": "",
}  # fmt: skip


@pytest.mark.parametrize("to", NAMES)
def test_names_that_clash_or_mean_something_become_distinct(to: FormatName, tmp_path: Path) -> None:
    things: list[Thing] = [("cat", (1, 1, 9, 9), {})]
    pictures = {name: ((20, 20 + number), things) for number, name in enumerate(CLASHING) if "\\" not in name}
    data = write_source(tmp_path, {"train": pictures, "val": {"v.png": ((20, 20), things)}}, ["cat"])
    said: list[str] = []
    done = converted(data, tmp_path / "made", to, say=said.append)
    found = open_dataset(tmp_path / "made")
    assert_same(found, open_dataset(data))
    by_width = {record.size[1]: record.id for record in found.read("train").records}
    ids = {name: by_width[size[1]] for name, (size, _) in pictures.items()}
    for name in ("a_b.png", "a_b_2.png", "x.jpg.png", "x.png", "p.dat"):
        assert ids[name] == CLASHING[name]
    assert {ids["A.png"], ids["a.png"]} == {"A", "a_2"}
    assert len({name.casefold() for name in ids.values()}) == len(ids)
    assert len(ids[f"{'n' * 249}.png"].encode()) <= 240
    assert (ids["a/b.png"] == "a/b") == WRITERS[to].nested
    if to == "yolo":
        assert ids["deep/images/y.png"] == "deep/images_/y"
    assert done.renamed == {"coco": 2, "csv": 2, "yolo": 4}.get(to, 5)
    assert any(f"{done.renamed} pictures get other names for {FORMATS[to].title}" in line for line in said)


def test_one_stem_in_two_folders_of_a_voc_source(tmp_path: Path) -> None:
    for year in ("VOC2007", "VOC2012"):
        for name in ("1", "2"):
            for kind in ("JPEGImages", "Annotations"):
                (tmp_path / "devkit" / year / kind).mkdir(parents=True, exist_ok=True)
            Image.new("L", (30, 30), int(year[3:]) % 200 + int(name)).save(
                tmp_path / "devkit" / year / "JPEGImages" / f"{name}.jpg"
            )
            (tmp_path / "devkit" / year / "Annotations" / f"{name}.xml").write_text(
                "<annotation><object><name>cat</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax>"
                "</bndbox></object></annotation>"
            )
    converted(tmp_path / "devkit", tmp_path / "made", "coco")
    found = open_dataset(tmp_path / "made")
    assert_same(found, open_dataset(tmp_path / "devkit"))
    ids = {record.id for split in ("train", "val") for record in found.read(split).records}  # type: ignore[arg-type]
    assert ids == {"VOC2007_1", "VOC2007_2", "VOC2012_1", "VOC2012_2"}


@pytest.mark.parametrize("to", NAMES)
def test_pictures_without_objects_are_kept_however_many_come_first(to: FormatName, tmp_path: Path) -> None:
    empty: dict[str, Any] = {f"{number:03}.png": ((20, 20 + number), []) for number in range(30)}
    some: dict[str, Any] = {"z.png": ((20, 20), [("cat", (1, 1, 9, 9), {})])}
    data = write_source(tmp_path, {"train": empty | some, "val": {"v.png": ((9, 9), [])}}, ["cat"])
    converted(data, tmp_path / "made", to)
    for opened in (tmp_path / "made", tmp_path / "made/data.yaml"):
        assert_same(open_dataset(opened), open_dataset(data))


@pytest.mark.parametrize("to", NAMES)
def test_a_folder_called_like_a_split_is_not_mistaken_for_it(to: FormatName, tmp_path: Path) -> None:
    things: list[Thing] = [("cat", (1, 1, 9, 9), {})]
    splits: dict[str, Pictures] = {
        "train": {"a.png": ((20, 20), things)},
        "val": {"train/a.png": ((20, 20), things), "deep/train/a.png": ((20, 20), things)},
    }
    data = write_source(tmp_path, splits, ["cat"])
    converted(data, tmp_path / "made", to)
    for opened in (tmp_path / "made", tmp_path / "made/data.yaml"):
        assert_same(open_dataset(opened), open_dataset(data))


def test_a_gif_goes_only_where_it_is_found(tmp_path: Path) -> None:
    things: list[Thing] = [("cat", (1, 1, 9, 9), {})]
    data = write_source(
        tmp_path, {"train": {"g.gif": ((20, 20), things)}, "val": {"v.png": ((20, 20), things)}}, ["cat"]
    )
    for to in NAMES:
        if to in ("coco", "csv"):
            converted(data, tmp_path / to, to)
            assert_same(open_dataset(tmp_path / to), open_dataset(data))
        else:
            assert "g.gif is a GIF" in refusal(data, tmp_path / to, to)


# --- splits


@pytest.mark.parametrize("to", NAMES)
def test_a_test_split_is_kept(to: FormatName, tmp_path: Path) -> None:
    splits = {
        name: {f"{name}.png": ((20, 20), [("cat", (1, 1, 9, 9), {})])} for name in ("train", "val", "test")
    }  # fmt: skip
    data = write_source(tmp_path, splits, ["cat"])  # type: ignore[arg-type]
    converted(data, tmp_path / "made", to)
    for opened in (tmp_path / "made", tmp_path / "made/data.yaml"):
        assert_same(open_dataset(opened), open_dataset(data))
    fewer = converted(data, tmp_path / "fewer", to, splits=("val", "train"))
    assert list(fewer.pictures) == ["train", "val"]
    assert open_dataset(tmp_path / "fewer").splits == ("train", "val")


def test_splits_that_are_asked_for(source: Path, tmp_path: Path) -> None:
    assert "has train, val" in refusal(source, tmp_path / "made", "voc", splits=["test"])
    assert "must name train" in refusal(source, tmp_path / "made", "voc", splits=["val"])
    for to in NAMES:  # another validation split is drawn from the one that is there
        assert converted(source, tmp_path / to, to, splits=["train"]).pictures == {"train": 3}
        found = open_dataset(tmp_path / to)
        assert sum(len(found.read(split).records) for split in found.splits) == 3


def test_a_test_split_that_is_the_validation_is_not_written_twice(source: Path, tmp_path: Path) -> None:
    keys = yaml.safe_load(source.read_text("utf-8"))
    keys |= {"test": "val.json", "images": keys["images"] | {"test": "val"}}
    source.write_text(yaml.safe_dump(keys), "utf-8")
    said: list[str] = []
    assert list(converted(source, tmp_path / "made", "csv", say=said.append).pictures) == ["train", "val"]
    assert any("test is the same as val" in line for line in said)
    asked = converted(source, tmp_path / "asked", "csv", splits=["train", "val", "test"])
    assert list(asked.pictures) == ["train", "val", "test"]


# --- whole or absent


def test_a_folder_that_is_there_is_refused_but_an_empty_one_taken(source: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    converted(source, tmp_path / "made", "voc")
    before = tree(tmp_path)
    assert "is there already" in refusal(source, tmp_path / "made", "voc")
    (tmp_path / "file").write_bytes(b"")
    assert "is there already" in refusal(source, tmp_path / "file", "voc")
    assert tree(tmp_path) == {**before, "file": b""}


def test_a_folder_inside_the_source_is_refused(source: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    for inside in ("train/made", "val/made", "train/../train/made"):
        assert "is inside the source" in refusal(source, source.parent / inside, "voc")
    (tmp_path / "link").symlink_to(source.parent / "train")
    assert "is inside the source" in refusal(source, tmp_path / "link" / "made", "voc")
    assert tree(tmp_path) == before
    converted(source, source.parent / "beside", "voc")  # beside its folders nothing of it lies
    assert "is inside the source" in refusal(source.parent / "beside", source.parent / "beside" / "made", "coco")


def test_a_partial_folder_of_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    partial = tmp_path / "made.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_bytes(b"years of work")
    assert "holds something else" in refusal(source, tmp_path / "made", "voc")
    assert tree(partial) == {"thesis.txt": b"years of work"}
    (partial / "thesis.txt").unlink()
    with held(partial):
        assert "another process" in refusal(source, tmp_path / "made", "voc")
    converted(source, tmp_path / "made", "voc")
    (tmp_path / "made").rename(partial)
    assert "another conversion" in refusal(source, tmp_path / "made", "coco")


def test_a_full_disk_is_told_before_it_is_full(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    assert "no room" in refusal(source, tmp_path / "made", "voc")
    assert list(tmp_path.iterdir()) == [tmp_path / "source"]
    with monkeypatch.context() as patch:  # the annotations have room, and then the copies of the pictures have none
        patch.setattr(module, "require_room", lambda *_: None)
        for folder in ("made", "new/made"):
            assert "no room" in refusal(source, tmp_path / folder, "voc", copy=True)
            assert list(tmp_path.iterdir()) == [tmp_path / "source"]
        (tmp_path / "made.partial" / "train").mkdir(parents=True)  # not of this call
        assert "no room" in refusal(source, tmp_path / "made", "voc", copy=True)
        assert list((tmp_path / "made.partial").rglob("*")) == [tmp_path / "made.partial" / "train"]


def test_a_source_that_the_folder_would_grow_in_stays_as_it_is(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    converted(source, tmp_path / "s.partial", "voc")
    source.parent.rename(tmp_path / "t.partial")
    before = sorted(tmp_path.rglob("*"))
    for data, folder in (("s.partial", "s"), ("s.partial/data.yaml", "s"), ("t.partial/source.yaml", "t")):
        words = ["data", "convert", str(tmp_path / data), str(tmp_path / folder), "--to", "yolo"]
        assert main([*words, "--difficult", "drop"]) == 2
        assert "where the source is" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before


def test_a_partial_folder_of_something_else_gets_no_folders(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "made.partial", "voc")
    before = sorted(tmp_path.rglob("*"))
    assert "another conversion" in refusal(source, tmp_path / "made", "yolo")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("mark", [False, True])
def test_a_name_that_no_cell_holds_is_refused_for_csv_alone(tmp_path: Path, *, mark: bool) -> None:
    (tmp_path / "source").mkdir()
    long = "x" * 300_000
    things: list[Thing] = [("cat" if mark else long, (1, 1, 9, 9), {"pose": long} if mark else {})]
    splits: dict[str, Pictures] = {name: {f"{name}.png": ((20, 20), things)} for name in ("train", "val")}
    source = write_source(tmp_path / "source", splits, ["cat" if mark else long])
    said = refusal(source, tmp_path / "made", "csv")
    assert "has 300,000 letters; a cell of a CSV holds 131,072" in said
    assert len(said) < 400
    assert list(tmp_path.iterdir()) == [tmp_path / "source"]
    assert_same(open_dataset(converted(source, tmp_path / "made", "coco").data), open_dataset(source))


KILLED = """
import os, signal, sys
from pathlib import Path
from boxwright.data.convert import convert_dataset

left = int(sys.argv[1])

def hook(event, arguments):
    global left
    writes = event == "open" and ".partial/" in str(arguments[0]) and "w" in str(arguments[1])
    if event in ("os.link", "os.rename") or writes:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
convert_dataset(Path(sys.argv[2]), Path(sys.argv[3]), to=sys.argv[4], copy=sys.argv[5] == "copy", difficult=None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize(
    ("step", "to", "how"),
    [(1, "voc", "link"), (4, "voc", "link"), (10, "voc", "link"), (6, "coco", "copy"), (15, "csv", "copy")],
)
def test_after_a_kill_the_next_call_goes_on(step: int, to: FormatName, how: str, source: Path, tmp_path: Path) -> None:
    before = tree(source.parent)
    command = [sys.executable, "-c", KILLED, str(step), str(source), str(tmp_path / "made"), to, how]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "made").exists()
    assert (tmp_path / "made.partial").exists()
    converted(source, tmp_path / "made", to, copy=how == "copy")
    converted(source, tmp_path / "straight", to, copy=how == "copy")
    assert tree(tmp_path / "made") == tree(tmp_path / "straight")
    assert not (tmp_path / "made.partial").exists()
    assert tree(source.parent) == before


# --- from shards


@pytest.mark.parametrize("to", NAMES)
def test_pictures_come_out_of_shards_as_they_went_in(to: FormatName, source: Path, tmp_path: Path) -> None:
    original = open_dataset(source)
    shard(original, tmp_path / "shards", size=1 << 20, tolerance={}, say=lambda _: None)
    done = converted(tmp_path / "shards", tmp_path / "made", to)
    assert (done.linked, done.written) == (0, 5)
    assert_same(open_dataset(tmp_path / "made"), original, marks=held_by(to), slack=WRITERS[to].slack)
    assert "--to shards: there are voc" in refusal(source, tmp_path / "other", "shards")


# --- mistakes and the command line


def test_a_class_that_stands_for_none_is_refused(tmp_path: Path) -> None:
    things: list[Thing] = [("__background__", (1, 1, 9, 9), {}), ("cat", (1, 1, 9, 9), {})]
    splits: dict[str, Pictures] = {name: {f"{name}.png": ((20, 20), things)} for name in ("train", "val")}
    write_source(tmp_path, splits, ["cat", "__background__"])
    (tmp_path / "d.yaml").write_text("train: train.json\nval: val.json\nimages: {train: train, val: val}\n")
    assert "a class is called __background__" in refusal(tmp_path / "d.yaml", tmp_path / "made", "voc")


def test_a_data_yaml_of_another_kind_in_a_folder_is_said_and_not_used(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "made", "voc")
    (tmp_path / "made/data.yaml").write_text("something: else\n")
    dataset = open_dataset(tmp_path / "made")
    assert dataset.classes == ("cat", "dog", "zebra")
    assert any("not used" in note and "unknown key 'something'" in note for note in dataset.notes)
    (tmp_path / "made/data.yaml").unlink()
    assert not any("data.yaml" in note for note in open_dataset(tmp_path / "made").notes)


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "convert", str(source), str(tmp_path / "made"), "--to", "yolo"]
    assert main(words) == 2
    assert "--difficult drop" in capsys.readouterr().err
    assert main([*words, "--difficult", "drop", "--copy", "--json"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert result["pictures"] == {"train": 3, "val": 2}
    assert result["objects"] == {"train": 3, "val": 1}
    assert result["written"] == 5
    assert "YOLO cannot hold" in captured.err
    assert main(["data", "convert", str(source), str(tmp_path / "x"), "--to", "xml"]) == 2


# --- real data


def chain(data: Path, folder: Path, order: Sequence[FormatName]) -> list[Dataset]:
    """A dataset through formats, one after the other."""
    datasets = [open_dataset(data)]
    for number, to in enumerate(order):
        convert_dataset(data, folder / str(number), to=to, copy=True)
        data = folder / str(number)
        datasets.append(open_dataset(data))
    return datasets


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["bccd/BCCD", "raccoon", "voc_mini/VOCdevkit"])
def test_real_data_through_every_format_and_back(name: str, real_data: Path, tmp_path: Path) -> None:
    original, *others = chain(real_data / name, tmp_path, ["coco", "csv", "labelme", "voc", "coco", "voc"])
    for split in ("train", "val"):
        wanted = original.read(split)
        for other in others:
            found = other.read(split)
            assert other.fingerprint(found) == original.fingerprint(wanted)
            for mine, theirs in zip(found.records, wanted.records, strict=True):
                assert content(mine) == content(theirs)
                assert np.array_equal(mine.pose, theirs.pose)
                assert np.array_equal(mine.occluded, theirs.occluded)
    difficult = sum(
        int(record.difficult.sum()) for split in ("train", "val") for record in others[-1].read(split).records
    )  # type: ignore[arg-type]
    assert (difficult > 0) == (name == "voc_mini/VOCdevkit")


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["bccd/BCCD", "raccoon", "voc_mini/VOCdevkit"])
def test_real_boxes_through_yolo_to_the_bit(name: str, real_data: Path, tmp_path: Path) -> None:
    convert_dataset(
        real_data / name, tmp_path / "made", to="yolo", copy=True, difficult="keep" if "voc" in name else None
    )
    original, found = open_dataset(real_data / name), open_dataset(tmp_path / "made")
    assert found.classes == original.classes
    for split in ("train", "val"):
        for mine, theirs in zip(found.read(split).records, original.read(split).records, strict=True):
            assert (mine.id, mine.size) == (theirs.id, theirs.size)
            assert np.array_equal(mine.boxes, theirs.boxes)
            assert np.array_equal(mine.labels, theirs.labels)

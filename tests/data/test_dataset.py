"""Every layout is found, every mistake is named, and what is read is the same whenever it is read."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from boxwright.data.dataset import open_dataset
from boxwright.data.formats import voc
from boxwright.data.formats.voc import write_annotation
from boxwright.types import Record, UserError

CLASSES = ("cat", "dog")
SIZE = (24, 32)


def add(images: Path, stem: str, labels: Path | None = None, names: Iterable[str] = ("cat", "dog")) -> None:
    """A picture, and its XML in `labels` with one box of each class named."""
    images.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], (len(stem) * 9 % 256, 80, 90)).save(images / f"{stem}.jpg")
    folder = labels or images
    folder.mkdir(parents=True, exist_ok=True)
    names = list(names)
    none = np.zeros(len(names), np.bool_)
    boxes = np.array([[n, 1, n + 5, 9] for n in range(len(names))], np.float32).reshape(-1, 4)
    record = Record(stem, images / f"{stem}.jpg", SIZE, boxes, np.arange(len(names)), none, none)
    write_annotation(folder / f"{stem}.xml", record, names)


def add_many(folder: Path, count: int, labels: str = "labels") -> None:
    for number in range(count):
        add(folder / "images", f"{folder.name}{number:03}", folder / labels)


def add_year(devkit: Path, year: str, lists: dict[str, list[str]]) -> Path:
    folder = devkit / year
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for name, stems in lists.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            add(folder / "JPEGImages", stem, folder / "Annotations")
    return folder


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    folder = tmp_path / "final_xml_dataset"
    add_many(folder / "train", 4)
    add_many(folder / "valid", 2)
    return folder


ARTICLE = """\
TRAIN_DIR_IMAGES: final_xml_dataset/train/images
TRAIN_DIR_LABELS: final_xml_dataset/train/labels
VALID_DIR_IMAGES: final_xml_dataset/valid/images
VALID_DIR_LABELS: final_xml_dataset/valid/labels
CLASSES: [__background__, cat, dog]
NC: 3
SAVE_VALID_PREDICTION_IMAGES: True
"""


def yaml(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "data.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def ids(data: Path, split: str = "train") -> list[str]:
    return [record.id for record in open_dataset(data).read(split).records]  # type: ignore[arg-type]


# --- layouts


def test_prepared_folders(prepared: Path) -> None:
    dataset = open_dataset(str(prepared))
    train, val = dataset.read("train"), dataset.read("val")
    assert dataset.splits == ("train", "val")
    assert dataset.classes == CLASSES
    assert [record.id for record in train.records] == ["train000", "train001", "train002", "train003"]
    assert len(val.records) == 2
    assert train.faults == val.faults == ()
    record = train.records[0]
    assert record.size == SIZE
    assert record.boxes.tolist() == [[0, 1, 5, 9], [1, 1, 6, 9]]
    assert record.labels.tolist() == [0, 1]
    assert record.annotation == prepared / "train" / "labels" / "train000.xml"


@pytest.mark.parametrize("classes", ["[__background__, cat, dog]", "[cat, dog]"])
@pytest.mark.parametrize("count", ["NC: 3", "NC: 2", ""])
def test_the_article_yaml(classes: str, count: str, prepared: Path, tmp_path: Path) -> None:
    text = ARTICLE.replace("NC: 3", count).replace("[__background__, cat, dog]", classes)
    dataset = open_dataset(yaml(tmp_path, text))
    assert dataset.classes == CLASSES
    assert dataset.save_previews
    assert len(dataset.read("train").records) == 4
    assert len(dataset.read("val").records) == 2


@pytest.mark.parametrize(
    "text",
    [
        "path: final_xml_dataset\n",
        "path: final_xml_dataset\ntrain: train\nval: valid\n",
        "train: final_xml_dataset/train\nval: final_xml_dataset/valid/images\nformat: voc\n",
    ],
)
def test_the_short_yaml(text: str, prepared: Path, tmp_path: Path) -> None:
    path = yaml(tmp_path, text)
    assert ids(path) == ids(prepared)
    assert ids(path, "val") == ids(prepared, "val")
    assert open_dataset(path).classes == CLASSES


def test_paths_start_at_the_yaml_and_then_at_the_working_directory(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    path = yaml(tmp_path / "configs", ARTICLE)
    with pytest.raises(UserError) as caught:
        open_dataset(path)
    for folder in (tmp_path / "configs", Path.cwd()):
        assert str(folder / "final_xml_dataset" / "train" / "images") in str(caught.value)
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset(path).read("train").records) == 4


def test_a_devkit_of_two_years(tmp_path: Path) -> None:
    devkit = tmp_path / "VOCdevkit"
    add_year(devkit, "VOC2007", {"train": ["01"], "val": ["02"], "trainval": ["01", "02"], "test": ["03"]})
    add_year(devkit, "VOC2012", {"train": ["01"], "val": ["05"], "trainval": ["01", "05"]})
    for data in (devkit, tmp_path):
        assert ids(data) == ["VOC2007_01", "VOC2007_02", "VOC2012_01", "VOC2012_05"]
        assert ids(data, "val") == ids(data, "test") == ["VOC2007_03"]
    assert ids(devkit / "VOC2007") == ["01", "02"]
    assert (ids(devkit / "VOC2012"), ids(devkit / "VOC2012", "val")) == (["01"], ["05"])
    assert open_dataset(devkit).classes == voc.CLASSES


def test_years_with_different_lists_are_all_used(tmp_path: Path) -> None:
    add_year(tmp_path, "VOC2007", {"trainval": ["01", "02"], "test": ["03"]})
    add_year(tmp_path, "VOC2012", {"train": ["04"], "val": ["05"]})
    assert ids(tmp_path) == ["VOC2007_01", "VOC2007_02", "VOC2012_04", "VOC2012_05"]
    assert ids(tmp_path, "val") == ["VOC2007_03"]


@pytest.mark.parametrize("lists", [{"trainval": [f"{n:02}" for n in range(20)]}, {}])
def test_a_year_without_a_validation_list_is_split_by_hash(lists: dict[str, list[str]], tmp_path: Path) -> None:
    year = add_year(tmp_path, "VOC2007", lists)
    for number in range(20):
        add(year / "JPEGImages", f"{number:02}", year / "Annotations")
    assert sorted(ids(year) + ids(year, "val")) == [f"{number:02}" for number in range(20)]


def test_a_yaml_may_name_the_lists_of_a_devkit(tmp_path: Path) -> None:
    devkit = tmp_path / "VOCdevkit"
    add_year(devkit, "VOC2007", {"train": ["01"], "test": ["03"]})
    add_year(devkit, "VOC2012", {"train": ["01"]})
    lists = "train: [VOC2007/ImageSets/Main/train.txt, VOC2012/ImageSets/Main/train.txt]"
    path = yaml(tmp_path, f"path: VOCdevkit\n{lists}\nval: VOC2007/ImageSets/Main/test.txt\n")
    assert ids(path) == ["VOC2007_01", "VOC2012_01"]
    assert ids(path, "val") == ["03"]


def test_lists_are_read_in_all_their_dialects(tmp_path: Path) -> None:
    year = add_year(tmp_path, "VOC2007", {"train": ["a", "b", "c d", "e 1"], "val": ["f"]})
    listing = year / "ImageSets" / "Main" / "train.txt"
    listing.write_bytes(b"\xef\xbb\xbfa  1\r\n\r\nb.jpg\r\nJPEGImages/c d.JPG -1\r\ne 1\r\na -1\r\n")
    split = open_dataset(year).read("train")
    assert [record.id for record in split.records] == ["a", "b", "c d", "e 1"]
    assert [(fault.path, fault.line, fault.action) for fault in split.faults] == [(listing, 6, "repaired")]
    listing.write_text("a\nnone\nneither\n")
    with pytest.raises(UserError, match=r"train.txt lists 2 pictures that are not in .*: none; neither"):
        open_dataset(year).read("train")


@pytest.mark.parametrize("labels", ["annotations", ""])
def test_a_folder_without_splits_is_split_by_hash(labels: str, tmp_path: Path) -> None:
    stems = [f"picture {number}" for number in range(60)]
    for stem in stems:
        if labels:
            add(tmp_path / "images", stem, tmp_path / labels)
        else:
            add(tmp_path, stem)
    train, val = ids(tmp_path), ids(tmp_path, "val")
    assert sorted(train + val) == sorted(stems)
    assert 1 <= len(val) <= 15
    assert any("tenth" in note for note in open_dataset(tmp_path).notes)

    add(tmp_path / "images" if labels else tmp_path, "another", tmp_path / labels)
    grown = ids(tmp_path, "val")
    assert set(val) == set(grown) - {"another"}


def test_two_pictures_are_split_too(tmp_path: Path) -> None:
    for stem in ("a", "b"):
        add(tmp_path, stem)
    assert len(ids(tmp_path)) == len(ids(tmp_path, "val")) == 1


# --- reading


def test_reading_twice_gives_the_same_and_the_fingerprint_tells_differences(prepared: Path) -> None:
    def fingerprint() -> str:
        dataset = open_dataset(prepared)
        return dataset.fingerprint(dataset.read("train"))

    before = fingerprint()
    assert re.fullmatch("[0-9a-f]{16}", before)
    assert fingerprint() == before
    xml = prepared / "train" / "labels" / "train002.xml"
    xml.write_text(xml.read_text().replace("<xmin>1<", "<xmin>2<"))
    assert fingerprint() != before


def test_extensions_and_hidden_files(prepared: Path) -> None:
    images, labels = prepared / "train" / "images", prepared / "train" / "labels"
    for number, extension in enumerate([".JPEG", ".PNG", ".bmp", ".WebP", ".tif", ".TIFF"]):
        Image.new("RGB", SIZE[::-1]).save(images / f"new{number}{extension}")
        (labels / f"new{number}.XML").write_text("<annotation/>")
    for junk in (".hidden.jpg", "._train000.jpg", "Thumbs.db", "notes.txt"):
        (images / junk).write_bytes(b"junk")
    split = open_dataset(prepared).read("train")
    assert len(split.records) == 10
    assert split.faults == ()
    assert [len(record.boxes) for record in split.records[:6]] == [0] * 6  # no object: a negative, and kept


def test_each_fault_is_listed_and_the_rest_is_read(prepared: Path) -> None:
    images, labels = prepared / "train" / "images", prepared / "train" / "labels"
    add(images, "unlabelled", labels)
    (labels / "unlabelled.xml").unlink()
    add(images, "cut", labels)
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-40])
    (labels / "orphan.xml").write_text("<annotation/>")
    add(images, "broken", labels)
    (labels / "broken.xml").write_text("<annotation>\n<object>")
    Image.new("RGB", (3, 3)).save(images / "tiny.png")
    (labels / "tiny.xml").write_text("<annotation/>")
    (images / "folder.jpg").mkdir()
    (labels / "folder.xml").write_text("<annotation/>")
    dataset = open_dataset(prepared)
    split = dataset.read("train", skip_bad=True)
    assert len(split.records) == 4
    found = {fault.path.name: fault for fault in split.faults}
    assert {fault.action for fault in split.faults} == {"skipped image"}
    assert {name for name, fault in found.items() if fault.wrong} == {"broken.xml"}  # the others are losses
    with pytest.raises(UserError, match=r"1 annotations that cannot be right: .*broken\.xml:2: is not well-formed"):
        dataset.read("train")
    assert set(found) == {"unlabelled.jpg", "cut.jpg", "orphan.xml", "broken.xml", "tiny.png", "folder.jpg"}
    assert "cut short" in found["cut.jpg"].reason
    assert found["broken.xml"].line == 2


def test_too_many_bad_pictures_end_the_reading(prepared: Path) -> None:
    images, labels = prepared / "train" / "images", prepared / "train" / "labels"
    for number in range(6):
        add(images, f"bad{number}", labels)
        (images / f"bad{number}.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"6 of the 10 pictures of 'train'.*bad0\.jpg.*HTML.*and 3 more"):
        open_dataset(prepared).read("train")
    assert len(open_dataset(prepared).read("train", max_bad=0.6).records) == 4


WRONG = "<annotation>\n<object><name>cat</name>{}</object>\n</annotation>"
SWAPPED = "<bndbox><xmin>9</xmin><ymin>1</ymin><xmax>4</xmax><ymax>9</ymax></bndbox>"
NO_AREA = SWAPPED.replace("9</xmin>", "4</xmin>")
TWO_BOXES = NO_AREA.replace("4</xmin>", "1</xmin>") * 2


def test_a_contradiction_is_refused_and_a_loss_is_not(prepared: Path) -> None:
    labels = prepared / "train" / "labels"
    (labels / "train000.xml").write_text(WRONG.format(NO_AREA))
    dataset = open_dataset(prepared)
    assert [(fault.action, fault.wrong) for fault in dataset.read("train").faults] == [("dropped box", False)]
    (labels / "train001.xml").write_text(WRONG.format(SWAPPED))
    with pytest.raises(
        UserError, match=r"^'train' has 1 annotations .*/train001\.xml:2: xmin 9 is greater than xmax 4"
    ):
        dataset.read("train")
    split = dataset.read("train", skip_bad=True)
    assert [(fault.action, fault.wrong) for fault in split.faults] == [("dropped box", False), ("dropped box", True)]
    assert [len(record.boxes) for record in split.records] == [0, 0, 2, 2]


def test_what_is_read_by_a_guess_is_refused_too(prepared: Path) -> None:
    (prepared / "train" / "labels" / "train000.xml").write_text(WRONG.format(TWO_BOXES))
    dataset = open_dataset(prepared)
    with pytest.raises(UserError, match=r"train000\.xml:2: has 2 <bndbox>: the first is read\. Mend .*--skip-bad$"):
        dataset.read("train")
    split = dataset.read("train", skip_bad=True)
    assert [(fault.action, fault.wrong) for fault in split.faults] == [("repaired", True)]
    assert split.records[0].boxes.tolist() == [[0, 0, 4, 9]]


@pytest.mark.parametrize(("count", "more"), [(20, None), (21, "; and 1 more. "), (23, "; and 3 more. ")])
def test_twenty_contradictions_are_listed_and_the_rest_counted(count: int, more: str | None, prepared: Path) -> None:
    swapped = [SWAPPED.replace("9</xmin>", f"{9 + number}</xmin>") for number in range(count)]
    objects = "</object>\n<object><name>cat</name>".join(swapped)
    (prepared / "train" / "labels" / "train000.xml").write_text(WRONG.format(objects))
    with pytest.raises(UserError) as caught:
        open_dataset(prepared).read("train")
    message = str(caught.value)
    assert message.startswith(f"'train' has {count} annotations that cannot be right: ")
    assert re.findall(r"train000\.xml:(\d+): xmin", message) == [str(line) for line in range(2, 2 + min(count, 20))]
    assert (more or "") in message
    assert (" more. Mend" in message) == bool(more)
    assert "\n" not in message


def test_contradictory_pictures_that_are_left_out_count_as_lost(prepared: Path) -> None:
    images, labels = prepared / "train" / "images", prepared / "train" / "labels"
    for number in range(6):
        add(images, f"wrong{number}", labels)
        (labels / f"wrong{number}.xml").write_text("<annotation>")
    dataset = open_dataset(prepared)
    with pytest.raises(UserError, match="6 annotations that cannot be right"):
        dataset.read("train", max_bad=1)  # more may be lost, but not by a contradiction
    with pytest.raises(UserError, match=r"6 of the 10 pictures of 'train' cannot be used: .*wrong0\.xml:1"):
        dataset.read("train", skip_bad=True)
    assert len(dataset.read("train", skip_bad=True, max_bad=0.6).records) == 4
    problems = list(dataset.problems(dataset.scan("train")))
    assert [problem.split(" ")[1] for problem in problems] == ["has", "of"]  # both reasons, where all are asked for


def test_a_handful_may_be_lost_and_one_more_may_not(prepared: Path) -> None:
    images, labels = prepared / "train" / "images", prepared / "train" / "labels"
    for number in range(5):
        add(images, f"bad{number}", labels)
        (images / f"bad{number}.jpg").write_bytes(b"")
    dataset = open_dataset(prepared)
    assert len(dataset.read("train", max_bad=0).records) == 4
    add(images, "bad5", labels)
    (images / "bad5.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="6 of the 10 pictures"):
        open_dataset(prepared).read("train", max_bad=0.59)


def test_classes_that_are_not_in_the_list(prepared: Path, tmp_path: Path) -> None:
    add(prepared / "train" / "images", "x", prepared / "train" / "labels", ["Cat", "zebra", "dog"])
    add(prepared / "train" / "images", "y", prepared / "train" / "labels", ["zebra"])
    dataset = open_dataset(yaml(tmp_path, ARTICLE))
    with pytest.raises(UserError) as caught:
        dataset.read("train")
    message = str(caught.value)
    assert message.startswith(str(prepared / "train" / "labels" / "x.xml") + ":")
    assert "'zebra' (2 objects)" in message
    assert "'Cat' (1 objects), perhaps 'cat'" in message
    split = dataset.read("train", ignore_unknown=True)
    assert {record.id: len(record.boxes) for record in split.records}["x"] == 1
    assert len(split.faults) == 3


def test_one_annotation_for_two_pictures(prepared: Path) -> None:
    Image.new("RGB", SIZE[::-1]).save(prepared / "train" / "images" / "train001.png")
    with pytest.raises(UserError, match=r"two pictures: train001\.jpg and train001\.png"):
        open_dataset(prepared).read("train")


def test_nothing_to_train_on(prepared: Path) -> None:
    for path in (prepared / "train" / "labels").iterdir():
        path.write_text("<annotation/>")
    with pytest.raises(UserError, match="0 objects to train on"):
        open_dataset(prepared).read("train")
    assert len(open_dataset(prepared).read("val").records) == 2


def test_a_folder_without_pictures_says_what_was_there(prepared: Path) -> None:
    for path in (prepared / "train" / "images").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(UserError, match=r"no pictures in .*images: looked for \.jpg .*found 4 \.heic"):
        open_dataset(prepared).read("train")


def test_training_and_validation_stay_apart(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train and val are the same"):
        open_dataset(yaml(tmp_path, ARTICLE.replace("/valid/", "/train/")))
    year = add_year(tmp_path, "VOC2007", {"train": ["a", "b"], "val": ["b", "c"]})
    for split in ("train", "val"):
        with pytest.raises(UserError, match=r"train and val share 1 pictures: b\.jpg"):
            open_dataset(year).read(split)  # type: ignore[arg-type]


def test_one_folder_of_annotations_may_serve_both_splits(prepared: Path, tmp_path: Path) -> None:
    for path in (prepared / "valid" / "labels").iterdir():
        path.rename(prepared / "train" / "labels" / path.name)
    dataset = open_dataset(yaml(tmp_path, ARTICLE.replace("valid/labels", "train/labels")))
    assert dataset.read("train").faults == dataset.read("val").faults == ()


# --- mistakes that are answered at once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("CLASES: [cat]\n", r":1: unknown key 'CLASES'\. Did you mean 'CLASSES'"),
        ("names: [cat]\n", r":1: unknown key 'names'\. Did you mean 'classes'"),
        ("download: 'import os'\n", ":1: unknown key 'download'"),
        (ARTICLE + "NC: 3\n", ":8: NC is there twice, first on line 6"),
        ("TRAIN_DIR_IMAGES: a\n", "TRAIN_DIR_LABELS, VALID_DIR_IMAGES, VALID_DIR_LABELS, CLASSES missing"),
        (ARTICLE + "train: a\n", ":8: 'train' does not go with"),
        (ARTICLE.replace("NC: 3", "NC: 20"), ":6: NC is 20, but CLASSES has 2, 3 with __background__"),
        (ARTICLE.replace("NC: 3", 'NC: "3"'), ":6: NC must be a whole number"),
        (ARTICLE.replace("cat", "no"), ":5: .* YAML reads no as bool: quote it"),
        (ARTICLE.replace("cat", "012"), ":5: .* YAML reads 012 as int: quote it"),
        (ARTICLE.replace("cat", "3:30"), ":5: .*: quote it"),
        (ARTICLE.replace("cat", "null"), ":5: .*: quote it"),
        (ARTICLE.replace("cat", "''"), ":5: .*empty"),
        (ARTICLE.replace("cat", "[cat]"), ":5: .*must be text"),
        (ARTICLE.replace("cat", "dog"), ":5: CLASSES: 'dog' is there twice"),
        (ARTICLE.replace("cat", "' dog\u00a0'"), ":5: CLASSES: 'dog' is there twice"),
        (ARTICLE.replace("cat", '"a\\nb"'), ":5: .* no name for a class"),
        (ARTICLE.replace("__background__, cat", "cat, __background__"), ":5: .*must come first"),
        (ARTICLE.replace(", cat, dog", ""), ":5: CLASSES names no class"),
        (ARTICLE.replace("[__background__, cat, dog]", "cat"), ":5: CLASSES must be a list"),
        (
            ARTICLE.replace("CLASSES: ", "CLASSES: !!python/object/apply:os.system "),
            ":5: CLASSES must be a list",
        ),
        (ARTICLE.replace("True", "maybe"), ":7: .*must be True or False"),
        (ARTICLE.replace("True", "!!bool maybe"), ":7: .*must be True or False"),
        ("train: |\n  a\n  b\n", ":1: train: nothing at .*/a b"),
        ('train: "a\\u2028b"\n', ":1: train: nothing at .*/a b"),
        ("train: " + "long" * 9000 + "\n", ":1: train: nothing at .{900,1100}…$"),
        (ARTICLE.replace("final_xml_dataset/train/images", ""), ":1: TRAIN_DIR_IMAGES is empty"),
        (ARTICLE.replace("train/images", "trian/images"), ":1: TRAIN_DIR_IMAGES: nothing at .*trian"),
        (ARTICLE.replace("train/images", "train/image"), r":1: .*Did you mean 'images'\?"),
        (ARTICLE.replace("train/images", "train\\images"), ":1: .*Write / between folders"),
        (ARTICLE.replace("final_xml_dataset/train/i", "$DATA/train/i"), ":1: .*Variables are not expanded"),
        (ARTICLE.replace("train/labels", "train/labels/train000.xml"), ":2: .*is a file, not a folder"),
        ("train: final_xml_dataset/train\nformat: cocoa\n", r":2: format must be one of .*Did you mean 'coco'\?"),
        ("train: final_xml_dataset/train\nformat: coco\n", ":1: train: no COCO file in .*labels"),
        ("train: final_xml_dataset/train\nimages: {valid: train}\n", ":2: images: 'valid' is none of train"),
        ("train: final_xml_dataset/train\nnames: cat\n", ":2: names must be a list of names"),
        ("train: final_xml_dataset/train\nnames: [cat, cat]\n", ":2: names: 'cat' is there twice"),
        ("train: final_xml_dataset/train\nnames: {x: cat}\n", ":2: names: a class is a whole number"),
        ("train: final_xml_dataset/train\nnames: {999999999999999: cat}\n", ":2: names: a class is a whole number"),
        ("train: final_xml_dataset/train\nnames: {0: cat, 0: dog}\n", ":2: names: 0 is there twice"),
        ("path: .\nnames: []\n", ":2: names names no class"),
        ("train: final_xml_dataset/train\nnames: [cat]\nnc: 2\n", ":3: nc is 2, but names has 1"),
        ("train: final_xml_dataset/train\nnames: [cat]\nkpt_shape: [17, 3]\n", "key points"),
        ("path: final_xml_dataset\nval: valid\n", "train missing"),
        ("train: []\n", ":1: train is empty"),
        (
            "train: final_xml_dataset/train/labels/train000.xml\n",
            ":1: train: .* in no folder with JPEGImages",
        ),
        ("", "must hold keys"),
        ("- a\n", "must hold keys"),
        ("a: b: c\n", ":1:5: is no YAML"),
        ("\ttrain: a\n", ":1:1: is no YAML"),
        ("a: *b\n", ":1:4: is no YAML"),
        (b"\xff\xfe\x00\x01", "no UTF-8 text"),
        (b"train: \x07", "is no YAML"),
        ("[" * 2000, "nested too deep"),
        ("a: " + "b" * 1_000_001, "larger than 1 MB"),
        ("a: [" + "[]," * 300_000 + "]", ":1:.* more than 50000 keys and values"),
        ("? [a, b]\n: c\n", ":1: unknown key"),
        ("train: '" + "x" * 5000 + "'\n", ":1: train: nothing at"),
        ('train: "a\\0b"\n', ":1: train: nothing at"),
    ],
)
def test_mistakes_in_a_yaml_are_named(text: str | bytes, message: str, prepared: Path, tmp_path: Path) -> None:
    path = yaml(tmp_path, text)
    with pytest.raises(UserError) as caught:
        open_dataset(path)
    assert str(caught.value).startswith(str(path))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_paths_are_named(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no dataset at .*Did you mean 'final_xml_dataset'\?"):
        open_dataset(tmp_path / "final_xml_dateset")
    with pytest.raises(UserError, match=r"There is no folder .* either"):
        open_dataset(tmp_path / "none" / "none")
    with pytest.raises(UserError, match="neither a folder nor a data YAML"):
        open_dataset(prepared / "train" / "labels" / "train000.xml")
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        open_dataset(prepared).read("test")


def test_home_is_expanded(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert len(ids(Path("~/final_xml_dataset"))) == 4
    assert len(ids(yaml(tmp_path, "path: ~/final_xml_dataset\n"))) == 4


def test_opening_loads_no_heavy_library() -> None:
    code = "import sys, boxwright.data.dataset; print([m for m in ('torch', 'cv2', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_time_grows_with_the_number_of_files_and_no_faster(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        folder = tmp_path / str(count)
        add(folder / "train", "first")
        picture, xml = (next((folder / "train").glob(kind)).read_bytes() for kind in ("*.jpg", "*.xml"))
        for number in range(count):
            (folder / "train" / f"{number}.jpg").write_bytes(picture)
            (folder / "train" / f"{number}.xml").write_bytes(xml)
        add(folder / "valid", "first")
        start = time.process_time()
        assert len(open_dataset(folder).read("train").records) == count + 1
        return time.process_time() - start

    small, large = seconds(80), seconds(800)
    assert large < 10 * small * 3 + 0.2


# --- real data


@pytest.mark.real_data
def test_bccd(real_data: Path) -> None:
    dataset = open_dataset(real_data / "bccd" / "BCCD")
    train, val = dataset.read("train"), dataset.read("val")
    assert dataset.classes == ("Platelets", "RBC", "WBC")
    assert (len(train.records), len(val.records)) == (292, 72)
    assert sum(len(record.boxes) for split in (train, val) for record in split.records) == 4888 - 2
    faults = train.faults + val.faults
    assert {fault.path.name for fault in faults} == {"BloodImage_00343.xml", "BloodImage_00338.xml"}
    assert all(fault.action == "dropped box" and fault.line and "no area" in fault.reason for fault in faults)


@pytest.mark.real_data
def test_raccoon(real_data: Path) -> None:
    dataset = open_dataset(real_data / "raccoon")
    train, val = dataset.read("train"), dataset.read("val")
    assert dataset.classes == ("raccoon",)
    assert len(train.records) + len(val.records) == 200
    assert sum(len(record.boxes) for split in (train, val) for record in split.records) == 217
    assert train.faults == val.faults == ()


@pytest.mark.real_data
def test_voc_devkit(real_data: Path) -> None:
    dataset = open_dataset(real_data / "voc_mini" / "VOCdevkit")
    train, val = dataset.read("train"), dataset.read("val")
    assert dataset.classes == voc.CLASSES
    assert (len(train.records), len(val.records)) == (110, 4)
    assert sum(len(record.boxes) for split in (train, val) for record in split.records) == 39 + 273
    assert sum(int(record.difficult.sum()) for split in (train, val) for record in split.records) == 41
    assert train.faults == val.faults == ()


@pytest.mark.real_data
def test_voc_subset(real_data: Path) -> None:
    dataset = open_dataset(real_data / "voc12_subset" / "VOCdevkit")
    train, val = dataset.read("train"), dataset.read("val")
    assert (len(train.records), len(val.records)) == (2483, 400)
    assert sum(len(record.boxes) for split in (train, val) for record in split.records) == 6117
    assert train.faults == val.faults == ()

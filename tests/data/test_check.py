"""The doctor finds what is wrong, tells it by file and line, agrees with training, and changes nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from boxwright.__main__ import main
from boxwright.data.check import Checked, Rules, check_dataset
from boxwright.data.check.finding import KINDS
from boxwright.data.check.mend import mend_dataset
from boxwright.data.check.text import as_json, printable, report_lines
from boxwright.data.dataset import open_dataset
from boxwright.data.shards import shard as write_shards
from boxwright.types import UserError

W, H = 80, 60
Objects = Iterable[tuple[str, tuple[object, object, object, object]]]

LISTED = """\
TRAIN_DIR_IMAGES: train/images
TRAIN_DIR_LABELS: train/labels
VALID_DIR_IMAGES: valid/images
VALID_DIR_LABELS: valid/labels
CLASSES: [{}]
NC: {}
"""


class Voc:
    """A VOC dataset that grows file by file, each picture with pixels of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._drawn = 0

    def picture(self, split: str, stem: str, *, size: tuple[int, int] = (W, H), suffix: str = ".png") -> Path:
        path = self.folder / split / "images" / f"{stem}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._drawn += 1
        pixels = np.random.default_rng(self._drawn).integers(0, 255, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    def xml(self, split: str, stem: str, text: str | bytes) -> Path:
        path = self.folder / split / "labels" / f"{stem}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def add(
        self, split: str, stem: str, objects: Objects = (("cat", (5, 6, 40, 50)),), *, said: str | None = None,
        head: str = "", size: tuple[int, int] = (W, H),
    ) -> Path:  # fmt: skip
        """A picture and its annotation; `said` is its <size>."""
        self.picture(split, stem, size=size)
        return self.xml(split, stem, annotation(objects, said if said is not None else f"{size[0]}x{size[1]}", head))


def annotation(objects: Objects, said: str = f"{W}x{H}", head: str = "") -> str:
    lines = ["<annotation>", head]
    if said:
        width, height = said.split("x")
        lines.append(f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>")
    for name, (xmin, ymin, xmax, ymax) in objects:
        lines += [
            "<object>",
            f"<name>{name}</name>",
            f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>",
            "</object>",
        ]
    return "\n".join([*lines, "</annotation>", ""])


@pytest.fixture
def voc(tmp_path: Path) -> Voc:
    """Four good pictures of cats and dogs."""
    made = Voc(tmp_path / "data")
    for number in range(3):
        made.add("train", f"t{number}", [("cat", (5 + number, 6, 40, 50)), ("dog", (45, 10 + number, 75, 55))])
    made.add("valid", "v0", [("cat", (7, 7, 35, 33)), ("dog", (44, 12, 70, 51))])
    return made


def kinds(checked: Checked, *levels: str) -> dict[str, int]:
    """How many findings of each kind there are."""
    found: Counter[str] = Counter()
    for (_, kind, level), count in checked.findings.counts.items():
        if not levels or level in levels:
            found[kind] += count
    return dict(found)


def state_of(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_good_data_has_no_findings(voc: Voc) -> None:
    checked = check_dataset(voc.folder, decode=True)
    assert kinds(checked) == {}
    assert checked.classes == ("cat", "dog")
    assert (checked.splits["train"].pictures, checked.splits["train"].objects) == (3, 6)
    assert checked.splits["val"].classes["dog"].objects == 1


XML = {  # what is wrong with an annotation → its kind, its level, and the line
    "swapped-corners": ([("cat", (40, 6, 5, 50))], "error", 4),
    "not-a-number": ([("cat", ("12,5", 6, 40, 50))], "error", 6),
    "no-class": ([("", (5, 6, 40, 50))], "error", 4),
    "no-area": ([("cat", (5, 6, 5, 50))], "lost", 4),
    "leaves-picture": ([("cat", (5, 6, 90, 50))], "repaired", 4),
    "object-twice": ([("cat", (5, 6, 40, 50)), ("cat", (5, 6, 40, 50))], "lost", 8),
    "near-duplicate": ([("cat", (5, 6, 75, 56)), ("cat", (5, 6, 76, 56))], "suspect", 8),
    "two-classes": ([("cat", (5, 6, 75, 56)), ("dog", (5, 6, 75, 56))], "suspect", 8),
    "tiny-box": ([("cat", (5, 6, 7, 50))], "note", 4),
    "whole-picture": ([("cat", (1, 1, W, H))], "note", 4),
}


@pytest.mark.parametrize("kind", XML)
def test_an_object_is_told_by_file_and_line(voc: Voc, kind: str) -> None:
    objects, level, line = XML[kind]
    path = voc.add("train", "odd", objects)  # type: ignore[arg-type]
    checked = check_dataset(voc.folder)
    (found,) = [finding for finding in checked.findings if finding.kind == kind]
    assert (found.path, found.line, found.level, found.split) == (path, line, level, "train")
    assert set(kinds(checked)) == {kind}


SIZES = {"swapped-size": "60x80", "scaled-size": "160x120", "other-size": "100x100", "no-size": ""}


@pytest.mark.parametrize("kind", SIZES)
def test_a_size_that_is_another_pictures(voc: Voc, kind: str) -> None:
    voc.add("train", "odd", said=SIZES[kind])
    checked = check_dataset(voc.folder)
    assert kinds(checked) == {kind: 1}
    assert checked.errors == (kind != "no-size")


WHOLE = {
    "unreadable-annotation": (b"<annotation><object>", "error"),
    "unreadable-mark": (
        annotation([("cat", (5, 6, 40, 50))]).replace("</name>", "</name><difficult>Unspecified</difficult>"),
        "error",
    ),
    "several-boxes": (annotation([("cat", (5, 6, 40, 50))]).replace("</bndbox>", "</bndbox><bndbox/>"), "error"),
    "no-box": (annotation([("cat", (5, 6, 40, 50))]).replace("bndbox", "polygon"), "error"),
    "name-spelling": (annotation([("cat\n", (5, 6, 40, 50))]), "repaired"),
    "other-filename": (annotation([], head="<filename>t0.png</filename>"), "note"),
    "outside-filename": (annotation([], head="<filename>../../etc/passwd</filename>"), "note"),
    "repaired-xml": ("\n<?xml version='1.0'?>" + annotation([]), "repaired"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_an_annotation_is_told_by_its_kind(voc: Voc, kind: str) -> None:
    text, level = WHOLE[kind]
    voc.picture("train", "odd")
    path = voc.xml("train", "odd", text)
    checked = check_dataset(voc.folder)
    found = [finding for finding in checked.findings if finding.kind == kind]
    assert [(finding.path, finding.level) for finding in found] == [(path, level)]


def test_counterparts_that_are_missing(voc: Voc) -> None:
    picture = voc.picture("train", "alone")
    labels = voc.xml("train", "orphan", annotation([("cat", (5, 6, 40, 50))]))
    checked = check_dataset(voc.folder)
    assert {finding.kind: finding.path for finding in checked.findings} == {
        "no-annotation": picture,
        "no-picture": labels,
    }
    assert {finding.training for finding in checked.findings} == {"leaves the picture out"}


def test_pictures_that_cannot_be_used(voc: Voc) -> None:
    for stem, text in {"html": b"<html>", "none": b"", "cut": None}.items():
        path = Path(voc.add("train", stem)).parents[1] / "images" / f"{stem}.png"
        path.write_bytes(text if text is not None else path.read_bytes()[:400])
    voc.add("train", "small", [], size=(4, 4))
    assert kinds(check_dataset(voc.folder)) == {"unreadable-picture": 3, "small-picture": 1}


def test_how_pixels_are_stored_is_noted_from_the_header(voc: Voc) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (H, W), np.uint8)
    colour = Image.fromarray(rng.integers(0, 255, (H, W, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3
    pictures = {
        "grey.jpg": (Image.fromarray(noise), {}, {"grey"}),
        "cmyk.jpg": (colour.convert("CMYK"), {}, {"cmyk"}),
        "plain.jpg": (colour, {}, set[str]()),
        "turned.jpg": (colour, {"exif": exif}, {"turned"}),
        "named.jpg": (colour, {"format": "PNG"}, {"other-format"}),
        "grey.png": (Image.fromarray(noise), {}, {"grey"}),
        "deep.png": (Image.fromarray(noise.astype(np.uint16) * 257), {}, {"grey", "deep"}),
        "alpha.png": (colour.convert("RGBA"), {}, {"alpha"}),
        "palette.png": (colour.convert("P"), {}, {"palette"}),
        "moves.png": (colour, {"save_all": True, "append_images": [colour.rotate(180)]}, {"several-pictures"}),
        "moves.webp": (colour, {"save_all": True, "append_images": [colour.rotate(180)]}, {"several-pictures"}),
        "pages.tif": (colour, {"save_all": True, "append_images": [colour]}, {"several-pictures"}),
        "grey.tif": (Image.fromarray(noise), {}, {"grey"}),
        "plain.tif": (colour, {}, set[str]()),
        "plain.bmp": (colour, {}, set[str]()),
        "plain.webp": (colour, {}, set[str]()),
    }
    for index, (file, (image, options, _)) in enumerate(pictures.items()):
        image.save(voc.folder / "train/images" / f"n{index}{Path(file).suffix}", **options)
        voc.xml("train", f"n{index}", annotation([("cat", (5, 6, 40 + index, 50))]))
    found: dict[str, set[str]] = {file: set() for file in pictures}
    names = {f"n{index}{Path(file).suffix}": file for index, file in enumerate(pictures)}
    for finding in check_dataset(voc.folder).findings:
        if finding.kind not in ("leak", "duplicate", "same-picture-other-labels"):
            found[names[Path(finding.path or "").name]].add(finding.kind)
    assert found == {file: expected for file, (_, _, expected) in pictures.items()}


# --- evidence


def many(voc: Voc, boxes: Iterable[tuple[object, object, object, object]], *, size: tuple[int, int] = (W, H)) -> None:
    for number, box in enumerate(boxes):
        voc.add("train", f"m{number}", [("cat", box)], size=size)


def test_counting_from_0_is_seen_by_its_numbers(voc: Voc) -> None:
    many(voc, [(0, 5 + n, 30 + n, 40) for n in range(4)])
    (found,) = [finding for finding in check_dataset(voc.folder).findings if finding.kind == "counts-from-0"]
    assert found.reason.startswith("4 of 10 boxes begin at 0 and 0 at 1")
    assert found.level == "suspect"


def test_counting_from_1_is_not_suspected_for_a_slip(voc: Voc) -> None:
    many(voc, [(1, 5 + n, W, 40) for n in range(6)] + [(0, 8, 30, 30)])
    assert "counts-from-0" not in kinds(check_dataset(voc.folder))


def test_axes_that_are_swapped(voc: Voc) -> None:
    many(voc, [(2 + n, 5, 50, 75 - n) for n in range(6)])
    assert kinds(check_dataset(voc.folder), "suspect") == {"swapped-axes": 1}


def test_boxes_of_larger_pictures_are_not_taken_for_swapped_axes(voc: Voc) -> None:
    many(voc, [(2 + n, 5, 150, 110 - n) for n in range(6)])
    assert kinds(check_dataset(voc.folder), "suspect") == {"larger-picture": 1}


def test_width_and_height_in_the_place_of_corners(voc: Voc) -> None:
    many(voc, [(40 + n, 20, 12 + n, 30) for n in range(6)])
    assert kinds(check_dataset(voc.folder), "suspect") == {"width-height": 1}


def test_fractions_in_the_place_of_pixels(voc: Voc) -> None:
    many(voc, [(0.1, 0.2, 0.5, 0.4 + n / 100) for n in range(12)])
    assert kinds(check_dataset(voc.folder), "suspect")["fractions"] == 1


def test_boxes_that_fit_before_the_exif_rotation(voc: Voc) -> None:
    for number in range(3):
        voc.add("train", f"e{number}", [("cat", (5, 5 + number, 75, 55))], said="")
        exif = Image.Exif()
        exif[0x0112] = 6
        path = voc.folder / f"train/images/e{number}.png"
        Image.open(path).save(path, exif=exif)
    found = kinds(check_dataset(voc.folder))
    assert found["unrotated"] == 1
    assert found["turned"] == 3


def test_one_box_in_many_pictures(voc: Voc) -> None:
    many(voc, [(10, 10, 33, 44)] * 6)
    (found,) = [finding for finding in check_dataset(voc.folder).findings if finding.kind == "repeated-box"]
    assert "in 6 pictures" in found.reason


def test_class_names_that_may_be_one(voc: Voc) -> None:
    many(voc, [(5 + n, 6, 40, 50) for n in range(3)])
    for number, name in enumerate(["Cat", *["elephant"] * 12, "elephent", "class_1", "class_2"]):
        voc.add("train", f"c{number}", [(name, (5, 6, 40 + number, 50))])
    reasons = [finding.reason for finding in check_dataset(voc.folder).findings if finding.kind == "similar-classes"]
    assert len(reasons) == 2
    assert any("'Cat'" in reason and "'cat'" in reason for reason in reasons)
    assert any("'elephent' (1 object) may be 'elephant' (12)" in reason for reason in reasons)


def test_classes_without_objects(voc: Voc) -> None:
    (voc.folder / "data.yaml").write_text(LISTED.format("cat, dog, emu", 3))
    (found,) = check_dataset(voc.folder / "data.yaml").findings  # nowhere: told once
    assert (found.kind, found.level, found.classes) == ("no-train-objects", "suspect", ("emu",))
    assert found.reason == "no object in any split: nothing to learn, AP n/a: 'emu'"
    voc.add("valid", "e", [("emu", (5, 6, 40, 50))])
    for number, name in enumerate(("ox", "yak")):
        voc.add("train", f"o{number}", [(name, (5, 6, 40, 50 + number))])
    (voc.folder / "data.yaml").write_text(LISTED.format("cat, dog, emu, ox, yak", 5))
    checked = check_dataset(voc.folder / "data.yaml")
    assert [(found.split, found.level, found.classes) for found in checked.findings] == [
        ("train", "suspect", ("emu",)), ("val", "note", ("ox", "yak")),
    ]  # fmt: skip
    assert any("to be judged on (AP n/a): 2" in line for line in report_lines(checked))


def test_a_jpeg_cut_short_is_one_finding(voc: Voc) -> None:
    path = voc.picture("train", "cut", suffix=".jpg")
    voc.xml("train", "cut", annotation([("cat", (5, 6, 41, 50))]))
    path.write_bytes(path.read_bytes()[:900])
    for decode in (False, True):
        checked = check_dataset(voc.folder, decode=decode)
        assert kinds(checked) == {"unreadable-picture": 1}
        assert checked.findings.count("lost") == 1


def test_a_dataset_is_called_as_it_was_given(voc: Voc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(open_dataset(voc.folder), tmp_path / "shards", size=1 << 20, tolerance={}, say=lambda _: None)
    there = open_dataset(tmp_path / "shards")
    monkeypatch.setattr("boxwright.data.check.doctor.open_dataset", lambda _: there)
    checked = check_dataset("http://127.0.0.1:8765/shards")
    assert next(report_lines(checked)) == "http://127.0.0.1:8765/shards: 2 classes"
    assert as_json(checked)["data"] == "http://127.0.0.1:8765/shards"


def test_one_class_is_no_classes(tmp_path: Path) -> None:
    voc = Voc(tmp_path / "data")
    for split in ("train", "valid"):
        voc.add(split, split)
    assert next(report_lines(check_dataset(voc.folder))).endswith(": 1 class")


# --- equal pictures


def test_equal_pictures_within_and_across_splits(voc: Voc) -> None:
    data = (voc.folder / "train/images/t0.png").read_bytes()
    labels = (voc.folder / "train/labels/t0.xml").read_bytes()
    for split, stem in (("train", "twin"), ("valid", "leak")):
        (voc.folder / split / "images" / f"{stem}.png").write_bytes(data)
        voc.xml(split, stem, labels)
    checked = check_dataset(voc.folder)
    assert kinds(checked) == {"leak": 1}  # one group of three
    (group,) = checked.groups
    assert sorted((split, Path(path).stem) for split, path in group.members) == [
        ("train", "t0"), ("train", "twin"), ("val", "leak"),
    ]  # fmt: skip
    assert not group.labels_differ
    assert checked.errors == 0


def test_equal_pictures_with_other_labels_are_worse(voc: Voc) -> None:
    data = (voc.folder / "train/images/t0.png").read_bytes()
    (voc.folder / "train/images/twin.png").write_bytes(data)
    voc.xml("train", "twin", annotation([("cat", (5, 6, 44, 50)), ("dog", (45, 10, 75, 55))]))
    (found,) = check_dataset(voc.folder).findings
    assert found.kind == "same-picture-other-labels"
    assert "by up to 4 pixels" in found.reason


def test_equal_pixels_in_other_files_are_found_by_decoding(voc: Voc) -> None:
    Image.open(voc.folder / "train/images/t1.png").save(voc.folder / "valid/images/bmp.bmp")
    voc.xml("valid", "bmp", annotation([("cat", (5, 6, 40, 50))]))
    assert kinds(check_dataset(voc.folder)) == {}
    checked = check_dataset(voc.folder, decode=True)
    assert kinds(checked) == {"leak": 1}
    assert checked.groups[0].pixels


def test_a_file_under_two_names_leaks_too(voc: Voc) -> None:
    (voc.folder / "valid/images/again.png").hardlink_to(voc.folder / "train/images/t0.png")
    voc.xml("valid", "again", annotation([("cat", (5, 6, 40, 50)), ("dog", (45, 10, 75, 55))]))
    assert kinds(check_dataset(voc.folder)) == {"leak": 1}


def test_a_folder_that_is_a_link_to_the_other_split_is_shared(voc: Voc) -> None:
    shutil.rmtree(voc.folder / "valid")
    (voc.folder / "valid").mkdir()
    for inside in ("images", "labels"):
        (voc.folder / "valid" / inside).symlink_to(voc.folder / "train" / inside)
    with pytest.raises(UserError, match="share 3 pictures"):
        open_dataset(voc.folder).read("train")
    assert kinds(check_dataset(voc.folder), "error") == {"shared-pictures": 3}


def test_an_annotation_from_before_the_exif_rotation(voc: Voc) -> None:
    voc.add("train", "odd")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = voc.folder / "train/images/odd.png"
    Image.open(path).save(path, exif=exif)
    assert kinds(check_dataset(voc.folder)) == {"exif-size": 1, "turned": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_decoding_finds_damage_and_single_colours(voc: Voc, workers: int) -> None:
    voc.add("train", "flat", [("cat", (5, 6, 41, 50))])
    Image.new("RGB", (W, H), (9, 8, 7)).save(voc.folder / "train/images/flat.png")
    voc.add("train", "bad", [("cat", (5, 6, 42, 50))])
    path = voc.folder / "train/images/bad.png"
    data = path.read_bytes()
    at = data.index(b"IDAT") + 4
    path.write_bytes(data[:at] + b"\0" * 8 + data[at + 8 :])
    assert kinds(check_dataset(voc.folder, workers=workers)) == {}
    assert kinds(check_dataset(voc.folder, decode=True, workers=workers)) == {"damaged-picture": 1, "one-colour": 1}


# --- what training would do


BREAK = {
    "corners": lambda voc: voc.add("train", "x", [("cat", (40, 6, 5, 50))]),
    "xml": lambda voc: (voc.picture("valid", "x"), voc.xml("valid", "x", "<annotation>")),
    "lost": lambda voc: [voc.picture("train", f"x{number}") for number in range(9)],
    "fine": lambda voc: voc.add("train", "x", [("cat", (5, 6, 5, 50))]),
}


@pytest.mark.parametrize("rules", [Rules(), Rules(skip_bad=True), Rules(max_bad=0.9)], ids=str)
@pytest.mark.parametrize("how", BREAK)
def test_errors_are_what_training_refuses(voc: Voc, how: str, rules: Rules) -> None:
    BREAK[how](voc)
    dataset = open_dataset(voc.folder)
    refused = False
    for name in dataset.splits:
        try:
            dataset.read(name, max_bad=rules.max_bad, skip_bad=rules.skip_bad, ignore_unknown=rules.ignore_unknown)
        except UserError:
            refused = True
    assert (check_dataset(voc.folder, rules=rules).errors > 0) == refused


def test_unknown_classes_are_errors_unless_ignored(voc: Voc) -> None:
    (voc.folder / "data.yaml").write_text(LISTED.format("cat", 1))
    checked = check_dataset(voc.folder / "data.yaml")
    assert kinds(checked, "error") == {"unknown-class": 4}
    assert check_dataset(voc.folder / "data.yaml", rules=Rules(ignore_unknown=True)).errors == 0


def test_splits_that_share_a_file_are_both_checked(voc: Voc) -> None:
    labels = voc.folder / "train/labels"
    devkit = voc.folder / "VOC2012"
    (devkit / "ImageSets/Main").mkdir(parents=True)
    (devkit / "JPEGImages").symlink_to(voc.folder / "train/images")
    (devkit / "Annotations").symlink_to(labels)
    (devkit / "ImageSets/Main/train.txt").write_text("t0\nt1\n")
    (devkit / "ImageSets/Main/val.txt").write_text("t1\nt2\n")
    checked = check_dataset(devkit)
    assert kinds(checked, "error") == {"shared-pictures": 1}
    assert set(checked.splits) == {"train", "val"}


def test_two_pictures_for_one_annotation_are_an_error_of_the_data(voc: Voc) -> None:
    voc.picture("train", "t0", suffix=".bmp")
    assert main(["data", "check", str(voc.folder)]) == 1
    checked = check_dataset(voc.folder)
    assert kinds(checked, "error") == {"split": 1}
    (voc.folder / "data.yaml").write_text(LISTED.format("cat, dog", 2))
    checked = check_dataset(voc.folder / "data.yaml")
    assert kinds(checked, "error") == {"split": 1}
    assert checked.splits["val"].objects == 2


# --- the command


def test_exit_codes(voc: Voc, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(voc.folder)]) == 0
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["data", "check", str(tmp_path / "empty")]) == 2
    assert main(["data", "check", str(voc.folder), "--split", "test"]) == 2
    assert main(["data", "check", str(voc.folder), "--max-bad", "2"]) == 2
    assert main(["data", "check", str(voc.folder), "--html", str(tmp_path / "x.txt")]) == 2
    voc.add("train", "x", [("cat", (40, 6, 5, 50))])
    capsys.readouterr()
    assert main(["data", "check", str(voc.folder)]) == 1
    out = capsys.readouterr().out
    assert "x.xml:4: xmin 40 is greater than xmax 5" in out
    assert "training refuses this dataset" in out
    assert main(["data", "check", str(voc.folder), "--skip-bad"]) == 0


def test_json_is_one_object_with_everything(voc: Voc, capsys: pytest.CaptureFixture[str]) -> None:
    path = voc.add("train", "x", [("cat", (40, 6, 5, 50))])
    assert main(["data", "check", str(voc.folder), "--json", "--imgsz", "32"]) == 1
    printed = capsys.readouterr()
    assert "ERRORS" not in printed.err
    found = json.loads(printed.out)
    assert not found["ok"]
    (finding,) = found["findings"]
    assert (finding["split"], finding["path"], finding["line"]) == ("train", str(path), 4)
    assert (finding["kind"], finding["action"], finding["training"]) == ("swapped-corners", "dropped box", "refuses")
    assert found["splits"]["train"]["classes"]["cat"]["objects"] == 3
    assert found["counts"] == [{"split": "train", "kind": "swapped-corners", "level": "error", "count": 1}]
    assert found["leaks"] == found["duplicates"] == []


def test_every_kind_has_a_title(voc: Voc) -> None:
    source = "".join(
        path.read_text()
        for path in Path(sys.modules["boxwright.data.check.finding"].__file__ or "").parent.glob("*.py")
    )
    for kind in KINDS:
        assert source.count(f'"{kind}"') >= (1 if kind in ("wrong", "lost", "repaired", "noted") else 2), kind


def test_the_dataset_is_as_it_was(voc: Voc, tmp_path: Path) -> None:
    voc.add("train", "x", [("cat", (40, 6, 5, 50))])
    before = state_of(voc.folder)
    main(["data", "check", str(voc.folder), "--decode", "--workers", "0", "--html", str(tmp_path / "page.html")])
    main(["data", "check", str(voc.folder), "--fix", str(tmp_path / "fixed")])
    assert state_of(voc.folder) == before


# --- hostile input

NASTY = "\x1b[31m<script>alert(1)</script>\u202e"


def test_no_escape_sequence_reaches_the_terminal(voc: Voc, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc.add("train", "line\nbreak\x1b[2J", [("<![CDATA[<script>alert(1)</script>\u202e]]>", (40, 6, 5, 50))])
    page = tmp_path / "page.html"
    assert main(["data", "check", str(voc.folder), "--html", str(page)]) == 1
    out = capsys.readouterr().out
    assert not any((letter < " " and letter != "\n") or letter in "\x7f\u202e" for letter in out)
    assert "line\\nbreak\\x1b[2J.xml:4" in out
    html = page.read_text()
    assert "<script>alert" not in html
    assert "\x1b" not in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "default-src &#x27;none&#x27;" in html


def test_the_page_shows_the_worst_with_their_boxes(
    voc: Voc, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    voc.add("train", "x", [("cat", (40, 6, 5, 50)), ("dog", ("-1e300", 6, "1e300", 50))])
    voc.add("train", "y", said="100x100")
    main(["data", "check", str(voc.folder), "--html", str(page)])
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {page}"
    html = page.read_text()
    pictures = [part.split('"')[0] for part in html.split("data:image/jpeg;base64,")[1:]]
    assert len(pictures) == 2
    pixels = np.asarray(Image.open(BytesIO(base64.b64decode(pictures[1]))).convert("RGB")).astype(int)
    red = (pixels[:, :, 0] > 200) & (pixels[:, :, 1] < 110) & (pixels[:, :, 2] < 110)
    rows, columns = np.flatnonzero(red.mean(1) > 0.3), np.flatnonzero(red.mean(0) > 0.5)
    scale = pixels.shape[1] / W
    for edges, expected in ((columns, (4, 40)), (rows, (5, 50))):
        assert abs(edges.min() / scale - expected[0]) < 1
        assert abs(edges.max() / scale - expected[1]) < 1
    for part in ("Findings", "Classes", "Sizes", "corners the wrong way round", "<svg"):
        assert part in html


def test_spoilt_annotations_are_told_and_mended_without_a_crash(voc: Voc, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    text = annotation([("cat", (5, 6, 40, 50)), ("dog", (45, 10, 75, 55))]).encode()
    for number in range(200):
        spoilt = bytearray(text)
        for _ in range(int(rng.integers(1, 5))):
            at = int(rng.integers(0, len(spoilt)))
            how = rng.integers(0, 4)
            if how == 0:
                spoilt[at] = int(rng.integers(0, 256))
            elif how == 1:
                del spoilt[at : at + int(rng.integers(1, 30))]
            elif how == 2:
                spoilt[at:at] = spoilt[: int(rng.integers(1, 60))]
            else:
                spoilt[at : at + 1] = bytes(f"{rng.integers(-999, 999)}", "ascii")
        voc.picture("train", f"x{number}")
        voc.xml("train", f"x{number}", bytes(spoilt))
    (voc.folder / "data.yaml").write_text(LISTED.format("cat, dog", 2))
    checked = check_dataset(voc.folder / "data.yaml")
    assert checked.errors > 50
    mended = mend_dataset(voc.folder / "data.yaml", tmp_path / "fixed")
    assert mended.pictures["train"] + mended.left_out == 203
    assert check_dataset(tmp_path / "fixed").errors == 0


def test_nothing_here_needs_torch(voc: Voc) -> None:
    code = (
        "import sys; from boxwright.__main__ import main; "
        "code = main(['data', 'check', sys.argv[1]]); sys.exit(9 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(voc.folder)], capture_output=True, check=False)
    assert done.returncode == 0


def test_printable_keeps_letters_and_shows_the_rest() -> None:
    assert printable("grün 猫") == "grün 猫"
    assert printable(NASTY) == "\\x1b[31m<script>alert(1)</script>\\u202e"
    assert printable("a\udcff\n") == "a\\udcff\\n"


def test_thousands_of_faults_are_counted_and_few_are_told(voc: Voc) -> None:
    voc.add("train", "x", [("cat", (40, 6, 5, 50))] * 9000)
    checked = check_dataset(voc.folder)
    assert checked.findings.count("error") == 9000
    lines = list(report_lines(checked, limit=3))
    assert len(lines) < 60
    assert any("and 8,997 more" in line for line in lines)


def test_thousands_of_objects_in_one_place_take_no_age(voc: Voc) -> None:
    voc.add("train", "x", [("cat", (5 + n / 1e5, 6, 75, 56)) for n in range(4000)])
    started = time.monotonic()
    checked = check_dataset(voc.folder)
    assert kinds(checked) == {"near-duplicate": 3999}
    assert time.monotonic() - started < 30


def test_pictures_in_shards_are_looked_at_too(voc: Voc, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (H, W), np.uint8)).save(voc.folder / "train/images/g.png")
    voc.xml("train", "g", annotation([("cat", (5, 6, 40, 50))]))
    data = (voc.folder / "train/images/t1.png").read_bytes()
    (voc.folder / "valid/images/leak.png").write_bytes(data)
    voc.xml("valid", "leak", annotation([("cat", (5, 6, 40, 50))]))
    write_shards(open_dataset(voc.folder), tmp_path / "shards", size=1 << 20, tolerance={}, say=lambda _: None)
    checked = check_dataset(tmp_path / "shards", decode=True)
    assert kinds(checked) == kinds(check_dataset(voc.folder, decode=True)) == {"grey": 1, "leak": 1}
    list(report_lines(checked))
    (shard,) = (tmp_path / "shards").rglob("*train*.tar")
    spoilt = bytearray(shard.read_bytes())
    at = spoilt.index(data[40:80])
    spoilt[at : at + 4] = b"\0\0\0\0"
    shard.write_bytes(spoilt)
    assert kinds(check_dataset(tmp_path / "shards"))["unreadable-picture"] == 1


def test_an_ascii_terminal_takes_the_report(voc: Voc) -> None:
    voc.add("train", "grün", [("Kätzchen", (40, 6, 5, 50))])
    done = subprocess.run(
        [sys.executable, "-m", "boxwright", "data", "check", str(voc.folder)], capture_output=True, check=False,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 1
    assert b"gr\\xfcn.xml:4" in done.stdout
    done.stdout.decode("ascii")


def test_headers_that_are_cut_or_lie_give_no_traceback() -> None:
    from boxwright.data.check.headers import notes_of

    starts = {
        "JPEG": b"\xff\xd8\xff\xe0\xff\xff", "PNG": b"\x89PNG\r\n\x1a\n" + b"\0" * 9, "GIF": b"GIF89a" + b"\xff" * 8,
        "WebP": b"RIFF\0\0\0\0WEBPVP8X", "TIFF": b"II*\0" + struct.pack("<IH", 8, 60000), "BMP": b"BM",
    }  # fmt: skip
    for form, data in starts.items():
        for end in range(len(data) + 1):
            notes_of(BytesIO(data[:end]), form, f".{form.lower()}", 1)

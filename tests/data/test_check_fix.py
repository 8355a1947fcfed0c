"""A corrected copy has no faults, every change is listed, what nobody knows is left out, and the original stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from boxwright.__main__ import main
from boxwright.data.check import check_dataset
from boxwright.data.check.mend import mend_dataset
from boxwright.data.check.mend_voc import _turned  # type: ignore[attr-defined]
from boxwright.data.convert import convert_dataset
from boxwright.data.dataset import open_dataset
from boxwright.data.images import _ORIENT  # type: ignore[attr-defined]
from boxwright.types import UserError

from .test_check import LISTED, H, Voc, W, annotation, state_of

GOOD = [("cat", (5, 6, 40, 50)), ("dog", (44, 12, 70, 51))]


@pytest.fixture
def voc(tmp_path: Path) -> Voc:
    made = Voc(tmp_path / "data")
    for number in range(3):
        made.add("train", f"t{number}", GOOD)
    made.add("valid", "v0", GOOD)
    (made.folder / "data.yaml").write_text(LISTED.format("cat, dog", 2))
    return made


def boxes(data: Path, stem: str) -> list[list[float]]:
    """The boxes of a picture of train in a copy."""
    (record,) = [record for record in open_dataset(data).read("train").records if record.id == stem]
    return record.boxes.tolist()


def changes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "changes.jsonl").read_text().splitlines()]


def fix(voc: Voc, tmp_path: Path) -> Path:
    before = state_of(voc.folder)
    folder = tmp_path / "fixed"
    mend_dataset(voc.folder / "data.yaml", folder)
    assert state_of(voc.folder) == before
    checked = check_dataset(folder)
    assert [finding for finding in checked.findings if finding.level in ("error", "lost", "repaired")] == []
    return folder


def test_what_is_right_is_copied_byte_for_byte(voc: Voc, tmp_path: Path) -> None:
    folder = fix(voc, tmp_path)
    assert changes(folder) == []
    for inside in ("train/images/t0.png", "train/labels/t0.xml", "valid/labels/v0.xml"):
        assert (folder / inside).read_bytes() == (voc.folder / inside).read_bytes()
    assert not (folder / "train/labels/t0.xml").samefile(voc.folder / "train/labels/t0.xml")
    assert open_dataset(folder).classes == ("cat", "dog")


MENDED = {  # an object → its box in the copy, continuous edges, or None where it is left out
    "swapped in x": ((40, 6, 5, 50), [4, 5, 40, 50]),
    "swapped in both": ((40, 50, 5, 6), [4, 5, 40, 50]),
    "over the edge": ((5, 6, 90, 50), [4, 5, W, 50]),
    "counted from 0": ((0, 0, 40, 50), [0, 0, 40, 50]),
    "no area": ((5, 6, 5, 50), None),
    "outside": ((100, 6, 120, 50), None),
    "swapped, and past the edge then": ((499, 6, 5, 50), None),
    "swapped in x, past the edge in y": ((40, 6, 5, 90), None),
    "swapped, and to the edge": ((W + 1, 6, 5, 50), [4, 5, W, 50]),
    "no number": (("12,5", 6, 40, 50), None),
    "not finite": (("nan", 6, "inf", 50), None),
}


@pytest.mark.parametrize("what", MENDED)
def test_boxes(voc: Voc, tmp_path: Path, what: str) -> None:
    box, expected = MENDED[what]
    path = voc.add("train", "x", [("dog", (44, 12, 70, 51)), ("cat", box)])
    folder = fix(voc, tmp_path)
    assert boxes(folder, "x") == [[43, 11, 70, 51], *([expected] if expected else [])]
    (change,) = changes(folder)
    assert (change["split"], change["path"]) == ("train", str(path))
    (found,) = [found for found in check_dataset(voc.folder).findings if found.path == path] or [None]
    assert change["line"] == (found.line if found else 8)  # 0 0: within rounding no finding
    assert change["before"]
    assert (change["what"] == "object left out") == (expected is None)
    assert f"{path}:{change['line']}: {change['what']}" in (folder / "changes.txt").read_text()


def test_names(voc: Voc, tmp_path: Path) -> None:
    voc.add("train", "x", [("Cat", (5, 6, 40, 50)), (" dog\n", (44, 12, 70, 51)), ("emu", (9, 9, 30, 30))])
    folder = fix(voc, tmp_path)
    (record,) = [record for record in open_dataset(folder).read("train").records if record.id == "x"]
    assert record.labels.tolist() == [0, 1]
    assert [(change["what"], change["after"]) for change in changes(folder)] == [
        ("class spelled as in the list", "'cat'"), ("class name without space, in NFC", "'dog'"),
        ("object left out", ""),
    ]  # fmt: skip


def test_the_rest_of_a_mended_file_stays(voc: Voc, tmp_path: Path) -> None:
    text = annotation([("cat", (40, 6, 5, 50))]).replace(
        "</name>", "</name><!-- seen twice --><pose>Left</pose><part><name>head</name></part><difficult>1</difficult>"
    )
    voc.picture("train", "x")
    voc.xml("train", "x", text)
    folder = fix(voc, tmp_path)
    expected = text.replace("<xmin>40<", "<xmin>5<").replace("<xmax>5<", "<xmax>40<")
    assert (folder / "train/labels/x.xml").read_text() == expected


def test_objects_twice_and_several_boxes(voc: Voc, tmp_path: Path) -> None:
    voc.picture("train", "x")
    box = "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>40</xmax><ymax>50</ymax></bndbox>"
    other = box.replace("40", "41")
    cat = f"<object><name>cat</name>{box}</object>"
    same = cat.replace("cat", "dog").replace(box, box + box)
    voc.xml("train", "x", f"<annotation>{cat}{cat}{same}{cat.replace(box, box + other)}</annotation>")
    folder = fix(voc, tmp_path)
    assert boxes(folder, "x") == [[4, 5, 40, 50]] * 2  # a cat and a dog
    assert [change["what"] for change in changes(folder)].count("object left out") == 2


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_turn_with_their_picture(voc: Voc, tmp_path: Path, orientation: int) -> None:
    box = (5, 6, 40, 50)
    voc.add("train", "x", [("cat", box)])
    stored = np.zeros((H, W, 3), np.uint8)
    stored[5:50, 4:40] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(voc.folder / "train/images/x.png", exif=exif)
    folder = fix(voc, tmp_path)
    shown = _ORIENT[orientation](stored)[:, :, 0] > 0
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    assert boxes(folder, "x") == [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]
    assert _turned(orientation, (H, W))((1, 1, W, H)) == (1, 1, H, W)


def test_boxes_are_brought_to_their_pictures_scale(voc: Voc, tmp_path: Path) -> None:
    voc.add("train", "x", [("cat", (11, 21, 80, 100))], said=f"{2 * W}x{2 * H}")
    folder = fix(voc, tmp_path)
    assert boxes(folder, "x") == [[5, 10, 40, 50]]
    assert {change["what"] for change in changes(folder)} == {
        "boxes brought to the picture's scale", "box moved with its picture",
    }  # fmt: skip


def test_a_size_with_its_sides_swapped_is_believed_only_if_the_boxes_fit(voc: Voc, tmp_path: Path) -> None:
    voc.add("train", "fits", [("cat", (5, 6, 75, 50))], said=f"{H}x{W}")
    path = voc.add("train", "odd", [("cat", (5, 6, 40, 75))], said=f"{H}x{W}")
    folder = fix(voc, tmp_path)
    assert boxes(folder, "fits") == [[4, 5, 75, 50]]
    assert [change["what"] for change in changes(folder) if change["path"] == str(path)] == ["picture left out"]
    assert not (folder / "train/images/odd.png").exists()


def test_what_nobody_knows_is_left_out_with_its_reason(voc: Voc, tmp_path: Path) -> None:
    voc.add("train", "other", said="100x100")
    voc.picture("train", "alone")
    voc.xml("train", "orphan", annotation(GOOD))
    voc.picture("train", "broken")
    voc.xml("train", "broken", "<annotation>")
    voc.add("train", "html")
    (voc.folder / "train/images/html.png").write_bytes(b"<html>")
    folder = fix(voc, tmp_path)
    told = {Path(change["path"]).stem: change["before"] for change in changes(folder)}
    assert set(told) == {"other", "alone", "orphan", "broken", "html"}
    assert "not well-formed" in told["broken"]
    assert sorted(path.stem for path in (folder / "train/images").iterdir()) == ["t0", "t1", "t2"]


def test_nothing_is_written_over_inside_or_by_halves(voc: Voc, tmp_path: Path) -> None:
    before = state_of(tmp_path)
    for place in (voc.folder, voc.folder / "train", voc.folder / "train/images/inside", tmp_path / "data/new"):
        with pytest.raises(UserError):
            mend_dataset(voc.folder, place)
    assert state_of(tmp_path) == before
    for path in (voc.folder / "valid/labels").iterdir():
        path.write_text("<annotation>")
    with pytest.raises(UserError, match="nothing of 'val'"):
        mend_dataset(voc.folder, tmp_path / "fixed")
    assert not list(tmp_path.glob("fixed*"))


def test_a_failure_while_writing_leaves_nothing(voc: Voc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("boxwright.data.check.mend.fill", fail)
    with pytest.raises(OSError, match="No space"):
        mend_dataset(voc.folder, tmp_path / "fixed")
    assert not list(tmp_path.glob("fixed*"))


@pytest.mark.parametrize("form", ["coco", "yolo", "csv", "labelme"])
def test_other_formats_are_written_as_training_reads_them(voc: Voc, tmp_path: Path, form: Any) -> None:
    source = tmp_path / form
    convert_dataset(voc.folder / "data.yaml", source, to=form)
    (file,) = [path for path in sorted(source.rglob("*")) if path.is_file() and _has_boxes(path, form)][:1]
    damage(file, form)
    assert main(["data", "check", str(source)]) == 1
    before = state_of(source)
    assert main(["data", "check", str(source), "--fix", str(tmp_path / "fixed")]) == 1
    assert state_of(source) == before
    assert check_dataset(tmp_path / "fixed").errors == 0
    (change,) = changes(tmp_path / "fixed")
    assert change["path"] == str(file)


def _has_boxes(path: Path, form: str) -> bool:
    suffix = {"coco": ".json", "yolo": ".txt", "csv": ".csv", "labelme": ".json"}[form]
    return path.suffix == suffix and ("train" in path.name or "train" in path.parent.name)


def damage(file: Path, form: str) -> None:
    """One box that cannot be right."""
    text = file.read_text()
    if form == "yolo":
        words = text.split(" ", 2)
        text = " ".join([words[0], "x", words[2]])
    elif form == "csv":
        lines = text.splitlines()
        cells = lines[1].split(",")
        cells[4] = "x"
        text = "\n".join([lines[0], ",".join(cells), *lines[2:], ""])
    else:
        document = json.loads(text)
        if form == "coco":
            document["annotations"][0]["bbox"][2] = -5
        else:
            document["shapes"][0]["points"][0][0] = "x"
        text = json.dumps(document)
    file.write_text(text)


def test_the_command_says_what_it_did(voc: Voc, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc.add("train", "x", [("cat", (40, 6, 5, 50))])
    folder = tmp_path / "fixed"
    assert main(["data", "check", str(voc.folder), "--fix", str(folder), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fixed"]["changes"] == 1
    assert found["fixed"]["pictures"] == {"train": 4, "val": 1}
    assert main(["data", "check", str(folder)]) == 0
    assert main(["data", "check", str(voc.folder), "--fix", str(folder)]) == 2


def test_corners_that_count_from_0_are_written_from_1(make_voc: Any, tmp_path: Path) -> None:
    make_voc(tmp_path / "d", {f"{split}/a.png": [[9, 19, 30, 40]] for split in ("train", "valid")})  # 10 20 30 40
    (path := tmp_path / "data.yaml").write_text("path: d\nvoc_boxes: from 0\n")
    done = mend_dataset(path, tmp_path / "fixed")
    assert open_dataset(done.data).read("train").records[0].boxes.tolist() == [[10, 20, 31, 41]]
    assert "<xmin>11</xmin>" in (tmp_path / "fixed/train/labels/a.xml").read_text("utf-8")

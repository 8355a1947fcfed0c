"""Records → the files of a dataset in each format: `open_dataset` of their folder gives the same records back.

    voc      {train,valid,test}/{images,labels}/
    coco     {train,val,test}/  annotations/instances_{train,val,test}.json
    yolo     {images,labels}/{train,val,test}/
    labelme  {train,val,test}/, the json beside the picture
    csv      {train,val,test}/  {train,val,test}.csv

and in each a data.yaml that names the classes in their order. Pictures are not written here: see `convert`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from boxwright.data.formats.base import FormatName
from boxwright.data.formats.voc import write_annotation
from boxwright.types import Record

MARKS = ("difficult", "truncated", "crowd", "occluded", "pose")


class Named(NamedTuple):
    """A record, and what its picture is called below the folder of its split's pictures: its id and an extension."""

    name: str  # a/b.jpg
    record: Record


@dataclass(frozen=True)
class Writer:
    """How a format lays out a dataset, and what of a record it can hold."""

    pictures: str  # the folder of a split's pictures, `{}` being the split
    write: Callable[[Path, str, Sequence[Named], Sequence[str]], Iterable[str]]  # → the files that it wrote
    describe: Callable[[Sequence[str], Sequence[str]], dict[str, Any]]  # splits, classes → what data.yaml says
    marks: tuple[str, ...] = MARKS
    nested: bool = False  # whether pictures may lie in folders
    listed: bool = False  # whether they are found by the names that a file gives, whatever their extension
    closed: frozenset[str] = frozenset()  # names of folders that mean something to its readers, in lower case
    val: str = "val"  # what it calls that split
    slack: float = 0.0  # pixels by which an edge may come back otherwise, by rounding alone

    def split(self, name: str) -> str:
        """What a split is called in paths."""
        return self.val if name == "val" else name


def _fresh(folder: Path, inside: str) -> Path:
    """Where to write a file: what an earlier call left there is gone, and its folder is there."""
    path = folder / inside
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def _plain(value: float) -> float | int:
    """A number as people would write it."""
    return int(value) if value.is_integer() else value


def _short_form(form: FormatName, folders: Mapping[str, str], classes: Sequence[str], **more: Any) -> dict[str, Any]:
    return {**folders, **more, "format": form, "classes": list(classes)}


# --- Pascal VOC


def _write_voc(folder: Path, split: str, named: Sequence[Named], classes: Sequence[str]) -> Iterable[str]:
    for one in named:
        inside = f"{split}/labels/{one.record.id}.xml"
        write_annotation(_fresh(folder, inside), replace(one.record, image=Path(one.name)), classes)
        yield inside


def _describe_voc(splits: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    if list(splits) != ["train", "val"]:
        return _short_form("voc", {split: "valid" if split == "val" else split for split in splits}, classes)
    folders = {
        f"{split.upper()}_DIR_{kind.upper()}": f"{split}/{kind}"
        for split in ("train", "valid")
        for kind in ("images", "labels")
    }
    return {**folders, "CLASSES": list(classes), "NC": len(classes)}


# --- COCO


def _write_coco(folder: Path, split: str, named: Sequence[Named], classes: Sequence[str]) -> Iterable[str]:
    inside = f"annotations/instances_{split}.json"
    with _fresh(folder, inside).open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"info": {"description": "Written by boxwright data convert"}, "licenses": [],\n')
        _write_list(file, "images", map(_coco_image, range(1, len(named) + 1), named))
        file.write(",\n")
        _write_list(file, "annotations", _coco_annotations(named))
        file.write(",\n")
        _write_list(
            file, "categories", ({"id": n, "name": name, "supercategory": ""} for n, name in enumerate(classes, 1))
        )
        file.write("}\n")
    yield inside


def _write_list(file: TextIO, key: str, entries: Iterable[dict[str, Any]]) -> None:
    """One entry a line, each written as soon as it is made: a million take no memory."""
    file.write(f'"{key}": [')
    for number, entry in enumerate(entries):
        file.write(",\n" if number else "\n")
        file.write(json.dumps(entry))
    file.write("\n]")


def _coco_image(id: int, one: Named) -> dict[str, Any]:
    height, width = one.record.size
    return {"id": id, "file_name": one.name, "width": width, "height": height}


def _coco_annotations(named: Sequence[Named]) -> Iterable[dict[str, Any]]:
    """Marks beside `iscrowd` only where they are set; `ignore`, because other tools know it for `difficult`."""
    number = 0
    for image_id, (_, record) in enumerate(named, 1):
        for index, label in enumerate(record.labels.tolist()):
            number += 1
            x1, y1, x2, y2 = record.boxes[index].tolist()
            entry: dict[str, Any] = {
                "id": number,
                "image_id": image_id,
                "category_id": label + 1,
                "bbox": [_plain(x1), _plain(y1), _plain(x2 - x1), _plain(y2 - y1)],
                "area": _plain((x2 - x1) * (y2 - y1)),
                "iscrowd": int(record.crowd[index]),
                "segmentation": [],
            }
            if record.difficult[index]:
                entry |= {"difficult": 1, "ignore": 1}
            entry |= {mark: 1 for mark in ("truncated", "occluded") if getattr(record, mark)[index]}
            if record.pose[index]:
                entry["pose"] = str(record.pose[index])
            yield entry


def _describe_coco(splits: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    files = {split: f"annotations/instances_{split}.json" for split in splits}
    return _short_form("coco", files, classes, images={split: split for split in splits})


# --- YOLO


def _write_yolo(folder: Path, split: str, named: Sequence[Named], classes: Sequence[str]) -> Iterable[str]:
    for one in named:
        inside = f"labels/{split}/{one.record.id}.txt"
        height, width = one.record.size
        lines: list[str] = []
        for label, (x1, y1, x2, y2) in zip(one.record.labels.tolist(), one.record.boxes.tolist(), strict=True):
            numbers = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
            lines.append(" ".join([str(label), *map(repr, numbers)]) + "\n")  # repr: every digit that a float64 has
        _fresh(folder, inside).write_text("".join(lines), encoding="ascii", newline="\n")
        yield inside


def _describe_yolo(splits: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    return {**{split: f"images/{split}" for split in splits}, "nc": len(classes), "names": dict(enumerate(classes))}


# --- LabelMe


def _write_labelme(folder: Path, split: str, named: Sequence[Named], classes: Sequence[str]) -> Iterable[str]:
    for one in named:
        inside = f"{split}/{one.record.id}.json"
        height, width = one.record.size
        document = {
            "version": "5.5.0",  # of LabelMe, whose form this is
            "flags": {},
            "shapes": [_labelme_shape(one.record, index, classes) for index in range(len(one.record.labels))],
            "imagePath": one.name,
            "imageData": None,
            "imageHeight": height,
            "imageWidth": width,
        }
        _fresh(folder, inside).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8", newline="\n")
        yield inside


def _labelme_shape(record: Record, index: int, classes: Sequence[str]) -> dict[str, Any]:
    x1, y1, x2, y2 = map(_plain, record.boxes[index].tolist())
    flags = {mark: True for mark in MARKS if mark != "pose" and getattr(record, mark)[index]}
    pose = {"pose": str(record.pose[index])} if record.pose[index] else {}
    return {
        "label": classes[int(record.labels[index])],
        "points": [[x1, y1], [x2, y2]],
        "group_id": None,
        "description": "",
        "shape_type": "rectangle",
        "flags": flags,
        **pose,
    }


def _describe_labelme(splits: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    return _short_form("labelme", {split: split for split in splits}, classes)


# --- CSV

_COLUMNS = ("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax", *MARKS)


def _write_csv(folder: Path, split: str, named: Sequence[Named], classes: Sequence[str]) -> Iterable[str]:
    inside = f"{split}.csv"
    with _fresh(folder, inside).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(_COLUMNS)
        for name, record in named:
            height, width = record.size
            for index, label in enumerate(record.labels.tolist()):
                box = map(_plain, record.boxes[index].tolist())
                marks = (str(getattr(record, mark)[index]) if mark == "pose" else int(getattr(record, mark)[index])
                         for mark in MARKS)  # fmt: skip
                table.writerow([name, width, height, classes[label], *box, *marks])
            if not len(record.labels):
                table.writerow([name, width, height, *[""] * (len(_COLUMNS) - 3)])
    yield inside


def _describe_csv(splits: Sequence[str], classes: Sequence[str]) -> dict[str, Any]:
    return _short_form(
        "csv", {split: f"{split}.csv" for split in splits}, classes, images={split: split for split in splits}
    )


_OURS = frozenset(("train", "val", "test", "annotations"))  # a name that begins so may be looked for in these
# VOC: 1 is added to xmin, so what lies below 2**-29 of a pixel is rounded; YOLO: the centre and sides of a box near 0
# are, to 2**-52 of the picture's width.
WRITERS: Mapping[FormatName, Writer] = {
    "voc": Writer("{}/images", _write_voc, _describe_voc, val="valid", slack=2**-50),
    "labelme": Writer("{}", _write_labelme, _describe_labelme),
    "coco": Writer("{}", _write_coco, _describe_coco, nested=True, listed=True, closed=_OURS),
    "yolo": Writer(
        "images/{}", _write_yolo, _describe_yolo, marks=(), nested=True, slack=1e-9,
        closed=frozenset(("images", "jpegimages", "labels", "annotations")),
    ),
    "csv": Writer("{}", _write_csv, _describe_csv, nested=True, listed=True, closed=_OURS),
}  # fmt: skip

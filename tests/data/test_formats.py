"""Every format gives the same records for the same pictures, is recognised, and answers every mistake by name."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from boxwright.data.dataset import Dataset, Split, open_dataset
from boxwright.data.formats import FORMATS
from boxwright.data.formats.base import Annotation, Source
from boxwright.data.formats.pictures import NamedPictures
from boxwright.data.formats.voc import write_annotation
from boxwright.types import Fault, Record, UserError

CLASSES = ("cat", "dog")
# name: (height, width), objects of class, x1 y1 x2 y2, marks. Eighths are exact in all of the formats' units.
PICTURES: dict[str, tuple[tuple[int, int], list[tuple[str, tuple[float, ...], dict[str, Any]]]]] = {
    "a.jpg": ((64, 128), [("cat", (8, 16, 72, 48), {}), ("dog", (0, 0, 128, 64), {"truncated": True})]),
    "b.jpg": ((64, 64), []),
    "c d.png": ((32, 64), [("dog", (1.5, 2.25, 30, 31), {"difficult": True, "pose": "Left"})]),
    "é.jpg": ((128, 64), [("cat", (10, 20, 30, 40), {"occluded": True}), ("cat", (10, 20, 30, 41), {})]),
    "z.JPG": ((64, 64), [("dog", (4, 4, 60, 60), {"crowd": True}), ("cat", (0, 32, 32, 64), {})]),
}
Objects = list[tuple[str, tuple[float, ...], dict[str, Any]]]


def draw(folder: Path, names: list[str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or PICTURES:
        height, width = PICTURES[name][0]
        Image.new("RGB", (width, height), (90, 80, len(name))).save(folder / name)
    return folder


def dump(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), "utf-8")
    return path


def marks_of(objects: Objects, name: str) -> np.ndarray:
    return np.array([marks.get(name, False) for _, _, marks in objects], np.bool_)


def expected(folder: Path) -> dict[str, Record]:
    records: dict[str, Record] = {}
    for name, (size, objects) in PICTURES.items():
        records[Path(name).stem] = Record(
            id=Path(name).stem,
            image=folder / name,
            size=size,
            boxes=np.array([box for _, box, _ in objects], np.float32).reshape(-1, 4),
            labels=np.array([CLASSES.index(label) for label, _, _ in objects], np.int64),
            difficult=marks_of(objects, "difficult"),
            truncated=marks_of(objects, "truncated"),
            crowd=marks_of(objects, "crowd"),
            occluded=marks_of(objects, "occluded"),
            pose=np.array([marks.get("pose", "") for _, _, marks in objects], np.str_),
        )
    return records


# --- the same pictures, written by hand in each format


def coco_document() -> dict[str, Any]:
    images: list[Any] = []
    annotations: list[Any] = []
    for number, (name, (size, objects)) in enumerate(PICTURES.items()):
        images.append({"id": 90 - 7 * number, "file_name": name, "width": size[1], "height": size[0]})
        for label, (x1, y1, x2, y2), marks in objects:
            entry = {
                "id": 1000 - len(annotations),
                "image_id": 90 - 7 * number,
                "category_id": {"cat": 3, "dog": 18}[label],
            }
            entry |= {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": 1, "iscrowd": int(marks.get("crowd", 0))}
            if "difficult" in marks:
                entry |= {"ignore": 1}
            entry |= {"segmentation": {"counts": "abc", "size": list(size)}, "attributes": {**marks, "rotation": 0.0}}
            annotations.append(entry)
    categories = [
        {"id": 18, "name": "dog", "supercategory": "animal"},
        {"id": 3, "name": "cat"},
        {"id": 0, "name": "background"},
    ]
    return {"info": {}, "annotations": annotations, "images": images, "categories": categories}


def write_coco(folder: Path) -> Path:
    draw(folder / "images")
    return dump(folder / "coco.json", coco_document())


def write_labelme(folder: Path) -> Path:
    draw(folder)
    for name, (size, objects) in PICTURES.items():
        shapes = [
            {
                "label": label,
                "points": [[x2, y1], [x1, y2]],
                "shape_type": "rectangle",
                "flags": {mark: value for mark, value in marks.items() if mark != "pose"},
                "pose": marks.get("pose"),
            }
            for label, (x1, y1, x2, y2), marks in objects
        ]
        document = {"version": "5", "flags": {}, "shapes": shapes, "imagePath": f"..\\{name}", "imageData": "////"}
        dump(folder / f"{Path(name).stem}.json", {**document, "imageHeight": size[0], "imageWidth": size[1]})
    return folder


def write_csv(folder: Path) -> Path:
    draw(folder / "images")
    names = ["difficult", "truncated", "occluded", "is_crowd", "pose"]
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax", *names])
        for name, ((height, width), objects) in PICTURES.items():
            for label, box, marks in objects:
                flags = [marks.get(mark.removeprefix("is_"), "") for mark in names]
                writer.writerow([name, width, height, label, *box, *flags])
            if not objects:
                writer.writerow([name, width, height, *[""] * 10])
    return folder / "labels.csv"


def write_voc(folder: Path) -> Path:
    draw(folder / "images")
    (folder / "labels").mkdir()
    for stem, record in expected(folder / "images").items():
        write_annotation(folder / "labels" / f"{stem}.xml", record, CLASSES)
    return folder


def yolo_line(label: str, box: tuple[float, ...], size: tuple[int, int]) -> str:
    (x1, y1, x2, y2), (height, width) = box, size
    numbers = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
    return " ".join(map(str, (CLASSES.index(label), *numbers)))


def write_yolo(folder: Path) -> Path:
    draw(folder / "images")
    (folder / "labels").mkdir()
    for name, (size, objects) in PICTURES.items():
        lines = [yolo_line(label, box, size) for label, box, _ in objects]
        if lines:  # a picture without a file is one without objects
            (folder / "labels" / f"{Path(name).stem}.txt").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("\ufeffcat\ndog\n", "utf-8")
    return folder


WRITERS: dict[str, Callable[[Path], Path]] = {
    "voc": write_voc, "coco": write_coco, "yolo": write_yolo, "labelme": write_labelme, "csv": write_csv,
}  # fmt: skip


def everything(dataset: Dataset) -> dict[str, Record]:
    records = [record for name in ("train", "val") for record in dataset.read(name).records]
    assert len({record.id for record in records}) == len(records)
    return {record.id: record for record in records}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_reads_the_same(name: str, tmp_path: Path) -> None:
    dataset = open_dataset(WRITERS[name](tmp_path))
    assert dataset.classes == CLASSES
    found, wanted = everything(dataset), expected(tmp_path)
    assert found.keys() == wanted.keys()
    for stem, record in wanted.items():
        for field in ("size", "boxes", "labels", "difficult", "truncated", "crowd", "occluded", "pose"):
            if name == "yolo" and field not in ("size", "boxes", "labels"):
                continue
            ours, theirs = np.asarray(getattr(found[stem], field)), np.asarray(getattr(record, field))
            assert ours.dtype.kind == theirs.dtype.kind
            assert np.array_equal(ours, theirs), (stem, field)
        assert found[stem].image.name == record.image.name
    for split in ("train", "val"):
        assert dataset.read(split).faults == ()
    assert any("tenth" in note for note in dataset.notes)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_recognised_in_a_folder_and_by_its_name(name: str, tmp_path: Path) -> None:
    given = WRITERS[name](tmp_path / "data")
    folder = given if given.is_dir() else given.parent
    wanted = everything(open_dataset(given))
    for text in (
        f"path: data\nformat: {name}\n",
        "path: data\nformat: auto\n",
        f"train: {given.relative_to(tmp_path).as_posix()}\n",
    ):
        (tmp_path / "data.yaml").write_text(text)
        assert everything(open_dataset(tmp_path / "data.yaml")).keys() == wanted.keys()
    dataset = open_dataset(folder)
    assert everything(dataset).keys() == wanted.keys()
    title = FORMATS[name].title  # type: ignore[index]
    assert any(note.startswith(f"{title}: ") for note in dataset.notes)
    assert not any("not read" in note for note in dataset.notes)


def test_marks_left_out_of_a_record_are_not_set() -> None:
    boxes = np.array([[0, 0, 2, 2], [1, 1, 5, 5]], np.float32)
    flags = np.zeros(2, np.bool_)
    record = Record("a", Path("a.jpg"), (9, 9), boxes, np.zeros(2, np.int64), flags, flags)
    assert record.crowd.tolist() == record.occluded.tolist() == [False, False]
    assert record.pose.tolist() == ["", ""]
    assert replace(record, crowd=~flags).crowd.all()


def test_the_fingerprint_covers_crowds(tmp_path: Path) -> None:
    def prints() -> list[str]:
        dataset = open_dataset(path)
        return [dataset.fingerprint(dataset.read(name)) for name in ("train", "val")]

    path = write_coco(tmp_path)
    before = prints()
    path.write_text(path.read_text().replace('"iscrowd": 1', '"iscrowd": 0').replace('"crowd": true', '"x": 0'))
    assert prints() != before


# --- how people lay them out


def one(folder: Path, images: str, labels: str, suffix: str, text: str, name: str = "a") -> None:
    """One picture of 64x64 and its annotation file."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    (folder / labels).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(folder / images / f"{name}.jpg")
    (folder / labels / f"{name}{suffix}").write_text(text)


YOLO_LINE = "0 0.5 0.5 0.25 0.25\n"


def coco_of(*names: str, label: str = "cat") -> dict[str, Any]:
    return {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [8, 8, 16, 16]} for n in range(len(names))
        ],
        "categories": [
            {"id": 0, "name": "pets", "supercategory": "none"},  # as Roboflow writes: a parent that nothing is
            {"id": 1, "name": label, "supercategory": "pets"},
        ],
    }  # fmt: skip


def roboflow_coco(folder: Path) -> Path:
    for split in ("train", "valid"):
        one(folder, split, split, ".txt", "", split)
        (folder / split / f"{split}.txt").unlink()
        dump(folder / split / "_annotations.coco.json", coco_of(f"{split}.jpg"))
    return folder


def official_coco(folder: Path) -> Path:
    for split in ("train", "val"):
        one(folder, f"{split}2017", "annotations", ".txt", "", split)
        dump(folder / "annotations" / f"instances_{split}2017.json", coco_of(f"{split}.jpg"))
        dump(folder / "annotations" / f"captions_{split}2017.json", {"images": [], "annotations": []})
    return folder


def yolo_by_split(folder: Path) -> Path:
    for split in ("train", "val"):
        one(folder, f"images/{split}", f"labels/{split}", ".txt", YOLO_LINE, split)
    (folder / "obj.names").write_text("cat\n\n")
    return folder


def roboflow_yolo(folder: Path) -> Path:
    for split in ("train", "valid"):
        one(folder, f"{split}/images", f"{split}/labels", ".txt", YOLO_LINE, split)
    text = "train: ../train/images\nval: ../valid/images\nnc: 1\nnames: ['cat']\nroboflow: {license: MIT}\n"
    (folder / "data.yaml").write_text(text)
    return folder / "data.yaml"


def ultralytics_yolo(folder: Path) -> Path:
    for split in ("train", "val"):
        one(folder, f"images/{split}/deep", f"labels/{split}/deep", ".txt", YOLO_LINE, split)
    text = "path: .\ntrain: images/train\nval: images/val\ntest:\nnames:\n  0: cat\ndownload: https://x\n"
    (folder / "coco8.yaml").write_text(text.replace("test:\n", ""))
    return folder / "coco8.yaml"


def yolo_elsewhere(folder: Path) -> Path:
    for split in ("train", "val"):
        one(folder, f"set/{split}_pictures/images", f"set/{split}_pictures/labels", ".txt", YOLO_LINE, split)
    text = "train: set/train_pictures/images\nval: [set/val_pictures]\nnames: [cat]\n"
    (folder / "data.yaml").write_text(text)
    return folder


def darknet(folder: Path) -> Path:
    for split in ("train", "val"):
        one(folder, "obj", "obj", ".txt", YOLO_LINE, split)
        (folder / f"{split}.txt").write_text(f"/content/darknet/data/obj/{split}.jpg\r\n\r\n")
    (folder / "d.yaml").write_text("train: train.txt\nval: val.txt\nnames: [cat]\n")
    return folder / "d.yaml"


def csv_by_split(folder: Path) -> Path:
    for split in ("train", "test"):
        one(folder, "images", "images", ".txt", "", split)
        (folder / f"{split}_labels.csv").write_text(f"filename,class,xmin,ymin,xmax,ymax\n{split}.jpg,cat,8,8,24,24\n")
    (folder / "d.yaml").write_text("train: train_labels.csv\nval: test_labels.csv\nimages: images\n")
    return folder / "d.yaml"


def coco_by_yaml(folder: Path) -> Path:
    for split in ("train", "val"):
        one(folder, f"far/{split}", "json", ".txt", "", split)
        dump(folder / "json" / f"{split}.json", coco_of(f"old/place/{split}.jpg"))
    images = "images: {train: far/train, val: far/val}"
    (folder / "d.yaml").write_text(f"train: json/train.json\nval: json/val.json\n{images}\n")
    return folder / "d.yaml"


def labelme_by_split(folder: Path) -> Path:
    shape = {"label": "cat", "points": [[8, 8], [24, 24]], "shape_type": "rectangle"}
    for split in ("train", "val"):
        one(folder, f"{split}/images", f"{split}/annotations", ".json", json.dumps({"shapes": [shape]}), split)
    return folder


LAYOUTS = [
    roboflow_coco, official_coco, yolo_by_split, roboflow_yolo, ultralytics_yolo, yolo_elsewhere, darknet, csv_by_split,
    coco_by_yaml, labelme_by_split,
]  # fmt: skip


@pytest.mark.parametrize("lay_out", LAYOUTS)
def test_layouts_that_people_have(lay_out: Callable[[Path], Path], tmp_path: Path) -> None:
    dataset = open_dataset(lay_out(tmp_path))
    train, val = dataset.read("train"), dataset.read("val")
    assert dataset.classes == ("cat",)
    assert len(train.records) == len(val.records) == 1
    assert "train" in train.records[0].id
    assert len(val.records[0].boxes) == 1
    assert train.faults == val.faults == ()


def test_notes_say_what_was_recognised_and_why(tmp_path: Path) -> None:
    notes = "\n".join(open_dataset(yolo_by_split(tmp_path / "yolo")).notes)
    assert re.search(r"YOLO: 1 \.txt with lines of numbers in .*labels", notes)
    assert re.search(r"names are those of .*obj\.names", notes)
    (tmp_path / "csv").mkdir()
    dataset = open_dataset(write_csv(tmp_path / "csv"))
    dataset.read("train")
    notes = "\n".join(dataset.notes)
    assert "boxes are two corners, in xmin ymin xmax ymax, pixels counted from 0" in notes
    assert f"pictures are in {tmp_path / 'csv' / 'images'}" in notes
    assert "not used: download" in "\n".join(open_dataset(ultralytics_yolo(tmp_path / "u")).notes)


def test_of_two_formats_in_one_place_it_is_said_which_is_left(tmp_path: Path) -> None:
    write_voc(tmp_path)
    for line in ("", YOLO_LINE):
        (tmp_path / "labels" / "a.txt").write_text(line)
        notes = "\n".join(open_dataset(tmp_path).notes)
        assert f"Pascal VOC: 5 .xml in {tmp_path / 'labels'}" in notes
        assert ("YOLO's (1 .txt with lines of numbers) in the same place not read" in notes) == bool(line)
    shape = {"shapes": [BOX_SHAPE], "imagePath": "a.jpg"}
    dump(tmp_path / "labels" / "a.json", shape)
    assert "LabelMe's (1 .json with shapes) and YOLO's" in "\n".join(open_dataset(tmp_path).notes)
    (tmp_path / "classes.txt").write_text("cat\n")
    (tmp_path / "d.yaml").write_text("path: .\nformat: yolo\n")
    assert "not read" not in "\n".join(open_dataset(tmp_path / "d.yaml").notes)


@pytest.mark.parametrize("lists", [("trainval", "test"), ("train", "val"), ()])
def test_a_year_of_voc_says_what_it_was_known_by(lists: tuple[str, ...], tmp_path: Path) -> None:
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    xml = f"<annotation><object><name>cat</name>{box}</object></annotation>"
    for name in ("a", "b"):
        one(tmp_path, "VOC2007/JPEGImages", "VOC2007/Annotations", ".xml", xml, name)
    (tmp_path / "VOC2007/ImageSets/Main").mkdir(parents=True)
    for name, picture in zip(lists, "ab", strict=False):
        (tmp_path / f"VOC2007/ImageSets/Main/{name}.txt").write_text(f"{picture}\n")
    notes = open_dataset(tmp_path).notes
    assert notes[0] == f"Pascal VOC: Annotations and JPEGImages in {tmp_path / 'VOC2007'}"
    assert notes[1].startswith(f"training on {lists[0]}, validating on {lists[1]}" if lists else "no validation split")


def test_the_split_that_is_drawn_is_the_same_in_every_format(tmp_path: Path) -> None:
    drawn = set()
    for name, write in WRITERS.items():
        (tmp_path / name).mkdir()
        dataset = open_dataset(write(tmp_path / name))
        drawn.add(tuple(record.id for record in dataset.read("val").records))
    assert len(drawn) == 1


# --- mistakes


def read_all(data: Path, **options: Any) -> Split:
    """Both halves of a dataset without splits, as one; what is wrong is left out."""
    dataset = open_dataset(data)
    halves = [dataset.read(name, max_bad=1.0, skip_bad=True, **options) for name in ("train", "val")]
    return Split(
        "train",
        tuple(record for half in halves for record in half.records),
        tuple(dict.fromkeys(fault for half in halves for fault in half.faults)),
    )


def faults_of(data: Path, **options: Any) -> list[Fault]:
    return list(read_all(data, **options).faults)


DROP, MEND, SKIP = "dropped box", "repaired", "skipped image"
Edit = Callable[[dict[str, Any]], Any]


def first(**fields: Any) -> Edit:
    """Changes the first annotation."""
    return lambda document: document["annotations"][0].update(fields)


def boxed(*bbox: Any) -> Edit:
    return first(bbox=list(bbox))


def image(number: int, name: str) -> Edit:
    """Adds a picture."""
    return lambda document: document["images"].append({"id": number, "file_name": name})


def again(document: dict[str, Any]) -> None:
    document["annotations"].append(document["annotations"][0])


def another_cat(document: dict[str, Any]) -> None:
    document["categories"].append({"id": 4, "name": " cat"})


def two_cats(document: dict[str, Any]) -> None:
    another_cat(document)
    next(entry for entry in document["annotations"] if entry["category_id"] == 3)["category_id"] = 4


def without_bbox(segmentation: Any) -> Edit:
    return first(bbox=None, segmentation=segmentation)


BAD_COCO: list[tuple[Edit, str, str]] = [
    (boxed(8, 8, 0, 5), "annotation 1000: has no area", DROP),
    (boxed(8, 8, -4, 5), "annotation 1000: has no area", DROP),
    (boxed(500, 8, 4, 5), "annotation 1000: box .* inside the 128x64", DROP),
    (boxed(8, 8, float("nan"), 5), r"bbox is \[8, 8, nan, 5\]", DROP),
    (boxed(8, 8, float("inf"), 5), "not four numbers", DROP),
    (boxed(8, 8, "x", True), "not four numbers", DROP),
    (boxed(8, 8, 10**400, 5), "not four numbers", DROP),
    (without_bbox(None), "no bbox, and no polygon", DROP),
    (without_bbox({"counts": [5, 3, 90], "size": [64, 128]}), "segmentation is no polygon .*: write a bbox", DROP),
    (without_bbox([[8, 8, "x", 9]]), "segmentation is no polygon", DROP),
    (another_cat, r"categories 3 \(4 annotations\), 4 \(0 annotations\) are all called 'cat': read as one", "noted"),
    (boxed(-9, 8, 30, 5), "box -9 8 21 13 leaves the 128x64", MEND),
    (first(iscrowd="maybe"), "iscrowd is 'maybe': taken as 0", MEND),
    (again, "annotation id 1000 is there 2 times", MEND),
    (again, "is in the file twice: same class, same box", DROP),
    (first(image_id=4), "annotation 1000: image_id 4 is not in images", DROP),
    (lambda d: d["annotations"].append(7), r"annotations\[7\] has no image_id", DROP),
    (image(5, "gone.jpg"), "image 5: there is no 'gone.jpg'", SKIP),
    (image(5, "../../../etc/passwd"), "image 5: there is no", SKIP),
    (image(5, "x\ud800\0.jpg"), "image 5: there is no", SKIP),
    (image(5, "a.jpg"), "images 90 and 5 are both 'a.jpg'", MEND),
    (image(90, "a.jpg"), "image 90 is there twice", MEND),
    (lambda d: d["images"].append({"file_name": "a.jpg"}), r"images\[5\] has no id", SKIP),
    (lambda d: d["images"][0].update(width=64, height=128), "image 90: it is stated to be 64x128.*swapped", SKIP),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "reason", "action"), BAD_COCO)
def test_coco_mistakes_are_named(edit: Edit, reason: str, action: str, tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    document = coco_document()
    edit(document)
    split = read_all(dump(path, document))
    check_sound(split)
    found = [fault for fault in split.faults if re.search(reason, fault.reason) and fault.action == action]
    assert len(found) == 1, [str(fault) for fault in split.faults]
    assert found[0].path == path
    assert len({record.image for record in split.records}) == len(split.records) >= 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("categories"), "is no COCO json: it has no list 'categories'"),
        (lambda d: d.update(images={}), "it has no list 'images'"),
        (lambda d: d.update(images=[]), "lists no pictures"),
        (image(90, "b.jpg"), "image id 90 is given to 'a.jpg' and to 'b.jpg'"),
        (lambda d: d["categories"].append({"id": 3, "name": "cow"}), "category id 3 is given to 'cat' and to 'cow'"),
        (lambda d: d["categories"].append({"id": 4, "name": "a\nb"}), r"categories\[3\] has no id, or no name"),
        (two_cats, r"categories 3 \(3 annotations\), 4 \(1 annotations\) are all called 'cat'"),
        (lambda d: d["annotations"][0].update(category_id=4), r"'category_id 4' \(1 objects\)"),
        (lambda d: [i.update(file_name="no/" + i["file_name"] + "x") for i in d["images"]], "none of its 5 pictures"),
    ],
)  # fmt: skip
def test_a_coco_file_that_cannot_be_read_is_refused(edit: Edit, message: str, tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    document = coco_document()
    edit(document)
    dump(path, document)
    with pytest.raises(UserError) as caught:
        read_all(path)
    assert str(caught.value).startswith(str(path))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


HOSTILE: list[tuple[bytes, str]] = [
    (b"", "is empty"),
    (b'{"images": [\n{]', ":2: is no JSON"),
    (b'{"images": "\xff"}', "save it as UTF-8"),
    (b'{"images": ' + b"[" * 200_000, "nested too deep"),
    (b'{"images": ' + b'{"a":' * 200_000, "nested too deep"),
    (b'{"images": [' + b"9" * 5000 + b"]}", "integer of thousands of digits"),
    (b'[{"images": 1}]', "is no COCO json"),
    (b"\x89PNG", "is no (JSON|UTF-8)"),
]


@pytest.mark.parametrize(("data", "message"), HOSTILE)
def test_hostile_json_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(path).read("train")
    assert str(caught.value).startswith(str(path))
    folder = write_labelme(tmp_path / "labelme")
    (folder / "a.json").write_bytes(data)
    faults = faults_of(folder)
    assert [fault.action for fault in faults] == ["skipped image"]
    assert faults[0].path == folder / "a.json"


def test_json_in_other_encodings(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps(coco_document(), ensure_ascii=False), encoding)
        assert len(read_all(path).records) == 5


def test_a_coco_box_may_come_from_its_outline(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    document = coco_document()
    first, second = document["annotations"][:2]
    del first["bbox"]
    first["segmentation"] = [[8, 16, 72, 20, 30, 48], [10, 17, 11, 17, 11, 18]]
    second |= {"bbox": [], "segmentation": [[0, 0, 128, 0, 128, 64, 0, 64]]}
    assert_same(read_all(dump(path, document)), tmp_path)


def test_coco_ids_of_any_kind(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    document = coco_document()
    for number, entry in enumerate(document["annotations"]):
        entry["image_id"] = (str, float, int)[number % 3](entry["image_id"])
        entry["category_id"] = (float, int, str)[number % 3](entry["category_id"])
    assert_same(read_all(dump(path, document)), tmp_path)


def assert_same(split: Split, folder: Path) -> None:
    wanted = expected(folder)
    assert split.faults == ()
    assert {record.id: record.boxes.tolist() for record in split.records} == {
        stem: record.boxes.tolist() for stem, record in wanted.items()
    }


@pytest.mark.parametrize(
    ("line", "reason", "action"),
    [
        ("0 32 16 8 8", "no fraction of the picture; are these pixels", "dropped box"),
        ("0 0.5 0.5 0 0.5", "has no area", "dropped box"),
        ("0 0.5 0.5 -0.2 0.5", "has no area", "dropped box"),
        ("0 0.5 nan 0.5 0.5", "'nan' is no number", "dropped box"),
        ("0 0.5 1_0 0.5 0.5", "'1_0' is no number", "dropped box"),
        ("0 0.5 0.5", "has 2 numbers after its class", "dropped box"),
        ("0 0.5 0.5 0.2 0.2 0.9", "has 5 numbers after its class", "dropped box"),
        ("0.5 0.5 0.5 0.2 0.2", "class is '0.5'", "dropped box"),
        ("-1 0.5 0.5 0.2 0.2", "class is '-1'", "dropped box"),
        ("cat 0.5 0.5 0.2 0.2", "class is 'cat'", "dropped box"),
        ("0 0.9 0.5 0.4 0.2", "leaves the 128x64 picture", "repaired"),
        ("0 0.3125 0.5 0.5 0.5", "is in the file twice", "dropped box"),
    ],
)
def test_yolo_mistakes_are_named(line: str, reason: str, action: str, tmp_path: Path) -> None:
    folder = write_yolo(tmp_path)
    path = folder / "labels" / "a.txt"
    path.write_text(path.read_text() + "\n" + line)
    split = read_all(folder)
    check_sound(split)
    assert [(fault.path, fault.line, fault.action) for fault in split.faults] == [(path, 4, action)]
    assert re.search(reason, split.faults[0].reason)


def test_a_yolo_class_without_a_name_is_refused(tmp_path: Path) -> None:
    folder = write_yolo(tmp_path)
    (folder / "labels" / "b.txt").write_text(YOLO_LINE.replace("0 ", "7 ", 1))
    with pytest.raises(UserError, match=r"b\.txt:1: .*'number 7' \(1 objects\)"):
        read_all(folder)
    assert len(read_all(folder, ignore_unknown=True).records) == 5


def test_a_yolo_outline_is_a_box(tmp_path: Path) -> None:
    folder = write_yolo(tmp_path)
    path = folder / "labels" / "a.txt"
    path.write_text(path.read_text().replace(path.read_text().split("\n")[0], "0 0.0625 0.25 0.5625 0.3 0.4 0.75"))
    assert_same(read_all(folder), tmp_path)


def test_yolo_answers_what_is_missing(tmp_path: Path) -> None:
    folder = write_yolo(tmp_path)
    orphan = folder / "labels" / "orphan.txt"
    orphan.write_text(YOLO_LINE)
    assert [fault.path for fault in faults_of(folder)] == [orphan]
    orphan.unlink()
    (folder / "labels" / "a.txt").write_bytes(b"\xff\xfe\xff")
    assert [fault.action for fault in faults_of(folder)] == ["skipped image"]
    (folder / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"nothing says what their classes are called.*Write classes\.txt"):
        open_dataset(folder)
    (folder / "classes.txt").write_text("cat\ncat\n")
    with pytest.raises(UserError, match=r"classes\.txt:2: 'cat' is there twice"):
        open_dataset(folder)
    (folder / "classes.txt").write_text("cat\ndog\n")
    shutil.rmtree(folder / "labels")
    (tmp_path / "d.yaml").write_text("train: images\nnames: [cat]\n")
    with pytest.raises(UserError, match=r"not one of the 5 pictures .* has a label file: looked in"):
        open_dataset(tmp_path / "d.yaml").read("train")
    (tmp_path / "train.txt").write_text("images/a.jpg\nimages/nine.jpg\n")
    (tmp_path / "d.yaml").write_text("train: train.txt\nnames: [cat]\n")
    with pytest.raises(UserError, match=r"train\.txt lists 1 pictures that are not there: 'images/nine\.jpg'"):
        open_dataset(tmp_path / "d.yaml").read("train")


def test_names_with_holes(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "d.yaml").write_text("train: images\nnames: {1: dog, 5: cow, 0: cat}\nnc: 6\n")
    dataset = open_dataset(tmp_path / "d.yaml")
    assert dataset.classes == ("cat", "dog", "cow")
    assert_same(read_all(tmp_path / "d.yaml"), tmp_path)
    assert [record.labels.tolist() for record in dataset.with_classes(["dog"]).read("val", ignore_unknown=True).records]


BOX_SHAPE = {"label": "cat", "shape_type": "rectangle", "points": [[8, 16], [40, 48]]}


@pytest.mark.parametrize(
    ("shape", "reason", "action"),
    [
        ({"points": [[8, 16], [8, 48]]}, "has no area inside", "dropped box"),
        ({"points": [[8, 16]]}, "not two or more pairs", "dropped box"),
        ({"points": [[8, 16, 3], [9, 9]]}, "not two or more pairs", "dropped box"),
        ({"points": None}, "not two or more pairs", "dropped box"),
        ({"points": [[8, 16], [float("nan"), 48]]}, "not two numbers", "dropped box"),
        ({"points": [[8, 16], [400, 48]]}, "leaves the 128x64 picture", "repaired"),
        ({"shape_type": "point", "points": [[8, 16]]}, "a point has no box", "dropped box"),
        ({"label": None}, "has no label", "dropped box"),
        ({"shape_type": "rectangel"}, "shape_type is 'rectangel', which is none of rectangle, polygon", "dropped box"),
        ({"shape_type": ["rectangle"]}, "which is none of rectangle, polygon", "dropped box"),
        ({"shape_type": "circle", "points": [[8, 16], [9, 9], [1, 1]]}, "a circle has two points", "dropped box"),
        ({"flags": {"difficult": "maybe"}}, "difficult is 'maybe'", "repaired"),
    ],
)  # fmt: skip
def test_labelme_mistakes_are_named(shape: dict[str, Any], reason: str, action: str, tmp_path: Path) -> None:
    folder = write_labelme(tmp_path)
    path = folder / "a.json"
    document = json.loads(path.read_text())
    document["shapes"] += [{**BOX_SHAPE, **shape}]
    split = read_all(dump(path, document).parent)
    check_sound(split)
    assert [(fault.path, fault.action) for fault in split.faults] == [(path, action)]
    assert re.search(r"shapes\[2\]: .*" + reason, split.faults[0].reason)


def test_labelme_shapes(tmp_path: Path) -> None:
    folder = write_labelme(tmp_path)
    shapes = [
        {"label": "cat", "shape_type": "polygon", "points": [[8, 16], [40, 20], [10, 48]]},
        {"label": "dog", "shape_type": "circle", "points": [[30, 30], [33, 34]]},
        {"label": "dog", "points": [[1, 1], [9, 1], [9, 9], [1, 9]]},
    ]
    dump(folder / "b.json", {"shapes": shapes})
    found = {record.id: record for record in read_all(folder).records}["b"]
    assert found.boxes.tolist() == [[8, 16, 40, 48], [25, 25, 35, 35], [1, 1, 9, 9]]


def test_labelme_finds_a_picture_by_its_path_but_never_outside(tmp_path: Path) -> None:
    folder = write_labelme(tmp_path / "in")
    (folder / "a.json").rename(folder / "other.json")
    assert_same(read_all(folder), folder)
    dump(folder / "wrong.json", {"shapes": [], "imagePath": "../../etc/passwd"})
    assert [(fault.path.name, fault.action) for fault in faults_of(folder)] == [("wrong.json", "skipped image")]
    with pytest.raises(UserError, match="annotation of one picture: give its folder"):
        open_dataset(folder / "wrong.json")


CSV_HEAD = "filename,class,xmin,ymin,xmax,ymax"
OPEN_QUOTE = r'labels\.csv:3: is no CSV: .*A " is opened in this row and not closed .*: lines 3 to 4 would be one'


@pytest.mark.parametrize(
    ("text", "note"),
    [
        (f"{CSV_HEAD}\na.jpg,cat,8,16,72,48\n", "two corners, in xmin ymin xmax ymax, pixels"),
        ("\ufeffimage_path;x1;y1;x2;y2;label\r\n/old/disk/a.jpg;8;16;72;48;cat\r\n", "two corners, in x1 y1 x2 y2"),
        ("ImageID,Source,LabelName,XMin,XMax,YMin,YMax\na,x,cat,0.0625,0.5625,0.25,0.75\n", "fractions of the picture"),
        ("image\tx\ty\tw\th\tname\na.jpg\t8\t16\t64\t32\tcat\n", "a corner and sides, in x y w h"),
        ("img,cx,cy,width,height,category\na.jpg,40,32,64,32,cat\n", "the centre and sides, in cx cy width height"),
        ('image_id,width,height,bbox,class\na,128,64,"[8.0, 16.0, 64.0, 32.0]",cat\n', "x y width height, in bbox"),
        ("a.jpg,8,16,72,48,cat\n", "two corners, in x1 y1 x2 y2"),
        ("a.jpg,128,64,cat,8,16,72,48\n", "two corners, in xmin ymin xmax ymax"),
        ("cat,8,16,64,32,a.jpg,128,64\n", "a corner and sides, in x y w h"),
    ],
)
def test_the_dialects_of_csv(text: str, note: str, tmp_path: Path) -> None:
    draw(tmp_path, ["a.jpg"])
    (tmp_path / "labels.csv").write_text(text, "utf-8")
    assert FORMATS["csv"].sign([tmp_path / "labels.csv"])
    reader = FORMATS["csv"].open(Source(None, tmp_path / "labels.csv", format="csv"))
    (item,) = reader.items()
    found = reader.read(item, {"cat": 0}, (64, 128))
    assert reader.faults == item.faults == found.faults == ()
    assert (item.id, item.image) == ("a", tmp_path / "a.jpg")
    assert found.boxes.tolist() == [[8, 16, 72, 48]]
    assert reader.class_counts() == {"cat": 1}
    assert any(note in said for said in reader.notes), reader.notes


@pytest.mark.parametrize(
    ("row", "reason", "action"),
    [
        ("a.jpg,cat,72,16,8,48", "xmin 72 is greater than xmax 8", "dropped box"),
        ("a.jpg,cat,8,16,8,48", "xmin and xmax are both 8", "dropped box"),
        ("a.jpg,cat,8,16,inf,48", "xmax is 'inf', which is no number", "dropped box"),
        ("a.jpg,cat,8,,72,48", "ymin is '', which is no number", "dropped box"),
        ("a.jpg,cat,8,16,720,48", "leaves the 128x64 picture", "repaired"),
        ("a.jpg,,8,16,72,49", "names no class", "dropped box"),
        ("a.jpg,cat", "row has 2 columns", "dropped box"),
        (",cat,8,16,72,48", "names no picture", "dropped box"),
        ("a.jpg,dog,0,0,128,64", "is in the file twice", "dropped box"),
        ("gone.jpg,cat,8,16,72,48", "there is no 'gone.jpg'", "skipped image"),
    ],
)
def test_csv_mistakes_are_named(row: str, reason: str, action: str, tmp_path: Path) -> None:
    draw(tmp_path)
    path = tmp_path / "labels.csv"
    good = [f"{name},dog,0,0,{width},{height}" for name, ((height, width), _) in PICTURES.items()]
    path.write_text("\n".join([CSV_HEAD, *good, "", row]), "utf-8")
    split = read_all(path)
    check_sound(split)
    assert [(fault.path, fault.line, fault.action) for fault in split.faults] == [(path, 8, action)]
    assert re.search(reason, split.faults[0].reason)
    assert len(split.records) == 5


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"a,b\n1,2\n", "columns 'a b' are not understood: write a first line of names"),
        (f"{CSV_HEAD}\n".encode(), "has no row"),
        (f"{CSV_HEAD}\na.jpg,c\xe9,1,2,3,4\n".encode("latin-1"), ":2: is no UTF-8 text"),
        (f'{CSV_HEAD}\na.jpg,"{"x" * 200_000}",1,2,30,40\n'.encode(), "is no CSV: field larger"),
        (f"{CSV_HEAD}\nnine.jpg,cat,1,2,30,40\n".encode(), "none of its 1 pictures is there"),
        (f'{CSV_HEAD}\na.jpg,cat,1,2,9,9\na.jpg,"cat,1,2,30,40\nb.jpg,cat,1,2,3,4\n'.encode(), OPEN_QUOTE),
        (f'{CSV_HEAD}\na.jpg,cat,1,2,9,9\na.jpg,"cat,1,2,30,40\nb.jpg,"cat",1,2,3,4\n'.encode(), OPEN_QUOTE),
        (f'{CSV_HEAD}\na.jpg,cat,1,2,9,9\na.jpg,cat,1,2,30,"40\n'.encode(), ":3: .*is opened in this row"),
    ],
)
def test_a_csv_that_cannot_be_read_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    draw(tmp_path, ["a.jpg"])
    (tmp_path / "labels.csv").write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(tmp_path / "labels.csv").read("train")
    assert str(caught.value).startswith(str(tmp_path / "labels.csv"))


def test_quotes_that_swallow_rows_and_close_are_told(tmp_path: Path) -> None:
    """The file is well formed as it stands: two rows between a quote too much and the next one are one row."""
    draw(tmp_path, ["a.jpg", "b.jpg"])
    path = tmp_path / "labels.csv"
    rows = ["a.jpg,cat,1,2,9,9", 'b.jpg,"cat,1,2,9,9', 'a.jpg,cat",1,2,30,40', "b.jpg,cat,1,2,9,9"]
    path.write_text("\n".join([CSV_HEAD, *rows]), "utf-8")
    with pytest.raises(UserError, match=r'labels\.csv:3: a " holds several lines together as one row'):
        open_dataset(path).read("train")
    split = read_all(path)
    assert [(fault.line, fault.wrong) for fault in split.faults] == [(3, True)]
    assert sum(len(record.boxes) for record in split.records) == 2


def test_quotes_around_what_needs_them_are_read(tmp_path: Path) -> None:
    draw(tmp_path, ["a.jpg"])
    path = tmp_path / "labels.csv"
    path.write_text(f'{CSV_HEAD},note\n"a.jpg","a ""big"", grey cat",1,2,30,40,"seen\nfrom below"\n', "utf-8")
    reader = FORMATS["csv"].open(Source(None, path, format="csv"))
    assert reader.class_counts() == {'a "big", grey cat': 1}
    assert reader.faults == ()


def test_a_csv_is_recognised_by_its_beginning_alone(tmp_path: Path) -> None:
    """What is looked at first may end inside of quotes."""
    path = tmp_path / "labels.csv"
    row = 'a.jpg,"cat, grey",1,2,30,40\n'
    for shift in range(len(row)):
        path.write_text(f"{CSV_HEAD}\n{'x' * shift},,,,,\n" + row * 3000, "utf-8")
        assert FORMATS["csv"].sign([path])


def test_what_no_record_holds_is_counted(tmp_path: Path) -> None:
    def unread(data: Path) -> dict[str, int]:
        dataset = open_dataset(data)
        dataset.read("train", max_bad=1.0)
        return dict(dataset.unread)

    document = coco_of("train.jpg")
    document["annotations"][0] |= {"segmentation": [[8, 8, 24, 8, 24, 24]], "keypoints": [1, 1, 2]}
    dump(official_coco(tmp_path / "coco") / "annotations/instances_train2017.json", document)
    assert unread(tmp_path / "coco") == {"outlines": 1, "sets of key points": 1}
    labels = labelme_by_split(tmp_path / "labelme") / "train/annotations/train.json"
    circle = {"label": "cat", "points": [[30, 30], [33, 34]], "shape_type": "circle"}
    dump(labels, {"shapes": [BOX_SHAPE, circle, circle | {"points": [[8, 8], [20, 20]]}]})
    assert unread(tmp_path / "labelme") == {"circles": 2}
    labels = yolo_by_split(tmp_path / "yolo") / "labels/train/train.txt"
    labels.write_text(f"{YOLO_LINE}0 0.1 0.1 0.9 0.1 0.9 0.9\n")
    assert unread(tmp_path / "yolo") == {"outlines": 1}
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>"
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>40</xmax><ymax>40</ymax></bndbox>"
    xml = f"<annotation><object><name>cat</name>{box}{part}{part}</object></annotation>"
    for split in ("train", "valid"):
        one(tmp_path / "voc", f"{split}/images", f"{split}/labels", ".xml", xml, split)
    assert unread(tmp_path / "voc") == {"parts of objects": 2}


def test_a_folder_that_lacks_what_is_asked_for(tmp_path: Path) -> None:
    draw(tmp_path / "data" / "images")
    (tmp_path / "d.yaml").write_text("path: data\nformat: coco\n")
    with pytest.raises(UserError, match=r"no COCO file in .*data: looked for \*\.json"):
        open_dataset(tmp_path / "d.yaml")


def test_only_crowds_are_nothing_to_train_on(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    document = coco_document()
    for entry in document["annotations"]:
        entry["iscrowd"] = 1
    with pytest.raises(UserError, match="0 objects to train on"):
        open_dataset(dump(path, document)).read("train")


def test_several_files_of_a_kind_are_a_question(tmp_path: Path) -> None:
    for name in ("one", "two"):
        one(tmp_path, "images", ".", ".json", json.dumps(coco_of(f"{name}.jpg")), name)
    with pytest.raises(UserError, match=r"has one\.json; two\.json\. Say in a data YAML which are train and val"):
        open_dataset(tmp_path)


def test_training_and_validation_stay_apart_in_files_too(tmp_path: Path) -> None:
    draw(tmp_path / "images")
    for name in ("train", "val"):
        dump(tmp_path / f"{name}.json", coco_document())
    with pytest.raises(UserError, match="train and val share 5 pictures"):
        open_dataset(tmp_path).read("train")


# --- whatever comes


def check_sound(split: Split | Annotation, size: tuple[int, int] | None = None, classes: int = 2) -> None:
    for record in split.records if isinstance(split, Split) else (split,):
        height, width = size or record.size  # type: ignore[union-attr]
        boxes = record.boxes
        assert (boxes.dtype, boxes.shape) == (np.float32, (len(record.labels), 4))
        for marks in (record.difficult, record.truncated, record.crowd, record.occluded, record.pose):
            assert marks.shape == record.labels.shape
        assert np.isfinite(boxes).all()
        assert (boxes >= 0).all()
        assert (boxes <= [width, height, width, height]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((record.labels >= 0) & (record.labels < classes)).all()
    for fault in split.faults:
        assert fault.reason
        assert "\n" not in fault.reason


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-10, 300), st.floats(), st.text(max_size=4), st.just(10**4000),
    st.sampled_from(["a.jpg", "b.jpg", "cat", "rectangle", "circle", "1", 90, 3, 18]),
)  # fmt: skip
keys = st.text(max_size=3)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=8,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value in a document."""
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [path, *(place for key in keys for place in places(document[key], (*path, key)))]


def damaged(document: Any, edits: list[tuple[int, Any]]) -> Any:
    for number, value in edits:
        *way, last = (options := [place for place in places(document) if place])[number % len(options)]
        inside = document
        for key in way:
            inside = inside[key]
        inside[last] = value
    return document


edits = st.lists(st.tuples(st.integers(0, 10**6), values), max_size=4)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each format, to be written over."""
    folder = tmp_path_factory.mktemp("fuzzed")
    for name, write in WRITERS.items():
        (folder / name).mkdir()
        write(folder / name)
    return folder


def read_or_refuse(name: str, folder: Path, file: Path) -> None:
    """Every picture of a source is read to sound boxes, or the source is refused."""
    images = folder / "images" if (folder / "images").is_dir() else folder
    annotations = file if FORMATS[name].one_file else file.parent  # type: ignore[index]
    try:
        reader = FORMATS[name].open(Source(images, annotations, format=name, names=CLASSES))  # type: ignore[index,arg-type]
        reader.class_counts()
        for item in reader.items():
            assert item.image is None or item.image.parent == images
            if item.image and not item.skipped:
                size = (64, 128) if item.id == "a" else (64, 64)
                check_sound(reader.read(item, {"cat": 0, "dog": 1}, size), size)
            assert item.image or item.skipped
        open_dataset(file if FORMATS[name].one_file else folder).read("train", max_bad=1.0)  # type: ignore[index]
    except UserError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said


@settings(max_examples=150, deadline=None)
@given(edits=edits)
def test_damaged_coco_gives_sound_boxes_or_is_refused(edits: list[tuple[int, Any]], fuzzed: Path) -> None:
    path = fuzzed / "coco" / "coco.json"
    path.write_text(json.dumps(damaged(coco_document(), edits)))
    read_or_refuse("coco", fuzzed / "coco", path)


@settings(max_examples=150, deadline=None)
@given(edits=edits)
def test_damaged_labelme_gives_sound_boxes_or_faults(edits: list[tuple[int, Any]], fuzzed: Path) -> None:
    outline = {"label": "dog", "points": [[1, 1], [9, 9], [3, 30]], "flags": {"difficult": 1}}
    document = {"shapes": [dict(BOX_SHAPE), outline], "imagePath": "a.jpg", "imageWidth": 128, "imageHeight": 64}
    path = fuzzed / "labelme" / "a.json"
    path.write_text(json.dumps(damaged(document, edits)))
    read_or_refuse("labelme", fuzzed / "labelme", path)


texts = st.one_of(st.integers(-3, 300), st.floats(), st.floats(0, 1), st.text(max_size=4)).map(str)


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.lists(texts, max_size=9).map(" ".join), max_size=6), noise=st.binary(max_size=6))
def test_any_text_is_read_as_yolo_or_faults(lines: list[str], noise: bytes, fuzzed: Path) -> None:
    path = fuzzed / "yolo" / "labels" / "a.txt"
    path.write_bytes("\n".join(["1 0.5 0.5 0.5 0.5", *lines]).encode("utf-8", "replace") + noise)
    read_or_refuse("yolo", fuzzed / "yolo", path)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(st.one_of(texts, st.sampled_from(["a.jpg", "cat", '"', ";"])), max_size=8), max_size=6),
    head=st.sampled_from(
        [CSV_HEAD, "image,x,y,w,h,label", "path,cx,cy,w,h,class", "file,bbox,class", "a.jpg,1,2,9,9,cat"]
    ),
    noise=st.binary(max_size=6),
)
def test_any_table_is_read_or_refused(rows: list[list[str]], head: str, noise: bytes, fuzzed: Path) -> None:
    path = fuzzed / "csv" / "labels.csv"
    text = "\n".join([head, "a.jpg,cat,1,2,30,40", *(",".join(row) for row in rows)])
    path.write_bytes(text.encode("utf-8", "replace") + noise)
    read_or_refuse("csv", fuzzed / "csv", path)


@settings(max_examples=100, deadline=None)
@given(
    name=st.one_of(st.text(), st.lists(st.sampled_from(["..", ".", "", "C:", "~", "a", "\0", "images"])).map("/".join))
)
def test_names_lead_nowhere_else(name: str, fuzzed: Path) -> None:
    folder = fuzzed / "csv" / "images"
    _, found = NamedPictures(folder / "x.csv", ["a.jpg"], [folder]).locate(name)
    assert found is None or found.resolve().is_relative_to(folder.resolve())


@pytest.mark.parametrize("name", ["coco", "csv"])
def test_time_grows_with_the_number_of_pictures_and_no_faster(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "0.jpg")

    def seconds(count: int) -> float:
        if name == "coco":
            path = dump(tmp_path / f"{count}.json", coco_of(*(f"{n}.jpg" for n in range(count))))
        else:
            path = tmp_path / f"{count}.csv"
            path.write_text("\n".join([CSV_HEAD, *(f"{n}.jpg,cat,1,1,9,9" for n in range(count))]))
        source = Source(None, path, format=name)  # type: ignore[arg-type]
        start = time.process_time()
        reader = FORMATS[name].open(source)  # type: ignore[index]
        items = reader.items()
        reader.read(items[0], {"cat": 0}, (64, 64))
        taken = time.process_time() - start
        assert len(items) == count
        return taken

    seconds(100)
    small, large = seconds(1000), seconds(10_000)
    assert large < 10 * small * 3 + 0.2


# --- real data


@pytest.mark.real_data
def test_raccoon_csv_agrees_with_its_xml(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "raccoon"
    (tmp_path / "d.yaml").write_text(
        f"path: {folder.as_posix()}\ntrain: data/train_labels.csv\nval: data/test_labels.csv\nimages: images\n"
    )
    found = everything(open_dataset(tmp_path / "d.yaml"))
    wanted = everything(open_dataset(folder))
    assert found.keys() == wanted.keys()
    for stem, record in wanted.items():
        shifted = record.boxes + np.array([1, 1, 0, 0], np.float32)  # the table copies what is 1-based in the XML
        assert sorted(found[stem].boxes.tolist()) == sorted(shifted.tolist())


@pytest.mark.real_data
def test_a_sample_of_coco(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "map_fixtures" / "coco_sample100" / "gts" / "sampled_gts_bbox_area.json"
    document = json.loads(path.read_text())
    for image in document["images"]:
        Image.new("1", (image["width"], image["height"])).save(tmp_path / Path(image["file_name"]).with_suffix(".png"))
        image["file_name"] = Path(image["file_name"]).with_suffix(".png").name
    split = read_all(dump(tmp_path / "instances.json", document))
    assert len(split.records) == len(document["images"])
    assert sum(len(record.boxes) for record in split.records) + len(
        [fault for fault in split.faults if fault.action == "dropped box"]
    ) == len(document["annotations"])
    by_id = {record.id: record for record in split.records}
    names = {entry["id"]: entry["name"] for entry in document["categories"]}
    classes = open_dataset(tmp_path / "instances.json").classes
    assert classes == tuple(names[key] for key in sorted(names))
    for image in document["images"][:20]:
        mine = [entry for entry in document["annotations"] if entry["image_id"] == image["id"]]
        record = by_id[Path(image["file_name"]).stem]
        x, y, w, h = np.array([entry["bbox"] for entry in mine]).reshape(-1, 4).T
        if len(record.boxes) == len(mine):
            assert np.allclose(record.boxes, np.stack([x, y, x + w, y + h], axis=1), atol=0.5)
        assert [classes[label] for label in record.labels][:1] == [names[entry["category_id"]] for entry in mine][:1]

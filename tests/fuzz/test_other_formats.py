"""COCO, LabelMe, YOLO and CSV that nobody would write: sound boxes, faults, or a refusal in one line.

The cases by hypothesis, which shrinks them, are in tests/data/test_formats.py; these are many more, by number.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.fuzz import hostile

from boxwright.data.dataset import Dataset, Split, open_dataset
from boxwright.types import UserError

SIZE = (64, 128)  # height, width of both pictures
CLASSES = ("cat", "dog")


def coco(r: Random) -> bytes:
    document = {
        "images": [{"id": n, "file_name": f"{name}.jpg", "width": 128, "height": 64} for n, name in enumerate("ab")],
        "categories": [{"id": n, "name": name} for n, name in enumerate(CLASSES)],
        "annotations": [
            {"id": n, "image_id": n % 2, "category_id": r.randrange(2), "bbox": [*_corner(r), 20, 15], "iscrowd": n % 2,
             "area": 300, "segmentation": [[1, 1, 30, 1, 30, 30]]}
            for n in range(r.randint(1, 4))
        ],
    }  # fmt: skip
    return _json(r, document)


def labelme(r: Random) -> bytes:
    shapes = [
        {"label": r.choice(CLASSES), "points": [_corner(r), [90, 60], [5, 50]][: r.choice((2, 3))],
         "shape_type": r.choice(("rectangle", "polygon", "circle", "line")), "flags": {"difficult": False}}
        for _ in range(r.randint(1, 4))
    ]  # fmt: skip
    document = {"version": "5.0", "flags": {}, "shapes": shapes, "imagePath": "a.jpg", "imageData": None}
    return _json(r, {**document, "imageHeight": 64, "imageWidth": 128})


def yolo(r: Random) -> bytes:
    lines: list[str] = []
    for _ in range(r.randint(1, 6)):
        words = [str(r.randrange(2)), *(f"{r.uniform(0.3, 0.6):.{r.randint(1, 9)}f}" for _ in range(4))]
        while r.randrange(4) == 0:
            words[r.randrange(len(words))] = hostile.number(r)
        if r.randrange(8) == 0:
            words += [hostile.number(r) for _ in range(r.randint(1, 7))]
        lines.append(r.choice((" ", " ", "\t", "  ", ",")).join(words))
    return _bytes(r, r.choice(("\n", "\r\n", "\r")).join(lines))


def csv(r: Random) -> bytes:
    head = r.choice(
        (*["filename,class,xmin,ymin,xmax,ymax"] * 3, "image,label,x,y,w,h", "file;class;x1;y1;x2;y2", "a,b,c")
    )
    rows = [
        [r.choice(("a.jpg", "b.jpg")), r.choice(CLASSES), *map(str, _corner(r)), "90", "60"]
        for _ in range(r.randint(1, 5))
    ]
    for row in rows:
        while r.randrange(4) == 0:
            at = r.randrange(len(row))
            row[at] = r.choice((hostile.number(r), r.choice(hostile.WORDS), '"', '"x', "b.jpg", "../a.jpg", ""))
        if r.randrange(10) == 0:
            del row[r.randrange(len(row))]
    mark = ";" if ";" in head else ","
    return _bytes(
        r,
        "\n".join(
            [head, *(mark.join([f"{name}.jpg", "cat", "1", "2", "30", "40"]) for name in "ab"), *map(mark.join, rows)]
        ),
    )


def _corner(r: Random) -> list[float]:
    return [r.randint(0, 60), r.choice((r.randint(0, 30), r.uniform(0, 30)))]


def _json(r: Random, document: Any) -> bytes:
    """A document with some of its values replaced, left out or there twice."""
    for _ in range(r.choice((0, 0, 1, 1, 2, 5))):
        inside, key = r.choice(_places(document))
        how = r.randrange(6)
        if how == 0:
            del inside[key]
        elif how == 1 and isinstance(inside, list):
            inside.append(inside[key])
        else:
            inside[key] = _value(r)
        if not _places(document):
            break
    text = json.dumps(document, ensure_ascii=bool(r.randrange(2)))
    if r.randrange(20) == 0:
        text = text.replace("null", r.choice(("NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 5000)))
    return _bytes(r, text)


def _value(r: Random) -> Any:
    return r.choice((
        None, True, False, 0, -1, 1, 64, 128, 10**30, 1e308, float("nan"), float("inf"), "", [], {}, [[]], {"a": {}},
        hostile.number(r), r.choice(hostile.WORDS), [hostile.number(r)] * 4, [r.uniform(-50, 200) for _ in range(4)],
        [1, 1, 0, 0], [5, 5, -3, 9], {"counts": "x", "size": [64, 128]}, "b.jpg", "../b.jpg", "/etc/passwd",
    ))  # fmt: skip


def _places(document: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    keys = list(document) if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        found.append((document, key))
        found += _places(document[key])
    return found


def _bytes(r: Random, text: str) -> bytes:
    data = text.encode("utf-8", "replace")
    how = r.randrange(20)
    if how == 0:
        return text.encode("utf-16", "replace")
    if how == 1:
        return b"\xef\xbb\xbf" + data
    if how < 5:
        return hostile.damaged(
            r, data, (data, b"\0\xff"), (b'"', b"{", b"]", b",", b"\n", b"\0", b"\xff", b"NaN", b"0 ")
        )
    return data


FORMATS: dict[str, tuple[str, Callable[[Random], bytes]]] = {
    "coco": ("annotations.json", coco),
    "labelme": ("a.json", labelme),
    "yolo": ("a.txt", yolo),
    "csv": ("labels.csv", csv),
}


def check(path: Path, data: bytes, case: object) -> str:
    """Read a folder with `data` as annotations, and hold the answer against what is promised."""
    path.write_bytes(data)
    try:
        with hostile.in_time(case):
            dataset = open_dataset(path if path.name in ("annotations.json", "labels.csv") else path.parent)
            # pictures of all splits: where none is stated, one of the two is drawn for validation
            splits = [dataset.scan(name) for name in dataset.splits]
    except UserError as error:
        said = str(error)
    else:
        _check_sound(path, dataset, splits)
        return "read"
    assert said
    assert "\n" not in said
    return "refused"


def _check_sound(path: Path, dataset: Dataset, splits: list[Split]) -> None:
    for split in splits:
        for record in split.records:
            height, width = record.size
            assert record.size == SIZE
            assert isinstance(record.image, Path)
            assert record.image.resolve().parent == path.parent.resolve()
            boxes = record.boxes
            assert (boxes.dtype, boxes.shape) == (np.float32, (len(record.labels), 4))
            assert np.isfinite(boxes).all()
            assert (boxes >= 0).all()
            assert (boxes <= [width, height, width, height]).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert ((record.labels >= 0) & (record.labels < len(dataset.classes))).all()
        for fault in split.faults:
            assert fault.reason
            assert "\n" not in fault.reason


@pytest.mark.parametrize("name", FORMATS)
def test_numbered_cases_of_hostile_annotations(name: str, tmp_path: Path) -> None:
    file, make = FORMATS[name]
    for stem in "ab":
        Image.new("RGB", SIZE[::-1]).save(tmp_path / f"{stem}.jpg")
        if name == "labelme":
            (tmp_path / f"{stem}.json").write_bytes(json.dumps({"shapes": [], "imagePath": f"{stem}.jpg"}).encode())
        if name == "yolo":
            (tmp_path / f"{stem}.txt").write_bytes(b"0 0.5 0.5 0.5 0.5")
            (tmp_path / "classes.txt").write_text("cat\ndog\n")
    outcomes: Counter[str] = Counter()
    for case in range(hostile.cases(500)):
        data = make(Random(case))
        try:
            outcomes[check(tmp_path / file, data, case)] += 1
        except Exception as error:
            raise AssertionError(f"case {case}: {data[:400]!r}") from error
    print(f"{name}: {dict(outcomes)}")  # noqa: T201
    assert outcomes["read"] > 0.2 * outcomes.total()

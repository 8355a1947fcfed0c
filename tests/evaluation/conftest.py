"""Pictures with objects and detections to judge: published examples, and small ones drawn at random."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from boxwright.types import Detections, Record


@dataclass(frozen=True)
class Judged:
    """What every evaluation function takes first; iterate to spread it into the three arguments."""

    records: Sequence[Record]
    detections: Sequence[Detections]
    classes: Sequence[str]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.records, self.detections, self.classes))

    def edges(self) -> Judged:
        """The same boxes of first and last pixels as continuous edges: only the minimum moves."""
        shift = np.array([-1, -1, 0, 0], np.float32)
        records = [replace(record, boxes=record.boxes + shift) for record in self.records]
        detections = [replace(found, boxes=found.boxes + shift) for found in self.detections]
        return Judged(records, detections, self.classes)

    def reordered(self, order: Sequence[int]) -> Judged:
        return Judged([self.records[i] for i in order], [self.detections[i] for i in order], self.classes)

    def sorted(self) -> Judged:
        """In the order that the product promises to take tied scores and equal overlaps in, once more and in loops."""
        order = sorted(range(len(self.records)), key=lambda i: self.records[i].id)
        records, found = [], []
        for i in order:
            r, d = self.records[i], self.detections[i]
            flags = zip(r.difficult.tolist(), r.crowd.tolist(), strict=True)
            keys = list(zip(r.labels.tolist(), r.boxes.tolist(), flags, strict=True))
            records.append(r.only(np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)))
            sides = (d.boxes[:, 2:] - d.boxes[:, :2]).prod(axis=1)
            keys = list(zip((-d.scores).tolist(), (-sides).tolist(), d.labels.tolist(), d.boxes.tolist(), strict=True))
            found.append(d[np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)])
        return Judged(records, found, self.classes)

    def shuffled(self, generator: np.random.Generator) -> Judged:
        """Pictures, and objects and detections in each, in another order."""
        records = [r.only(generator.permutation(len(r.labels))) for r in self.records]
        found = [d[generator.permutation(len(d))] for d in self.detections]
        return Judged(records, found, self.classes).reordered(generator.permutation(len(records)).tolist())


def record(name: str, boxes: Any, labels: Any, difficult: Any = None) -> Record:
    labels = np.array(labels, np.int64)
    flags = np.zeros(len(labels), bool) if difficult is None else np.array(difficult, bool)
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Record(name, Path(f"{name}.jpg"), (500, 500), boxes, labels, flags, np.zeros(len(labels), bool))


def detections(boxes: Any, scores: Any, labels: Any) -> Detections:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Detections(boxes, np.array(scores, np.float32), np.array(labels, np.int64))


# Published examples. Boxes are as the files have them: first and last pixel, but for COCO's continuous edges.


@pytest.fixture(scope="session")
def fixtures(real_data: Path) -> Path:
    return real_data / "map_fixtures"


@pytest.fixture(scope="session")
def expected(fixtures: Path) -> dict[str, Any]:
    return json.loads((fixtures / "expected.json").read_text(encoding="utf-8"))


def words(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def numbers(rows: list[list[str]], columns: slice) -> NDArray[np.float32]:
    return np.array([row[columns] for row in rows], np.float32).reshape(len(rows), -1)


def read_detections(path: Path, classes: Sequence[str]) -> Detections:
    """Lines of `class score x1 y1 x2 y2`; none where there is no file."""
    rows = words(path)
    if not rows:
        return Detections()
    return detections(numbers(rows, slice(2, 6)), numbers(rows, slice(1, 2))[:, 0], labels(rows, classes))


def labels(rows: list[list[str]], classes: Sequence[str]) -> list[int]:
    return [classes.index(row[0]) for row in rows]


def read_xml(path: Path, classes: Sequence[str]) -> Record:
    objects = ElementTree.parse(path).getroot().findall("object")
    corners = ("xmin", "ymin", "xmax", "ymax")
    return record(
        path.stem,
        [[float(o.findtext(f"bndbox/{corner}")) for corner in corners] for o in objects],
        [classes.index(o.findtext("name")) for o in objects],
        [o.findtext("difficult") == "1" for o in objects],
    )


@pytest.fixture(scope="session")
def padilla_case1(fixtures: Path) -> Judged:
    classes = ["object"]

    def corners(rows: list[list[str]], columns: slice) -> NDArray[np.float32]:
        left_top, size = np.split(numbers(rows, columns), 2, axis=1)
        return np.concatenate([left_top, left_top + size], axis=1)

    records, found = [], []
    for path in sorted((fixtures / "padilla_case1/gts").glob("*.txt")):
        rows = words(path)
        records.append(record(path.stem, corners(rows, slice(1, 5)), labels(rows, classes)))
        rows = words(fixtures / "padilla_case1/dets" / path.name)
        scores = numbers(rows, slice(1, 2))[:, 0]
        found.append(detections(corners(rows, slice(2, 6)), scores, labels(rows, classes)))
    return Judged(records, found, classes)


@pytest.fixture(scope="session")
def toyexample(fixtures: Path) -> Judged:
    folder, classes = fixtures / "toyexample", ["cat"]
    records = [read_xml(path, classes) for path in sorted((folder / "gts_vocpascal_format").glob("*.xml"))]
    boxes = folder / "dets_classname_abs_xyx2y2"
    return Judged(records, [read_detections(boxes / f"{r.id}.txt", classes) for r in records], classes)


@pytest.fixture(scope="session")
def voc12_100(real_data: Path, fixtures: Path) -> Judged:
    folder = fixtures / "voc12_100"
    classes = (folder / "voc.names").read_text(encoding="utf-8").split()
    numerals = [str(label) for label in range(len(classes))]
    annotations = real_data / "voc_mini/VOCdevkit/VOC2012/Annotations"
    records = [read_xml(path, classes) for path in sorted(annotations.glob("*.xml"))]
    found = [read_detections(folder / "dets_abs_xyx2y2" / f"{r.id}.txt", numerals) for r in records]
    return Judged(records, found, classes)


@pytest.fixture(scope="session")
def cartucho(fixtures: Path) -> Judged:
    truths = sorted((fixtures / "cartucho/ground-truth").glob("*.txt"))
    found = [fixtures / "cartucho/detection-results" / path.name for path in truths]
    classes = sorted({row[0] for path in [*truths, *found] for row in words(path)})
    records = [
        record(
            path.stem,
            numbers(words(path), slice(1, 5)),
            labels(words(path), classes),
            ["difficult" in row for row in words(path)],
        )
        for path in truths
    ]
    return Judged(records, [read_detections(path, classes) for path in found], classes)


@pytest.fixture(scope="session")
def coco_sample100(fixtures: Path) -> Judged:
    truth = json.loads((fixtures / "coco_sample100/gts/sampled_gts_bbox_area.json").read_text("utf-8"))
    results = json.loads((fixtures / "coco_sample100/dets/sampled_bbox_results.json").read_text("utf-8"))
    ids = [category["id"] for category in truth["categories"]]

    def corners(annotations: list[dict[str, Any]]) -> NDArray[np.float64]:
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)

    records, found = [], []
    for image in sorted(truth["images"], key=lambda image: image["id"]):  # as pycocotools takes tied scores
        mine = [a for a in truth["annotations"] if a["image_id"] == image["id"]]
        records.append(record(f"{image['id']:012d}", corners(mine), [ids.index(a["category_id"]) for a in mine]))
        mine = [a for a in results["annotations"] if a["image_id"] == image["id"]]
        scores, names = [a["score"] for a in mine], [ids.index(a["category_id"]) for a in mine]
        found.append(detections(corners(mine), scores, names))
    return Judged(records, found, [category["name"] for category in truth["categories"]])


# Examples drawn at random: whole pixels on a small grid and coarse scores, so overlaps and ties are common.


def boxes_of(draw: st.DrawFn, count: int, scale: int = 1, unique: bool = False) -> list[tuple[int, ...]]:
    low, side = st.integers(0, 3), st.integers(1, 4)
    box = st.tuples(low, low, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
    drawn = draw(st.lists(box, min_size=count, max_size=count, unique=unique))
    return [tuple(scale * value for value in corners) for corners in drawn]


@st.composite
def judged_sets(draw: st.DrawFn, perfect: bool = False, crowds: bool = False) -> Judged:
    """Up to four pictures of two classes; small, medium and large boxes by COCO's sizes, ids in any order."""
    names = draw(st.lists(st.sampled_from("abcdefgh"), max_size=4, unique=True))
    records, found = [], []
    for name in names:
        scale, count = draw(st.sampled_from([1, 10, 40])), draw(st.integers(0, 4))
        boxes = boxes_of(draw, count, scale, unique=perfect)
        classes = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
        difficult = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        crowd = draw(st.lists(st.booleans(), min_size=count, max_size=count)) if crowds else [False] * count
        records.append(replace(record(name, boxes, classes, difficult), crowd=np.array(crowd, bool)))
        if not perfect:
            count = draw(st.integers(0, 5))
            boxes = boxes_of(draw, count, scale)
            classes = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
        scores = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
        found.append(detections(boxes, np.array(scores) / 4, classes))
    return Judged(records, found, ["cat", "dog"])


@pytest.fixture(scope="session")
def random_sets() -> st.SearchStrategy[Judged]:
    return judged_sets()


@pytest.fixture(scope="session")
def crowded_sets() -> st.SearchStrategy[Judged]:
    return judged_sets(crowds=True)


@pytest.fixture(scope="session")
def perfect_sets() -> st.SearchStrategy[Judged]:
    """Each object is found exactly once, in its own place; no two objects of a picture share a box."""
    return judged_sets(perfect=True)


# Examples written by hand: what is annotated and what is found, picture by picture.


@pytest.fixture(scope="session")
def scene() -> Any:
    """Objects by picture as (class, box) or (class, box, "difficult" or "crowd"), detections as (class, score, box)."""

    def scene(annotated: dict[str, Any], found: dict[str, Any], classes: Sequence[str] = ("cat", "dog")) -> Judged:
        records = []
        for name, objects in annotated.items():
            marks = [rest[0] if rest else "" for _, _, *rest in objects]
            difficult = [mark == "difficult" for mark in marks]
            one = record(name, [o[1] for o in objects], [classes.index(o[0]) for o in objects], difficult)
            records.append(replace(one, crowd=np.array([mark == "crowd" for mark in marks], bool)))
        lists = [found.get(name, []) for name in annotated]
        found_in = [
            detections([d[2] for d in some], [d[1] for d in some], [classes.index(d[0]) for d in some])
            for some in lists
        ]
        return Judged(records, found_in, classes)

    return scene


@pytest.fixture(scope="session")
def judged_by() -> Any:
    """A scene's detections judged at an IoU, all pairs kept."""
    from boxwright.evaluation.judging import judge, overlapping
    from boxwright.evaluation.matching import flatten

    def judged_by(judged: Any, iou: float = 0.5) -> Any:
        flat = flatten(*judged)
        return judge(flat, overlapping(flat, same_class=False), iou=iou)

    return judged_by


@pytest.fixture(scope="session")
def random_split() -> Any:
    return draw_split


def draw_split(
    *, pictures: int, classes: int, objects: int, detections: int, seed: int, crowds: float = 0.05
) -> Judged:
    """Objects at random and, in each picture, `detections` of which about half lie near one; coarse scores."""
    draw = np.random.default_rng(seed)
    records, found = [], []
    for number in range(pictures):
        count = int(draw.integers(0, objects + 1))
        corner, side = draw.uniform(0, 400, (count, 2)), draw.lognormal(4, 0.8, (count, 2)) + 2
        boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
        labels = draw.integers(0, classes, count)
        crowd = draw.random(count) < crowds
        records.append(replace(record(f"{number:06d}", boxes, labels, draw.random(count) < 0.1), crowd=crowd))
        near = detections // 2 if count else 0
        which = draw.integers(0, max(count, 1), near)
        jitter = draw.normal(0, 0.1, (near, 4)) * (np.tile(side[which], 2) if near else np.zeros((0, 4)))
        moved = boxes[which] + jitter if near else np.zeros((0, 4))
        corner, side = draw.uniform(0, 400, (detections - near, 2)), draw.lognormal(4, 0.8, (detections - near, 2)) + 2
        all_boxes = np.concatenate([moved, np.concatenate([corner, corner + side], axis=1)]).astype(np.float32)
        all_boxes[:, 2:] = np.maximum(all_boxes[:, 2:], all_boxes[:, :2] + 1)
        guess = np.concatenate(
            [labels[which] if near else np.zeros(0, int), draw.integers(0, classes, detections - near)]
        )
        scores = np.round(draw.random(detections), 2)
        found.append(Detections(all_boxes, scores.astype(np.float32), guess.astype(np.int64)))
    return Judged(records, found, [f"class {label}" for label in range(classes)])


@pytest.fixture(scope="session")
def one_picture() -> Any:
    """One picture of one class: its objects, which are difficult, and detections, best first."""

    def make(boxes: Any, difficult: Any, found: Any) -> Judged:
        scores = np.linspace(0.9, 0.5, len(found))
        return Judged(
            [record("a", boxes, [0] * len(boxes), difficult)], [detections(found, scores, [0] * len(found))], ["cat"]
        )

    return make

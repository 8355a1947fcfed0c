"""Records of any format → what looks wrong with their objects and classes, though every box is a valid one."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from boxwright.data.check.finding import Finding, Level, Picture, counted
from boxwright.data.check.voc_xml import line_of
from boxwright.data.formats.base import Box
from boxwright.types import Float32, Record

TINY = 4  # pixels
_SAME = 0.95  # IoU of two boxes that mean one thing
_NAMED = 30  # classes that a reason names
_MANY = 500  # objects of a picture up to which every two are compared; more are compared where they begin alike


def object_findings(split: str, records: Sequence[Record], classes: Sequence[str]) -> Iterator[Finding]:
    """What is odd about the objects of a split."""
    whole: list[tuple[Record, int]] = []
    objects = 0
    for record in records:
        height, width = record.size
        boxes = record.boxes
        objects += len(boxes)
        if not len(boxes):
            continue
        sides = np.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], 1)
        for index in np.flatnonzero(sides.min(1) < TINY):
            w, h = sides[index]
            yield _finding(split, "tiny-box", "note", record, int(index), f"a box of {w:g} x {h:g} pixels", classes)
        edges = np.abs(boxes - np.array([0, 0, width, height], np.float32)) <= 0.01 * np.array([width, height] * 2)
        covers = edges.all(1)
        whole += [(record, int(index)) for index in np.flatnonzero(covers)]
        yield from _twice(split, record, classes)
    if whole:
        strong = len(whole) >= 5 and len(whole) > 0.3 * objects
        count = f"{len(whole)} of {objects} boxes are their whole picture"
        for record, index in whole if not strong else whole[:1]:
            reason = count if strong else "the box is the whole picture"
            yield _finding(split, "whole-picture", "suspect" if strong else "note", record, index, reason, classes)
    yield from _repeated(split, records, classes)


def _repeated(split: str, records: Sequence[Record], classes: Sequence[str]) -> Iterator[Finding]:
    """Boxes, but for whole pictures, that are the same in many pictures of one size."""
    counts = np.array([len(record.labels) for record in records], np.int64)
    if not counts.sum():
        return
    owner = np.repeat(np.arange(len(records)), counts)  # (N,)
    sizes = np.array([record.size for record in records], np.float32)[owner]  # (N, 2) height, width
    labels = np.concatenate([record.labels for record in records])
    boxes = np.concatenate([record.boxes for record in records])
    rows = np.column_stack([sizes, labels.astype(np.float32), boxes.round(1)])  # (N, 7)
    _, once = np.unique(np.column_stack([rows, owner]), axis=0, return_index=True)  # however often in a picture
    _, first, times = np.unique(rows[once], axis=0, return_index=True, return_counts=True)
    for place in np.argsort(-times, kind="stable"):
        if times[place] < max(5, 0.02 * len(records)):
            return
        at = int(once[first[place]])
        record, (height, width), box = records[owner[at]], sizes[at], boxes[at]
        if (np.abs(box - np.array([0, 0, width, height])) <= 0.01 * np.array([width, height] * 2)).all():
            continue
        shown = " ".join(f"{edge:g}" for edge in box)
        reason = f"the same box {shown} of {classes[labels[at]]!r} is in {times[place]} pictures"
        index = at - int(counts[: owner[at]].sum())
        yield _finding(split, "repeated-box", "suspect", record, index, reason, classes)


def _finding(
    split: str, kind: str, level: Level, record: Record, index: int, reason: str, classes: Sequence[str]
) -> Finding:
    path: Picture = record.annotation or record.image
    x1, y1, x2, y2 = (float(edge) for edge in record.boxes[index])
    box: Box = x1, y1, x2, y2
    name = classes[int(record.labels[index])]
    line = (
        line_of(path, record.boxes[index], name) if isinstance(path, Path) and path.suffix.lower() == ".xml" else None
    )
    if line is None:
        reason = f"{record.id}: {reason}, at {x1:g} {y1:g} {x2:g} {y2:g}"
    return Finding(split, kind, level, reason, "uses it", path=path, line=line, image=record.image, box=box)


def _twice(split: str, record: Record, classes: Sequence[str]) -> Iterator[Finding]:
    """Boxes that are nearly an earlier one."""
    told: set[int] = set()
    for first, second in _pairs(record.boxes):
        if second in told:
            continue
        told.add(second)
        names = [classes[int(record.labels[index])] for index in (first, second)]
        if names[0] == names[1]:
            kind, reason = "near-duplicate", f"nearly the same box of {names[0]!r} is there twice"
        else:
            kind, reason = "two-classes", f"one box is both {names[0]!r} and {names[1]!r}"
        yield _finding(split, kind, "suspect", record, second, reason, classes)


def _pairs(boxes: Float32) -> Iterator[tuple[int, int]]:
    """Every two boxes that overlap in more than `_SAME` of their union."""
    if len(boxes) < 2:
        return
    order = np.argsort(boxes[:, 0], kind="stable")
    reach = boxes[:, 2] - boxes[:, 0]
    for at, first in enumerate(order[:-1]):
        rest = order[at + 1 :]
        if len(boxes) > _MANY or len(rest) > 20:  # those that begin too far right cannot overlap so much
            stop = np.searchsorted(boxes[rest, 0], boxes[first, 0] + (1 - _SAME) * reach[first], "right")
            rest = rest[:stop]
        if not len(rest):
            continue
        low = np.maximum(boxes[first, :2], boxes[rest, :2])
        high = np.minimum(boxes[first, 2:], boxes[rest, 2:])
        shared = np.prod(np.clip(high - low, 0, None), 1)
        areas = np.prod(boxes[rest, 2:] - boxes[rest, :2], 1) + np.prod(boxes[first, 2:] - boxes[first, :2])
        for second in rest[shared > _SAME * (areas - shared)]:
            yield int(min(first, second)), int(max(first, second))


# --- classes


def class_findings(counts: dict[str, dict[str, int]], splits: Sequence[str]) -> Iterator[Finding]:
    """Classes without objects, and names that may mean one class; `counts` has each class's objects by split."""
    unlearnt = tuple(name for name, of in counts.items() if "train" in splits and not of.get("train"))
    absent = tuple(name for name in unlearnt if "val" in splits and not any(counts[name].values()))
    unjudged = (name for name, of in counts.items() if "val" in splits and not of.get("val"))
    groups: tuple[tuple[str, str, Level, str, tuple[str, ...]], ...] = (
        ("train", "no-train-objects", "suspect", "no object in any split: nothing to learn, AP n/a", absent),
        (
            "train", "no-train-objects", "suspect", "no object in train: nothing to learn",
            tuple(name for name in unlearnt if name not in absent),
        ),
        (
            "val", "no-val-objects", "note", "no object in val: AP n/a",
            tuple(name for name in unjudged if name not in absent),
        ),
    )  # fmt: skip
    for split, kind, level, what, names in groups:
        if names:
            shown = ", ".join(map(repr, names[:_NAMED]))
            more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            yield Finding(split, kind, level, f"{what}: {shown}{more}", "uses it", classes=names)
    totals = Counter({name: sum(of.values()) for name, of in counts.items()})
    for first, second in combinations(sorted(counts, key=lambda name: -totals[name])[:300], 2):
        if why := _alike(first, second, totals):
            reason = f"class {second!r} ({counted(totals[second], 'object')}) may be {first!r} ({totals[first]}): {why}"
            yield Finding("all", "similar-classes", "suspect", reason, "uses it")


def _alike(common: str, rare: str, totals: Counter[str]) -> str | None:
    """Why two names may mean one class."""
    if _bare(common) == _bare(rare):
        return "they differ in case, spaces or signs only"
    if totals[rare] > 0.1 * totals[common] or min(len(common), len(rare)) < 5:
        return None
    if re.sub(r"\d", "", common) == re.sub(r"\d", "", rare):  # class_1, class_2
        return None
    return "they differ in one letter" if _one_letter(common.casefold(), rare.casefold()) else None


def _bare(name: str) -> str:
    letters = unicodedata.normalize("NFKD", name).casefold()
    return "".join(letter for letter in letters if letter.isalnum()) or name


def _one_letter(a: str, b: str) -> bool:
    """Whether one letter changed, was left out or added, or two neighbours changed places."""
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[start:], b[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[:2][::-1] and a[2:] == b[2:])

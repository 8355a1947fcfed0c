"""LabelMe json: a file for each picture, with a list of `shapes`.

A rectangle has two points in any order, a circle its centre and a point of its edge, anything with an area a list of
points: the box around them is read. Points are 0-based and continuous. A shape's `flags` may say `difficult`,
`truncated`, `occluded`, `crowd`. The picture is the one of the same stem, else that of `imagePath`, looked for in the
folder of pictures only; one that is kept inside the json (`imageData`) is not read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from boxwright.data.formats.base import (
    Annotation,
    Box,
    DroppedError,
    Item,
    Objects,
    Reader,
    RefusedError,
    Source,
    class_name,
    contradicts,
    disagreement,
    number,
    shown_value,
    skipped,
    stated_size,
)
from boxwright.data.formats.json_file import has_keys, read_json
from boxwright.data.formats.pictures import paired_items, parts
from boxwright.types import Size

MAX_BYTES = 500_000_000  # a picture may be inside
_NO_AREA = ("point", "points", "line", "linestrip", "lines")
_AREA = ("rectangle", "polygon", "circle", "mask", "oriented_rectangle", "rotation")  # of LabelMe and its kin


def sign(paths: Sequence[Path]) -> str | None:
    """That one of the first files has LabelMe's keys."""
    if any(has_keys(path, "shapes", "imagePath", "imageData") for path in paths[:20]):
        return f"{len(paths)} .json with shapes"
    return None


class LabelMeReader(Reader):
    """A json for each picture."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._unread: Counter[str] = Counter()

    def items(self) -> list[Item]:
        return _by_image_path(paired_items(self._source, ".json"))

    def read(self, item: Item, labels: Mapping[str, int], size: Size) -> Annotation:
        path = item.annotation
        assert path is not None
        try:
            document = _document(path)
        except RefusedError as error:
            return skipped(error.fault(path))
        stated = stated_size(document.get("imageHeight"), document.get("imageWidth"))
        if reason := disagreement(stated, size, "imageWidth and imageHeight say"):
            return contradicts(path, reason)
        objects = Objects(path, size, labels)
        for index, shape in enumerate(document["shapes"]):
            with objects.one(called=f"shapes[{index}]: "):
                if not isinstance(shape, dict):
                    raise DroppedError("is no shape")
                label = objects.label(_label(shape))
                flags = shape.get("flags")
                marks = objects.marks({**shape, **flags} if isinstance(flags, dict) else shape)
                objects.add(label, _box(shape), marks)
                if (kind := shape.get("shape_type") or "polygon") != "rectangle":
                    self._unread[f"{kind}s"] += 1
        return objects.annotation()

    @property
    def unread(self) -> Mapping[str, int]:
        return self._unread

    def class_counts(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for item in self.items():
            try:
                shapes = _document(item.annotation)["shapes"] if item.annotation else []
            except RefusedError:
                continue
            names = (shape.get("label") for shape in shapes if isinstance(shape, dict))
            counts.update(class_name(name) for name in names if isinstance(name, str) and class_name(name))
        return counts


def _by_image_path(items: list[Item]) -> list[Item]:
    """The same items, pictures without a json of their stem joined with the json that names them."""
    alone = {item.image.name: item for item in items if item.image and not item.annotation}
    if not alone:
        return items
    joined: dict[str, Item] = {}
    gone: set[str] = set()
    for item in items:
        if item.annotation and not item.image and (name := _image_path(item.annotation)) in alone:
            picture = alone.pop(name)
            joined[picture.id] = Item(picture.id, picture.image, item.annotation)
            gone.add(item.id)
    return [joined.get(item.id, item) for item in items if item.id not in gone]


def _image_path(path: Path) -> str:
    try:
        said = _document(path).get("imagePath")
    except RefusedError:
        return ""
    return parts(said)[-1] if isinstance(said, str) else ""


def _document(path: Path) -> dict[str, Any]:
    document = read_json(path, MAX_BYTES)
    if not isinstance(document, dict) or not isinstance(document.get("shapes"), list):
        raise RefusedError("is no LabelMe json: it has no list of shapes")
    return document


def _label(shape: dict[str, Any]) -> str:
    name = shape.get("label")
    if not isinstance(name, str) or not class_name(name):
        raise DroppedError("has no label")
    return name


def _box(shape: dict[str, Any]) -> Box:
    """The box around a shape."""
    kind, points = shape.get("shape_type") or "polygon", shape.get("points")
    if kind in _NO_AREA:
        raise DroppedError(f"a {kind} has no box", wrong=False)
    if kind not in _AREA:
        raise DroppedError(f"shape_type is {shown_value(kind)}, which is none of {', '.join((*_AREA, *_NO_AREA))}")
    pairs = points if isinstance(points, list) else []
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs) or len(pairs) < 2:
        raise DroppedError(f"points are {shown_value(points)}: not two or more pairs of numbers")
    xs, ys = [number(pair[0]) for pair in pairs], [number(pair[1]) for pair in pairs]
    if any(map(math.isnan, (*xs, *ys))):
        raise DroppedError("a point is not two numbers")
    if kind == "circle":
        if len(pairs) != 2:
            raise DroppedError(f"a circle has two points, its centre and one of its edge, not {len(pairs)}")
        radius = math.hypot(xs[1] - xs[0], ys[1] - ys[0])
        return xs[0] - radius, ys[0] - radius, xs[0] + radius, ys[0] + radius
    return min(xs), min(ys), max(xs), max(ys)

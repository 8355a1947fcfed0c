"""One VOC XML → the same XML with what is certain mended, and the changes; everything else in the file stays.

A file that needs no change is given back byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from boxwright.data.check.voc_xml import CORNERS, Document, child, corners, is_box, local, read_document, stated, text
from boxwright.data.formats.base import class_name, disagreement, number, truth
from boxwright.data.formats.voc import read_annotation
from boxwright.types import Fault, Size

Corners = tuple[float, float, float, float]  # xmin ymin xmax ymax as in the file: 1-based, inclusive


class Change(NamedTuple):
    """Something in the copy that is not as it was."""

    split: str
    path: str  # of the original
    line: int | None
    what: str
    before: str
    after: str

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" if self.line else self.path
        values = f"{self.before} -> {self.after}" if self.after else self.before
        return f"{self.split}  {where}: {self.what}: {values}"


class Mending(NamedTuple):
    """An annotation of the copy."""

    data: bytes
    changes: list[Change]


def mended(path: Path, size: Size, orientation: int, classes: Sequence[str]) -> Mending | Fault:
    """The annotation of a picture of `size` as it can be trusted, or why it must be left out with its picture."""
    document = read_document(path)
    labels = {name: label for label, name in enumerate(classes)}
    read = read_annotation(path, labels, size)
    refused = next((fault for fault in read.faults if fault.action == "skipped image"), None)
    if document is None or (refused and disagreement(stated(document)[1], size, "") is None):
        return refused or Fault(path, "cannot be read", "skipped image")
    work = _Work(path, document, size, classes)
    move = _identity
    if refused:
        found = work.resized(orientation)
        if found is None:
            return refused
        move = found
    for item in document.objects():
        work.mend(item, move)
    if not work.changes:
        return Mending(path.read_bytes(), [])
    data = ElementTree.tostring(document.root, encoding="unicode")
    return Mending((data + "\n").encode(), work.changes)


Move = Callable[[Corners], Corners]


def _identity(box: Corners) -> Corners:
    return box


class _Work:
    """The mending of one document."""

    def __init__(self, path: Path, document: Document, size: Size, classes: Sequence[str]) -> None:
        self.changes: list[Change] = []
        self._path, self._document, self._size = path, document, size
        self._classes = frozenset(classes)
        self._folded: dict[str, list[str]] = {}
        for name in classes:
            self._folded.setdefault(name.casefold(), []).append(name)
        self._seen: set[tuple[str, Corners]] = set()

    # --- the file

    def resized(self, orientation: int) -> Move | None:
        """Mend <size>, and give what brings boxes into the picture; None where nobody knows what they were made for."""
        element, said = stated(self._document)
        assert element is not None
        assert said is not None
        (height, width), (h, w) = self._size, said
        if (h, w) == (width, height):
            if orientation >= 5:
                self._set_size(element, said, "boxes turned by EXIF's rotation")
                return _turned(orientation, said)
            boxes = [corners(item) for item in self._document.objects()]
            if all(_fits(box, self._size) for box in boxes if is_box(box)):
                self._set_size(element, said, "width and height of <size> swapped back")
                return _identity
            return None
        if abs(w * height - h * width) > max(width, height, w, h):
            return None
        self._set_size(element, said, "boxes brought to the picture's scale")
        across, down = width / w, height / h

        def scaled(box: Corners) -> Corners:
            xmin, ymin, xmax, ymax = box
            return (xmin - 1) * across + 1, (ymin - 1) * down + 1, xmax * across, ymax * down

        return scaled

    def _set_size(self, element: Element, said: Size, what: str) -> None:
        for name, value in zip(("height", "width"), self._size, strict=True):
            found = child(element, name)
            assert found is not None
            found.text = str(value)
        before, after = (f"{width}x{height}" for height, width in (said, self._size))
        self._change(child(element, "width"), what, before, after)

    # --- an object

    def mend(self, item: Element, move: Move) -> None:
        """Mend one object, or take it out."""
        name = self._name(item)
        if name is None:
            return
        box = self._box(item)
        if box is None:
            return
        moved = move(_ordered(box))
        if _swapped(box) and not _fits(moved, self._size):  # then nobody knows which of its corners is wrong
            height, width = self._size
            what = f"a box whose corners are the wrong way round, and swapped back leave the {width}x{height} picture"
            self._out(item, f"{what}: {_told(box)}")
            return
        inside = self._inside(item, moved)
        if inside is None:
            return
        if (name, inside) in self._seen:
            self._out(item, f"a second {name!r} with the same box")
            return
        self._seen.add((name, inside))
        if inside != box:
            element = child(item, "bndbox")
            assert element is not None
            for corner, value in zip(CORNERS, inside, strict=True):
                found = child(element, corner)
                assert found is not None
                found.text = _shown(value)
            self._change(item, _why(box, moved, inside), _told(box), _told(inside))
        self._marks(item)

    def _name(self, item: Element) -> str | None:
        element = child(item, "name")
        name = class_name(element.text or "") if element is not None else ""
        if element is None or not name:
            return self._out(item, "an object without a class")
        known = self._folded.get(name.casefold(), [])
        if name not in self._classes:
            if len(known) != 1:
                return self._out(item, f"an object of the class {name!r}, which is not in the list")
            self._change(item, "class spelled as in the list", repr(element.text), repr(known[0]))
            element.text = name = known[0]
        elif element.text != name:
            self._change(element, "class name without space, in NFC", repr(element.text), repr(name))
            element.text = name
        return name

    def _box(self, item: Element) -> Corners | None:
        """The corners as they are; None where the object was taken out."""
        elements = [inside for inside in item if local(inside) == "bndbox"]
        if len(elements) > 1:
            values = {tuple(text(child(one, corner)) for corner in CORNERS) for one in elements}
            if len(values) > 1:
                return self._out(item, f"an object with {len(elements)} different boxes")
            for one in elements[1:]:
                item.remove(one)
            self._change(item, "the same box given several times: one kept", str(len(elements)), "1")
        box = corners(item)
        if not is_box(box):
            said = " ".join(text(child(child(item, "bndbox"), corner)) or "-" for corner in CORNERS)
            return self._out(item, f"an object whose box is no four numbers: {said}", _unreadable(item))
        return box

    def _inside(self, item: Element, box: Corners) -> Corners | None:
        """The box cut at the picture's edges where it leaves by more than rounding; None where nothing is left."""
        height, width = self._size
        xmin, ymin, xmax, ymax = box
        low = max(xmin, 1.0), max(ymin, 1.0)
        high = min(xmax, float(width)), min(ymax, float(height))
        if not (np.float32(high[0]) - np.float32(low[0] - 1) > 1 and np.float32(high[1]) - np.float32(low[1] - 1) > 1):
            return self._out(item, f"a box without area in the {width}x{height} picture: {_told(box)}")
        return *low, *high

    def _marks(self, item: Element) -> None:
        for name in ("difficult", "truncated", "occluded", "crowd"):
            element = child(item, name)
            if element is not None and truth(text(element)) is None:
                self._change(element, f"<{name}> that cannot be read, taken as 0", repr(text(element)), "0")
                for inside in list(element):
                    element.remove(inside)
                element.text = "0"

    def _out(self, item: Element, what: str, where: Element | None = None) -> None:
        self._change(item if where is None else where, "object left out", what, "")
        self._document.root.remove(item)

    def _change(self, element: Element | None, what: str, before: str, after: str) -> None:
        """Note a change, on the line that a finding about the same thing has."""
        line = self._document.lines.get(element) if element is not None else None
        self.changes.append(Change("", str(self._path), line, what, before, after))


def _unreadable(item: Element) -> Element | None:
    """The first corner that stands there and is no number; None where one is missing before it."""
    box = child(item, "bndbox")
    found = (child(box, corner) for corner in CORNERS)
    return next((one for one in found if one is None or math.isnan(number(text(one)))), None)


def _swapped(box: Corners) -> bool:
    return box[0] > box[2] or box[1] > box[3]


def _ordered(box: Corners) -> Corners:
    xmin, ymin, xmax, ymax = box
    return min(xmin, xmax), min(ymin, ymax), max(xmin, xmax), max(ymin, ymax)


def _fits(box: Corners, size: Size) -> bool:
    height, width = size
    return min(box) >= 0 and max(box[0], box[2]) <= width + 1 and max(box[1], box[3]) <= height + 1


def _turned(orientation: int, stored: Size) -> Move:
    """How a box moves when a picture of the `stored` size is turned as EXIF says: tag 0x0112, 5 .. 8."""
    height, width = stored

    def turned(box: Corners) -> Corners:
        xmin, ymin, xmax, ymax = box
        x1, y1, x2, y2 = xmin - 1, ymin - 1, xmax, ymax
        left, right = (y1, y2) if orientation in (5, 8) else (height - y2, height - y1)
        top, bottom = (x1, x2) if orientation in (5, 6) else (width - x2, width - x1)
        return left + 1, top + 1, right, bottom

    return turned


def _why(before: Corners, moved: Corners, inside: Corners) -> str:
    parts = ["corners swapped back"] if _swapped(before) else []
    if sorted(moved) != sorted(before):
        parts.append("box moved with its picture")
    if inside != moved:
        parts.append("box cut at the edge")
    return ", ".join(parts) or "box"


def _shown(value: float) -> str:
    rounded = round(value, 3)
    return str(int(rounded)) if math.isclose(rounded, round(rounded)) else f"{rounded:g}"


def _told(box: Corners) -> str:
    return " ".join(_shown(value) for value in box)

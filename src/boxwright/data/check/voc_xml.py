"""A VOC XML file → all its elements with their lines, for what `formats.voc` rightly does not look at."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element
from xml.parsers import expat

import numpy as np

from boxwright.data.formats.base import RefusedError, class_name, number
from boxwright.data.formats.voc import MAX_DEPTH, MAX_OBJECTS, readable_xml
from boxwright.types import Float32, Int64, Names, Size

CORNERS = ("xmin", "ymin", "xmax", "ymax")


class Document(NamedTuple):
    """An annotation whole, so that it can be written again with all that is in it."""

    root: Element
    lines: dict[Element, int]  # where each element begins

    def objects(self) -> list[Element]:
        return [child for child in self.root if local(child) == "object"]

    def text(self, name: str) -> str:
        """What stands in a child of the root."""
        return text(child(self.root, name))


def read_document(path: Path) -> Document | None:
    """The elements of an annotation that `formats.voc` reads; None of one that it refuses."""
    try:
        data, encoding = readable_xml(path)
    except RefusedError:
        return None
    parser = expat.ParserCreate(encoding)
    tree = ElementTree.TreeBuilder(insert_comments=True)
    lines: dict[Element, int] = {}
    depth = objects = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, objects
        depth += 1
        objects += depth == 2 and tag.rpartition(":")[2] == "object"
        if depth > MAX_DEPTH or objects > MAX_OBJECTS:
            raise RefusedError("is too large")
        lines[tree.start(tag, attributes)] = parser.CurrentLineNumber

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        tree.end(tag)

    def refuse(*_: object) -> None:
        raise RefusedError("has a DOCTYPE")

    parser.buffer_text = True
    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = tree.data
    parser.CommentHandler = tree.comment
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
        return Document(tree.close(), lines)
    except (expat.ExpatError, RefusedError, LookupError, ValueError):
        return None


def local(element: Element) -> str:
    """An element's name without its namespace; "" of a comment, whose tag is a function."""
    return "" if callable(element.tag) else element.tag.rpartition(":")[2]


def child(element: Element | None, name: str) -> Element | None:
    """The first child of that name."""
    if element is None:
        return None
    return next((inside for inside in element if local(inside) == name), None)


def text(element: Element | None) -> str:
    return (element.text or "").strip() if element is not None else ""


def corners(item: Element) -> tuple[float, float, float, float]:
    """xmin ymin xmax ymax of an object as the file has them, NaN where one is no number."""
    box = child(item, "bndbox")
    xmin, ymin, xmax, ymax = (number(text(child(box, name))) for name in CORNERS)
    return xmin, ymin, xmax, ymax


def is_box(values: tuple[float, float, float, float]) -> bool:
    return not any(math.isnan(value) for value in values)


def line_of(path: Path, box: Float32, name: str) -> int | None:
    """The line of the object of a class that has this box, continuous edges; None where it was made of another."""
    try:
        status = path.stat()
    except OSError:
        return None
    boxes, names, lines = _known(path, status.st_mtime_ns, status.st_size)
    if not len(boxes):
        return None
    apart = np.abs(boxes - box).max(1)
    apart = np.where(apart < 1.5, apart + 2 * (names != name), np.inf)  # it may have been cut by a pixel
    best = int(np.nanargmin(np.append(apart, np.inf)))
    return int(lines[best]) if best < len(lines) and np.isfinite(apart[best]) else None


@lru_cache(maxsize=4)  # thousands of objects in one file may be asked for
def _known(path: Path, modified: int, size: int) -> tuple[Float32, Names, Int64]:
    """Boxes (N, 4) with continuous edges, classes and lines of the objects in a file."""
    document = read_document(path)
    objects = document.objects() if document else []
    boxes = np.array([corners(item) for item in objects], np.float32).reshape(-1, 4)
    boxes[:, :2] -= 1
    names = np.array([class_name(text(child(item, "name"))) for item in objects], np.str_)
    lines = np.array([document.lines[item] for item in objects if document], np.int64)
    return boxes, names, lines


def stated(document: Document) -> tuple[Element | None, Size | None]:
    """<size>, and the (height, width) in it."""
    element = child(document.root, "size")
    height, width = number(text(child(element, "height"))), number(text(child(element, "width")))
    return element, (round(height), round(width)) if height > 0 and width > 0 else None

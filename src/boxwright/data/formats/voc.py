"""Pascal VOC XML → boxes, labels and flags of one picture, and back.

Coordinates in the file are 1-based and inclusive; here edges are continuous, so only the minimum moves:
x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax. What is wrong with one object costs that object, what is
wrong with the file costs the picture, and either way a `Fault` says so. Names inside the file (`<filename>`,
`<path>`) are never used to find anything.
"""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat
from xml.sax.saxutils import escape

from boxwright.data.formats.base import (
    DECISIVE,
    Annotation,
    Box,
    DroppedError,
    Item,
    Marks,
    Objects,
    Reader,
    RefusedError,
    Source,
    VocBoxes,
    class_name,
    contradicts,
    disagreement,
    number,
    one_line,
    quoted,
    read_bytes,
    skipped,
    span,
    stated_size,
    truth,
)
from boxwright.data.formats.pictures import paired_items
from boxwright.types import Record, Size

CLASSES = (  # of the challenges 2007 to 2012, in the official order
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

MAX_BYTES = 10_000_000
MAX_OBJECTS = 10_000
MAX_DEPTH = 64


def sign(paths: Sequence[Path]) -> str | None:
    """That there is XML."""
    return f"{len(paths)} .xml" if paths else None


class VocReader(Reader):
    """An XML file for each picture, of the same stem."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._unread: Counter[str] = Counter()

    def items(self) -> list[Item]:
        return paired_items(self._source, ".xml")

    def read(self, item: Item, labels: Mapping[str, int], size: Size) -> Annotation:
        assert item.annotation is not None
        boxes = self._source.voc_boxes
        return read_annotation(item.annotation, labels, size, unread=self._unread, boxes=boxes)

    @property
    def unread(self) -> Mapping[str, int]:
        return self._unread

    def class_counts(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for item in self.items():
            if item.annotation:
                counts.update(class_counts(item.annotation))
        return counts


def read_annotation(
    path: Path,
    classes: Mapping[str, int],
    size: Size,
    *,
    unread: Counter[str] | None = None,
    boxes: VocBoxes = "from 1",
) -> Annotation:
    """The objects in `path` for a picture of `size`; `classes` has each `class_name` and its label.

    Never raises for what is in the file. Boxes are clamped to the picture; a box that then has a side of one
    pixel or less is dropped (`xmax` equal to `xmin` is how annotation tools write a slip of the mouse). What is there
    beside objects, such as their parts, is counted in `unread`.
    """
    try:
        document = _parse(path)
    except RefusedError as error:
        return skipped(error.fault(path))
    if reason := disagreement(document.size, size, "<size> says"):
        return contradicts(path, reason, document.size_line)

    if unread is not None and document.parts:
        unread["parts of objects"] += document.parts
    objects = Objects(path, size, classes)
    for item in document.objects:
        with objects.one(item.line):
            label = objects.label(_name(item))
            if len(item.boxes) > 1:
                objects.repaired(f"has {len(item.boxes)} <bndbox>: the first is read", wrong=True)
            box, shown, hint = _box(item, boxes)
            objects.add(label, box, _marks(item, objects), shown=shown, hint=hint)
    return objects.annotation()


def readable_xml(path: Path) -> tuple[bytes, str | None]:
    """The bytes of an annotation as expat can read them, and their encoding, None where it can tell by itself.

    Raises `RefusedError`.
    """
    return _readable(read_bytes(path, MAX_BYTES))


def class_counts(path: Path) -> Counter[str]:
    """How many objects of each class `path` names; nothing where it cannot be read."""
    try:
        objects = _parse(path).objects
    except RefusedError:
        return Counter()
    names = (class_name(item.fields["name"].text) for item in objects if "name" in item.fields)
    return Counter(name for name in names if name)


def write_annotation(path: Path, record: Record, classes: Sequence[str]) -> None:
    """Write `record` as VOC XML, so that `read_annotation` gives it back; `classes` names each label.

    Exact for what `read_annotation` accepts: no two equal boxes of a class, and sides of more than a pixel.
    Where an edge is no whole number it is written as a decimal fraction. `<crowd>` is our own element: VOC has none.
    """
    height, width = record.size
    lines = [
        "<annotation>",
        f"\t<filename>{_xml(record.image.name)}</filename>",
        f"\t<size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for index, label in enumerate(record.labels):
        x1, y1, x2, y2 = (float(edge) for edge in record.boxes[index])
        lines += [
            "\t<object>",
            f"\t\t<name>{_xml(classes[int(label)])}</name>",
            *([f"\t\t<pose>{_xml(str(record.pose[index]))}</pose>"] if record.pose[index] else []),
            f"\t\t<truncated>{int(record.truncated[index])}</truncated>",
            *(f"\t\t<{mark}>1</{mark}>" for mark in ("occluded", "crowd") if getattr(record, mark)[index]),
            f"\t\t<difficult>{int(record.difficult[index])}</difficult>",
            f"\t\t<bndbox><xmin>{_decimal(x1 + 1)}</xmin><ymin>{_decimal(y1 + 1)}</ymin>"
            f"<xmax>{_decimal(x2)}</xmax><ymax>{_decimal(y2)}</ymax></bndbox>",
            "\t</object>",
        ]
    path.write_text("\n".join([*lines, "</annotation>", ""]), encoding="utf-8", newline="\n")


def _decimal(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2


def _xml(text: str) -> str:
    return escape(_NOT_XML.sub("?", text))


# --- from elements to boxes


def _name(item: _Object) -> str:
    name = class_name(item.fields["name"].text) if "name" in item.fields else ""
    if not name:
        raise DroppedError("<object> has no <name>")
    return name


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _box(item: _Object, boxes: VocBoxes) -> tuple[Box, str, str]:
    """The box, as the file has it, and what may explain it if it leaves the picture."""
    if not item.boxes:
        raise DroppedError("<object> has no <bndbox>")
    xmin, ymin, xmax, ymax = (_number(item, corner) for corner in _CORNERS)
    span("xmin", xmin, "xmax", xmax)
    span("ymin", ymin, "ymax", ymax)
    shown = " ".join(item.boxes[0][corner].text.strip()[:12] for corner in _CORNERS)
    if boxes != "from 1":
        last = int(boxes == "from 0")  # the last pixel is inside
        return (xmin, ymin, xmax + last, ymax + last), shown, ""
    hint = " (VOC counts from 1; `voc_boxes` in a data YAML says otherwise)" if 0 in (xmin, ymin) else ""
    return (xmin - 1, ymin - 1, xmax, ymax), shown, hint


def _number(item: _Object, corner: str) -> float:
    if corner not in item.boxes[0]:
        raise DroppedError(f"<bndbox> has no <{corner}>")
    text, line = item.boxes[0][corner]
    value = number(text)
    if math.isnan(value):
        raise DroppedError(f"{corner} is {quoted(text)}, which is no number", line)
    return value


def _marks(item: _Object, objects: Objects) -> Marks:
    flags: dict[str, bool] = {}
    for mark in _FLAGS:
        text, line = item.fields.get(mark, _Field("", item.line))
        flag = truth(text)
        if flag is None:
            objects.repaired(f"{mark} is {quoted(text)}: taken as 0", line, wrong=mark in DECISIVE)
        flags[mark] = bool(flag)
    pose = one_line(item.fields["pose"].text) if "pose" in item.fields else ""
    return Marks(**flags, pose=pose)


# --- from bytes to elements


class _Field(NamedTuple):
    text: str
    line: int


@dataclass
class _Object:
    line: int
    fields: dict[str, _Field] = field(default_factory=dict[str, _Field])  # name, pose and flags
    boxes: list[dict[str, _Field]] = field(default_factory=list[dict[str, _Field]])  # the first counts


class _Document:
    """What matters of an annotation, gathered while expat reads it: no tree, so no bomb of one."""

    def __init__(self, parser: expat.XMLParserType) -> None:
        self.objects: list[_Object] = []
        self.sizes: dict[str, _Field] = {}
        self.parts = 0  # of objects: head, hand, foot
        self._parser = parser
        self._path: list[str] = []
        self._text: list[str] = []
        self._line = 0
        parser.buffer_text = True
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text.append
        parser.StartDoctypeDeclHandler = self._refuse_doctype

    @property
    def size(self) -> Size | None:
        """(height, width) as stated; None where it is missing or no size."""
        none = _Field("", 0)
        return stated_size(self.sizes.get("height", none).text, self.sizes.get("width", none).text)

    @property
    def size_line(self) -> int | None:
        return self.sizes["width"].line if "width" in self.sizes else None

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._line = self._parser.CurrentLineNumber
        self._path.append(tag.rpartition(":")[2][:40])  # whatever the namespace
        self._text.clear()
        if len(self._path) > MAX_DEPTH:
            raise RefusedError(f"elements are nested deeper than {MAX_DEPTH}", self._line)
        place = "/".join(self._path)
        if place == "annotation/object":
            if len(self.objects) == MAX_OBJECTS:
                raise RefusedError(f"has more than {MAX_OBJECTS} objects", self._line)
            self.objects.append(_Object(self._line))
        elif place == "annotation/object/bndbox":
            self.objects[-1].boxes.append({})
        elif place == "annotation/object/part":
            self.parts += 1
        elif place.lower() in ("annotation", "annotation/object", "annotation/object/bndbox"):
            if place != "annotation":
                raise RefusedError(f"<{tag}> must be written <{tag.lower()}>", self._line)
        elif len(self._path) == 1:
            raise RefusedError(f"is no VOC annotation: it begins with <{tag[:40]}>, not <annotation>", self._line)

    def _end(self, tag: str) -> None:
        place, leaf = "/".join(self._path[:-1]), self._path[-1]
        if place == "annotation/object/bndbox":
            into = self.objects[-1].boxes[-1]
        elif place == "annotation/object":
            into = self.objects[-1].fields
        elif place == "annotation/size":
            into = self.sizes
        else:
            into = None
        if into is not None and leaf in _FIELDS:
            into.setdefault(leaf, _Field("".join(self._text), self._line))
        self._text.clear()
        self._path.pop()

    def _refuse_doctype(self, *_: object) -> None:
        raise RefusedError("has a DOCTYPE; entities are refused", self._parser.CurrentLineNumber)


_FLAGS = ("difficult", "truncated", "crowd", "occluded")
_FIELDS = frozenset(("name", "pose", *_FLAGS, "width", "height", *_CORNERS))


def _parse(path: Path) -> _Document:
    text, encoding = readable_xml(path)
    parser = expat.ParserCreate(encoding)
    document = _Document(parser)
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        reason = f"is not well-formed XML: {expat.ErrorString(error.code)}, column {error.offset + 1}"
        if not _is_utf8(text):
            reason += "; save it as UTF-8"
        raise RefusedError(reason, error.lineno) from None
    except (LookupError, ValueError) as error:  # a declared encoding that expat cannot learn
        raise RefusedError(f"is not readable XML: {error}", 1) from None
    return document


# Expat reads these by itself, or learns them from Python a byte a character.
_ONE_BYTE = re.compile(r"ascii|utf-8|utf-16|iso8859-\d+|cp\d+|koi8-[rtu]")
# These it does not, and annotation tools write them; Python decodes them first.
_MULTIBYTE = re.compile(r"gb2312|gbk|gb18030|big5|big5hkscs|shift_jis|cp932|cp949|euc_jp|euc_kr")
_DECLARATION = re.compile(rb"""<\?xml[^>]*?\sencoding\s*=\s*["']([\w.:-]{1,40})["'][^>]*>|<\?xml[^>]*>""")


def _readable(data: bytes) -> tuple[bytes, str | None]:
    """The bytes to give to expat, and their encoding, None where it can tell by itself."""
    if b"\0" in data[:4] or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data, "utf-16"  # whatever it says: tools save again what said utf-8
    data = data.rstrip(b"\0 \t\r\n")
    declaration = _DECLARATION.match(data.lstrip())
    if declaration is None:
        return data, None
    declared = (declaration[1] or b"utf-8").decode("ascii")
    try:
        name = codecs.lookup(declared).name
    except LookupError:
        name = declared
    if _MULTIBYTE.fullmatch(name):
        try:
            return data.decode(name).encode(), "utf-8"
        except UnicodeDecodeError:
            raise RefusedError(f"is not {declared}, though it says so", 1) from None
    if not _ONE_BYTE.fullmatch(name):
        raise RefusedError(f"is encoded as {declared}; save it as UTF-8", 1)
    if data[:1].isspace():  # which XML forbids before a declaration: without it, line numbers stay true
        return data.replace(declaration[0], b" " * len(declaration[0]), 1), name
    return data, None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True

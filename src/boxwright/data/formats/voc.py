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
import stat
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from xml.parsers import expat
from xml.sax.saxutils import escape

import numpy as np

from boxwright.types import Bool, Fault, Float32, Int64, Record, Size, no_boxes

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


class Annotation(NamedTuple):
    """What one XML file says about one picture."""

    boxes: Float32  # (N, 4) pixels
    labels: Int64  # (N,)
    difficult: Bool  # (N,)
    truncated: Bool  # (N,)
    faults: tuple[Fault, ...]  # among them an `UnknownClass` for each object of a class that is not asked for

    @property
    def skipped(self) -> bool:
        """Whether the whole file cannot be trusted, so that there are no labels for the picture."""
        return any(fault.action == "skipped image" for fault in self.faults)


@dataclass(frozen=True)
class UnknownClass(Fault):
    """An object whose class is not in the list: a mistake in the list more often than in the annotation."""

    name: str = ""


def class_name(text: str) -> str:
    """The one spelling of a class name: no space around it, Unicode composed (NFC)."""
    return unicodedata.normalize("NFC", text).strip()


def read_annotation(path: Path, classes: Mapping[str, int], size: Size) -> Annotation:
    """The objects in `path` for a picture of `size`; `classes` has each `class_name` and its label.

    Never raises for what is in the file. Boxes are clamped to the picture; a box that then has a side of one
    pixel or less is dropped (`xmax` equal to `xmin` is how annotation tools write a slip of the mouse).
    """
    try:
        document = _parse(path)
    except _RefusedError as error:
        return _skipped(Fault(path, error.reason, "skipped image", error.line))
    if reason := _disagreement(document.size, size):
        return _skipped(Fault(path, reason, "skipped image", document.size_line))

    faults: list[Fault] = []
    found: dict[tuple[int, _Box], tuple[bool, bool]] = {}  # two equal boxes of a class are one object
    for item in document.objects:
        try:
            key = _label(item, classes), _box(item, size)
            if key in found:
                raise _DroppedError("is in the file twice: same class, same box")
        except _DroppedError as error:
            faults.append(error.fault(path, item.line))
            continue
        found[key] = _flag(item, "difficult"), _flag(item, "truncated")
        faults += [Fault(path, reason, "repaired", line) for reason, line in item.repairs]
    flags = np.array([*found.values()], np.bool_).reshape(-1, 2)
    return Annotation(
        boxes=np.array([box for _, box in found], np.float32).reshape(-1, 4),
        labels=np.array([label for label, _ in found], np.int64),
        difficult=flags[:, 0].copy(),
        truncated=flags[:, 1].copy(),
        faults=tuple(faults),
    )


def class_counts(path: Path) -> Counter[str]:
    """How many objects of each class `path` names; nothing where it cannot be read."""
    try:
        objects = _parse(path).objects
    except _RefusedError:
        return Counter()
    names = (class_name(item.fields["name"].text) for item in objects if "name" in item.fields)
    return Counter(name for name in names if name)


def write_annotation(path: Path, record: Record, classes: Sequence[str]) -> None:
    """Write `record` as VOC XML, so that `read_annotation` gives it back; `classes` names each label.

    Exact for what `read_annotation` accepts: no two equal boxes of a class, and sides of more than a pixel.
    Where an edge is no whole number it is written as a decimal fraction.
    """
    height, width = record.size
    lines = [
        "<annotation>",
        f"\t<filename>{_xml(record.image.name)}</filename>",
        f"\t<size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    for box, label, difficult, truncated in zip(
        record.boxes, record.labels, record.difficult, record.truncated, strict=True
    ):
        x1, y1, x2, y2 = (float(edge) for edge in box)
        lines += [
            "\t<object>",
            f"\t\t<name>{_xml(classes[int(label)])}</name>",
            f"\t\t<truncated>{int(truncated)}</truncated>",
            f"\t\t<difficult>{int(difficult)}</difficult>",
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


def _skipped(fault: Fault) -> Annotation:
    none = np.zeros(0, np.bool_)
    return Annotation(no_boxes(), np.zeros(0, np.int64), none, none, (fault,))


def _disagreement(stated: Size | None, size: Size) -> str | None:
    """Why labels made for a picture of the `stated` size cannot be used on one of `size`."""
    if stated is None or max(abs(stated[0] - size[0]), abs(stated[1] - size[1])) <= 1:  # a pixel is rounding
        return None
    (height, width), (h, w) = size, stated
    says = f"<size> says {w}x{h}, but the picture is {width}x{height}"
    if (w, h) == (height, width):
        return f"{says}: swapped, or labelled before its EXIF rotation was applied"
    if abs(w * height - h * width) <= max(width, height, w, h):
        return f"{says}: labelled at {w / width:.3g} times its scale"
    return f"{says}: labelled on another picture"


# --- from elements to boxes


class _DroppedError(Exception):
    """Why an object is left out, `line` if not the object's own, and its class if it is `unknown`."""

    def __init__(self, reason: str, line: int | None = None, unknown: str | None = None) -> None:
        super().__init__(reason)
        self.line, self.unknown = line, unknown

    def fault(self, path: Path, line: int) -> Fault:
        if self.unknown is not None:
            return UnknownClass(path, str(self), "dropped box", line, self.unknown)
        return Fault(path, str(self), "dropped box", self.line or line)


def _label(item: _Object, classes: Mapping[str, int]) -> int:
    name = class_name(item.fields["name"].text) if "name" in item.fields else ""
    if not name:
        raise _DroppedError("<object> has no <name>")
    if name not in classes:
        raise _DroppedError(f"class {_quote(name)} is not in the list of classes", unknown=name)
    return classes[name]


def _box(item: _Object, size: Size) -> _Box:
    """x1 y1 x2 y2 inside the picture, as float32 holds them."""
    if not item.boxes:
        raise _DroppedError("<object> has no <bndbox>")
    xmin, ymin, xmax, ymax = (_number(item, corner) for corner in _CORNERS)
    for axis, low, high in (("x", xmin, xmax), ("y", ymin, ymax)):
        if low == high:
            raise _DroppedError(f"has no area: {axis}min and {axis}max are both {low:g}")
        if low > high:
            raise _DroppedError(f"{axis}min {low:g} is greater than {axis}max {high:g}")
    height, width = size
    whole = np.array([xmin - 1, ymin - 1, xmax, ymax])
    box = whole.clip(0, [width, height, width, height]).astype(np.float32)
    x1, y1, x2, y2 = (float(edge) for edge in box)
    if not (x2 - x1 > 1 and y2 - y1 > 1):  # so that what is read here can be written and read again
        raise _DroppedError(f"box {_corners(item)} has no area inside the {width}x{height} picture")
    if whole.min() < 0 or whole[2] > width or whole[3] > height:
        hint = " (VOC counts from 1)" if 0 in (xmin, ymin) else ""
        item.repairs.append((f"box {_corners(item)} leaves the {width}x{height} picture{hint}", item.line))
    return x1, y1, x2, y2


_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _decimal_value(text: str) -> float:
    """The number in `text`, NaN where there is none; float() takes inf, 1_0 and other scripts' digits too."""
    value = float(text) if len(text) < 100 and _DECIMAL.fullmatch(text.strip()) else math.nan
    return value if math.isfinite(value) else math.nan


def _number(item: _Object, corner: str) -> float:
    if corner not in item.boxes[0]:
        raise _DroppedError(f"<bndbox> has no <{corner}>")
    text, line = item.boxes[0][corner]
    value = _decimal_value(text)
    if math.isnan(value):
        raise _DroppedError(f"{corner} is {_quote(text)}, which is no number", line)
    return value


def _corners(item: _Object) -> str:
    return " ".join(item.boxes[0][corner].text.strip()[:12] for corner in _CORNERS)


def _flag(item: _Object, tag: str) -> bool:
    text, line = item.fields.get(tag, _Field("0", item.line))
    if text.strip().lower() in ("", "true", "false"):
        return text.strip().lower() == "true"
    value = _decimal_value(text)
    if math.isnan(value):
        item.repairs.append((f"{tag} is {_quote(text)}: taken as 0", line))
    return value > 0


def _quote(text: str) -> str:
    return repr(text.strip() if len(text) <= 40 else text.strip()[:39] + "…")


# --- from bytes to elements


class _RefusedError(Exception):
    """Why a whole file is refused."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


class _Field(NamedTuple):
    text: str
    line: int


@dataclass
class _Object:
    line: int
    fields: dict[str, _Field] = field(default_factory=dict[str, _Field])  # name, difficult, truncated
    boxes: list[dict[str, _Field]] = field(default_factory=list[dict[str, _Field]])  # the first counts
    repairs: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])  # reason, line


class _Document:
    """What matters of an annotation, gathered while expat reads it: no tree, so no bomb of one."""

    def __init__(self, parser: expat.XMLParserType) -> None:
        self.objects: list[_Object] = []
        self.sizes: dict[str, _Field] = {}
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
        if "height" not in self.sizes or "width" not in self.sizes:
            return None
        height, width = (_decimal_value(self.sizes[side].text) for side in ("height", "width"))
        return (round(height), round(width)) if height > 0 and width > 0 else None

    @property
    def size_line(self) -> int | None:
        return self.sizes["width"].line if "width" in self.sizes else None

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._line = self._parser.CurrentLineNumber
        self._path.append(tag.rpartition(":")[2][:40])  # whatever the namespace
        self._text.clear()
        if len(self._path) > MAX_DEPTH:
            raise _RefusedError(f"elements are nested deeper than {MAX_DEPTH}", self._line)
        place = "/".join(self._path)
        if place == "annotation/object":
            if len(self.objects) == MAX_OBJECTS:
                raise _RefusedError(f"has more than {MAX_OBJECTS} objects", self._line)
            self.objects.append(_Object(self._line))
        elif place == "annotation/object/bndbox":
            self.objects[-1].boxes.append({})
        elif place.lower() in ("annotation", "annotation/object", "annotation/object/bndbox"):
            if place != "annotation":
                raise _RefusedError(f"<{tag}> must be written <{tag.lower()}>", self._line)
        elif len(self._path) == 1:
            raise _RefusedError(f"is no VOC annotation: it begins with <{tag[:40]}>, not <annotation>", self._line)

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
        raise _RefusedError("has a DOCTYPE; entities are refused", self._parser.CurrentLineNumber)


_FIELDS = frozenset(("name", "difficult", "truncated", "width", "height", *_CORNERS))
_Box = tuple[float, float, float, float]


def _parse(path: Path) -> _Document:
    data = _bytes(path)
    text, encoding = _readable(data)
    parser = expat.ParserCreate(encoding)
    document = _Document(parser)
    try:
        parser.Parse(text, True)
    except expat.ExpatError as error:
        reason = f"is not well-formed XML: {expat.ErrorString(error.code)}, column {error.offset + 1}"
        if not _is_utf8(text):
            reason += "; save it as UTF-8"
        raise _RefusedError(reason, error.lineno) from None
    except (LookupError, ValueError) as error:  # a declared encoding that expat cannot learn
        raise _RefusedError(f"is not readable XML: {error}", 1) from None
    return document


def _bytes(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _RefusedError("is not a regular file")
        if status.st_size > MAX_BYTES:
            raise _RefusedError(f"is larger than {MAX_BYTES // 1_000_000} MB")
        data = path.read_bytes()
    except OSError as error:
        raise _RefusedError(f"cannot be read: {error.strerror or error}") from None
    if not data.strip(b"\0 \t\r\n"):
        raise _RefusedError("is empty")
    return data


# Expat reads these by itself, or learns them from Python a byte a character.
_ONE_BYTE = re.compile(r"ascii|utf-8|utf-16|iso8859-\d+|cp\d+|koi8-[rtu]")
# These it does not, and annotation tools write them; Python decodes them first.
_MULTIBYTE = re.compile(r"gb2312|gbk|gb18030|big5|big5hkscs|shift_jis|cp932|cp949|euc_jp|euc_kr")
_DECLARATION = re.compile(rb"""<\?xml[^>]*?\sencoding\s*=\s*["']([\w.:-]{1,40})["'][^>]*>|<\?xml[^>]*>""")


def _readable(data: bytes) -> tuple[bytes, str | None]:
    """The bytes to give to expat, and their encoding, None where it can tell by itself."""
    if b"\0" in data[:4] or data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data, None
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
            raise _RefusedError(f"is not {declared}, though it says so", 1) from None
    if not _ONE_BYTE.fullmatch(name):
        raise _RefusedError(f"is encoded as {declared}; save it as UTF-8", 1)
    if data[:1].isspace():  # which XML forbids before a declaration: without it, line numbers stay true
        return data.replace(declaration[0], b" " * len(declaration[0]), 1), name
    return data, None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True

"""The seam between a dataset on disk and its records: what a format is, and the rules that hold for every one of them.

A format is a `Reader` in a file of its own in this folder and a row in the table of `__init__.py`. A reader lists the
pictures of a `Source` as `Item`s and turns what is annotated in one of them into an `Annotation`; `Objects` gathers it,
so that a box is cut, dropped and reported alike whatever file it came from.
"""

from __future__ import annotations

import math
import re
import stat
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from boxwright.types import Action, Bool, Fault, Float32, Int64, Member, Names, Size, no_boxes

FormatName = Literal["voc", "coco", "yolo", "labelme", "csv", "shards"]
Box = tuple[float, float, float, float]  # x1 y1 x2 y2, pixels, continuous edges


VocBoxes = Literal["from 1", "from 0", "edges"]  # what corners in VOC XML are: pixels, the last one inside, or edges


@dataclass(frozen=True)
class Source:
    """Annotations and the pictures that they belong to, or a part of these."""

    images: Path | None  # the folder of pictures; None: to be found from the names in the annotations
    annotations: Path  # a folder with a file for each picture, or one file for all of them
    listing: Path | None = None  # a text file that names the pictures; None for all of them
    share: Literal["all", "train", "val"] = "all"  # of a split that is drawn by a hash of the id
    prefix: str = ""  # makes ids unique where a split has several sources
    format: FormatName = "voc"
    voc_boxes: VocBoxes = "from 1"
    names: tuple[str, ...] = ()  # of the classes that YOLO's files call 0, 1, ...; "" where a number is no class
    address: str = ""  # of the folder on a server that the annotations were fetched from and the pictures are in

    def __str__(self) -> str:
        return str(self.listing or self.images or self.annotations)


class Item(NamedTuple):
    """A picture and its annotation, as far as they exist."""

    id: str
    image: Path | Member | None
    annotation: Path | None
    faults: tuple[Fault, ...] = ()  # of the listing; one with "skipped image" leaves the picture out
    key: str = ""  # by which a reader of one file for all pictures finds what it says about this one
    listed: bool = False  # by its own name, so that a picture that is not there is a picture lost
    size: Size | None = None  # of the picture, where an index vouches for it, so that its header need not be read

    @property
    def skipped(self) -> bool:
        return _skips(self.faults)


class Annotation(NamedTuple):
    """What is annotated in one picture."""

    boxes: Float32  # (N, 4) pixels
    labels: Int64  # (N,)
    difficult: Bool  # (N,)
    truncated: Bool  # (N,)
    crowd: Bool  # (N,)
    occluded: Bool  # (N,)
    pose: Names  # (N,)
    faults: tuple[Fault, ...]  # among them an `UnknownClass` for each object of a class that is not asked for

    @property
    def skipped(self) -> bool:
        """Whether the whole annotation cannot be trusted, so that there are no labels for the picture."""
        return _skips(self.faults)


def _skips(faults: tuple[Fault, ...]) -> bool:
    return any(fault.action == "skipped image" for fault in faults)


class Reader(ABC):
    """A source that was opened. Raises `UserError` where it cannot be read at all."""

    classes: tuple[str, ...] = ()  # that the source lists by itself, in its order
    faults: tuple[Fault, ...] = ()  # that belong to no picture
    notes: tuple[str, ...] = ()  # how the source was understood

    @abstractmethod
    def items(self) -> list[Item]:
        """Every picture once, and annotations without a picture."""

    @abstractmethod
    def read(self, item: Item, labels: Mapping[str, int], size: Size) -> Annotation:
        """What is annotated in the picture of an item, which has `size`; `labels` has each `class_name`'s number."""

    def class_counts(self) -> Counter[str]:
        """How many objects of each class there are; empty for a source that lists its classes."""
        return Counter()

    @property
    def unread(self) -> Mapping[str, int]:
        """How many things that no record holds, such as outlines, were met so far."""
        return {}


class Format(NamedTuple):
    """A row of the table of formats."""

    title: str  # as people call it
    open: Callable[[Source], Reader]
    suffix: str  # of its annotation files
    sign: Callable[[Sequence[Path]], str | None]  # what shows that files of that suffix are of this format
    one_file: bool = False  # one for all pictures


@dataclass(frozen=True)
class UnknownClass(Fault):
    """An object whose class is not in the list: a mistake in the list more often than in the annotation."""

    name: str = ""


class RefusedError(Exception):
    """Why a whole file is refused."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line

    def fault(self, path: Path, action: Action = "skipped image") -> Fault:
        return Fault(path, self.reason, action, self.line, wrong=True)


class DroppedError(Exception):
    """Why an object is left out, `line` if not the object's own, and its class if it is `unknown`.

    It is `wrong` if the file contradicts itself or says what no box is, not if there is merely nothing to learn from.
    """

    def __init__(self, reason: str, line: int | None = None, unknown: str | None = None, *, wrong: bool = True) -> None:
        super().__init__(reason)
        self.line, self.unknown, self.wrong = line, unknown, wrong


# --- the objects of a picture


class Marks(NamedTuple):
    """What is said about an object beside its class and box."""

    difficult: bool = False
    truncated: bool = False
    crowd: bool = False
    occluded: bool = False
    pose: str = ""


class Objects:
    """Gathers the objects of one picture.

    A box is cut at the picture's edges; if it then has a side of a pixel or less it is dropped, and so is the second
    of two equal boxes of a class. (A side of a pixel is how a slip of the mouse is saved, and the least that VOC's
    inclusive corners can write.)
    """

    def __init__(self, path: Path, size: Size, labels: Mapping[str, int]) -> None:
        self._path, self._size, self._labels = path, size, labels
        self._found: dict[tuple[int, Box], Marks] = {}
        self._faults: list[Fault] = []
        self._repairs: list[Fault] = []  # of the object at hand
        self._line: int | None = None
        self._called = ""

    @contextmanager
    def one(self, line: int | None = None, called: str = "") -> Generator[None]:
        """The place to `add` one object: a `DroppedError` becomes a fault at `line`, or of what is `called` so."""
        self._line, self._called, self._repairs = line, called, []
        try:
            yield
        except DroppedError as error:
            reason = called + str(error)
            if error.unknown is not None:
                self._faults.append(UnknownClass(self._path, reason, "dropped box", line, error.unknown))
            else:
                self._faults.append(Fault(self._path, reason, "dropped box", error.line or line, wrong=error.wrong))
        else:
            self._faults += self._repairs

    def repaired(self, reason: str, line: int | None = None, *, wrong: bool = False) -> None:
        """Note what was mended about the object at hand; `wrong`, if only by a guess."""
        self._repairs.append(Fault(self._path, self._called + reason, "repaired", line or self._line, wrong=wrong))

    def label(self, name: str) -> int:
        """The number of a class."""
        name = class_name(name)
        if name not in self._labels:
            raise DroppedError(f"class {quoted(name)} is not in the list of classes", unknown=name)
        return self._labels[name]

    def add(self, label: int, box: Box, marks: Marks, *, shown: str = "", hint: str = "") -> None:
        """An object; `shown` is its box as the file has it, `hint` what may explain that it leaves the picture."""
        key = label, self._inside(box, shown or " ".join(f"{edge:g}" for edge in box), hint)
        if key in self._found:
            raise DroppedError("is in the file twice: same class, same box", wrong=False)
        self._found[key] = marks

    def _inside(self, box: Box, shown: str, hint: str) -> Box:
        """The part of a box inside the picture, as float32 holds it."""
        height, width = self._size
        limits = (width, height, width, height)
        x1, y1, x2, y2 = (
            float(np.float32(min(max(e, 0), limit))) + 0.0 for e, limit in zip(box, limits, strict=True)
        )  # no -0.0
        if not (x2 - x1 > 1 and y2 - y1 > 1):
            raise DroppedError(f"box {shown} has no area inside the {width}x{height} picture", wrong=False)
        if min(box) < -_ROUNDING or box[2] > width + _ROUNDING or box[3] > height + _ROUNDING:
            self.repaired(f"box {shown} leaves the {width}x{height} picture{hint}")
        return x1, y1, x2, y2

    def marks(self, said: Mapping[str, Any]) -> Marks:
        """The marks among what is said about the object at hand, by the names that formats have for them."""

        def flag(*names: str) -> bool:
            for name in names:
                if name in said:
                    value = truth(said[name])
                    if value is None:
                        self.repaired(f"{name} is {shown_value(said[name])}: taken as 0", wrong=name in DECISIVE)
                    return bool(value)
            return False

        pose = said.get("pose")
        return Marks(
            difficult=flag("difficult", "ignore"),
            truncated=flag("truncated"),
            crowd=flag("iscrowd", "crowd"),
            occluded=flag("occluded"),
            pose=one_line(pose) if isinstance(pose, str) else "",
        )

    def annotation(self) -> Annotation:
        """All that were added."""
        flags = np.array([marks[:4] for marks in self._found.values()], np.bool_).reshape(-1, 4)
        return Annotation(
            boxes=np.array([box for _, box in self._found], np.float32).reshape(-1, 4),
            labels=np.array([label for label, _ in self._found], np.int64),
            difficult=flags[:, 0].copy(),
            truncated=flags[:, 1].copy(),
            crowd=flags[:, 2].copy(),
            occluded=flags[:, 3].copy(),
            pose=np.array([marks.pose for marks in self._found.values()], np.str_),
            faults=tuple(self._faults),
        )


# Marks by which an object counts or does not: a guess would be a wrong label.
DECISIVE = frozenset(("difficult", "ignore", "crowd", "iscrowd"))
_ROUNDING = 0.5  # pixels over an edge that are no fault but a tool's rounding


def contradicts(path: Path, reason: str, line: int | None = None) -> Annotation:
    """The annotation of a picture that is left out because it was made for another."""
    return skipped(Fault(path, reason, "skipped image", line, wrong=True))


def skipped(fault: Fault) -> Annotation:
    """The annotation of a picture that is left out."""
    none = np.zeros(0, np.bool_)
    return Annotation(no_boxes(), np.zeros(0, np.int64), none, none, none, none, np.zeros(0, np.str_), (fault,))


def span(low_name: str, low: float, high_name: str, high: float) -> None:
    """Raise `DroppedError` unless the first edge comes before the second."""
    if low == high:
        raise DroppedError(f"has no area: {low_name} and {high_name} are both {low:g}", wrong=False)
    if low > high:
        raise DroppedError(f"{low_name} {low:g} is greater than {high_name} {high:g}")


def require_area(width: float, height: float) -> None:
    """Raise `DroppedError` for a box without area, and for one with a negative side."""
    if not (width > 0 and height > 0):
        wrong = not (width >= 0 and height >= 0)
        raise DroppedError(f"has no area: it is {width:g} wide and {height:g} high", wrong=wrong)


def sides(x1: float, y1: float, width: float, height: float) -> Box:
    """The box of a corner and its sides; raises `DroppedError` where it has none."""
    require_area(width, height)
    return x1, y1, x1 + width, y1 + height


def disagreement(stated: Size | None, size: Size, says: str) -> str | None:
    """Why labels made for a picture of the `stated` size cannot be used on one of `size`."""
    if stated is None or max(abs(stated[0] - size[0]), abs(stated[1] - size[1])) <= 1:  # a pixel is rounding
        return None
    (height, width), (h, w) = size, stated
    says = f"{says} {w}x{h}, but the picture is {width}x{height}"
    if (w, h) == (height, width):
        return f"{says}: swapped, or labelled before its EXIF rotation was applied"
    if abs(w * height - h * width) <= max(width, height, w, h):
        return f"{says}: labelled at {w / width:.3g} times its scale"
    return f"{says}: labelled on another picture"


def stated_size(height: Any, width: Any) -> Size | None:
    """(height, width) as a file has them, text or numbers; None where they are no size."""
    h, w = number(height), number(width)
    return (round(h), round(w)) if 0 < h < 1e9 and 0 < w < 1e9 else None


# --- words and numbers


def class_name(text: str) -> str:
    """The one spelling of a class name: no space around it, Unicode composed (NFC)."""
    return unicodedata.normalize("NFC", text).strip()


def is_class_name(name: str) -> bool:
    """Whether a name can be printed and written to any file."""
    return bool(name) and not any(unicodedata.category(letter).startswith("C") for letter in name)


def one_line(text: str) -> str:
    """Text for a picture's record: what cannot be printed is a space."""
    return "".join(" " if unicodedata.category(letter) in _NO_LETTERS else letter for letter in text).strip()


_NO_LETTERS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # the last two end a line, though they are spaces


_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def number(value: Any) -> float:
    """The finite number that text or a value of JSON is, NaN where it is none.

    float() alone would take inf, 1_0 and other scripts' digits too.
    """
    if isinstance(value, str):
        found = float(value) if len(value) < 100 and _DECIMAL.fullmatch(value.strip()) else math.nan
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            found = float(value)
        except OverflowError:  # an integer of hundreds of digits
            return math.nan
    else:
        return math.nan
    return found if math.isfinite(found) else math.nan


def truth(value: Any) -> bool | None:
    """Whether a flag is set, None where it cannot be read; a missing one is not."""
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("", "true", "false", "yes", "no"):
        return value.strip().lower() in ("true", "yes")
    found = number(value)
    return None if math.isnan(found) else found > 0


def quoted(text: str) -> str:
    """Text from a file, as a message may show it."""
    return repr(text.strip() if len(text) <= 40 else text.strip()[:39] + "…")


def shown_value(value: Any) -> str:
    """A value of JSON, as a message may show it; never deep, because repr() would recurse."""
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        few = [shown_value(part) if not isinstance(part, list | dict) else "…" for part in value[:6]]
        return f"[{', '.join(few)}{', …' if len(value) > 6 else ''}]"
    if isinstance(value, dict):
        return "an object"
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


# --- bytes


def read_bytes(path: Path, limit: int, *, empty: bool = False) -> bytes:
    """A regular file's bytes; raises `RefusedError` for more than `limit`, and for none unless it may be `empty`."""
    try:
        status = path.stat()  # before open(), which would wait for ever on a FIFO
        if not stat.S_ISREG(status.st_mode):
            raise RefusedError("is not a regular file")
        if status.st_size > limit:
            raise RefusedError(f"is larger than {limit // 1_000_000} MB")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise RefusedError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not empty and not data.strip(b"\0 \t\r\n"):
        raise RefusedError("is empty")
    return data


def read_text(path: Path, limit: int, *, empty: bool = False) -> str:
    """A file's text, UTF-8 or with a byte order mark; raises `RefusedError`."""
    data = read_bytes(path, limit, empty=empty)
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1 if encoding == "utf-8-sig" else None
        raise RefusedError("is no UTF-8 text; save it as UTF-8", line) from None

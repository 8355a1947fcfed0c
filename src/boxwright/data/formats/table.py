"""CSV: a row for each object, whatever its columns are called; one file for all pictures.

The names of the columns decide what a box is: corners (`xmin ymin xmax ymax`, `x1 y1 x2 y2`, `left top right bottom`),
a corner and sides (`x y w h`), the centre and sides (`cx cy w h`), or one column `bbox` with x y width height. Without
names, three usual orders are known. Numbers are pixels, 0-based and continuous; if they are all at most 1, fractions of
the picture. A row without a box is a picture without objects. Which of these it was, a note says.
"""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
    quoted,
    read_text,
    sides,
    span,
    stated_size,
)
from boxwright.data.formats.pictures import NamedPictures, likely_folders, unique_ids
from boxwright.types import Fault, Size, UserError

MAX_BYTES = 1 << 32
_HEAD = 1 << 16  # characters that show the separator and the columns

# Names are compared in lower case, without anything but letters and digits, and without a leading "bbox" or "box".
_IMAGE = (
    "filename", "file", "filepath", "imagefilename", "imagefile", "imagepath", "imagename", "imageid", "image", "path",
    "img", "imgpath", "imgname", "fname",
)  # fmt: skip
_CLASS = (
    "class",
    "classname",
    "label",
    "labelname",
    "category",
    "categoryname",
    "name",
    "object",
    "classid",
    "labelid",
)
_BOXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("corners", ("xmin", "ymin", "xmax", "ymax")),
    ("corners", ("x1", "y1", "x2", "y2")),
    ("corners", ("x0", "y0", "x1", "y1")),
    ("corners", ("left", "top", "right", "bottom")),
    ("centre", ("cx", "cy", "w", "h")),
    ("centre", ("cx", "cy", "width", "height")),
    ("centre", ("xcenter", "ycenter", "w", "h")),
    ("centre", ("xcenter", "ycenter", "width", "height")),
    ("centre", ("centerx", "centery", "width", "height")),
    ("sides", ("x", "y", "w", "h")),
    ("sides", ("x", "y", "width", "height")),
    ("sides", ("xmin", "ymin", "w", "h")),
    ("sides", ("xmin", "ymin", "width", "height")),
    ("sides", ("left", "top", "w", "h")),
    ("sides", ("left", "top", "width", "height")),
    ("list", ("bbox",)),
)
_WIDTH, _HEIGHT = ("imagewidth", "imgwidth", "imgw", "width"), ("imageheight", "imgheight", "imgh", "height")
_MARKS = {
    "difficult": "difficult", "truncated": "truncated", "istruncated": "truncated", "occluded": "occluded",
    "isoccluded": "occluded", "crowd": "crowd", "iscrowd": "crowd", "isgroupof": "crowd", "pose": "pose",
}  # fmt: skip
# Usual orders of columns without names; N is a number, T is text.
_NAMELESS = {
    "TNNNNT": "image x1 y1 x2 y2 class",  # keras-retinanet
    "TNNTNNNN": "image width height class xmin ymin xmax ymax",  # TensorFlow's object detection API
    "TNNNNTNN": "class x y w h image imagewidth imageheight",  # makesense.ai
}


class _Columns(NamedTuple):
    """Where in a row things stand."""

    image: int
    name: int
    kind: str  # of box: corners, sides, centre, list
    box: tuple[int, ...]
    words: tuple[str, ...]  # what the box columns are called
    size: tuple[int, int] | None  # height, width of the picture
    marks: Mapping[str, int]

    @property
    def told(self) -> tuple[int, ...]:
        """Where all that is read stands."""
        return (self.image, self.name, *self.box, *(self.size or ()), *self.marks.values())


class _Row(NamedTuple):
    line: int
    name: str
    box: tuple[str, ...]  # four texts, or none at all
    size: tuple[str, str]  # height, width; "" where not stated
    marks: Mapping[str, str]


def sign(paths: Sequence[Path]) -> str | None:
    """That the columns of a file are understood."""
    for path in paths:
        try:
            with path.open("rb") as file:
                head = file.read(_HEAD).decode("utf-8-sig", errors="replace")
            columns, _ = _columns(_rows(head, strict=False))  # it may end inside of quotes
        except (OSError, _UnclearError):
            continue
        return f"{path.name} with columns {' '.join(columns.words)}"
    return None


class CsvReader(Reader):
    """One table, read at once."""

    def __init__(self, source: Source) -> None:
        self._path = source.annotations
        try:
            rows = _rows(read_text(self._path, MAX_BYTES), strict=True)
            self._columns, rows = _columns(rows)
        except RefusedError as error:
            raise UserError(f"{self._path}{f':{error.line}' if error.line else ''}: {error.reason}") from None
        except _UnclearError as error:
            raise UserError(f"{self._path}{f':{error.line}' if error.line else ''}: {error}") from None
        faults: list[Fault] = []
        by_name: dict[str, list[_Row]] = {}
        for line, cells in rows:
            if len(cells) <= max(self._columns.image, self._columns.name, *self._columns.box):
                faults.append(
                    Fault(self._path, f"row has {len(cells)} columns, too few", "dropped box", line, wrong=True)
                )
                continue
            if any("\n" in cells[index] for index in self._columns.told if index < len(cells)):
                reason = 'a " holds several lines together as one row: one is missing, or one too much'
                faults.append(Fault(self._path, reason, "dropped box", line, wrong=True))
                continue
            if not cells[self._columns.image].strip():
                faults.append(Fault(self._path, "row names no picture", "dropped box", line, wrong=True))
                continue
            by_name.setdefault(cells[self._columns.image].strip(), []).append(self._row(line, cells))
        if not by_name:
            raise UserError(f"{self._path} has no row")
        self._fractions = self._are_fractions(by_name)
        folders = [source.images] if source.images else likely_folders(self._path)
        pictures = NamedPictures(self._path, list(by_name), folders)
        self._items, self._by_key = self._found(by_name, pictures)
        self.faults = tuple(faults)
        unit = "fractions of the picture" if self._fractions else "pixels counted from 0"
        columns = " ".join(self._columns.words)
        self.notes = (f"{self._path.name}: boxes are {_SAYS[self._columns.kind]}, in {columns}, {unit}",)
        if source.images is None:
            self.notes += (f"{self._path.name}: its pictures are in {pictures.folder}",)

    def items(self) -> list[Item]:
        return self._items

    def read(self, item: Item, labels: Mapping[str, int], size: Size) -> Annotation:
        objects = Objects(self._path, size, labels)
        for row in self._by_key[item.key]:
            if reason := disagreement(stated_size(*row.size), size, "the row says"):
                return contradicts(self._path, reason, row.line)
            if not any(text.strip() for text in row.box):
                continue
            with objects.one(row.line):
                if not class_name(row.name):
                    raise DroppedError("names no class")
                label = objects.label(row.name)
                box, shown = self._box(row, size), " ".join(text.strip()[:12] for text in row.box)
                objects.add(label, box, objects.marks(row.marks), shown=shown)
        return objects.annotation()

    def class_counts(self) -> Counter[str]:
        rows = (row for rows in self._by_key.values() for row in rows)
        names = (class_name(row.name) for row in rows if any(text.strip() for text in row.box))
        return Counter(name for name in names if name)

    def _row(self, line: int, cells: list[str]) -> _Row:
        columns = self._columns

        def cell(index: int) -> str:
            return cells[index] if index < len(cells) else ""

        box = tuple(cell(index) for index in columns.box)
        if columns.kind == "list":
            box = tuple(re.split(r"[\s,;]+", box[0].strip(" \t[](){}"))) if box[0].strip() else ()
        height, width = (cell(index) for index in columns.size) if columns.size else ("", "")
        marks = {mark: cell(index) for mark, index in columns.marks.items()}
        return _Row(line, cell(columns.name), box, (height, width), marks)

    @staticmethod
    def _are_fractions(by_name: Mapping[str, list[_Row]]) -> bool:
        """Whether the largest number of most boxes is at most 1: a box of pixels would have no area then."""
        some = [row for rows in by_name.values() for row in rows if row.box]
        some = some[:: len(some) // 10_000 + 1]
        largest = [max(numbers) for row in some if not math.isnan(sum(numbers := [number(text) for text in row.box]))]
        return bool(largest) and statistics.median(largest) <= 1

    def _found(
        self, by_name: Mapping[str, list[_Row]], pictures: NamedPictures
    ) -> tuple[list[Item], dict[str, list[_Row]]]:
        """Each picture once, however its name is written, and its rows."""
        paths: dict[str, Path | None] = {}
        by_place: dict[str, list[_Row]] = {}
        for name, rows in by_name.items():
            place, paths[place] = pictures.locate(name)
            by_place.setdefault(place, []).extend(rows)
        items: list[Item] = []
        for short, (place, rows) in zip(unique_ids(list(by_place)), by_place.items(), strict=True):
            faults: tuple[Fault, ...] = ()
            if paths[place] is None:
                reason = f"there is no {quoted(place)} in {pictures.folder}"
                faults = (Fault(self._path, reason, "skipped image", rows[0].line),)
            items.append(Item(short, paths[place], self._path, faults, key=place, listed=True))
        return items, by_place

    def _box(self, row: _Row, size: Size) -> Box:
        values = [number(text) for text in row.box]
        if len(values) != 4:
            raise DroppedError(f"box {quoted(' '.join(row.box))} is not four numbers")
        words = self._columns.words if len(self._columns.words) == 4 else ("x", "y", "width", "height")
        for word, text, value in zip(words, row.box, values, strict=True):
            if math.isnan(value):
                raise DroppedError(f"{word} is {quoted(text)}, which is no number")
        if self._fractions:
            height, width = size
            values = [value * side for value, side in zip(values, (width, height, width, height), strict=True)]
        a, b, c, d = values
        if self._columns.kind == "corners":
            span(words[0], a, words[2], c)
            span(words[1], b, words[3], d)
            return a, b, c, d
        return sides(a, b, c, d) if self._columns.kind != "centre" else sides(a - c / 2, b - d / 2, c, d)


_SAYS = {
    "corners": "two corners", "sides": "a corner and sides", "centre": "the centre and sides",
    "list": "x y width height",
}  # fmt: skip


# --- from text to rows and columns


class _UnclearError(Exception):
    """Why the rows or their columns are not understood."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


_Rows = list[tuple[int, list[str]]]


def _rows(text: str, *, strict: bool) -> _Rows:
    """The rows that are not empty, with their first lines' numbers; `strict`: every quote must have its end."""
    first = text.split("\n", 1)[0]
    separator = max(",;\t", key=first.count)  # commas, if there is none of the others
    rows: _Rows = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=strict)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        reason = f"is no CSV: {error}"
        if reader.line_num > line or "expected after" in str(error) or "unexpected end" in str(error):
            reason += (
                f'. A " is opened in this row and not closed where it should be: lines {line} to {reader.line_num} '
            )
            reason += "would be one"
        raise _UnclearError(reason, line) from None
    return rows


def _columns(rows: _Rows) -> tuple[_Columns, _Rows]:
    """Where things stand, and the rows below the names of the columns, if it has such."""
    if not rows:
        raise _UnclearError("has no row")
    _, names = rows[0]
    named = _named(names)
    if named:
        return named, rows[1:]
    for _, cells in rows[:20]:
        kinds = "".join("T" if math.isnan(number(cell)) else "N" for cell in cells)
        if kinds in _NAMELESS:
            found = _named(_NAMELESS[kinds].split())
            assert found is not None
            return found, rows
    raise _UnclearError(
        f"columns {quoted(' '.join(names))} are not understood: write a first line of names, such as "
        "filename,class,xmin,ymin,xmax,ymax"
    )


def _named(names: Sequence[str]) -> _Columns | None:
    """The columns by their names; None where one is missing."""
    plain = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in names]
    plain = [re.sub(r"^b?box(?=.)", "", name) for name in plain]
    where = {name: index for index, name in reversed(list(enumerate(plain)))}  # of two with a name, the first

    def first(choices: Sequence[str]) -> int | None:
        return next((where[name] for name in choices if name in where), None)

    image, name = first(_IMAGE), first(_CLASS)
    for kind, words in _BOXES:
        if all(word in where for word in words) and image is not None and name is not None and image != name:
            box = tuple(where[word] for word in words)
            if twice := [word for word in words if plain.count(word) > 1]:
                raise _UnclearError(f"there are two columns called {quoted(twice[0])}")
            height, width = (first([w for w in choices if w not in words]) for choices in (_HEIGHT, _WIDTH))
            size = None if height is None or width is None else (height, width)
            marks = {mark: where[word] for word, mark in _MARKS.items() if word in where}
            return _Columns(image, name, kind, box, tuple(names[index].strip() for index in box), size, marks)
    return None

"""YOLO's text files: a line `class cx cy width height` for each object, in fractions of the picture as it is shown.

A line of a class and three or more points is an outline: its box is read. A picture without a file, or with an empty
one, has no objects. What the classes are called is not in these files: `Source.names` has it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from boxwright.data.formats.base import (
    Annotation,
    Box,
    DroppedError,
    Item,
    Marks,
    Objects,
    Reader,
    RefusedError,
    Source,
    class_name,
    is_class_name,
    number,
    quoted,
    read_text,
    require_area,
    skipped,
)
from boxwright.data.formats.pictures import (
    Folder,
    NamedPictures,
    annotation_folder,
    few,
    listed_lines,
    scan,
    unique_ids,
)
from boxwright.types import Fault, Size, UserError

MAX_BYTES = 10_000_000
NAME_FILES = ("classes.txt", "obj.names", "classes.names", "predefined_classes.txt")
_OVER = 1.01  # of a fraction: more than this is no rounding


def sign(paths: Sequence[Path]) -> str | None:
    """That one of the first text files holds lines of numbers, or that all are empty."""
    paths = [path for path in paths if path.name.lower() not in NAME_FILES]
    for path in paths[:20]:
        try:
            values = read_text(path, MAX_BYTES).split("\n", 1)[0].split()
        except RefusedError:  # empty, perhaps
            continue
        if len(values) >= 5 and all(number(value) == number(value) for value in values):
            return f"{len(paths)} .txt with lines of numbers"
        return None
    return None


def read_names(path: Path) -> tuple[str, ...]:
    """The classes 0, 1, ... in a file with a name a line; raises `UserError`."""
    try:
        lines = read_text(path, MAX_BYTES).rstrip().splitlines()
    except RefusedError as error:
        raise UserError(f"{path}{f':{error.line}' if error.line else ''}: {error.reason}") from None
    names = tuple(class_name(line) for line in lines)
    for line, name in enumerate(names, 1):
        if name and not is_class_name(name):
            raise UserError(f"{path}:{line}: {name!r} is no name for a class")
        if name and name in names[: line - 1]:
            raise UserError(f"{path}:{line}: {name!r} is there twice, first on line {names.index(name) + 1}")
    return names


class YoloReader(Reader):
    """A text file for each picture that has objects, of the same stem."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.classes = tuple(name for name in source.names if name)
        self._unread: Counter[str] = Counter()

    def items(self) -> list[Item]:
        items = self._listed() if self._source.listing else self._found()
        if not any(item.annotation for item in items):
            raise UserError(
                f"not one of the {len(items)} pictures in {self._source} has a label file: looked in "
                f"{annotation_folder(Path(items[0].image).parent) if items[0].image else self._source.annotations}"
            )
        return items

    def _found(self) -> list[Item]:
        """The pictures in a folder and the folders in it, and labels of no picture."""
        root = self._source.images
        assert root is not None
        items: list[Item] = []
        for folder in _folders(root):
            within = folder.relative_to(root)
            pictures = Folder(folder, ".txt")
            labels_at = self._source.annotations / within
            labels = pictures if labels_at == folder else Folder(labels_at, ".txt") if labels_at.is_dir() else None
            names = labels.annotations if labels else {}
            names = {stem: name for stem, name in names.items() if name.lower() not in NAME_FILES}
            pictures.require_single(pictures.images)
            for stem, (image, *_) in pictures.images.items():
                annotation = labels_at / names[stem] if stem in names else None
                items.append(Item((within / stem).as_posix(), folder / image, annotation))
            if labels is not pictures:
                items += [
                    _orphan(within / stem, labels_at / names[stem]) for stem in names if stem not in pictures.images
                ]
        if not any(item.image for item in items):
            Folder(root, ".txt").require_images()
        return items

    def _listed(self) -> list[Item]:
        """The pictures in a list of paths."""
        listing = self._source.listing
        assert listing is not None
        lines = listed_lines(listing)
        folders = [self._source.images] if self._source.images else [listing.parent, listing.parent.parent, Path.cwd()]
        folders += [Path(anchor) for anchor in {Path(line).anchor for line in lines} if anchor]
        pictures = NamedPictures(listing, [line for line in lines if line], folders)
        places: dict[str, Path] = {}
        faults: dict[str, Fault] = {}
        missing: list[str] = []
        for line_number, line in enumerate(lines, 1):
            place, path = pictures.locate(line)
            if place in places:
                faults[place] = Fault(listing, f"{place} is listed twice", "repaired", line_number)
            elif path:
                places[place] = path
            elif line:
                missing.append(quoted(line))
        if missing:
            raise UserError(f"{listing} lists {len(missing)} pictures that are not there: {few(missing)}")
        labels = _Labels(places.values())
        return [
            Item(name, path, labels.of(path), (faults[place],) if place in faults else ())
            for name, (place, path) in zip(unique_ids(list(places)), places.items(), strict=True)
        ]

    def read(self, item: Item, labels: Mapping[str, int], size: Size) -> Annotation:
        place = item.annotation or self._source.annotations
        try:
            lines = read_text(place, MAX_BYTES, empty=True).splitlines() if item.annotation else []
        except RefusedError as error:
            return skipped(error.fault(place))
        objects = Objects(place, size, labels)
        for line_number, line in enumerate(lines, 1):
            if values := line.split():
                with objects.one(line_number):
                    label = objects.label(self._class(values[0]))
                    objects.add(label, _box(values[1:], size), Marks(), shown=" ".join(values[1:5]))
                    if len(values) > 5:
                        self._unread["outlines"] += 1
        return objects.annotation()

    @property
    def unread(self) -> Mapping[str, int]:
        return self._unread

    def _class(self, text: str) -> str:
        value = number(text)
        if not value.is_integer() or value < 0:
            raise DroppedError(f"class is {quoted(text)}, which is no whole number")
        names = self._source.names
        if value >= len(names) or not names[int(value)]:
            unknown = f"number {value:.0f}"
            raise DroppedError(f"class {unknown} has no name: there are {len(names)}", unknown=unknown)
        return names[int(value)]


class _Labels:
    """The label files of pictures that lie anywhere, by the rule images → labels; each folder is looked into once."""

    def __init__(self, images: Iterable[Path]) -> None:
        folders = {image.parent for image in images}
        self._places = {folder: annotation_folder(folder) for folder in folders}
        self._folders = {place: Folder(place, ".txt") for place in self._places.values()}

    def of(self, image: Path) -> Path | None:
        place = self._places[image.parent]
        name = self._folders[place].annotations.get(os.path.splitext(image.name)[0])  # noqa: PTH122
        return place / name if name else None


def _folders(root: Path) -> list[Path]:
    """A folder and those in it, however deep, but for links."""
    found, waiting = [], [root]
    while waiting:
        folder = waiting.pop()
        found.append(folder)
        waiting += [Path(entry.path) for entry in reversed(scan(folder)) if entry.is_dir(follow_symlinks=False)]
    return found


def _orphan(place: Path, labels: Path) -> Item:
    return Item(place.as_posix(), None, labels, (Fault(labels, "there is no picture of this name", "skipped image"),))


def _box(values: Sequence[str], size: Size) -> Box:
    """The box that the numbers of a line stand for, in pixels."""
    numbers = [number(value) for value in values]
    for text, value in zip(values, numbers, strict=True):
        if value != value:
            raise DroppedError(f"{quoted(text)} is no number")
        if abs(value) > _OVER:
            raise DroppedError(f"{quoted(text)} is no fraction of the picture; are these pixels? YOLO's go from 0 to 1")
    height, width = size
    if len(numbers) == 4:
        cx, cy, w, h = numbers
        require_area(w, h)
        x1, y1, x2, y2 = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        x1, y1, x2, y2 = min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
    else:
        raise DroppedError(f"has {len(numbers)} numbers after its class: 4 are a box, 6, 8, ... an outline")
    return x1 * width, y1 * height, x2 * width, y2 * height

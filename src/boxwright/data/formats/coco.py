"""COCO json: one file for all pictures, in the lists `images`, `annotations` and `categories`.

Boxes are x y width height from the corner of the first pixel, 0-based and continuous, so x2 = x + width. A box that is
missing is taken from the outline in `segmentation`. Beside `iscrowd` the marks `ignore` (or `difficult`), `truncated`,
`occluded` and `pose` are read where an annotation, or its `attributes`, has them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    is_class_name,
    number,
    shown_value,
    sides,
    stated_size,
)
from boxwright.data.formats.json_file import has_keys, read_json
from boxwright.data.formats.pictures import NamedPictures, likely_folders, unique_ids
from boxwright.types import Action, Fault, Size, UserError

MAX_BYTES = 1 << 34  # the largest public file, of Objects365, has 5e9


def sign(paths: Sequence[Path]) -> str | None:
    """That a file begins like COCO's."""
    names = [path.name for path in paths if has_keys(path, "images", "annotations", "categories")]
    return f"{names[0]} with images, annotations, categories" if names else None


class _Object(NamedTuple):
    """An entry of `annotations`, without its outline."""

    id: Any
    image: str | None
    category: str | None
    bbox: Any
    outline: Any  # of `segmentation`, as x y width height, where there is no bbox
    marks: dict[str, Any] | None  # those that are set
    unread: tuple[str, ...]  # what else it has


class _Image(NamedTuple):
    """An entry of `images`."""

    id: str
    file_name: str
    size: Size | None


class CocoReader(Reader):
    """One json, read at once; a million annotations take some 300 MB."""

    def __init__(self, source: Source) -> None:
        self._path = source.annotations
        self._faults: list[Fault] = []
        images, annotations, categories = self._lists()
        self._images = self._read_images(images)
        self._names = self._read_categories(categories)
        self._objects: dict[str, list[_Object]] = {}
        self._unread = self._read_annotations(annotations)
        used = Counter(thing.category for things in self._objects.values() for thing in things)
        self._check_categories(used)
        self.classes = tuple(_real_classes(categories, self._names, set(used)))
        folders = [source.images] if source.images else likely_folders(self._path)
        self._pictures = NamedPictures(self._path, [image.file_name for image in self._images.values()], folders)
        if source.images is None:
            self.notes = (f"{self._path.name}: its pictures are in {self._pictures.folder}",)
        self._items = self._make_items()
        self.faults = tuple(self._faults)

    def items(self) -> list[Item]:
        return self._items

    def read(self, item: Item, labels: Mapping[str, int], size: Size) -> Annotation:
        image = self._images[item.key]
        if reason := disagreement(image.size, size, f"image {image.id}: it is stated to be"):
            return contradicts(self._path, reason)
        objects = Objects(self._path, size, labels)
        for thing in self._objects.get(item.key, ()):
            with objects.one(called=f"image {image.id}, annotation {shown_value(thing.id)}: "):
                if thing.category not in self._names:
                    unknown = f"category_id {thing.category}"
                    raise DroppedError(f"{unknown} is not in categories", unknown=unknown)
                objects.add(objects.label(self._names[thing.category]), _box(thing), objects.marks(thing.marks or {}))
        return objects.annotation()

    @property
    def unread(self) -> Mapping[str, int]:
        return self._unread

    # --- what the lists say

    def _lists(self) -> tuple[list[Any], list[Any], list[Any]]:
        try:
            document = read_json(self._path, MAX_BYTES, _compact)
        except RefusedError as error:
            raise UserError(f"{self._path}{f':{error.line}' if error.line else ''}: {error.reason}") from None
        if not isinstance(document, dict):
            raise UserError(f"{self._path} is no COCO json: it must hold images, annotations and categories")
        lists = [document.get(key) for key in ("images", "annotations", "categories")]
        for key, values in zip(("images", "annotations", "categories"), lists, strict=True):
            if not isinstance(values, list):
                raise UserError(f"{self._path} is no COCO json: it has no list {key!r}")
        images, annotations, categories = lists
        return images or [], annotations or [], categories or []

    def _fault(self, reasons: Iterable[str], action: Action, *, wrong: bool = False) -> None:
        """One fault for all that is wrong in one way, however often: such mistakes come by the million."""
        reasons = list(reasons)
        if reasons:
            more = f" ({len(reasons)} such)" if len(reasons) > 1 else ""
            self._faults.append(Fault(self._path, reasons[0] + more, action, wrong=wrong))

    def _read_images(self, entries: list[Any]) -> dict[str, _Image]:
        images: dict[str, _Image] = {}
        bad: list[str] = []
        twice: list[str] = []
        for index, entry in enumerate(entries):
            fields = entry if isinstance(entry, dict) else {}
            key, name = _id(fields.get("id")), fields.get("file_name")
            if key is None or not isinstance(name, str) or not name.strip():
                bad.append(f"images[{index}] has no id or no file_name")
                continue
            image = _Image(key, name, stated_size(fields.get("height"), fields.get("width")))
            earlier = images.setdefault(key, image)
            if earlier.file_name != name:
                raise UserError(
                    f"{self._path}: image id {key} is given to {shown_value(earlier.file_name)} and to "
                    f"{shown_value(name)}, so nobody knows whose its annotations are"
                )
            if earlier is not image:
                twice.append(f"image {key} is there twice")
        if not images:
            raise UserError(f"{self._path} lists no pictures" + (f": {bad[0]}" if bad else ""))
        self._fault(bad, "skipped image")
        self._fault(twice, "repaired")
        return images

    def _read_categories(self, entries: list[Any]) -> dict[str | None, str]:
        names: dict[str | None, str] = {}
        for index, entry in enumerate(entries):
            fields = entry if isinstance(entry, dict) else {}
            key, said = _id(fields.get("id")), fields.get("name")
            name = class_name(said) if isinstance(said, str) else ""
            if key is None or not is_class_name(name):
                raise UserError(f"{self._path}: categories[{index}] has no id, or no name that can be printed")
            if names.setdefault(key, name) != name:
                raise UserError(
                    f"{self._path}: category id {key} is given to {names[key]!r} and to {name!r}: "
                    "nobody knows which is meant"
                )
        return names

    def _check_categories(self, used: Mapping[str | None, int]) -> None:
        """Two ids of one name are two classes or one, and nobody knows which, where annotations are of both."""
        ids: dict[str, list[str]] = {}
        for key, name in self._names.items():
            ids.setdefault(name, []).append(str(key))
        unused: list[str] = []
        for name, keys in ids.items():
            if len(keys) > 1:
                counts = ", ".join(f"{key} ({used.get(key, 0)} annotations)" for key in keys)
                if sum(key in used for key in keys) > 1:
                    raise UserError(
                        f"{self._path}: categories {counts} are all called {name!r}. If they are one class, give its "
                        "annotations one category_id; if not, give each a name of its own"
                    )
                unused.append(f"categories {counts} are all called {name!r}: read as one class")
        self._fault(unused, "noted")

    def _read_annotations(self, entries: list[Any]) -> Mapping[str, int]:
        """Gather the objects by their pictures; how many outlines and key points they have."""
        unread: Counter[str] = Counter()
        bad: list[str] = []
        lost: list[str] = []
        times: Counter[str] = Counter()
        for index, thing in enumerate(entries):
            if not isinstance(thing, _Object) or thing.image is None or thing.category is None:
                bad.append(f"annotations[{index}] has no image_id or no category_id")
                continue
            if thing.image not in self._images:
                lost.append(f"annotation {shown_value(thing.id)}: image_id {thing.image} is not in images")
                continue
            if (key := _id(thing.id)) is not None:
                times[key] += 1
            self._objects.setdefault(thing.image, []).append(thing)
            unread.update(thing.unread)
        self._fault(bad, "dropped box", wrong=True)
        self._fault(lost, "dropped box")
        again = (
            f"annotation id {key} is there {count} times; all are read" for key, count in times.items() if count > 1
        )
        self._fault(again, "repaired")
        return unread

    def _make_items(self) -> list[Item]:
        """Each picture once: the annotations of two images with one file are put together."""
        first: dict[str, _Image] = {}  # by place
        paths: dict[str, Path | None] = {}
        twice: list[str] = []
        for image in self._images.values():
            place, path = self._pictures.locate(image.file_name)
            earlier = first.setdefault(place, image)
            paths[place] = path
            if earlier is not image:
                twice.append(f"images {earlier.id} and {image.id} are both {shown_value(image.file_name)}: read as one")
                self._objects.setdefault(earlier.id, []).extend(self._objects.pop(image.id, []))
        self._fault(twice, "repaired")
        ids = unique_ids(list(first))
        return [self._item(name, image, paths[place]) for name, (place, image) in zip(ids, first.items(), strict=True)]

    def _item(self, id: str, image: _Image, path: Path | None) -> Item:
        faults: tuple[Fault, ...] = ()
        if path is None:
            reason = f"image {image.id}: there is no {shown_value(image.file_name)} in {self._pictures.folder}"
            faults = (Fault(self._path, reason, "skipped image"),)
        return Item(id, path, self._path, faults, key=image.id, listed=True)


def _compact(entry: dict[str, Any]) -> Any:
    """An annotation without what is not read: outlines are most of a file, and of the memory it would take."""
    if "image_id" not in entry or "category_id" not in entry:
        return entry
    bbox, outline = entry.get("bbox"), entry.get("segmentation")
    unread = ("outlines",) if outline else ()
    said = {**attributes, **entry} if isinstance(attributes := entry.get("attributes"), dict) else entry
    return _Object(
        id=entry.get("id"),
        image=_id(entry["image_id"]),
        category=_id(entry["category_id"]),
        bbox=bbox or None,
        outline=None if bbox else _outline(outline),
        marks={mark: said[mark] for mark in _MARKS if said.get(mark)} or None,
        unread=(*unread, "sets of key points") if entry.get("keypoints") else unread,
    )


_MARKS = ("iscrowd", "crowd", "ignore", "difficult", "truncated", "occluded", "pose")


def _id(value: Any) -> str | None:
    """An id as text: tools that pass through tables make 7 of it, 7.0 or "7"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return str(value).strip()[:100] or None


def _outline(segmentation: Any) -> list[float] | None:
    """x y width height of polygons, [[x, y, x, y, ...], ...]; None where there are none, as in a mask."""
    if not isinstance(segmentation, list):
        return None
    polygons = segmentation if all(isinstance(polygon, list) for polygon in segmentation) else [segmentation]
    xs = [number(x) for polygon in polygons for x in polygon[::2]]
    ys = [number(y) for polygon in polygons for y in polygon[1::2]]
    if not ys or any(map(math.isnan, (*xs, *ys))):
        return None
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def _box(thing: _Object) -> Box:
    said = thing.outline if thing.bbox is None else thing.bbox
    if said is None:
        if "outlines" in thing.unread:
            raise DroppedError("has no bbox, and its segmentation is no polygon to take one from: write a bbox")
        raise DroppedError("has no bbox, and no polygon to take one from")
    values = [number(value) for value in said] if isinstance(said, list) else []
    if len(values) != 4 or any(map(math.isnan, values)):
        raise DroppedError(f"bbox is {shown_value(said)}: not four numbers")
    x, y, width, height = values
    return sides(x, y, width, height)


def _real_classes(entries: list[Any], names: Mapping[str | None, str], used: set[str | None]) -> list[str]:
    """The categories in the order of their ids, without what only stands there: a background, and the parent of the
    others that Roboflow writes as category 0."""
    parents = {
        parent for entry in entries if isinstance(parent := entry.get("supercategory"), str) and parent != entry["name"]
    }
    order = sorted(names, key=lambda key: (not str(key).isdecimal(), int(str(key)) if str(key).isdecimal() else 0, key))
    return list(
        dict.fromkeys(
            names[key]
            for key in order
            if key in used or not (names[key].strip("_").lower() == "background" or names[key] in parents)
        )
    )

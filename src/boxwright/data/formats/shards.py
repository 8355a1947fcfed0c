"""Shards: tar files of pictures, as WebDataset has them, and an index a split that says where in them each picture is.

    FOLDER/
    ├── train-000000.tar    00000000.jpg 00000000.json 00000001.jpg 00000001.json ...
    ├── train-000001.tar
    ├── train.json          the index of train; val.json and test.json likewise
    └── val-000000.tar

An index is JSON: `boxwright_shards` 1, `split`, `classes`, `shards` (each `name`, `size` in bytes, `sha256`) and
`records`, each a list: id, number of the shard, name in it, offset and length of the picture there, CRC-32 of its
bytes, height, width, and its objects, each a list: number of the class, x1, y1, x2, y2, the sum of its marks (1
difficult, 2 truncated, 4 crowd, 8 occluded), its pose. `data.shards` writes them. Opening reads the index alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from boxwright.data.formats.base import (
    Annotation,
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
    shown_value,
    span,
)
from boxwright.data.formats.json_file import has_keys, read_json
from boxwright.data.images import MAX_BYTES, MAX_PIXELS
from boxwright.types import Member, Shard, Size, UserError

KEY = "boxwright_shards"
VERSION = 1
LARGEST_INDEX = 10**9  # bytes, of some ten million pictures
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # no path leads out of the folder
_DIGEST = re.compile("[0-9a-f]{64}")
MARKS = ("difficult", "truncated", "crowd", "occluded")  # of the bits 1, 2, 4, 8


def sign(paths: Sequence[Path]) -> str | None:
    """That a file begins as an index does."""
    names = [path.name for path in paths if has_keys(path, KEY)]
    return f"{names[0]} is an index of shards" if names else None


class _WrongError(Exception):
    """What about an index cannot be."""


class _Row(NamedTuple):
    """An entry of `records`."""

    id: str
    member: Member
    size: Size
    objects: list[Any]


class ShardsReader(Reader):
    """One index, read at once."""

    def __init__(self, source: Source) -> None:
        self._path = source.annotations
        self._place = source.address or str(self._path.parent)
        try:
            document = read_json(self._path, LARGEST_INDEX)
            self.classes, self._rows = self._understood(document)
        except RefusedError as error:
            raise UserError(f"{self._path}{f':{error.line}' if error.line else ''}: {error.reason}") from None
        except _WrongError as error:
            raise UserError(f"{self._path} is no index that can be used: {error}") from None
        if not source.address:
            self._require_shards()

    def items(self) -> list[Item]:
        return [
            Item(row.id, row.member, self._path, key=str(index), listed=True, size=row.size)
            for index, row in enumerate(self._rows)
        ]

    def read(self, item: Item, labels: Mapping[str, int], size: Size) -> Annotation:
        objects = Objects(self._path, size, labels)
        for index, thing in enumerate(self._rows[int(item.key)].objects):
            with objects.one(called=f"{item.id}, object {index}: "):
                if not isinstance(thing, list) or not 6 <= len(thing) <= 7 or not _whole(thing[0], len(self.classes)):
                    raise DroppedError(f"{shown_value(thing)} is no object")
                label, *edges, marks = thing[:6]
                box = [number(edge) for edge in edges]
                if any(edge != edge for edge in box) or not _whole(marks, 1 << len(MARKS)):
                    raise DroppedError(f"{shown_value(thing)} is no object")
                x1, y1, x2, y2 = box
                span("x1", x1, "x2", x2)
                span("y1", y1, "y2", y2)
                flags = {name: bool(marks >> bit & 1) for bit, name in enumerate(MARKS)}
                pose = objects.marks({"pose": thing[6]}).pose if len(thing) > 6 else ""
                objects.add(objects.label(self.classes[label]), (x1, y1, x2, y2), Marks(**flags, pose=pose))
        return objects.annotation()

    def _understood(self, document: Any) -> tuple[tuple[str, ...], list[_Row]]:
        if not isinstance(document, dict) or document.get(KEY) != VERSION:
            found = document.get(KEY) if isinstance(document, dict) else None
            raise _WrongError(f"{KEY} is {shown_value(found)}, this version reads {VERSION}")
        classes, shards, records = (document.get(key) for key in ("classes", "shards", "records"))
        if not isinstance(classes, list) or not isinstance(shards, list) or not isinstance(records, list):
            raise _WrongError("classes, shards and records must be lists")
        for name in classes:
            if not isinstance(name, str) or not is_class_name(name) or class_name(name) != name:
                raise _WrongError(f"{shown_value(name)} is no name of a class")
        if len(set(classes)) < len(classes):
            raise _WrongError("a class is named twice")
        known = [self._shard(entry) for entry in shards]
        if len({shard.place for shard in known}) < len(known):
            raise _WrongError("a shard is named twice")
        rows = [_row(index, entry, known) for index, entry in enumerate(records)]
        _require_apart(rows)
        return tuple(classes), rows

    def _shard(self, entry: Any) -> Shard:
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        name, size, digest = (fields.get(key) for key in ("name", "size", "sha256"))
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise _WrongError(f"{shown_value(name)} is no plain name of a shard")
        if not isinstance(size, int) or not _whole(size, 1 << 50) or not _DIGEST.fullmatch(str(digest)):
            raise _WrongError(f"the shard {quoted(name)} needs a size in bytes and its sha256")
        return Shard(f"{self._place.rstrip('/')}/{name}", size, str(digest))

    def _require_shards(self) -> None:
        """Raise `UserError` unless the shards lie beside the index as it describes them."""
        for shard in dict.fromkeys(row.member.shard for row in self._rows):
            path = Path(shard.place)
            if not path.is_file():
                raise UserError(f"the shard {path} is not there, which {self._path} needs")
            if (size := path.stat().st_size) != shard.size:
                says = f"{self._path} says {shard.size}"
                raise UserError(f"the shard {path} has {size} bytes, {says}: it was cut or changed")


def _row(index: int, entry: Any, shards: Sequence[Shard]) -> _Row:
    if not isinstance(entry, list) or len(entry) != 9:
        raise _WrongError(f"record {index} is {shown_value(entry)}, not a list of 9")
    name, shard, file, offset, length, crc32, height, width, objects = entry
    if not isinstance(name, str) or not is_class_name(name):
        raise _WrongError(f"record {index}: {shown_value(name)} is no id")
    if not _whole(shard, len(shards)) or not isinstance(file, str) or not _PLAIN.fullmatch(file):
        raise _WrongError(f"record {index}: there is no shard {shown_value(shard)} with {shown_value(file)}")
    size = shards[shard].size
    if not _whole(offset, size) or not _whole(length, MAX_BYTES + 1) or not 0 < length <= size - offset:
        raise _WrongError(
            f"record {index}: {shown_value(length)} bytes from {shown_value(offset)} on are not in a shard of {size}"
        )
    if not _whole(crc32, 1 << 32) or not _whole(height, MAX_PIXELS) or not _whole(width, MAX_PIXELS):
        raise _WrongError(f"record {index}: its CRC-32, height and width must be whole numbers")
    if not 0 < height * width <= MAX_PIXELS or not isinstance(objects, list):
        raise _WrongError(f"record {index}: {width}x{height} is no size of a picture, or its objects are no list")
    return _Row(name, Member(shards[shard], file, offset, length, crc32), (height, width), objects)


def _whole(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _require_apart(rows: Sequence[_Row]) -> None:
    """No two pictures may share bytes, or an index of a few lines could claim millions of pictures."""
    spans = sorted((row.member.shard.place, row.member.offset, row.member.length) for row in rows)
    for (place, start, length), (other, after, _) in pairwise(spans):
        if place == other and start + length > after:
            raise _WrongError(f"two records overlap at {after} in {place}")

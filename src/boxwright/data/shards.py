"""A dataset → shards: few large tar files and an index a split, for a disk or server that minds many small files.

The tar files are WebDataset's: for each picture `00000012.jpg`, its bytes as they were, and `00000012.json` with its
id, size and objects. `data.formats.shards` says what an index holds. The same dataset gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from boxwright.data.dataset import Dataset
from boxwright.data.formats.shards import KEY, MARKS, VERSION
from boxwright.data.images import ImageError, read_bytes, read_header
from boxwright.data.placing import BEGUN, destination, give_name, growing, require_outside, require_room
from boxwright.folders import commit
from boxwright.progress import Progress
from boxwright.types import Member, Record, UserError

Say = Callable[[str], None]

_BLOCK = 512  # bytes: tar's
_END = bytes(2 * _BLOCK)


@dataclass(frozen=True)
class Sharded:
    """What was written."""

    folder: Path
    pictures: dict[str, int]  # of each split
    shards: int
    bytes: int


def shard(dataset: Dataset, folder: Path, *, size: int, tolerance: dict[str, Any], say: Say) -> Sharded:
    """Write all splits of a dataset into a new folder, in shards of about `size` bytes; `tolerance` is `read`'s.

    The folder grows as FOLDER.partial and gets its name when it is whole; what a call that was cut off has left there
    is written anew. Raises `UserError` where the folder holds something, the source would be in it or it in the source,
    or there is no room; nothing has changed then.
    """
    folder = destination(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: shards are written into a new folder. Choose another, or remove it")
    splits = {name: dataset.read(name, **tolerance).records for name in dataset.splits}
    require_outside(folder, dataset, splits.values())
    with growing(folder, (BEGUN,)) as partial:
        _clear(partial)
        require_room(partial, sum(_length(record) + 4 * _BLOCK for records in splits.values() for record in records))
        (partial / BEGUN).write_text(
            "boxwright data shard writes here, and removes its own files when it begins anew.\n"
        )
        written, total = 0, 0
        for name, records in splits.items():
            shards = _write(partial, name, records, dataset.classes, size, say)
            written += len(shards)
            total += sum(entry["size"] for entry in shards)
        give_name(partial, folder)
        (
            folder / BEGUN
        ).unlink()  # last, so that a call that is cut off before leaves what a later one knows as its own
    return Sharded(folder, {name: len(records) for name, records in splits.items()}, written, total)


_OURS = re.compile(r"(train|val|test)(-\d{6,}\.tar|\.json)(\.part)?", re.ASCII)


def _clear(partial: Path) -> None:
    """Remove what an earlier call left, which says so by `BEGUN`; where anything is another's, nothing is removed."""
    there = sorted(partial.iterdir())
    begun = any(path.name == BEGUN for path in there)
    for path in there:
        ours = begun and (path.name == BEGUN or _OURS.fullmatch(path.name))
        if not ours or path.is_symlink() or not path.is_file():
            raise UserError(
                f"{partial} holds {path.name}, which no call that was cut off has left there. "
                "Move it away, or choose another folder"
            )
    for path in there:
        if path.name != BEGUN:
            path.unlink()


def _length(record: Record) -> int:
    if isinstance(record.image, Member):
        return record.image.length
    with suppress(OSError):
        return record.image.stat().st_size
    return 0


def _write(
    folder: Path, split: str, records: tuple[Record, ...], classes: tuple[str, ...], size: int, say: Say
) -> list[dict[str, Any]]:
    """The shards and the index of a split; what the index says about the shards."""
    shards: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    progress = Progress(f"{split}: picture", len(records), say)
    pictures = _pictures(records)
    following = next(pictures, None)
    while following:
        name = f"{split}-{len(shards):06d}.tar"
        temporary = folder / f"{name}.part"
        with temporary.open("wb") as file:
            out = _Tar(file)
            while following and (not out.offset or out.offset + len(following[1]) <= size):
                record, data, kind = following
                key = f"{len(rows):08d}"
                offset = out.add(f"{key}.{kind}", data)
                out.add(f"{key}.json", _json(_described(record, classes)))
                place = [record.id, len(shards), f"{key}.{kind}", offset, len(data), zlib.crc32(data)]
                rows.append([*place, *record.size, _objects(record)])
                progress(len(rows))
                following = next(pictures, None)
            out.end()
        commit(temporary, folder / name)
        shards.append({"name": name, "size": out.offset, "sha256": out.digest.hexdigest()})
    index = {KEY: VERSION, "split": split, "classes": list(classes), "shards": shards, "records": rows}
    temporary = folder / f"{split}.json.part"
    temporary.write_bytes(_json(index))
    commit(temporary, folder / f"{split}.json")
    return shards


def _pictures(records: Iterable[Record]) -> Iterator[tuple[Record, bytes, str]]:
    """Each record, the bytes of its picture and the extension of that kind; one that has changed is a `UserError`."""
    for record in records:
        try:
            data = read_bytes(record.image)
            header = read_header(data)
        except ImageError as error:
            raise UserError(f"{record.image}: {error.reason}. Run again") from None
        if header.size != record.size:
            raise UserError(f"{record.image} has changed while it was read. Run again")
        yield record, data, {"JPEG": "jpg", "TIFF": "tif"}.get(header.format, header.format.lower())


class _Tar:
    """A tar file in which nothing depends on when, where and by whom it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.offset = 0
        self.digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a file; where its bytes begin."""
        entry = tarfile.TarInfo(name)
        entry.size, entry.mode = len(data), 0o644
        self._put(entry.tobuf(tarfile.USTAR_FORMAT))
        start = self.offset
        self._put(data)
        self._put(bytes(-len(data) % _BLOCK))
        return start

    def end(self) -> None:
        self._put(_END)

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.offset += len(data)


def _described(record: Record, classes: tuple[str, ...]) -> dict[str, Any]:
    """What `00000012.json` says of a picture."""
    objects: list[dict[str, Any]] = []
    for index, label in enumerate(record.labels):
        marks = {name: True for name in MARKS if getattr(record, name)[index]}
        pose = {"pose": str(record.pose[index])} if record.pose[index] else {}
        objects.append({"class": classes[label], "box": _edges(record, index), **marks, **pose})
    height, width = record.size
    return {"id": record.id, "width": width, "height": height, "objects": objects}


def _objects(record: Record) -> list[list[Any]]:
    """A picture's objects as an index has them."""
    found: list[list[Any]] = []
    for index, label in enumerate(record.labels):
        marks = sum(int(getattr(record, name)[index]) << bit for bit, name in enumerate(MARKS))
        pose = [str(record.pose[index])] if record.pose[index] else []
        found.append([int(label), *_edges(record, index), marks, *pose])
    return found


def _edges(record: Record, index: int) -> list[float]:
    """x1 y1 x2 y2 with as many digits as give the same float32 again."""
    return [float(np.format_float_positional(edge, unique=True, trim="0")) for edge in record.boxes[index]]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="surrogatepass")

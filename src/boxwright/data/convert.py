"""A dataset in any format → a whole dataset in another: the same records, and the pictures byte for byte.

What the format cannot hold is counted and said first. The folder grows as FOLDER.partial; before it gets its name it is
read again, and what it says is compared with what was to be written.
"""

from __future__ import annotations

import csv
import hashlib
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import yaml

from boxwright.data.data_yaml import BACKGROUND
from boxwright.data.dataset import Dataset, Split, open_dataset
from boxwright.data.formats import FORMATS
from boxwright.data.formats.base import FormatName
from boxwright.data.formats.pictures import few
from boxwright.data.formats.written import MARKS, WRITERS, Named, Writer
from boxwright.data.images import ImageError, read_bytes
from boxwright.data.layout import SplitName
from boxwright.data.naming import picture_names
from boxwright.data.placing import (
    BLOCK,
    LINKED,
    File,
    OnDisk,
    Piece,
    Say,
    destination,
    files_in,
    fill,
    give_name,
    growing,
    make_folders,
    require_outside,
    require_room,
)
from boxwright.types import Fault, Member, Record, UserError

Difficult = Literal["keep", "drop"]
Records = Mapping[SplitName, Sequence[Record]]
Everything = Mapping[SplitName, Sequence[Named]]


@dataclass(frozen=True)
class Converted:
    """A dataset that was written."""

    data: Path  # its data.yaml; the folder can be opened too
    format: FormatName
    pictures: Mapping[SplitName, int]
    objects: Mapping[SplitName, int]
    lost: tuple[str, ...]  # what the new files do not say
    faults: tuple[Fault, ...]  # what could not be read from the old ones
    renamed: int = 0  # pictures
    linked: int = 0  # pictures that are hard links to the source's
    written: int = 0  # pictures that were copied


def convert_dataset(
    source: str | Path,
    folder: Path,
    *,
    to: FormatName,
    splits: Sequence[SplitName] = (),
    difficult: Difficult | None = None,
    copy: bool = False,
    ignore_unknown: bool = False,
    skip_bad: bool = False,
    max_bad: float = 0.01,
    say: Say = lambda _: None,
) -> Converted:
    """Write what `open_dataset(source)` reads into a new `folder`, in the format `to`; the source stays as it is.

    `splits` are those to be written, by default all. `difficult` says what becomes of objects that are difficult or a
    crowd where `to` has no marks. `copy` makes no hard links. The others are `Dataset.read`'s. Raises `UserError` where
    the source is refused, `folder` is taken or inside the source, or there is no room.
    """
    if to not in WRITERS:
        raise UserError(f"--to {to}: there are {', '.join(WRITERS)}")
    folder, writer, title = destination(folder), WRITERS[to], FORMATS[to].title
    _require_free(folder)
    dataset = open_dataset(source)
    chosen = _chosen(dataset, splits, say)
    read: dict[SplitName, Split] = {
        name: dataset.read(name, max_bad=max_bad, ignore_unknown=ignore_unknown, skip_bad=skip_bad) for name in chosen
    }
    for note in dataset.notes:
        say(note)
    records: Records = {name: split.records for name, split in read.items()}
    faults = tuple(dict.fromkeys(fault for split in read.values() for fault in split.faults))
    require_outside(folder, dataset, records.values())
    _require_names(dataset, records, to)
    _tell(faults, say)
    records, lost = _without_marks(records, writer, title, difficult)
    if dataset.unread:
        unread = ", ".join(f"{count:,} {what}" for what, count in dataset.unread.items())
        lost = (f"only boxes are read, and so not written: {unread}", *lost)
    for line in lost:
        say(line)
    named: Everything = {name: picture_names(those, writer, title) for name, those in records.items()}
    renamed = _tell_renamed(records, named, title, say)

    with growing(folder, ("data.yaml", "data.yaml.part")) as partial:
        text = _description(dataset, writer, title, named)
        _require_own(partial, text)
        _make_room(partial, named)
        _begin(partial, text)
        pictures = _pieces(named, writer)
        make_folders(partial, [writer.pictures.format(writer.split(name)) for name in chosen])
        make_folders(partial, {str(Path(piece.target).parent) for piece in pictures})
        linked, written = fill(partial, pictures, copy=copy, say=say)
        targets = {"data.yaml", *(piece.target for piece in pictures)}
        for name, those in named.items():
            targets.update(writer.write(partial, writer.split(name), those, dataset.classes))
        for inside, path in list(files_in(partial)):
            if inside not in targets:  # of a call that was cut off, when the source had other pictures
                path.unlink()
        _compare(partial, named, dataset.classes, writer, title)
        if sys.platform != "win32":
            os.sync()  # one call: fsync of each of many files would take minutes
        give_name(partial, folder)
    if linked:
        say(LINKED.format(linked))
    return Converted(
        data=folder / "data.yaml",
        format=to,
        pictures={name: len(those) for name, those in named.items()},
        objects={name: _objects(those) for name, those in named.items()},
        lost=lost,
        faults=faults,
        renamed=renamed,
        linked=linked,
        written=written,
    )


def _objects(named: Iterable[Named]) -> int:
    return sum(len(one.record.labels) for one in named)


# --- before anything is written


def _require_free(folder: Path) -> None:
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}. Choose another folder") from None
    raise UserError(f"{folder} is there already. Choose another folder, or move it away")


def _chosen(dataset: Dataset, splits: Sequence[SplitName], say: Say) -> list[SplitName]:
    """The splits to be written, in their usual order."""
    for name in splits:
        if name not in dataset.splits:
            raise UserError(f"--splits {name}: {dataset.path} has {', '.join(dataset.splits)}")
    if splits:
        if "train" not in splits:
            raise UserError("--splits must name train: a dataset without it cannot be opened")
        return [name for name in dataset.splits if name in splits]
    if dataset.layout.splits.get("test") == dataset.layout.splits["val"]:
        say("test is the same as val, and is not written twice (--splits train val test writes it)")
        return ["train", "val"]
    return list(dataset.splits)


def _require_names(dataset: Dataset, records: Records, to: FormatName) -> None:
    if BACKGROUND in dataset.classes:
        raise UserError(f"{dataset.path}: a class is called {BACKGROUND}, which stands for none. Give it another name")
    if to != "csv":
        return
    names = dict.fromkeys(("a class", name) for name in dataset.classes)
    names |= dict.fromkeys(("a pose", str(pose)) for those in records.values() for one in those for pose in one.pose)
    longest = csv.field_size_limit()  # what is longer is written, and not read again
    for what, name in names:
        if len(name) > longest:
            raise UserError(
                f"{dataset.path}: the name of {what}, {_printable(name[:40])}..., has {len(name):,} letters; a cell of "
                f"a CSV holds {longest:,}. Give it a shorter name, or choose another format"
            )


def _tell(faults: Sequence[Fault], say: Say) -> None:
    """What of the source is not in the result, or not as it was."""
    for action, what in (("skipped image", "pictures left out"), ("dropped box", "objects left out"),
                         ("repaired", "repairs")):  # fmt: skip
        if found := [fault for fault in faults if fault.action == action]:
            say(f"{len(found):,} {what}: {few(map(str, found))}")


# --- what the format cannot hold


def _without_marks(
    records: Records, writer: Writer, title: str, difficult: Difficult | None
) -> tuple[Records, tuple[str, ...]]:
    """The records as the format holds them, and what it loses, in words."""
    everyone = [record for those in records.values() for record in those]
    counts = Counter({mark: sum(int(_set(record, mark).sum()) for record in everyone) for mark in MARKS})
    missing = [mark for mark in MARKS if mark not in writer.marks and counts[mark]]
    lost: list[str] = []
    if missing:
        lost.append(f"{title} cannot hold: " + ", ".join(f"{mark} ({counts[mark]:,} objects)" for mark in missing))
    decisive = [mark for mark in ("difficult", "crowd") if mark in missing]
    if decisive:
        what = " and ".join(decisive)
        if difficult is None:
            raise UserError(
                f"{lost[0]}. Objects marked {what} are not learnt, and there they would be: leave them out with "
                "--difficult drop, or make ordinary objects of them with --difficult keep"
            )
        lost.append(f"objects marked {what} are {'left out' if difficult == 'drop' else 'ordinary objects there'}")
    elif difficult == "drop":
        raise UserError(f"--difficult drop: {title} can hold all marks that there are, so nothing need be left out")
    kept: Records = {
        name: [_held(record, writer.marks, drop=difficult == "drop") for record in those]
        for name, those in records.items()
    }
    return kept, tuple(lost)


def _set(record: Record, mark: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    values = getattr(record, mark)
    return values != "" if mark == "pose" else values


def _held(record: Record, marks: Sequence[str], *, drop: bool) -> Record:
    if drop:
        record = record.only(~(record.difficult | record.crowd))
    gone = {mark: np.zeros_like(getattr(record, mark)) for mark in MARKS if mark not in marks}
    return replace(record, **gone) if gone else record


# --- names


def _tell_renamed(records: Records, named: Everything, title: str, say: Say) -> int:
    changed = [
        f"{old.id!r} is {new.record.id!r}"
        for name, those in records.items()
        for old, new in zip(those, named[name], strict=True)
        if unicodedata.normalize("NFC", old.id) != new.record.id
    ]
    if changed:
        say(f"{len(changed):,} pictures get other names for {title}: {few(changed)}")
    return len(changed)


# --- into the folder


def _description(dataset: Dataset, writer: Writer, title: str, named: Everything) -> str:
    """The text of data.yaml; by it a call also knows its own work again."""
    said = [f"# {title}, written by boxwright data convert from {_printable(dataset.path.absolute().name)}"]
    for name, those in named.items():
        digest = hashlib.sha256()
        for one in those:
            said_of = [getattr(one.record, field).tolist() for field in ("boxes", "labels", *MARKS)]
            digest.update(repr((one.name, one.record.size, said_of)).encode())
        said.append(f"# {name}: {len(those)} pictures, {_objects(those)} objects, {digest.hexdigest()[:16]}")
    keys = yaml.safe_dump(writer.describe(list(named), dataset.classes), sort_keys=False, allow_unicode=True)
    return "\n".join([*said, "", keys])


def _printable(text: str) -> str:
    return "".join("?" if unicodedata.category(letter)[0] in "CZ" and letter != " " else letter for letter in text)


def _require_own(partial: Path, text: str) -> None:
    """Raise `UserError` where a folder was begun with something else than this data.yaml."""
    there = {inside for inside, _ in files_in(partial)} - {"data.yaml.part"}
    try:
        said = (partial / "data.yaml").read_text(encoding="utf-8", errors="replace") if there else text
    except OSError:
        said = ""
    if said != text:
        raise UserError(
            f"{partial} holds something else, or another conversion. Delete it, or choose another folder for the result"
        )


def _begin(partial: Path, text: str) -> None:
    """Write data.yaml, the first file of all."""
    (partial / "data.yaml.part").write_text(text, encoding="utf-8", newline="\n")
    (partial / "data.yaml.part").replace(partial / "data.yaml")


def _pieces(named: Everything, writer: Writer) -> list[Piece]:
    folders: dict[Path, str] = {}  # without links: a hard link to a symbolic one would be that
    pieces: list[Piece] = []
    for split, those in named.items():
        place = writer.pictures.format(writer.split(split))
        for name, record in those:
            if isinstance(record.image, Member):
                pieces.append(Piece(_InShard(record.image), f"{place}/{name}"))
                continue
            image = record.image
            if image.parent not in folders:
                folders[image.parent] = os.path.realpath(image.parent)
            path = os.path.realpath(image) if image.is_symlink() else f"{folders[image.parent]}/{image.name}"
            pieces.append(Piece(OnDisk(path), f"{place}/{name}"))
    return pieces


class _InShard(File):
    """A picture in a tar file, perhaps behind an address."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.offset = member.offset

    def __str__(self) -> str:
        return str(self._member)

    def open(self) -> IO[bytes]:
        try:
            return BytesIO(read_bytes(self._member))
        except ImageError as error:
            raise UserError(str(error)) from None

    def stat(self) -> tuple[int, float]:
        return self._member.length, _NO_TIME


_NO_TIME = 315_532_800.0  # 1980-01-01, the first that every file system can hold: an index knows no times


def _make_room(partial: Path, named: Everything) -> None:
    """Raise `UserError` where not even the annotations have room."""
    pictures = sum(map(len, named.values()))
    require_room(partial, pictures * BLOCK + sum(map(_objects, named.values())) * _BYTES)


_BYTES = 500  # that an object takes at most, about


# --- is it what it was to be?


def _compare(partial: Path, named: Everything, classes: Sequence[str], writer: Writer, title: str) -> None:
    """Read what was written; raise `UserError` where it is not what was to be written."""

    def differs(what: str) -> UserError:
        return UserError(
            f"{partial}: read again, {what}. {title} cannot hold this dataset; the folder is left for a look"
        )

    written = open_dataset(partial)
    if written.classes != tuple(classes):
        raise differs(f"its classes are {few(written.classes)}")
    for split, those in named.items():
        drawn = split == "train" and "val" not in named  # then a part of it is drawn as val when it is read
        halves: tuple[SplitName, ...] = ("train", "val") if drawn else (split,)
        read = [written.scan(half) for half in halves]
        found = {record.id: record for half in read for record in half.records}
        for name, record in those:
            if record.id not in found:
                faults = few(str(fault) for half in read for fault in half.faults)
                raise differs(f"{name} is not in {split!r}{f' ({faults})' if faults else ''}")
            if what := _difference(found[record.id], record, writer):
                raise differs(f"{what} of {name} differ")
        if len(found) != len(those):
            raise differs(f"{split!r} has {len(found)} pictures, not {len(those)}")


def _difference(found: Record, wanted: Record, writer: Writer) -> str | None:
    """What differs in two records of one picture."""
    if found.size != wanted.size:
        return "the sizes"
    for name in ("labels", *MARKS):
        if not np.array_equal(getattr(found, name), getattr(wanted, name)):
            return name
    if not np.allclose(found.boxes, wanted.boxes, rtol=0, atol=writer.slack):
        return "the boxes"
    return None

"""A dataset → a corrected copy of it in a new folder, and a list of all that was changed. The original is only read.

    FOLDER/
    ├── {train,valid,test}/{images,labels}/    of a VOC dataset; other formats are laid out as `data convert` does
    ├── data.yaml
    ├── changes.jsonl                          a change a line: split, path, line, what, before, after
    └── changes.txt                            the same to be read

Only what is certain is mended; what nobody knows is left out, object by object, or with its picture.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from boxwright.data.check.finding import Picture
from boxwright.data.check.mend_voc import Change, mended
from boxwright.data.check.text import printable
from boxwright.data.convert import convert_dataset
from boxwright.data.dataset import Dataset, open_dataset
from boxwright.data.formats import FORMATS
from boxwright.data.formats.base import FormatName, Item
from boxwright.data.formats.written import WRITERS
from boxwright.data.images import ImageError, read_header
from boxwright.data.layout import SplitName
from boxwright.data.naming import picture_names
from boxwright.data.placing import (
    BLOCK,
    LINKED,
    OnDisk,
    Piece,
    Say,
    destination,
    fill,
    give_name,
    make_folders,
    partial_of,
    require_room,
)
from boxwright.folders import held
from boxwright.types import Fault, Record, UserError


@dataclass(frozen=True)
class Mended:
    """A corrected copy."""

    data: Path  # its data.yaml; the folder can be opened too
    pictures: dict[str, int]  # in it, by split
    changes: int
    left_out: int  # pictures
    kinds: dict[str, int]  # of changes


def mend_dataset(data: str | Path, folder: Path, *, copy: bool = False, say: Say = lambda _: None) -> Mended:
    """Write a corrected copy of `data` into a new `folder`, with hard links to its pictures, or copies of them.

    Raises `UserError` where the dataset cannot be read at all, where nothing to train on would be left, and where
    `folder` is there already or inside the dataset.
    """
    folder = destination(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--fix {folder} is there already. Choose another folder, or move it away")
    dataset = open_dataset(data)
    sources = [source for those in dataset.layout.splits.values() for source in those]
    formats: set[FormatName] = {source.format for source in sources}
    if formats == {"voc"} and all(source.voc_boxes == "from 1" for source in sources):
        return _mend_voc(dataset, folder, copy=copy, say=say)
    only: FormatName = formats.pop() if len(formats) == 1 else "voc"
    to: FormatName = only if only in WRITERS else "voc"
    done = convert_dataset(
        data, folder, to=to, copy=copy, skip_bad=True, ignore_unknown=True, max_bad=1.0,
        say=say,
    )  # fmt: skip
    changes = [_change_of(fault) for fault in done.faults if fault.action != "noted"]
    _list_changes(done.data.parent, changes)
    return _told(done.data, {str(name): count for name, count in done.pictures.items()}, changes)


def _told(data: Path, pictures: dict[str, int], changes: Sequence[Change]) -> Mended:
    kinds = Counter(change.what for change in changes)
    out = sum(change.what.startswith("picture left out") for change in changes)
    return Mended(data, pictures, len(changes), out, dict(kinds.most_common()))


_DONE = {
    "skipped image": "picture left out", "refused": "picture left out", "dropped box": "object left out",
    "repaired": "mended", "noted": "noted",
}  # fmt: skip


def _change_of(fault: Fault) -> Change:
    """The change that reading made by itself."""
    return Change("all", str(fault.path), fault.line, _DONE[fault.action], fault.reason, "")


# --- Pascal VOC


class _Piece(NamedTuple):
    """What becomes of a picture: it and the text of its annotation in the copy."""

    record: Record  # for its name
    annotation: bytes


def _mend_voc(dataset: Dataset, folder: Path, *, copy: bool, say: Say) -> Mended:
    changes: list[Change] = []
    pieces: dict[SplitName, list[_Piece]] = {}
    taken: set[str] = set()
    for name in _order(dataset):
        split = dataset.scan(name, apart=False)
        records = {record.image: record for record in split.records}
        why = {str(fault.path): fault for fault in split.faults if fault.action == "skipped image"}
        pieces[name] = []
        for item in dataset.items(name):
            place = os.path.realpath(item.image) if item.image else ""
            if place in taken:
                reason = "is in another split too"
                changes.append(Change(name, str(item.image), None, "picture left out", reason, ""))
                continue
            found = _mend_one(dataset, name, item, records, why, changes)
            if found:
                pieces[name].append(found)
                if name == "train":
                    taken.add(place)
    _require_outside(folder, dataset, pieces)
    for name, those in pieces.items():
        if not those:
            raise UserError(f"{dataset.path}: nothing of {name!r} can be mended, so no copy is written")
    partial = partial_of(folder)
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()  # of two calls at once one makes it
    except FileExistsError:
        raise UserError(f"{partial} is there, of a call that was cut off. Delete it, and run again") from None
    except OSError as error:
        raise UserError(f"cannot write {partial}: {error.strerror}. Choose another folder") from None
    make_folders(partial, [f"{_split(name)}/{inside}" for name in pieces for inside in ("images", "labels")])
    try:
        with held(partial):
            linked = _fill(partial, dataset, pieces, copy=copy, say=say)
            _list_changes(partial, changes)
            _require_clean(partial)
            give_name(partial, folder)
    except BaseException:  # also Ctrl-C: nothing of it could be gone on with
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if linked:
        say(LINKED.format(linked))
    return _told(folder / "data.yaml", {name: len(those) for name, those in pieces.items()}, changes)


def _order(dataset: Dataset) -> list[SplitName]:
    splits = dataset.layout.splits
    return [name for name in dataset.splits if not (name == "test" and splits["test"] == splits.get("val"))]


def _split(name: str) -> str:
    return WRITERS["voc"].split(name)


def _mend_one(
    dataset: Dataset,
    split: str,
    item: Item,
    records: dict[Picture, Record],
    why: dict[str, Fault],
    changes: list[Change],
) -> _Piece | None:
    """A picture of the copy, or None; either way `changes` has what was done."""

    def out(path: Picture | None, reason: str, line: int | None = None) -> None:
        changes.append(Change(split, str(path), line, "picture left out", reason, ""))

    if not isinstance(item.image, Path) or item.annotation is None:
        fault = why.get(str(item.image or item.annotation))
        return out(item.image or item.annotation, fault.reason if fault else "has no counterpart")
    changes += [
        Change(split, str(fault.path), fault.line, "mended", fault.reason, "")
        for fault in item.faults
        if fault.action == "repaired"  # listed twice, say: the copy has no list
    ]
    try:
        header = read_header(item.image)
    except ImageError as error:
        return out(item.image, error.reason)
    if fault := why.get(str(item.image)):
        return out(item.image, fault.reason)
    result = mended(item.annotation, header.size, header.orientation, dataset.classes)
    if isinstance(result, Fault):
        return out(item.annotation, result.reason, result.line)
    changes += [change._replace(split=split) for change in result.changes]
    record = records.get(item.image) or _empty(item, header.size)
    return _Piece(record, result.data)


def _empty(item: Item, size: tuple[int, int]) -> Record:
    none = np.zeros(0, np.bool_)
    assert item.image is not None
    return Record(item.id, item.image, size, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), none, none)


def _require_outside(folder: Path, dataset: Dataset, pieces: dict[SplitName, list[_Piece]]) -> None:
    """Raise `UserError` where the copy would lie inside the dataset, or the dataset inside the copy."""
    places = {dataset.path if dataset.path.is_dir() else dataset.path.parent / "data.yaml"}
    for those in dataset.layout.splits.values():
        places |= {path for source in those for path in (source.images, source.annotations) if path}
    places |= {Path(piece.record.image).parent for those in pieces.values() for piece in those}
    target = Path(os.path.realpath(folder))
    for place in sorted(places):
        if place.is_dir() and target.is_relative_to(Path(os.path.realpath(place))):
            raise UserError(f"--fix {folder} is inside the dataset, {place}. Choose a folder outside it")


def _fill(partial: Path, dataset: Dataset, pieces: dict[SplitName, list[_Piece]], *, copy: bool, say: Say) -> int:
    """Write everything but the list of changes; how many pictures are hard links."""
    writer = WRITERS["voc"]
    texts = sum(len(piece.annotation) + BLOCK for those in pieces.values() for piece in those)
    require_room(partial, texts)
    pictures: list[Piece] = []
    for name, those in pieces.items():
        named = picture_names([piece.record for piece in those], writer, FORMATS["voc"].title)
        for piece, (file, record) in zip(those, named, strict=True):
            pictures.append(Piece(OnDisk(os.path.realpath(piece.record.image)), f"{_split(name)}/images/{file}"))
            (partial / _split(name) / "labels" / f"{record.id}.xml").write_bytes(piece.annotation)
    linked, _ = fill(partial, pictures, copy=copy, say=say)
    described = writer.describe(list(pieces), dataset.classes)
    text = yaml.safe_dump(described, sort_keys=False, allow_unicode=True)
    (partial / "data.yaml").write_text(text, encoding="utf-8", newline="\n")
    return linked


def _list_changes(folder: Path, changes: Iterable[Change]) -> None:
    changes = list(changes)
    lines = [json.dumps(change._asdict()) + "\n" for change in changes]
    (folder / "changes.jsonl").write_text("".join(lines), encoding="ascii", newline="\n")
    told = [printable(str(change)) + "\n" for change in changes] or ["nothing had to be changed\n"]
    (folder / "changes.txt").write_text("".join(told), encoding="utf-8", newline="\n")


def _require_clean(partial: Path) -> None:
    """Raise `UserError` unless training would take the copy as it is."""
    dataset = open_dataset(partial)
    for name in dataset.splits:
        split = dataset.read(name, max_bad=0)
        if bad := [fault for fault in split.faults if fault.action != "noted"]:
            raise UserError(f"the corrected copy would still have {len(bad)} faults: {bad[0]}. Nothing was written")

"""`data show`: a dataset's pictures with their boxes, as they are annotated and as a run's network sees them.

outputs/shown/<name>/
├── truth.jpg               a sheet of pictures with ground truth
├── seen.jpg                the same pictures after resizing and augmentation; only where a run is given
└── truth/ seen/            each picture alone, as PNG; only with `each`
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from boxwright.config import Run
from boxwright.data.dataset import Dataset, Split
from boxwright.data.images import ImageError, decode
from boxwright.folders import claim
from boxwright.inference.draw import contact_sheet, draw_truth, truth_tile
from boxwright.inference.output import write_image
from boxwright.registry import nearest
from boxwright.training.seen import seen
from boxwright.types import Float32, Int64, UInt8, UserError

CELL = (300, 400)  # pixels of each picture on a sheet: height, width


@dataclass
class Shown:
    """What was drawn."""

    folder: Path
    pictures: list[str]  # ids, in the order of the sheets
    sheets: list[Path] = field(default_factory=list[Path])
    skipped: list[str] = field(default_factory=list[str])  # why a picture is not there


@dataclass(frozen=True)
class Wanted:
    """Which pictures are shown."""

    count: int = 12
    ids: tuple[str, ...] = ()  # in the place of pictures drawn by chance
    classes: tuple[str, ...] = ()  # only pictures with an object of one of these
    seed: int = 0

    def choose(self, split: Split, classes: Sequence[str]) -> list[int]:
        """Places in the split's records."""
        if self.ids:
            places = _places(split)
            if unknown := [name for name in self.ids if name not in places]:
                self._tell_left_out(unknown[0], split)
                hint = nearest(unknown[0], places) if len(places) < 100_000 else ""
                hint = hint or f" Ids are names of files without extension, such as {split.records[0].id}"
                raise UserError(f"{split.name} has no picture called {unknown[0]!r}.{hint}")
            return [places[name] for name in self.ids]
        among: Sequence[int] = range(len(split.records))
        if self.classes:
            for name in self.classes:
                if name not in classes:
                    raise UserError(
                        f"unknown class {name!r}.{nearest(name, classes) or ' Known: ' + ', '.join(classes)}"
                    )
            labels = [list(classes).index(name) for name in self.classes]
            among = [index for index in among if np.isin(split.records[index].labels, labels).any()]
        if not among:
            raise UserError(f"{split.name} has no picture with {' or '.join(self.classes)}")
        chosen = np.random.default_rng(self.seed).permutation(np.array(among))[: self.count]
        return sorted(chosen.tolist())

    @staticmethod
    def _tell_left_out(name: str, split: Split) -> None:
        """Raise `UserError` where a picture is there but was left out while reading."""
        for fault in split.faults:
            if fault.action == "skipped image" and fault.path.stem in (name, name.rpartition("_")[2]):
                raise UserError(f"{name} is left out of {split.name}: {fault}")


def _places(split: Split) -> dict[str, int]:
    """Places in the split's records by id, and by the file's own name where only one has it."""
    places = {record.id: index for index, record in enumerate(split.records)}
    stems = Counter(record.image.stem for record in split.records)
    for index, record in enumerate(split.records):
        if stems[stem := record.image.stem] == 1:
            places.setdefault(stem, index)
    return places


def show(
    dataset: Dataset,
    split: Split,
    wanted: Wanted,
    run: Run | None,
    *,
    epoch: int,
    name: str | None,
    project_dir: Path,
    each: bool = False,
) -> Shown:
    """Draw the wanted pictures of a split, and what `run` makes of them in an epoch (0-based).

    A picture that cannot be read is left out and said. Raises `UserError` for an id or class that is not there.
    """
    chosen = wanted.choose(split, dataset.classes)
    truths: dict[int, UInt8] = {}
    skipped: list[str] = []
    for index in chosen:
        try:
            truths[index] = decode(split.records[index].image)
        except ImageError as error:
            skipped.append(str(error))
    if not truths:
        raise UserError(f"none of the {len(chosen)} pictures can be read, the first: {skipped[0]}")
    samples = seen(run, split.records, list(truths), epoch=epoch, classes=len(dataset.classes)) if run else []
    folder = claim(project_dir, name)
    ids = [split.records[index].id for index in truths]
    shown = Shown(folder, ids, skipped=skipped)
    records = [split.records[index] for index in truths]
    views = {"truth": [_Picture(i, r.boxes, r.labels) for i, r in zip(truths.values(), records, strict=True)]}
    if run:
        views["seen"] = [_Picture(s.image[: s.size[0], : s.size[1]], s.boxes, s.labels) for s in samples]
    for view, pictures in views.items():
        shown.sheets.append(folder / f"{view}.jpg")
        write_image(shown.sheets[-1], _sheet(pictures, ids, dataset.classes))
        if each:
            (folder / view).mkdir()
            for number, (picture, name_of) in enumerate(zip(pictures, ids, strict=True)):
                drawn = draw_truth(np.ascontiguousarray(picture.image), picture.boxes, picture.labels, dataset.classes)
                write_image(folder / view / f"{number:03d}_{_file_name(name_of)}.png", drawn)
    return shown


@dataclass(frozen=True, eq=False)
class _Picture:
    image: UInt8
    boxes: Float32
    labels: Int64


def _sheet(pictures: Sequence[_Picture], ids: Sequence[str], classes: Sequence[str]) -> UInt8:
    tiles = [truth_tile(np.ascontiguousarray(p.image), p.boxes, p.labels, classes, CELL) for p in pictures]
    columns = min(len(tiles), max(1, round(math.sqrt(len(tiles) * 1.3))))
    return contact_sheet(tiles, columns, CELL, captions=ids)


def _file_name(id: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in id)[-100:]

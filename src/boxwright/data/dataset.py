"""A dataset on disk → the `Record`s of its splits; opening is cheap, reading looks at every file once."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from boxwright.data.formats import FORMATS, voc
from boxwright.data.formats.base import Item, Reader, Source, UnknownClass, is_class_name
from boxwright.data.formats.pictures import few
from boxwright.data.images import ImageError, read_header
from boxwright.data.layout import Layout, SplitName, address_layout, find_layout
from boxwright.data.members import is_address
from boxwright.progress import Progress
from boxwright.registry import nearest
from boxwright.types import Fault, Member, Record, UserError

MIN_SIDE = 8  # pixels; a smaller picture has nothing to learn from, whatever its annotation says
_HANDFUL = 5  # pictures that may be skipped however small the dataset is


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a dataset, read: records in the order of their ids, and what was wrong."""

    name: SplitName
    records: tuple[Record, ...]
    faults: tuple[Fault, ...]
    pictures: int = 0  # that there are, those that must be skipped among them


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset that has been found but not read."""

    path: Path  # the folder, data YAML or annotation file it was opened from
    layout: Layout
    _readers: dict[Source, Reader] = field(default_factory=dict[Source, Reader], init=False, repr=False)

    @property
    def splits(self) -> tuple[SplitName, ...]:
        return tuple(self.layout.splits)

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made while opening, and reading so far, that the user should hear of."""
        found = (note for reader in self._readers.values() for note in reader.notes)
        return tuple(dict.fromkeys((*self.layout.notes, *found)))

    @property
    def unread(self) -> Counter[str]:
        """How many things that no record holds, such as outlines, were met in what was read so far."""
        return sum((Counter(reader.unread) for reader in self._readers.values()), Counter[str]())

    @property
    def save_previews(self) -> bool:
        """Whether predictions on validation pictures are to be drawn."""
        return self.layout.save_previews

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 0 .. K-1: as the data YAML lists them, else collected from all annotations."""
        return self.layout.classes or self._collected_classes()

    def with_classes(self, classes: Iterable[str]) -> Dataset:
        """The same files, their labels counted by another list of classes."""
        return replace(self, layout=replace(self.layout, classes=tuple(classes)))

    def read(
        self, name: SplitName, *, max_bad: float = 0.01, ignore_unknown: bool = False, skip_bad: bool = False
    ) -> Split:
        """`scan` a split; the first of its `problems` is raised."""
        split = self.scan(name)
        for problem in self.problems(split, max_bad=max_bad, ignore_unknown=ignore_unknown, skip_bad=skip_bad):
            raise UserError(problem)
        return split

    def scan(self, name: SplitName, *, apart: bool = True) -> Split:
        """Read every header and every annotation of a split, decode no pixel, and refuse nothing for what they say.

        Raises `UserError` where the split does not exist, holds no pictures, has two for one annotation, or, if they
        must be `apart`, shares any with its counterpart.
        """
        if name not in self.layout.splits:
            raise UserError(f"{self.path} has no split {name!r}; it has {', '.join(self.splits)}")
        items = self._items(name)
        if apart:
            self._check_apart(name, items)
        labels = {class_name: label for label, class_name in enumerate(self.classes)}
        records: list[Record] = []
        faults = [fault for source in self.layout.splits[name] for fault in self._reader(source).faults]
        progress = Progress(f"{name}: looked at picture", len(items), _tell, every=2.0)
        for done, (item, reader) in enumerate(items):
            progress(done)
            record, found = _read(item, reader, labels)
            faults += found
            if record is not None:
                records.append(record)
        pictures = sum(item.image is not None or item.listed for item, _ in items)
        return Split(name, tuple(records), tuple(faults), pictures)

    def items(self, name: SplitName) -> list[Item]:
        """The pictures of a split, those that must be skipped among them, and annotations without one, by their ids."""
        return [item for item, _ in self._items(name)]

    def problems(
        self, split: Split, *, max_bad: float = 0.01, ignore_unknown: bool = False, skip_bad: bool = False
    ) -> Iterator[str]:
        """Why a split cannot be trained or judged on: it has objects of a class that is not in `classes`, unless
        `ignore_unknown`; it contradicts itself, unless `skip_bad`; more than the fraction `max_bad` (and more than a
        handful) of its pictures must be skipped; there is no object to learn.
        """
        if not ignore_unknown and (problem := _unknown_classes(split.faults, self.classes)):
            yield problem
        if not skip_bad and (problem := _contradictions(split)):
            yield problem
        skipped = split.pictures - len(split.records)
        if skipped == split.pictures or (skipped > _HANDFUL and skipped > max_bad * split.pictures):
            yield (
                f"{skipped} of the {split.pictures} pictures of {split.name!r} cannot be used{_examples(split.faults)}"
            )
        if split.name == "train" and not any((~(record.difficult | record.crowd)).any() for record in split.records):
            count = len(split.records)
            yield f"{self.path}: 0 objects to train on in {count} pictures{_examples(split.faults)}"

    def fingerprint(self, split: Split) -> str:
        """16 hexadecimal digits that change when a class, id, size, box, label or flag does."""
        digest = hashlib.sha256(repr(self.classes).encode(errors="surrogatepass"))
        for record in split.records:
            digest.update(repr((record.id, record.size, len(record.labels))).encode(errors="surrogatepass"))
            digest.update(record.boxes.astype("<f4").tobytes())
            digest.update(record.labels.astype("<i8").tobytes())
            digest.update(np.stack([record.difficult, record.truncated]).tobytes())
            if record.crowd.any():  # otherwise nothing, so that a run begun before there were crowds can go on
                digest.update(record.crowd.tobytes())
        return digest.hexdigest()[:16]

    def _reader(self, source: Source) -> Reader:
        """The opened source; opened once, whatever part of it is asked for: one file may hold all annotations."""
        whole = replace(source, share="all", prefix="")
        if whole not in self._readers:
            self._readers[whole] = FORMATS[source.format].open(whole)
        return self._readers[whole]

    def _items(self, name: SplitName) -> list[_Read]:
        """The pictures of a split, and annotations without one, in the order of their ids."""
        sources = self.layout.splits[name]
        images = {source.images for source in sources}
        theirs = {  # folders that also hold the annotations of another split's pictures
            source.annotations
            for split in self.layout.splits.values()
            for source in split
            if source.images not in images
        }
        items: list[_Read] = [
            (item._replace(id=source.prefix + item.id), self._reader(source))
            for source in sources
            for item in _share(self._reader(source).items(), source.share)
            if item.image or item.listed or source.annotations not in theirs
        ]
        items.sort(key=lambda read: read[0].id)
        if twice := [a.id for (a, _), (b, _) in pairwise(items) if a.id == b.id]:
            raise UserError(f"{name} has two pictures called {twice[0]}, in {_places(sources)}")
        if not any(item.image for item, _ in items):
            raise UserError(f"no pictures for {name!r} in {_places(sources)}")
        return items

    def _check_apart(self, name: SplitName, items: list[_Read]) -> None:
        """Training and validation must not share a picture."""
        opposite: dict[SplitName, SplitName] = {"train": "val", "val": "train"}
        if name not in opposite or _lie_apart(*(self.layout.splits[split] for split in opposite)):
            return
        others = set(_real_paths(self._items(opposite[name])))
        if shared := [path.name for path in _real_paths(items) if path in others]:
            raise UserError(f"train and val share {len(shared)} pictures: {few(shared)}")

    def _collected_classes(self) -> tuple[str, ...]:
        """The classes that the sources list, then what else their annotations name, sorted; in a year of the VOC
        challenge, its own twenty."""
        sources = [source for sources in self.layout.splits.values() for source in sources]
        readers = list(dict.fromkeys(map(self._reader, sources)))
        listed = dict.fromkeys(name for reader in readers for name in reader.classes)
        counted = {name for reader in readers for name in reader.class_counts() if is_class_name(name)}
        if not listed and not counted:
            raise UserError(f"no annotation in {_places(self.layout.splits['train'])} names a class")
        official = any(
            source.images and re.fullmatch(r"VOC20\d\d", source.images.parent.name)
            for source in sources
            if source.format == "voc"
        )
        if official and not listed and counted <= set(voc.CLASSES):
            return voc.CLASSES
        return (*listed, *sorted(counted.difference(listed)))


def open_dataset(data: str | Path) -> Dataset:
    """Find the dataset at `data`: a data YAML, ours or YOLO's; a folder of pictures and annotations in any format of
    `formats`; a COCO json; a CSV.

    Only names are looked at, and the first lines of a few files. Raises `UserError` for what is missing or mistyped.
    """
    layout = address_layout(str(data)) if is_address(str(data)) else find_layout(Path(data))
    path = Path(data)
    train, val = layout.splits["train"], layout.splits["val"]
    for source in train:
        if source in val:
            raise UserError(f"train and val are the same: {source}")
    return Dataset(path, layout)


def _tell(line: str) -> None:
    """How far a long scan is; of several processes the first says it."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(line + "\n")


# --- the pictures of a split

_Read = tuple[Item, Reader]


def _places(sources: Iterable[Source]) -> str:
    return " and ".join(str(source.images or source) for source in sources)


def _share(items: list[Item], share: str) -> list[Item]:
    """The items that belong to a share: each on its own by its id's hash, so that adding pictures moves none."""
    if share == "all":
        return items
    kept = {item.id for item in items if _draw(item.id) < 0.1}
    pictures = sorted((item.id for item in items if item.image), key=_draw)
    if len(kept.intersection(pictures)) in (0, len(pictures)):
        kept = kept.difference(pictures).union(pictures[: min(1, len(pictures) - 1)])
    return [item for item in items if (item.id in kept) == (share == "val")]


def _draw(stem: str) -> float:
    digest = hashlib.sha256(stem.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _lie_apart(mine: Iterable[Source], theirs: Iterable[Source]) -> bool:
    """Whether two splits cannot share a picture, because their folders lie apart."""
    a, b = ([source.images.resolve() if source.images else None for source in split] for split in (mine, theirs))
    return not any(
        one is None or other is None or one.is_relative_to(other) or other.is_relative_to(one)
        for one in a
        for other in b
    )


def _real_paths(items: Iterable[_Read]) -> Iterable[Path]:
    paths = [Path(item.image) for item, _ in items if item.image]
    folders = {folder: folder.resolve() for folder in {path.parent for path in paths}}
    return [folders[path.parent] / path.name for path in paths]


# --- one picture


def _read(item: Item, reader: Reader, labels: Mapping[str, int]) -> tuple[Record | None, list[Fault]]:
    faults = list(item.faults)

    def skip(path: Path | Member, reason: str) -> tuple[None, list[Fault]]:
        return None, [*faults, Fault(Path(path), reason, "skipped image")]

    if item.image is None or item.skipped:
        return None, faults
    try:
        size = item.size or read_header(item.image).size
    except ImageError as error:
        return skip(item.image, error.reason)
    if min(size) < MIN_SIDE:
        return skip(item.image, f"is {size[1]}x{size[0]} pixels: too small to learn from")
    annotation = reader.read(item, labels, size)
    faults += annotation.faults
    if annotation.skipped:
        return None, faults
    return (
        Record(
            id=item.id,
            image=item.image,
            size=size,
            boxes=annotation.boxes,
            labels=annotation.labels,
            difficult=annotation.difficult,
            truncated=annotation.truncated,
            annotation=item.annotation,
            crowd=annotation.crowd,
            occluded=annotation.occluded,
            pose=annotation.pose,
        ),
        faults,
    )


# --- the whole split


_LISTED = 20  # contradictions that a message shows


def _contradictions(split: Split) -> str | None:
    wrong = [fault for fault in split.faults if fault.wrong]
    if not wrong:
        return None
    more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
    listed = "; ".join(f"{_where(fault)}: {fault.reason}" for fault in wrong[:_LISTED])
    return (
        f"{split.name!r} has {len(wrong)} annotations that cannot be right: {listed}{more}. Mend them "
        "(`boxwright data check` lists all, `--fix` writes a corrected copy), or leave them out with --skip-bad"
    )


def _where(fault: Fault) -> str:
    return f"{fault.path}:{fault.line}" if fault.line else str(fault.path)


def _unknown_classes(faults: Iterable[Fault], classes: tuple[str, ...]) -> str | None:
    unknown = [fault for fault in faults if isinstance(fault, UnknownClass)]
    if not unknown:
        return None
    counts = Counter(fault.name for fault in unknown)
    listed = few(f"{name!r} ({count} objects){_nearest(name, classes)}" for name, count in counts.most_common())
    return (
        f"{_where(unknown[0])}: classes that are not in the list of {len(classes)}: {listed}. "
        "Mend the list or the annotations, or leave such objects out with --ignore-unknown"
    )


def _nearest(name: str, classes: tuple[str, ...]) -> str:
    """ ", perhaps 'x'" with the class that was meant, or nothing."""
    folded = {known.casefold(): known for known in classes}
    if name.casefold() in folded:
        return f", perhaps {folded[name.casefold()]!r}"
    return nearest(name, classes).replace(" Did you mean", ", perhaps").rstrip("?")


def _examples(faults: Iterable[Fault]) -> str:
    spoilt = [str(fault) for fault in faults if fault.action in ("skipped image", "dropped box")]
    return f": {few(spoilt)}" if spoilt else ""

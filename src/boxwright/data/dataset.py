"""A dataset on disk → the `Record`s of its splits; opening is cheap, reading looks at every file once."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from boxwright.data.formats import voc
from boxwright.data.images import EXTENSIONS, ImageError, read_header
from boxwright.data.layout import Layout, Source, SplitName, find_layout
from boxwright.registry import nearest
from boxwright.types import Fault, Record, UserError

MIN_SIDE = 8  # pixels; a smaller picture has nothing to learn from, whatever its annotation says
_HANDFUL = 5  # pictures that may be skipped however small the dataset is


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a dataset, read: records in the order of their ids, and what was wrong."""

    name: SplitName
    records: tuple[Record, ...]
    faults: tuple[Fault, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset that has been found but not read."""

    path: Path  # the folder or data YAML it was opened from
    layout: Layout

    @property
    def splits(self) -> tuple[SplitName, ...]:
        return tuple(self.layout.splits)

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices made while opening that the user should hear of."""
        return self.layout.notes

    @property
    def save_previews(self) -> bool:
        """Whether predictions on validation pictures are to be drawn."""
        return self.layout.save_previews

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels 0 .. K-1: as the data YAML lists them, else collected from all annotations."""
        return self.layout.classes or _collected_classes(self.layout)

    def with_classes(self, classes: Iterable[str]) -> Dataset:
        """The same files, their labels counted by another list of classes."""
        return replace(self, layout=replace(self.layout, classes=tuple(classes)))

    def read(self, name: SplitName, *, max_bad: float = 0.01, ignore_unknown: bool = False) -> Split:
        """Scan a split: every header and every annotation is read, no pixel decoded.

        Raises `UserError` where the split does not exist, holds no pictures, has two for one annotation, or
        shares any with its counterpart; where an object's class is not in `classes`, unless `ignore_unknown`;
        where more than the fraction `max_bad` (and more than a handful) of its pictures must be skipped; and
        where training would have no object to learn.
        """
        if name not in self.layout.splits:
            raise UserError(f"{self.path} has no split {name!r}; it has {', '.join(self.splits)}")
        items = _items(self.layout, name)
        _check_apart(self.layout, name, items)
        labels = {class_name: label for label, class_name in enumerate(self.classes)}
        records: list[Record] = []
        faults: list[Fault] = []
        for item in items:
            record, found = _read(item, labels)
            faults += found
            if record is not None:
                records.append(record)
        if not ignore_unknown:
            _check_classes(faults, self.classes)
        pictures = sum(item.image is not None for item in items)
        _check_share(name, faults, pictures - len(records), pictures, max_bad)
        if name == "train" and not any((~record.difficult).any() for record in records):
            raise UserError(f"{self.path}: 0 objects to train on in {len(records)} pictures{_examples(faults)}")
        return Split(name, tuple(records), tuple(faults))

    def fingerprint(self, split: Split) -> str:
        """16 hexadecimal digits that change when a class, id, size, box, label or flag does."""
        digest = hashlib.sha256(repr(self.classes).encode(errors="surrogatepass"))
        for record in split.records:
            digest.update(repr((record.id, record.size, len(record.labels))).encode(errors="surrogatepass"))
            digest.update(record.boxes.astype("<f4").tobytes())
            digest.update(record.labels.astype("<i8").tobytes())
            digest.update(np.stack([record.difficult, record.truncated]).tobytes())
        return digest.hexdigest()[:16]


def open_dataset(data: str | Path) -> Dataset:
    """Find the dataset at `data`: a data YAML, a VOCdevkit or a year of it, or a folder of pictures and XML.

    Only names are looked at. Raises `UserError` for what is missing or mistyped.
    """
    path = Path(data)
    layout = find_layout(path)
    train, val = layout.splits["train"], layout.splits["val"]
    for source in train:
        if source in val:
            raise UserError(f"train and val are the same: {source.listing or source.images}")
    return Dataset(path, layout)


# --- one scandir pass per folder


class _Item(NamedTuple):
    """A picture and its annotation, as far as they exist."""

    id: str
    image: Path | None
    annotation: Path | None
    fault: Fault | None = None  # of the listing, not of the files


class _Folder:
    """The pictures and XML files in one folder, by stem; hidden files do not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images: dict[str, list[str]] = {}
        self.annotations: dict[str, str] = {}
        self.others: Counter[str] = Counter()
        try:
            with os.scandir(path) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
        except OSError as error:
            raise UserError(f"cannot read the folder {path}: {error.strerror or error}") from None
        for name in names:
            stem, extension = os.path.splitext(name)  # noqa: PTH122  # a Path for each of 10^5 names costs seconds
            stem, extension = unicodedata.normalize("NFC", stem), extension.lower()
            if extension in EXTENSIONS:
                self.images.setdefault(stem, []).append(name)
            elif extension == ".xml":
                self.annotations.setdefault(stem, name)
            else:
                self.others[extension or "without extension"] += 1

    def contents(self) -> str:
        kinds = Counter({".xml": len(self.annotations)}) + self.others
        return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5)) or "nothing"


def _items(layout: Layout, name: SplitName) -> list[_Item]:
    """The pictures of a split, and annotations without one, in the order of their ids."""
    sources = layout.splits[name]
    images = {source.images for source in sources}
    theirs = {  # folders that also hold the annotations of another split's pictures
        source.annotations for split in layout.splits.values() for source in split if source.images not in images
    }
    items = [
        item for source in sources for item in _source_items(source) if item.image or source.annotations not in theirs
    ]
    items.sort(key=lambda item: item.id)
    if twice := [a.id for a, b in pairwise(items) if a.id == b.id]:
        raise UserError(f"{name} has two pictures called {twice[0]}, in {_images_of(sources)}")
    if not any(item.image for item in items):
        raise UserError(f"no pictures for {name!r} in {_images_of(sources)}")
    return items


def _images_of(sources: Iterable[Source]) -> str:
    return " and ".join(str(source.images) for source in sources)


def _source_items(source: Source) -> list[_Item]:
    pictures = _Folder(source.images)
    labels = pictures if source.annotations == source.images else _Folder(source.annotations)
    if not pictures.images:
        raise UserError(
            f"no pictures in {source.images}: looked for {' '.join(EXTENSIONS)}, found {pictures.contents()}"
        )
    faults: dict[str, Fault] = {}
    if source.listing:
        stems, faults = _listed_ids(source.listing, pictures.images)
        if missing := [stem for stem in stems if stem not in pictures.images]:
            raise UserError(
                f"{source.listing} lists {len(missing)} pictures that are not in {source.images}: {_few(missing)}"
            )
    else:
        stems = [*{**pictures.images, **labels.annotations}]
    stems = _share(stems, source.share)
    if pairs := [pictures.images[stem] for stem in stems if len(pictures.images.get(stem, ())) > 1]:
        names = _few(" and ".join(pair) for pair in sorted(pairs))
        raise UserError(f"{source.images}: one annotation cannot serve two pictures: {names}. Rename or remove one")

    def item(stem: str) -> _Item:
        image, annotation = pictures.images.get(stem), labels.annotations.get(stem)
        return _Item(
            source.prefix + stem,
            source.images / image[0] if image else None,
            source.annotations / annotation if annotation else None,
            faults.get(stem),
        )

    return [item(stem) for stem in stems]


def _listed_ids(listing: Path, known: Container[str]) -> tuple[list[str], dict[str, Fault]]:
    """The ids in an ImageSets list, once each: bare, with an extension, or with a column of 1, 0 or -1."""
    try:
        text = listing.read_text("utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read {listing}: {error.strerror or error}") from None
    stems: dict[str, None] = {}
    faults: dict[str, Fault] = {}
    for number, line in enumerate(text.splitlines(), 1):
        stem = unicodedata.normalize("NFC", line.strip())
        if stem not in known:
            stem = re.sub(r"\s+-?[01]$", "", stem).rpartition("/")[2]
            stem = re.sub(_KNOWN_EXTENSION, "", stem, flags=re.IGNORECASE)
        if stem in stems:
            faults[stem] = Fault(listing, f"{stem} is listed twice", "repaired", number)
        elif stem:
            stems[stem] = None
    if not stems:
        raise UserError(f"{listing} lists no pictures")
    return list(stems), faults


_KNOWN_EXTENSION = rf"\.({'|'.join(extension[1:] for extension in (*EXTENSIONS, '.xml'))})$"


def _share(stems: list[str], share: str) -> list[str]:
    """The ids that belong to a share: each on its own by its hash, so that adding pictures moves none."""
    if share == "all":
        return sorted(stems)
    drawn = sorted(stems, key=_draw)
    kept = [stem for stem in drawn if _draw(stem) < 0.1]
    if not kept or len(kept) == len(drawn):
        kept = drawn[: min(1, len(drawn) - 1)]
    return sorted(kept if share == "val" else set(stems).difference(kept))


def _draw(stem: str) -> float:
    digest = hashlib.sha256(stem.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _check_apart(layout: Layout, name: SplitName, items: Iterable[_Item]) -> None:
    """Training and validation must not share a picture."""
    opposite: dict[SplitName, SplitName] = {"train": "val", "val": "train"}
    if name not in opposite:
        return
    mine, theirs = ({source.images.resolve() for source in layout.splits[split]} for split in ("train", "val"))
    if not mine & theirs:
        return
    others = set(_real_paths(_items(layout, opposite[name])))
    if shared := [path.name for path in _real_paths(items) if path in others]:
        raise UserError(f"train and val share {len(shared)} pictures: {_few(shared)}")


def _real_paths(items: Iterable[_Item]) -> Iterable[Path]:
    paths = [item.image for item in items if item.image]
    folders = {folder: folder.resolve() for folder in {path.parent for path in paths}}
    return [folders[path.parent] / path.name for path in paths]


# --- one picture


def _read(item: _Item, labels: Mapping[str, int]) -> tuple[Record | None, list[Fault]]:
    faults = [item.fault] if item.fault else []

    def skip(path: Path, reason: str) -> tuple[None, list[Fault]]:
        return None, [*faults, Fault(path, reason, "skipped image")]

    if item.image is None:
        assert item.annotation is not None
        return skip(item.annotation, "there is no picture of this name")
    if item.annotation is None:
        return skip(item.image, "there is no annotation of this name")
    try:
        size = read_header(item.image).size
    except ImageError as error:
        return skip(item.image, error.reason)
    if min(size) < MIN_SIDE:
        return skip(item.image, f"is {size[1]}x{size[0]} pixels: too small to learn from")
    annotation = voc.read_annotation(item.annotation, labels, size)
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
        ),
        faults,
    )


# --- the whole split


def _collected_classes(layout: Layout) -> tuple[str, ...]:
    """The classes that the annotations name, sorted; in a year of the VOC challenge, its own twenty."""
    sources = [source for sources in layout.splits.values() for source in sources]
    paths = {item.annotation for source in sources for item in _source_items(source) if item.annotation}
    names: Counter[str] = Counter()
    for path in paths:
        names += voc.class_counts(path)
    if not names:
        raise UserError(f"no annotation in {_images_of(layout.splits['train'])} names a class")
    official = any(re.fullmatch(r"VOC20\d\d", source.images.parent.name) for source in sources)
    if official and names.keys() <= set(voc.CLASSES):
        return voc.CLASSES
    return tuple(sorted(names))


def _check_classes(faults: Iterable[Fault], classes: tuple[str, ...]) -> None:
    unknown = [fault for fault in faults if isinstance(fault, voc.UnknownClass)]
    if not unknown:
        return
    counts = Counter(fault.name for fault in unknown)
    listed = _few(f"{name!r} ({count} objects){_nearest(name, classes)}" for name, count in counts.most_common())
    first = unknown[0]
    raise UserError(
        f"{first.path}:{first.line}: classes that are not in the list of {len(classes)}: {listed}. "
        "Mend the list or the annotations, or leave such objects out with --ignore-unknown"
    )


def _nearest(name: str, classes: tuple[str, ...]) -> str:
    """ ", perhaps 'x'" with the class that was meant, or nothing."""
    folded = {known.casefold(): known for known in classes}
    if name.casefold() in folded:
        return f", perhaps {folded[name.casefold()]!r}"
    return nearest(name, classes).replace(" Did you mean", ", perhaps").rstrip("?")


def _check_share(name: SplitName, faults: list[Fault], skipped: int, pictures: int, max_bad: float) -> None:
    if skipped == pictures or (skipped > _HANDFUL and skipped > max_bad * pictures):
        raise UserError(f"{skipped} of the {pictures} pictures of {name!r} cannot be used{_examples(faults)}")


def _examples(faults: Iterable[Fault]) -> str:
    spoilt = [str(fault) for fault in faults if fault.action in ("skipped image", "dropped box")]
    return f": {_few(spoilt)}" if spoilt else ""


def _few(items: Iterable[str]) -> str:
    items = list(items)
    return "; ".join(items[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")

"""A dataset → `Checked`: every finding, the figures of its splits, and which pictures are equal. Nothing is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

from boxwright.data.check.content import Group, content_findings, content_groups, equal_files
from boxwright.data.check.evidence import VocEvidence
from boxwright.data.check.figures import Figures, figures
from boxwright.data.check.finding import Finding, Findings, Picture, from_fault
from boxwright.data.check.headers import notes_of
from boxwright.data.check.objects import class_findings, object_findings
from boxwright.data.check.pixels import look_at_pixels
from boxwright.data.dataset import Dataset, Split, open_dataset
from boxwright.data.formats.base import Item
from boxwright.data.images import ImageError, read_bytes, read_header
from boxwright.data.layout import SplitName
from boxwright.data.placing import Say
from boxwright.progress import Progress
from boxwright.types import Record, UserError


@dataclass(frozen=True)
class Rules:
    """By which training would judge: the options of `boxwright train` of the same names."""

    max_bad: float = 0.01
    skip_bad: bool = False
    ignore_unknown: bool = False


@dataclass(frozen=True)
class Checked:
    """What the doctor found in a dataset."""

    data: str  # as it was given: an address too
    classes: tuple[str, ...]
    splits: Mapping[str, Figures]
    findings: Findings
    groups: tuple[Group, ...]  # of equal pictures
    notes: tuple[str, ...]
    imgsz: int | None
    decoded: bool
    records: Mapping[str, Sequence[Record]] = field(repr=False, default_factory=dict[str, Sequence[Record]])

    @property
    def errors(self) -> int:
        """How many things training would refuse."""
        return self.findings.count("error")


def check_dataset(
    data: str | Path,
    *,
    splits: Sequence[SplitName] = (),
    decode: bool = False,
    workers: int = 0,
    imgsz: int | None = None,
    rules: Rules | None = None,
    say: Say = lambda _: None,
) -> Checked:
    """Look at every file of a dataset, or of some `splits`; `decode` all pixels too, in `workers` processes.

    Raises `UserError` where it cannot be opened: no such path, a mistake in the data YAML, a split that is not there.
    """
    rules = rules or Rules()
    dataset = open_dataset(data)
    for name in splits:
        if name not in dataset.splits:
            raise UserError(f"--split {name}: {data} has {', '.join(dataset.splits)}")
    chosen = _distinct(dataset, [name for name in dataset.splits if not splits or name in splits])
    findings = Findings()
    try:
        classes = dataset.classes  # which may have to be collected from all annotations
    except UserError as error:
        if str(error).startswith("no pictures"):  # the wrong folder, not a dataset with faults
            raise
        findings.add(Finding("all", "split", "error", str(error), "refuses", "refused"))
        return Checked(str(data), (), {}, findings, (), dataset.layout.notes, imgsz, decode)
    seen = _Seen()
    results: dict[str, Figures] = {}
    for name in chosen:
        say(f"{name}: reading annotations and headers")
        split = _scan(dataset, name, findings)
        if split is None:
            continue
        seen.records[name] = split.records
        items = dataset.items(name)
        findings.update(_reading(dataset, split, items, rules))
        stated = any(source.voc_boxes != "from 1" for source in dataset.layout.splits[name])
        voc = VocEvidence(name, stated=stated)
        findings.update(_files(name, split, items, voc, seen, say))
        findings.update(voc.findings())
        findings.update(object_findings(name, split.records, classes))
        results[name] = figures(
            split.records, classes, pictures=split.pictures, parts=voc.parts, fractional=voc.fractional, imgsz=imgsz
        )
    findings.update(_shared(seen))
    counts = {name: {split: of.classes[name].objects for split, of in results.items()} for name in classes}
    findings.update(class_findings(counts, list(results)))
    groups = _groups(seen, classes, findings, decode=decode, workers=workers, say=say)
    return Checked(str(data), classes, results, findings, tuple(groups), dataset.notes, imgsz, decode, seen.records)


@dataclass
class _Seen:
    """The pictures of all splits."""

    splits: dict[Picture, list[str]] = field(default_factory=dict[Picture, list[str]])
    unreadable: set[Picture] = field(default_factory=set[Picture])  # of which nothing need be decoded
    records: dict[str, Sequence[Record]] = field(default_factory=dict[str, Sequence[Record]])


def _distinct(dataset: Dataset, names: Sequence[SplitName]) -> list[SplitName]:
    """The splits but for a test that is validation under another name: nothing new is in it."""
    sources = dataset.layout.splits
    twice = "test" in names and "val" in names and sources["test"] == sources["val"]
    return [name for name in names if not (twice and name == "test")]


def _scan(dataset: Dataset, name: SplitName, findings: Findings) -> Split | None:
    """A split, read; where it cannot be, the reason is a finding."""
    try:
        return dataset.scan(name, apart=False)
    except UserError as error:
        findings.add(Finding(name, "split", "error", str(error), "refuses", "refused"))
        return None


def _reading(dataset: Dataset, split: Split, items: Sequence[Item], rules: Rules) -> Iterator[Finding]:
    """What reading found, and why training would refuse the split as a whole."""
    pictures = {str(item.image) for item in items if item.image}
    images = {str(item.annotation): item.image for item in items if item.annotation and item.image}
    several = Counter(str(item.annotation) for item in items if item.annotation)
    for fault in split.faults:
        found = from_fault(
            split.name,
            fault,
            skip_bad=rules.skip_bad,
            ignore_unknown=rules.ignore_unknown,
            picture=str(fault.path) in pictures,
        )
        image = fault.path if str(fault.path) in pictures else None
        if image is None and several[str(fault.path)] == 1:
            image = images.get(str(fault.path))
        if found.kind == "swapped-size" and image and _turned(image):
            found = replace(found, kind="exif-size")
        yield replace(found, image=image) if image else found
    rest = dataset.problems(split, max_bad=rules.max_bad, ignore_unknown=True, skip_bad=True)
    for problem in rest:
        kind = "no-objects" if "0 objects to train on" in problem else "too-many-lost"
        yield Finding(split.name, kind, "error", problem, "refuses", "refused")


def _turned(picture: Picture) -> bool:
    """Whether EXIF swaps a picture's width and height."""
    try:
        return read_header(picture).orientation >= 5
    except ImageError:
        return False


def _files(
    name: str, split: Split, items: Sequence[Item], voc: VocEvidence, seen: _Seen, say: Say
) -> Iterator[Finding]:
    """Look at the head of every picture, and at every XML."""
    sizes = {record.image: record.size for record in split.records}
    progress = Progress("picture", len(items), say)
    for done, item in enumerate(items, 1):
        progress(done)
        if item.image is None:
            continue
        seen.splits.setdefault(item.image, []).append(name)
        try:
            source = item.image if isinstance(item.image, Path) else read_bytes(item.image)
            header = read_header(source)
            with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
                notes = notes_of(file, header.format, Path(item.image).suffix, header.orientation)
        except (ImageError, OSError) as error:
            seen.unreadable.add(item.image)
            if not isinstance(item.image, Path):  # of a picture in a shard, reading took the index's word
                reason, training = getattr(error, "reason", str(error)), "leaves the picture out"
                yield Finding(name, "unreadable-picture", "lost", reason, training, "skipped image", item.image)
            continue
        for kind, reason in notes.items():
            yield Finding(name, kind, "note", reason, "uses it", path=item.image)
        if item.annotation and item.annotation.suffix.lower() == ".xml" and isinstance(item.image, Path):
            size = sizes.get(item.image, header.size)
            yield from voc.add(item.annotation, item.image, size, header.orientation)


def _shared(seen: _Seen) -> Iterator[Finding]:
    """Files that train and val both have, maybe by way of links to folders."""
    folders: dict[Path, Path] = {}
    places: dict[Path, set[str]] = {}
    for picture, splits in seen.splits.items():
        path = Path(picture)
        if path.parent not in folders:
            folders[path.parent] = path.parent.resolve()
        found = places.setdefault(folders[path.parent] / path.name, set())
        if not {"train", "val"} <= found and {"train", "val"} <= found.union(splits):
            reason = "is in train and in val: training refuses to be judged on what it learnt"
            yield Finding("train", "shared-pictures", "error", reason, "refuses", "refused", path, image=picture)
        found.update(splits)


def _groups(
    seen: _Seen, classes: Sequence[str], findings: Findings, *, decode: bool, workers: int, say: Say
) -> list[Group]:
    say("comparing pictures of equal length")
    records = {record.image: record for those in seen.records.values() for record in those}
    groups = content_groups(equal_files(seen.splits), seen.splits, records, classes)
    if decode:
        readable = {picture: splits for picture, splits in seen.splits.items() if picture not in seen.unreadable}
        pixels = look_at_pixels(readable, workers=workers, say=say)
        findings.update(pixels.findings)
        known = {frozenset(path for _, path in group.members) for group in groups}
        equal = [paths for paths in pixels.equal if not any(set(paths) <= group for group in known)]
        groups += content_groups(equal, seen.splits, records, classes, pixels=True)
    findings.update(content_findings(groups))
    return groups

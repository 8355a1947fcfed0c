"""Picture files → which of them are equal, and whether they are labelled alike.

Only files of one length are read, first their ends: a scan of distinct pictures reads next to nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from boxwright.data.check.finding import Finding, Picture
from boxwright.data.images import ImageError, read_bytes
from boxwright.types import Record

_END = 4096  # bytes that tell most files of one length apart


@dataclass(frozen=True)
class Group:
    """Pictures with one content."""

    members: tuple[tuple[str, Picture], ...]  # of (split, picture)
    pixels: bool  # equal when decoded, though the files differ
    differ: str = ""  # how their labels do

    @property
    def labels_differ(self) -> bool:
        return bool(self.differ)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(split for split, _ in self.members))


def equal_files(pictures: Iterable[Picture]) -> list[list[Picture]]:
    """Groups of pictures with the same bytes; names that are links to one file are such a group too."""
    by_length: defaultdict[int, list[Picture]] = defaultdict(list)
    for picture in pictures:
        try:
            by_length[picture.stat().st_size if isinstance(picture, Path) else picture.length].append(picture)
        except OSError:
            continue
    groups = [group for length, group in by_length.items() if length and len(group) > 1]
    for digest in (_end, _whole):
        groups = [part for group in groups for part in _grouped(group, digest)]
    return groups


def _grouped(pictures: Sequence[Picture], key: Callable[[Picture], Hashable]) -> Iterator[list[Picture]]:
    by_key: defaultdict[Hashable, list[Picture]] = defaultdict(list)
    for picture in pictures:
        try:
            by_key[key(picture)].append(picture)
        except (OSError, ImageError):
            continue
    return (group for group in by_key.values() if len(group) > 1)


def _end(picture: Picture) -> Hashable:
    if not isinstance(picture, Path):
        return picture.crc32  # a picture in a shard: of the whole
    with picture.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(length - _END, 0))
        return hashlib.blake2b(file.read(_END), digest_size=16).digest()


def _whole(picture: Picture) -> bytes:
    if not isinstance(picture, Path):
        return hashlib.sha256(read_bytes(picture)).digest()
    with picture.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def content_groups(
    groups: Iterable[Sequence[Picture]],
    splits: Mapping[Picture, Sequence[str]],
    records: Mapping[Picture, Record],
    classes: Sequence[str],
    *,
    pixels: bool = False,
) -> list[Group]:
    """What is known of each group of equal pictures."""
    found: list[Group] = []
    for pictures in groups:
        members = tuple((split, picture) for picture in pictures for split in splits[picture])
        said = [records[picture] for picture in pictures if picture in records]
        differ = next(filter(None, (_difference(said[0], other, classes) for other in said[1:])), "") if said else ""
        found.append(Group(members, pixels, differ))
    return sorted(found, key=lambda group: (-len(group.splits), not group.differ, str(group.members[0][1])))


def _difference(first: Record, second: Record, classes: Sequence[str]) -> str:
    """How the labels of two records differ; nothing where they do not."""
    names = [Counter(classes[label] for label in record.labels.tolist()) for record in (first, second)]
    if names[0] != names[1]:
        shown = (", ".join(f"{count} {name!r}" for name, count in sorted(of.items())[:4]) or "none" for of in names)
        return f"with other objects: {' against '.join(shown)}"
    orders = [np.lexsort((*record.boxes.T[::-1], record.labels)) for record in (first, second)]
    apart = np.abs(first.boxes[orders[0]] - second.boxes[orders[1]])
    return f"with boxes that differ by up to {apart.max():.0f} pixels" if apart.size and apart.max() >= 0.5 else ""


def content_findings(groups: Iterable[Group]) -> Iterator[Finding]:
    """A finding for each group: of a leak, of labels that contradict each other, or of a mere repetition."""
    for group in groups:
        (split, first), *others = group.members
        shown = ", ".join(f"{picture.name} ({part})" for part, picture in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        how = "has the same pixels as" if group.pixels else "is the same file as"
        differ = f", {group.differ}" if group.differ else ""
        kind = "leak" if len(group.splits) > 1 else "same-picture-other-labels" if group.differ else "duplicate"
        reason = f"{how} {shown}{more}{differ}"
        yield Finding(split, kind, "suspect", reason, "uses it", path=first, image=first)

"""Picture files → which of them are equal, and whether they are labelled alike.

Only files of one length are read, first their ends: a scan of distinct pictures reads next to nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from boxwright.data.check.finding import Finding
from boxwright.types import Record

_END = 4096  # bytes that tell most files of one length apart


@dataclass(frozen=True)
class Group:
    """Pictures with one content."""

    members: tuple[tuple[str, Path], ...]  # of (split, picture)
    pixels: bool  # equal when decoded, though the files differ
    labels_differ: bool

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(split for split, _ in self.members))


def equal_files(pictures: Iterable[Path]) -> list[list[Path]]:
    """Groups of distinct files with the same bytes."""
    files: dict[tuple[int, int], Path] = {}  # a file that has two names, or is in two splits, is not its own double
    by_length: defaultdict[int, list[Path]] = defaultdict(list)
    for path in pictures:
        try:
            status = path.stat()
        except OSError:
            continue
        if files.setdefault((status.st_dev, status.st_ino), path) is path or not status.st_ino:
            by_length[status.st_size].append(path)
    groups = [group for length, group in by_length.items() if length and len(group) > 1]
    for digest in (_end, _whole):
        groups = [part for group in groups for part in _grouped(group, digest)]
    return groups


def _grouped(paths: Sequence[Path], key: Callable[[Path], Hashable]) -> Iterator[list[Path]]:
    by_key: defaultdict[Hashable, list[Path]] = defaultdict(list)
    for path in paths:
        try:
            by_key[key(path)].append(path)
        except OSError:
            continue
    return (group for group in by_key.values() if len(group) > 1)


def _end(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(length - _END, 0))
        return hashlib.blake2b(file.read(_END), digest_size=16).digest()


def _whole(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def content_groups(
    groups: Iterable[Sequence[Path]],
    splits: Mapping[Path, Sequence[str]],
    records: Mapping[Path, Record],
    classes: Sequence[str],
    *,
    pixels: bool = False,
) -> list[Group]:
    """What is known of each group of equal pictures."""
    found: list[Group] = []
    for paths in groups:
        members = tuple((split, path) for path in paths for split in splits[path])
        said = {_labels(records[path], classes) for path in paths if path in records}
        found.append(Group(members, pixels, len(said) > 1))
    return sorted(found, key=lambda group: (-len(group.splits), not group.labels_differ, group.members))


def _labels(record: Record, classes: Sequence[str]) -> frozenset[tuple[object, ...]]:
    rows = zip(record.labels.tolist(), record.boxes.round(1).tolist(), strict=True)
    return frozenset((classes[label], *box) for label, box in rows)


def content_findings(groups: Iterable[Group]) -> Iterator[Finding]:
    """A finding for each group: of a leak, of labels that contradict each other, or of a mere repetition."""
    for group in groups:
        (split, first), *others = group.members
        shown = ", ".join(f"{path.name} ({part})" for part, path in others[:5])
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        how = "has the same pixels as" if group.pixels else "is the same file as"
        differ = ", with other labels" if group.labels_differ else ""
        kind = "leak" if len(group.splits) > 1 else "same-picture-other-labels" if differ else "duplicate"
        reason = f"{how} {shown}{more}{differ}"
        yield Finding(split, kind, "suspect", reason, "uses it", path=first, image=first)

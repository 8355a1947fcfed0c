"""A `Fault` of reading, or evidence, → a `Finding`: of a known kind, and what training does with it.

Kinds are named, so that a program can rely on them; what they are called is in `KINDS`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from boxwright.data.formats.base import Box, UnknownClass
from boxwright.types import Action, Fault, Member

Picture = Path | Member
Level = Literal["error", "lost", "repaired", "suspect", "note"]
Training = Literal["refuses", "leaves the picture out", "drops the box", "repairs it", "uses it"]

LEVELS: tuple[Level, ...] = ("error", "lost", "repaired", "suspect", "note")
LISTED = 10_000  # findings of a kind and split that are kept one by one; all are counted

KINDS: Mapping[str, str] = {  # in the order in which a report has them
    # of a whole split
    "split": "a split that cannot be read",
    "too-many-lost": "too many pictures cannot be used",
    "no-objects": "nothing to train on",
    "shared-pictures": "files that train and val share",
    # of annotations
    "unreadable-annotation": "annotations that cannot be read",
    "unknown-class": "classes that are not in the list",
    "no-class": "objects without a class",
    "exif-size": "annotations made before the EXIF rotation was applied",
    "swapped-size": "annotations whose width and height are swapped",
    "scaled-size": "annotations made at another scale",
    "other-size": "annotations made for a picture of another size",
    "swapped-corners": "boxes with corners the wrong way round",
    "not-a-number": "coordinates that are no numbers",
    "no-box": "objects without a box",
    "several-boxes": "objects with several boxes",
    "unreadable-mark": "marks that cannot be read",
    "wrong": "other contradictions",
    # lost
    "unreadable-picture": "pictures that cannot be read",
    "damaged-picture": "pictures whose pixels cannot be decoded",
    "small-picture": "pictures too small to learn from",
    "no-annotation": "pictures without annotation",
    "no-picture": "annotations without picture",
    "no-area": "boxes without area in the picture",
    "object-twice": "objects that are there twice",
    "lost": "other losses",
    # repaired
    "leaves-picture": "boxes cut at the edge of the picture",
    "listed-twice": "pictures that are listed twice",
    "name-spelling": "class names with space around them or in decomposed Unicode",
    "repaired": "other repairs",
    # evidence
    "same-picture-other-labels": "equal pictures with different labels",
    "leak": "equal pictures in two splits",
    "duplicate": "equal pictures in one split",
    "counts-from-0": "boxes that seem to count from 0",
    "ends-outside": "boxes that seem to end a pixel too far",
    "swapped-axes": "boxes that seem to have x and y swapped",
    "width-height": "corners that seem to be width and height",
    "fractions": "boxes that seem to be fractions of the picture",
    "larger-picture": "boxes that seem to be of larger pictures",
    "unrotated": "boxes that fit the picture only before its EXIF rotation",
    "no-train-objects": "classes without an object to learn from",
    "no-val-objects": "classes without an object to be judged on (AP n/a)",
    "similar-classes": "classes that may be one",
    "two-classes": "objects of two classes in one place",
    "near-duplicate": "objects that are there nearly twice",
    "repeated-box": "boxes that are the same in many pictures",
    "whole-picture": "boxes that are the whole picture",
    "one-colour": "pictures of a single colour",
    # noted
    "tiny-box": "boxes with a side under 4 pixels",
    "no-size": "annotations without a usable <size> (not needed)",
    "other-filename": "annotations whose <filename> is another picture's (not used)",
    "outside-filename": "annotations whose <filename> leads out of the folder (not used)",
    "repaired-xml": "annotations read in spite of what XML forbids",
    "other-format": "pictures of another format than their extension says",
    "grey": "grey pictures, read as RGB",
    "cmyk": "CMYK pictures, read as RGB",
    "deep": "pictures of more than 8 bits a channel, read as 8",
    "alpha": "pictures with transparency, which is left away",
    "palette": "pictures with a palette, read as RGB",
    "several-pictures": "files with several pictures, the first of which is read",
    "turned": "pictures that are turned by their EXIF orientation",
    "noted": "other notes",
}

_ACTIONS: Mapping[Action, tuple[Level, Training]] = {
    "refused": ("error", "refuses"),
    "skipped image": ("lost", "leaves the picture out"),
    "dropped box": ("lost", "drops the box"),
    "repaired": ("repaired", "repairs it"),
    "noted": ("note", "uses it"),
}

# What a reader's reason says → its kind; the first that is found counts.
_REASONS: tuple[tuple[str, str], ...] = (
    (r"there is no picture of this name|there is no .+ in |names no picture", "no-picture"),
    (r"there is no annotation of this name", "no-annotation"),
    (r"too small to learn from", "small-picture"),
    (r"swapped, or labelled before its EXIF", "swapped-size"),
    (r"times its scale$", "scaled-size"),
    (r"labelled on another picture$", "other-size"),
    (r"is greater than|has no area: it is -|(wide|and) -[\d.]+ high", "swapped-corners"),
    (r"has no area|side of a pixel", "no-area"),
    (r"no <name>|names no class|has no label", "no-class"),
    (r"has \d+ <bndbox>", "several-boxes"),
    (r"has no <bndbox>|has no bbox|not four numbers|has no box|numbers after its class", "no-box"),
    (r"is no number|no fraction of the picture|<bndbox> has no <", "not-a-number"),
    (r"twice: same class, same box", "object-twice"),
    (r"leaves the \d+x\d+ picture", "leaves-picture"),
    (r"taken as 0$", "unreadable-mark"),
    (r"listed twice$", "listed-twice"),
)


def counted(count: int, what: str) -> str:
    """1 picture, 1,200 pictures."""
    return f"{count:,} {what}{'s' * (count != 1)}"


@dataclass(frozen=True)
class Finding:
    """One thing found, where it is, and what training does with it."""

    split: str
    kind: str  # of KINDS
    level: Level
    reason: str
    training: Training
    action: Action = "noted"
    path: Picture | None = None
    line: int | None = None
    image: Picture | None = None  # the picture that shows it, where that is another file
    box: Box | None = None  # where to look in it, in pixels
    classes: tuple[str, ...] = ()  # that it is about, where it is one finding of several

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}" if self.line else str(self.path or self.split)


class Findings:
    """Gathers findings: the first `LISTED` of each split and kind one by one, and how many there are of all."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, Level], list[Finding]] = {}
        self.counts: Counter[tuple[str, str, Level]] = Counter()

    def add(self, finding: Finding) -> None:
        key = finding.split, finding.kind, finding.level
        self.counts[key] += 1
        listed = self._found.setdefault(key, [])
        if len(listed) < LISTED:
            listed.append(finding)

    def update(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.add(finding)

    def __iter__(self) -> Iterator[Finding]:
        """Worst first, each kind together."""
        order = {kind: index for index, kind in enumerate(KINDS)}
        for key in sorted(self._found, key=lambda key: (LEVELS.index(key[2]), order[key[1]])):
            yield from self._found[key]

    def count(self, level: Level, split: str | None = None) -> int:
        return sum(
            count for (part, _, of), count in self.counts.items() if of == level and (split is None or part == split)
        )

    def kinds(self) -> dict[tuple[Level, str], list[Finding]]:
        """The listed findings by level and kind, worst first."""
        grouped: dict[tuple[Level, str], list[Finding]] = {}
        for finding in self:
            grouped.setdefault((finding.level, finding.kind), []).append(finding)
        return grouped

    def classes(self, level: Level, kind: str) -> int:
        """How many classes the findings of a kind are about; 0 where they are not about classes."""
        return sum(len(finding.classes) for finding in self.kinds().get((level, kind), ()))

    def total(self, level: Level, kind: str) -> int:
        return sum(count for (_, name, of), count in self.counts.items() if (name, of) == (kind, level))


def from_fault(split: str, fault: Fault, *, skip_bad: bool, ignore_unknown: bool, picture: bool) -> Finding:
    """The finding that a fault of reading is; `picture` tells that it is one of a picture file."""
    level, training = _ACTIONS[fault.action]
    kind = _kind(fault, level, picture=picture)
    if (fault.wrong and not skip_bad) or (isinstance(fault, UnknownClass) and not ignore_unknown):
        level, training = "error", "refuses"
    return Finding(split, kind, level, fault.reason, training, fault.action, fault.path, fault.line)


def _kind(fault: Fault, level: Level, *, picture: bool) -> str:
    if isinstance(fault, UnknownClass):
        return "unknown-class"
    for pattern, kind in _REASONS:
        if re.search(pattern, fault.reason):
            return kind
    if fault.action == "skipped image":
        return "unreadable-picture" if picture else "unreadable-annotation"
    return "wrong" if fault.wrong else "noted" if level == "note" else level

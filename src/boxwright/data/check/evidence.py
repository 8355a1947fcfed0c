"""What VOC files say, element by element → evidence that they were written by another convention, and small oddities.

A box that counts from 0, has x and y swapped or is given as fractions is a valid box: only many of them together show
it. Each finding carries the numbers that it rests on.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from boxwright.data.check.finding import Finding
from boxwright.data.check.voc_xml import child, corners, is_box, local, read_document, stated, text
from boxwright.data.formats.base import quoted
from boxwright.types import Bool, Size

_FEW = 3  # boxes that may be a slip of the mouse


@dataclass
class VocEvidence:
    """Gathers the corners of a split's annotations as they were written."""

    split: str
    parts: int = 0  # boxes of <part>s, which are not objects
    stated: bool = False  # whether a data YAML says what the corners are
    fractional: int = 0  # boxes with a corner between pixels
    _corners: list[tuple[float, float, float, float]] = field(default_factory=list[tuple[float, float, float, float]])
    _sizes: list[Size] = field(default_factory=list[Size])  # of the picture of each
    _pictures: list[int] = field(default_factory=list[int])
    _paths: list[Path] = field(default_factory=list[Path])
    _turned: list[bool] = field(default_factory=list[bool])

    def add(self, path: Path, image: Path, size: Size, orientation: int) -> Iterator[Finding]:
        """Look at one annotation, and tell what is odd in it by itself."""
        document = read_document(path)
        if document is None:
            return
        yield from self._oddities(path, image, document.text("filename") or document.text("path"))
        if blank_first(path):
            yield self._note("repaired-xml", path, "a blank line stands before <?xml: read without it", "repaired")
        said, stated_size = stated(document)
        if stated_size is None:
            what = "is missing" if said is None else f"is {quoted(' x '.join(text(inside) for inside in said))}"
            yield self._note("no-size", path, f"<size> {what}: the picture's own is taken")
        index = len(self._paths)
        self._paths.append(path)
        self._turned.append(orientation >= 5)
        for item in document.objects():
            self.parts += sum(local(part) == "part" for part in item)
            name = child(item, "name")
            if name is not None and (raw := name.text or "").strip() and spelled_otherwise(raw):
                reason = f"<name> {raw[:60]!r} has space around it or decomposed Unicode: read without"
                yield self._note("name-spelling", path, reason, "repaired", document.lines[name])
            box = corners(item)
            if is_box(box):
                self.fractional += any(not value.is_integer() for value in box)
                self._corners.append(box)
                self._sizes.append(size)
                self._pictures.append(index)

    def findings(self) -> Iterator[Finding]:
        """What the boxes show together."""
        if not self._corners:
            return
        boxes = np.array(self._corners)  # (N, 4) xmin ymin xmax ymax, as written
        height, width = np.array(self._sizes, np.float64).T
        owners = np.array(self._pictures)
        limits = np.stack([width, height], 1)  # (N, 2)
        fraction = np.all((boxes >= 0) & (boxes <= 1), axis=1)
        if fraction.sum() > len(boxes) / 2:
            yield self._suspect("fractions", fraction, owners, "lie wholly between 0 and 1, where VOC has pixels")
            return
        inverted = np.any(boxes[:, 2:] < boxes[:, :2], axis=1)
        if self._strong(inverted, 0.05):
            mine = np.isin(owners, owners[inverted])
            fit = (boxes[mine, :2] + boxes[mine, 2:] <= limits[mine] + 1).all()
            if fit:
                reason = "end before they begin, and with xmax and ymax as width and height all fit their pictures"
                yield self._suspect("width-height", inverted, owners, reason)
        outside = np.any(boxes[:, 2:] > limits + 1, axis=1) & ~inverted
        yield from self._outside(boxes, limits, outside, owners)
        if not self.stated and not self._strong(outside, 0.1):
            yield from self._counting(boxes, limits, owners)

    def _outside(self, boxes: np.ndarray, limits: np.ndarray, outside: Bool, owners: np.ndarray) -> Iterator[Finding]:
        """Boxes that leave the picture by more than a pixel: why?"""
        turned = outside & np.array(self._turned)[owners]
        if turned.any():
            mine = np.isin(owners, owners[turned])
            if (boxes[mine, 2:] <= limits[mine, ::-1] + 1).all():
                reason = "leave the picture as it is shown, and fit it as it is stored: labelled before EXIF's rotation"
                yield self._suspect("unrotated", turned, owners, reason)
                outside = outside & ~turned
        if not self._strong(outside, 0.02):
            return
        mine = np.isin(owners, owners[outside])
        swapped = np.all(boxes[mine][:, [3, 2]] <= limits[mine] + 1, axis=1)
        if swapped.mean() > 0.95:
            reason = "leave their pictures, and with x and y swapped all boxes of these pictures fit"
            yield self._suspect("swapped-axes", outside, owners, reason)
        elif self._strong(outside, 0.1):
            times = float(np.max(boxes[:, 2:] / limits))
            reason = f"leave their pictures, the farthest to {times:.2f} times the side: labelled on larger ones?"
            yield self._suspect("larger-picture", outside, owners, reason)

    def _counting(self, boxes: np.ndarray, limits: np.ndarray, owners: np.ndarray) -> Iterator[Finding]:
        """Whether the corners count from 0, where VOC counts from 1 and includes the last."""
        from_0, from_1 = np.any(boxes[:, :2] == 0, axis=1), np.any(boxes[:, :2] == 1, axis=1)
        full, past = np.any(boxes[:, 2:] == limits, axis=1), np.any(boxes[:, 2:] == limits + 1, axis=1)
        short = np.any(boxes[:, 2:] == limits - 1, axis=1)
        if from_0.sum() >= _FEW and from_0.sum() > from_1.sum():
            ends = " and ends a pixel early" if short.sum() > full.sum() else ""
            reason = (
                f"begin at 0 and {int(from_1.sum())} at 1, where VOC counts from 1 ({int(full.sum())} end in the last "
                f"pixel, {int(short.sum())} in the one before): every box is read a pixel too far up and left{ends}; "
                "`voc_boxes: from 0` or `edges` in a data YAML says otherwise"
            )
            yield self._suspect("counts-from-0", from_0, owners, reason)
        if past.sum() >= _FEW and past.sum() > full.sum():
            reason = (
                f"end a pixel past the picture, and {int(full.sum())} at its edge: is xmax one past the last pixel?"
            )
            yield self._suspect("ends-outside", past, owners, reason)

    def _strong(self, which: Bool, share: float) -> bool:
        return bool(which.sum() >= _FEW and which.mean() >= share)

    def _suspect(self, kind: str, which: Bool, owners: np.ndarray, reason: str) -> Finding:
        first = self._paths[int(owners[np.flatnonzero(which)[0]])]
        count = f"{int(which.sum())} of {len(which)} boxes"
        return Finding(self.split, kind, "suspect", f"{count} {reason}", "uses it", path=first)

    def _note(self, kind: str, path: Path, reason: str, action: str = "noted", line: int | None = None) -> Finding:
        if action == "repaired":
            return Finding(self.split, kind, "repaired", reason, "repairs it", "repaired", path, line)
        return Finding(self.split, kind, "note", reason, "uses it", "noted", path, line)

    def _oddities(self, path: Path, image: Path, said: str) -> Iterator[Finding]:
        if not said:
            return
        if said.startswith(("/", "\\")) or ".." in said.replace("\\", "/").split("/"):
            yield self._note("outside-filename", path, f"<filename> is {quoted(said)}: not used")
        elif unicodedata.normalize("NFC", said) not in (
            unicodedata.normalize("NFC", name) for name in (image.name, image.stem)
        ):
            yield self._note(
                "other-filename", path, f"<filename> is {quoted(said)}, not {quoted(image.name)}: not used"
            )


def spelled_otherwise(raw: str) -> bool:
    """Whether a class name is read otherwise than it is written."""
    return unicodedata.normalize("NFC", raw).strip() != raw


def blank_first(path: Path) -> bool:
    """Whether white space stands before the XML declaration, which XML forbids."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError:
        return False
    return start[:1].isspace() and start.lstrip().startswith(b"<?xml")

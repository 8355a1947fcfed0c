"""The values that flow through Boxwright, and the conventions that all of them obey. Numpy only.

    image   uint8, RGB, (3, H, W) as a tensor, (H, W, 3) while it is still a picture
    size    (height, width), pixels
    boxes   float32, (N, 4), x1 y1 x2 y2, pixels, continuous edges: 0 <= x1 < x2 <= W
    labels  int64, (N,), 0 .. K-1, foreground only       scores  float32, (N,), 0 .. 1

VOC XML is 1-based and inclusive: x1 = xmin - 1, y1 = ymin - 1, x2 = xmax, y2 = ymax.

Letters in shape comments: B batch, N boxes, K classes, C channels, H W pixels, S stride, T tokens, D width.

Image files and annotations are read into `Record`s (data/); a record is transformed into a `Sample`; samples are
collated into a `Batch`; a detector (models/) turns a batch into losses or `Detections`; evaluation/ turns records
and detections into `Scores`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from boxwright.errors import BoxwrightError, DiskFailed, Diverged, Stopped, UserError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Action", "Batch", "Bool", "BoxwrightError", "Detections", "DiskFailed", "Diverged", "Fault", "Float32", "Int64",
    "Member", "Names", "Record", "Sample", "Scores", "Shard", "Size", "Stopped", "UInt8", "UserError", "no_boxes",
]  # fmt: skip

Size = tuple[int, int]
Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
UInt8 = NDArray[np.uint8]
Names = NDArray[np.str_]


def no_boxes() -> Float32:
    return np.zeros((0, 4), np.float32)


def _no_flags() -> Bool:
    return np.zeros(0, np.bool_)


def _no_names() -> Names:
    return np.zeros(0, np.str_)


@dataclass(frozen=True, slots=True)
class Shard:
    """A tar file that holds many pictures."""

    place: str  # its path, or its address
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, slots=True)
class Member:
    """A picture inside a shard: some of its bytes. `data.members` reads them."""

    shard: Shard
    name: str  # in the shard
    offset: int
    length: int
    crc32: int  # of these bytes

    @property
    def stem(self) -> str:
        """Its name without the extension, as of a path."""
        return self.name.rpartition(".")[0]

    def __fspath__(self) -> str:
        return f"{self.shard.place}/{self.name}"

    def __str__(self) -> str:
        return f"{self.shard.place}/{self.name}"


@dataclass(frozen=True, eq=False)
class Record:
    """One picture on disk and what is annotated in it; nothing decoded yet.

    `crowd`, `occluded` and `pose` may be left out: then no object is either, and no pose is known.
    """

    id: str  # the image file's stem, after its folders (`a/b`) where pictures lie in several
    image: Path | Member
    size: Size  # of the picture as it is shown, after EXIF orientation
    boxes: Float32  # (N, 4) pixels
    labels: Int64  # (N,)
    difficult: Bool  # (N,)
    truncated: Bool  # (N,)
    annotation: Path | None = None
    crowd: Bool = field(default_factory=_no_flags)  # (N,) a region of many objects, COCO's iscrowd
    occluded: Bool = field(default_factory=_no_flags)  # (N,)
    pose: Names = field(default_factory=_no_names)  # (N,) Left, Frontal, ...; "" where none is given

    def __post_init__(self) -> None:
        for name in ("crowd", "occluded", "pose"):
            if not len(values := getattr(self, name)) and len(self.labels):
                object.__setattr__(self, name, np.zeros(len(self.labels), values.dtype))

    def only(self, keep: Int64 | Bool) -> Record:
        """The same picture with the objects at `keep` alone."""
        names = ("boxes", "labels", "difficult", "truncated", "crowd", "occluded", "pose")
        return replace(self, **{name: getattr(self, name)[keep] for name in names})


Action = Literal["refused", "skipped image", "dropped box", "repaired", "noted"]


@dataclass(frozen=True)
class Fault:
    """One thing found wrong while reading data, and what was done about it.

    `wrong` tells a contradiction (corners the wrong way round, a word for a number, the size of another picture) from a
    loss (half a picture, a box without area): what can be lost costs a picture or a box, but nobody knows what a
    contradiction was to say, so that data with one is refused unless the user has it left out.
    """

    path: Path
    reason: str
    action: Action
    line: int | None = None  # of the XML or YAML, 1-based
    wrong: bool = field(default=False, kw_only=True)

    def __str__(self) -> str:
        where = f"{self.path}:{self.line}" if self.line else str(self.path)
        return f"{where}: {self.reason} ({self.action})"


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture as the network will see it, its boxes in the canvas's own pixels."""

    id: str
    image: UInt8  # (H, W, 3) RGB, the padded canvas
    size: Size  # of the picture inside the canvas, at the top left; the rest is padding
    boxes: Float32  # (N, 4) canvas pixels
    labels: Int64  # (N,)
    difficult: Bool  # (N,)
    seed: int = 0  # of what is random about this picture in the network


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples on one canvas, as tensors."""

    ids: tuple[str, ...]
    images: Tensor  # (B, 3, H, W) uint8
    sizes: tuple[Size, ...]  # B of (height, width), each picture inside its canvas
    boxes: tuple[Tensor, ...]  # B of (N, 4) float32
    labels: tuple[Tensor, ...]  # B of (N,) int64
    difficult: tuple[Tensor, ...]  # B of (N,) bool
    seeds: tuple[int, ...] = ()  # B, or none: then the network draws from PyTorch's global generator

    def parts(self, size: int) -> Iterator[Batch]:
        """The same pictures in batches of at most `size`."""
        for start in range(0, len(self), size):
            here = slice(start, start + size)
            yield Batch(
                self.ids[here],
                self.images[here],
                self.sizes[here],
                self.boxes[here],
                self.labels[here],
                self.difficult[here],
                self.seeds[here],
            )

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: Any) -> Batch:
        """The same batch with its tensors on `device`."""

        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t.to(device, non_blocking=True) for t in tensors)

        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            boxes=move(self.boxes),
            labels=move(self.labels),
            difficult=move(self.difficult),
        )


@dataclass(frozen=True, eq=False)
class Detections:
    """What a detector found in one picture, best first."""

    boxes: Float32 = field(default_factory=no_boxes)  # (N, 4) pixels
    scores: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))  # (N,)
    labels: Int64 = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,)

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, threshold: float) -> Detections:
        """Those with a score of at least `threshold`."""
        return self[self.scores >= threshold]

    def __getitem__(self, keep: Any) -> Detections:
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep])


@dataclass(frozen=True)
class Scores:
    """How good detections are by COCO's and VOC's rules: fractions 0 .. 1, NaN where there is nothing to find.

    `coco` has AP AP50 AP75 APsmall APmedium APlarge AR1 AR10 AR100 ARsmall ARmedium ARlarge. `voc` has 07@50 (11
    points) and area@50, area@75 (area under the curve), objects marked `difficult` ignored. `per_class` has AP, AP50
    and VOC's area@50 for each class name.
    """

    coco: dict[str, float]
    voc: dict[str, float]
    per_class: dict[str, dict[str, float]]
    images: int
    objects: int

    def summary(self) -> dict[str, float]:
        """The figures that a run is followed by: COCO's as map, map50, map75, ..., VOC's as voc07 and voc_area."""
        names = {
            "AP": "map",
            "AP50": "map50",
            "AP75": "map75",
            "APsmall": "map_small",
            "APmedium": "map_medium",
        }
        names |= {"APlarge": "map_large", "AR100": "ar100"}
        figures = {name: self.coco[key] for key, name in names.items()}
        return {**figures, "voc07": self.voc["07@50"], "voc_area": self.voc["area@50"]}

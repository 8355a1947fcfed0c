"""From a decoded picture and its record to the `Sample` that the network sees, and back to the picture's own pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np

from boxwright.types import Bool, Float32, Int64, Record, Sample, Size, UInt8

MULTIPLE = 32  # canvas sides: the coarsest stride of every pyramid here


@dataclass(frozen=True)
class Placement:
    """Where a picture lies on its canvas: resized to `content` at the top left, the rest padding."""

    picture: Size
    content: Size
    canvas: Size

    @property
    def scale(self) -> Float32:
        """Canvas pixels for one picture pixel, along x1 y1 x2 y2."""
        y, x = (c / p for c, p in zip(self.content, self.picture, strict=True))
        return np.array([x, y, x, y], np.float32)

    def to_canvas(self, boxes: Float32) -> Float32:
        return boxes * self.scale

    def to_picture(self, boxes: Float32) -> Float32:
        """Canvas boxes (N, 4) in the picture's own pixels, cut at its edges."""
        height, width = self.picture
        limits = np.array([width, height, width, height], np.float32)
        return np.clip(boxes / self.scale, 0, limits)


@dataclass(frozen=True)
class Fit:
    """The one owner of size: how any picture comes onto a canvas, in training, evaluation and prediction alike.

    `square` stretches to `imgsz` x `imgsz`; otherwise the longer side becomes `imgsz` and the aspect is kept. A canvas
    side is the next multiple of 32.
    """

    imgsz: int = 640
    square: bool = False

    def place(self, size: Size) -> Placement:
        """Where a picture of `size` goes."""
        ratio = self.imgsz / max(size)
        content = (self.imgsz, self.imgsz) if self.square else tuple(max(round(s * ratio), 1) for s in size)
        height, width = (-(-side // MULTIPLE) * MULTIPLE for side in content)
        return Placement(size, (content[0], content[1]), (height, width))

    def resize(self, image: UInt8) -> UInt8:
        """A picture (h, w, 3) at its content size, not padded yet."""
        height, width = self.place((image.shape[0], image.shape[1])).content
        if (height, width) == image.shape[:2]:
            return image
        shrinks = height * 2 <= image.shape[0] and width * 2 <= image.shape[1]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR  # linear looks at 2 x 2 pixels and would skip the others
        return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)


@dataclass(frozen=True, eq=False)
class Labelled:
    """A picture with its boxes on the way through the augmentations."""

    image: UInt8  # (H, W, 3)
    boxes: Float32  # (N, 4), pixels of `image`
    labels: Int64  # (N,)
    difficult: Bool  # (N,)

    def keep(self, index: Int64 | Bool, boxes: Float32) -> Labelled:
        """The objects at `index`, with new boxes for them."""
        return Labelled(self.image, boxes, self.labels[index], self.difficult[index])


Augmentation = Callable[[Labelled, np.random.Generator], Labelled]


def flip(picture: Labelled) -> Labelled:
    """The mirror image, left for right."""
    width = picture.image.shape[1]
    x1, y1, x2, y2 = picture.boxes.T
    boxes = np.stack([width - x2, y1, width - x1, y2], axis=1)
    return Labelled(np.ascontiguousarray(picture.image[:, ::-1]), boxes, picture.labels, picture.difficult)


def random_flip(probability: float) -> Augmentation:
    """Flips a share of the pictures."""
    return partial(_flip_share, probability)  # not a closure: reading workers may get it pickled


def _flip_share(probability: float, picture: Labelled, rng: np.random.Generator) -> Labelled:
    return flip(picture) if rng.random() < probability else picture


def make_sample(
    image: UInt8,
    record: Record,
    fit: Fit,
    augmentations: tuple[Augmentation, ...] = (),
    rng: np.random.Generator | None = None,
) -> Sample:
    """Resize, augment, pad. `rng` is needed where there are augmentations."""
    size = (image.shape[0], image.shape[1])
    placement = fit.place(size)
    picture = Labelled(fit.resize(image), placement.to_canvas(record.boxes), record.labels, record.difficult)
    for augment in augmentations:
        assert rng is not None
        picture = augment(picture, rng)
    return Sample(
        id=record.id,
        image=pad(picture.image, placement.canvas),
        size=(picture.image.shape[0], picture.image.shape[1]),
        boxes=picture.boxes,
        labels=picture.labels,
        difficult=picture.difficult,
    )


def pad(image: UInt8, canvas: Size) -> UInt8:
    """The picture (h, w, 3) at the top left of a black canvas (H, W, 3)."""
    if image.shape[:2] == canvas:
        return np.ascontiguousarray(image)
    padded = np.zeros((*canvas, 3), np.uint8)
    padded[: image.shape[0], : image.shape[1]] = image
    return padded

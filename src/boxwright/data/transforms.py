"""From a decoded picture and its record to the `Sample` that the network sees, and back to the picture's own pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np

from boxwright.data.images import Picture, decode_at, resized
from boxwright.types import Bool, Float32, Int64, Record, Sample, Size, UInt8, UserError

MULTIPLE = 32  # canvas sides: the coarsest stride of every pyramid here
# Share of its area that an object must show to be kept where something is cut off or covered. VOC's annotators leave
# out objects of which less than 10 to 20 % is visible (Annotation Guidelines 2011): what is left says too little.
VISIBLE = 0.2
SMALLEST = 1.0  # pixels a side: under it an object of a scaled or cut picture has no pixel of its own


@dataclass(frozen=True)
class Placement:
    """Where a picture lies on its canvas: a part of it resized to `content` at the top left, the rest padding."""

    picture: Size
    corner: tuple[int, int]  # (top, left) of the part, picture pixels
    part: Size  # of the part, picture pixels; `picture` where all of it is shown
    content: Size
    canvas: Size

    @property
    def scale(self) -> Float32:
        """Canvas pixels for one picture pixel, along x1 y1 x2 y2."""
        y, x = (c / p for c, p in zip(self.content, self.part, strict=True))
        return np.array([x, y, x, y], np.float32)

    @property
    def offset(self) -> Float32:
        """Where the part begins, along x1 y1 x2 y2."""
        top, left = self.corner
        return np.array([left, top, left, top], np.float32)

    def to_canvas(self, boxes: Float32) -> Float32:
        """A picture's boxes (N, 4) on the canvas; those of a part may reach out of it."""
        return (boxes - self.offset) * self.scale

    def to_picture(self, boxes: Float32) -> Float32:
        """Canvas boxes (N, 4) in the picture's own pixels, cut at its edges."""
        return np.clip(boxes / self.scale + self.offset, 0, limits(self.picture))

    def put(self, image: UInt8, record: Record) -> Labelled:
        """The part of a picture at its content size, not padded yet, with all of the record's boxes."""
        (top, left), (height, width) = self.corner, self.part
        return self.label(resized(image[top : top + height, left : left + width], self.content), record)

    def label(self, pixels: UInt8, record: Record) -> Labelled:
        """The part of a picture that is at its content size already, with all of the record's boxes."""
        assert pixels.shape[:2] == self.content
        return Labelled(pixels, self.to_canvas(record.boxes), record.labels, record.difficult | record.crowd)


@dataclass(frozen=True)
class Fit:
    """The one owner of size: how any picture comes onto a canvas, in training, evaluation and prediction alike.

    `square` stretches to `imgsz` x `imgsz`; otherwise the longer side becomes `imgsz` and the aspect is kept. A canvas
    side is the next multiple of 32. `decode_scaled` lets `decode_at` reduce large JPEGs while they are decoded.
    """

    imgsz: int = 640
    square: bool = False
    decode_scaled: bool = False

    @property
    def largest_canvas(self) -> Size:
        """That of a square picture; every other canvas lies within it."""
        return canvas_of((self.imgsz, self.imgsz))

    def place(self, size: Size) -> Placement:
        """Where a picture of `size` goes."""
        content = self.content(size)
        return Placement(size, (0, 0), size, content, canvas_of(content))

    def content(self, size: Size, scale: float = 1.0) -> Size:
        """What a picture of `size` is resized to, times `scale`."""
        ratio = self.imgsz / max(size)
        height, width = (self.imgsz, self.imgsz) if self.square else (side * ratio for side in size)
        return max(round(height * scale), 1), max(round(width * scale), 1)

    def read(self, source: Picture) -> tuple[UInt8, Size]:
        """A picture (h, w, 3) from its file, at its content size, not padded yet, and its own size."""
        return decode_at(source, self.content, scaled=self.decode_scaled)

    def resize(self, image: UInt8) -> UInt8:
        """A picture (h, w, 3) at its content size, not padded yet."""
        return resized(image, self.content((image.shape[0], image.shape[1])))


def canvas_of(content: Size) -> Size:
    """The smallest canvas for a picture of that size."""
    height, width = (-(-side // MULTIPLE) * MULTIPLE for side in content)
    return height, width


def limits(size: Size) -> Float32:
    """The largest x1 y1 x2 y2 in a picture of `size`."""
    height, width = size
    return np.array([width, height, width, height], np.float32)


def random_part(size: Size, content: Size, window: Size, canvas: Size, rng: np.random.Generator) -> Placement:
    """A picture of `size` at the scale of `content`, a random part of it where that is larger than `window`.

    The part is whole pixels of the picture, cut before it is resized: a pixel is resampled once, and no more are
    than are seen. So the scale may differ from that of `content` by half a pixel on the part's side.
    """
    shown = [p if c <= w else max(round(p * w / c), 1) for p, c, w in zip(size, content, window, strict=True)]
    top, left = (int(rng.integers(p - s + 1)) for p, s in zip(size, shown, strict=True))
    height, width = (min(c, w) for c, w in zip(content, window, strict=True))
    return Placement(size, (top, left), (shown[0], shown[1]), (height, width), canvas)


def jittered(fit: Fit, size: Size, scales: Scales, rng: np.random.Generator) -> Placement:
    """Large-scale jitter: the Fit times a random factor, then a random part or padding on the Fit's largest canvas.

    Uniform in the factor, as in Ghiasi et al. 2021, "Simple Copy-Paste", whose large jitter is 0.1 to 2, and ViTDet.
    """
    content = fit.content(size, rng.uniform(*scales))
    return random_part(size, content, (fit.imgsz, fit.imgsz), fit.largest_canvas, rng)


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

    def moved(self, top: int, left: int) -> Labelled:
        """The objects further down and to the right by so many pixels."""
        return replace(self, boxes=self.boxes + np.array([left, top, left, top], np.float32))


def cut(picture: Labelled) -> Labelled:
    """The objects cut at the picture's edges, without those of which too little is left."""
    boxes = np.clip(picture.boxes, 0, limits((picture.image.shape[0], picture.image.shape[1])))
    kept = (areas(boxes) >= VISIBLE * areas(picture.boxes)) & is_seen(boxes)
    return picture.keep(kept, boxes[kept])


def areas(boxes: Float32) -> Float32:
    """Of boxes (N, 4): (N,), square pixels."""
    return np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)


def is_seen(boxes: Float32) -> Bool:
    """Which boxes (N, 4) are at least `SMALLEST` wide and high."""
    return np.asarray((boxes[:, 2:] - boxes[:, :2] >= SMALLEST).all(axis=1))


Scales = tuple[float, float]  # smallest and largest
Augmentation = Callable[[Labelled, np.random.Generator], Labelled]


def flip(picture: Labelled) -> Labelled:
    """The mirror image, left for right."""
    width = picture.image.shape[1]
    x1, y1, x2, y2 = picture.boxes.T
    boxes = np.stack([width - x2, y1, width - x1, y2], axis=1)
    image = np.asarray(cv2.flip(picture.image, 1), np.uint8)  # many times faster than copying a reversed view
    return Labelled(image, boxes, picture.labels, picture.difficult)


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
    placement = fit.place((image.shape[0], image.shape[1]))
    return finish(placement.put(image, record), record, augmentations, rng)


def finish(
    picture: Labelled,
    record: Record,
    augmentations: tuple[Augmentation, ...] = (),
    rng: np.random.Generator | None = None,
    *,
    canvas: Size = (0, 0),
) -> Sample:
    """Augment what has been placed and pad it to `canvas`, or to a larger one where it needs that.

    An augmentation's `UserError` comes out with the name of the record's picture.
    """
    for augment in augmentations:
        assert rng is not None
        try:
            picture = augment(picture, rng)
        except UserError as error:
            raise UserError(f"{error} (at the picture {record.image})") from error
    size = (picture.image.shape[0], picture.image.shape[1])
    height, width = (max(sides) for sides in zip(canvas, canvas_of(size), strict=True))
    return Sample(
        id=record.id,
        image=pad(picture.image, (height, width)),
        size=size,
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

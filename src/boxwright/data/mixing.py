"""Several pictures made into one training picture: mosaic, pasted objects, mixup; between decoding and augmenting."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from boxwright.data.transforms import (
    VISIBLE,
    Fit,
    Labelled,
    Placement,
    Scales,
    areas,
    cut,
    is_seen,
    jittered,
    pad,
    random_part,
)
from boxwright.types import Float32, Record, Size, UInt8

Source = tuple[UInt8, Record]  # a decoded picture and what is annotated in it
Owners = NDArray[np.int8]  # (H, W) the layer that each pixel is of

TILE_SCALES: Scales = (0.5, 1.0)  # relative to the Fit: at 0.5 a picture just fills its quarter
MOST_PASTED = 5  # objects
PASTE_TRIES = 10  # places, of which the one that covers least is taken


@dataclass(frozen=True)
class Mixing:
    """Which share of the training samples is mixed in each way, each drawn by itself."""

    mosaic: float = 0.0  # 0 .. 1, as the others
    mixup: float = 0.0
    copy_paste: float = 0.0
    until_epoch: int = sys.maxsize  # 0-based: from this one on nothing is mixed

    def in_epoch(self, epoch: int) -> Mixing:
        """What is mixed then; `UNMIXED` itself where nothing is."""
        asked = self.mosaic or self.mixup or self.copy_paste
        return self if asked and epoch < self.until_epoch else UNMIXED


UNMIXED = Mixing()


def place_mixed(
    first: Source,
    another: Callable[[], Source],
    fit: Fit,
    mixing: Mixing,
    scales: Scales | None,
    rng: np.random.Generator,
) -> Labelled:
    """A picture resized and, by chance, mixed with others; `scales` jitters all but a mosaic, which has its own.

    Draws from `rng` for what is asked for alone: without jitter and mixing it is the Fit and nothing else.
    """

    def place(source: Source) -> Labelled:
        size = _size(source[0])
        return cut(jittered(fit, size, scales, rng).put(*source)) if scales else fit.place(size).put(*source)

    if mixing.mosaic and rng.random() < mixing.mosaic:
        picture = mosaic([first, another(), another(), another()], fit, rng)
    else:
        picture = place(first)
    if mixing.copy_paste and rng.random() < mixing.copy_paste:
        picture = paste(picture, place(another()), rng)
    if mixing.mixup and rng.random() < mixing.mixup:
        picture = blend(picture, place(another()), rng)
    return picture


def mosaic(sources: Sequence[Source], fit: Fit, rng: np.random.Generator) -> Labelled:
    """Four pictures around a random centre, `imgsz` x `imgsz`; each fills its tile, so that none shows padding.

    After Bochkovskiy et al. 2020, "YOLOv4", where padding between the pictures is grey.
    """
    side = fit.imgsz
    row, column = (int(at) for at in rng.integers(side // 4, side - side // 4 + 1, 2))
    image = np.empty((side, side, 3), np.uint8)
    tiles: list[Labelled] = []
    corners = ((0, 0, row, column), (0, column, row, side), (row, 0, side, column), (row, column, side, side))
    for source, (top, left, bottom, right) in zip(sources, corners, strict=True):
        tile = cut(_tile(_size(source[0]), fit, (bottom - top, right - left), rng).put(*source))
        image[top:bottom, left:right] = tile.image
        tiles.append(tile.moved(top, left))
    return _joined(image, tiles)


def _tile(size: Size, fit: Fit, window: Size, rng: np.random.Generator) -> Placement:
    cover = max(w / c for w, c in zip(window, fit.content(size), strict=True))
    content = fit.content(size, max(rng.uniform(*TILE_SCALES), cover))
    height, width = (max(sides) for sides in zip(content, window, strict=True))  # rounding must leave no gap
    return random_part(size, (height, width), window, window, rng)


def blend(first: Labelled, second: Labelled, rng: np.random.Generator) -> Labelled:
    """Mixup: both pictures at about half strength, with the objects of both.

    After Zhang et al. 2019, "Bag of Freebies for Training Object Detection Neural Networks": the aspects stay, the
    smaller picture is padded. Beta(32, 32), YOLOv5's, nearly always keeps both between 0.3 and 0.7: all can be seen.
    """
    weight = float(rng.beta(32, 32))
    height, width = (max(sides) for sides in zip(_size(first.image), _size(second.image), strict=True))
    pictures = [pad(picture.image, (height, width)) for picture in (first, second)]
    image = np.asarray(cv2.addWeighted(pictures[0], weight, pictures[1], 1 - weight, 0), np.uint8)
    return _joined(image, [first, second])


def paste(picture: Labelled, other: Labelled, rng: np.random.Generator) -> Labelled:
    """Rectangles around objects of another picture, put where they cover little of those that are there.

    Copy-paste for boxes, after Dwibedi et al. 2017, "Cut, Paste and Learn". Objects that are covered keep the box of
    what still shows, or go where that is too little. `difficult` objects are not chosen, but may come along.
    """
    image = picture.image.copy()
    owner: Owners = np.zeros(image.shape[:2], np.int8)
    layers = [picture]
    candidates = np.flatnonzero(~other.difficult & is_seen(other.boxes))
    for index in rng.permutation(candidates)[: rng.integers(1, MOST_PASTED + 1)]:
        piece = _piece(other, other.boxes[index])
        height, width = piece.image.shape[:2]
        if height > image.shape[0] or width > image.shape[1]:
            continue
        there = np.concatenate([layer.boxes for layer in layers])  # (N, 4)
        top, left = _free_place(there, (height, width), _size(image), rng)
        image[top : top + height, left : left + width] = piece.image
        owner[top : top + height, left : left + width] = len(layers)
        layers.append(piece.moved(top, left))
    if len(layers) == 1:
        return picture
    return _joined(image, [_uncovered(layer, owner, number) for number, layer in enumerate(layers)])


def _piece(picture: Labelled, box: Float32) -> Labelled:
    """The rectangle of whole pixels around a box, with all objects that show in it."""
    left, top, right, bottom = _pixels(box, _size(picture.image))
    return cut(replace(picture.moved(-top, -left), image=picture.image[top:bottom, left:right]))


def _pixels(box: Float32, size: Size) -> tuple[int, int, int, int]:
    """x1 y1 x2 y2 of the whole pixels that a box touches."""
    height, width = size
    x1, y1 = np.floor(box[:2]).astype(int).tolist()
    x2, y2 = np.ceil(box[2:]).astype(int).tolist()
    return max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)


def _free_place(boxes: Float32, size: Size, canvas: Size, rng: np.random.Generator) -> tuple[int, int]:
    """(top, left) at which a rectangle of `size` covers the smallest sum of shares of boxes (N, 4), of a few tried."""
    tops, lefts = (rng.integers(c - s + 1, size=PASTE_TRIES) for c, s in zip(canvas, size, strict=True))  # (T,)
    corner = np.stack([lefts, tops], axis=1)[:, None]  # (T, 1, 2)
    common = np.minimum(boxes[:, 2:], corner + size[::-1]) - np.maximum(boxes[:, :2], corner)  # (T, N, 2)
    covered = np.prod(np.maximum(common, 0), axis=2) / np.maximum(areas(boxes), 1)  # (T, N)
    best = int(covered.sum(axis=1).argmin())
    return int(tops[best]), int(lefts[best])


def _uncovered(picture: Labelled, owner: Owners, number: int) -> Labelled:
    """The objects at the bounds of those of their pixels that are layer `number`'s, without what shows too little."""
    boxes = picture.boxes.copy()
    kept = is_seen(boxes)
    for index in np.flatnonzero(kept):
        box = picture.boxes[index]
        left, top, right, bottom = _pixels(box, (owner.shape[0], owner.shape[1]))
        seen = owner[top:bottom, left:right] == number  # (h, w)
        if seen.mean() < VISIBLE:
            kept[index] = False
            continue
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        boxes[index, :2] = np.maximum(box[:2], (left + columns[0], top + rows[0]))
        boxes[index, 2:] = np.minimum(box[2:], (left + columns[-1] + 1, top + rows[-1] + 1))
    kept &= is_seen(boxes)
    return picture.keep(kept, boxes[kept])


def _size(image: UInt8) -> Size:
    return image.shape[0], image.shape[1]


def _joined(image: UInt8, parts: Sequence[Labelled]) -> Labelled:
    """One picture with the objects of all."""
    boxes, labels, difficult = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes", "labels", "difficult")
    )
    return Labelled(image, boxes, labels, difficult)

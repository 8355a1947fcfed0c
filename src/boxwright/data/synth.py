"""Draws the embedded dataset, pictures of shapes and their VOC XML: the flow's source where there is no data.

    folder/                              as the article's final_xml_dataset
    ├── data.yaml                        the article's keys; paths relative to this file
    ├── train/images/train_00000.jpg     train/labels/train_00000.xml
    └── valid/images/valid_00000.jpg     valid/labels/valid_00000.xml

Randomness is counted: each picture, and in it each object, has a generator of its own. So picture `i` is the
same however many are drawn, and asked for one object fewer it is the same picture without its last object.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import yaml

from boxwright.registry import nearest
from boxwright.types import Bool, Float32, Int64, Size, UInt8, UserError

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")
Range = tuple[float, float]  # least and most
Contour = Float32  # (P, 2) x y, y pointing down, in the shape's own units

VISIBLE = 0.2  # a pixel belongs to an object that makes up at least this share of it
HARD = 0.5  # an object is difficult when less than this share of its area is seen
FAR = 60.0  # CIE76: two colours that nobody mixes up
SMALLEST = 32  # pixels: a picture's shortest permitted side
LARGEST = 4096  # likewise: a picture is drawn in memory, several times over
CROWD = 200  # objects in a picture
TINIEST = 4  # pixels: an object's; below that a thin shape has no pixel to show
SUPERSAMPLE = 4  # each way; 16 levels of coverage are enough for a clean edge
JPEG_QUALITY = 92


# ---------------------------------------------------------------------------------------------------- shapes


def _points(*xy: tuple[float, float]) -> Contour:
    return np.array(xy, np.float32)


def _arc(x: float, y: float, radius: float, start: float = 0, stop: float = 360) -> Contour:
    """Points on a circle from `start` to `stop`, degrees clockwise from three o'clock."""
    angle = np.radians(np.linspace(start, stop, 64))
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1).astype(np.float32)


def _polar(radius: Callable[[np.ndarray], np.ndarray], points: int) -> Contour:
    """A closed curve around the origin that starts at twelve o'clock."""
    turn = np.arange(points) / points * 2 * np.pi
    sides = [np.sin(turn), -np.cos(turn)]
    return (np.stack(sides, axis=1) * radius(turn)[:, None]).astype(np.float32)


def _mirrored(*right: tuple[float, float]) -> Contour:
    """The right half of an outline, top to bottom, and its reflection."""
    return _points(*right, *((-x, y) for x, y in reversed(right)))


def _heart() -> Contour:
    turn = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = 16 * np.sin(turn) ** 3
    y = -13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn)
    return np.stack([x, y], axis=1).astype(np.float32)


# Filled by the even-odd rule, so a contour inside another is a hole.
_SHAPES: dict[str, list[Contour]] = {
    "circle": [_arc(0, 0, 1)],
    "ring": [_arc(0, 0, 1), _arc(0, 0, 0.55)],
    "triangle": [_points((0, -1), (1, 0.75), (-1, 0.75))],
    "square": [_points((-1, -1), (1, -1), (1, 1), (-1, 1))],
    "diamond": [_points((0, -1), (0.6, 0), (0, 1), (-0.6, 0))],
    "star": [_polar(lambda turn: np.where(np.arange(len(turn)) % 2, 0.42, 1.0), 10)],
    "cross": [
        _mirrored((0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32), (0.32, 1)),
    ],
    "arrow": [
        _points((-1, -0.26), (0.05, -0.26), (0.05, -0.8), (1, 0), (0.05, 0.8), (0.05, 0.26), (-1, 0.26)),
    ],
    "heart": [_heart()],
    # Two circles that meet at 58.2 degrees of the outer and 88.2 of the inner one.
    "crescent": [np.concatenate([_arc(0, 0, 1, 58.2, 301.8), _arc(0.5, 0, 0.85, 271.8, 88.2)])],
    "crown": [_mirrored((0, -0.8), (0.45, 0), (1, -0.6), (0.85, 0.7))],
    "pie": [np.concatenate([_points((0, 0)), _arc(0, 0, 1, 40, 320)])],
    "drop": [np.concatenate([_points((0, -1)), _arc(0, 0.35, 0.65, -28.8, 208.8)])],
    "flower": [_polar(lambda turn: 0.55 + 0.45 * np.abs(np.cos(2.5 * turn)), 120), _arc(0, 0, 0.24)],
    "chevron": [_points((-0.75, -1), (0, -1), (0.75, 0), (0, 1), (-0.75, 1), (0, 0))],
    "hourglass": [_mirrored((0.8, -1), (0.12, 0), (0.8, 1))],
    "bolt": [
        _points((0.5, -1), (-0.6, 0.15), (-0.08, 0.15), (-0.35, 1), (0.65, -0.3), (0.1, -0.3)),
    ],
    "house": [
        _mirrored((0, -1), (1, -0.1), (0.75, -0.1), (0.75, 0.9), (0.22, 0.9), (0.22, 0.3)),
    ],
    "tree": [
        _mirrored(
            *((0, -1), (0.48, -0.35), (0.24, -0.35), (0.64, 0.12)),
            *((0.34, 0.12), (0.8, 0.65), (0.16, 0.65), (0.16, 1)),
        )
    ],
    "fish": [
        np.concatenate(
            [_arc(0, 0, 1, -155, 155) * (0.85, 0.58) + (0.15, 0), _points((-1, 0.55), (-0.8, 0), (-1, -0.55))]
        ).astype(np.float32),
        _arc(0.58, -0.16, 0.1),
    ],
}

CLASSES: tuple[str, ...] = tuple(_SHAPES)


def _outline(rng: np.random.Generator, name: str, side: float) -> list[Contour]:
    """The shape a little turned and stretched, perhaps mirrored; its longer side is `side` pixels."""
    turn = np.radians(rng.uniform(-20, 20))
    stretch = rng.uniform(0.94, 1.06)
    mirror = rng.choice([-1.0, 1.0])
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    contours = [contour * (stretch * mirror, 1 / stretch) @ rotation for contour in _SHAPES[name]]
    corner, extent = contours[0].min(axis=0), np.ptp(contours[0], axis=0).max()
    return [((contour - corner) * (side / extent)).astype(np.float32) for contour in contours]


def _cover(contours: list[Contour]) -> Float32:
    """The share of each pixel that the shape covers, (h, w) 0 .. 1, cut to its bounds; 0 below `VISIBLE`."""
    width, height = (int(v) + 2 for v in contours[0].max(axis=0))
    mask = np.zeros((height * SUPERSAMPLE, width * SUPERSAMPLE), np.uint8)
    fixed = [np.round(contour * SUPERSAMPLE * 16).astype(np.int32) for contour in contours]
    cv2.fillPoly(mask, fixed, 255, shift=4)
    shares = cv2.resize(mask, (width, height), interpolation=cv2.INTER_AREA)
    cover = shares.astype(np.float32) / 255
    x1, y1, x2, y2 = _bounds(cover >= VISIBLE)
    return np.where(cover < VISIBLE, np.float32(0), cover)[y1:y2, x1:x2]


def _bounds(mask: Bool) -> tuple[int, int, int, int]:
    """The tight box around a mask's true pixels, continuous edges."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# -------------------------------------------------------------------------------------- colours and textures


def _colours(rng: np.random.Generator, count: int, hue: Range, saturation: Range, value: Range) -> Float32:
    """Random colours, (count, 3) RGB 0 .. 255; hue wraps at 1."""
    hsv = [rng.uniform(*hue, count) % 1 * 360, rng.uniform(*saturation, count), rng.uniform(*value, count)]
    return cv2.cvtColor(np.stack(hsv, axis=1)[None].astype(np.float32), cv2.COLOR_HSV2RGB)[0] * 255


def _lab(colours: Float32) -> Float32:
    return cv2.cvtColor(colours.reshape(1, -1, 3) / 255, cv2.COLOR_RGB2Lab)[0]


def _palette(rng: np.random.Generator, ground: UInt8) -> Float32:
    """Two colours that stand out from `ground` (h, w, 3), (2, 3) RGB.

    Of some random ones the first two that are far enough from it in CIE Lab, or else the furthest: always the
    furthest would be mostly the greens and violets at the gamut's corners.
    """
    found = _colours(rng, 12, (0, 1), (0.4, 1), (0.35, 1))
    behind = _lab(cv2.resize(ground, (4, 4), interpolation=cv2.INTER_AREA).astype(np.float32))

    def standing_out(colours: Float32) -> Float32:
        gap = np.linalg.norm(_lab(colours)[:, None] - behind, axis=2).min(axis=1)
        return colours[np.argsort(-np.minimum(gap, FAR), kind="stable")]

    first, second = standing_out(found)[:2]
    if rng.random() < 0.6:  # rather a tint or a shade of the first, if it stands out as well
        ends = np.array([[0.0], [255.0]], np.float32)
        shades = first + (ends - first) * np.float32(rng.uniform(0.3, 0.5))
        second = standing_out(np.stack([*shades, second]))[0]
    return np.stack([first, second])


def _noise(rng: np.random.Generator, size: Size, cells: tuple[int, int]) -> Float32:
    """Smooth noise around nought, (H, W)."""
    coarse = rng.uniform(-1, 1, cells).astype(np.float32)
    return np.asarray(cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC), np.float32)


def _texture(rng: np.random.Generator, size: Size) -> Float32:
    """How much of the second colour each pixel has, (h, w) 0 .. 1."""
    height, width = size
    turn, side = rng.uniform(0, np.pi), max(size)
    y, x = np.mgrid[:height, :width].astype(np.float32) / side
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    repeats = 2 * np.pi * rng.uniform(2, min(5, 2 + side / 16))  # a period is at least about six pixels
    sharp = side / 12
    match rng.choice(["solid", "gradient", "stripes", "dots", "checks", "noise"]):
        case "gradient":
            mix = (u - u.min()) / max(float(np.ptp(u)), 1e-6)
        case "stripes":
            mix = 0.5 + sharp * np.sin(u * repeats)
        case "dots":
            mix = 0.5 + sharp * (np.cos(u * repeats) + np.cos(v * repeats) - 0.7)
        case "checks":
            mix = 0.5 + sharp * np.sin(u * repeats) * np.sin(v * repeats)
        case "noise":
            mix = 0.5 + 0.8 * _noise(rng, size, (6, 6))
        case _:
            mix = np.zeros(size)
    return np.clip(mix, 0, 1).astype(np.float32)


def _paint(rng: np.random.Generator, cover: Float32, ground: UInt8) -> Float32:
    """The object's colours, (h, w, 3) RGB 0 .. 255: a texture lit from above, half the time with a rim."""
    first, second = _palette(rng, ground)
    mix = _texture(rng, cover.shape)[..., None]
    paint = first + (second - first) * mix
    if rng.random() < 0.5:
        thick = max(1, round(max(cover.shape) * 0.04))
        core = cv2.erode(np.pad(cover, 1), np.ones((3, 3), np.uint8), iterations=thick)[1:-1, 1:-1, None]
        paint = paint * core + first * rng.choice([0.35, 1.0]) * (1 - core)
    light = np.linspace(1.1, 0.88, len(cover), dtype=np.float32)[:, None, None]
    return np.clip(paint * light, 0, 255)


# ----------------------------------------------------------------------------------------------- backgrounds


def _background(rng: np.random.Generator, size: Size) -> UInt8:
    """A busy but muted picture, (H, W, 3): fields of related colours, cloudy noise, lines and blobs, blur."""
    hue, value = rng.uniform(), rng.uniform(0.3, 0.85)
    tones = _colours(rng, 8, (hue - 0.15, hue + 0.15), (0.08, 0.45), (value - 0.18, value + 0.18))
    cells = rng.choice(tones, (int(rng.integers(2, 5)), int(rng.integers(2, 6))))  # (rows, columns, 3)
    ground = cv2.resize(cells, size[::-1], interpolation=cv2.INTER_CUBIC)
    ground += _noise(rng, size, (12, 16))[..., None] * rng.uniform(4, 14)
    canvas = np.clip(ground, 0, 255).astype(np.uint8)
    clutter = canvas.copy()
    for tone in rng.choice(tones, int(rng.integers(10, 28))):
        _mark(rng, clutter, tone)
    canvas = cv2.addWeighted(clutter, share := rng.uniform(0.35, 0.75), canvas, 1 - share, 0)
    return np.asarray(cv2.GaussianBlur(canvas, (0, 0), min(size) / 240 * rng.uniform(0.3, 1.8)), np.uint8)


def _mark(rng: np.random.Generator, canvas: UInt8, tone: Float32) -> None:
    """One line, arc or irregular blob on `canvas`."""
    height, width = canvas.shape[:2]
    short, colour = min(height, width), tone.tolist()
    centre = rng.uniform(0, 1, 2) * (width, height)
    thick = max(1, int(short * rng.uniform(0.004, 0.02)))
    match rng.choice(["line", "arc", "blob"]):
        case "line":
            end = centre + rng.normal(0, 0.5, 2) * short
            cv2.line(canvas, _pixel(centre), _pixel(end), colour, thick, cv2.LINE_AA)
        case "arc":
            axes, start = _pixel(short * rng.uniform(0.1, 0.5, 2)), rng.uniform(0, 360)
            span = rng.uniform(40, 150)
            cv2.ellipse(canvas, _pixel(centre), axes, start, 0, span, colour, thick, cv2.LINE_AA)
        case _:
            radii = short * rng.uniform(0.03, 0.2) * rng.uniform(0.4, 1.2, 9)
            blob = centre + _polar(lambda _: radii, 9)
            cv2.fillPoly(canvas, [blob.round().astype(np.int32)], colour, cv2.LINE_AA)


def _pixel(point: np.ndarray) -> tuple[int, int]:
    return int(point[0]), int(point[1])


def _grain(rng: np.random.Generator, size: Size) -> np.ndarray:
    """A sensor's noise, (H, W, 1) int16."""
    strength = rng.uniform(1, 4)
    return (rng.standard_normal((*size, 1), np.float32) * strength).astype(np.int16)


def _developed(canvas: UInt8, grain: np.ndarray) -> UInt8:
    return np.clip(canvas + grain, 0, 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True, eq=False)
class Scene:
    """One drawn picture and what is in it.

    A box is tight around what can be *seen* of its object, as VOC's are: the pixels of which the object makes
    up at least `VISIBLE`, inside the picture and not covered by later objects. Its edges are whole pixels.
    """

    image: UInt8  # (H, W, 3) RGB
    boxes: Float32  # (N, 4) pixels
    labels: Int64  # (N,) places in the `classes` it was drawn with
    difficult: Bool  # (N,) less than `HARD` of the object is seen
    truncated: Bool  # (N,) cut by the picture's border


@dataclass(frozen=True, eq=False)
class _Object:
    label: int
    area: float  # of the whole shape, pixels
    seen: Float32  # (H, W) the share of each pixel that shows it
    truncated: bool

    def share(self, later: Float32 | float = 0.0) -> float:
        """How much of the whole shape is seen, 0 .. 1, once `later` (H, W) covers it."""
        return float((self.seen * (1 - later)).sum() / self.area)


def draw_scene(
    seed: int,
    index: int,
    *,
    split: Split = "train",
    size: Size = (240, 320),
    classes: Sequence[str] = CLASSES,
    objects: tuple[int, int] = (1, 5),
    scale: Range = (0.15, 0.5),
) -> Scene:
    """Picture `index` of a split: a pure function of its arguments.

    `objects` is the least and the most to draw (fewer where no room is left), `scale` the range of the longer
    side of an object as a fraction of the picture's shorter one. Raises `UserError` for a value out of range
    or an unknown class.
    """
    _check_drawing(seed, size, classes, objects, scale)
    stream = _Stream(seed, split, index)
    canvas = _background(stream.rng(0), size)
    count = int(stream.rng(1).integers(objects[0], objects[1] + 1))
    drawn: list[_Object] = []
    for order in range(count):
        drawn = _add_object(stream.rng(3 + order), canvas, drawn, classes, scale)
    return Scene(
        image=_developed(canvas, _grain(stream.rng(2), size)),
        boxes=np.array([_bounds(thing.seen >= VISIBLE) for thing in drawn], np.float32).reshape(-1, 4),
        labels=np.array([thing.label for thing in drawn], np.int64),
        difficult=np.array([thing.share() < HARD for thing in drawn], np.bool_),
        truncated=np.array([thing.truncated for thing in drawn], np.bool_),
    )


@dataclass(frozen=True)
class _Stream:
    """Where the randomness of one picture comes from; all keys are of one length, as numpy pads with 0."""

    seed: int
    split: Split | Literal["clip"]
    index: int

    def rng(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, (*SPLITS, "clip").index(self.split), self.index, part])


def _add_object(
    rng: np.random.Generator,
    canvas: UInt8,
    drawn: list[_Object],
    classes: Sequence[str],
    scale: Range,
) -> list[_Object]:
    """Paint one more object on `canvas`, and return all objects as they are seen now."""
    height, width = canvas.shape[:2]
    label = int(rng.integers(len(classes)))
    cover = _cover(_outline(rng, classes[label], rng.uniform(*scale) * min(height, width)))
    crowded = rng.random() < 0.2  # may hide much of an earlier object; else nearly nothing
    least = 0.25 if crowded else 0.8
    for _ in range(30):
        top, left = _place(rng, cover.shape, (height, width), drawn if crowded else [])
        there, part = _window(top, left, cover.shape, (height, width))
        seen = np.zeros((height, width), np.float32)
        seen[there] = cover[part]
        thing = _Object(label, float(cover.sum()), seen, truncated=cover[part].shape != cover.shape)
        if thing.share() >= 0.6 and all(other.share(seen) >= min(least, other.share()) for other in drawn):
            break
    else:
        return drawn
    paint = _paint(rng, cover, canvas[there])[part]
    canvas[there] = np.round(canvas[there] + (paint - canvas[there]) * cover[part][..., None])
    return [*(replace(other, seen=other.seen * (1 - seen)) for other in drawn), thing]


def _place(rng: np.random.Generator, patch: Size, size: Size, near: Sequence[_Object]) -> tuple[int, int]:
    """A (top, left) for a patch: by one of `near`, or inside the picture, or now and then over its border."""
    room = np.subtract(size, patch)
    if near:
        x1, y1, x2, y2 = _bounds(near[int(rng.integers(len(near)))].seen >= VISIBLE)
        corner = np.array([y1 + y2, x1 + x2]) / 2 - np.divide(patch, 2)
        corner += rng.choice([-1, 1], 2) * rng.uniform(0.15, 0.5, 2) * patch
        corner = np.clip(corner, np.minimum(0, room), np.maximum(0, room))
    else:
        corner = rng.uniform(np.minimum(0, room), np.maximum(0, room) + 1)
        if rng.random() < 0.15:
            axis, beyond = int(rng.integers(2)), rng.uniform(0.1, 0.35)
            corner[axis] = rng.choice([-beyond * patch[axis], room[axis] + beyond * patch[axis]])
    return int(np.floor(corner[0])), int(np.floor(corner[1]))


def _window(top: int, left: int, patch: Size, size: Size) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a patch put at (top, left) lies on a canvas of `size`, and which part of the patch that is."""
    y1, x1 = max(top, 0), max(left, 0)
    y2, x2 = min(top + patch[0], size[0]), min(left + patch[1], size[1])
    there = slice(y1, y2), slice(x1, x2)
    return there, (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))


# ------------------------------------------------------------------------------------------- moving pictures


@dataclass(frozen=True, eq=False)
class _Mover:
    """A drawn shape and its way over the canvas: straight, thrown back by the border, swaying a little."""

    cover: Float32  # (h, w)
    paint: Float32  # (h, w, 3)
    start: Float32  # (2,) x y, pixels
    speed: Float32  # (2,) pixels a frame
    sway: float  # degrees
    period: float  # frames

    def over(self, canvas: UInt8, frame: int) -> UInt8:
        """The canvas with the object where it is in `frame`."""
        height, width = canvas.shape[:2]
        middle = np.array(self.cover.shape[::-1]) / 2
        centre = _bounce(self.start + frame * self.speed, middle, (width, height) - middle)
        turn = self.sway * np.sin(2 * np.pi * frame / self.period)
        matrix = cv2.getRotationMatrix2D(middle.tolist(), turn, 1.0)
        matrix[:, 2] += centre - middle
        cover = cv2.warpAffine(self.cover, matrix, (width, height))[..., None]
        paint = cv2.warpAffine(self.paint, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
        return np.round(canvas + (paint - canvas) * cover).astype(np.uint8)


def _bounce(place: np.ndarray, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """A straight way folded back into `least` .. `most`."""
    span = np.maximum(most - least, 1e-6)
    return least + span - np.abs((place - least) % (2 * span) - span)


def draw_clip(
    seed: int,
    *,
    frames: int = 48,
    size: Size = (240, 320),
    classes: Sequence[str] = CLASSES,
    objects: int = 3,
    scale: Range = (0.25, 0.42),
) -> Iterator[UInt8]:
    """Frames of a short film, each (H, W, 3) RGB: shapes that drift and bounce over a still background.

    Raises `UserError`, before the first frame, for a value out of range or an unknown class.
    """
    _check_drawing(seed, size, classes, (objects, objects), scale)
    _check(frames >= 1, f"frames must be at least 1, not {frames}")
    stream = _Stream(seed, "clip", 0)
    ground, grain = _background(stream.rng(0), size), _grain(stream.rng(2), size)
    names = stream.rng(1).permutation(np.resize(np.array(classes), max(objects, len(classes))))[:objects]
    movers = [_mover(stream.rng(3 + order), ground, str(name), scale) for order, name in enumerate(names)]

    def draw(frame: int) -> UInt8:
        canvas = ground
        for mover in movers:
            canvas = mover.over(canvas, frame)
        return _developed(canvas, grain)

    return map(draw, range(frames))


def _mover(rng: np.random.Generator, ground: UInt8, name: str, scale: Range) -> _Mover:
    height, width = ground.shape[:2]
    short, heading = min(height, width), rng.uniform(0, 2 * np.pi)
    cover = _cover(_outline(rng, name, rng.uniform(*scale) * short))
    cover = np.pad(cover, 2)  # so that a warped edge stays soft
    return _Mover(
        cover=cover,
        paint=_paint(rng, cover, ground),
        start=(rng.uniform(0, 1, 2) * (width, height)).astype(np.float32),
        speed=(short * rng.uniform(0.012, 0.025) * np.array([np.cos(heading), np.sin(heading)])).astype(np.float32),
        sway=rng.uniform(4, 15),
        period=rng.uniform(30, 60),
    )


# --------------------------------------------------------------------------------------------------- writing


def synthesize(
    folder: Path,
    *,
    train: int = 200,
    valid: int = 50,
    size: Size = (240, 320),
    classes: Sequence[str] = CLASSES,
    seed: int = 0,
    objects: tuple[int, int] = (1, 5),
    scale: Range = (0.15, 0.5),
    negatives: float = 0.02,
    jitter: float = 0.0,
) -> Path:
    """Draw a data set into `folder` (the tree at the top of this file) and return its data.yaml.

    `negatives` is the fraction of pictures without objects; `jitter` changes each side of each picture by up
    to that fraction. The folder appears complete or not at all. Raises `UserError` for a value out of range,
    an unknown class, a folder that already holds something, and a disk that refuses.
    """
    _check_drawing(seed, size, classes, objects, scale)
    _check(train >= 1 and valid >= 1, f"train and valid must be at least 1 picture each, not {train} and {valid}")
    _check(0 <= negatives <= 1, f"negatives must be a fraction 0 .. 1, not {negatives}")
    _check(0 <= jitter < 1, f"jitter must be a fraction 0 .. 1 (1 not included), not {jitter}")
    partial = folder.absolute().with_name(f".{folder.absolute().name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        _check_is_free(folder)
        for split, count in zip(SPLITS, (train, valid), strict=True):
            (partial / split / "images").mkdir(parents=True)
            (partial / split / "labels").mkdir()
            for index in range(count):
                scene = draw_scene(
                    seed,
                    index,
                    split=split,
                    size=_jittered(_Stream(seed, split, index), size, jitter),
                    classes=classes,
                    objects=(0, 0) if _is_negative(index, negatives) else objects,
                    scale=scale,
                )
                _write_scene(partial / split, f"{split}_{index:05d}", scene, classes)
        (partial / "data.yaml").write_text(_data_yaml(classes), encoding="utf-8", newline="\n")
        if folder.exists():
            folder.rmdir()  # empty; Windows renames onto nothing
        partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; "
            "make room or give permission there, or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder / "data.yaml"


def _is_negative(index: int, fraction: float) -> bool:
    """True for that fraction of any run of pictures, evenly spaced, however many are drawn."""
    return int((index + 1) * fraction) > int(index * fraction)


def _jittered(stream: _Stream, size: Size, jitter: float) -> Size:
    height, width = np.multiply(size, stream.rng(2**16).uniform(1 - jitter, 1 + jitter, 2)).round()
    return max(SMALLEST, int(height)), max(SMALLEST, int(width))


def _write_scene(folder: Path, name: str, scene: Scene, classes: Sequence[str]) -> None:
    """`images/<name>.jpg` and `labels/<name>.xml` in a split's folder."""
    bgr = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
    # Encoded in memory: `cv2.imwrite` hides a full disk behind a False and cannot take every Windows path.
    jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
    (folder / "images" / f"{name}.jpg").write_bytes(jpeg.tobytes())
    (folder / "labels" / f"{name}.xml").write_text(
        _voc_xml(f"{name}.jpg", scene, classes), encoding="utf-8", newline="\n"
    )


def _voc_xml(filename: str, scene: Scene, classes: Sequence[str]) -> str:
    height, width, depth = scene.image.shape
    things = zip(scene.boxes.astype(int).tolist(), scene.labels, scene.difficult, scene.truncated, strict=True)
    # 1-based inclusive in the XML; continuous edges here, so only the minimum moves.
    objects = "".join(
        f"""
  <object>
    <name>{classes[label]}</name>
    <pose>Unspecified</pose>
    <truncated>{truncated:d}</truncated>
    <difficult>{difficult:d}</difficult>
    <bndbox>
      <xmin>{x1 + 1}</xmin>
      <ymin>{y1 + 1}</ymin>
      <xmax>{x2}</xmax>
      <ymax>{y2}</ymax>
    </bndbox>
  </object>"""
        for (x1, y1, x2, y2), label, difficult, truncated in things
    )
    return f"""<annotation>
  <folder>images</folder>
  <filename>{filename}</filename>
  <size>
    <width>{width}</width>
    <height>{height}</height>
    <depth>{depth}</depth>
  </size>
  <segmented>0</segmented>{objects}
</annotation>
"""


def _data_yaml(classes: Sequence[str]) -> str:
    keys = {
        f"{split.upper()}_DIR_{kind.upper()}": f"{split}/{kind}" for split in SPLITS for kind in ("images", "labels")
    }
    return yaml.safe_dump({**keys, "CLASSES": list(classes), "NC": len(classes)}, sort_keys=False)


# ---------------------------------------------------------------------------------------------------- checks


def _check(good: bool, otherwise: str) -> None:
    if not good:
        raise UserError(otherwise)


def _check_drawing(seed: int, size: Size, classes: Sequence[str], objects: tuple[int, int], scale: Range) -> None:
    _check(seed >= 0, f"seed must be at least 0, not {seed}")
    _check(
        len(size) == 2 and min(size) >= SMALLEST and max(size) <= LARGEST,
        f"size must be (height, width), each {SMALLEST} to {LARGEST} pixels, not {tuple(size)}",
    )
    _check(len(classes) > 0, "classes must name at least one shape")
    for name in classes:
        if name not in CLASSES:
            hint = nearest(name, CLASSES) or f" There are: {', '.join(CLASSES)}."
            raise UserError(f"unknown class {name!r}.{hint}")
    _check(len(set(classes)) == len(classes), f"classes must differ, not {', '.join(classes)}")
    _check(
        0 <= objects[0] <= objects[1] <= CROWD,
        f"objects must be (least, most), 0 to {CROWD}, not {tuple(objects)}",
    )
    _check(
        0 < scale[0] <= scale[1] <= 1,
        f"scale must be (least, most), fractions above 0 .. 1, not {tuple(scale)}",
    )
    _check(
        scale[0] * min(size) >= TINIEST,
        f"objects of {scale[0]} of {min(size)} pixels are too small to show; "
        f"raise scale or size until they have {TINIEST}",
    )


def _check_is_free(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} already holds something; delete it or name another folder")

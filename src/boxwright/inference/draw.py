"""Draws detections and ground truth on pictures, the last step before a picture or a frame is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from boxwright.types import Detections, Float32, Int64, Size, UInt8

Colour = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # x1 y1 x2 y2 in whole pixels, x2 and y2 outside

# Each colour is the farthest in OKLab (lightness weighted 0.75) from all before it, among those that stand
# out on photographs (lightness 0.56 .. 0.93, chroma over 0.095): any first n are as distinct as n can be.
PALETTE = (
    *("f84030", "00f800", "0068f8", "e000f8", "308858", "f8c0f8", "f8c000", "00f8f8", "986098", "60a8d8"),
    *("b07800", "78c870", "e01090", "8838f8", "d080f8", "f09880", "c8f8b0", "c8f810", "00a800", "8078e8"),
    *("f870a8", "b05850", "2080a0", "b038c0", "00b8a8", "00f8a8", "889800", "c0a860"),
)

# DejaVu Sans comes with matplotlib and lacks East Asian and Indic letters; systems bring these for them.
SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansDevanagari-Regular.ttf",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "malgun.ttf",
    "Nirmala.ttc",
)


def colour(label: int) -> Colour:
    """The colour of class `label`, the same in every picture and whatever other classes there are."""
    red, green, blue = bytes.fromhex(PALETTE[label % len(PALETTE)])
    turn = label // len(PALETTE)  # after the last colour all come again: paler, darker, paler still, ...
    towards, amount = (255 if turn % 2 else 0), turn / (turn + 2)
    return (
        round(red + (towards - red) * amount),
        round(green + (towards - green) * amount),
        round(blue + (towards - blue) * amount),
    )


def draw(image: UInt8, detections: Detections, classes: Sequence[str], *, labels: bool = True) -> UInt8:
    """A copy of the picture (H, W, 3) with its detections: a box each and, with `labels`, `name 0.93`.

    The best detection is drawn last, on top of the others.
    """
    marks = [
        (classes[int(label)], f" {score:.2f}")
        for label, score in zip(detections.labels, detections.scores, strict=True)
    ]
    return _annotate(image, detections.boxes, detections.labels, marks if labels else [], dashed=False)


def draw_truth(image: UInt8, boxes: Float32, labels: Int64, classes: Sequence[str]) -> UInt8:
    """A copy of the picture (H, W, 3) with its annotated boxes (N, 4), dashed, and their classes' names."""
    return _annotate(image, boxes, labels, [(classes[int(label)], "") for label in labels], dashed=True)


def contact_sheet(images: Sequence[UInt8], columns: int, cell: Size, captions: Sequence[str] = ()) -> UInt8:
    """Pictures of any sizes, row by row on white, each scaled to fit a cell of (height, width) pixels, with a line of
    text below it where there are `captions`."""
    assert images
    assert columns >= 1
    height, width = cell
    gap = max(2, min(cell) // 40)
    letter = max(10, width // 26)
    foot = sum(_font("", letter).getmetrics()) + 2 if captions else 0
    rows = -(-len(images) // columns)
    size = (gap + columns * (width + gap), gap + rows * (height + foot + gap))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        picture = Image.fromarray(image)
        fitted = (scaled := fitting((picture.height, picture.width), cell))[1], scaled[0]
        left = gap + column * (width + gap) + (width - fitted[0]) // 2
        top = gap + row * (height + foot + gap) + (height - fitted[1]) // 2
        sheet.paste(picture.resize(fitted, Image.Resampling.LANCZOS), (left, top))
        if captions:
            text = _fit_text(captions[index], "", letter, width)
            place = (gap + column * (width + gap), gap + row * (height + foot + gap) + height)
            pen.text(place, text, fill="black", font=_font(text, letter))
    return np.array(sheet)


def fitting(size: Size, cell: Size) -> Size:
    """The largest size of a picture of `size` (height, width) that fits a cell."""
    scale = min(c / s for c, s in zip(cell, size, strict=True))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def truth_tile(image: UInt8, boxes: Float32, labels: Int64, classes: Sequence[str], cell: Size) -> UInt8:
    """`draw_truth` on a picture that was scaled to a cell first, so that lines and names can be read at any size."""
    height, width = fitting((image.shape[0], image.shape[1]), cell)
    scaled = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    factor = np.array([width / image.shape[1], height / image.shape[0]] * 2, np.float32)
    return draw_truth(scaled, boxes * factor, labels, classes)


def _annotate(image: UInt8, boxes: Float32, labels: Int64, marks: Sequence[tuple[str, str]], *, dashed: bool) -> UInt8:
    picture = Image.fromarray(image)
    pen = ImageDraw.Draw(picture)  # on a copy: PIL does not write into what it was given
    # In proportion to the picture, as large pictures are looked at scaled down; never below what can be read.
    side = (picture.width * picture.height) ** 0.5
    line = max(1, round(side / 260))
    letter = max(10, round(side / 42))
    outlines = [_outline(box, line, picture.size) for box in boxes]
    best_last = range(len(outlines) - 1, -1, -1)
    for index in best_last:
        _draw_box(pen, outlines[index], line, colour(int(labels[index])), dashed=dashed)
    tags = [_fit_text(name, tail, letter, picture.width) for name, tail in marks]
    places = _place_tags(outlines, [_tag_size(tag, letter) for tag in tags], picture.size)
    for index in best_last[: len(tags)] if tags else ():
        _draw_tag(pen, places[index], tags[index], letter, colour(int(labels[index])))
    return np.array(picture)


def _outline(box: Float32, line: int, size: tuple[int, int]) -> Rectangle:
    """The outer edge of a box's line: the line lies half outside the box, and wholly inside the picture."""
    width, height = size
    half = line // 2
    x1, y1 = (int(v) - half for v in np.floor(box[:2]))
    x2, y2 = (int(v) + half for v in np.ceil(box[2:]))
    x1, y1 = min(max(x1, 0), width - 1), min(max(y1, 0), height - 1)
    return x1, y1, max(min(x2, width), x1 + 1), max(min(y2, height), y1 + 1)


def _draw_box(pen: ImageDraw.ImageDraw, outline: Rectangle, line: int, ink: Colour, *, dashed: bool) -> None:
    x1, y1, x2, y2 = outline
    if not dashed:
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), outline=ink, width=line)
        return
    for start, end in _dashes(x1, x2, line):
        pen.rectangle((start, y1, end - 1, min(y1 + line, y2) - 1), fill=ink)
        pen.rectangle((start, max(y2 - line, y1), end - 1, y2 - 1), fill=ink)
    for start, end in _dashes(y1, y2, line):
        pen.rectangle((x1, start, min(x1 + line, x2) - 1, end - 1), fill=ink)
        pen.rectangle((max(x2 - line, x1), start, x2 - 1, end - 1), fill=ink)


def _dashes(start: int, end: int, line: int) -> Iterator[tuple[int, int]]:
    """Dashes from corner to corner of one side, so that every corner is drawn."""
    dash = 4 * line
    count = max(1, round(((end - start) / dash - 1) / 2) + 1)  # dashes; one gap fewer
    edges = np.linspace(start, end, 2 * count).round().astype(int)
    for index in range(count):
        yield int(edges[2 * index]), max(int(edges[2 * index + 1]), int(edges[2 * index]) + 1)


def _tag_size(text: str, letter: int) -> tuple[int, int]:
    """Width and height of a tag's filled background; nothing where there is no text."""
    if not text:
        return 0, 0
    font = _font(text, letter)
    ascent, descent = font.getmetrics()
    return round(font.getlength(text)) + 2 * (letter // 3), ascent + descent


def _fit_text(name: str, tail: str, letter: int, width: int) -> str:
    """`name` and `tail`, the name cut short where the picture is narrower, or nothing if it is too narrow."""
    name = " ".join(name.split())
    if _tag_size(name + tail, letter)[0] <= width:
        return name + tail
    for kept in range(len(name) - 1, -1, -1):
        text = name[:kept].rstrip() + "…" + tail
        if _tag_size(text, letter)[0] <= width:
            return text
    return ""


def _place_tags(
    outlines: Sequence[Rectangle], sizes: Sequence[tuple[int, int]], picture: tuple[int, int]
) -> list[tuple[int, int]]:
    """Each tag's top left corner, the best detection's first: by its box, where it hides least of them."""
    taken = np.zeros((len(sizes), 4), np.int64)  # x1 y1 x2 y2 of the tags placed so far
    places: list[tuple[int, int]] = []
    for index, (outline, (width, height)) in enumerate(zip(outlines, sizes, strict=False)):
        x1, y1, x2, y2 = outline
        above, below, right = y1 - height, y2, x2 - width
        wanted = np.array(
            [(x1, above), (x1, y1), (right, above), (x1, below), (right, below)]
            + [(x1, y1 + row * height) for row in (1, 2, 3, -2)]
        )  # (9, 2) x y
        wanted = wanted.clip(0, (max(picture[0] - width, 0), max(picture[1] - height, 0)))
        least = int(np.argmin(_hidden(taken[:index], wanted, (width, height))))  # the first of equals
        x, y = (int(v) for v in wanted[least])
        taken[index] = (x, y, x + width, y + height)
        places.append((x, y))
    return places


def _hidden(taken: Int64, corners: Int64, size: tuple[int, int]) -> NDArray[np.int64]:
    """Pixels of the tags `taken` (N, 4) that a tag of `size` would hide at each of the corners (M, 2)."""
    low = np.maximum(taken[None, :, :2], corners[:, None])  # (M, N, 2)
    high = np.minimum(taken[None, :, 2:], corners[:, None] + size)
    return (high - low).clip(0).prod(axis=2).sum(axis=1)


def _draw_tag(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, letter: int, paper: Colour) -> None:
    if not text:
        return
    x, y = place
    width, height = _tag_size(text, letter)
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=paper)
    ink = "black" if _luminance(paper) > 0.179 else "white"  # where black and white contrast equally (WCAG 2.1)
    font = _font(text, letter)
    pen.text((x + letter // 3, y + font.getmetrics()[0]), text, fill=ink, font=font, anchor="ls")


def _luminance(ink: Colour) -> float:
    """Relative luminance, 0 .. 1 (WCAG 2.1)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in ink)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _font(text: str, letter: int) -> ImageFont.FreeTypeFont:
    return _load_font(_font_file("".join(c for c in text if not c.isascii())), letter)


@lru_cache(maxsize=64)
def _load_font(file: Path, letter: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, letter)


@lru_cache(maxsize=4096)
def _font_file(letters: str) -> Path:
    """DejaVu Sans or, where it lacks one of `letters`, a font of the system that has them all."""
    ours = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    if _has_letters(ours, letters):
        return ours
    for name in SYSTEM_FONTS:
        try:
            file = Path(str(ImageFont.truetype(name).path))
        except OSError:
            continue
        if _has_letters(file, letters):
            return file
    return ours  # which shows a frame for the letter: better than no tag


def _has_letters(font: Path, letters: str) -> bool:
    glyphs = FT2Font(str(font))
    return all(glyphs.get_char_index(ord(letter)) for letter in letters)

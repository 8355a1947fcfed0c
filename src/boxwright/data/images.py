"""The one decoder: a picture file → its header, checked without decoding, or its pixels.

Every picture that Boxwright trains on, evaluates or predicts from comes through here, so colours and EXIF are
the same everywhere. The header is read by our own walk over the container: a bomb is refused before anything
is allocated, and a cut file is found during the scan of a dataset. Decoders differ in that, and some return
the lost half as flat grey without a word.

A picture comes whole (`decode`) or at the size that a Fit wants of it (`decode_at`), which for a large JPEG may be had
while decoding, for less.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np

from boxwright.data import members
from boxwright.types import Member, Size, UInt8, UserError

Picture = Path | Member | bytes  # where a picture's bytes are, or these themselves
_Read = TypeVar("_Read")
Format = Literal["JPEG", "PNG", "BMP", "WebP", "TIFF", "GIF"]

EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
)  # what counts as a picture in a folder
MAX_PIXELS = 100_000_000  # a header that claims more is a bomb or a mistake
MAX_BYTES = 1 << 30


class ImageError(UserError):
    """A picture that cannot be used; `path` is None where it came as bytes."""

    def __init__(self, path: Path | Member | None, reason: str) -> None:
        super().__init__(path, reason)  # both stay in `args`: the error crosses process borders pickled
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path or 'image'}: {self.reason}"


@dataclass(frozen=True)
class Header:
    """What a picture file says about itself."""

    size: Size  # as it is shown, after EXIF orientation
    format: Format
    orientation: int = 1  # EXIF's, 1 .. 8; already applied to `size`


def read_header(source: Picture) -> Header:
    """Size and format of a picture, from a whole file, without decoding its pixels.

    Raises `ImageError` where it is no regular file, empty, of another format, over `MAX_PIXELS` or cut short.
    """
    with _named(source):
        if isinstance(source, Path):
            return _patiently(lambda: _header_of(source))
        return _parse(BytesIO(_read(source)))


def decode(source: Picture) -> UInt8:
    """The pixels, (H, W, 3) RGB: EXIF orientation applied, grey widened, 16 bits brought to 8, alpha dropped.

    Of an animation or a multi-page file it is the first picture. Raises `ImageError`; a picture that is cut
    short is never returned in part.
    """
    with _named(source):
        data = _read(source)
        header = _parse(BytesIO(data))
        return _upright(_stored(data, header), header)


def decode_at(source: Picture, content: Callable[[Size], Size], *, scaled: bool = False) -> tuple[UInt8, Size]:
    """The pixels at the size that `content` makes of the picture's own, and that own size; otherwise as `decode`.

    `scaled`: a JPEG of at least twice the size asked for is brought to a half, a quarter or an eighth while it is
    decoded, and resized from there. That is faster, and the pixels differ a little from those of the full decoding.
    """
    with _named(source):
        data = _read(source)
        header = _parse(BytesIO(data))
        wanted = content(header.size)
        factor = _reduction(header, wanted) if scaled else 1
        if factor == 1:
            return resized(_upright(_stored(data, header), header), wanted), header.size
        turned = header.orientation >= 5
        (height, width), (h, w) = ((size[::-1] if turned else size) for size in (header.size, wanted))
        # libjpeg's last row and column stand for less than `factor` pixels where the side is no multiple of it: the
        # scale is that of the true size, so that everything lies where the boxes say.
        pixels = _cv2().resize(
            _stored(data, header, factor), None, fx=w * factor / width, fy=h * factor / height,
            interpolation=_cv2().INTER_LINEAR,
        )[:h, :w]  # fmt: skip
        return _upright(np.asarray(pixels, np.uint8), header), header.size


def resized(image: UInt8, size: Size) -> UInt8:
    """A picture (h, w, 3) at another size."""
    height, width = size
    if size == image.shape[:2]:
        return image
    shrinks = height * 2 <= image.shape[0] and width * 2 <= image.shape[1]
    cv2 = _cv2()
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR  # linear looks at 2 x 2 pixels and would skip the others
    return np.asarray(cv2.resize(image, (width, height), interpolation=how), np.uint8)


def _reduction(header: Header, wanted: Size) -> int:
    """The largest of 8, 4, 2 by which a JPEG can be reduced and still be at least of the size wanted; else 1."""
    if header.format != "JPEG":
        return 1
    fits = (all(-(-side // by) >= w for side, w in zip(header.size, wanted, strict=True)) for by in (8, 4, 2))
    return next((by for by, fit in zip((8, 4, 2), fits, strict=True) if fit), 1)


def _cv2() -> Any:
    """OpenCV, whose 0.1 s of import a mistyped path need not wait for."""
    import cv2

    return cv2


class _UnusableError(Exception):
    """Why a picture cannot be used; the public functions add the path."""


@contextmanager
def _named(source: Picture) -> Generator[None]:
    """What cannot be used is raised with where it is."""
    try:
        yield
    except _UnusableError as error:
        raise ImageError(None if isinstance(source, bytes) else source, str(error)) from None


class _StumbledError(_UnusableError):
    """A disk or a server that may answer when it is asked again."""


_STUMBLES = (errno.EIO, errno.ESTALE)
_PAUSES = (0.2, 1.0)  # seconds before asking again: a server that comes back takes about as long


def _patiently(read: Callable[[], _Read]) -> _Read:
    """What `read` returns, at the third attempt at the latest."""
    for pause in _PAUSES:
        try:
            return read()
        except _StumbledError:
            time.sleep(pause)
    return read()


def _unreadable(error: OSError) -> _UnusableError:
    kind = _StumbledError if error.errno in _STUMBLES else _UnusableError
    return kind(f"cannot be read: {error.strerror or error}")


_CUT = "is cut short: the end of the picture is missing"


def _header_of(path: Path) -> Header:
    with _open(path) as file:
        return _parse(file)


def _bytes_of(path: Path) -> bytes:
    with _open(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise _unreadable(error) from None


def _open(path: Path) -> BinaryIO:
    try:
        status = path.stat()  # before open(), which would wait for ever on a FIFO
        if stat.S_ISDIR(status.st_mode):
            raise _UnusableError("is a folder, not a picture")
        if not stat.S_ISREG(status.st_mode):
            raise _UnusableError("is not a regular file")
        if status.st_size > MAX_BYTES:
            raise _UnusableError(f"is larger than {MAX_BYTES >> 20} MiB")
        return path.open("rb")
    except OSError as error:
        raise _unreadable(error) from None
    except ValueError as error:  # a NUL in the name
        raise _UnusableError(f"cannot be read: {error}") from None


def read_bytes(source: Picture) -> bytes:
    """A picture's bytes as they are; raises `ImageError` where they cannot be had."""
    with _named(source):
        return _read(source)


def _read(source: Picture) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, Member):
        try:
            return members.read(source)
        except members.DamagedError as error:
            raise _UnusableError(str(error)) from None
    return _patiently(lambda: _bytes_of(source))


def _stored(data: bytes, header: Header, reduced_by: int = 1) -> UInt8:
    """The pixels as they are stored, not turned yet."""
    # Orientation is ours, by the same reading as the header's size; to TIFF, OpenCV applies it in any case.
    flags = _cv2().IMREAD_COLOR_RGB | _cv2().IMREAD_IGNORE_ORIENTATION
    flags |= {1: 0, 2: 16, 4: 32, 8: 64}[reduced_by]  # the bits of IMREAD_REDUCED_*
    try:
        image: Any = _cv2().imdecode(np.frombuffer(data, np.uint8), flags)  # (H, W, 3) RGB
    except _cv2().error:
        image = None
    if image is None:
        raise _UnusableError(f"is damaged, or a kind of {header.format} that is not read here")
    size = header.size[::-1] if header.orientation >= 5 and header.format != "TIFF" else header.size
    if image.shape != (*(-(-side // reduced_by) for side in size), 3) or image.dtype != np.uint8:
        raise _UnusableError("decodes to another size than its header says")
    return image


def _upright(image: UInt8, header: Header) -> UInt8:
    if header.format == "TIFF":
        return image
    return np.ascontiguousarray(_ORIENT[header.orientation](image))


# EXIF 2.32, tag 0x0112: where the stored first row and first column belong in the picture as it is shown.
_ORIENT: dict[int, Callable[[UInt8], UInt8]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: image.transpose(1, 0, 2)[:, ::-1],
    7: lambda image: image.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda image: image.transpose(1, 0, 2)[::-1],
}


def _parse(source: BinaryIO) -> Header:
    try:
        form = _format(source.read(16))
        file = _Walk(source)
        height, width, orientation = _PARSERS[form](file)
    except OSError as error:
        raise _unreadable(error) from None
    if orientation >= 5:
        height, width = width, height
    return Header((height, width), form, orientation)


def _format(start: bytes) -> Format:
    if not start:
        raise _UnusableError("is empty")
    for magic, form in _MAGIC:
        if re.match(magic, start, re.DOTALL):
            return form
    begins = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begins.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        raise _UnusableError("looks like HTML or XML, not a picture")
    if start.startswith(b"version https://"):
        raise _UnusableError("is a Git LFS pointer, not the picture: run `git lfs pull`")
    if start[4:8] == b"ftyp":
        raise _UnusableError("is AVIF, HEIC or a video; save it as JPEG or PNG")
    raise _UnusableError("is no picture of a known format (JPEG, PNG, BMP, WebP, TIFF, GIF)")


_MAGIC: tuple[tuple[bytes, Format], ...] = (
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"RIFF....WEBP", "WebP"),
    (rb"II\*\0|MM\0\*", "TIFF"),
    (rb"GIF8[79]a", "GIF"),
    (rb"BM", "BMP"),
)

# Each parser takes the open file, and returns height, width and orientation of a picture that is all there.
_Parsed = tuple[int, int, int]


class _Walk:
    """A file that is read in small pieces; running out of it, or never coming to an end, is an error."""

    def __init__(self, file: BinaryIO) -> None:
        self.length = file.seek(0, os.SEEK_END)
        self.seek = file.seek
        self.tell = file.tell
        self._read = file.read
        self._left = 1_000_000  # pieces, half a second: millions of empty segments are an attack
        file.seek(0)

    def take(self, count: int) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise _UnusableError("has too many segments")
        data = self._read(count) if count <= self.length else b""
        if len(data) < count:
            raise _UnusableError(_CUT)
        return data

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def rest(self) -> bytes:
        return self._read()


def _check_pixels(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise _UnusableError(f"has no pixels: {width}x{height}")
    if height * width > MAX_PIXELS:
        raise _UnusableError(f"claims {width}x{height} pixels, more than {MAX_PIXELS // 1_000_000} megapixels")


# ITU-T T.81, table B.1: start of frame, but not DHT (C4), JPG (C8), DAC (CC)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset(range(0xD0, 0xD9)) | {0x01}  # RSTn, SOI, TEM: markers without a length
_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # a marker that ends entropy-coded data


def _jpeg(file: _Walk) -> _Parsed:
    height = width = 0
    orientation = 1
    file.seek(2)
    while (marker := _next_marker(file)) != 0xDA:
        if marker == 0xD9:
            raise _UnusableError("is a JPEG without picture data")
        if marker in _STANDALONE:
            continue
        (length,) = file.unpack(">H")
        payload_at = file.tell()
        if marker in _FRAMES:
            _, height, width = file.unpack(">BHH")
            _check_pixels(height, width)
        elif marker == 0xE1 and orientation == 1:
            payload = file.take(max(length - 2, 0))
            if payload.startswith(b"Exif\0\0"):
                orientation = _exif_orientation(payload[6:])
        file.seek(payload_at + max(length - 2, 0))
    if not height:
        raise _UnusableError("is a JPEG without a frame header")
    (length,) = file.unpack(">H")
    _check_jpeg_end(file, file.tell() + length - 2)
    return height, width, orientation


def _next_marker(file: _Walk) -> int:
    """The next marker's code, past fill bytes and, as libjpeg does, past bytes that belong to no segment."""
    while True:
        while file.take(1) != b"\xff":
            pass
        while (code := file.take(1)) == b"\xff":
            pass
        if code != b"\0":
            return code[0]


def _check_jpeg_end(file: _Walk, scan: int) -> None:
    """Refuse a picture whose scan data no end-of-image marker follows; a thumbnail's does not count."""
    if file.length - 2 >= scan:
        file.seek(file.length - 2)
        if file.take(2) == b"\xff\xd9":
            return
    # Something trails the picture, as after many cameras, or it is cut: walk from scan to scan.
    file.seek(scan)
    data = file.rest()
    at = 0
    while found := _IN_SCAN.search(data, at):
        marker, at = data[found.start() + 1], found.end()
        if marker == 0xD9:
            return
        if marker in (0xC4, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF:
            at += int.from_bytes(data[at : at + 2], "big")
    raise _UnusableError(_CUT)


def _png(file: _Walk) -> _Parsed:
    file.seek(8)
    length, kind, width, height = file.unpack(">I4sII")
    if kind != b"IHDR":
        raise _UnusableError("is a PNG without a header chunk")
    _check_pixels(height, width)
    orientation, at = 1, 8 + 12 + length
    while True:
        file.seek(at)
        length, kind = file.unpack(">I4s")
        if kind == b"IEND":
            file.take(4)
            return height, width, orientation
        if kind == b"eXIf":
            orientation = _exif_orientation(file.take(length))
        if kind == b"IDAT" and _ends_with(file, b"\0\0\0\0IEND\xaeB`\x82"):
            return height, width, orientation
        at += 12 + length


def _ends_with(file: _Walk, tail: bytes) -> bool:
    file.seek(file.length - len(tail))
    return file.rest() == tail


def _bmp(file: _Walk) -> _Parsed:
    file.seek(10)
    offset, header_size = file.unpack("<II")
    if header_size == 12:  # OS/2's
        width, height, _, bits = file.unpack("<HHHH")
        compression = claimed = 0
    else:
        width, height, _, bits, compression, claimed = file.unpack("<iiHHII")
    height = abs(height)  # negative: stored top row first
    _check_pixels(height, width)
    rows = (width * bits + 31) // 32 * 4 * height
    if file.length < offset + (rows if compression in (0, 3, 6) else claimed):
        raise _UnusableError(_CUT)
    return height, width, 1


def _webp(file: _Walk) -> _Parsed:
    file.seek(4)
    end = 8 + file.unpack("<I")[0]
    if file.length < end:
        raise _UnusableError(_CUT)
    height = width = 0
    orientation, at = 1, 12
    while at + 8 <= end:
        file.seek(at)
        kind, length = file.unpack("<4sI")
        if kind in (b"VP8X", b"VP8 ", b"VP8L") and not width:
            height, width = _webp_size(kind, file.take(10))
            _check_pixels(height, width)
        elif kind == b"EXIF":
            payload = file.take(length)
            orientation = _exif_orientation(payload.removeprefix(b"Exif\0\0"))
        at += 8 + length + length % 2
    if not width:
        raise _UnusableError("is a WebP without picture data")
    return height, width, orientation


def _webp_size(kind: bytes, head: bytes) -> Size:
    """RFC 9649, sections 2.5 to 2.7."""
    if kind == b"VP8X":
        return int.from_bytes(head[7:10], "little") + 1, int.from_bytes(head[4:7], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack("<HH", head[6:10])
    return height & 0x3FFF, width & 0x3FFF


def _gif(file: _Walk) -> _Parsed:
    file.seek(6)
    width, height, flags, _, _ = file.unpack("<HHBBB")
    _check_pixels(height, width)
    _skip_palette(file, flags)
    frames = 0
    while (block := file.take(1)) != b";":
        if block == b",":
            frames += 1
            _skip_palette(file, file.take(9)[8])
        elif block != b"!":
            raise _UnusableError("is damaged: an unknown GIF block")
        file.take(1)  # the extension's kind, or the width of the first code
        _skip_blocks(file)
    if not frames:
        raise _UnusableError("is a GIF without picture data")
    return height, width, 1


def _skip_palette(file: _Walk, flags: int) -> None:
    if flags & 0x80:
        file.take(3 << (flags & 7) + 1)


def _skip_blocks(file: _Walk) -> None:
    while length := file.take(1)[0]:
        file.take(length)


_WIDTH, _HEIGHT, _STRIPS, _ORIENTATION, _STRIP_BYTES, _TILES, _TILE_BYTES = _TAGS = (
    256,
    257,
    273,
    274,
    279,
    324,
    325,
)


def _tiff(file: _Walk) -> _Parsed:
    tags = _tags(file)
    height, width = (tags.get(tag, (0,))[0] for tag in (_HEIGHT, _WIDTH))
    _check_pixels(height, width)
    offsets = tags.get(_STRIPS) or tags.get(_TILES) or ()
    counts = tags.get(_STRIP_BYTES) or tags.get(_TILE_BYTES) or ()
    if not offsets or max(map(sum, zip(offsets, counts, strict=False)), default=0) > file.length:
        raise _UnusableError(_CUT)
    return height, width, _valid_orientation(tags)


def _exif_orientation(exif: bytes) -> int:
    """1 .. 8; 1 where the block is damaged: a broken camera note must not cost a picture."""
    if exif[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    try:
        return _valid_orientation(_tags(_Walk(BytesIO(exif))))
    except _UnusableError:
        return 1


def _valid_orientation(tags: dict[int, tuple[int, ...]]) -> int:
    orientation = tags.get(_ORIENTATION, (1,))[0]
    return orientation if orientation in _ORIENT else 1


def _tags(file: _Walk) -> dict[int, tuple[int, ...]]:
    """The tags named above in a TIFF's first directory; an EXIF block is such a TIFF."""
    file.seek(0)
    order = "<" if file.take(2) == b"II" else ">"
    _, start = file.unpack(order + "HI")
    file.seek(start)
    (entries,) = file.unpack(order + "H")
    tags = dict[int, tuple[int, ...]]()
    for index in range(entries):
        file.seek(start + 2 + 12 * index)
        tag, kind, count = file.unpack(order + "HHI")
        letter = {1: "B", 3: "H", 4: "I"}.get(kind)
        if letter is None or count == 0 or tag in tags or tag not in _TAGS:
            continue
        if count * struct.calcsize(letter) > 4:
            file.seek(file.unpack(order + "I")[0])
        tags[tag] = file.unpack(f"{order}{count}{letter}")
    return tags


_PARSERS: dict[Format, Callable[[_Walk], _Parsed]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "BMP": _bmp,
    "WebP": _webp,
    "TIFF": _tiff,
    "GIF": _gif,
}

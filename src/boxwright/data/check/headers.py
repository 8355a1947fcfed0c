"""The first bytes of a picture file → how its pixels are stored, as far as a person may want to know.

`images.read_header` has made sure that the file is whole; nothing here is decoded, and a file that is understood only
in part has fewer notes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

_EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "BMP": (".bmp",), "WebP": (".webp",), "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
}  # fmt: skip

Notes = dict[str, str]  # kind → reason


def notes_of(file: BinaryIO, form: str, suffix: str, orientation: int) -> Notes:
    """What is noteworthy about an open picture of a format: the kinds of `finding.KINDS`, each with its reason."""
    found: Notes = {}
    if suffix.lower() not in _EXTENSIONS.get(form, ()):
        found["other-format"] = f"is a {form}, though it is called {suffix}"
    if orientation != 1:
        found["turned"] = f"is turned by its EXIF orientation {orientation}"
    try:
        for kind, reason in _STORED.get(form, lambda _: iter(()))(file):
            found.setdefault(kind, reason)
    except (struct.error, IndexError, OSError):
        pass
    return found


def _jpeg(file: BinaryIO) -> Iterator[tuple[str, str]]:
    file.seek(2)
    for _ in range(10_000):
        while (byte := file.read(1)) and byte != b"\xff":
            pass
        while (byte := file.read(1)) == b"\xff":
            pass
        if not byte or byte in (b"\xda", b"\xd9"):
            return
        marker = byte[0]
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD8:
            continue
        (length,) = struct.unpack(">H", file.read(2))
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, _, _, components = struct.unpack(">BHHB", file.read(6))
            if components == 1:
                yield "grey", "is a grey JPEG: read as RGB"
            elif components == 4:
                yield "cmyk", "is a CMYK JPEG: read as RGB"
            if bits > 8:
                yield "deep", f"has {bits} bits a channel: read as 8"
            return
        file.seek(length - 2, 1)


def _png(file: BinaryIO) -> Iterator[tuple[str, str]]:
    file.seek(24)
    bits, colour = struct.unpack(">BB", file.read(2))
    if colour in (0, 4):
        yield "grey", f"is a grey PNG{' of 1 bit' if bits == 1 else ''}: read as RGB"
    if colour == 3:
        yield "palette", "has a palette: read as RGB"
    if colour in (4, 6):
        yield "alpha", "has an alpha channel: left away"
    if bits == 16:
        yield "deep", "has 16 bits a channel: read as 8"
    at = 33
    for _ in range(10_000):  # chunks before the picture's data
        file.seek(at)
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind in (b"IDAT", b"IEND"):
            return
        if kind == b"tRNS" and colour not in (4, 6):
            yield "alpha", "has transparency: left away"
        if kind == b"acTL":
            (frames,) = struct.unpack(">I", file.read(4))
            if frames > 1:
                yield "several-pictures", f"is an animation of {frames} frames: the first is read"
        at += 12 + length


def _gif(file: BinaryIO) -> Iterator[tuple[str, str]]:
    yield "palette", "has a palette: read as RGB"
    file.seek(10)
    flags = file.read(1)[0]
    file.seek(13 + ((3 << (flags & 7) + 1) if flags & 0x80 else 0))
    frames = 0
    while (block := file.read(1)) in (b",", b"!"):
        if block == b",":
            frames += 1
            flags = file.read(9)[8]
            file.seek((3 << (flags & 7) + 1) if flags & 0x80 else 0, 1)
        file.read(1)
        while length := file.read(1)[0]:
            file.seek(length, 1)
    if frames > 1:
        yield "several-pictures", f"is an animation of {frames} frames: the first is read"


def _webp(file: BinaryIO) -> Iterator[tuple[str, str]]:
    file.seek(12)
    kind, _, flags = struct.unpack("<4sIB", file.read(9))
    if kind == b"VP8X" and flags & 0x02:  # RFC 9649, section 2.7
        yield "several-pictures", "is an animation: the first frame is read"
    if kind == b"VP8X" and flags & 0x10:
        yield "alpha", "has an alpha channel: left away"


def _tiff(file: BinaryIO) -> Iterator[tuple[str, str]]:
    file.seek(0)
    order = "<" if file.read(2) == b"II" else ">"
    _, at = struct.unpack(order + "HI", file.read(6))
    file.seek(at)
    (entries,) = struct.unpack(order + "H", file.read(2))
    for _ in range(entries):
        tag, kind, count, value = struct.unpack(order + "HHI4s", file.read(12))
        if kind != 3:
            continue
        (short,) = struct.unpack(order + "H", value[:2])
        if tag == 258:  # BitsPerSample; of several samples it is where they stand
            if count > 2:
                back = file.tell()
                file.seek(struct.unpack(order + "I", value)[0])
                (short,) = struct.unpack(order + "H", file.read(2))
                file.seek(back)
            if short > 8:
                yield "deep", f"has {short} bits a channel: read as 8"
        elif tag == 262:  # PhotometricInterpretation
            if short in (0, 1):
                yield "grey", "is a grey TIFF: read as RGB"
            elif short == 3:
                yield "palette", "has a palette: read as RGB"
            elif short == 5:
                yield "cmyk", "is a CMYK TIFF: read as RGB"
    if struct.unpack(order + "I", file.read(4))[0]:
        yield "several-pictures", "has several pages: the first is read"


_STORED: dict[str, Callable[[BinaryIO], Iterator[tuple[str, str]]]] = {
    "JPEG": _jpeg, "PNG": _png, "GIF": _gif, "WebP": _webp, "TIFF": _tiff,
}  # fmt: skip

"""A small good dataset, and the bad files that the catalogue puts into it."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

WIDTH, HEIGHT = 64, 48
YAML = "train: train\nval: valid\nclasses: [cat, dog]\n"
BOX = "<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
OBJECT = f"<object><name>cat</name>{BOX}</object>"


def annotation(*inside: str) -> str:
    """A VOC annotation with a part on each line, the first on line 2."""
    return "\n".join(["<annotation>", *inside, "</annotation>"])


def box(xmin: object, ymin: object, xmax: object, ymax: object) -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), (xmin, ymin, xmax, ymax), strict=True)
    return "<bndbox>" + "".join(f"<{name}>{value}</{name}>" for name, value in corners) + "</bndbox>"


def thing(inside: str = BOX, name: str = "cat") -> str:
    return f"<object><name>{name}</name>{inside}</object>"


def size(width: object, height: object) -> str:
    return f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"


class Dataset:
    """train (4 pictures) and valid (2), in `data.yaml`'s two classes: all good until something is added."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.yaml_path = root / "data.yaml"
        self.images, self.labels = root / "train" / "images", root / "train" / "labels"
        for part, count in (("train", 4), ("valid", 2)):
            for kind in ("images", "labels"):
                (root / part / kind).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                stem = f"{part}{number}"
                picture = jpeg(picture_of(number + len(part)))
                (root / part / "images" / f"{stem}.jpg").write_bytes(picture)
                objects = OBJECT + thing(box(10, 10, 60 - number, 44), "dog")
                (root / part / "labels" / f"{stem}.xml").write_text(annotation(objects))
        self.yaml(YAML)

    def image(self, data: bytes | Image.Image, name: str = "bad.jpg", xml: str | None = None, **options: Any) -> Path:
        """A picture to train on, annotated."""
        path = self.images / name
        if isinstance(data, Image.Image):
            data.save(path, **options)
        else:
            path.write_bytes(data)
        (self.labels / path.name).with_suffix(".xml").write_text(annotation(OBJECT) if xml is None else xml)
        return path

    def xml(self, text: str | bytes, picture: Image.Image | None = None) -> Path:
        """An annotation of a good picture to train on."""
        path = self.labels / "bad.xml"
        (self.images / "bad.jpg").write_bytes(jpeg(picture or picture_of(99)))
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def yaml(self, text: str | bytes) -> Path:
        self.yaml_path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return self.yaml_path


def picture_of(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    return encoded(picture, "JPEG", **options)


def encoded(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def with_orientation(value: int) -> Any:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))


def png_bomb(width: int, height: int) -> bytes:
    """A black PNG, whole: a megabyte that decodes to 1.2 GB. `height` is a multiple of 100."""
    length = height * (1 + 3 * width)
    packer = zlib.compressobj(9, wbits=-15)
    part = packer.compress(bytes(length // (height // 100))) + packer.flush(zlib.Z_FULL_FLUSH)
    stream = (
        b"\x78\xda" + part * (height // 100) + b"\x03\0" + struct.pack(">I", (length % 65521) << 16 | 1)
    )  # Adler-32
    return png_header(width, height) + png_chunk(b"IDAT", stream) + png_chunk(b"IEND", b"")


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(jpeg(picture_of(1)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_16_bit(colour: bool) -> bytes:
    values = np.random.default_rng(3).integers(0, 65535, (HEIGHT, WIDTH, 3 if colour else 1)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = png_header(WIDTH, HEIGHT, 16, 2 if colour else 0)
    return header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


def with_text_chunk() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("junk", "x" * 1000)
    return encoded(picture_of(4), "PNG", pnginfo=info, icc_profile=b"no profile at all")


def digest(folder: Path) -> str:
    """What is in a folder: names, kinds, sizes, bytes of files that are not huge, targets of links."""
    found = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted((*folders, *files)):
            path = Path(place, name)
            status = path.lstat()
            found.update(
                repr((str(path.relative_to(folder)), status.st_mode, status.st_size)).encode("utf-8", "replace")
            )
            if path.is_symlink():
                found.update(str(path.readlink()).encode())
            elif path.is_file() and status.st_size < 1 << 26:
                found.update(path.read_bytes())
    return found.hexdigest()

"""Every picture comes out the same everywhere, or is refused with a reason; nothing is returned in part."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import time
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from boxwright.data import images
from boxwright.data.images import ImageError, decode, decode_at, read_header, resized

# a smooth picture, so that lossy formats stay near it; its four corners differ, so that a flip shows
Y, X = np.mgrid[0:48, 0:64]
PICTURE = np.stack([X * 4, Y * 5, 255 - X * 2 - Y * 2], axis=2).astype(np.uint8)  # (48, 64, 3)

FORMATS = {
    "jpg": ("JPEG", {"quality": 95}),
    "progressive.jpg": ("JPEG", {"quality": 95, "progressive": True}),
    "png": ("PNG", {}),
    "bmp": ("BMP", {}),
    "webp": ("WEBP", {"quality": 95}),
    "lossless.webp": ("WEBP", {"lossless": True}),
    "tif": ("TIFF", {}),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}),
    "gif": ("GIF", {}),
}
ORIENTED = [name for name in FORMATS if name not in ("bmp", "gif")]


def encoded(name: str, image: Image.Image | None = None, orientation: int | None = None) -> bytes:
    kind, options = FORMATS[name]
    if orientation is not None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {**options, "exif": exif}
    buffer = BytesIO()
    (image or Image.fromarray(PICTURE)).save(buffer, kind, **options)
    return buffer.getvalue()


def saved(folder: Path, data: bytes, name: str = "a.jpg") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def reference(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")).astype(int)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_decodes_to_the_picture_that_was_saved(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, encoded(name), name)
    image = decode(path)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert read_header(path).size == image.shape[:2] == PICTURE.shape[:2]
    assert np.abs(image.astype(int) - PICTURE).mean() < 8  # GIF has 256 colours
    assert np.array_equal(image, decode(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "orientation"),
    [("jpg", 99), ("png", 0), *((name, orientation) for name in ORIENTED for orientation in range(1, 9))],
)
def test_exif_orientation_is_applied_to_pixels_and_header_alike(name: str, orientation: int, tmp_path: Path) -> None:
    data = encoded(name, orientation=orientation)
    image = decode(data)
    assert read_header(saved(tmp_path, data)).size == image.shape[:2] == reference(data).shape[:2]
    assert np.abs(image.astype(int) - reference(data)).mean() < 4


def test_modes_become_three_channels_of_eight_bits() -> None:
    grey = Image.fromarray(PICTURE[..., 0])
    assert np.array_equal(decode(encoded("png", grey)), np.repeat(PICTURE[..., :1], 3, axis=2))

    deep = Image.fromarray(PICTURE[..., 0].astype(np.uint16) * 257)  # Pillow's own convert() makes this all white
    for name in ("png", "tif"):
        assert np.array_equal(decode(encoded(name, deep))[..., 0], PICTURE[..., 0])

    alpha = np.dstack([PICTURE, X.astype(np.uint8)])
    assert np.array_equal(decode(encoded("png", Image.fromarray(alpha))), PICTURE)

    palette = Image.fromarray(PICTURE).convert("P")
    assert np.array_equal(decode(encoded("png", palette)), np.asarray(palette.convert("RGB")))

    bilevel = Image.fromarray(PICTURE[..., 0]).convert("1")
    assert np.array_equal(decode(encoded("png", bilevel))[..., 0], np.asarray(bilevel) * 255)

    cmyk = decode(encoded("jpg", Image.fromarray(PICTURE).convert("CMYK")))
    assert np.abs(cmyk.astype(int) - PICTURE).mean() < 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_picture_of_several_is_taken(kind: str, tmp_path: Path) -> None:
    buffer = BytesIO()
    first, second = Image.fromarray(PICTURE), Image.fromarray(255 - PICTURE)
    first.save(buffer, kind, save_all=True, append_images=[second])
    path = saved(tmp_path, buffer.getvalue())
    assert read_header(path).size == PICTURE.shape[:2]
    assert np.abs(decode(path).astype(int) - PICTURE).mean() < 8


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_picture_is_refused_wherever_it_is_cut(name: str, tmp_path: Path) -> None:
    data = encoded(name)
    for length in [*range(1, 60, 7), len(data) // 4, len(data) // 2, len(data) * 9 // 10, len(data) - 20]:
        path = saved(tmp_path, data[:length])
        with pytest.raises(ImageError):
            read_header(path)
        with pytest.raises(ImageError):
            decode(path)
    with pytest.raises(ImageError):
        decode(data[:-1])


def jpeg_with_thumbnail() -> bytes:
    """A JPEG whose EXIF block holds a whole JPEG, end-of-image marker and all."""
    data, thumbnail = encoded("jpg"), encoded("jpg", Image.fromarray(PICTURE[::4, ::4]))
    payload = b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, 1, 0) + thumbnail
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + data[2:]


def test_the_thumbnail_does_not_end_the_picture(tmp_path: Path) -> None:
    data = jpeg_with_thumbnail()
    assert decode(data).shape == PICTURE.shape
    for length in (data.index(b"\xff\xd9") + 2, len(data) - 50):
        with pytest.raises(ImageError, match="cut short"):
            read_header(saved(tmp_path, data[:length]))


def test_what_trails_a_picture_is_of_no_account(tmp_path: Path) -> None:
    for name in ("jpg", "progressive.jpg", "png", "gif", "bmp", "webp"):
        path = saved(tmp_path, encoded(name) + b"\0\0junk" * 20, name)
        assert read_header(path).size == PICTURE.shape[:2]
        assert decode(path).shape == PICTURE.shape


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"\n  <HTML>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "AVIF"),
        (b"\x80\x02cposix\nsystem\n", "known format"),
        (png_header(60_000, 60_000), "60000x60000"),
        (png_header(0, 10), "no pixels"),
        (b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", 65_000, 65_000) + bytes(20), "65000x65000"),
        (b"BM" + bytes(8) + struct.pack("<IIii", 54, 40, 20_000, -20_000) + bytes(40), "20000x20000"),
        (b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + bytes(20), "60000x60000"),
    ],
)
def test_what_is_no_picture_is_refused_at_once(data: bytes, reason: str, tmp_path: Path) -> None:
    path = saved(tmp_path, data)
    start = time.perf_counter()
    with pytest.raises(ImageError, match=reason) as caught:
        read_header(path)
    with pytest.raises(ImageError, match=reason):
        decode(path)
    assert time.perf_counter() - start < 0.5
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    folder = tmp_path / "folder.jpg"
    folder.mkdir()
    with pytest.raises(ImageError, match="folder"):
        read_header(folder)
    with pytest.raises(ImageError, match="cannot be read"):
        decode(tmp_path / "none.jpg")
    with pytest.raises(ImageError):
        read_header(tmp_path / "a\0b.jpg")
    if sys.platform != "win32":
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
        for name in ("pipe.jpg", "loop.jpg"):
            with pytest.raises(ImageError):
                decode(tmp_path / name)


def test_a_flood_of_empty_segments_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, b"\xff\xd8" + b"\xff\xe0\0\x02" * 1_000_000)
    with pytest.raises(ImageError):
        read_header(path)


def test_a_damaged_exif_block_costs_nothing() -> None:
    data = encoded("jpg", orientation=6)
    for damage in (b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"XX"):
        payload = b"Exif\0\0" + damage
        broken = encoded("jpg")
        broken = broken[:2] + b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload + broken[2:]
        assert decode(broken).shape == PICTURE.shape
    assert decode(data).shape == (64, 48, 3)


@pytest.mark.parametrize("name", ["ärger 100%.jpg", "[1]*.jpg" if sys.platform != "win32" else "[1].jpg", "图.jpg"])
def test_any_name_will_do(name: str, tmp_path: Path) -> None:
    assert decode(saved(tmp_path, encoded("jpg"), name)).shape == PICTURE.shape


def test_the_error_crosses_process_borders() -> None:
    error = pickle.loads(pickle.dumps(ImageError(Path("a.jpg"), "is empty")))
    assert (str(error), error.path, error.reason) == ("a.jpg: is empty", Path("a.jpg"), "is empty")


SEEDS = [encoded(name, orientation=6 if name in ORIENTED else None) for name in FORMATS]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.sampled_from(SEEDS),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 200),
)
def test_damaged_bytes_give_a_whole_picture_or_an_image_error(
    data: bytes, flips: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(data[: len(data) - cut])
    for at, value in flips:
        if damaged:  # the cut may have left nothing
            damaged[at % len(damaged)] = value
    path = saved(tmp_path_factory.getbasetemp(), bytes(damaged), "fuzzed.jpg")
    try:
        size = read_header(path).size
    except ImageError:
        return
    if size[0] * size[1] > 1_000_000:
        return  # legal, and slow to decode a thousand times
    try:
        image = decode(path)
    except ImageError:
        return
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8


@pytest.mark.real_data
def test_real_pictures_agree_with_pillow(real_data: Path) -> None:
    folders = ("bccd/BCCD/JPEGImages", "raccoon/images", "voc_mini/VOCdevkit/VOC2012/JPEGImages")
    for folder in folders:
        for path in sorted((real_data / folder).iterdir())[:20]:
            image = decode(path)
            assert read_header(path).size == image.shape[:2]
            # both decode by libjpeg-turbo, in versions whose rounding may differ
            assert np.abs(image.astype(int) - reference(path.read_bytes())).mean() < 1


# At the size that is wanted


def smooth(height: int, width: int) -> np.ndarray:
    """A picture whose values tell the place, sharp enough that half a pixel's shift shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack(
        [127 + 120 * np.sin(x / 9), 127 + 120 * np.sin(y / 11), 127 + 120 * np.sin((x + y) / 13)], axis=2
    ).astype(np.uint8)


def jpeg(pixels: np.ndarray, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


def half_sized(size: tuple[int, int]) -> tuple[int, int]:
    return round(size[0] * 0.23), round(size[1] * 0.23)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scaled", [False, True])
def test_at_a_size_is_decoded_and_resized(name: str, scaled: bool) -> None:
    data = encoded(name)
    for wanted in ((48, 64), (30, 40), (96, 128)):  # none so small that a JPEG would be reduced
        pixels, size = decode_at(data, lambda _, wanted=wanted: wanted, scaled=scaled)
        assert size == (48, 64)
        np.testing.assert_array_equal(pixels, resized(decode(data), wanted))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("height", "width"), [(400, 600), (401, 603), (407, 601), (399, 607)])
def test_scaled_decoding_puts_everything_where_it_was(height: int, width: int, orientation: int) -> None:
    data = jpeg(smooth(height, width), orientation)
    full, size = decode_at(data, half_sized)
    fast, same = decode_at(data, half_sized, scaled=True)
    assert size == same == read_header(data).size
    assert fast.shape == full.shape == (*half_sized(size), 3)
    inside = (slice(2, -2), slice(2, -2))

    def difference(other: np.ndarray) -> float:
        return float(np.abs(fast[inside].astype(int) - other[inside].astype(int)).mean())

    # Nearer to the full decoding than to the same a quarter of a pixel further, whichever way that is.
    shifts = [cv2.warpAffine(full, np.float32([[1, 0, dx], [0, 1, dy]]), full.shape[1::-1])
              for dx, dy in ((0.25, 0), (-0.25, 0), (0, 0.25), (0, -0.25))]  # fmt: skip
    assert difference(full) < min(map(difference, shifts))
    assert difference(full) < 4


@pytest.mark.parametrize(("side", "wanted", "by"), [(800, 400, 2), (800, 401, 1), (800, 200, 4), (800, 100, 8),
                                                    (800, 20, 8), (799, 400, 2), (797, 400, 1)])  # fmt: skip
def test_a_picture_is_never_reduced_below_what_is_wanted(
    side: int, wanted: int, by: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = images._stored
    seen: list[int] = []

    def watched(data: bytes, header: images.Header, reduced_by: int = 1) -> np.ndarray:
        seen.append(reduced_by)
        return stored(data, header, reduced_by)

    monkeypatch.setattr(images, "_stored", watched)
    pixels, _ = decode_at(jpeg(smooth(side, side)), lambda _: (wanted, wanted), scaled=True)
    assert seen == [by]
    assert pixels.shape == (wanted, wanted, 3)


def test_colours_of_a_reduced_picture_are_those_of_the_whole() -> None:
    for colour in ((250, 10, 10), (10, 250, 10), (10, 10, 250)):
        data = jpeg(np.full((256, 256, 3), colour, np.uint8))
        pixels, _ = decode_at(data, lambda _: (64, 64), scaled=True)
        assert np.abs(pixels.astype(int) - colour).max() <= 4


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_a_cut_picture_is_refused_reduced_too(keep: float) -> None:
    data = jpeg(smooth(400, 400))
    with pytest.raises(ImageError, match="cut short"):
        decode_at(data[: int(len(data) * keep)], lambda _: (50, 50), scaled=True)

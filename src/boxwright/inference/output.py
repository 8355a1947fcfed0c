"""Writes pictures and videos, whole or not at all, under names that never collide. Where prediction ends."""

from __future__ import annotations

import errno
import logging
import unicodedata
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from io import BytesIO
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from av.codec import Codec
from av.codec.codec import UnknownCodecError
from av.container import OutputContainer
from av.error import FFmpegError
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from PIL import Image

from boxwright.types import Size, UInt8, UserError

log = logging.getLogger(__name__)

ENCODERS = ("libx264", "mpeg4")  # the first that there is; PyAV from pip has both

BT709 = 1  # FFmpeg's number for the matrix, the primaries and the transfer curve of ITU-R BT.709 alike


class VideoWriter:
    """Writes an mp4 that every browser plays: H.264, as many frames as it is given, each at its time.

    It stands under its name only when whole: an error in the `with` block leaves nothing. At a side of odd
    length the last pixels are doubled, as H.264 has even sides. `UserError` where disk or encoder fail.

        with VideoWriter(path, video.rate, video.size, clock=video.clock) as writer:
            for frame in video.frames():
                writer.write(frame.image, frame.time)
    """

    def __init__(self, path: Path, rate: Fraction, size: Size, *, clock: Fraction | None = None):
        assert path.suffix == ".mp4"
        self._path, self._rate, self._size = path, rate, size
        self._clock = clock or 1 / rate
        self._part = _part(path)
        self._written = 0

    def __enter__(self) -> Self:
        encoder = _encoder()
        with _disk_errors(self._path):
            # The index goes to the front, so that a browser plays before it has the whole file.
            options = {"movflags": "+faststart"}
            self._part.write_bytes(b"")  # av opens its file at the first frame; a bad folder fails here
            self._container: OutputContainer = av.open(str(self._part), "w", "mp4", container_options=options)
        self._stream = self._add_stream(encoder)
        return self

    def _add_stream(self, encoder: str) -> VideoStream:
        # x264: crf 20 is hardly told from the original; veryfast takes a quarter of the default's time
        options = {"preset": "veryfast", "crf": "20"} if encoder == "libx264" else {"qmin": "2", "qmax": "4"}
        stream = self._container.add_stream(encoder, rate=self._rate, options=options)
        assert isinstance(stream, VideoStream)
        height, width = self._size
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = self._clock
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = ColorRange.MPEG
        return stream

    def write(self, image: UInt8, time: Fraction | None = None) -> None:
        """The next picture (H, W, 3) RGB, shown from `time` seconds on, or evenly at the writer's rate."""
        assert image.shape == (*self._size, 3)
        height, width = self._size
        if height % 2 or width % 2:
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        frame.time_base = self._clock
        frame.pts = round((self._written / self._rate if time is None else time) / self._clock)
        self._written += 1
        self._mux(frame)

    def _mux(self, frame: VideoFrame | None) -> None:
        with _disk_errors(self._path):
            self._container.mux(self._stream.encode(frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            if not self._written:
                raise UserError(f"{self._path}: not written, as there was no frame to write")
            self._mux(None)
            with _disk_errors(self._path):
                self._container.close()
                self._part.replace(self._path)
        except BaseException:
            self._discard()
            raise

    def _discard(self) -> None:
        with suppress(FFmpegError, OSError):
            self._container.close()
        with suppress(OSError):
            self._part.unlink(missing_ok=True)


def _encoder() -> str:
    for name in ENCODERS:
        try:
            Codec(name, "w")
        except UnknownCodecError:
            log.warning("this FFmpeg has no encoder %s; browsers may not play the videos it writes", name)
        else:
            return name
    raise UserError("this FFmpeg encodes neither H.264 nor MPEG-4; reinstall PyAV: pip install av")


def write_image(path: Path, image: UInt8) -> None:
    """Writes a picture (H, W, 3) RGB as JPEG of quality 95 or as PNG, by the suffix; whole or not at all."""
    suffix = path.suffix.lower()
    if suffix not in (".jpg", ".jpeg", ".png"):
        raise UserError(f"{path}: pictures are written as .jpg or .png")
    encoded = BytesIO()
    if suffix == ".png":
        Image.fromarray(image).save(encoded, "PNG")
    else:  # full chroma, as thin coloured lines smear without
        Image.fromarray(image).save(encoded, "JPEG", quality=95, subsampling=0)
    part = _part(path)
    try:
        with _disk_errors(path):
            part.write_bytes(encoded.getvalue())
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """Where a file is written until it is whole: in the same folder, as only there renaming is atomic."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def _disk_errors(path: Path) -> Generator[None]:
    try:
        yield
    except (OSError, FFmpegError) as error:
        mistake = UserError(f"{path}: cannot be written ({error.strerror or error})")
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            mistake.exit_code = 74  # EX_IOERR: the disk's fault rather than the command's
        raise mistake from error


def unique_names(paths: Iterable[Path]) -> dict[Path, str]:
    """A name without suffix for each path's outputs, distinct also where case or Unicode form is ignored.

    The stem where it is free, else with the suffix, the folder or both: `a`, `a_png`, `b_a`, `b_a_png`.
    """
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        if path not in names:
            names[path] = next(name for name in _candidates(path) if _folded(name) not in taken)
            taken.add(_folded(names[path]))
    return names


def _candidates(path: Path) -> Iterator[str]:
    suffix, folder = path.suffix[1:], path.absolute().parent.name
    yield path.stem
    yield f"{path.stem}_{suffix}"
    yield f"{folder}_{path.stem}"
    yield f"{folder}_{path.stem}_{suffix}"
    for number in count(2):
        yield f"{path.stem}_{number}"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def write_text(path: Path, text: str) -> None:
    """A small file, whole under its name or not there."""
    part = _part(path)
    with _disk_errors(path):
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

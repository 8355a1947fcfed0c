"""Opens what is named as input: pictures, folders, videos, cameras, streams. Where prediction starts."""

from __future__ import annotations

import glob
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from fractions import Fraction
from math import lcm
from pathlib import Path
from typing import Literal

import av
import cv2
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from boxwright.data.images import EXTENSIONS
from boxwright.types import Size, UInt8, UserError

log = logging.getLogger(__name__)

Kind = Literal["image", "video", "camera", "stream"]

VIDEO_SUFFIXES = {
    *(".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".wmv", ".flv", ".ogv", ".mpg", ".mpeg"),
    *(".ts", ".m2ts", ".mts", ".h264", ".264", ".h265", ".265"),
}

# FFmpeg's names of the containers read from a file. Playlists (HLS, DASH, concat) and numbered pictures are
# not among them, as they make it open other files and addresses.
CONTAINERS = "mov,mp4,m4a,3gp,matroska,webm,avi,asf,flv,ogg,mpeg,mpegts,mpegvideo,m4v,h264,hevc"

RECONNECT_AFTER = (1, 2, 4, 8, 16)  # seconds

FINEST_CLOCK = 10_000_000  # ticks a second: mp4 counts a frame's ticks in 32 bits, so it may last 200 s


@dataclass(frozen=True)
class Source:
    """One thing to look at: a file's path, a camera's index or a stream's URL as `name`."""

    kind: Kind
    name: str

    @property
    def path(self) -> Path:
        """Of an image or a video file."""
        assert self.kind in ("image", "video")
        return Path(self.name)


def open_input(text: str, *, stream: bool = False) -> list[Source]:
    """What `--input` names: an existing file or folder, a camera's index, a URL (with `stream`), or a glob.

    A folder stands for the pictures and videos directly in it, sorted, hidden ones left out. Whatever exists
    under the name `text` is meant literally. Raises `UserError` where nothing is found.
    """
    path = Path(text).expanduser()
    if text and path.is_dir():
        return _of_folder(path)
    if text and path.exists():
        kind = _kind(path)
        if kind is None:
            raise UserError(f"{text}: neither a picture nor a video")
        return [Source(kind, str(path))]
    if text.isascii() and text.isdigit() and len(text) <= 3:  # no machine has a thousand cameras
        return [Source("camera", text)]
    if re.match(r"(rtsps?|https?)://", text):
        if not stream:
            raise UserError(f"{text}: an address is only read where a stream is asked for; add --stream")
        return [Source("stream", text)]
    return _of_pattern(text, path)


def _of_folder(folder: Path) -> list[Source]:
    sources = _of_files(sorted(p for p in folder.iterdir() if not p.name.startswith(".")))
    if not sources:
        raise UserError(f"{folder}: no picture or video in this folder (folders in it are not searched)")
    return sources


def _of_pattern(text: str, path: Path) -> list[Source]:
    found = sorted(glob.glob(_literal_folders(path), recursive=True)) if text else []  # noqa: PTH207, may be absolute
    sources = _of_files(Path(name) for name in found)
    if sources:
        return sources
    looked_for = Path.cwd() / path
    reason = "matches no picture or video" if glob.has_magic(text) else "no such file or folder"
    nearest = get_close_matches(path.name, _names_in(looked_for.parent), n=1)
    hint = f". Did you mean {path.with_name(nearest[0])}?" if nearest else ""
    raise UserError(f"{text!r}: {reason}; looked for {looked_for} (working directory {Path.cwd()}){hint}")


def _literal_folders(path: Path) -> str:
    """The pattern with what exists of its folders taken literally: `[1]/*.jpg` looks into a folder called `[1]`."""
    there = next((folder for folder in path.parents if folder.is_dir()), None)
    return str(path) if there is None else str(Path(glob.escape(str(there))) / path.relative_to(there))


def _names_in(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir()] if folder.is_dir() else []


def _of_files(paths: Iterable[Path]) -> list[Source]:
    # A broken link stays, to be reported where it is opened; a pipe does not, as opening it may hang.
    files = (path for path in paths if path.is_file() or (path.is_symlink() and not path.exists()))
    return [Source(kind, str(path)) for path in files if (kind := _kind(path))]


def _kind(path: Path) -> Literal["image", "video"] | None:
    """By the file's first bytes or, where they tell nothing, by its suffix."""
    head = _head(path)
    if _is_picture(head):
        return "image"
    if _is_video(head):
        return "video"
    suffix = path.suffix.lower()
    return "image" if suffix in EXTENSIONS else "video" if suffix in VIDEO_SUFFIXES else None


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(256)
    except OSError:
        return b""


def _is_picture(head: bytes) -> bool:
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
    riff = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    heif = head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
    return head.startswith(starts) or riff or heif


def _is_video(head: bytes) -> bool:
    starts = (
        b"\x1a\x45\xdf\xa3",  # Matroska, WebM
        b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF: wmv
        b"FLV\x01",
        b"OggS",
        b"\0\0\x01",  # MPEG program stream, or MPEG-4, H.264 and H.265 without a container
        b"\0\0\0\x01",
    )
    riff = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    boxes = head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")  # ISO/IEC 14496-12: mp4, mov
    packets = head[:1] == head[188:189] == b"G" or head[4:5] == head[196:197] == b"G"  # MPEG transport stream
    return head.startswith(starts) or riff or boxes or packets


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a video."""

    image: UInt8  # (H, W, 3) RGB
    time: Fraction  # seconds since the first frame, rising


@dataclass(eq=False)
class Video:
    """A video that can be read from its start, once or again."""

    name: str
    size: Size  # as shown, after rotation
    rate: Fraction  # frames a second, on average where they are not evenly spaced
    clock: Fraction  # seconds: every frame's time is a multiple of it
    frames_estimate: int | None  # what the file says, not what is in it
    rotation: int  # degrees counter-clockwise by which its frames are turned to be shown: 0, 90, 180 or 270
    _read: Callable[[Video], Iterator[Frame]] = field(repr=False)
    lost: int = 0  # frames missing or damaged, as far as it has been read

    def frames(self) -> Iterator[Frame]:
        """Its frames in the order shown; what cannot be decoded is left out and counted in `lost`."""
        self.lost = 0
        return self._read(self)


def read_video(source: Source | Path) -> Video:
    """A video file, camera or stream, ready to be read; `UserError` where not one frame can be decoded."""
    if isinstance(source, Path):
        return _read_file(source)
    if source.kind == "camera":
        return _read_camera(int(source.name))
    if source.kind == "stream":
        return _read_stream(source.name)
    return _read_file(source.path)


def _read_file(path: Path) -> Video:
    _refuse_other_files(path)

    def start() -> InputContainer:
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        return av.open(f"file:{path.absolute()}", container_options=options)

    def read(video: Video) -> Iterator[Frame]:
        with start() as container:
            yield from _decode(container, video, _Timeline(video))

    try:
        return _probe(start, str(path), read)
    except FFmpegError as error:
        if _lacks_index(path):
            raise UserError(
                f"{path}: the video's index (moov) is missing, as when a recording or a copy is cut short;"
                " copy it again, or mend it with untrunc"
            ) from error
        raise UserError(f"{path}: no video stream can be read ({error.strerror})") from error


def _refuse_other_files(path: Path) -> None:
    """A file that does not begin as videos do, say a playlist named .mp4, never reaches FFmpeg."""
    try:
        empty = path.stat().st_size == 0
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    head = _head(path)
    if empty:
        raise UserError(f"{path}: no video stream, the file is empty")
    if not _is_video(head):
        text = head.isascii() and b"\0" not in head
        raise UserError(f"{path}: no video stream, the file is {'text' if text else 'no known kind of video'}")


def _lacks_index(path: Path) -> bool:
    """Whether an mp4 or mov has pictures but no `moov` box, without which they cannot be found."""
    names: set[bytes] = set()
    end = path.stat().st_size
    at = 0
    with path.open("rb") as file:
        while at + 8 <= end:
            file.seek(at)
            header = file.read(16)
            names.add(header[4:8])
            size = int.from_bytes(header[:4], "big")
            if size == 1:  # the size follows, in 64 bits
                size = int.from_bytes(header[8:16], "big")
            if size < 8:  # 0: to the end of the file
                break
            at += size
    return b"mdat" in names and b"moov" not in names


def _read_stream(url: str) -> Video:
    def start() -> InputContainer:
        protocols = "rtsp,rtsps,rtp,udp,tcp,tls,http,https,crypto"
        options = {"protocol_whitelist": protocols, "rtsp_transport": "tcp"}
        return av.open(url, container_options=options, timeout=10)

    def read(video: Video) -> Iterator[Frame]:
        timeline = _Timeline(video)
        waits = iter(RECONNECT_AFTER)
        while True:
            try:
                with start() as container:
                    for frame in _decode(container, video, timeline, live=True):
                        waits = iter(RECONNECT_AFTER)
                        yield frame
                return
            except FFmpegError as error:
                video.lost += 1
                wait = next(waits, None)
                if wait is None:
                    log.warning("%s: given up (%s)", url, error.strerror)
                    return
                log.warning("%s: interrupted (%s), connecting again in %d s", url, error.strerror, wait)
                time.sleep(wait)
                timeline.resume()

    try:
        return _probe(start, url, read)
    except FFmpegError as error:
        raise UserError(f"{url}: the stream cannot be read ({error.strerror})") from error


def _read_camera(index: int) -> Video:
    def start() -> cv2.VideoCapture:
        camera = cv2.VideoCapture(index)
        if not camera.isOpened():
            raise UserError(f"camera {index}: not found; plug it in, or give another index, from 0")
        return camera

    def read(video: Video) -> Iterator[Frame]:
        camera = start()
        timeline = _Timeline(video)
        try:
            while True:
                arrived, image = camera.read()
                if not arrived:  # a camera has no end: it was unplugged
                    video.lost += 1
                    return
                now = Fraction(time.monotonic_ns(), 10**9)
                yield Frame(np.ascontiguousarray(image[..., ::-1], np.uint8), timeline.at(now, video.clock))
        finally:
            camera.release()

    camera = start()
    arrived, image = camera.read()
    rate = Fraction(camera.get(cv2.CAP_PROP_FPS)).limit_denominator(1001)
    camera.release()
    if not arrived:
        raise UserError(f"camera {index}: gives no picture; is another program using it?")
    rate = rate if 1 <= rate <= 1000 else Fraction(30)
    return Video(f"camera {index}", image.shape[:2], rate, Fraction(1, 90_000), None, 0, read)


def _probe(start: Callable[[], InputContainer], name: str, read: Callable[[Video], Iterator[Frame]]) -> Video:
    """Decodes one frame, as only that tells rotation and size, and so refuses what cannot be read."""
    with start() as container:
        stream = _video_stream(container)
        if stream is None:
            raise UserError(f"{name}: no video stream")
        for packet in _demux(container, stream):
            with suppress(FFmpegError):
                for frame in packet.decode() if packet else ():
                    assert isinstance(frame, VideoFrame)
                    rotation = round(frame.rotation / 90) * 90 % 360
                    size = (frame.height, frame.width) if rotation % 180 == 0 else (frame.width, frame.height)
                    rate = _rate(stream)
                    clock = _clock(rate, _tick(stream))
                    return Video(name, size, rate, clock, _estimate(container, stream), rotation, read)
    raise UserError(f"{name}: no frame of this video can be decoded")


def _video_stream(container: InputContainer) -> VideoStream | None:
    """The container's largest video; the cover of an audio file is none."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        return None
    largest = max(streams, key=lambda stream: stream.width * stream.height)
    largest.thread_type = "AUTO"
    return largest


def _rate(stream: VideoStream) -> Fraction:
    rates = (stream.average_rate, stream.guessed_rate, stream.base_rate)
    return next((Fraction(rate) for rate in rates if rate and 0 < rate <= 1000), Fraction(25))


def _tick(stream: VideoStream) -> Fraction:
    assert stream.time_base is not None
    return stream.time_base


def _clock(rate: Fraction, tick: Fraction) -> Fraction:
    """The coarsest clock that shows the source's ticks and its evenly spaced frames alike."""
    finest = lcm(rate.numerator, tick.denominator)
    return Fraction(1, finest if finest <= FINEST_CLOCK else 1_000_000)


def _estimate(container: InputContainer, stream: VideoStream) -> int | None:
    """How many frames the file says it has, unless it cannot be so (there are files that say -2**54)."""
    said = stream.frames
    if said <= 0 and container.duration:
        said = round(Fraction(container.duration, av.time_base) * _rate(stream))
    return _plausible(container, said) or None


def _plausible(container: InputContainer, frames: int) -> int:
    return frames if 0 < frames <= container.size // 8 else 0  # a frame takes eight bytes at least


def _decode(container: InputContainer, video: Video, timeline: _Timeline, *, live: bool = False) -> Iterator[Frame]:
    stream = _video_stream(container)
    assert stream is not None
    tick = _tick(stream)
    seen = 0  # frames accounted for, decoded or not
    end = Fraction(0)  # seconds, of the last packet, on the source's clock
    for packet in _demux(container, stream, live=live):
        if packet is None:
            video.lost += 1
            continue
        if packet.pts is not None:
            end = max(end, (packet.pts + (packet.duration or 0)) * tick)
        try:
            frames = packet.decode()
        except FFmpegError:
            video.lost += 1
            seen += 1
            continue
        seen += len(frames) + packet.is_discard  # an edit list hides frames: decoded, never shown
        for frame in frames:
            assert isinstance(frame, VideoFrame)
            video.lost += frame.is_corrupt  # the decoder patched its damage over
            stamp = None if frame.pts is None else frame.pts * tick
            yield Frame(_show(frame, video), timeline.at(stamp, tick))
    if not live:
        video.lost += _cut_off(container, stream, seen, end)


def _demux(container: InputContainer, stream: VideoStream, *, live: bool = False) -> Iterator[Packet | None]:
    """The stream's packets; for one that cannot be read `None` or, `live`, the error: the sender is gone."""
    packets = container.demux(stream)
    failures = 0  # in a row
    while failures < 10:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except FFmpegError:
            if live:
                raise
            failures += 1
            packets = container.demux(stream)
            yield None
        else:
            failures = 0
            yield packet


def _cut_off(container: InputContainer, stream: VideoStream, seen: int, end: Fraction) -> int:
    """How many frames the file promised beyond those found in it."""
    if stream.frames > 0:
        return max(0, _plausible(container, stream.frames) - seen)
    if container.duration and len(container.streams) == 1:  # where there is sound, that may be the longer
        gap = Fraction(container.duration + (container.start_time or 0), av.time_base) - end
        return round(gap * _rate(stream)) if gap > 1 else 0
    return 0


def _show(frame: VideoFrame, video: Video) -> UInt8:
    """The frame as it is shown: turned and, where the size changes midway, fitted between black bars."""
    image = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)  # (H, W, 3)
    if video.rotation:
        image = np.ascontiguousarray(np.rot90(image, video.rotation // 90))
    if image.shape[:2] == video.size:
        return image
    height, width = video.size
    scale = min(height / image.shape[0], width / image.shape[1])
    fitted = (max(1, round(image.shape[0] * scale)), max(1, round(image.shape[1] * scale)))
    top, left = (height - fitted[0]) // 2, (width - fitted[1]) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    resized = cv2.resize(image, fitted[::-1], interpolation=cv2.INTER_AREA)
    canvas[top : top + fitted[0], left : left + fitted[1]] = resized
    return canvas


class _Timeline:
    """Turns a source's timestamps into seconds since its first frame, rising even where they jump back."""

    def __init__(self, video: Video):
        self._rate, self._clock = video.rate, video.clock
        self._last = -1 / video.rate
        self._start: Fraction | None = None  # on the source's clock

    def at(self, stamp: Fraction | None, tick: Fraction) -> Fraction:
        """Seconds of the frame stamped so; up to a `tick` beside an even spacing is rounding, and undone."""
        time = self._last + 1 / self._rate
        if stamp is not None:
            if self._start is None:
                self._start = stamp - time
            time = stamp - self._start
            even = round(time * self._rate) / self._rate
            time = even if abs(even - time) <= tick else time
        self._last = max(round(time / self._clock) * self._clock, self._last + self._clock)
        return self._last

    def resume(self) -> None:
        """The source began anew: its next frame follows the last one."""
        self._start = None

"""Decoded pictures kept beside the dataset's files: between the loader and the decoder, for all processes of a machine.

    <root>/<set>/             one for each dataset and size; <root> is ~/.cache/boxwright/pictures, or in /dev/shm
    ├── in-use                locked by whoever uses the set, so that nobody clears it away
    ├── claims                8 bytes for each picture: what it takes; their sum is what the set takes
    └── 3f/3fa1...e0          a picture: 64 bytes of header, its pixels

A picture is decoded by whoever needs it first, written under another name and given its own: it is there whole or not
at all, whenever a process is killed. What is read is checked against the header's sums, and decoded anew where they do
not agree; what nobody here wrote is decoded over likewise. There is no pickle in it. A set is as large as it may become
and then stays as it is; no picture is ever taken out, as another process may be reading it.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import stat
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from boxwright.download import HEADROOM, cache_folder, readable_size
from boxwright.types import Member, Size, UInt8, UserError

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)

Kind = Literal["off", "memory", "disk"]
Source = Path | Member

_HEAD = struct.Struct("<8s16s2IQ24x")  # magic, key, height, width, sums: 64 bytes
_MAGIC = b"bxwpix1\n"
_LANES = 512  # 8-byte words in a row of the sums
_CLAIM = struct.Struct("<q")
_NO_MORE = 1 << 62  # a claim so large that nobody adds anything after it


@dataclass
class Counts:
    """What a process saw of its cache."""

    hits: int = 0
    misses: int = 0
    damaged: int = 0


class Cache:
    """A set of decoded pictures; copies of it in other processes work on the same files."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self.folder, self.capacity = folder, capacity  # bytes
        self.counts = Counts()
        self._claimed = self._seen = 0  # bytes claimed as far as `claims` was read, and how far that was
        self._closed = False

    def get(self, source: Source, form: str, size: Size, make: Callable[[], UInt8]) -> UInt8:
        """The pixels (H, W, 3) of a picture in a form, such as "whole", that has `size`: kept ones, else `make`'s.

        Pixels of another size are given back but not kept. A picture that cannot be looked up is made, and raises what
        `make` raises.
        """
        try:
            key = _key(source, form)
        except (OSError, ValueError):
            return make()
        path = self.folder / key.hex()[:2] / key.hex()
        kept = self._read(path, key, size)
        if kept is not None:
            self.counts.hits += 1
            return kept
        self.counts.misses += 1
        pixels = make()
        if pixels.shape == (*size, 3):
            self._add(path, key, pixels)
        return pixels

    def _read(self, path: Path, key: bytes, size: Size) -> UInt8 | None:
        wanted = _HEAD.size + size[0] * size[1] * 3
        try:
            with path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if stat.S_ISREG(status.st_mode) and status.st_size == wanted:
                    data = np.empty(wanted, np.uint8)
                    if file.readinto(data.data) == wanted:
                        head, pixels = data[: _HEAD.size].tobytes(), data[_HEAD.size :]
                        if head == _HEAD.pack(_MAGIC, key, *size, _sums(pixels)):
                            return pixels.reshape(*size, 3)
        except FileNotFoundError:
            return None
        except OSError as error:
            log.debug("%s: %s", path, error)
        self.counts.damaged += 1
        if self.counts.damaged == 1:
            log.warning("%s is no picture that this cache wrote, or is damaged; such are decoded anew", path)
        with suppress(OSError):
            path.unlink()
        return None

    def _add(self, path: Path, key: bytes, pixels: UInt8) -> None:
        if self._closed:
            return
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        pixels = np.ascontiguousarray(pixels)
        try:
            if self._claim(_HEAD.size + pixels.nbytes) + _HEAD.size + pixels.nbytes > self.capacity:
                self._closed = True
                return
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb", buffering=0) as file:
                file.write(_HEAD.pack(_MAGIC, key, *pixels.shape[:2], _sums(pixels.reshape(-1))))
                written = file.write(pixels.data)
            if written < pixels.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            temporary.replace(path)
        except OSError as error:
            self._closed = True
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            claimed = 0
            with suppress(OSError):
                claimed = self._claim(_NO_MORE)
            if claimed < _NO_MORE:  # otherwise another process has said so
                log.warning("the cache %s takes no more: %s. Going on without", self.folder, error.strerror or error)

    def _claim(self, size: int) -> int:
        """Claim so many bytes; how many were claimed before.

        All processes append to one file, which the system does one after the other, and add up what stands before
        their own claim: no lock is held by a process that may be killed.
        """
        with (self.folder / "claims").open("a+b", buffering=0) as file:
            file.write(_CLAIM.pack(size))
            end = file.tell()
            file.seek(self._seen)
            data = file.read(end - self._seen) or b""
        if len(data) != end - self._seen or len(data) % _CLAIM.size:  # not ours
            return _NO_MORE
        self._claimed += sum(claim for (claim,) in _CLAIM.iter_unpack(data))
        self._seen = end
        return self._claimed - size


def _key(source: Source, form: str) -> bytes:
    """16 bytes that are others when the picture's file is another, or has been written to since."""
    if isinstance(source, Member):
        known = (source.shard.sha256, source.offset, source.length)
    else:
        status = source.stat()
        # The time of the last change of the file's entry cannot be set back, as cp -p and touch do with that of its
        # bytes: so a file need not be read to know that it is the same.
        known = (os.path.abspath(source), status.st_size, status.st_mtime_ns, status.st_ctime_ns)  # noqa: PTH100
    return hashlib.blake2b(repr((known, form)).encode(errors="surrogatepass"), digest_size=16).digest()


def _sums(data: UInt8) -> int:
    """64 bits that change when bytes do: sums over rows and over columns of words, ten times faster than a CRC."""
    words = data[: data.size // 8 * 8].view(np.uint64)
    table = words[: words.size // _LANES * _LANES].reshape(-1, _LANES)
    parts = (table.sum(0), table.sum(1), words[table.size :], data[words.size * 8 :])
    digest = zlib.crc32(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    return digest << 32 | zlib.crc32(data.size.to_bytes(8, "little"), digest)


# --- sets of pictures on a disk or in memory


@contextmanager
def opened(
    kind: Kind, capacity: float | None, name: str, needed: int, say: Callable[[str], None] = lambda _: None
) -> Generator[Cache | None]:
    """The set called `name`, of at most `capacity` bytes, while it is used; None where `kind` is off or nothing can be
    written, which is said.

    `capacity` None is half of what is free. `needed` bytes would hold all pictures. Sets of other names that nobody
    uses make room for it, those unused for longest first; one in memory is cleared away by the last that uses it.
    """
    if kind == "off":
        yield None
        return
    root = _root(kind)
    try:
        handle, folder = _take(root, name)
    except OSError as error:
        say(f"no cache of pictures: cannot write into {root}: {error.strerror or error}. Going on without")
        yield None
        return
    try:
        cache = Cache(folder, _clear_room(root, folder, capacity, needed, everything=kind == "memory"))
        _rebuild(cache, handle)
        what = "in memory" if kind == "memory" else f"in {folder}"
        share = "" if cache.capacity >= needed else f" of the {readable_size(needed)} that all pictures would take"
        say(f"decoded pictures are kept {what}, at most {readable_size(min(cache.capacity, needed))}{share}")
        yield cache
    finally:
        if kind == "memory" and _alone(handle):
            shutil.rmtree(folder, ignore_errors=True)
        _close(handle)


def _root(kind: Kind) -> Path:
    if kind == "disk":
        return cache_folder() / "pictures"
    shared = Path("/dev/shm")
    if not shared.is_dir():
        raise UserError("--cache memory needs /dev/shm, which only Linux has. Use --cache disk")
    return shared / f"boxwright-pictures-{os.getuid() if sys.platform != 'win32' else 0}"


def _take(root: Path, name: str) -> tuple[int, Path]:
    """Make the set if it is not there, and hold it against being cleared away."""
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = root.lstat()
    if not stat.S_ISDIR(status.st_mode) or (sys.platform != "win32" and status.st_uid != os.getuid()):
        raise PermissionError(13, "it is somebody else's")
    folder = root / hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=10).hexdigest()
    while True:
        folder.mkdir(exist_ok=True, mode=0o700)
        handle = os.open(folder / "in-use", os.O_RDWR | os.O_CREAT, 0o600)
        if sys.platform == "win32":
            break
        fcntl.flock(handle, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            if (folder / "in-use").stat().st_ino == os.fstat(handle).st_ino:
                break
        os.close(handle)  # it was cleared away while we waited
    os.utime(folder / "in-use")
    with tempfile.TemporaryFile(dir=folder) as probe:
        probe.write(b"\0" * 4096)
        probe.flush()
    return handle, folder


def _alone(handle: int) -> bool:
    """Whether nobody else uses the set; from then on nobody else can."""
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _close(handle: int) -> None:
    with suppress(OSError):
        os.close(handle)


def _clear_room(root: Path, folder: Path, capacity: float | None, needed: int, *, everything: bool) -> int:
    """Bytes that the set may take, after others that nobody uses have made room; `everything`: all of those."""
    others: list[tuple[float, Path, int]] = []
    for other in root.iterdir():
        with suppress(OSError):
            if other != folder and other.is_dir() and not other.is_symlink() and len(other.name) == 20:
                others.append(((other / "in-use").stat().st_mtime, other, _taken(other)))
    mine, theirs = _taken(folder), sum(size for _, _, size in others)

    def limit() -> int:
        free = max(shutil.disk_usage(root).free - HEADROOM, 0) + mine
        return min(free // 2 if capacity is None else max(int(capacity) - theirs, 0), free)

    for _, oldest, size in sorted(others):
        if not everything and limit() >= needed:
            break
        if _clear(oldest):
            theirs -= size
    return limit()


def _clear(folder: Path) -> bool:
    """Remove a set that nobody uses; whether that was so."""
    with suppress(OSError):
        handle = os.open(folder / "in-use", os.O_RDWR)
        try:
            if _alone(handle):
                shutil.rmtree(folder, ignore_errors=True)
                return True
        finally:
            _close(handle)
    return False


def _taken(folder: Path) -> int:
    """Bytes of the pictures in a set."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118
    return total


def _rebuild(cache: Cache, handle: int) -> None:
    """Let what is there be what is claimed: where nobody else is at it, as a process that was killed may have left
    claims without a picture and pictures without a name."""
    if not _alone(handle):
        return
    for path in cache.folder.glob("??/*.*"):
        path.unlink(missing_ok=True)
    (cache.folder / "claims").write_bytes(_CLAIM.pack(_taken(cache.folder)))
    if sys.platform != "win32":
        fcntl.flock(handle, fcntl.LOCK_SH)


def room_for(sizes: Iterable[Size]) -> int:
    """Bytes that pictures of these sizes take."""
    return sum(_HEAD.size + height * width * 3 for height, width in sizes)

"""The bytes of a picture in a shard, wherever the shard is: on the disk by its offset, or behind an address.

An address is https, or http on this machine. A member is one request for its range of bytes on a connection that stays
open; from a server that knows no ranges a shard is fetched whole into the cache folder, once.
"""

from __future__ import annotations

import atexit
import http.client
import ipaddress
import os
import ssl
import threading
import time
import weakref
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from boxwright.data.feeding import ReadingError
from boxwright.download import (
    TIMEOUT,
    File,
    PlainConnection,
    RefusedError,
    SecureConnection,
    SlowError,
    cache_folder,
    fetch,
    parsed,
    redirected,
    stated_length,
)
from boxwright.types import Member, Shard, UserError

PAUSES = (0.5, 1.0, 2.0)  # seconds before each further try
REDIRECTS = 3
CHUNK = 1 << 18  # bytes


class DamagedError(Exception):
    """Why the bytes of a member cannot be used."""


def read(member: Member) -> bytes:
    """The member's bytes, which are those that the index of its shard describes.

    Raises `DamagedError` where they are not, `ReadingError` where a server does not give them.
    """
    data = _fetched(member) if is_address(member.shard.place) else _cut_out(Path(member.shard.place), member)
    if zlib.crc32(data) != member.crc32:
        raise DamagedError("is not what the index says: the shard is damaged, or another one")
    return data


def is_address(text: str) -> bool:
    """Whether a text names something on a server."""
    return text.lower().startswith(("http://", "https://"))


def require_allowed(address: str) -> None:
    """Raise `UserError` for an address that is not safe to read from."""
    with suppress(ValueError):
        parts = urlsplit(address)
        if parts.username or parts.password or parts.query or parts.fragment:
            end = "ends in a path, without user, password, ? or #"
            raise UserError(f"an address of data {end}: {parts.scheme}://{(parts.hostname or '')[:200]}/…")
    if any(ord(letter) <= 32 for letter in address):
        raise UserError(f"{address[:200]!r} is no address")
    try:
        parts = parsed(address)
    except RefusedError as error:
        raise UserError(str(error)) from None
    if not parts.hostname:
        raise UserError(f"{address[:200]!r} is no address")
    if not _is_safe(parts):
        raise UserError(f"{address}: only https is allowed, and http on this machine")


def save(address: str, path: Path, largest: int) -> bool:
    """Write a whole file of at most `largest` bytes, piece by piece; False where the server has no such file.

    Raises `ReadingError` where the server does not give it, `UserError` where the disk does not take it; then, and
    where there is no such file, what is at `path` is no whole file.
    """
    status, _ = _ask(address, {}, largest, path)
    return status == 200


# --- on the disk


def _cut_out(path: Path, member: Member) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(member.offset)
            data = file.read(member.length)
            while len(data) < member.length and (more := file.read(member.length - len(data))):
                data += more
    except OSError as error:
        raise DamagedError(f"cannot be read: {error.strerror or error}") from None
    if len(data) < member.length:
        raise DamagedError("is cut short: its shard ends before it")
    return data


# --- behind an address


def _fetched(member: Member) -> bytes:
    shard = member.shard
    if shard.place not in _without_ranges:
        last = member.offset + member.length - 1
        status, data = _ask(shard.place, {"Range": f"bytes={member.offset}-{last}"}, member.length)
        if status == 206:
            return data
        if status == 404:
            raise ReadingError(f"{shard.place} is not there: the server answers 404. Is the address right?")
        _without_ranges.add(shard.place)
    return _cut_out(_whole(shard), member)


_without_ranges: set[str] = set()


@lru_cache(maxsize=4096)  # its hash is checked once a process
def _whole(shard: Shard) -> Path:
    name = shard.place.rpartition("/")[2]
    try:
        return fetch(
            File(name, shard.place, shard.sha256, shard.size), cache=cache_folder() / "shards" / shard.sha256[:16]
        )
    except UserError as error:
        raise ReadingError(f"the shard {shard.place} cannot be had: {error}") from None


class _Connection:
    """A connection that is closed with the thread or the process that it belongs to."""

    def __init__(self, parts: SplitResult) -> None:
        kind = SecureConnection if parts.scheme == "https" else PlainConnection
        self.http = kind(parts.netloc, timeout=TIMEOUT)
        _open.add(self)

    def close(self) -> None:
        self.http.close()

    def __del__(self) -> None:
        if hasattr(self, "http"):  # else it was never made
            self.close()


_open = weakref.WeakSet[_Connection]()


@atexit.register
def _close_all() -> None:
    for connection in list(_open):
        connection.close()


class _Here(threading.local):
    """The open connections of a thread; another process that was forked from this one has none."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.connections: dict[tuple[str, str], _Connection] = {}

    def connection(self, parts: SplitResult) -> http.client.HTTPConnection:
        if self.owner != os.getpid():
            self.__init__()
        where = (parts.scheme, parts.netloc)
        if where not in self.connections:
            self.connections[where] = _Connection(parts)
        return self.connections[where].http

    def drop(self, parts: SplitResult) -> None:
        if found := self.connections.pop((parts.scheme, parts.netloc), None):
            found.close()


_here = _Here()


def _ask(address: str, headers: dict[str, str], largest: int, path: Path | None = None) -> tuple[int, bytes]:
    """Status 200, 206 or 404 and the body, of 206 alone where a range is asked for; tried again where that may help.

    With a `path` the body goes there.
    """
    reason = ""
    for pause in (0.0, *PAUSES):
        time.sleep(pause)
        try:
            return _ask_once(address, headers, largest, path)
        except (RefusedError, SlowError) as error:
            reason = str(error)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, ssl.SSLCertVerificationError):
                reason = str(error)
                break
            reason = str(getattr(error, "strerror", None) or error or type(error).__name__)
    raise ReadingError(
        f"{address} cannot be read: {reason}. Does the server answer? Mend that and go on with --resume, or copy the "
        "shards to this machine"
    )


def _ask_once(address: str, headers: dict[str, str], largest: int, path: Path | None) -> tuple[int, bytes]:
    for _ in range(REDIRECTS + 1):
        parts = parsed(address)
        connection = _here.connection(parts)
        keep = False
        try:
            connection.request(
                "GET",
                parts.path + (f"?{parts.query}" if parts.query else ""),
                headers={"User-Agent": "boxwright", "Accept-Encoding": "identity", **headers},
            )
            answer = connection.getresponse()
            status = answer.status
            if status in (301, 302, 303, 307, 308):
                target = redirected(address, answer.headers.get("Location", ""))
                if not _may_follow(parts, parsed(target)):
                    raise RefusedError(f"redirected to {target[:200]}: only https is allowed")
                address = target
                continue
            if status == 404 or (status == 200 and headers):
                return status, b""
            if status not in (200, 206):
                kind = ConnectionError if status in (408, 425, 429) or status >= 500 else RefusedError
                raise kind(f"the server answers {status} {answer.reason}")
            data = _range(answer, headers["Range"], largest) if headers else _all(answer, largest, path)
            keep = not answer.will_close
            return status, data
        finally:
            if not keep:
                _here.drop(parts)
    raise RefusedError(f"redirected more than {REDIRECTS} times")


def _range(answer: http.client.HTTPResponse, wanted: str, length: int) -> bytes:
    """Exactly the bytes that were asked for."""
    span = wanted.removeprefix("bytes=")
    if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {span}/"):
        raise ConnectionError("the server sent another range than was asked for")
    data = bytearray()
    if _received(answer, length, data.extend) != length:
        raise ConnectionError("the server sent another range than was asked for")
    return bytes(data)


def _all(answer: http.client.HTTPResponse, largest: int, path: Path | None) -> bytes:
    """All of an answer, which goes to `path` where there is one."""
    length = stated_length(answer.headers)
    if (length or 0) > largest:
        raise RefusedError(f"it has {length} bytes, more than the {largest} that are read")
    data = bytearray()
    if path is None:
        count = _received(answer, largest, data.extend)
    else:
        with _Written(path) as file:
            count = _received(answer, largest, file.add)
    if count > largest:
        raise RefusedError(f"it has more than the {largest} bytes that are read")
    if length is not None and length != count:
        raise ConnectionError(f"the connection closed after {count} of {length} bytes")
    return bytes(data)


def _received(answer: http.client.HTTPResponse, largest: int, take: Callable[[bytes], object]) -> int:
    """How many bytes came and were taken, no more than one piece beyond `largest`."""
    count = 0
    while count <= largest and (piece := answer.read1(CHUNK)):
        count += len(piece)
        take(piece)
    if count <= largest and not answer.length:
        answer.read()  # nothing more: then the connection can be used again
    return count


class _Written:
    """A file that is written anew; that the disk does not take it is not the server's fault."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise self._refusal(error) from None

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        except OSError as error:
            raise self._refusal(error) from None

    def add(self, piece: bytes) -> None:
        try:
            self._file.write(piece)
        except OSError as error:
            raise self._refusal(error) from None

    def _refusal(self, error: OSError) -> UserError:
        folder = self._path.parent
        return UserError(f"cannot write into {folder}: {error.strerror}. Set BOXWRIGHT_CACHE to a folder with room")


def _is_safe(parts: SplitResult) -> bool:
    return parts.scheme == "https" or (parts.scheme == "http" and _is_this_machine(parts.hostname or ""))


def _may_follow(parts: SplitResult, target: SplitResult) -> bool:
    if target.scheme == "https":
        return True
    return _is_safe(target) and _is_this_machine(parts.hostname or "")


def _is_this_machine(host: str) -> bool:
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False

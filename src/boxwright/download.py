"""Published files onto the disk: whole and checked, resumed where they were cut off, never half.

cache/mae_pretrain_vit_base.pth           the file, whole and checked
cache/mae_pretrain_vit_base.pth.sha256    its hash as found, in the form of sha256sum
cache/mae_pretrain_vit_base.pth.part      a download that was cut off; the next one goes on from it
cache/mae_pretrain_vit_base.pth.lock      held while a process downloads
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import ipaddress
import logging
import os
import re
import shutil
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from boxwright.errors import UserError
from boxwright.progress import Progress

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger(__name__)

Report = Callable[[int, int | None], None]  # bytes here so far, bytes in all where known

CHUNK = 1 << 18  # bytes
LARGEST = 16 << 30  # bytes that a server may send where neither it nor the table says how many
TIMEOUT = 30  # seconds without a byte
SLOWEST = 1000  # bytes a second, on average over the seconds of TIMEOUT
LARGEST_HEAD = 1 << 20  # bytes before the body of an answer
LONGEST_HOST = 253  # letters
PAUSES = (0.5, 2.0)  # seconds before each further try, where the last one brought nothing new
HEADROOM = 64 << 20  # bytes to leave free on the disk


def cache_folder() -> Path:
    """$BOXWRIGHT_CACHE, or the platform's folder for what can be had again."""
    if chosen := os.environ.get("BOXWRIGHT_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
        return Path(local) / "boxwright" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "boxwright"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "boxwright"


@dataclass(frozen=True)
class File:
    """One published file, and all that is known to check it by."""

    name: str  # for a person
    url: str
    sha256: str | None  # whole, or the beginning that its authors publish; None: the one found first is remembered
    size: int | None  # bytes; None where not published
    way_out: str = field(default="", kw_only=True)  # what else to do where it cannot be had
    mirrors: tuple[str, ...] = field(default=(), kw_only=True)  # asked in turn where `url` fails; of the same file name


def fetch(
    wanted: File,
    *,
    cache: Path | None = None,
    progress: Report | None = None,
    offline: bool | None = None,
) -> Path:
    """The file in `cache`, downloaded if it is not there, its size and hash checked each time.

    `offline` (None: whether BOXWRIGHT_OFFLINE is set) refuses to download. Raises UserError, with the ways
    out, where the file cannot be had or is not the published one.
    """
    if offline is None:
        offline = os.environ.get("BOXWRIGHT_OFFLINE", "0") not in ("", "0")
    target = (cache or cache_folder()) / _file_name(wanted)
    what, way_out = "download", f"put the file at {target}"
    try:
        if target.is_file():
            what, way_out = f"use {target} as", "delete it and run again"
            _require_published(wanted, target, _beside(target, "sha256"))
        elif offline:
            raise RefusedError("BOXWRIGHT_OFFLINE forbids it")
        elif not all(_is_https(url) or _is_loopback(url) for url in (wanted.url, *wanted.mirrors)):
            raise RefusedError("only https is allowed")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(_beside(target, "lock")):
                if not target.is_file():  # another process may have brought it while this one waited
                    _download_from_any(wanted, target, progress)
    except (RefusedError, OSError, http.client.HTTPException) as error:
        ways = ", or ".join(way for way in (wanted.way_out, way_out) if way)
        servers = " or ".join((wanted.url, *wanted.mirrors))
        raise UserError(f"cannot {what} {wanted.name} from {servers}: {_reason(error)}; {ways}") from error
    return target


def check(wanted: File, file: Path) -> None:
    """Raise UserError where `file`, which nothing is written beside, is not the published one."""
    try:
        _hash(wanted, file, wanted.sha256 or "", "published")
    except (RefusedError, OSError) as error:
        ways = f"; {wanted.way_out}" if wanted.way_out else ""
        raise UserError(f"{file} is not the published {wanted.name}: {_reason(error)}{ways}") from error


def told(wanted: File, say: Callable[[str], None], *, terms: str = "") -> Report:
    """A `progress` for `fetch` that says what comes, how large it is, under which terms, from where, how far it is."""
    began: list[Progress] = []

    def report(done: int, total: int | None) -> None:
        if not began:
            size = wanted.size or total
            known = ", ".join(word for word in (f"{size / 1e6:.0f} MB" if size else "", terms) if word)
            say(f"downloading {wanted.name}{known and f' ({known})'} from {wanted.url}")
            began.append(Progress("kB", total and total // 1000, say))
        began[0](done // 1000)

    return report


def readable_size(count: int) -> str:
    """Bytes in the largest unit that fits."""
    for unit, word in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {word}"
    return f"{count} bytes"


class RefusedError(Exception):
    """Wrong in a way that another try would not mend."""


class SlowError(TimeoutError):
    """A server sends, but so little that it would not end."""


def parsed(address: str) -> SplitResult:
    """The parts of an address, all of ASCII letters as they go to a server; raises `RefusedError` where it is none."""
    shown = address[:200]
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
        if ":" in host:
            ipaddress.IPv6Address(host)
            if not re.fullmatch(r"\[[^\]]*\](:\d*)?", parts.netloc.rpartition("@")[2]):
                raise ValueError("something follows the address in [ ]")
            name = f"[{host}]"
        else:
            if len(host) > LONGEST_HOST or re.search(r"[\s\0-\x20\x7f]", host):
                raise ValueError("the name of its host cannot be")
            name = host.encode("idna").decode("ascii")
    except UnicodeError:  # a ValueError too, whose text explains a codec
        raise RefusedError(f"{shown!r} is no address: the name of its host cannot be") from None
    except ValueError as error:
        raise RefusedError(f"{shown!r} is no address: {error}") from None
    if parts.username is not None or parts.password is not None:
        raise RefusedError(f"no address may have a user or a password: {parts.scheme}://{host}/…")
    return parts._replace(
        netloc=name if port is None else f"{name}:{port}",
        path=quote(parts.path, safe=_SAFE) or "/",
        query=quote(parts.query, safe=_SAFE),
        fragment="",
    )


def redirected(address: str, location: str) -> str:
    """Where a redirect from an address leads, `location` being its header; raises `RefusedError` where nowhere."""
    # http.client reads the bytes of a header as Latin-1.
    plain = quote(location.encode("latin-1", "replace"), safe=f"{_SAFE}#[]")
    try:
        return parsed(urljoin(address, plain)).geturl()
    except (RefusedError, ValueError) as error:
        reason = error if isinstance(error, RefusedError) else f"{plain[:200]!r} is no address: {error}"
        raise RefusedError(f"redirected, but {reason}") from None


_SAFE = "/%?:@!$&'()*+,;=~-._"  # of a path and a query, which may be quoted already


def stated_length(headers: http.client.HTTPMessage) -> int | None:
    """The bytes of a body as the server states them; raises `RefusedError` for a number that cannot be."""
    length = headers.get("Content-Length", "")
    if not (length.isascii() and length.isdecimal()):
        return None
    if len(length) > 15:
        raise RefusedError(f"the server states a length of {len(length)} digits")
    return int(length)


class PacedAnswer(http.client.HTTPResponse):
    """An answer that must come at a bearable pace, with a head that ends; else `SlowError` or `RefusedError`."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._paced = _Paced(self.fp.detach())
        self.fp = io.BufferedReader(self._paced)

    def begin(self) -> None:
        self._paced.allowed = LARGEST_HEAD
        super().begin()
        self._paced.allowed = None


class _Paced(io.RawIOBase):
    """The bytes of a socket, the time of waiting for which is taken."""

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._waited, self._came = 0.0, -1  # seconds and bytes since the last look; -1 before the first byte
        self.allowed: int | None = None  # bytes that may still come, where that is limited

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        began = time.monotonic()
        count = self._raw.readinto(buffer) or 0
        if (allowed := self.allowed) is not None:
            if count > allowed:
                raise RefusedError("the head of the server's answer does not end")
            self.allowed = allowed - count
        if self._came < 0:  # it may have had to search first: that is what TIMEOUT is for
            self._came = 0
            return count
        self._waited += time.monotonic() - began  # and none of the time that this program takes
        self._came += count
        if self._waited >= TIMEOUT:
            if self._came < SLOWEST * self._waited:
                raise SlowError(f"the server sends less than {SLOWEST} bytes a second")
            self._waited, self._came = 0.0, 0
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class PlainConnection(http.client.HTTPConnection):
    """http, paced."""

    response_class = PacedAnswer


class SecureConnection(http.client.HTTPSConnection):
    """https, paced."""

    response_class = PacedAnswer


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(PlainConnection, req)


class _Secure(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(SecureConnection, req)


def _download_from_any(wanted: File, target: Path, progress: Report | None) -> None:
    """From the first server that has the file; a part that one brought is gone on with from the next."""
    *first, last = (replace(wanted, url=url) for url in (wanted.url, *wanted.mirrors))
    for source in first:
        try:
            return _download(source, target, progress)
        except (RefusedError, OSError, http.client.HTTPException) as error:
            log.warning("cannot download %s from %s: %s; asking a mirror", wanted.name, source.url, _reason(error))
    return _download(last, target, progress)


def _download(wanted: File, target: Path, progress: Report | None) -> None:
    part = _beside(target, "part")
    if wanted.sha256 is None:
        part.unlink(missing_ok=True)  # without a hash nothing would tell that the two halves are of one file
    furthest, failures = 0, 0
    while not (wanted.size and _size(part) == wanted.size):
        try:
            _receive(wanted, part, progress)
            break
        except (OSError, http.client.HTTPException) as error:
            if _size(part) > furthest + CHUNK:
                furthest, failures = _size(part), 0
            if failures == len(PAUSES) or not _may_pass(error):
                raise
            time.sleep(PAUSES[failures])
            failures += 1
    try:
        _require_published(wanted, part, _beside(target, "sha256"))
    except RefusedError:
        part.unlink()
        raise
    part.replace(target)


def _receive(wanted: File, part: Path, progress: Report | None) -> None:
    """One request: the rest of `part`, or all of it where the server does not resume."""
    with _ask(wanted.url, part) as response:
        have = _size(part) if response.status == 206 else 0
        length = stated_length(response.headers)
        total = wanted.size if length is None else have + length
        if response.headers.get_content_type() == "text/html":
            raise RefusedError("the server answered with a web page (an error, or a log-in page?)")
        if wanted.size and total != wanted.size:
            raise RefusedError(f"the server's file has {total} bytes, the published one {wanted.size}")
        if total and total - have > shutil.disk_usage(part.parent).free - HEADROOM:
            raise RefusedError(f"{part.parent} has no room for {readable_size(total - have)} more")
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read1(CHUNK):
                have += len(chunk)
                if have > (total or LARGEST):
                    file.truncate(0)
                    raise RefusedError(f"the server sends more than the {total or LARGEST} bytes expected")
                file.write(chunk)
                if progress:
                    progress(have, total)
            file.flush()
            os.fsync(file.fileno())
    if total and have < total:
        raise ConnectionError(f"the connection closed after {have} of {total} bytes")


def _ask(url: str, part: Path) -> http.client.HTTPResponse:
    """The server's answer: 206 with what comes after `part`, or all."""
    have = _size(part)
    resume = {"Range": f"bytes={have}-"} if have else {}
    headers = {"User-Agent": "boxwright", "Accept-Encoding": "identity", **resume}
    request = urllib.request.Request(parsed(url).geturl(), headers=headers)
    try:
        answer = urllib.request.build_opener(_SafeRedirects(), _Plain(), _Secure()).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code == 416:  # the server's file is shorter than the part
            part.unlink(missing_ok=True)
        raise
    response = cast(http.client.HTTPResponse, answer)
    if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        response.close()
        part.unlink(missing_ok=True)
        raise ConnectionError("the server sent another range than was asked for")
    return response


def _require_published(wanted: File, file: Path, record: Path) -> None:
    """Check size and hash of `file` and keep the hash in `record`."""
    recorded = record.read_text(encoding="utf-8").split()[:1] if record.exists() else []
    by = "published" if wanted.sha256 else f"recorded in {record}"
    found = _hash(wanted, file, wanted.sha256 or "".join(recorded), by)
    if recorded != [found]:
        if wanted.sha256 is None:
            log.warning("no hash is published for %s; found SHA-256 %s, kept in %s", wanted.name, found, record)
        with contextlib.suppress(OSError):  # a cache that may only be read is still good for reading
            record.write_text(f"{found}  {record.stem}\n", encoding="utf-8")


def _hash(wanted: File, file: Path, expected: str, by: str) -> str:
    """The SHA-256 of `file`, which must have the size of the wanted one and begin as `expected`."""
    if not (size := _size(file)) or size != (wanted.size or size):
        raise RefusedError(f"the file has {size} bytes, {wanted.size or 'more'} are expected")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(expected.lower()):
        raise RefusedError(f"the file's SHA-256 is {found}, the one {by} is {expected}")
    return found


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only; from a test's server on this machine also to itself."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        try:
            newurl = redirected(req.full_url, newurl)
            if not (_is_https(newurl) or (_is_loopback(req.full_url) and _is_loopback(newurl))):
                raise RefusedError(f"redirected to {newurl[:200]}: only https is allowed")
        except RefusedError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage
    ) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError as error:  # it takes the new address apart unguarded
            fp.close()
            raise RefusedError(f"redirected to what is no address: {error}") from None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@contextlib.contextmanager
def _alone(lock: Path) -> Generator[None]:
    """Hold `lock` against other processes and threads; the system lets go of it when its holder dies."""
    with lock.open("a+b") as file:
        if sys.platform == "win32":
            while True:
                with contextlib.suppress(OSError):
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                time.sleep(0.5)
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _may_pass(error: OSError | http.client.HTTPException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, HTTPError):
        return error.code in (408, 416, 425, 429, 500, 502, 503, 504)
    if isinstance(error, URLError):
        return not isinstance(error.reason, ssl.SSLCertVerificationError)
    return isinstance(error, ConnectionError | TimeoutError | ssl.SSLError | http.client.HTTPException)


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, URLError) and not isinstance(error, HTTPError) else error
    return str(cause).partition("\n")[0] or type(cause).__name__


def _is_https(url: str) -> bool:
    return parsed(url).scheme == "https"


def _is_loopback(url: str) -> bool:
    parts = parsed(url)
    return parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1")


def _file_name(wanted: File) -> str:
    try:
        name = parsed(wanted.url).path.rpartition("/")[2]
    except RefusedError as error:
        raise UserError(f"{wanted.name} cannot be downloaded: {error}") from None
    if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
        way_out = f"; {wanted.way_out}" if wanted.way_out else ""
        raise UserError(f"{wanted.url} does not end in a plain file name{way_out}")
    return name


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f"{target.name}.{suffix}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

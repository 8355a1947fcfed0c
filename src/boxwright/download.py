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
from typing import IO, cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

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
            raise _RefusedError("BOXWRIGHT_OFFLINE forbids it")
        elif not all(_is_https(url) or _is_loopback(url) for url in (wanted.url, *wanted.mirrors)):
            raise _RefusedError("only https is allowed")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(_beside(target, "lock")):
                if not target.is_file():  # another process may have brought it while this one waited
                    _download_from_any(wanted, target, progress)
    except (_RefusedError, OSError, http.client.HTTPException) as error:
        ways = ", or ".join(way for way in (wanted.way_out, way_out) if way)
        servers = " or ".join((wanted.url, *wanted.mirrors))
        raise UserError(f"cannot {what} {wanted.name} from {servers}: {_reason(error)}; {ways}") from error
    return target


def check(wanted: File, file: Path) -> None:
    """Raise UserError where `file`, which nothing is written beside, is not the published one."""
    try:
        _hash(wanted, file, wanted.sha256 or "", "published")
    except (_RefusedError, OSError) as error:
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


class _RefusedError(Exception):
    """Wrong in a way that another try would not mend."""


def _download_from_any(wanted: File, target: Path, progress: Report | None) -> None:
    """From the first server that has the file; a part that one brought is gone on with from the next."""
    *first, last = (replace(wanted, url=url) for url in (wanted.url, *wanted.mirrors))
    for source in first:
        try:
            return _download(source, target, progress)
        except (_RefusedError, OSError, http.client.HTTPException) as error:
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
    except _RefusedError:
        part.unlink()
        raise
    part.replace(target)


def _receive(wanted: File, part: Path, progress: Report | None) -> None:
    """One request: the rest of `part`, or all of it where the server does not resume."""
    with _ask(wanted.url, part) as response:
        have = _size(part) if response.status == 206 else 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else wanted.size
        if response.headers.get_content_type() == "text/html":
            raise _RefusedError("the server answered with a web page (an error, or a log-in page?)")
        if wanted.size and total != wanted.size:
            raise _RefusedError(f"the server's file has {total} bytes, the published one {wanted.size}")
        if total and total - have > shutil.disk_usage(part.parent).free - HEADROOM:
            raise _RefusedError(f"{part.parent} has no room for {readable_size(total - have)} more")
        with part.open("ab" if have else "wb") as file:
            while chunk := response.read1(CHUNK):
                have += len(chunk)
                if have > (total or LARGEST):
                    file.truncate(0)
                    raise _RefusedError(f"the server sends more than the {total or LARGEST} bytes expected")
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
    request = urllib.request.Request(url, headers={"User-Agent": "boxwright", "Accept-Encoding": "identity", **resume})
    try:
        answer = urllib.request.build_opener(_SafeRedirects()).open(request, timeout=TIMEOUT)
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
        raise _RefusedError(f"the file has {size} bytes, {wanted.size or 'more'} are expected")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(expected.lower()):
        raise _RefusedError(f"the file's SHA-256 is {found}, the one {by} is {expected}")
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
        if not (_is_https(newurl) or (_is_loopback(req.full_url) and _is_loopback(newurl))):
            fp.close()
            raise _RefusedError(f"redirected to {newurl}: only https is allowed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


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
    return urlsplit(url).scheme == "https"


def _is_loopback(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost", "::1")


def _file_name(wanted: File) -> str:
    name = urlsplit(wanted.url).path.rpartition("/")[2]
    if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
        way_out = f"; {wanted.way_out}" if wanted.way_out else ""
        raise UserError(f"{wanted.url} does not end in a plain file name{way_out}")
    return name


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f"{target.name}.{suffix}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0

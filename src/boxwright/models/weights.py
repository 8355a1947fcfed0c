"""Published weights: onto the disk, out of their file, into a model; each step checked, none silent.

`fetch` brings a file of `PUBLISHED` into the cache and checks its hash; `read_tensors` reads named tensors
from it, or from any file a user names, and never runs code that the file holds; `load` puts them into a
module by name and shape and hands back an `Account` of every tensor used, missing and left over.

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
import math
import os
import re
import shutil
import ssl
import sys
import time
import urllib.request
import warnings
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, NamedTuple, cast
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from boxwright.types import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]  # bytes here so far, bytes in all where known

# ------ Where weights are published


@dataclass(frozen=True)
class Weights:
    """One published file of weights, and all that is known to check it by."""

    name: str
    url: str
    sha256: str | None  # whole, or the beginning that its authors publish; None: the one found first is remembered
    size: int | None  # bytes; None where not published
    licence: str  # SPDX
    source: str  # paper or page
    permissive: bool  # use, change and sale are all allowed


def _torchvision(name: str, file: str, page: str) -> Weights:
    """torchvision puts the first 8 digits of the SHA-256 into the file's name, and publishes no size."""
    return Weights(
        name,
        url=f"https://download.pytorch.org/models/{file}",
        sha256=file.removesuffix(".pth").rpartition("-")[2],
        size=None,
        licence="BSD-3-Clause",  # torchvision's own; the training images' terms are another matter
        source=f"https://docs.pytorch.org/vision/stable/models/generated/torchvision.models.{page}.html",
        permissive=True,
    )


PUBLISHED: dict[str, Weights] = {
    weights.name: weights
    for weights in (
        Weights(
            "mae_vit_base",
            url="https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth",
            # The authors publish only the beginning of the MD5, 8cad7c, and no size. These two are what
            # several unrelated public projects found in it (a git-LFS pointer, a pinned download from this
            # address).
            sha256="aec5f0b68e5f3193a00b07bc65a37440db549c15b36b8bea242606cc40c4bc5d",
            size=343_249_461,
            licence="CC-BY-NC-4.0",
            source="https://github.com/facebookresearch/mae (He et al., arXiv:2111.06377)",
            permissive=False,
        ),
        _torchvision("squeezenet1_1_imagenet", "squeezenet1_1-b8a52dc0.pth", "squeezenet1_1"),
        _torchvision("resnet50_imagenet", "resnet50-11ad3fa6.pth", "resnet50"),  # IMAGENET1K_V2
        _torchvision("mobilenet_v2_imagenet", "mobilenet_v2-7ebf99e0.pth", "mobilenet_v2"),  # IMAGENET1K_V2
        _torchvision(
            "fasterrcnn_resnet50_fpn_v2_coco",
            "fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth",
            "detection.fasterrcnn_resnet50_fpn_v2",
        ),
    )
}

# ------ Onto the disk

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


def fetch(
    weights: Weights,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
    offline: bool | None = None,
) -> Path:
    """The file of `weights` in `cache`, downloaded if it is not there, its size and hash checked each time.

    `offline` (None: whether BOXWRIGHT_OFFLINE is set) refuses to download. Raises UserError, with the ways
    out, where the file cannot be had or is not the published one.
    """
    if offline is None:
        offline = os.environ.get("BOXWRIGHT_OFFLINE", "0") not in ("", "0")
    target = (cache or cache_folder()) / _file_name(weights.url)
    what, way_out = "download", f"put the file at {target}"
    try:
        if target.is_file():
            what, way_out = f"use {target} as", "delete it and run again"
            _require_published(weights, target, _beside(target, "sha256"))
        elif offline:
            raise _RefusedError("BOXWRIGHT_OFFLINE forbids it")
        elif not (_is_https(weights.url) or _is_loopback(weights.url)):
            raise _RefusedError("only https is allowed")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(_beside(target, "lock")):
                if not target.is_file():  # another process may have brought it while this one waited
                    _download(weights, target, progress)
    except (_RefusedError, OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot {what} {weights.name} from {weights.url}: {_reason(error)}; "
            f"name a local copy with --weights FILE, or {way_out}"
        ) from error
    return target


class _RefusedError(Exception):
    """Wrong in a way that another try would not mend."""


def _download(weights: Weights, target: Path, progress: Progress | None) -> None:
    part = _beside(target, "part")
    if weights.sha256 is None:
        part.unlink(missing_ok=True)  # without a hash nothing would tell that the two halves are of one file
    furthest, failures = 0, 0
    while not (weights.size and _size(part) == weights.size):
        try:
            _receive(weights, part, progress)
            break
        except (OSError, http.client.HTTPException) as error:
            if _size(part) > furthest + CHUNK:
                furthest, failures = _size(part), 0
            if failures == len(PAUSES) or not _may_pass(error):
                raise
            time.sleep(PAUSES[failures])
            failures += 1
    try:
        _require_published(weights, part, _beside(target, "sha256"))
    except _RefusedError:
        part.unlink()
        raise
    part.replace(target)


def _receive(weights: Weights, part: Path, progress: Progress | None) -> None:
    """One request: the rest of `part`, or all of it where the server does not resume."""
    with _ask(weights.url, part) as response:
        have = _size(part) if response.status == 206 else 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdecimal() else weights.size
        if response.headers.get_content_type() == "text/html":
            raise _RefusedError("the server answered with a web page (an error, or a log-in page?)")
        if weights.size and total != weights.size:
            raise _RefusedError(f"the server's file has {total} bytes, the published one {weights.size}")
        if total and total - have > shutil.disk_usage(part.parent).free - HEADROOM:
            raise _RefusedError(f"{part.parent} has no room for {_bytes(total - have)} more")
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


def _require_published(weights: Weights, file: Path, record: Path) -> None:
    """Check size and hash of `file` and keep the hash in `record`."""
    if not (size := _size(file)) or size != (weights.size or size):
        raise _RefusedError(f"the file has {size} bytes, {weights.size or 'more'} are expected")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    recorded = record.read_text(encoding="utf-8").split()[:1] if record.exists() else []
    expected = weights.sha256 or "".join(recorded)
    if not found.startswith(expected.lower()):
        by = "published" if weights.sha256 else f"recorded in {record}"
        raise _RefusedError(f"the file's SHA-256 is {found}, the one {by} is {expected}")
    if recorded != [found]:
        if weights.sha256 is None:
            log.warning("no hash is published for %s; found SHA-256 %s, kept in %s", weights.name, found, record)
        with contextlib.suppress(OSError):  # a cache that may only be read is still good for reading
            record.write_text(f"{found}  {record.stem}\n", encoding="utf-8")


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


def _file_name(url: str) -> str:
    name = urlsplit(url).path.rpartition("/")[2]
    if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
        raise UserError(f"{url} does not end in a plain file name: download the file and name it with --weights FILE")
    return name


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f"{target.name}.{suffix}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bytes(count: int) -> str:
    for unit, word in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.1f} {word}"
    return f"{count} bytes"


# ------ Out of a file

# Where checkpoints keep their state dict; averaged weights first, because published figures are theirs.
CONTAINERS = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
    "model",
    "model_state_dict",
    "state_dict",
    "module",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)
OTHER_FORMATS = (  # offset, bytes that stand there, what the file is
    (0, b"version https://git-lfs", "a git-LFS pointer, not the weights themselves: run `git lfs pull`"),
    (257, b"ustar", "a tar archive (unpack it; PyTorch's own tar form, older than 0.1.10, is not read)"),
    (0, b"\x1f\x8b", "a gzip archive: unpack it first"),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?)"),
    (0, b"GGUF", "a GGUF file"),
    (4, b"TFL3", "a TensorFlow Lite model"),
    (0, b"<?xml", "an XML page (a server's error message?), not weights: download it again"),
)
WANTED = "expected .safetensors, or .pt/.pth with tensors"


class Tensors(dict[str, Tensor]):
    """Named tensors, and how they were found in their file."""

    notes: tuple[str, ...] = ()


def read_tensors(path: Path) -> Tensors:
    """The named tensors of a .safetensors, .pt or .pth file, on the CPU; mapped from disk where that can be.

    Code in the file is never run. Containers (`model`, `state_dict`, ...) and the prefixes of DataParallel
    and torch.compile are taken off, and `notes` says so. Raises UserError where the file is not whole, is of
    another format, holds more than tensors, or holds tensors that nothing can be trained from.
    """
    try:
        size = path.stat().st_size
        if path.is_dir():
            distributed = (path / ".metadata").exists()
            what = "a distributed checkpoint, whose index is a pickle" if distributed else "a folder"
            raise UserError(f"{path} is {what}, not a file of weights: {WANTED}")
        if not size:  # asked before it is opened: a pipe has no size, and no end
            raise UserError(f"{path} is empty: download it again")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot read the weights {path}: {error.strerror or error}") from error
    if _is_safetensors(head):
        found, notes = _read_safetensors(path), ()
    elif other := _other_format(path, head):
        raise UserError(f"{path} is {other}")
    else:
        found, notes = _unwrapped(_read_torch(path, size, zipped=head.startswith(b"PK")), path)
    _require_sound(found, path, size)
    tensors, prefixes = _without_wrappers(found, path)
    tensors.notes = (*notes, *prefixes)
    return tensors


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes of the header's length, then the header, JSON of at most 100 MB."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def _other_format(path: Path, head: bytes) -> str | None:
    for offset, mark, what in OTHER_FORMATS:
        if head[offset:].startswith(mark):
            return what
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:14].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page (an error, or a log-in page?), not weights: download it again"
    if path.suffix.lower() == ".safetensors":
        return "named .safetensors but has no such header: download it again"
    # ONNX's ModelProto: ir_version (field 1) below 32, then one of its length-delimited fields.
    if path.suffix.lower() == ".onnx" or re.match(rb"\x08[\x01-\x1f][\x12\x1a\x22\x32\x3a\x42]", head):
        return f"an ONNX model, made to run and not to train: {WANTED}"
    return None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or damaged ({_first_line(error)}): download it again") from error


def _read_torch(path: Path, size: int, *, zipped: bool) -> object:
    """What torch.save wrote, by the unpickler that builds tensors and plain containers, nothing else."""
    if zipped:
        _require_whole_archive(path, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old pickles and sparse tensors; both are judged here
            return cast(object, torch.load(path, weights_only=True, map_location="cpu", mmap=zipped))
    except Exception as error:  # a damaged pickle may end in any exception
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds code ({_some([code[1]])}), not only tensors; refused: ask for .safetensors"
            ) from error
        unknown = "holds code, or " if "Weights only load failed" in str(error) else ""
        raise UserError(f"{path} {unknown}is truncated or damaged; refused: {WANTED}") from error


def _require_whole_archive(path: Path, size: int) -> None:
    """Refuse zips not written by torch.save, or changed since: it keeps CRCs and never compresses."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename.partition("/")[2] for member in members]
            if "constants.pkl" in names or any(name.startswith("code/") for name in names):
                raise UserError(f"{path} is a TorchScript archive, which is code: {WANTED}")
            if "archive_format" in names or path.suffix.lower() == ".pt2":
                raise UserError(f"{path} is a PT2 archive (torch.export), which is code: {WANTED}")
            if "data.pkl" not in names:
                raise UserError(f"{path} is a zip archive that torch.save did not write: {WANTED}")
            unpacked = sum(member.file_size for member in members)
            if unpacked > size or any(member.compress_type for member in members):
                raise UserError(f"{path} claims more bytes than it has; refused")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path} is truncated or damaged ({_first_line(error)}): download it again") from error
    if damaged:
        raise UserError(f"{path} is damaged (the checksum of {damaged} is wrong): download it again")


def _unwrapped(content: object, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes: list[str] = []
    for _ in range(4):  # as deep as any known container; a hostile one may hold itself
        if not isinstance(content, Mapping):
            break
        entries = cast(Mapping[object, object], content)
        inner = next((key for key in CONTAINERS if isinstance(entries.get(key), Mapping) and entries[key]), "")
        if not inner:
            break
        beside = [str(key) for key in entries if key != inner]
        notes.append(f"taken from '{inner}'" + (f", beside it: {_some(beside)}" if beside else ""))
        content = entries[inner]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors: {WANTED}")
    entries = cast(Mapping[object, object], content)
    tensors = {key: value for key, value in entries.items() if isinstance(key, str) and isinstance(value, Tensor)}
    others = [str(key) for key in entries if key not in tensors]
    if not tensors:
        raise UserError(f"{path} holds no named tensors; its entries: {_some(others) or 'none'}")
    if others:
        notes.append(f"not tensors, left out: {_some(others)}")
    return tensors, tuple(notes)


def _require_sound(tensors: Mapping[str, Tensor], path: Path, size: int) -> None:
    """Refuse what cannot be trained from; no value is touched before the claimed sizes prove honest."""
    odd = [
        f"{name} ({tensor.dtype} on {tensor.device.type}, {tensor.layout})"
        for name, tensor in tensors.items()
        if tensor.dtype not in DTYPES or tensor.device.type != "cpu" or tensor.layout != torch.strided
    ]
    if odd:
        raise UserError(f"{path} holds quantised or unusual tensors, not plain weights to start from: {_some(odd)}")
    claimed = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if claimed > 2 * size:  # shared tensors make up to twice the file plausible
        raise UserError(f"{path} claims {_bytes(claimed)} of tensors in a file of {_bytes(size)}; refused")
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise UserError(f"{path} holds NaN or infinity in {len(broken)} of {len(tensors)} tensors: {_some(broken)}")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN passes through both: one pass and nothing allocated
    return math.isfinite(low) and math.isfinite(high)


def _without_wrappers(tensors: Mapping[str, Tensor], path: Path) -> tuple[Tensors, tuple[str, ...]]:
    """Names as the bare model has them: without DataParallel's `module.` and torch.compile's `_orig_mod.`."""
    names = {name: re.sub(r"(^|\.)_orig_mod\.", r"\1", name) for name in tensors if name != "n_averaged"}
    notes = ["'_orig_mod.' taken off"] if any(name != bare for name, bare in names.items()) else []
    if "n_averaged" in tensors and len(tensors) > 1:
        notes.append("'n_averaged' left out")  # the counter of torch's AveragedModel
    while names and all(name.startswith("module.") for name in names.values()):
        names = {name: bare.removeprefix("module.") for name, bare in names.items()}
        notes.append("'module.' taken off")
    if len(set(names.values())) < len(names):
        raise UserError(f"{path} holds two tensors of one name, once '_orig_mod.' is taken off: it is not one model's")
    return Tensors({bare: tensors[name] for name, bare in names.items()}), tuple(notes)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _some(names: Sequence[str], shown: int = 4) -> str:
    """The first of `names`, fit for one line of a terminal whatever the file calls its tensors."""
    words = [name if name.isprintable() and len(name) < 200 else ascii(name[:200]) for name in names[:shown]]
    return ", ".join(words) + (f" and {len(names) - shown} more" if len(names) > shown else "")


# ------ Into a model

COUNTERS = (
    "num_batches_tracked",
    "*.num_batches_tracked",
)  # BatchNorm's; files before PyTorch 0.4.1 lack them, and a frozen BatchNorm has none
DETECTOR_PREFIXES = ("", "model.", "ema.")  # Lightning and others put the model under an attribute


class Mismatch(NamedTuple):
    """A tensor that both have, in another shape or kind."""

    name: str  # in the module
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.name} (in the file {self.found}, in the model {self.wanted})"


@dataclass(frozen=True)
class Account:
    """What became of every tensor.

    Each of the module's is used, missing or mismatched; each of the file's is used, mismatched or unexpected.
    """

    source: str
    used: int
    missing: tuple[str, ...]  # of the module, left as they were
    unexpected: tuple[str, ...]  # of the file, not used
    mismatched: tuple[Mismatch, ...]  # left as they were
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Tensors of the module."""
        return self.used + len(self.missing) + len(self.mismatched)

    def check(self, minimum_fraction: float) -> Account:
        """Itself; UserError where none, or less than this fraction, of the module's tensors were found."""
        lacking = [*self.missing, *(mismatch.name for mismatch in self.mismatched)]
        if not self.used or self.used < minimum_fraction * self.total:
            raise UserError(
                f"{self.source}: matched {self.used} of {self.total} tensors: "
                f"these weights are for another architecture (missing: {_some(lacking, 2) or 'none'}; "
                f"in the file instead: {_some(self.unexpected, 2) or 'nothing else'})"
            )
        return self

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.used} of {self.total} tensors loaded"]
        if self.missing:
            lines.append(f"  left as initialised ({len(self.missing)}): {_some(self.missing)}")
        if self.mismatched:
            others = _some([str(mismatch) for mismatch in self.mismatched])
            lines.append(f"  of another shape, left as initialised ({len(self.mismatched)}): {others}")
        if self.unexpected:
            lines.append(f"  not used from the file ({len(self.unexpected)}): {_some(self.unexpected)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def load(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    rename: Callable[[str], str | None] | None = None,
    may_miss: Sequence[str] = (),
    may_leave: Sequence[str] = ("*",),
) -> Account:
    """Copy `tensors` into `module` by name and shape, in the module's own dtypes.

    `rename` gives the module's name for a name of the file, None to leave it out. Tensors of the module that
    match a pattern of `may_miss` ("*.cls_score.*") may be missing or of another shape, and keep their values;
    tensors of the file that match one of `may_leave` may stay unused. Anything else raises UserError, before
    any change.
    """
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    names, notes = _names(tensors, own, rename, source)
    mismatched = tuple(
        Mismatch(name, _kind(tensors[original]), _kind(own[name]))
        for name, original in names.items()
        if not _same_kind(tensors[original], own[name])
    )
    used = {name: tensors[original] for name, original in names.items() if _same_kind(tensors[original], own[name])}
    account = Account(
        source,
        used=len(used),
        missing=tuple(name for name in own if name not in names),
        unexpected=tuple(sorted(set(tensors) - set(names.values()))),
        mismatched=mismatched,
        notes=(*(tensors.notes if isinstance(tensors, Tensors) else ()), *notes),
    )
    _require_allowed(account, (*COUNTERS, *may_miss), (*COUNTERS, *may_leave))
    module.load_state_dict(used, strict=False)
    return account


def _names(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    rename: Callable[[str], str | None] | None,
    source: str,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The file's name for each of the module's that it has."""
    for prefix in DETECTOR_PREFIXES:
        if not all(name.startswith(prefix) for name in tensors):
            continue
        bare = {original: original.removeprefix(prefix) for original in tensors}
        pairs = [(rename(name) if rename else name, original) for original, name in bare.items()]
        known = [(name, original) for name, original in pairs if name is not None and name in own]
        if known:
            names = dict(known)
            if len(names) < len(known):
                raise UserError(f"{source}: two of its tensors would both become {_twice([n for n, _ in known])}")
            return names, (f"'{prefix}' taken off",) if prefix else ()
    return {}, ()


def _twice(names: Sequence[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])


def _same_kind(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and found.is_floating_point() == wanted.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _require_allowed(account: Account, may_miss: Sequence[str], may_leave: Sequence[str]) -> None:
    missing = [name for name in account.missing if not _matches(name, may_miss)]
    mismatched = [str(m) for m in account.mismatched if not _matches(m.name, may_miss)]
    left = [name for name in account.unexpected if not _matches(name, may_leave)]
    account.check(0.5 if missing or mismatched else 0)
    for names, fault in (
        (mismatched, "are of another shape"),
        (missing, "of the model are missing"),
        (left, "have no place in the model"),
    ):
        if names:
            raise UserError(f"{account.source}: {len(names)} tensors {fault}: {_some(names)}")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# What ViTDet adds to the encoder that MAE trains, and what it leaves of it (Li et al., arXiv:2203.16527).
VITDET_ADDS = ("blocks.*.attn.rel_pos_h", "blocks.*.attn.rel_pos_w")
VITDET_LEAVES = ("cls_token", "norm.weight", "norm.bias", "mask_token", "decoder_*")


def load_mae(vit: nn.Module, tensors: Mapping[str, Tensor], *, source: str = "MAE weights") -> Account:
    """Load a masked autoencoder's encoder into the ViT of a detector.

    The position table is resampled where its grid is another; relative positions keep their zeros; class
    token, last norm and decoder are left out. Raises UserError on all else that is missing or left over.
    """
    adapted = Tensors(tensors)
    adapted.notes = tensors.notes if isinstance(tensors, Tensors) else ()
    if "pos_embed" in tensors:
        own = vit.state_dict()["pos_embed"]
        adapted["pos_embed"], notes = _fit_positions(tensors["pos_embed"], own, source)
        adapted.notes += notes
    return load(vit, adapted, source=source, may_miss=VITDET_ADDS, may_leave=VITDET_LEAVES)


def _fit_positions(found: Tensor, own: Tensor, source: str) -> tuple[Tensor, tuple[str, ...]]:
    """`found` (1, T, D) on the grid of `own`, bicubic; where `own` has a class token, its row comes first."""
    if found.shape == own.shape or found.ndim != 3 or found.shape[-1] != own.shape[-1]:
        return found, ()  # another width is another architecture, which `load` says
    (found_side, found_extra), (side, extra) = _grid(found, source), _grid(own, "the model")
    grid = found[:, found_extra:].float().unflatten(1, (found_side, found_side))  # (1, G, G, D)
    grid = grid.permute(0, 3, 1, 2)  # (1, D, G, G)
    if found_side != side:
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    first = found[:, :1].float() if found_extra else own[:, :1].float().cpu()  # (1, 1, D)
    table = torch.cat([first[:, :extra], grid.flatten(2).transpose(1, 2)], dim=1)  # (1, T, D)
    class_token = ("without", "with")
    return table, (
        f"pos_embed fitted from a {found_side}×{found_side} grid {class_token[found_extra]} class token "
        f"to {side}×{side} {class_token[extra]}",
    )


def _grid(positions: Tensor, source: str) -> tuple[int, int]:
    """Side of the grid, and how many rows (0 or 1) stand before it for the class token."""
    tokens = positions.shape[1]
    for extra in (1, 0):
        side = math.isqrt(max(tokens - extra, 0))
        if side and side**2 == tokens - extra:
            return side, extra
    raise UserError(
        f"{source}: pos_embed has {tokens} tokens, neither a square grid nor one plus a class token; "
        "a grid that is not square cannot be resampled, because the file does not tell its height and width"
    )

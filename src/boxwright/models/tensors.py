"""Named tensors out of a file of weights, of any known form; code in the file is never run."""

from __future__ import annotations

import math
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from boxwright.download import readable_size
from boxwright.types import UserError

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
WANTED = "expected .safetensors, .pt/.pth with tensors, or detectron2's .pkl"


class Tensors(dict[str, Tensor]):
    """Named tensors, how they were found in their file, and what a safetensors file says of itself."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor] = MappingProxyType({}),
        *,
        notes: tuple[str, ...] = (),
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(tensors)
        self.notes = notes
        self.metadata = metadata


def read_tensors(path: Path) -> Tensors:
    """The named tensors of a .safetensors, .pt, .pth or detectron2's .pkl file, on the CPU, mapped if it can be.

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
    metadata: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()
    if _is_safetensors(head):
        found, metadata = _read_safetensors(path)
    elif other := _other_format(path, head):
        raise UserError(f"{path} is {other}")
    elif path.suffix.lower() == ".pkl" and not head.startswith(b"PK"):  # torch.save writes zips under any name
        from boxwright.models.pickles import read_detectron2

        found = read_detectron2(path)
    else:
        found, notes = _unwrapped(_read_torch(path, size, zipped=head.startswith(b"PK")), path)
    _require_sound(found, path, size)
    found = {name: tensor.detach() for name, tensor in found.items()}  # parameters may have been saved as such
    tensors, prefixes = _without_wrappers(found, path)
    return Tensors(tensors, notes=(*notes, *prefixes), metadata=metadata)


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


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dict
            return tensors, file.metadata() or {}
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
                f"{path} holds code ({listed([code[1]])}), not only tensors; refused: ask for .safetensors"
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
        notes.append(f"taken from '{inner}'" + (f", beside it: {listed(beside)}" if beside else ""))
        content = entries[inner]
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not named tensors: {WANTED}")
    entries = cast(Mapping[object, object], content)
    tensors = {key: value for key, value in entries.items() if isinstance(key, str) and isinstance(value, Tensor)}
    others = [str(key) for key in entries if key not in tensors]
    if not tensors:
        raise UserError(f"{path} holds no named tensors; its entries: {listed(others) or 'none'}")
    if others:
        notes.append(f"not tensors, left out: {listed(others)}")
    return tensors, tuple(notes)


def _require_sound(tensors: Mapping[str, Tensor], path: Path, size: int) -> None:
    """Refuse what cannot be trained from; no value is touched before the claimed sizes prove honest."""
    odd = [
        f"{name} ({tensor.dtype} on {tensor.device.type}, {tensor.layout})"
        for name, tensor in tensors.items()
        if tensor.dtype not in DTYPES or tensor.device.type != "cpu" or tensor.layout != torch.strided
    ]
    if odd:
        raise UserError(f"{path} holds quantised or unusual tensors, not plain weights to start from: {listed(odd)}")
    claimed = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    if claimed > 2 * size:  # shared tensors make up to twice the file plausible
        raise UserError(
            f"{path} claims {readable_size(claimed)} of tensors in a file of {readable_size(size)}; refused"
        )
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        raise UserError(f"{path} holds NaN or infinity in {len(broken)} of {len(tensors)} tensors: {listed(broken)}")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())  # NaN passes through both: one pass and nothing allocated
    return math.isfinite(low) and math.isfinite(high)


def _without_wrappers(tensors: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
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
    return {bare: tensors[name] for name, bare in names.items()}, tuple(notes)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def listed(names: Sequence[str], shown: int = 4) -> str:
    """The first of `names`, fit for one line of a terminal whatever the file calls its tensors."""
    words = [name if name.isprintable() and len(name) < 200 else ascii(name[:200]) for name in names[:shown]]
    return ", ".join(words) + (f" and {len(names) - shown} more" if len(names) > shown else "")

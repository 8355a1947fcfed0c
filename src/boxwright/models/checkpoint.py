"""A detector in one safetensors file: weights, and in the header everything that prediction needs. No pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from boxwright import registry
from boxwright.config import LARGEST, SMALLEST
from boxwright.folders import commit
from boxwright.models.join import build_detector
from boxwright.types import UserError
from boxwright.version import __version__

FORMAT = 1
KEY = "boxwright"  # the one entry of the file's header; its value is JSON


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # a header may come from anyone

    model: str  # a name in the registry
    options: dict[str, Any]  # of its builder, `num_classes` left out
    classes: list[str]  # in the order of the labels
    fit: dict[str, Any]  # how pictures come onto the canvas: the fields of `Fit`
    run: dict[str, Any] = field(default_factory=dict)  # the whole run that trained it
    epoch: int = 0
    step: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    weights_from: list[str] = field(default_factory=list)  # where training started, with licences
    version: str = __version__
    format: int = FORMAT
    sha256: str = ""  # over the tensors: no file format notices a flipped bit

    @property
    def threshold(self) -> float:
        """From which score on a detection is worth showing: the one of the highest F1 in validation, else 0.5."""
        known = self.scores.get("threshold", math.nan)
        return known if 0 <= known <= 1 else 0.5


def save(path: Path, detector: nn.Module | Mapping[str, Tensor], header: Header) -> None:
    """Write a checkpoint of a detector or of its `state_dict`: complete under its name, or not there at all."""
    values = detector.state_dict() if isinstance(detector, nn.Module) else detector
    tensors = {name: t.detach().cpu().contiguous() for name, t in values.items()}
    text = json.dumps({**asdict(header), "sha256": digest(tensors)})
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_tensors(temporary, tensors, {KEY: text})
        commit(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file of tensors on the CPU; a full or failing disk is an `OSError` as from any other write."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def read_header(path: Path) -> Header:
    """The header alone; a file that is no checkpoint of ours is a `UserError` that says what it looks like."""
    if not path.exists():
        raise UserError(f"no weights at {path} (looked in {Path.cwd()})")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path} is no regular file; wanted is best_model.safetensors of a run")
    if path.is_dir():
        raise UserError(f"{path} is a folder; --weights wants a file such as {path / 'best_model.safetensors'}")
    text = _metadata(path).get(KEY)
    if text is None:
        raise UserError(f"{path} is a safetensors file, but not one that Boxwright trained: it has no class names")
    return _parse(path, text)


def load(path: Path) -> tuple[nn.Module, Header]:
    """The detector, in evaluation mode on the CPU, and its header.

    A truncated, damaged or foreign file, a model that this version does not know and weights that do not fit are each a
    `UserError`.
    """
    header = read_header(path)
    try:
        detector = build_detector(header.model, num_classes=len(header.classes), **header.options)
    except TypeError as error:
        raise UserError(f"{path} has options that {header.model} does not take: {error}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}{_plugin_hint(header)}") from None
    tensors = read_tensors(path)
    if digest(tensors) != header.sha256:
        raise UserError(f"{path} is damaged: its tensors are not those that were saved. Copy it again from its source")
    problems = _differences(detector.state_dict(), tensors)
    if problems:
        raise UserError(f"{path} does not fit {header.model}: {problems}")
    detector.load_state_dict(tensors)
    return detector.eval(), header


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        wanted = "wanted is best_model.safetensors of a run"
        raise UserError(f"{path} is not a Boxwright checkpoint, or damaged ({error}); {wanted}") from None


def _parse(path: Path, text: str) -> Header:
    try:
        values = json.loads(text)
        form = values.get("format")
        if not isinstance(form, int) or form > FORMAT:
            version = ascii(values.get("version"))
            raise UserError(f"{path} was written by Boxwright {version}; this is {__version__}. Upgrade it")
        header = TypeAdapter(Header).validate_json(text, strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(f"{path} has a header that is not ours: {wrong['msg']} at {wrong['loc']!a}") from None
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} has a header that is not ours: {error}") from None
    if not header.classes:
        raise UserError(f"{path} has no class names in its header")
    if len(set(header.classes)) < len(header.classes) or not all(name.isprintable() for name in header.classes):
        raise UserError(f"{path} has class names in its header that are not distinct lines: {header.classes!a}")
    if not _is_fit(header.fit):
        raise UserError(f"{path} says in its header that pictures are fitted by {header.fit!a}, which is not possible")
    try:
        registry.find(header.model)
    except UserError as error:
        raise UserError(f"{path}: {error}{_plugin_hint(header)}") from None
    return header


def _plugin_hint(header: Header) -> str:
    """A checkpoint never runs code by itself: whoever trusts a plug-in names it."""
    plugins: Any = header.run.get("plugin")
    if not isinstance(plugins, list) or not plugins:
        return ""
    return f" It was trained with --plugin {' --plugin '.join(map(ascii, plugins))}: name it again"


def _is_fit(fit: Mapping[str, Any]) -> bool:
    """Whether the fields of a `Fit` are there, within what a run may ask for."""
    if not {"imgsz", "square"} <= set(fit) <= {"imgsz", "square", "decode_scaled"} or type(fit["imgsz"]) is not int:
        return False
    if any(type(value) is not bool for name, value in fit.items() if name != "imgsz"):
        return False
    return SMALLEST <= int(fit["imgsz"]) <= LARGEST


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What is missing, unexpected or of another shape, in a few words; empty when nothing is."""
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(k for k in expected.keys() & found.keys() if expected[k].shape != found[k].shape),
    }
    return ", ".join(f"{len(names)} tensors {kind} ({names[0]} ...)" for kind, names in kinds.items() if names)

"""What an exact resume needs, on the disk: each state complete or absent, its SHA-256 in its own name.

state/
├── step_00000400-<sha256>.safetensors    the one before
└── step_00000420-<sha256>.safetensors    the newest

A state is written under another name, synced, hashed and renamed, so that a crash leaves it whole or not at all; what
the disk does to it later its hash tells. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from boxwright.folders import commit
from boxwright.models.checkpoint import write_tensors
from boxwright.types import DiskFailed

KEPT = 2
NAME = re.compile(r"step_(\d{8,})-([0-9a-f]{64})\.safetensors")
KEY = "boxwright_state"


@dataclass(frozen=True)
class State:
    """A moment of a run, between two steps."""

    step: int  # steps done
    tensors: dict[str, Tensor]
    values: dict[str, Any]  # what JSON can say


class States:
    """The states of one run: saved beside the training, the newest whole one found again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: State) -> None:
        """Write a copy of `state` in the background; what went wrong with the one before is raised here."""
        self.wait()
        copied = State(state.step, {k: t.detach().to("cpu", copy=True) for k, t in state.tensors.items()}, state.values)
        self._writer = threading.Thread(target=self._write_caught, args=(copied,), name="state")
        self._writer.start()

    def wait(self) -> None:
        """Until the state being written is on the disk; raises `OSError` if it could not be."""
        if self._writer:
            self._writer.join()
            self._writer = None
        if self._error:
            error, self._error = self._error, None
            raise error

    @property
    def busy(self) -> bool:
        """Whether a state is being written."""
        return self._writer is not None and self._writer.is_alive()

    def newest(self) -> tuple[State | None, list[str]]:
        """The newest whole state, None where there is none; and what is wrong with each newer one."""
        for leftover in [*self.folder.glob("*.tmp"), *self.folder.glob(".tmp*")]:
            leftover.unlink()  # of a process that was killed while it wrote
        faults: list[str] = []
        for path in self._newest_first():
            if state := self._read(path, faults):
                return state, faults
        return None, faults

    def clear(self) -> None:
        """Remove every state, whole or not: another run begins here."""
        for path in [*self.folder.glob("step_*"), *self.folder.glob(".tmp*")]:
            path.unlink()

    def _write_caught(self, state: State) -> None:
        try:
            self._write(state)
        except BaseException as error:  # noqa: BLE001 handed over to the training thread
            self._error = error

    def _write(self, state: State) -> None:
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / f"step_{state.step:08}.tmp"
        try:
            write_tensors(temporary, state.tensors, {KEY: json.dumps({"step": state.step, **state.values})})
            commit(temporary, self.folder / f"step_{state.step:08}-{_digest(temporary)}.safetensors")
        except OSError as error:
            raise self._no_room(error, state) from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        for old in list(self._newest_first())[KEPT:]:
            old.unlink()

    def _no_room(self, error: OSError, state: State) -> DiskFailed:
        """That a state could not be written, with what it needs and what there is."""
        needed = sum(t.nbytes for t in state.tensors.values())
        try:
            room = f"needs {needed / 1e6:.0f} MB, {shutil.disk_usage(self.folder).free / 1e6:.0f} MB are free"
        except OSError:
            room = "its folder is gone"
        return DiskFailed(
            f"the state after {state.step} steps cannot be written into {self.folder} ({error.strerror}): it {room}. "
            f"Those before it are whole; make room, then: boxwright train --resume {self.folder.parent}"
        )

    def _newest_first(self) -> Iterator[Path]:
        named = [(int(match[1]), path) for path in self.folder.glob("step_*") if (match := NAME.fullmatch(path.name))]
        for _, path in sorted(named, key=lambda pair: (pair[0], pair[1].stat().st_mtime), reverse=True):
            yield path

    def _read(self, path: Path, faults: list[str]) -> State | None:
        try:
            whole = f"-{_digest(path)}." in path.name
            if not whole:
                faults.append(f"{path} is damaged (its SHA-256 is another): the state before it is used")
                return None
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 it is no dict
                values = json.loads(file.metadata()[KEY])
            return State(values.pop("step"), tensors, values)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            faults.append(f"{path} cannot be read ({error}): the state before it is used")
            return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

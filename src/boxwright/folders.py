"""Where results go: a folder's name that exists is never taken again, a file is complete under its name."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from boxwright.errors import UserError

if sys.platform != "win32":
    import fcntl


def require_name(name: str | None) -> None:
    """Refuse what is no name of a folder; None is for a name of ours."""
    if name is not None and (not name.strip() or name in (".", "..") or Path(name).name != name or "\0" in name):
        raise UserError(f"--name {name!r} is not a folder name")


def claim(parent: Path, name: str | None, *, exist_ok: bool = False) -> Path:
    """Make `parent/name`, or `name_2`, `name_3` ... where it exists, or `res_1`, `res_2` ... without a name.

    With `exist_ok` the named folder is taken as it is. A place that cannot be written to is a `UserError`.
    """
    require_name(name)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = _first_free(parent, name, exist_ok=exist_ok)
        probe = folder / "write.probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write into {parent}: {error.strerror}. Choose another folder") from None
    return folder


def _first_free(parent: Path, name: str | None, *, exist_ok: bool) -> Path:
    if name and exist_ok:
        (parent / name).mkdir(exist_ok=True)
        return parent / name
    candidates = (f"{name}_{n}" if n > 1 else name for n in count(1)) if name else (f"res_{n}" for n in count(1))
    for candidate in candidates:
        try:
            (parent / candidate).mkdir()  # claims it: of two runs that start at once each gets its own
        except FileExistsError:
            continue
        return parent / candidate
    raise AssertionError("there is always a next number")


@contextmanager
def held(folder: Path) -> Generator[None]:
    """Keep other processes from working in a folder; one that is held already is a `UserError`.

    The system lets go of it when its holder dies. Windows has no such lock on folders.
    """
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(f"another process is working in {folder}. Wait for it, or stop it first") from None
    try:
        yield
    finally:
        os.close(handle)


def commit(temporary: Path, target: Path) -> None:
    """Give a written file its name once its bytes are on the disk: after a crash it is there whole, or not there."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(target)
    if os.name != "nt":  # Windows has no handle of a folder to sync
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

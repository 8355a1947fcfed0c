"""Run folder → report.html: one page that needs no network and nothing beside it. Reads files, never a model.

reading     files → `Found`, with a note for all that is missing or damaged
followed    how the training went          judged      where AP is lost (grids: confusion, calibration)
described   options, machine, commands     compare     several runs side by side
charts      numbers → SVG                  pictures    files → small JPEGs inside the page
markup      values → escaped HTML          page        parts → the file
dataset     the same for what `data check` found
watch       the same page, served on this machine while the run goes on
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from boxwright.errors import DiskFailed, UserError

if TYPE_CHECKING:
    from boxwright.data.check import Checked

__all__ = ["write_check", "write_comparison", "write_report"]


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run folder or an evaluation folder, by default as its report.html; gives the path.

    Raises `UserError` where the folder is neither or the output cannot be written, `DiskFailed` where the disk fails.
    """
    from boxwright.report.page import of_run
    from boxwright.report.reading import existing, read

    target = checked_output(output or existing(folder) / "report.html")
    return _write(target, of_run(read(folder)))


def write_comparison(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write a page with several runs side by side, by default comparison.html beside the first; gives the path."""
    from boxwright.report.compare import of_runs
    from boxwright.report.reading import existing, read

    if len(folders) < 2:
        raise UserError("--compare wants at least two run folders")
    places = [existing(folder).resolve() for folder in folders]
    twice = [place for i, place in enumerate(places) if place in places[:i]]
    if twice:
        raise UserError(f"--compare has {twice[0]} twice")
    target = checked_output(output or places[0].parent / "comparison.html")
    return _write(target, of_runs([read(folder) for folder in folders]))


def write_check(checked: Checked, output: Path) -> Path:
    """Write what the dataset doctor found; gives the path."""
    from boxwright.report.dataset import of_dataset

    return _write(checked_output(output, "--html"), of_dataset(checked), "--html")


def checked_output(path: Path, option: str = "--output") -> Path:
    """A place that a page may be written to, named by an `option`; another is a `UserError`."""
    path = path.expanduser()
    folder = False
    with suppress(OSError):  # a name too long, a folder that may not be looked into: told when it is written
        folder = path.is_dir()
    if folder:
        raise UserError(f"{option} {path} is a folder; wanted is a file such as {path / 'report.html'}")
    if path.suffix.lower() not in (".html", ".htm"):  # so that no weights are written over by mistake
        raise UserError(f"{option} {str(path)[:200]} must end in .html")
    return path


def _write(path: Path, text: str, option: str = "--output") -> Path:
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        reason = f"cannot write {str(path)[:200]}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise DiskFailed(reason) from error
        raise UserError(f"{reason}. Choose another place with {option}") from None
    return path

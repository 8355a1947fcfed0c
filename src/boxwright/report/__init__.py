"""Run folder → report.html: one page that needs no network and nothing beside it. Reads files, never a model.

reading     files → `Found`, with a note for all that is missing or damaged
followed    how the training went          judged      where AP is lost (grids: confusion, calibration)
described   options, machine, commands     compare     several runs side by side
charts      numbers → SVG                  pictures    files → small JPEGs inside the page
markup      values → escaped HTML          page        parts → the file
watch       the same page, served on this machine while the run goes on
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from boxwright.errors import DiskFailed, UserError

__all__ = ["write_comparison", "write_report"]


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


def checked_output(path: Path) -> Path:
    """A place that a page may be written to; another is a `UserError`."""
    path = path.expanduser()
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; wanted is a file such as {path / 'report.html'}")
    if path.suffix.lower() not in (".html", ".htm"):  # so that no weights are written over by mistake
        raise UserError(f"--output {str(path)[:200]} must end in .html")
    return path


def _write(path: Path, text: str) -> Path:
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
        raise UserError(f"{reason}. Choose another place with --output") from None
    return path

"""Files of a dataset → a folder that is whole, or not there: it grows as FOLDER.partial and gets its name at the end.

A call that was cut off is gone on with. What is put there is a hard link where the file system can, else a copy; the
source is only read.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from boxwright.download import HEADROOM, readable_size
from boxwright.folders import held
from boxwright.progress import Progress
from boxwright.types import Record, UserError

if TYPE_CHECKING:
    from boxwright.data.dataset import Dataset

Say = Callable[[str], None]

LARGEST = 32 << 20  # bytes that `File.read` takes at once
BLOCK = 4096  # bytes that a file takes at least on common file systems
BEGUN = "begun-by-boxwright.txt"  # lies in a folder that grows, where nothing else shows whose it is
LINKED = "{:,} files are hard links: what is changed in one folder changes in the other (--copy makes copies)"


class File(ABC):
    """A file to be put somewhere, on the disk or inside an archive."""

    path: str | None = None  # None: inside an archive
    offset: int = 0  # where it begins in the archive

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def open(self) -> IO[bytes]: ...

    @abstractmethod
    def stat(self) -> tuple[int, float]:
        """Its size in bytes, and when it was last changed."""

    def read(self) -> bytes:
        with self.open() as stream:
            return stream.read(LARGEST)


class OnDisk(File):
    """A file by its path, which is no symbolic link: a hard link would be one to the link itself."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> IO[bytes]:
        assert self.path
        return open(self.path, "rb")  # noqa: PTH123  # a Path for each of 40,000 files costs a second

    def stat(self) -> tuple[int, float]:
        assert self.path
        status = os.stat(self.path)  # noqa: PTH116
        return status.st_size, status.st_mtime


class Piece(NamedTuple):
    """One file to be put into the folder."""

    file: File
    target: str  # train/images/000005.jpg


def partial_of(folder: Path) -> Path:
    """Where `folder` grows."""
    return folder.with_name(f"{folder.name}.partial")


def destination(folder: Path) -> Path:
    """The absolute path of a folder to be made; of a link to a folder, that folder: there it can grow and be named."""
    folder = absolute(folder)
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder


def absolute(path: Path) -> Path:
    """A path from the root without `..`; raises `UserError` for what has no name."""
    found = Path(os.path.abspath(path.expanduser()))  # noqa: PTH100  # Path.absolute keeps `..`
    if not found.name:
        raise UserError(f"{path} is no folder that can be used")
    return found


def require_outside(folder: Path, dataset: Dataset, records: Iterable[Sequence[Record]]) -> None:
    """Raise `UserError` where the new folder, or what it grows as, would lie in the source or the source in it."""
    sources = [source for those in dataset.layout.splits.values() for source in those]
    places = {dataset.path, *(source.annotations for source in sources)}
    places |= {source.images for source in sources if source.images}
    images = [Path(record.image) for those in records for record in those]
    places |= {image.parent for image in images}
    for place in sorted(places):
        if place.is_dir() and is_inside(folder, place):
            raise UserError(f"{folder} is inside the source, {place}. Choose a folder outside it")
    partial = partial_of(folder)
    # Only what a link leads to: the folder around that is not of the source, and may have the new one in it.
    behind = {Path(os.path.realpath(image)) for image in images if image.is_symlink()}
    for place in [*sorted(places), *sorted(behind)]:
        if is_inside(place, partial) or (place.is_dir() and is_inside(partial, place)):
            raise UserError(f"{folder} would grow as {partial}, where the source is: {place}. Choose another folder")
        if is_inside(place, folder):
            raise UserError(f"the source, {place}, is inside {folder}. Choose another folder")


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is `folder` or below it, by whatever links and in whatever letters it is named."""
    path, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if path.is_relative_to(folder):
        return True
    return folder.exists() and any(above.exists() and above.samefile(folder) for above in (path, *path.parents))


@contextmanager
def growing(folder: Path, own: Collection[str]) -> Generator[Path]:
    """The folder that `folder` grows as, made and held; whose it is has to be asked before anything is put there.

    Where a `UserError` comes before this call has put anything there but the files `own`, all that it made is gone.
    """
    partial = partial_of(folder)
    made = [place for place in (partial, *partial.parents) if not place.exists()]
    try:
        make_folders(partial, ())
    except UserError:
        _remove_folders(made)
        raise
    with held(partial):
        before = set(partial.rglob("*"))
        try:
            yield partial
        except UserError:
            new = set(partial.rglob("*")) - before
            files = [path for path in new if path.is_symlink() or not path.is_dir()]
            if {path.relative_to(partial).as_posix() for path in files} <= set(own):
                for path in files:
                    path.unlink()
                _remove_folders([*sorted(new - set(files), reverse=True), *made])
            raise


def _remove_folders(folders: Iterable[Path]) -> None:
    """Remove those that are empty, the deepest being first."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def make_folders(partial: Path, inside: Iterable[str]) -> None:
    """Make `partial` and folders in it; raises `UserError` where that is not allowed."""
    try:
        for folder in ("", *inside):
            (partial / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {partial}: {error.strerror}. Choose another folder") from None


def files_in(partial: Path) -> Iterable[tuple[str, Path]]:
    """Every file below a folder, by its path from there."""
    for folder, _, names in os.walk(partial):
        inside = Path(folder).relative_to(partial).as_posix()
        for name in names:
            yield name if inside == "." else f"{inside}/{name}", Path(folder, name)


def fill(partial: Path, pieces: Sequence[Piece], *, copy: bool, say: Say) -> tuple[int, int]:
    """Put what is lacking into `partial`; how many files are links and how many have bytes of their own."""
    todo = [piece for piece in pieces if not _is_there(piece.file, f"{partial}/{piece.target}", copy=copy)]
    if len(todo) < len(pieces):
        say(f"going on with {partial}: {len(pieces) - len(todo):,} of {len(pieces):,} files are there")
    link = not copy and _can_link(todo, partial)
    if not link:
        size = sum(piece.file.stat()[0] for piece in todo)
        require_room(partial, size + len(todo) * BLOCK)
        if todo:
            say(f"{_why_written(todo, copy=copy)}: {readable_size(size)} to write")
    # Archives are read once from end to end.
    todo.sort(key=lambda piece: piece.file.offset)
    progress, linked = Progress("file", len(todo), say), 0
    for done, piece in enumerate(todo):
        linked += _put(piece.file, f"{partial}/{piece.target}", link=link)
        progress(done + 1)
    return linked, len(todo) - linked


def _why_written(todo: Sequence[Piece], *, copy: bool) -> str:
    if todo[0].file.path is None:
        return "unpacking"
    return "copying" if copy else "copying, because this file system has no hard links to where the files are"


def _put(file: File, target: str, *, link: bool) -> bool:
    """Give `file` a second place at `target`; whether as a hard link."""
    if link and file.path:
        with suppress(OSError):  # too many links to this one, or a symbolic link led to another disk
            os.link(file.path, target)
            return True
    size, changed = file.stat()
    part = f"{target}.part"
    try:
        with file.open() as source, open(part, "wb") as out:  # noqa: PTH123
            shutil.copyfileobj(source, out, 1 << 20)
            if out.tell() != size:
                raise tarfile.ReadError("it ends too early")
    except (tarfile.TarError, FileNotFoundError, PermissionError) as error:
        raise UserError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    os.utime(part, (changed, changed))
    os.replace(part, target)  # noqa: PTH105
    return False


def _is_there(file: File, target: str, *, copy: bool) -> bool:
    """Whether an earlier call has put `file` there; what is there instead of it is taken away."""
    try:
        there = os.stat(target)  # noqa: PTH116
    except FileNotFoundError:
        return False
    size, changed = file.stat()
    if there.st_size == size and abs(there.st_mtime - changed) < 2 and not (copy and there.st_nlink > 1):
        return True  # 2 seconds: the clock of FAT
    os.unlink(target)  # noqa: PTH108
    return False


def _can_link(todo: Iterable[Piece], partial: Path) -> bool:
    source = next((piece.file.path for piece in todo), None)
    if source is None:
        return False
    try:
        os.link(source, partial / "link.probe")
    except OSError:
        return False
    (partial / "link.probe").unlink()
    return True


def give_name(partial: Path, folder: Path) -> None:
    """Rename `partial`, which is whole, to `folder`, which is not there or empty."""
    with suppress(OSError):
        folder.rmdir()  # an empty one, which not every system replaces
    try:
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"cannot rename {partial} to {folder}: {error.strerror}. Run again") from None


def require_room(place: Path, needed: int, hint: str = "") -> None:
    """Raise `UserError` unless the disk of `place` has room for so many bytes."""
    free = shutil.disk_usage(existing(place)).free
    if needed and needed + HEADROOM > free:
        raise UserError(
            f"{place} has no room: {readable_size(needed)} are needed, {readable_size(free)} free. "
            f"Make room, or choose another folder{hint}"
        )


def existing(path: Path) -> Path:
    """The deepest folder of a path that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())

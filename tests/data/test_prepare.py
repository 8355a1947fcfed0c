"""The official VOC becomes a folder that is whole or absent, from wherever it lies, and its source stays as it was."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from boxwright import download
from boxwright.__main__ import main
from boxwright.data import prepare as module
from boxwright.data.dataset import open_dataset
from boxwright.data.formats.voc import CLASSES
from boxwright.data.layout import SplitName
from boxwright.data.prepare import ARCHIVES, Archive, Prepared, prepare_voc
from boxwright.download import check
from boxwright.folders import held
from boxwright.types import UserError

LISTS = {
    2007: {"train": ["000005", "000007"], "val": ["000009"], "test": ["000001", "000002", "000003"]},
    2012: {"train": ["2008_000002", "2008_000008"], "val": ["2008_000015", "2009_000001"]},
}
for _lists in LISTS.values():
    _lists["trainval"] = _lists["train"] + _lists["val"]
UNLISTED = {2007: ["000099"], 2012: ["2007_000999"]}
FILES = 2 * (3 + 4 + 3)  # that the default makes


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (1_200_000_000, 1_200_000_000 + len(content)))


def write_devkit(devkit: Path) -> Path:
    """The structure of the official one, class lists and what is not needed included."""
    for year, lists in LISTS.items():
        folder = devkit / f"VOC{year}"
        for name, stems in lists.items():
            put(folder / f"ImageSets/Main/{name}.txt", "".join(f"{stem} \n" for stem in stems).encode())
            put(folder / f"ImageSets/Main/car_{name}.txt", "".join(f"{stem} -1\n" for stem in stems).encode())
        put(folder / "ImageSets/Segmentation/train.txt", b"000005\n")
        put(folder / "SegmentationClass/000005.png", b"no picture that is needed")
        for number, stem in enumerate([*lists["trainval"], *lists.get("test", []), *UNLISTED[year]]):
            picture = io.BytesIO()
            Image.new("RGB", (40 + number, 30), (number, 0, 0)).save(picture, "JPEG")
            put(folder / f"JPEGImages/{stem}.jpg", picture.getvalue())
            objects = "".join(
                f"<object><name>{CLASSES[(number + i) % 20]}</name><difficult>{i % 2}</difficult><bndbox><xmin>{1 + i}"
                f"</xmin><ymin>1</ymin><xmax>{20 + number}</xmax><ymax>30</ymax></bndbox></object>"
                for i in range(1 + number % 3)
            )
            put(folder / f"Annotations/{stem}.xml", f"<annotation>{objects}</annotation>".encode())
    return devkit


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    return write_devkit(tmp_path / "source" / "VOCdevkit")


def tree(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """Every file below `folder`: bytes, mode, time."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _, _) in tree(folder).items()}


def stems(folder: Path, split: str) -> list[str]:
    pictures = sorted(path.stem for path in (folder / split / "images").iterdir())
    assert pictures == sorted(path.stem for path in (folder / split / "labels").iterdir())
    return pictures


def statistics(data: Path, split: SplitName, classes: Iterable[str] = CLASSES) -> tuple[int, Counter[str], int, float]:
    """Pictures, objects of each class, difficult ones, and the sum of all edges."""
    records = open_dataset(data).with_classes(classes).read(split).records
    labels = Counter(CLASSES[label] for record in records for label in record.labels)
    edges = sum(float(record.boxes.sum()) for record in records)
    return len(records), labels, sum(int(record.difficult.sum()) for record in records), edges


# From an unpacked devkit


def test_the_official_lists_become_train_and_valid(devkit: Path, tmp_path: Path) -> None:
    before = tree(devkit)
    folder = tmp_path / "work" / "final_xml_dataset"
    said: list[str] = []
    done = prepare_voc(folder, root=devkit, say=said.append)
    assert done == Prepared(folder / "data.yaml", 7, 3, linked=FILES)
    assert stems(folder, "train") == sorted(LISTS[2007]["trainval"] + LISTS[2012]["trainval"])
    assert stems(folder, "valid") == LISTS[2007]["test"]
    assert sorted(path.name for path in folder.iterdir()) == ["data.yaml", "train", "valid"]
    assert list(folder.parent.iterdir()) == [folder]
    assert tree(devkit) == before
    assert (folder / "train/images/000005.jpg").samefile(devkit / "VOC2007/JPEGImages/000005.jpg")
    assert "2007/trainval: 3 pictures, note: the published list has 5,011" in said


def test_what_is_learned_from_the_folder_is_what_the_devkit_says(devkit: Path, tmp_path: Path) -> None:
    data = prepare_voc(tmp_path / "made", root=devkit).data
    assert open_dataset(data).classes == CLASSES
    for split in ("train", "val"):
        found = statistics(data, split)
        assert found == statistics(devkit, split) == statistics(data.parent, split)
        assert found[2] > 0
    assert yaml.safe_load(data.read_text(encoding="utf-8"))["NC"] == 20


@pytest.mark.parametrize("inside", [".", "VOCdevkit"])
def test_the_devkit_is_found_where_people_unpack_it(devkit: Path, tmp_path: Path, inside: str) -> None:
    assert prepare_voc(tmp_path / "made", root=devkit.parent / inside).train == 7


def test_archives_unpacked_into_folders_of_their_own(devkit: Path, tmp_path: Path) -> None:
    apart = tmp_path / "apart" / "VOCtest_06-Nov-2007" / "VOCdevkit" / "VOC2007"
    for name in LISTS[2007]["test"]:
        for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
            (apart / kind).mkdir(parents=True, exist_ok=True)
            (devkit / "VOC2007" / kind / f"{name}.{suffix}").rename(apart / kind / f"{name}.{suffix}")
    (apart / "ImageSets/Main").mkdir(parents=True)
    (devkit / "VOC2007/ImageSets/Main/test.txt").rename(apart / "ImageSets/Main/test.txt")
    devkit.parent.rename(tmp_path / "apart" / "VOCtrainval")
    assert prepare_voc(tmp_path / "made", root=tmp_path / "apart").valid == 3


@pytest.mark.parametrize(
    ("options", "train", "valid"),
    [
        ({"years": [2007]}, LISTS[2007]["trainval"], LISTS[2007]["test"]),
        ({"years": [2012]}, LISTS[2012]["train"], LISTS[2012]["val"]),
        ({"valid": ["val"]}, LISTS[2007]["train"] + LISTS[2012]["train"], LISTS[2007]["val"] + LISTS[2012]["val"]),
        ({"years": [2007], "train": ["val"]}, LISTS[2007]["val"], LISTS[2007]["test"]),
        ({"years": [2007], "train": ["val", "train", "trainval"]}, LISTS[2007]["trainval"], LISTS[2007]["test"]),
        ({"years": [2007], "train": ["test"], "valid": ["trainval"]}, LISTS[2007]["test"], LISTS[2007]["trainval"]),
    ],
)
def test_other_years_and_lists(
    devkit: Path, tmp_path: Path, options: dict[str, Any], train: list[str], valid: list[str]
) -> None:
    folder = tmp_path / "made"
    years = options.get("years", [2007, 2012])
    root = devkit / f"VOC{years[0]}" if len(years) == 1 else devkit  # a single year is a root too
    done = prepare_voc(folder, root=root, **options)
    assert (stems(folder, "train"), stems(folder, "valid")) == (sorted(train), sorted(valid))
    assert (done.train, done.valid) == (len(train), len(valid))
    assert prepare_voc(folder, root=root, **options) == replace(done, linked=0)


def test_the_published_numbers_are_those_of_the_challenges() -> None:
    numbers = {(archive.year, name): count for archive in ARCHIVES for name, count in archive.pictures.items()}
    assert numbers[2007, "trainval"] == numbers[2007, "train"] + numbers[2007, "val"] == 5011
    assert numbers[2012, "trainval"] == numbers[2012, "train"] + numbers[2012, "val"] == 11540
    assert numbers[2007, "trainval"] + numbers[2012, "trainval"] == 16551
    assert numbers[2007, "test"] == 4952
    assert sum(archive.size or 0 for archive in ARCHIVES) == 2_910_691_840
    assert all(len(archive.sha256 or "") == 64 and archive.url.startswith("https://") for archive in ARCHIVES)


def test_pictures_that_are_symbolic_links_are_followed(devkit: Path, tmp_path: Path) -> None:
    picture = devkit / "VOC2007/JPEGImages/000005.jpg"
    picture.rename(tmp_path / "elsewhere.jpg")
    try:
        picture.symlink_to(tmp_path / "elsewhere.jpg")
    except OSError:
        pytest.skip("no symbolic links here")
    prepare_voc(tmp_path / "made", root=devkit)
    made = tmp_path / "made/train/images/000005.jpg"
    assert not made.is_symlink()
    assert made.read_bytes() == (tmp_path / "elsewhere.jpg").read_bytes()


# Links and copies


def test_copies_do_not_share_bytes_with_the_source(devkit: Path, tmp_path: Path) -> None:
    done = prepare_voc(tmp_path / "made", root=devkit, copy=True)
    assert (done.linked, done.written) == (0, FILES)
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "made").rglob("*.*"))


def test_without_hard_links_there_are_copies_and_it_is_said(
    devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    said: list[str] = []
    assert prepare_voc(tmp_path / "made", root=devkit, say=said.append).written == FILES
    assert any("no hard links" in line for line in said)


# Whole or absent


def test_a_folder_that_is_whole_is_left_as_it_is(devkit: Path, tmp_path: Path) -> None:
    prepare_voc(tmp_path / "made", root=devkit)
    before = tree(tmp_path)
    said: list[str] = []
    done = prepare_voc(tmp_path / "made", root=tmp_path / "nowhere", say=said.append)
    assert (done.train, done.valid, done.linked, done.written) == (7, 3, 0, 0)
    assert "whole" in said[0]
    assert tree(tmp_path) == before


def test_an_empty_folder_is_taken(devkit: Path, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    assert prepare_voc(tmp_path / "made", root=devkit).train == 7


KILLED = """
import os, signal, sys
from pathlib import Path
from boxwright.data.prepare import prepare_voc

left = int(sys.argv[1])

def hook(event, arguments):
    global left
    if event in ("os.link", "os.rename"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
prepare_voc(Path(sys.argv[2]), root=Path(sys.argv[3]), copy=sys.argv[4] == "copy")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize(
    ("step", "how"), [(1, "link"), (2, "link"), (13, "link"), (FILES + 2, "link"), (7, "copy"), (FILES + 1, "copy")]
)
def test_after_a_kill_the_next_call_goes_on(devkit: Path, tmp_path: Path, step: int, how: str) -> None:
    folder = tmp_path / "made"
    before = tree(devkit)
    command = [sys.executable, "-c", KILLED, str(step), str(folder), str(devkit), how]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not folder.exists()
    said: list[str] = []
    done = prepare_voc(folder, root=devkit, copy=how == "copy", say=said.append)
    there = {("link", 1): 0, ("link", 2): 0, ("link", 13): 11, ("copy", 7): 6}.get((how, step), FILES)
    assert done.linked + done.written == FILES - there
    assert any("going on" in line for line in said) == (there > 0)
    whole = tmp_path / "straight"
    prepare_voc(whole, root=devkit, copy=how == "copy")
    assert contents(folder) == contents(whole)
    assert not (tmp_path / "made.partial").exists()
    assert tree(devkit) == before


@pytest.fixture
def begun(devkit: Path, tmp_path: Path) -> Path:
    """A call with other lists that was cut off: half a folder of hard links, and a file half written."""
    prepare_voc(tmp_path / "made", root=devkit, years=[2007], valid=["val"])
    partial = tmp_path / "made.partial"
    (tmp_path / "made").rename(partial)
    (partial / "train/images/000005.jpg.part").write_bytes(b"half")
    return partial


@pytest.mark.parametrize("copy", [False, True])
def test_what_another_choice_of_lists_left_is_taken_away(
    devkit: Path, tmp_path: Path, begun: Path, *, copy: bool
) -> None:
    before = tree(devkit)
    done = prepare_voc(tmp_path / "made", root=devkit, years=[2007], train=["val"], copy=copy)
    assert stems(tmp_path / "made", "train") == LISTS[2007]["val"]
    assert done.written == (8 if copy else 0)
    assert tree(devkit) == before
    assert not begun.exists()


def test_bytes_are_never_written_through_a_link_into_the_source(
    devkit: Path, tmp_path: Path, begun: Path, official: Official
) -> None:
    """What lies in the partial folder may be the source's own files under a second name."""
    archives = official(devkit)
    path = devkit / "VOC2007/JPEGImages/000005.jpg"
    with path.open("ab") as file:
        file.write(b"changed since, and so in the link too")
    before = tree(devkit)
    prepare_voc(tmp_path / "made", archives=archives, years=[2007])
    assert tree(devkit) == before
    assert (tmp_path / "made/train/images/000005.jpg").stat().st_size < path.stat().st_size
    assert not begun.exists()


def test_a_partial_folder_that_is_not_ours_is_left_alone(devkit: Path, tmp_path: Path) -> None:
    put(tmp_path / "made.partial" / "thesis.txt", b"years of work")
    assert "thesis.txt" in refusal(lambda: prepare_voc(tmp_path / "made", root=devkit))
    assert (tmp_path / "made.partial" / "thesis.txt").read_bytes() == b"years of work"


def test_pictures_of_others_that_are_called_like_ours_are_left_alone(devkit: Path, tmp_path: Path) -> None:
    put(tmp_path / "made.partial" / "train/images/mine.jpg", b"years of work")
    before = sorted(tmp_path.rglob("*"))
    assert "mine.jpg" in refusal(lambda: prepare_voc(tmp_path / "made", root=devkit))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="has no lock on folders")
def test_two_calls_do_not_work_in_one_folder(devkit: Path, tmp_path: Path) -> None:
    (tmp_path / "made.partial").mkdir()
    with held(tmp_path / "made.partial"):
        assert "another process" in refusal(lambda: prepare_voc(tmp_path / "made", root=devkit))
    assert prepare_voc(tmp_path / "made", root=devkit).train == 7


def test_a_full_disk_is_told_before_it_is_full(devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    assert "no room" in refusal(lambda: prepare_voc(tmp_path / "made", root=devkit, copy=True))
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BOXWRIGHT_OFFLINE", "1")
    assert "2.7 GiB" not in refusal(lambda: prepare_voc(tmp_path / "made", years=[2007]))
    assert "5.4 GiB" in refusal(lambda: prepare_voc(tmp_path / "made"))  # the archives, and what is in them
    assert prepare_voc(tmp_path / "made", root=devkit).train == 7  # links need none


# Mistakes


def test_pictures_that_are_missing_are_counted_and_named(devkit: Path, tmp_path: Path) -> None:
    for name in ("2008_000002", "2008_000008", "2008_000015", "2009_000001"):
        (devkit / f"VOC2012/JPEGImages/{name}.jpg").unlink()
    message = refusal(lambda: prepare_voc(tmp_path / "made", root=devkit))
    assert "trainval.txt lists 4 pictures" in message
    assert "JPEGImages: 2008_000002, 2008_000008, 2008_000015 and 1 more" in message
    (devkit / "VOC2007/Annotations/000002.xml").unlink()
    message = refusal(lambda: prepare_voc(tmp_path / "made", root=devkit, years=[2007]))
    assert message.endswith("Annotations: 000002")
    assert not list(tmp_path.glob("made*"))


def _write(text: str) -> Callable[[Path], None]:
    return lambda devkit: put(devkit / "VOC2007/ImageSets/Main/test.txt", text.encode())


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        (None, {"valid": ["trainval"], "train": ["train"]}, "2007/train and 2007/trainval share 2 pictures"),
        (None, {"years": [2012], "valid": ["test"]}, "--valid test: of 2012 there are train, trainval, val"),
        (None, {"years": [2011]}, "--years 2011: there are 2007 and 2012"),
        (None, {"years": []}, "there are 2007 and 2012"),
        (lambda devkit: shutil.rmtree(devkit / "VOC2007"), {}, "It has VOC2012: say --years 2012"),
        (lambda devkit: shutil.rmtree(devkit / "VOC2007"), {"years": [2007]}, "no VOC2007"),
        (lambda devkit: (devkit / "VOC2007/ImageSets/Main/test.txt").unlink(), {}, "there are train, trainval, val"),
        (lambda devkit: shutil.rmtree(devkit / "VOC2007/Annotations"), {}, "cannot read the folder"),
        (_write(""), {}, "test.txt lists no pictures"),
        (_write("000001\n../../../etc/passwd\n"), {}, "test.txt:2: '../../../etc/passwd'"),
        (_write("000005\n"), {}, "2007/trainval and 2007/test share 1 pictures: 000005"),
    ],
)
def test_mistakes_are_told_in_a_line_and_leave_nothing(
    devkit: Path, tmp_path: Path, spoil: Callable[[Path], None] | None, options: dict[str, Any], words: str
) -> None:
    if spoil:
        spoil(devkit)
    before = tree(tmp_path)
    assert words in refusal(lambda: prepare_voc(tmp_path / "made", root=devkit, **options))
    assert tree(tmp_path) == before
    assert not list(tmp_path.glob("made*"))


def test_years_with_a_picture_of_the_same_name(devkit: Path, tmp_path: Path) -> None:
    (devkit / "VOC2012/ImageSets/Main/trainval.txt").write_text("000005\n", encoding="utf-8")
    for kind, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        shutil.copy(devkit / f"VOC2007/{kind}/000005.{suffix}", devkit / f"VOC2012/{kind}/000005.{suffix}")
    assert "share 1 pictures: 000005" in refusal(lambda: prepare_voc(tmp_path / "made", root=devkit))


def test_a_folder_that_holds_something_else_is_left_alone(devkit: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    put(made / "thesis.txt", b"years of work")
    assert "something else" in refusal(lambda: prepare_voc(made, root=devkit))
    assert "something else" in refusal(lambda: prepare_voc(made / "thesis.txt", root=devkit))
    other = tmp_path / "other"
    prepare_voc(other, root=devkit, years=[2007])
    assert "holds other lists: train of 2007/trainval." in refusal(lambda: prepare_voc(other, root=devkit))
    (other / "valid/labels/000001.xml").unlink()
    message = refusal(lambda: prepare_voc(other, root=devkit, years=[2007]))
    assert f"{other / 'valid' / 'labels'} has 2 files, not 3" in message


def test_what_a_desktop_adds_to_a_whole_folder_is_no_fault(devkit: Path, tmp_path: Path) -> None:
    done = prepare_voc(tmp_path / "made", root=devkit)
    for name in ("Thumbs.db", ".DS_Store", "._000005.jpg"):
        put(tmp_path / "made/train/images" / name, b"a preview")
    assert prepare_voc(tmp_path / "made", root=devkit) == replace(done, linked=0)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_a_link_to_another_place_grows_there(devkit: Path, tmp_path: Path, *, there: bool) -> None:
    (tmp_path / "disk").mkdir()
    if there:
        (tmp_path / "disk/voc").mkdir()
    try:
        (tmp_path / "made").symlink_to(tmp_path / "disk/voc", target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    done = prepare_voc(tmp_path / "made", root=devkit)
    assert (tmp_path / "made").is_symlink()
    assert stems(tmp_path / "made", "valid") == LISTS[2007]["test"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["voc"]
    assert prepare_voc(tmp_path / "made", root=devkit) == replace(done, linked=0)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="may read everything")
def test_a_list_that_may_not_be_read(devkit: Path, tmp_path: Path) -> None:
    (devkit / "VOC2007/ImageSets/Main/test.txt").chmod(0)
    assert "test.txt: Permission denied" in refusal(lambda: prepare_voc(tmp_path / "made", root=devkit))


def test_places_that_cannot_be(devkit: Path, tmp_path: Path) -> None:
    put(tmp_path / "file", b"")
    assert "no folder" in refusal(lambda: prepare_voc(tmp_path / "made", root=tmp_path / "file"))
    assert "do not go together" in refusal(lambda: prepare_voc(tmp_path / "made", root=devkit, archives=devkit))
    assert "cannot write into" in refusal(lambda: prepare_voc(tmp_path / "file" / "made", root=devkit))
    assert "no folder that can be used" in refusal(lambda: prepare_voc(Path(tmp_path.anchor), root=devkit))


# From the tar files

Official = Callable[..., Path]


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Official:
    """Packs a devkit into a folder of tar files as the official ones are, and makes these the published ones."""

    def official(devkit: Path, extra: Iterable[tuple[tarfile.TarInfo, bytes]] = (), url: str = "") -> Path:
        folder = tmp_path / "archives"
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(
            module, "ARCHIVES", tuple(pack(archive, devkit, folder, extra, url) for archive in ARCHIVES)
        )
        return folder

    return official


def pack(
    archive: Archive, devkit: Path, folder: Path, extra: Iterable[tuple[tarfile.TarInfo, bytes]], url: str
) -> Archive:
    year = devkit / f"VOC{archive.year}"
    theirs = {stem for name in archive.pictures for stem in LISTS[archive.year][name]}
    lists = {f"{kind}{name}" for name in archive.pictures for kind in ("", "car_")}
    with tarfile.open(folder / archive.name, "w") as tar:
        for path in [devkit, *sorted(year.rglob("*"))]:
            if path.is_dir() or path.stem in (lists if path.parent.name == "Main" else theirs):
                tar.add(path, f"VOCdevkit{path.as_posix().removeprefix(devkit.as_posix())}", recursive=False)
        for member, content in extra:
            tar.addfile(member, io.BytesIO(content))
    content = (folder / archive.name).read_bytes()
    pictures = {name: len(LISTS[archive.year][name]) for name in archive.pictures}
    return replace(
        archive, url=f"{url}/{archive.name}", mirrors=(f"{url}/mirror/{archive.name}",), size=len(content),
        sha256=hashlib.sha256(content).hexdigest(), pictures=pictures,
    )  # fmt: skip


def test_the_tar_files_give_what_the_devkit_gives(devkit: Path, tmp_path: Path, official: Official) -> None:
    archives = official(devkit)
    before = tree(archives)
    for path in devkit.rglob("*.*"):
        path.chmod(0o755)
    said: list[str] = []
    done = prepare_voc(tmp_path / "made", archives=archives, say=said.append)
    assert done == Prepared(tmp_path / "made" / "data.yaml", 7, 3, written=FILES)
    prepare_voc(tmp_path / "straight", root=devkit)
    assert contents(tmp_path / "made") == contents(tmp_path / "straight")
    assert {"2007/trainval: 3 pictures, as published", "2007/test: 3 pictures, as published"} <= set(said)
    assert tree(archives) == before


def member(name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", size: int = 0, mode: int = 0o644) -> Any:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, size, mode
    return info, bytes(size)


INSIDE = "VOCdevkit/VOC2007"


def test_nothing_but_what_was_asked_for_comes_out_of_an_archive(
    devkit: Path, tmp_path: Path, official: Official
) -> None:
    archives = official(
        devkit,
        [
            member("../escaped.txt", size=3),
            member(f"{INSIDE}/../../../escaped.txt", size=3),
            member(f"{tmp_path.as_posix()}/escaped.txt", size=3),
            member(f"{INSIDE}/JPEGImages/../../escaped.jpg", size=3),
            member(f"{INSIDE}/JPEGImages/link.jpg", tarfile.SYMTYPE, link="/etc/passwd"),
            member(f"{INSIDE}/pipe", tarfile.FIFOTYPE),
            member(f"{INSIDE}/null", tarfile.CHRTYPE),
            member(f"{INSIDE}/VOCcode/run.sh", size=3, mode=0o4777),
        ],
    )
    before = set(tree(tmp_path))
    prepare_voc(tmp_path / "made", archives=archives, years=[2007])
    new = {name for name in set(tree(tmp_path)) - before if not name.startswith("made/")}
    assert not new
    for path in (tmp_path / "made").rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or (stat.S_ISREG(path.stat().st_mode) and not path.stat().st_mode & 0o111)


@pytest.mark.parametrize(
    "instead",
    [
        member(f"{INSIDE}/JPEGImages/000001.jpg", tarfile.SYMTYPE, link="/etc/passwd"),
        member(f"{INSIDE}/JPEGImages/000001.jpg", tarfile.LNKTYPE, link=f"{INSIDE}/JPEGImages/000002.jpg"),
        member(f"{INSIDE}/JPEGImages/000001.jpg", tarfile.FIFOTYPE),
        member(f"{INSIDE}/JPEGImages/000001.jpg", tarfile.DIRTYPE),
        member(f"{INSIDE}/JPEGImages/000001.jpg", size=module.LARGEST + 1),
        member("VOCdevkit/./VOC2007/JPEGImages/000001.jpg", size=3),
        member("/VOCdevkit/VOC2007/JPEGImages/000001.jpg", size=3),
    ],
    ids=["symbolic link", "hard link", "pipe", "folder", "too large", "another name", "absolute"],
)
def test_a_picture_that_is_no_plain_file_is_missing(
    devkit: Path, tmp_path: Path, official: Official, instead: tuple[tarfile.TarInfo, bytes]
) -> None:
    (devkit / "VOC2007/JPEGImages/000001.jpg").unlink()
    archives = official(devkit, [instead])
    message = refusal(lambda: prepare_voc(tmp_path / "made", archives=archives, years=[2007]))
    assert "lists 1 pictures without a plain file" in message
    assert message.endswith("JPEGImages: 000001")
    assert not list(tmp_path.glob("made*"))


def test_archives_that_are_not_the_published_ones(devkit: Path, tmp_path: Path, official: Official) -> None:
    archives = official(devkit)

    def message() -> str:
        return refusal(lambda: prepare_voc(tmp_path / "made", archives=archives, years=[2007]))

    test = archives / "VOCtest_06-Nov-2007.tar"
    content = test.read_bytes()
    test.write_bytes(content[:-1] + b"x")
    assert "SHA-256" in message()
    assert message().endswith("leave --archives out to download it, or name what you unpacked from it with --root")
    test.write_bytes(content[:5000])
    assert f"has 5000 bytes, {len(content)} are expected" in message()
    test.unlink()
    assert "has no VOCtest_06-Nov-2007.tar" in message()
    assert not list(tmp_path.glob("made*"))


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"<html>" * 500])
def test_a_damaged_archive_of_the_right_hash(
    devkit: Path, tmp_path: Path, official: Official, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    archives = official(devkit)
    path = archives / "VOCtest_06-Nov-2007.tar"
    path.write_bytes(damage(path.read_bytes()))
    published = replace(module.ARCHIVES[1], size=None, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "ARCHIVES", (module.ARCHIVES[0], published))
    refusal(lambda: prepare_voc(tmp_path / "made", archives=archives, years=[2007]))
    assert not (tmp_path / "made").exists()


def test_check_writes_nothing_beside_the_file(devkit: Path, official: Official) -> None:
    archives = official(devkit)
    before = tree(archives)
    for archive in module.ARCHIVES:
        check(archive, archives / archive.name)
    assert "no-such.tar" in refusal(lambda: check(module.ARCHIVES[0], archives / "no-such.tar"))
    assert tree(archives) == before


# From the network


class Server(http.server.ThreadingHTTPServer):
    """Serves files by their path, resuming; some are cut off or not what they should be."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cuts: Counter[str] = Counter()  # how often an answer breaks off half-way
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers["Range"]
        self.server.asked.append((self.path, asked))
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        rest = content[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.server.cuts[self.path] > 0:
            self.server.cuts[self.path] -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "BOXWRIGHT_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSES", (0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def served(server: Server, devkit: Path, tmp_path: Path, official: Official) -> Mapping[str, bytes]:
    """The archives of 2007 on the server; nothing of them on this machine."""
    folder = official(devkit, url=server.url)
    server.files = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return server.files


def test_what_is_not_on_the_machine_is_downloaded_once(
    server: Server, served: Mapping[str, bytes], devkit: Path, tmp_path: Path
) -> None:
    before = {name for name in tree(tmp_path) if not name.startswith(("made/", "cache/"))}
    said: list[str] = []
    assert prepare_voc(tmp_path / "made", say=said.append).written == FILES
    prepare_voc(tmp_path / "straight", root=devkit)
    assert contents(tmp_path / "made") == contents(tmp_path / "straight")
    assert {path for path, _ in server.asked} == set(served)
    assert any("Flickr" in line for line in said)
    assert any(str(tmp_path / "cache") in line for line in said)
    prepare_voc(tmp_path / "again", years=[2007])
    assert len(server.asked) == 3
    new = {name.split("/")[0] for name in tree(tmp_path)} - {name.split("/")[0] for name in before}
    assert new == {"made", "straight", "again", "cache"}


def test_a_download_that_breaks_off_is_gone_on_with(
    server: Server, served: Mapping[str, bytes], tmp_path: Path
) -> None:
    path = "/VOCtest_06-Nov-2007.tar"
    server.cuts[path] = 2
    assert prepare_voc(tmp_path / "made", years=[2007]).valid == 3
    half = len(served[path]) // 2
    assert [asked for place, asked in server.asked if place == path][:2] == [None, f"bytes={half}-"]


def test_a_wrong_file_is_refused_and_the_mirror_asked(
    server: Server, served: Mapping[str, bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "/VOCtest_06-Nov-2007.tar"
    right = served[name]
    server.files[name] = right[:-1] + b"x"
    message = refusal(lambda: prepare_voc(tmp_path / "made", years=[2007]))
    assert "404" in message
    assert "--root VOCdevkit or --archives FOLDER" in message
    assert "SHA-256" in caplog.text
    assert not list(tmp_path.glob("made*"))
    assert not any((tmp_path / "cache" / f"{name[1:]}{suffix}").exists() for suffix in ("", ".part"))
    server.files[f"/mirror{name}"] = right
    assert prepare_voc(tmp_path / "made", years=[2007]).valid == 3


def test_a_mirror_goes_on_with_what_the_first_server_sent(
    server: Server, served: Mapping[str, bytes], tmp_path: Path
) -> None:
    name = "/VOCtest_06-Nov-2007.tar"
    server.files[f"/mirror{name}"] = served[name]
    server.cuts[name] = 100
    prepare_voc(tmp_path / "made", years=[2007])
    path, asked = server.asked[-1]
    assert path == f"/mirror{name}"
    assert asked is not None


def test_offline_opens_no_socket(
    server: Server, served: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOXWRIGHT_OFFLINE", "1")
    message = refusal(lambda: prepare_voc(tmp_path / "made", years=[2007]))
    assert "BOXWRIGHT_OFFLINE" in message
    assert str(tmp_path / "cache" / "VOCtrainval_06-Nov-2007.tar") in message
    assert not server.asked
    for name, content in served.items():
        put(tmp_path / "cache" / name[1:], content)
    assert prepare_voc(tmp_path / "made").train == 7
    assert not server.asked


# The command


def test_the_command(devkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "prepare", "voc", "--root", str(devkit), "--folder", str(tmp_path / "made")]
    assert main([*words, "--years", "2012", "--train", "train", "--valid", "val", "--copy", "--json"]) == 0
    out, error = capsys.readouterr()
    data = str(tmp_path / "made" / "data.yaml")
    assert json.loads(out) == {"data": data, "train": 2, "valid": 2, "linked": 0, "written": 8}
    assert f"2 + 2 pictures; {data}" in error
    assert main(words) == 2
    assert "holds other lists" in capsys.readouterr().err
    assert main(["data", "prepare", "coco"]) == 2


@pytest.mark.real_data
@pytest.mark.parametrize("years", [[2007, 2012], [2007], [2012]])
def test_real_pictures(real_data: Path, tmp_path: Path, years: list[int]) -> None:
    root = real_data / "voc_mini"
    data = prepare_voc(tmp_path / "made", root=root, years=years, copy=True).data  # not to touch what others share
    source = root / "VOCdevkit" if len(years) == 2 else root / "VOCdevkit" / f"VOC{years[0]}"
    for split in ("train", "val"):
        assert statistics(data, split) == statistics(source, split)

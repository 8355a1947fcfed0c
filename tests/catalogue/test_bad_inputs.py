"""Every row of the catalogue through the real commands: answer, words, time, and the data left as it was."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import re
import resource
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.catalogue.files import Dataset, digest, jpeg_claiming, png_bomb, png_header
from tests.catalogue.rows import JPEG, ROWS, Row

from boxwright.__main__ import main
from boxwright.data import images
from boxwright.data.dataset import Split, open_dataset
from boxwright.data.images import ImageError, decode, read_header

MEMORY = 50_000_000  # bytes that a bomb may take
# Rows that need more than files: the tests below, by what they show.
BY_THEMSELVES = {32, 35, 36, 86, 94, 95, 97}


class Begins(BaseException):
    """Training would begin now."""


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Dataset(tmp_path_factory.mktemp("catalogue") / "good").root


@pytest.fixture
def dataset(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A copy of the good dataset, whose folder is also the home; commands run beside it."""
    root = tmp_path / "set"
    shutil.copytree(good, root)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(root))
    dataset = Dataset.__new__(Dataset)
    dataset.root, dataset.yaml_path = root, root / "data.yaml"
    dataset.images, dataset.labels = root / "train" / "images", root / "train" / "labels"
    return dataset


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """A command; its exit code, or 0 where training was about to begin, and what it said."""
    from boxwright.training import loop

    def begin(*_: object, **__: object) -> None:
        raise Begins

    monkeypatch.setattr(loop, "build_detector", begin)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except Begins:
            code = 0
        out, error = capsys.readouterr()
        assert "Traceback" not in out + error
        return code, out, error

    return run


def train(run: Callable[..., tuple[int, str, str]], data: Path, *options: str) -> tuple[int, str]:
    model = ("--model", "fasterrcnn_vitdet_nano", "--device", "cpu")
    code, _, error = run("train", *model, "--data", str(data), *options)
    return code, error


def check(run: Callable[..., tuple[int, str, str]], data: Path, *options: str) -> tuple[int, list[str]]:
    """The exit code of `data check`, and its findings; without any, what was refused."""
    code, out, error = run("data", "check", str(data), "--json", *options)
    if code == 2:
        return code, [error]
    found = json.loads(out)["findings"]
    assert bool([finding for finding in found if finding["level"] == "error"]) == bool(code)
    return code, [
        f"{finding['path']}{':' * bool(finding['line'])}{finding['line'] or ''}: {finding['reason']} "
        f"[{finding['level']} {finding['kind']}]"
        for finding in found
    ]


def test_the_table_is_whole() -> None:
    assert {row.number for row in ROWS} | BY_THEMSELVES == set(range(1, 117))
    for row in ROWS:
        assert bool(row.differs) or row.answer == row.right


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_the_answer_is_right(row: Row, dataset: Dataset, run: Callable[..., tuple[int, str, str]]) -> None:
    row.make(dataset)
    data = dataset.root / row.data
    before = digest(dataset.root)
    train(run, dataset.root / "none")  # whatever is imported once is not this row's time
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trained, error = train(run, data, *row.train)
    middle = time.process_time()
    checked, found = check(run, data, *row.check)
    taken = max(middle - start, time.process_time() - middle)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    assert digest(dataset.root) == before
    assert taken < row.seconds
    assert grown < 300_000_000
    if row.answer == "E":
        assert trained == 2, found
        assert checked in (1, 2)
        assert error.count("\n") == 1
        assert re.match(r"boxwright: error: \S", error)
        assert re.search(row.says, error), error
        assert any(re.search(row.says, line) for line in found), found
        return
    assert (trained, error if trained else "") == (0, "")
    assert checked == 0, found
    level = {"S": "lost", "F": "repaired", "A": r"(note|suspect)"}[row.answer]
    odd = [line for line in found if "[note no-size" not in line and "valid" not in line.partition(": ")[0]]
    if row.says:
        (line,) = [line for line in found if re.search(row.says, line)][:1] or [f"nothing of {row.says} in {found}"]
        assert re.search(rf"\[{level} ", line), line
    else:
        assert not [line for line in odd if re.search(r"\[(error|lost|repaired) ", line)]
    split = read(data, row)
    used = row.used if row.used is not None else int(row.answer != "S")
    assert len(split.records) == 4 + used
    bad = [record for record in split.records if record.id == "bad"]
    assert row.trained_on(bad[0].boxes.tolist() if bad else [])


def read(data: Path, row: Row) -> Split:
    options = {
        option[2:].replace("-", "_"): True for option in row.train if option in ("--skip-bad", "--ignore-unknown")
    }
    return open_dataset(data).read("train", **options)  # type: ignore[arg-type]


# --- bombs


@pytest.mark.parametrize(
    "bomb",
    [
        png_bomb(20_000, 20_000),
        png_header(60_000, 60_000),
        png_header(2**31 - 1, 2**31 - 1),
        jpeg_claiming(65_000, 65_000),
        jpeg_claiming(65_535, 65_535),
        b"BM" + bytes(8) + b"\x36\0\0\0\x28\0\0\0" + b"\xff\xff\xff\x7f" * 2 + bytes(30),
    ],
    ids=["png", "png header", "largest png", "jpeg", "largest jpeg", "bmp"],
)
@pytest.mark.parametrize("door", [read_header, decode])
def test_a_bomb_is_refused_by_its_header(door: Callable[[Path], object], bomb: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb)
    times: list[float] = []
    tracemalloc.start()
    try:
        for _ in range(3):
            start = time.process_time()
            with pytest.raises(ImageError, match=r"bomb\.png: claims \d+x\d+ pixels"):
                door(path)
            times.append(time.process_time() - start)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert min(times) < 0.05


# --- rows that need more than files


def test_032_what_may_not_be_read(
    dataset: Dataset, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue refuses at once; ours leaves one such picture out by name, and refuses where there are more."""
    opened = Path.open

    def forbidden(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name.startswith("bad"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", forbidden)
    _write(dataset, 1)
    code, found = check(run, dataset.yaml_path)
    assert code == 0
    assert any(re.search(r"bad0\.jpg: cannot be read: Permission denied \[lost", line) for line in found)
    assert train(run, dataset.yaml_path)[0] == 0
    _write(dataset, 6)
    code, error = train(run, dataset.yaml_path)
    assert code == 2
    assert re.search(r"6 of the 10 pictures .*bad0\.jpg: cannot be read: Permission denied", error)


def _write(dataset: Dataset, count: int) -> None:
    for number in range(count):
        shutil.copy(dataset.images / "train0.jpg", dataset.images / f"bad{number}.jpg")
        shutil.copy(dataset.labels / "train0.xml", dataset.labels / f"bad{number}.xml")


def test_035_a_picture_that_goes_after_the_scan_is_one_lost(dataset: Dataset) -> None:
    """That the loader puts another in its place is in tests/data/test_loader.py."""
    record = open_dataset(dataset.yaml_path).read("train").records[0]
    assert isinstance(record.image, Path)
    record.image.unlink()
    with pytest.raises(ImageError, match=r"train0\.jpg: cannot be read: No such file"):
        decode(record.image)


@pytest.mark.parametrize("kind", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("door", [read_header, decode])
def test_036_a_disk_that_stumbles_is_asked_again(
    door: Callable[[Path], object], kind: int, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = dataset.image(JPEG)
    tried: list[float] = []
    opened = Path.open

    def stumbling(fails: int) -> Callable[..., Any]:
        def stumble(place: Path, *arguments: Any, **options: Any) -> Any:
            tried.append(time.monotonic())
            if len(tried) <= fails:
                raise OSError(kind, os.strerror(kind), str(place))
            return opened(place, *arguments, **options)

        return stumble

    monkeypatch.setattr(images, "_PAUSES", (0.01, 0.02))
    monkeypatch.setattr(Path, "open", stumbling(2))
    door(path)
    assert len(tried) == 3
    tried.clear()
    monkeypatch.setattr(Path, "open", stumbling(9))
    with pytest.raises(ImageError, match=rf"bad\.jpg: cannot be read: {os.strerror(kind)}"):
        door(path)
    assert len(tried) == 3


def test_086_two_names_of_one_file_are_two_pictures_that_are_told(
    dataset: Dataset, run: Callable[..., tuple[int, str, str]]
) -> None:
    """A disk that knows no case lists a name once; where one file has two names of one stem, it is refused."""
    path = dataset.image(JPEG, "bad.JPG")
    os.link(path, path.with_name("bad.jpg"))
    code, error = train(run, dataset.yaml_path)
    assert code == 2
    assert re.search(r"one annotation cannot serve two pictures: bad\.JPG and bad\.jpg", error)


def test_094_a_fingerprint_tells_that_the_data_changed(dataset: Dataset) -> None:
    """That a run refuses to go on with it is in tests/training."""
    before = open_dataset(dataset.yaml_path)
    dataset.image(JPEG)
    after = open_dataset(dataset.yaml_path)
    assert before.fingerprint(before.read("val")) == after.fingerprint(after.read("val"))
    assert len({before.fingerprint(Split("train", before.read("train").records[:4], ())),
                after.fingerprint(after.read("train"))}) == 2  # fmt: skip


def test_095_a_dataset_that_may_not_be_written(
    dataset: Dataset, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The superuser may write anything: so every opening to write, and every new name, below the dataset fails."""
    written: list[str] = []
    real_open = io.open

    def reading_only(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if set(mode) & set("wax+") and str(file).startswith(str(dataset.root)):
            written.append(str(file))
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        return real_open(file, mode, *arguments, **options)

    monkeypatch.setattr(io, "open", reading_only)
    monkeypatch.setattr(builtins, "open", reading_only)
    for folder in (dataset.root, *(path for path in dataset.root.rglob("*") if path.is_dir())):
        folder.chmod(0o555)
    try:
        assert check(run, dataset.yaml_path, "--decode")[0] == 0
        assert train(run, dataset.yaml_path)[0] == 0
    finally:
        for folder in (dataset.root, *(path for path in dataset.root.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
    assert not written


def test_097_the_scan_grows_with_the_number_of_files(dataset: Dataset) -> None:
    """10^5 and more: tests/data/test_dataset.py and benchmarks; here that no list is searched for each file."""
    times: list[float] = []
    for count in (200, 2000):
        for number in range(count):
            for source, name in ((dataset.images / "train0.jpg", "jpg"), (dataset.labels / "train0.xml", "xml")):
                target = source.parent / f"more{number}.{name}"
                if not target.exists():
                    os.link(source, target)
        start = time.process_time()
        assert len(open_dataset(dataset.yaml_path).read("train").records) == 4 + count
        times.append(time.process_time() - start)
    assert times[1] < 30 * times[0] + 0.2


# --- the rules that hold for all rows


def test_one_bad_picture_is_lost_and_many_are_refused(
    dataset: Dataset, run: Callable[..., tuple[int, str, str]]
) -> None:
    for number in range(6):
        dataset.image(b"", f"bad{number}.jpg")
    code, error = train(run, dataset.yaml_path)
    assert code == 2
    assert re.search(r"6 of the 10 pictures of 'train' cannot be used: .*bad0\.jpg: is empty.*; and 3 more", error)
    assert check(run, dataset.yaml_path)[0] == 1
    assert train(run, dataset.yaml_path, "--max-bad", "0.7")[0] == 0
    assert check(run, dataset.yaml_path, "--max-bad", "0.7")[0] == 0


def test_bombs_are_bombs() -> None:
    """What is refused by its header alone is a picture, so that another reader would decode it."""
    small = Image.open(io.BytesIO(png_bomb(300, 200)))
    assert small.size == (300, 200)
    assert not np.asarray(small).any()
    assert 500_000 < len(png_bomb(20_000, 20_000)) < 3_000_000

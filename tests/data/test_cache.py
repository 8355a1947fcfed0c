"""The cache of decoded pictures: the same pixels with and without, whatever happens to its files."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.data.test_loader import ARTICLE, digest, make_records, training

from boxwright.data import cache as caching
from boxwright.data.cache import Cache, opened, room_for
from boxwright.data.loader import Samples, ordered_batches, training_batches
from boxwright.data.mixing import Mixing
from boxwright.data.transforms import Fit
from boxwright.types import Record, UInt8

FIT = Fit(64)
SIZES = [(48, 64), (64, 48), (30, 30), (48, 64), (100, 90), (20, 64), (64, 64)]


@pytest.fixture
def records(tmp_path: Path) -> list[Record]:
    (tmp_path / "data").mkdir()
    return make_records(tmp_path / "data", SIZES)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "cache"))


@contextmanager
def disk(capacity: float | None = 1e9, name: str = "a") -> Iterator[Cache]:
    with opened("disk", capacity, name, 1 << 20) as cache:
        assert cache is not None
        yield cache


def entries(cache: Cache) -> list[Path]:
    return sorted(path for path in cache.folder.glob("??/*") if len(path.name) == 32)


def fill(cache: Cache, records: list[Record], fit: Fit = FIT) -> str:
    return digest(ordered_batches(records, fit, batch=2, cache=cache))


# The same pixels


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("fit", "options"),
    [
        (Fit(64), {}),
        (Fit(64, square=True, decode_scaled=True), {}),
        (Fit(64), {"mixing": Mixing(mosaic=0.5, copy_paste=0.5)}),
        (Fit(64), {"scale_jitter": (0.5, 2.0)}),
        (Fit(64), {"multi_scale": (32, 96)}),
    ],
    ids=["fitted", "square", "mosaic", "jitter", "multi-scale"],
)
def test_batches_are_the_same_with_a_cache(records: list[Record], workers: int, fit: Fit, options: dict) -> None:
    def made(cache: Cache | None, start: int = 0) -> str:
        batches = training(
            records, fit, batch=2, augmentations=ARTICLE, seed=5, workers=workers, start_step=start, cache=cache,
            **options,
        )  # fmt: skip
        return digest(islice(batches, 12 - start))

    with disk() as cache:
        assert made(cache) == made(None)  # as it fills
        assert entries(cache)
        assert made(cache, 5) == made(None, 5)
        assert fill(cache, records, fit) == digest(ordered_batches(records, fit, batch=2))


def test_a_picture_is_decoded_once(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    with disk() as cache:
        fill(cache, records)
        assert cache.counts.misses == len(records)
        monkeypatch.setattr("boxwright.data.loader._decoded", lambda *_: pytest.fail("decoded again"))
        fill(cache, records)
        assert cache.counts.hits == len(records)
    with disk() as cache:  # and again in another run
        fill(cache, records)
        assert (cache.counts.hits, cache.counts.misses) == (len(records), 0)


def test_copies_in_other_processes_share_the_files(records: list[Record]) -> None:
    with disk() as cache:
        fill(cache, records)
        other: Cache = pickle.loads(pickle.dumps(cache))
        before = other.counts.hits
        fill(other, records)
        assert other.counts.hits == before + len(records)


def test_a_picture_written_anew_is_decoded_anew(records: list[Record]) -> None:
    with disk() as cache:
        fill(cache, records)
        status = records[0].image.stat()
        pixels = np.full((*SIZES[0], 3), 77, np.uint8)
        Image.fromarray(pixels).save(records[0].image)
        os.utime(records[0].image, ns=(status.st_atime_ns, status.st_mtime_ns))  # as cp -p leaves it
        batch = next(iter(ordered_batches(records[:1], FIT, batch=1, cache=cache)))
        assert (batch.images[0, :, :48, :64] == 77).all()


def test_nothing_is_written_beside_the_data(records: list[Record]) -> None:
    folder = Path(records[0].image).parent
    before = sorted(folder.iterdir())
    folder.chmod(0o555)
    try:
        with disk() as cache:
            fill(cache, records)
            assert len(entries(cache)) == len(records)
    finally:
        folder.chmod(0o755)
    assert sorted(folder.iterdir()) == before


# Whatever happens to its files


def spoil_nothing(path: Path) -> None:
    path.write_bytes(b"")


def spoil_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def spoil_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def spoil_swapped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[64:72], data[72:80] = data[72:80], data[64:72]  # sums alone would not tell
    path.write_bytes(data)


def spoil_size(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[24:32] = struct.pack("<2I", 1 << 30, 1 << 30)
    path.write_bytes(data)


def spoil_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": np.zeros((48, 64, 3), np.uint8)}))


def spoil_other(path: Path) -> None:
    other = next(p for p in path.parent.parent.glob("??/*") if p != path and p.stat().st_size == path.stat().st_size)
    path.write_bytes(other.read_bytes())  # a picture of ours, under another's name


def spoil_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


SPOILS = [spoil_nothing, spoil_cut, spoil_bit, spoil_swapped, spoil_size, spoil_pickle, spoil_other, spoil_folder]


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_is_damaged_or_foreign_is_decoded_anew(
    records: list[Record], spoil, caplog: pytest.LogCaptureFixture
) -> None:
    with disk() as cache, caplog.at_level(logging.WARNING, "boxwright"):
        wanted = fill(cache, records)
        spoiled = [path for path in entries(cache) if path.stat().st_size == 64 + 48 * 64 * 3]
        spoil(spoiled[0])
        assert fill(cache, records) == wanted
        assert cache.counts.damaged == 1
        assert caplog.text.count("decoded anew") == 1
        if spoil is not spoil_folder:
            hits = cache.counts.hits
            assert fill(cache, records) == wanted
            assert cache.counts.hits == hits + len(records)  # it was put right


@pytest.mark.parametrize("spoil", [lambda claims: claims.write_bytes(b"abc"), lambda claims: claims.unlink()])
def test_foreign_claims_end_the_adding(records: list[Record], spoil) -> None:
    wanted = digest(ordered_batches(records, FIT, batch=2))
    with disk() as cache:
        spoil(cache.folder / "claims")
        assert fill(cache, records) == wanted


def test_it_takes_no_more_than_it_may(records: list[Record]) -> None:
    each = [64 + 3 * h * w for h, w in (FIT.content(size) for size in SIZES)]
    capacity = sum(each[:3])
    with disk(capacity) as cache:
        wanted = digest(ordered_batches(records, FIT, batch=2))
        assert fill(cache, records) == wanted == fill(cache, records)
        assert 0 < sum(path.stat().st_size for path in entries(cache)) <= capacity
        assert cache.counts.hits > 0


def _fill_many(cache: Cache, start: int) -> None:
    for number in range(start, start + 40):
        path = cache.folder.parent / f"source{number}"
        path.write_bytes(b"x")
        cache.get(path, "whole", (20, 20), lambda: np.zeros((20, 20, 3), np.uint8))


def test_processes_together_take_no_more_than_it_may() -> None:
    context = multiprocessing.get_context("fork")
    with disk(50 * room_for([(20, 20)])) as cache:
        children = [context.Process(target=_fill_many, args=(cache, 100 * i)) for i in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert len(entries(cache)) == 50


def test_a_full_disk_is_said_once_and_gone_on_without(
    records: list[Record], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = digest(ordered_batches(records, FIT, batch=2))
    with disk() as cache, caplog.at_level(logging.WARNING, "boxwright"):
        other: Cache = pickle.loads(pickle.dumps(cache))

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(caching.Path, "replace", full)
        assert fill(cache, records) == wanted
        assert fill(other, records) == wanted
    assert caplog.text.count("takes no more") == 1
    assert caplog.text.count("No space left") == 1


@pytest.mark.skipif(os.name == "nt", reason="permissions")
def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(tmp_path / "file"))
    with opened("disk", None, "a", 1, said.append) as cache:
        assert cache is None
    assert len(said) == 1
    assert "Going on without" in said[0]


@pytest.mark.skipif(os.name == "nt", reason="no owners")
def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache" / "pictures").symlink_to(tmp_path / "elsewhere")
    said: list[str] = []
    with opened("disk", None, "a", 1, said.append) as cache:
        assert cache is None
    assert "somebody else" in said[0]
    assert not list((tmp_path / "elsewhere").iterdir())


def _add_for_ever(cache: Cache) -> None:
    number = 0
    while True:
        number += 1
        path = cache.folder.parent / f"source{number % 50}"
        path.write_bytes(os.urandom(8))
        cache.get(path, "whole", (200, 200), partial(np.full, (200, 200, 3), number % 256, np.uint8))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals")
def test_a_kill_leaves_whole_pictures_alone(records: list[Record]) -> None:
    context = multiprocessing.get_context("fork")
    with disk() as cache:
        for _ in range(8):
            child = context.Process(target=_add_for_ever, args=(cache,))
            child.start()
            time.sleep(0.15)
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        for path in entries(cache):
            data = np.fromfile(path, np.uint8)
            key = bytes.fromhex(path.name)
            assert data[:64].tobytes() == caching._HEAD.pack(caching._MAGIC, key, 200, 200, caching._sums(data[64:]))
        assert entries(cache)
        folder = cache.folder
        (entries(cache)[0].parent / "torn.123").write_bytes(b"half")
    with disk() as cache:  # the next run counts what is there
        assert cache.folder == folder
        assert not list(folder.glob("??/torn*"))
        claimed = int.from_bytes((folder / "claims").read_bytes()[:8], "little")
        assert claimed >= sum(path.stat().st_size for path in entries(cache))


# Sets


def test_unused_sets_make_room_and_used_ones_stay(tmp_path: Path) -> None:
    def made(name: str) -> tuple[Path, list[Path]]:
        with disk(name=name) as cache:
            add(cache)
            return cache.folder, entries(cache)

    def add(cache: Cache) -> None:
        path = tmp_path / "source"
        path.write_bytes(b"x")
        cache.get(path, "whole", (100, 100), lambda: np.zeros((100, 100, 3), np.uint8))

    old, _ = made("old")
    os.utime(old / "in-use", (1, 1))
    newer, _ = made("newer")
    os.utime(newer / "in-use", (2, 2))
    with disk(name="held") as held:
        add(held)
        os.utime(held.folder / "in-use", (0, 0))
        with opened("disk", 150_000, "mine", 75_000) as mine:  # 30,064 each: the oldest unused one must go
            assert mine is not None
            assert not old.exists()
            assert newer.exists()
            assert held.folder.exists()
            assert mine.capacity <= 150_000 - 2 * 30_064


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux alone has /dev/shm")
def test_memory_is_given_back_by_the_last(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path("/dev/shm") / f"boxwright-test-{os.getpid()}"
    monkeypatch.setattr(caching, "_root", lambda kind: root)
    try:
        wanted = digest(ordered_batches(records, FIT, batch=2))
        with opened("memory", 1e7, "a", 1 << 20) as first, opened("memory", 1e7, "b", 1 << 20) as other:
            assert first is not None
            assert other is not None
            with opened("memory", 1e7, "a", 1 << 20) as second:
                assert second is not None
                assert fill(second, records) == wanted
            assert fill(first, records) == wanted
            assert first.counts.hits == len(records)
            assert stat.S_IMODE(root.stat().st_mode) == 0o700
        assert not list(root.iterdir())
        abandoned = root / ("0" * 20)  # by a run that was killed
        abandoned.mkdir()
        (abandoned / "in-use").write_bytes(b"")
        with opened("memory", 1e7, "a", 1 << 20) as cache:
            assert cache is not None
            assert [path.name for path in root.iterdir()] == [cache.folder.name]
    finally:
        shutil.rmtree(root, ignore_errors=True)


def test_off_is_none() -> None:
    with opened("off", None, "a", 1) as cache:
        assert cache is None


def test_pixels_of_another_size_are_not_kept(records: list[Record]) -> None:
    with disk() as cache:
        pixels: UInt8 = np.zeros((3, 4, 3), np.uint8)
        found = cache.get(Path(records[0].image), "whole", (4, 3), lambda: pixels)
        assert found is pixels
        assert not entries(cache)


def test_room_is_what_the_files_take(records: list[Record]) -> None:
    samples = Samples(records, FIT)
    with disk() as cache:
        fill(cache, records)
        assert samples.room() == sum(path.stat().st_size for path in entries(cache))
    whole = replace(samples, scale_jitter=(0.5, 2.0))
    assert whole.room() == room_for(SIZES)
    with disk(name="b") as cache:
        next(training_batches(records, FIT, batch=7, scale_jitter=(0.5, 2.0), cache=cache))
        assert whole.room() == sum(path.stat().st_size for path in entries(cache))

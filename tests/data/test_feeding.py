"""Whoever reads the batches, and however many share them, they are the same; what goes wrong there is told here."""

from __future__ import annotations

import gc
import hashlib
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from boxwright.data import feeding
from boxwright.data.article import article_augmentation
from boxwright.data.feeding import ReadingError, feed, reading
from boxwright.data.loader import Share, ordered_batches, training_batches
from boxwright.data.transforms import Augmentation, Fit, random_flip
from boxwright.types import Batch, Record, UserError

FIT = Fit(64)
AUGMENTATIONS: tuple[Augmentation, ...] = (random_flip(0.5), article_augmentation())

forks = pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="its sources cannot be pickled")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Eleven noisy pictures of several shapes, with none to three objects."""
    folder, found = tmp_path_factory.mktemp("pictures"), []
    for index in range(11):
        rng = np.random.default_rng(index)
        height, width = (int(side) for side in rng.choice([20, 48, 64, 100], 2))
        path = folder / f"{index:02}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        boxes = np.array([[1, 2, width / 2, height / 2], [3, 3.5, width, height - 1]], np.float32)[: index % 3]
        flags = np.zeros(len(boxes), bool)
        found.append(Record(path.stem, path, (height, width), boxes, np.arange(len(boxes)), flags, flags))
    return found


def digest(batches: Iterable[Batch]) -> str:
    total = hashlib.sha256()
    for batch in batches:
        total.update(repr((batch.ids, batch.sizes, batch.seeds, tuple(batch.images.shape))).encode())
        for tensor in (batch.images, *batch.boxes, *batch.labels, *batch.difficult):
            total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def joined(shares: Iterable[Share]) -> Batch:
    """The batch that these are the shares of."""
    parts = [share.batch for share in shares if share.pictures]

    def all_of(name: str) -> tuple[Any, ...]:
        return tuple(value for part in parts for value in getattr(part, name))

    names = ("sizes", "boxes", "labels", "difficult", "seeds")
    return Batch(all_of("ids"), torch.cat([part.images for part in parts]), *map(all_of, names))


# The law


@settings(max_examples=12, deadline=None)
@given(
    workers=st.sampled_from([0, 1, 2, 4]),
    ranks=st.sampled_from([1, 2, 3]),
    batch=st.sampled_from([1, 2, 3, 5, 8, 20]),
    start=st.integers(0, 30),
    seed=st.integers(0, 3),
)
def test_batches_are_a_function_of_seed_and_step(
    records: list[Record], workers: int, ranks: int, batch: int, start: int, seed: int
) -> None:
    options: dict[str, Any] = {"batch": batch, "seed": seed, "augmentations": AUGMENTATIONS}
    alone = training_batches(records, FIT, **options, start_step=max(start - 1, 0))
    whole = list(islice(alone, start > 0, 5))
    several = [
        training_batches(records, FIT, **options, workers=workers, start_step=start, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    for one, shares in zip(whole, zip(*several, strict=True), strict=False):
        assert one.pictures == one.of == len(one.batch)
        assert digest([joined(shares)]) == digest([one.batch])
        sizes = [share.pictures for share in shares]
        assert sum(sizes) == one.of
        assert all(share.of == one.of for share in shares)
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1
        for share in shares:
            assert share.pictures in (0, len(share.batch))
            assert share.batch.ids if share.pictures else share.batch.ids == one.batch.ids[:1]
            assert share.batch.images.shape[1:] == one.batch.images.shape[1:]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_out_an_evaluation(records: list[Record], workers: int, ranks: int) -> None:
    alone = [digest([batch]) for batch in ordered_batches(records, FIT, batch=2)]
    for rank in range(ranks):
        mine = ordered_batches(records, FIT, batch=2, workers=workers, rank=rank, ranks=ranks)
        assert [digest([batch]) for batch in mine] == alone[rank::ranks]


def test_what_was_delivered_stays_as_it_is(records: list[Record]) -> None:
    kept, digests = [], []
    for share in islice(training_batches(records, FIT, batch=3, workers=2), 12):
        kept.append(share.batch)
        digests.append(digest([share.batch]))
    assert [digest([batch]) for batch in kept] == digests


def test_spawned_readers_read_the_same(records: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    here = digest(s.batch for s in islice(training_batches(records, FIT, batch=4, augmentations=AUGMENTATIONS), 6))
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(feeding.multiprocessing, "get_context", lambda: spawn)
    there = training_batches(records, FIT, batch=4, augmentations=AUGMENTATIONS, workers=1)
    assert digest(share.batch for share in islice(there, 6)) == here


# Sources of our own


class Numbers:
    """Batch n is n, as a large array and as a small one; `harm(n)` comes first."""

    def __init__(self, harm: Callable[[int], object] = lambda number: None) -> None:
        self.harm = harm

    def read(self, number: int) -> tuple[Any, Any]:
        reading(Path(f"{number}.png"))
        self.harm(number)
        return np.full(feeding.LARGE, number % 251, np.uint8), np.array([number])


def add_up(number: int, read: tuple[Any, Any]) -> tuple[int, int, int]:
    large, small = read
    return number, int(large.sum()), int(small.sum())


def feed_numbers(source: Any, count: int = 9, *, workers: int, **options: Any) -> Iterator[tuple[int, int, int]]:
    options = {"capacity": 1 << 18, "timeout": 30.0, **options}
    return feed(source, add_up, range(count), workers=workers, begin=lambda number: None, **options)


EXPECTED = [(n, n * feeding.LARGE, n) for n in range(9)]


@forks
@pytest.mark.parametrize("workers", [0, 1, 2, 4, 30])
@pytest.mark.parametrize("capacity", [1 << 18, 70_000, 100])
def test_a_batch_without_room_is_read_all_the_same(workers: int, capacity: int) -> None:
    assert list(feed_numbers(Numbers(), workers=workers, capacity=capacity)) == EXPECTED


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_comes_at_its_batch_as_itself(workers: int) -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("odd")

    def fails(error: BaseException) -> Callable[[int], None]:
        def harm(number: int) -> None:
            if number == 5:
                raise error

        return harm

    for error in (UserError("a.png: no picture"), ValueError("broken"), Odd(1, 2)):
        batches = feed_numbers(Numbers(fails(error)), workers=workers)
        assert list(islice(batches, 5)) == EXPECTED[:5]
        with pytest.raises(Exception, match=str(error)) as caught:
            next(batches)
        if isinstance(error, UserError):
            assert type(caught.value) is UserError
            assert str(caught.value) == str(error)
        elif workers:
            assert "in harm" in "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
        assert list(batches) == []


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_that_runs_out_is_one_message_with_the_knobs(workers: int) -> None:
    source = Numbers(lambda number: np.empty(1 << 60, np.uint8) if number == 3 else None)
    batches = feed_numbers(source, workers=workers)
    assert list(islice(batches, 3)) == EXPECTED[:3]
    with pytest.raises(ReadingError, match=r"3\.png.*--workers, --imgsz or --batch"):
        next(batches)


@forks
@pytest.mark.parametrize("workers", [0, 2])
def test_warnings_are_said_here_in_order(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    source = Numbers(lambda number: logging.getLogger("boxwright.data").warning("batch %d", number))
    batches = feed_numbers(source, workers=workers)
    with caplog.at_level(logging.WARNING, "boxwright"):
        for number, _ in enumerate(batches):
            assert caplog.messages == [f"batch {n}" for n in range(number + 1)]


# Readers that die or stand still; many more in tests/faults


def reader_processes() -> list[Any]:
    return [child for child in multiprocessing.active_children() if child.name == "boxwright-reader"]


@forks
def test_no_reader_outlives_its_batches() -> None:
    gc.collect()
    before = len(reader_processes())
    batches = feed_numbers(Numbers(), workers=3)
    next(batches)
    assert len(reader_processes()) == before + 3
    list(batches)
    assert len(reader_processes()) == before
    given_up = feed_numbers(Numbers(), workers=2)
    next(given_up)
    del given_up
    gc.collect()
    assert len(reader_processes()) == before


@forks
def test_a_dead_readers_batches_are_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def once(number: int) -> None:
        if number == 4 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with caplog.at_level(logging.WARNING, "boxwright"):
        assert list(feed_numbers(Numbers(once), workers=2)) == EXPECTED
    (told,) = caplog.messages
    assert "4.png" in told
    assert "signal 9" in told


@forks
def test_readers_that_keep_dying_end_it() -> None:
    source = Numbers(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == 4 else None)
    batches = feed_numbers(source, workers=2)
    with pytest.raises(ReadingError, match=r"4\.png was begun; 3 others ended .*4\.png.*--workers"):
        list(batches)


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_a_read_without_end_is_named_in_time(workers: int) -> None:
    batches = feed_numbers(Numbers(lambda number: time.sleep(60 * (number == 2))), workers=workers, timeout=0.6)
    assert list(islice(batches, 2)) == EXPECTED[:2]
    began = time.monotonic()
    with pytest.raises(ReadingError, match=r"2\.png was begun.*--data-timeout"):
        next(batches)
    assert time.monotonic() - began < 0.6 + 2
    assert not [p for p in reader_processes() if p.pid and workers and p.is_alive()]


@forks
@pytest.mark.parametrize("workers", [0, 1])
def test_the_limit_is_for_a_picture_not_for_a_batch(workers: int) -> None:
    def several(number: int) -> None:
        for part in range(4):
            time.sleep(0.4)
            reading(Path(f"{number}_{part}.png"))

    assert list(feed_numbers(Numbers(several), 1, workers=workers, timeout=1.2)) == EXPECTED[:1]

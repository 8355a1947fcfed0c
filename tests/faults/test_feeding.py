"""Readers that are killed, stopped, or never come back from a file (F9): the batches are what they would have been, or
an error names the file in time; nothing hangs and nothing is left behind. A broken build must fail: at the end.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import logging
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.faults import rig
from tests.faults.conftest import Straight

from boxwright.data import feeding, images, loader
from boxwright.data.dataset import open_dataset
from boxwright.data.transforms import Fit
from boxwright.types import Record

pytestmark = [pytest.mark.faults, pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks into /proc")]

TIMEOUT = 3.0  # seconds: more than any reader here is kept waiting by the others
STEPS = 24
TIMES = 20  # random moments a fault
AT_ONCE = 5

Harm = Callable[[int], None]  # is done before each step, in the process that trains


@dataclass
class Outcome:
    """What became of STEPS batches."""

    digest: str = ""
    error: str = ""
    waited: float = 0.0  # seconds in the last step
    warnings: list[str] = field(default_factory=list)
    left: int = 0  # readers alive afterwards

    def complaints(self, expected: str, *, named: str = "") -> list[str]:
        """What is wrong: it neither delivered the expected batches nor told of the file in time."""
        found = [f"{self.left} readers left behind"] if self.left else []
        if not self.error:
            return found + ["other batches"] * (self.digest != expected)
        if not self.error.startswith("ReadingError") or named not in self.error or ".jpg" not in self.error:
            found.append(self.error)
        if self.waited > TIMEOUT + 2:
            found.append(f"told after {self.waited:.1f} s")
        return found


HUNG = Outcome(error="it hung")


def slowly(picture: Any, rng: Any) -> Any:
    """An augmentation that takes time, so that faults hit readers in the midst of pictures."""
    time.sleep(0.002)
    return picture


def read(records: Sequence[Record], workers: int, harm: Harm, timeout: float, augment: Any = slowly) -> Outcome:
    total, outcome = hashlib.sha256(), Outcome()
    handler = logging.Handler()
    handler.emit = lambda record: outcome.warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("boxwright").addHandler(handler)
    batches = loader.training_batches(
        records, Fit(64), batch=2, seed=1, augmentations=(augment,), workers=workers, timeout=timeout
    )
    began = time.monotonic()
    try:
        for step in range(STEPS):
            harm(step)
            began = time.monotonic()
            batch = next(batches).batch
            total.update(repr((batch.ids, batch.sizes, batch.seeds)).encode())
            total.update(batch.images.contiguous().numpy().tobytes())
        outcome.digest = total.hexdigest()
    except Exception as error:  # noqa: BLE001 it is what is looked at
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.waited = time.monotonic() - began
    del batches
    outcome.left = sum(process.is_alive() for process in multiprocessing.active_children())
    return outcome


def apart(work: Callable[[], Outcome], place: Path) -> rig.Child:
    """Carry it out in a process of its own, which may hang or be killed; the outcome goes to `place`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        while os.getpgid(pid) != pid:
            time.sleep(0.001)
        return rig.Child(pid)
    try:
        os.setsid()
        faulthandler.disable()
        place.with_suffix(".part").write_text(json.dumps(asdict(work())), encoding="utf-8")
        place.with_suffix(".part").rename(place)
    except BaseException:  # noqa: BLE001 the process ends here whatever it was
        traceback.print_exc()
    finally:
        os._exit(0)


def outcomes(works: Sequence[Callable[[], Outcome]], folder: Path, limit: float = TIMEOUT + 12) -> list[Outcome]:
    """Of several processes, a few at once."""
    found = list[Outcome]()
    for start in range(0, len(works), AT_ONCE):
        places = [folder / f"{start + i}.json" for i in range(len(works[start : start + AT_ONCE]))]
        children = [apart(work, place) for work, place in zip(works[start:], places, strict=False)]
        until = time.monotonic() + limit
        while time.monotonic() < until and any(child.alive() for child in children):
            time.sleep(0.02)
        for child, place in zip(children, places, strict=True):
            child.kill()
            child.wait()
            found.append(Outcome(**json.loads(place.read_text("utf-8"))) if place.exists() else HUNG)
    return found


@pytest.fixture(scope="session")
def records(drawn: Path) -> tuple[Record, ...]:
    return open_dataset(drawn).read("train").records


@pytest.fixture(scope="session")
def expected(records: tuple[Record, ...]) -> str:
    digest = read(records, 0, lambda step: None, 60).digest
    assert digest
    return digest


def send(number: int, draw: random.Random) -> Harm:
    """Sends a signal to one of the readers, at a random moment in a random step."""
    # Once all have begun, and while more is wanted of each than lies ready.
    step_of, delay, which = draw.randrange(3, STEPS // 2), draw.uniform(0, 0.005), draw.random()

    def harm(step: int) -> None:
        if step == step_of:
            readers = sorted(process.pid or 0 for process in multiprocessing.active_children())
            threading.Timer(delay, os.kill, (readers[int(which * len(readers))], number)).start()

    return harm


def signalled(records: Sequence[Record], number: int, timeout: float = TIMEOUT) -> list[Callable[[], Outcome]]:
    """One process for each random moment."""
    return [
        lambda seed=seed: read(records, 1 + seed % 3, send(number, random.Random(seed)), timeout)
        for seed in range(TIMES)
    ]


def faults_in(found: Sequence[Outcome], expected: str) -> list[Outcome]:
    return [outcome for outcome in found if outcome.complaints(expected)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_killed_readers_change_nothing(number: int, records: Any, expected: str, tmp_path: Path) -> None:
    found = outcomes(signalled(records, number), tmp_path)
    assert not faults_in(found, expected)
    assert not any(outcome.error for outcome in found)
    told = [line for outcome in found for line in outcome.warnings]
    assert len(told) == TIMES
    assert all(f"signal {int(number)} " in line and " was begun" in line for line in told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_what_asks_a_run_to_stop_is_not_for_readers(number: int, records: Any, expected: str, tmp_path: Path) -> None:
    found = outcomes(signalled(records, number)[:5], tmp_path)
    assert not faults_in(found, expected)
    assert not any(outcome.error or outcome.warnings for outcome in found)


def test_stopped_readers_are_told_of_in_time(records: Any, expected: str, tmp_path: Path) -> None:
    found = outcomes(signalled(records, signal.SIGSTOP), tmp_path)
    assert not faults_in(found, expected)
    assert all(outcome.error for outcome in found)


# A picture that crashes its decoder


def crash_at(bad: Path, marks: Path, times: int) -> None:
    """Reading this picture kills the process, so many times."""
    whole = loader.decode

    def decode(path: Path) -> Any:
        if path == bad and len(list(marks.iterdir())) < times:
            (marks / str(time.monotonic_ns())).touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        return whole(path)

    loader.decode = decode


def crashing(records: Sequence[Record], marks: Path, times: int, workers: int) -> Outcome:
    marks.mkdir()
    crash_at(records[3].image, marks, times)
    return read(records, workers, lambda step: None, TIMEOUT)


@pytest.mark.parametrize("times", [1, 3, 1000])
def test_a_picture_that_crashes_its_decoder_is_named(times: int, records: Any, expected: str, tmp_path: Path) -> None:
    works = [lambda n=n: crashing(records, tmp_path / f"marks_{n}", times, n) for n in (1, 2, 3)]
    found = outcomes(works, tmp_path)
    assert not faults_in(found, expected)
    for outcome in found:
        if times <= feeding.RESTARTS:
            assert len(outcome.warnings) == times
            assert all(str(records[3].image) in line for line in outcome.warnings)
        else:
            assert f"signal 11 (Segmentation fault), after {records[3].image} was begun" in outcome.error


# A file that never comes


def with_a_fifo(records: Sequence[Record], place: Path, draw: random.Random) -> list[Record]:
    """One of the pictures is a pipe that nobody writes into."""
    os.mkfifo(place)
    index = draw.randrange(len(records))
    return [replace(r, image=place) if i == index else r for i, r in enumerate(records)]


def unguarded() -> None:
    """Files are opened without a look at what they are: a pipe is then what a dead network share is."""
    images._open = lambda path: path.open("rb")


def at_a_fifo(
    records: Sequence[Record], folder: Path, timeout: float = TIMEOUT, guarded: bool = False
) -> list[Callable[[], Outcome]]:
    def work(seed: int) -> Outcome:
        if not guarded:
            unguarded()
        pictures = with_a_fifo(records, folder / f"{seed}.jpg", random.Random(seed))
        return read(pictures, seed % 4, lambda step: None, timeout)

    return [lambda seed=seed: work(seed) for seed in range(TIMES)]


def test_a_file_that_never_comes_is_named_in_time(records: Any, expected: str, tmp_path: Path) -> None:
    found = outcomes(at_a_fifo(records, tmp_path), tmp_path)
    assert not faults_in(found, expected)
    assert all(f"{seed}.jpg was begun" in outcome.error for seed, outcome in enumerate(found))


def test_a_pipe_among_the_pictures_is_passed_over(records: Any, tmp_path: Path) -> None:
    for seed, outcome in enumerate(outcomes(at_a_fifo(records, tmp_path, guarded=True)[:8], tmp_path)):
        assert not outcome.error
        assert all(f"{seed}.jpg: is not a regular file" in line for line in outcome.warnings)
        assert outcome.warnings


def test_a_thread_that_hangs_does_not_keep_its_process(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    program = """if True:
        import sys
        from pathlib import Path
        from boxwright.data.feeding import ReadingError, feed, reading
        class Source:
            def read(self, number):
                reading(Path(sys.argv[1]))
                return Path(sys.argv[1]).read_bytes()
        try:
            next(feed(Source(), print, range(9), workers=0, capacity=0, timeout=0.5, begin=print))
        except ReadingError as error:
            sys.exit(str(error))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.jpg")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "a.jpg was begun" in done.stderr


# Memory


def memory_hog(after: int) -> Any:
    """An augmentation that wants more than there is, at one of a reader's pictures."""
    left = after

    def augment(picture: Any, rng: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            np.empty(1 << 60, np.uint8)
        return picture

    return augment


def test_memory_that_runs_out_is_told_with_the_knobs(records: Any, expected: str, tmp_path: Path) -> None:
    works = [
        lambda seed=seed: read(
            records, seed % 4, lambda step: None, TIMEOUT, memory_hog(random.Random(seed).randrange(10))
        )
        for seed in range(TIMES)
    ]
    found = outcomes(works, tmp_path)
    assert not faults_in(found, expected)
    assert all("--workers, --imgsz or --batch" in outcome.error for outcome in found)


# The training process is stopped, or killed


def slower(picture: Any, rng: Any) -> Any:
    time.sleep(0.05)
    return picture


def members(group: int) -> list[int]:
    """The live processes of a group."""
    found = list[int]()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = status.read_text("utf-8").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(int(status.parent.name))
    return found


def test_hours_of_sleep_are_not_waiting(records: Any, expected: str, tmp_path: Path) -> None:
    for workers in (0, 2):
        place = tmp_path / f"{workers}.json"
        child = apart(lambda: read(records, workers, lambda step: None, 1.5, slower), place)  # noqa: B023 called now
        time.sleep(0.6)
        assert child.alive()
        child.kill(signal.SIGSTOP)
        time.sleep(3)
        child.kill(signal.SIGCONT)
        assert child.wait() == 0
        assert Outcome(**json.loads(place.read_text("utf-8"))).digest == expected


@pytest.mark.parametrize("stuck", [False, True])
def test_readers_go_with_the_training_process(stuck: bool, records: Any, tmp_path: Path) -> None:
    def work() -> Outcome:
        if stuck:
            unguarded()
        pictures = with_a_fifo(records, tmp_path / "a.jpg", random.Random(0)) if stuck else records
        return read(pictures, 3, lambda step: None, 60, slower)

    child = apart(work, tmp_path / "0.json")
    time.sleep(0.5)
    assert len(members(child.pid)) == 4
    os.kill(child.pid, signal.SIGKILL)
    until = time.monotonic() + 3
    while members(child.pid) and time.monotonic() < until:
        time.sleep(0.05)
    left = members(child.pid)
    child.wait()
    assert not left


# Whole runs


def test_a_run_whose_readers_are_killed_ends_as_any(drawn: Path, straight: Straight, tmp_path: Path) -> None:
    hits = 0
    for seed in range(4):
        draw, place = random.Random(seed), tmp_path / str(seed)
        place.mkdir()
        child = rig.begin(rig.train_words(drawn, place, "--workers", "2"), place / "log")
        for _ in range(feeding.RESTARTS):
            time.sleep(draw.uniform(0, 0.4 * straight.seconds))
            readers = [pid for pid in members(child.pid) if pid != child.pid]
            if readers:
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(readers), signal.SIGKILL)
                    hits += 1
        assert child.wait() == 0, (place / "log").read_text("utf-8")
        assert not rig.difference(rig.result(place / "it"), straight.result)
    assert hits


def test_a_group_that_is_asked_to_stop_saves(drawn: Path, straight: Straight, tmp_path: Path) -> None:
    child = rig.begin(rig.train_words(drawn, tmp_path, "--workers", "2"), tmp_path / "log")
    while not (tmp_path / "it/state").exists():
        time.sleep(0.01)
    child.kill(signal.SIGTERM)
    assert child.wait() == 75, (tmp_path / "log").read_text("utf-8")
    assert rig.begin(rig.go_on(drawn, tmp_path), tmp_path / "log").wait() == 0
    assert not rig.difference(rig.result(tmp_path / "it"), straight.result)


# A build that is broken on purpose must fail the same tests


def broken(works: Sequence[Callable[[], Outcome]], how: Callable[[], None]) -> list[Callable[[], Outcome]]:
    def work(whole: Callable[[], Outcome]) -> Outcome:
        how()
        return whole()

    return [lambda whole=whole: work(whole) for whole in works[:AT_ONCE]]


def no_restart() -> None:
    feeding.RESTARTS = 0


def a_batch_is_lost() -> None:
    """A reader that is begun again goes on with the batch after the one that was not delivered."""
    whole, begun = feeding._Reader.start, set[int]()

    def start(self: Any, numbers: range) -> None:
        whole(self, numbers[id(self) in begun :])
        begun.add(id(self))

    feeding._Reader.start = start


@pytest.mark.parametrize("how", [no_restart, a_batch_is_lost], ids=lambda f: f.__name__)
def test_a_broken_restart_is_caught(how: Any, records: Any, expected: str, tmp_path: Path) -> None:
    found = outcomes(broken(signalled(records, signal.SIGKILL), how), tmp_path)
    assert all(outcome.error or outcome.complaints(expected) for outcome in found)


def test_waiting_without_a_limit_is_caught(records: Any, expected: str, tmp_path: Path) -> None:
    works = [*signalled(records, signal.SIGSTOP, math.inf)[:2], *at_a_fifo(records, tmp_path, math.inf)[:3]]
    assert outcomes(works, tmp_path, TIMEOUT + 4) == [HUNG] * 5
    assert HUNG.complaints(expected)


def test_readers_that_are_left_behind_are_caught(records: Any, expected: str, tmp_path: Path) -> None:
    def not_killed() -> None:
        feeding._Reader.kill = lambda self: None

    found = outcomes(broken(signalled(records, signal.SIGSTOP), not_killed), tmp_path)
    assert all(outcome.left and outcome.complaints(expected) for outcome in found)

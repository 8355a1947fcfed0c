"""kill -9 at any moment (F1): the run that goes on ends as the one that nothing happened to, and every state is whole.

The number of random kills is BOXWRIGHT_KILLS, 100 unless it is set. A broken build must fail: at the end of this file.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.faults import rig
from tests.faults.conftest import Straight

from boxwright import folders
from boxwright.data import loader
from boxwright.models import checkpoint
from boxwright.training import journal, loop, state, step

pytestmark = [pytest.mark.faults, pytest.mark.skipif(os.name == "nt", reason="forks, and kills process groups")]

KILLS = int(os.environ.get("BOXWRIGHT_KILLS", "100"))


def killed_until_done(
    data: Path, place: Path, kills: int, draw: random.Random, seconds: float, broken: rig.Break | None = None
) -> int:
    """Begin and kill the run `kills` times at random moments, then let it end. The kills that hit it alive."""
    hits = 0
    for _ in range(kills):
        child = rig.begin(rig.go_on(data, place), place / "log", broken)
        time.sleep(draw.uniform(0, 0.6 * seconds))
        hits += child.alive()
        child.kill()
        if child.wait() == 0:
            return hits
    child = rig.begin(rig.go_on(data, place), place / "log", broken)
    assert child.wait() == 0, (place / "log").read_text("utf-8")[-2000:]
    return hits


def test_killed_at_random_moments(drawn: Path, straight: Straight, tmp_path: Path) -> None:
    hits = run = 0
    while hits < KILLS:
        draw = random.Random(run)
        place = tmp_path / str(run)
        place.mkdir()
        hits += killed_until_done(drawn, place, 8, draw, straight.seconds)
        assert not rig.difference(rig.result(place / "it"), straight.result), f"seed {run}"
        shutil.rmtree(place)
        run += 1
    print(f"{hits} kills in {run} runs, all equal")  # noqa: T201 the figure is the point


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, owner: Any, name: str, *, after: bool = False) -> rig.Break:
    """Dies at a call of a function, before or after it is carried out."""

    def broken() -> None:
        whole, calls = getattr(owner, name), 0

        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and not after:
                die()
            done = whole(*arguments, **options)
            if calls == number:
                die()
            return done

        setattr(owner, name, wrapped)

    return broken


def mid_write() -> None:
    """Dies when half of a state is written."""
    whole, calls = state.write_tensors, 0

    def half(path: Path, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        whole(path, *arguments)
        if calls == 4:
            os.truncate(path, path.stat().st_size // 2)
            die()

    state.write_tensors = half


PLACES: dict[str, rig.Break] = {
    "before a state is written": at_call(3, state, "write_tensors"),
    "half a state is written": mid_write,
    "a state is written, not synced": at_call(3, state, "write_tensors", after=True),
    "before a state gets its name": at_call(3, state, "commit"),
    "a state has its name": at_call(3, state, "commit", after=True),
    "between sync and rename": at_call(7, os, "fsync", after=True),
    "while old states are removed": at_call(1, state.States, "_newest_first"),
    "before the best is written": at_call(1, checkpoint, "write_tensors"),
    "the best has its name": at_call(2, checkpoint, "commit", after=True),
    "in an evaluation": at_call(2, journal.Journal, "evaluating"),
    "before the books are written": at_call(1, journal, "append_row"),
    "the books are written": at_call(1, journal, "append_row", after=True),
    "run.yaml is written": at_call(1, loop.run_folder, "write_run", after=True),
    "run.yaml half": at_call(1, loop.run_folder, "commit"),
    "in the first step": at_call(1, step.Step, "_added_up"),
    "after the last evaluation": at_call(2, loop, "judge", after=True),
}


@pytest.mark.parametrize("moment", PLACES)
def test_killed_at_a_chosen_moment(moment: str, drawn: Path, straight: Straight, tmp_path: Path) -> None:
    child = rig.begin(rig.train_words(drawn, tmp_path), tmp_path / "log", PLACES[moment])
    assert child.wait() == -signal.SIGKILL, "the moment never came"
    child = rig.begin(rig.go_on(drawn, tmp_path), tmp_path / "log")
    assert child.wait() == 0, (tmp_path / "log").read_text("utf-8")
    assert not rig.difference(rig.result(tmp_path / "it"), straight.result)
    assert not [p for p in (tmp_path / "it").rglob("*.tmp") if p.parent.name != "state"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_at_random_moments(number: int, drawn: Path, straight: Straight, tmp_path: Path) -> None:
    draw = random.Random(int(number))
    for attempt in range(7):
        place = tmp_path / str(attempt)
        place.mkdir()
        child = rig.begin(rig.train_words(drawn, place), place / "log")
        while not (place / "it/state").exists():  # handlers are in place by then
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5 * straight.seconds))
        asked = time.monotonic()
        if child.alive():
            child.kill(number)
        code = child.wait()
        assert time.monotonic() - asked < 30
        assert code in (130 if number == signal.SIGINT else 75, 0), (place / "log").read_text("utf-8")
        if code:
            child = rig.begin(rig.go_on(drawn, place), place / "log")
            assert child.wait() == 0
        assert not rig.difference(rig.result(place / "it"), straight.result)


# A build that is broken on purpose must fail the same tests


def carried_randomness() -> None:
    """The order of the pictures is drawn from a generator that goes on from epoch to epoch."""
    generator = np.random.default_rng(0)
    loader._shuffled = functools.cache(lambda length, seed, epoch: generator.permutation(length))


def forgotten_optimizer() -> None:
    """States without the optimizer's moments."""
    from boxwright.training import moving

    moving._entries = lambda states: iter(())


def forgotten_books() -> None:
    """metrics.jsonl is not taken back to where it was."""
    journal.BOOKS = ()


def written_in_place() -> None:
    """A state under its final name before it is whole, and believed without its hash."""
    state._digest = lambda path: "0" * 64

    def in_place(temporary: Path, target: Path) -> None:
        content = temporary.read_bytes()
        temporary.unlink()
        with target.open("wb", buffering=0) as file:
            for start in range(0, len(content), 4096):
                file.write(content[start : start + 4096])
                time.sleep(0.002)

    state.commit = in_place


@pytest.mark.parametrize(
    "broken", [carried_randomness, forgotten_optimizer, forgotten_books, written_in_place], ids=lambda f: f.__name__
)
def test_a_broken_build_is_caught(broken: Callable[[], None], drawn: Path, straight: Straight, tmp_path: Path) -> None:
    caught = 0
    for attempt in range(6):
        place = tmp_path / str(attempt)
        place.mkdir()
        try:
            killed_until_done(drawn, place, 6, random.Random(attempt), straight.seconds, broken)
            caught += bool(rig.difference(rig.result(place / "it"), straight.result))
        except AssertionError:  # it did not even end
            caught += 1
        if caught:
            return
    raise AssertionError(f"{broken.__name__} went unnoticed")


def test_the_rig_breaks_nothing_here() -> None:
    assert state.commit is folders.commit  # children break themselves, not this process

"""What a disk does to a run: flipped bits (F3), no room (F4), a mount that is gone (F5). What was saved stays good."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults import rig
from tests.faults.conftest import Straight

from boxwright.training import run_folder, state
from boxwright.training.state import States

pytestmark = [pytest.mark.faults, pytest.mark.skipif(sys.platform != "linux", reason="mounts, and forks")]

CASES = int(os.environ.get("BOXWRIGHT_CORRUPTIONS", "200"))


# ------ Flipped, cut, emptied


def flip(path: Path, draw: random.Random) -> None:
    with path.open("rb+") as file:
        place = draw.randrange(path.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def empty(path: Path, _: random.Random) -> None:
    os.truncate(path, 0)


def hole(path: Path, draw: random.Random) -> None:
    with path.open("rb+") as file:
        file.seek(draw.randrange(0, path.stat().st_size - 4096))
        file.write(b"\0" * 4096)


SPOIL = (flip, cut, empty, hole)


def survivors(folder: Path, place: Path, cases: int) -> int:
    """Spoilt newest states that are taken for whole."""
    newest = next(States(folder / "state")._newest_first())
    content, believed = newest.read_bytes(), 0
    for case in range(cases):
        shutil.copytree(folder / "state", place / "state", dirs_exist_ok=True)
        SPOIL[case % len(SPOIL)](place / "state" / newest.name, random.Random(case))
        if (place / "state" / newest.name).read_bytes() == content:
            continue  # zeros over zeros
        found, faults = States(place / "state").newest()
        assert found is not None
        if not faults:
            believed += 1
            continue
        assert newest.name in faults[0]
        assert "the state before it is used" in faults[0]
    return believed


def test_every_spoilt_state_is_found_out(straight: Straight, tmp_path: Path) -> None:
    assert survivors(straight.folder, tmp_path, CASES) == 0
    print(f"{CASES} spoilt states, all found out")  # noqa: T201 the figure is the point


def test_without_the_hash_some_are_believed(
    straight: Straight, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = next(States(straight.folder / "state")._newest_first())
    monkeypatch.setattr(state, "_digest", lambda path: path.name.partition("-")[2].partition(".")[0])
    assert newest.exists()
    assert survivors(straight.folder, tmp_path, 40) > 0


def test_a_run_goes_on_from_the_state_before(drawn: Path, straight: Straight, tmp_path: Path) -> None:
    child = rig.begin(rig.train_words(drawn, tmp_path), tmp_path / "log", rig_dies_late)
    assert child.wait() < 0
    flip(next(States(tmp_path / "it/state")._newest_first()), random.Random(0))
    child = rig.begin(rig.go_on(drawn, tmp_path), tmp_path / "log")
    assert child.wait() == 0, (tmp_path / "log").read_text("utf-8")
    assert "is damaged" in (tmp_path / "log").read_text("utf-8")
    assert not rig.difference(rig.result(tmp_path / "it"), straight.result)


def rig_dies_late() -> None:
    from tests.faults.test_kill import at_call

    at_call(4, state, "commit", after=True)()


# ------ No room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own in memory; skipped where mounting is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def resize(place: Path, kilobytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(place)], check=True)


def unchecked() -> None:
    """The disk fills after the run has begun, whatever was free before."""
    run_folder.check_space = lambda *_: None


@pytest.mark.parametrize("tenth", range(1, 11))
def test_a_full_disk_loses_nothing(
    tenth: int, small_disk: Path, drawn: Path, straight: Straight, tmp_path: Path
) -> None:
    whole = sum(path.stat().st_size for path in straight.folder.rglob("*")) // 1024
    resize(small_disk, whole * tenth // 9)
    child = rig.begin(rig.train_words(drawn, small_disk), tmp_path / "log", unchecked)
    code = child.wait()
    told = (tmp_path / "log").read_text("utf-8")
    assert code in (0, 74), told
    assert "Traceback" not in told
    if code:
        assert "MB are free" in told or "No space left" in told
        assert f"--resume {small_disk / 'it'}" in told
    _, faults = States(small_disk / "it/state").newest()
    assert not faults
    assert not list((small_disk / "it").rglob("*.tmp"))
    resize(small_disk, 3 * whole)
    if code:
        child = rig.begin(rig.go_on(drawn, small_disk), tmp_path / "log", unchecked)
        assert child.wait() == 0, (tmp_path / "log").read_text("utf-8")
    assert not rig.difference(rig.result(small_disk / "it"), straight.result)


def test_too_little_room_is_told_before_the_first_step(small_disk: Path, drawn: Path, tmp_path: Path) -> None:
    resize(small_disk, 30_000)
    child = rig.begin(rig.train_words(drawn, small_disk), tmp_path / "log")
    assert child.wait() == 2
    assert "MB free, this run needs" in (tmp_path / "log").read_text("utf-8")


def test_a_mount_that_goes_away_ends_the_run_in_one_line(small_disk: Path, drawn: Path, tmp_path: Path) -> None:
    resize(small_disk, 1_000_000)

    def unmounts() -> None:
        whole, calls = state.States.save, 0

        def save(self: States, current: state.State) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                subprocess.run(["umount", "-l", str(small_disk)], check=True)
            whole(self, current)

        state.States.save = save

    child = rig.begin(rig.train_words(drawn, small_disk), tmp_path / "log", unmounts)
    assert child.wait() == 74, (tmp_path / "log").read_text("utf-8")
    told = (tmp_path / "log").read_text("utf-8")
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("boxwright: error: ")

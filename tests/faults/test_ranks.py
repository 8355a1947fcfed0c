"""Two processes train one detector and die (F7, F8): alone, together, or hung; nothing of it shows in the end."""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.faults import rig
from tests.faults.conftest import Straight

pytestmark = [pytest.mark.faults, pytest.mark.skipif(os.name == "nt", reason="forks, and kills process groups")]

KILLS = max(int(os.environ.get("BOXWRIGHT_KILLS", "100")) // 5, 1)
RESTARTS = max(KILLS // 5, 1)  # under torchrun each takes half a minute


def as_rank(rank: int, port: int, more: rig.Break | None = None) -> rig.Break:
    """What torchrun would tell the process."""

    def told() -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        if more:
            more()

    return told


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def pair(data: Path, place: Path, *more: str, broken: rig.Break | None = None) -> list[rig.Child]:
    """Both ranks of a run, begun or gone on with."""
    port, words = free_port(), [*rig.train_words(data, place, *more), "--resume", "auto"]
    return [rig.begin(words, place / f"log{rank}", as_rank(rank, port, broken)) for rank in range(2)]


def end(children: list[rig.Child]) -> list[int]:
    """Their exit codes; as torchrun does, the others are asked to end once one has failed, and then killed."""
    while all(child.alive() for child in children):
        time.sleep(0.01)
    codes: dict[int, int] = {}
    deadline = math.inf
    while len(codes) < len(children):
        for number, child in enumerate(children):
            if number not in codes and not child.alive():
                codes[number] = child.wait()
                if codes[number] and deadline == math.inf:
                    deadline = time.monotonic() + 30
                    for other in children:
                        with contextlib.suppress(ProcessLookupError):
                            other.kill(signal.SIGTERM)
        if time.monotonic() > deadline:
            for number, child in enumerate(children):
                if number not in codes:
                    child.kill()
        time.sleep(0.01)
    return [codes[number] for number in range(len(children))]


@pytest.fixture(scope="module")
def together(drawn: Path, straight: Straight, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The run of two processes that nothing happens to."""
    place = tmp_path_factory.mktemp("together")
    started = time.monotonic()
    assert end(pair(drawn, place)) == [0, 0], (place / "log0").read_text("utf-8")
    return Straight(place / "it", rig.result(place / "it"), time.monotonic() - started)


def test_two_processes_learn_what_one_does(together: Straight, straight: Straight) -> None:
    ours, theirs = together.result["last"], straight.result["last"]
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


def test_one_or_both_killed_at_random_moments(drawn: Path, together: Straight, tmp_path: Path) -> None:
    hits = run = 0
    while hits < KILLS:
        draw, place = random.Random(run), tmp_path / str(run)
        place.mkdir()
        for _ in range(6):
            children = pair(drawn, place, "--step-timeout", "20")
            time.sleep(draw.uniform(0, 0.6 * together.seconds))
            victims = draw.choice(([0], [1], [0, 1]))
            for victim in victims:
                hits += children[victim].alive()
                children[victim].kill()
            codes = end(children)
            assert all(code in (0, 75, -signal.SIGKILL, -signal.SIGTERM) for code in codes), codes
            if codes == [0, 0]:
                break
        else:
            assert end(pair(drawn, place)) == [0, 0], (place / "log0").read_text("utf-8")
        assert not rig.difference(rig.result(place / "it"), together.result), f"seed {run}"
        run += 1
    print(f"{hits} kills of ranks in {run} runs, all equal")  # noqa: T201 the figure is the point


def test_asked_to_stop_through_one_of_them(drawn: Path, together: Straight, tmp_path: Path) -> None:
    for rank in range(2):
        place = tmp_path / str(rank)
        place.mkdir()
        children = pair(drawn, place)
        while not (place / "it/state").exists():
            time.sleep(0.01)
        children[rank].kill(signal.SIGTERM)
        assert end(children) in ([75, 75], [0, 0]), (place / "log0").read_text("utf-8")
        end(pair(drawn, place))
        assert not rig.difference(rig.result(place / "it"), together.result)


def test_on_another_number_of_processes(drawn: Path, straight: Straight, tmp_path: Path) -> None:
    children = pair(drawn, tmp_path)
    while not (tmp_path / "it/state").exists():
        time.sleep(0.01)
    children[0].kill(signal.SIGTERM)
    end(children)
    child = rig.begin(rig.go_on(drawn, tmp_path), tmp_path / "log")
    assert child.wait() == 0
    ours, theirs = rig.result(tmp_path / "it")["last"], straight.result["last"]
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


def hangs(drawn: Path, place: Path, timeout: str, patience: float) -> bool:
    """Whether the other rank still waits for one that was stopped, `patience` seconds later."""
    children = pair(drawn, place, "--step-timeout", timeout)
    while not (place / "it/state").exists():
        time.sleep(0.01)
    children[1].kill(signal.SIGSTOP)
    deadline = time.monotonic() + patience
    while children[0].alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    hung = children[0].alive()
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    end(children)
    return hung


def test_a_rank_that_hangs_is_noticed_in_time(drawn: Path, together: Straight, tmp_path: Path) -> None:
    assert not hangs(drawn, tmp_path, "5", 20)
    told = (tmp_path / "log0").read_text("utf-8")
    assert "Traceback" not in told
    assert "another process of this job is gone or did not answer in time" in told
    assert end(pair(drawn, tmp_path)) == [0, 0]
    assert not rig.difference(rig.result(tmp_path / "it"), together.result)


def test_without_a_timeout_it_would_hang(drawn: Path, together: Straight, tmp_path: Path) -> None:
    assert hangs(drawn, tmp_path, "600", 20)


# ------ Judging


def test_two_ranks_judge_as_one(drawn: Path, trained: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--weights", str(trained / "best_model.safetensors"), "--data", str(drawn)]
    words += ["--split", "all", "--batch", "3", "--device", "cpu", "--project-dir", str(tmp_path)]
    alone = rig.begin([*words, "--name", "alone"], tmp_path / "log")
    assert alone.wait() == 0, (tmp_path / "log").read_text("utf-8")
    port = free_port()
    both = [rig.begin([*words, "--name", "both"], tmp_path / f"log{r}", as_rank(r, port)) for r in range(2)]
    assert end(both) == [0, 0], (tmp_path / "log0").read_text("utf-8")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["alone", "both"]
    one, two = rig.judged(tmp_path / "alone"), rig.judged(tmp_path / "both")
    assert len(one["found"]["detections"]) > 20
    assert not rig.difference(one, two)


# ------ Under torchrun, which starts all of them again


def torchrun(data: Path, place: Path) -> subprocess.Popen[str]:
    words = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m", "boxwright"]
    train = " ".join(rig.train_words(data, place)).replace("--epochs 2", "--epochs 6").split()
    with (place / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words, *train],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            text=True,
        )


def ranks_of(agent: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(agent), "-f", "boxwright train"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="needs pgrep")
def test_torchrun_brings_a_killed_rank_back(drawn: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert torchrun(drawn, whole).wait(300) == 0, (whole / "log").read_text("utf-8")
    expected = rig.result(whole / "it")
    for attempt in range(RESTARTS):
        draw, place = random.Random(attempt), tmp_path / str(attempt)
        place.mkdir()
        agent = torchrun(drawn, place)
        try:
            until((place / "it/state").exists, 120)
            time.sleep(draw.uniform(0, 3))
            if ranks := ranks_of(agent.pid):
                os.kill(draw.choice(ranks), signal.SIGKILL)
            assert agent.wait(240) == 0, (place / "log").read_text("utf-8", errors="replace")[-3000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
        assert [path.name for path in place.iterdir() if path.is_dir()] == ["it"]  # the same run, not a second
        assert not rig.difference(rig.result(place / "it"), expected), f"seed {attempt}"
        told = (place / "log").read_text("utf-8", errors="replace")
        assert len(re.findall(r"from the state after \d+ steps", told)) <= 3

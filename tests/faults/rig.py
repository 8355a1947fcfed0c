"""Runs that die: each in a process of its own, forked from this one so that importing PyTorch is paid once."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boxwright.__main__ import main
from boxwright.models import checkpoint
from boxwright.training.state import States

WORDS = (
    "--model fasterrcnn_vitdet_nano --epochs 2 --batch 3 --imgsz 64 --optimizer adamw --lr 0.002 --device cpu",
    "--name it --ema 0.9 --flip 0.5 --save-minutes 0",
)

Break = Callable[[], None]  # what is done to the program, inside the child


@dataclass
class Child:
    """One process of a run, the leader of its own group."""

    pid: int

    def alive(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.killpg(self.pid, number)

    def wait(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # loader workers that outlived it
        return code


def begin(arguments: list[str], log: Path, broken: Break | None = None) -> Child:
    """`boxwright` with these arguments in a new process; what it says goes to `log`."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        while os.getpgid(pid) != pid:  # until it leads its group
            time.sleep(0.001)
        return Child(pid)
    code = 99
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        torch.set_num_threads(1)
        if broken:
            broken()
        code = main(arguments)
    except BaseException:  # noqa: BLE001 for the log; the process ends here whatever it was
        traceback.print_exc()
    finally:
        os._exit(code)


def train_words(data: Path, place: Path, *more: str) -> list[str]:
    return ["train", "--data", str(data), "--project-dir", str(place), *" ".join(WORDS).split(), *more]


def go_on(data: Path, place: Path, *more: str) -> list[str]:
    """To resume where there is a run, else to begin: what a job script does after each crash."""
    if (place / "it/run.yaml").exists():
        return ["train", "--resume", str(place / "it"), *(word for word in more if word.startswith("--workers"))]
    return [*train_words(data, place, *more), "--exist-ok"]


TIMES = ("images_per_s", "seconds")


def result(folder: Path) -> dict[str, Any]:
    """All that two equal runs have in common; raises where anything cannot be read."""
    state, faults = States(folder / "state").newest()
    assert state is not None
    assert not faults, faults
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    table = [line.split(",") for line in (folder / "results.csv").read_text("utf-8").splitlines()]
    dropped = [i for i, name in enumerate(table[0]) if name in TIMES]
    return {
        "last": checkpoint.read_tensors(folder / "last_model.safetensors"),
        "best": checkpoint.read_tensors(folder / "best_model.safetensors"),
        "tensors": state.tensors,
        "values": {k: v for k, v in state.values.items() if k != "journal"},
        "metrics": [{k: v for k, v in row.items() if k not in TIMES} for row in rows],
        "results": [[cell for i, cell in enumerate(row) if i not in dropped] for row in table],
        "judged": judged(folder / "evaluation"),
    }


def judged(folder: Path) -> dict[str, Any]:
    """All that two equal evaluations have in common, wherever their weights lie."""
    scores, analysis, found = (
        json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("scores", "analysis", "detections")
    )
    apart = ("weights", "data", "speed")
    return {"scores": {k: v for k, v in scores.items() if k not in apart}, "analysis": analysis, "found": found}


def difference(one: Any, two: Any, path: str = "") -> str:
    """Where two results differ first; empty where they are the same."""
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return f"{path}: {sorted(one.keys() ^ two.keys())}"
        return next((found for key in one if (found := difference(one[key], two[key], f"{path}/{key}"))), "")
    if isinstance(one, Tensor):
        return "" if torch.equal(one, two) else path
    if isinstance(one, list):
        if len(one) != len(two):
            return f"{path}: {len(one)} and {len(two)}"
        pairs = enumerate(zip(one, two, strict=True))
        return next((found for i, (a, b) in pairs if (found := difference(a, b, f"{path}/{i}"))), "")
    return "" if one == two or (one != one and two != two) else f"{path}: {one} and {two}"

"""Places that a run also logs to, beside its own books: TensorBoard, Weights & Biases, MLflow.

What goes wrong there never ends a run and never slows a step: each sink has a thread, a failure becomes one warning,
and what could not be sent waits. Neither PyTorch nor any of their packages is imported before a sink is opened.

outputs/training/<name>/
├── tensorboard/   events.out.tfevents.*       logged.json
├── wandb/         W&B's own folders   run_id  logged.json
└── mlflow/        mlflow.db  artifacts/  run_id  logged.json
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Protocol, Self

from boxwright.errors import BoxwrightError, UserError

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0  # between attempts at a sink that fails
FINISH_SECONDS = 30.0  # for what is left at the end: batch systems kill about so long after they asked to stop
BACKLOG = 10_000  # writes kept for a sink that fails: 100,000 steps


class Sink(Protocol):
    """A place to log to. Whatever its methods raise is told as a warning; then it is started again."""

    def start(self, run_folder: Path, run: Mapping[str, Any], total_steps: int) -> str:
        """Begin, or go on with what an earlier process or attempt began; the answer says where to look."""
        ...

    def has(self, handed: Mapping[str, int]) -> Mapping[str, int]:
        """Once started, up to which step it has each value; `handed` is up to which it was given them before."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Finite values after so many steps; steps never fall."""
        ...

    def picture(self, step: int, name: str, path: Path) -> None:
        """A picture as it is after so many steps."""
        ...

    def finish(self, exit_code: int) -> None:
        """Send what is left; `exit_code` is that of the command."""
        ...


def require_sinks(names: Iterable[str]) -> None:
    """Refuse sinks whose package is not installed; looks for it without importing it."""
    missing = [name for name in dict.fromkeys(names) if not _installed(name)]
    if missing:
        raise UserError(f'--log-to {" ".join(missing)} needs `pip install "boxwright[{",".join(missing)}]"`')


def open_sinks(
    names: Sequence[str], folder: Path, run: Mapping[str, Any], *, total_steps: int, resume_step: int | None
) -> Sinks:
    """Start the sinks of a run; `resume_step` is the number of steps done, None where a run begins anew.

    A run that goes on continues what it had begun in each sink, and logs nothing twice. Raises `UserError` for a
    package that is not there or cannot be imported; a sink that cannot be reached is a warning.
    """
    require_sinks(names)
    sinks = {name: _make(name, resume_step) for name in dict.fromkeys(names)}
    feeds: list[_Feed] = []
    for name, sink in sinks.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        if resume_step is None:
            for left in ("run_id", "logged.json"):
                (place / left).unlink(missing_ok=True)
        begin = partial(sink.start, folder, run, total_steps)
        feeds.append(_Feed(name, sink, begin, _Ledger(place / "logged.json")))
    return Sinks(feeds)


class Sinks:
    """All sinks of a run as one; `lines` says where to look. Leaving the `with` block finishes them."""

    def __init__(self, feeds: Sequence[_Feed]) -> None:
        self._feeds = list(feeds)
        self.lines = [line for feed in feeds if (line := feed.open())]
        self._tell()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers after so many steps; those that are not finite are left out."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for feed in self._feeds:
            feed.put(step, finite, lambda sink, news: sink.write(step, {name: finite[name] for name in news}))
        self._tell()

    def picture(self, step: int, name: str, path: Path) -> None:
        """Log the picture in a file after so many steps. One that a sink does not take is not tried again."""
        for feed in self._feeds:
            feed.put(step, [name], lambda sink, _: sink.picture(step, name, path), keep=False)
        self._tell()

    def finish(self, exit_code: int) -> None:
        """Send what is left, for at most `FINISH_SECONDS`. The command's exit code tells how the run ended."""
        deadline = time.monotonic() + FINISH_SECONDS
        for feed in self._feeds:
            feed.close(exit_code)
        for feed in self._feeds:
            feed.wait(deadline)
        self._tell()
        self._feeds = []

    def _tell(self) -> None:
        """Say what happened in the threads, in the caller's own."""
        for feed in self._feeds:
            while not feed.warnings.empty():
                log.warning("%s", feed.warnings.get())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(_exit_code(error))


@dataclass(frozen=True)
class _Entry:
    """Something for a sink to do."""

    do: Callable[[Sink], None]
    keep: bool = True  # until it is done; otherwise it is tried once
    step: int = 0
    names: tuple[str, ...] = ()  # that it logs


class _Feed:
    """One sink, what waits for it, and the thread that hands it over."""

    def __init__(self, name: str, sink: Sink, start: Callable[[], str], ledger: _Ledger) -> None:
        self.name = name
        self.warnings: SimpleQueue[str] = SimpleQueue()
        self._sink, self._start, self._ledger = sink, start, ledger
        self._has: Mapping[str, int] = ledger.steps  # name: the step up to which it need not be logged again
        self._entries: SimpleQueue[_Entry | None] = SimpleQueue()
        self._closing = threading.Event()
        self._up = self._told = False
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)

    def open(self) -> str:
        """Start the sink, here rather than in the thread: processes that read pictures are forked later."""
        line = ""
        try:
            line = f"{self.name}: {self._start()}"
            self._has = self._sink.has(self._has)
            self._up = True
        except Exception as error:  # noqa: BLE001 whatever it is, the run goes on
            self._warn(error)
        self._thread.start()
        return line

    def put(
        self, step: int, names: Iterable[str], do: Callable[[Sink, tuple[str, ...]], None], *, keep: bool = True
    ) -> None:
        """Have the sink log those of `names` that it does not have from an earlier process."""
        news = tuple(name for name in names if step > self._has.get(name, -1))
        if not news:
            return
        if self._entries.qsize() >= BACKLOG:
            self._lost += 1
            return
        self._entries.put(_Entry(lambda sink: do(sink, news), keep, step, news))

    def close(self, exit_code: int) -> None:
        """No more is coming: what is there is tried once more."""
        self._entries.put(_Entry(lambda sink: sink.finish(exit_code)))
        self._entries.put(None)
        self._closing.set()

    def wait(self, deadline: float) -> None:
        """Until everything is handed over, or `deadline` (of the monotonic clock)."""
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            self.warnings.put(f"{self.name}: not done after {FINISH_SECONDS:g} s; what is not sent is left behind")
        elif self._lost:
            self.warnings.put(f"{self.name}: {self._lost} things could not be logged; the run's own books have them")

    def _run(self) -> None:
        while entry := self._entries.get():
            while not self._hand_over(entry):
                if not entry.keep:
                    self._lost += 1
                    break
                if self._closing.wait(RETRY_SECONDS):
                    self._lost += self._entries.qsize() - 1  # this one and the rest, without finish and end
                    return

    def _hand_over(self, entry: _Entry) -> bool:
        try:
            if not self._up:
                self._start()
                self._up = True
            self._ledger.enter(entry.step, entry.names)
            entry.do(self._sink)
        except Exception as error:  # noqa: BLE001 whatever it is, the run goes on
            self._up = self._up and not entry.keep  # a picture says nothing about the sink
            self._warn(error)
            return False
        self._told = False
        return True

    def _warn(self, error: Exception) -> None:
        """Once for each time that the sink fails, however often it is tried."""
        if not self._told:
            self.warnings.put(f"{self.name}: {one_line(error)}. The run goes on; this is tried again later")
        self._told = True


class _Ledger:
    """Up to which step a sink was given each value, kept on the disk for a process that goes on.

    It is written before the value is handed over: a process killed between the two loses a value in this sink rather
    than doubling it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.steps: Mapping[str, int] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.steps = {}  # nothing was handed over yet

    def enter(self, step: int, names: Sequence[str]) -> None:
        """These are handed over now."""
        if not names:
            return
        self.steps = {**self.steps, **dict.fromkeys(names, step)}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.steps), encoding="utf-8")
        temporary.replace(self._path)


def kept_id(place: Path) -> str | None:
    """The id that the sink's own run has, where this run had begun one there."""
    path = place / "run_id"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def keep_id(place: Path, run_id: str) -> None:
    """Remember the id of the sink's own run."""
    temporary = place / "run_id.tmp"
    temporary.write_text(run_id, encoding="utf-8")
    temporary.replace(place / "run_id")


def one_line(error: Exception) -> str:
    """One line of what an error says, without the passwords of addresses."""
    text = re.sub(r"//[^/\s@]*@", "//", " ".join(str(error).split()))
    return text[:300] or type(error).__name__


def _make(name: str, resume_step: int | None) -> Sink:
    try:
        if name == "tensorboard":
            from boxwright.training.sinks.tensorboard import TensorBoard

            return TensorBoard(resume_step)
        if name == "wandb":
            from boxwright.training.sinks.wandb import WeightsAndBiases

            return WeightsAndBiases()
        from boxwright.training.sinks.mlflow import MLflow

        return MLflow()
    except Exception as error:  # of a package that does not fit the others
        raise UserError(f"--log-to {name}: {one_line(error)}. Mend its package, or leave it out") from error


def _installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None  # a folder `wandb` in the working directory has none


def _exit_code(error: BaseException | None) -> int:
    if isinstance(error, BoxwrightError):
        return error.exit_code
    return 0 if error is None else 130 if isinstance(error, KeyboardInterrupt) else 1

"""Signals that ask a run to stop: the step is finished and the state saved first; a second signal ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from boxwright import runs
from boxwright.types import Stopped

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGBREAK") if hasattr(signal, name))


class Stop:
    """True once a signal has asked to stop. Handlers are in place within the `with` block, in the main thread.

    As long as `at_once` is true there is nothing to finish or to save, and the signal ends the program there and then.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at_once = True
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, _: FrameType | None) -> None:
        if self and number == signal.SIGTERM and runs.ranks() > 1:
            return  # torchrun says it again to those that are left; what it means by "now" is SIGKILL
        if self:
            os._exit(128 + number)  # asked twice: now, whatever is going on; states are whole or absent
        self.signal = number
        if self.at_once and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.at_once:
            told = "stopped before the first step: there is nothing to save"
            sys.stderr.write(told + "\n")
            raise Stopped(told)

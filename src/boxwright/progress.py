"""How far a long step is, in lines that do not flood: done, rate, time left."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """Says at most every `every` seconds how far it is: `frame 120/1189, 8.1 a second, 2:12 left`."""

    def __init__(self, what: str, total: int | None, say: Callable[[str], None], *, every: float = 5.0) -> None:
        self.what, self.total, self.every = what, total, every
        self._say = say
        self._started = self._said = time.monotonic()

    def __call__(self, done: int) -> None:
        """So many are done."""
        now = time.monotonic()
        if now - self._said < self.every or not done:
            return
        self._said = now
        rate = done / (now - self._started)
        of = f"/{self.total:,}" if self.total else ""
        left = f", {clock((self.total - done) / rate)} left" if self.total else ""
        self._say(f"{self.what} {done:,}{of}, {rate:,.1f} a second{left}")


def clock(seconds: float) -> str:
    """3725 → 1:02:05, 65 → 1:05."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

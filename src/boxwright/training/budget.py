"""How many steps fit into a time: planned once the speed is known, and again after every evaluation.

The schedule is a function of the step and of the total, so that its decay lands where the time ends.
"""

from __future__ import annotations

import sys
import time

from boxwright.config import Run

WARM = 3  # steps that say nothing about the speed: caches, kernels, workers start
MEASURED = 10  # steps after them that the first plan is made from
EVALUATION = 0.4  # of a training picture's time that judging one is taken to cost before any was
RESERVE = 0.97  # of the time is planned for


class Budget:
    """The steps of a run with `--time-budget`; without one it never has anything to say."""

    def __init__(self, run: Run, validation_pictures: int, steps_per_epoch: int) -> None:
        self.seconds = run.budget
        self.every = steps_per_epoch * run.eval_every  # steps between evaluations
        self.limit = run.max_steps or sys.maxsize
        batch = run.batch if isinstance(run.batch, int) else 1
        self._pictures_of_a_step = validation_pictures / batch
        self._evaluation: float | None = None
        self._seen = 0
        self._steps = 0
        self._stepping = 0.0
        self._last: float | None = None
        self._planned = False

    def due(self) -> bool:
        """To be asked after each step: whether the total is to be planned anew."""
        if self.seconds is None:
            return False
        now = time.monotonic()
        self._seen += 1
        if self._last is not None and self._seen > WARM:
            self._steps += 1
            self._stepping += now - self._last
        self._last = now
        if self._planned or self._steps < MEASURED:
            return False
        self._planned = True
        return True

    def evaluated(self, seconds: float) -> None:
        """An evaluation took so long: plan again after the next step."""
        self._evaluation = seconds
        self._last = None
        self._planned = False

    def over(self, gone: float) -> bool:
        """Whether the time is used up after `gone` seconds."""
        return self.seconds is not None and gone >= self.seconds * RESERVE

    def total(self, step: int, gone: float) -> int:
        """Steps that the run is to have, `step` of them done in `gone` seconds."""
        assert self.seconds is not None
        a_step = self._stepping / self._steps
        an_evaluation = self._evaluation
        if an_evaluation is None:
            an_evaluation = EVALUATION * self._pictures_of_a_step * a_step
        left = self.seconds * RESERVE - gone - an_evaluation  # the last evaluation comes at the end
        more = int(left / (a_step + an_evaluation / self.every))
        return min(step + max(more, 1), self.limit)

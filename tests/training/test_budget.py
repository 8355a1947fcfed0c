"""A time becomes a number of steps, once the speed is known and again after every evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boxwright.config import make_run
from boxwright.training import budget
from boxwright.training.budget import MEASURED, WARM, Budget
from boxwright.training.run_folder import read_rows
from boxwright.verbs import train

A_STEP, AN_EVALUATION, PER_EPOCH = 0.5, 20.0, 100


def simulated(seconds: int, *, slower: float = 1.0, first: float = 9.0) -> tuple[float, int]:
    """Seconds and steps of a run with a clock of its own, whose steps become `slower` half way."""
    with pytest.MonkeyPatch.context() as patch:
        now = 0.0
        patch.setattr(budget.time, "monotonic", lambda: now)
        plan = Budget(make_run(data="d", time_budget=f"{seconds}s", batch=4), 40, PER_EPOCH)
        steps, total = 0, 10**9
        while steps < total:
            now += first if steps == 0 else A_STEP * (slower if now > seconds / 2 else 1)
            steps += 1
            if plan.due():
                total = plan.total(steps, now)
            if steps % PER_EPOCH == 0 or steps >= total:
                now += AN_EVALUATION
                plan.evaluated(AN_EVALUATION)
        return now, steps


@pytest.mark.parametrize("seconds", [120, 600, 3600, 36000])
def test_it_ends_when_the_time_does(seconds: int) -> None:
    gone, steps = simulated(seconds)
    assert 0.85 * seconds < gone <= seconds
    assert steps > 0


@given(seconds=st.integers(600, 20_000), slower=st.floats(0.5, 1.5))
def test_it_follows_a_speed_that_changes(seconds: int, slower: float) -> None:
    gone, _ = simulated(seconds, slower=slower)
    assert 0.8 * seconds < gone <= 1.1 * seconds


def test_without_a_budget_it_is_never_due() -> None:
    plan = Budget(make_run(data="d"), 40, PER_EPOCH)
    assert not any(plan.due() for _ in range(100))


def test_the_first_steps_say_nothing() -> None:
    plan = Budget(make_run(data="d", time_budget="1h"), 40, PER_EPOCH)
    due = [plan.due() for _ in range(WARM + MEASURED + 10)]
    assert due.count(True) == 1
    assert due.index(True) >= WARM + MEASURED - 1


def test_a_run_ends_by_it_and_its_rate_has_decayed(drawn: Path, tmp_path: Path) -> None:
    done = train(
        model="fasterrcnn_vitdet_nano", data=str(drawn), batch=4, imgsz=64, device="cpu", project_dir=tmp_path,
        time_budget="4s", schedule="cosine", eval_every=1000, quiet=True,
    )  # fmt: skip
    assert 13 < done.steps < 2000
    assert done.steps == done.total
    rows = read_rows(done.folder / "results.csv")
    assert rows[-1]["step"] == done.steps

"""A run is checked before it starts, says which flag is wrong, and survives being written down."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from boxwright import registry
from boxwright.config import Optimizer, Precision, Run, Schedule, make_run
from boxwright.types import UserError


def refusal(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        make_run(**options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_defaults_make_a_run() -> None:
    run = make_run(data="somewhere")
    registry.find(run.model)
    assert run.learning_rate == 0.001
    assert make_run(data="d", optimizer="adamw").learning_rate == 0.0001
    assert make_run(data="d", optimizer="adamw", lr=0.001).learning_rate == 0.001


@pytest.mark.parametrize("name", Run.model_fields)
def test_every_option_has_a_help_text(name: str) -> None:
    text = Run.model_fields[name].description
    assert text
    assert text.endswith(".")
    assert "\n" not in text


def test_a_run_does_not_change() -> None:
    run = make_run(data="d")
    with pytest.raises(ValidationError):
        run.epochs = 7  # type: ignore[misc]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 0}, "--epochs 0: input should be greater than or equal to 1"),
    ({"max_steps": 0}, "--max-steps 0: "),
    ({"batch": -1}, "--batch -1: "),
    ({"imgsz": 650}, "--imgsz 650 is not a multiple of 16; use 640 or 656"),
    ({"imgsz": "650"}, "--imgsz 650 is not a multiple of 16; use 640 or 656"),
    ({"imgsz": 33}, "--imgsz 33 is not a multiple of 16; use 32 or 48"),
    ({"imgsz": 20}, "--imgsz 20 is not a multiple of 16; use 32"),
    ({"imgsz": -7}, "--imgsz -7 is not a multiple of 16; use 32"),
    ({"imgsz": 4100}, "--imgsz 4100 is not a multiple of 16; use 4096"),
    ({"imgsz": 16}, "--imgsz 16: input should be greater than or equal to 32"),
    ({"imgsz": 4112}, "--imgsz 4112: input should be less than or equal to 4096"),
    ({"flip": 1.5}, "--flip 1.5: "),
    ({"lr": 0}, "--lr 0: input should be greater than 0"),
    ({"lr": math.nan}, "--lr nan: "),
    ({"weight_decay": math.inf}, "--weight-decay inf: "),
    ({"clip": 0}, "--clip 0: "),
    ({"optimizer": "adam"}, "--optimizer adam: input should be 'sgd' or 'adamw'"),
    ({"schedule": "linear"}, "--schedule linear: input should be 'constant', 'cosine' or 'step'"),
    ({"precision": "int8"}, "--precision int8: "),
    ({"workers": -1}, "--workers -1: "),
    ({"seed": -1}, "--seed -1: "),
    ({"eval_every": 0}, "--eval-every 0: "),
    ({"epochs": "many"}, "--epochs many: "),
    ({"epoch": 5}, "unknown option --epoch. Did you mean 'epochs'?"),
    ({"use_train_augs": True}, "unknown option --use-train-augs. Did you mean 'use_train_aug'?"),
    ({"zzz": 5}, "unknown option --zzz."),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_is_wrong_is_named_by_its_flag(options: dict[str, Any], message: str) -> None:
    found = refusal(data="d", **options)
    assert found.startswith(message) if message.endswith(": ") else found == message


def test_no_data_and_several_mistakes_are_one_line() -> None:
    assert refusal() == f"--data is missing: {Run.model_fields['data'].description}"
    message = refusal(data="d", epochs=0, imgsz=650, epoch=3)
    assert all(flag in message for flag in ("--epochs 0", "--imgsz 650", "--epoch."))


def test_learning_rates_of_the_other_optimizer_are_refused() -> None:
    message = refusal(data="d", optimizer="adamw", lr=0.005)
    assert message == "--lr 0.005 belongs to SGD; AdamW wants 0.0001 or so. Lower it, or use --optimizer sgd"
    message = refusal(data="d", optimizer="sgd", lr=5e-6)
    assert message == "--lr 5e-06 belongs to AdamW; SGD wants 0.001 to 0.02. Raise it, or use --optimizer adamw"
    for fine in ({"optimizer": "sgd", "lr": 0.005}, {"optimizer": "adamw", "lr": 5e-6}, {"optimizer": "adamw"}):
        make_run(data="d", **fine)


# ------ The learning rate of a step


RUNS = st.builds(
    lambda **options: make_run(data="d", lr=0.01, **options),
    schedule=st.sampled_from(get_args(Schedule)),
    warmup_steps=st.integers(0, 3000),
)
COUNTS = st.integers(1, 5000)


@settings(deadline=None)
@given(run=RUNS, per_epoch=COUNTS, epochs=st.integers(1, 50), at=st.floats(0, 1))
def test_a_rate_is_a_function_of_its_step(run: Run, per_epoch: int, epochs: int, at: float) -> None:
    total = per_epoch * epochs
    step = int(at * (total - 1))
    rate = run.learning_rate_at(step, per_epoch, total)
    assert 0 < rate <= run.learning_rate
    again = make_run(**run.model_dump())
    again.learning_rate_at(total - 1, per_epoch, total)
    assert again.learning_rate_at(step, per_epoch, total) == rate  # whatever was asked before


@settings(deadline=None)
@given(run=RUNS, per_epoch=COUNTS)
def test_warm_up_begins_at_a_thousandth_and_ends_within_the_first_epoch(run: Run, per_epoch: int) -> None:
    length = min(run.warmup_steps, per_epoch)
    total = 10 * per_epoch
    if length:
        assert run.learning_rate_at(0, per_epoch, total) == pytest.approx(run.learning_rate / 1000)
        assert run.learning_rate_at(length - 1, per_epoch, total) < run.learning_rate
    assert run.learning_rate_at(length, per_epoch, total) == pytest.approx(run.learning_rate)


@settings(deadline=None)
@given(warmup=st.integers(2, 2000), per_epoch=COUNTS, at=st.floats(0, 1))
def test_warm_up_is_a_straight_line(warmup: int, per_epoch: int, at: float) -> None:
    run = make_run(data="d", lr=1.0, warmup_steps=warmup)
    length = min(warmup, per_epoch)
    step = int(at * length)
    wanted = 0.001 + 0.999 * step / length
    assert run.learning_rate_at(step, per_epoch, 10 * per_epoch) == pytest.approx(wanted)


def test_an_epoch_of_one_batch_does_not_stay_at_a_thousandth() -> None:
    run = make_run(data="d", lr=0.01)
    rates = [run.learning_rate_at(step, 1, 5) for step in range(5)]
    assert rates == pytest.approx([0.00001, 0.01, 0.01, 0.01, 0.01])


def test_constant_stays_and_cosine_falls_to_a_hundredth() -> None:
    constant, cosine, step = (make_run(data="d", lr=0.01, schedule=s, warmup_steps=10) for s in get_args(Schedule))
    steps = range(10, 1010)
    assert {constant.learning_rate_at(s, 100, 1010) for s in steps} == {0.01}
    rates = [cosine.learning_rate_at(s, 100, 1010) for s in (*steps, 1010)]
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert rates[500] == pytest.approx((0.01 + 0.0001) / 2)  # half way
    assert rates[-1] == pytest.approx(0.0001)
    assert cosine.learning_rate_at(5000, 100, 1010) == pytest.approx(0.0001)  # no second wave
    assert [step.learning_rate_at(s, 100, 1080) for s in (10, 959, 960, 1039, 1040, 1080)] == pytest.approx(
        [0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001]
    )


# ------ Written down


PATHS = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=20)


@settings(max_examples=50, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "data": PATHS,
            "weights": st.none() | PATHS,
            "lr": st.none() | st.floats(1e-5, 0.004),
            "optimizer": st.sampled_from(get_args(Optimizer)),
            "precision": st.sampled_from(get_args(Precision)),
            "schedule": st.sampled_from(get_args(Schedule)),
            "weight_decay": st.floats(0, 1),
            "max_steps": st.none() | st.integers(1),
            "square_training": st.booleans(),
            "project_dir": st.sampled_from(["outputs/training", "yes", "1", "größe"]),
            "name": st.none() | st.sampled_from(["on", "null", "1e3", "~", "a: b", "- c"]),
        }
    )
)
def test_a_run_survives_yaml(options: dict[str, Any]) -> None:
    run = make_run(**options)
    text = yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    assert make_run(**yaml.safe_load(text)) == run

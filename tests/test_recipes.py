"""What a recipe says, and what it leaves to whoever gives an option beside it."""

from __future__ import annotations

import pytest

from boxwright import recipes
from boxwright.config import Run, make_run, seconds_in
from boxwright.errors import UserError


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_a_run_that_can_be_written_and_read(name: str) -> None:
    run = make_run(data="d", recipe=name)
    assert Run(**run.model_dump(mode="json")) == run
    assert all(getattr(run, key) == value for key, value in recipes.RECIPES[name]({}).items())


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_what_is_given_stands(name: str) -> None:
    run = make_run(data="d", recipe=name, epochs=3, flip=0.25, batch=6, lr=0.0002)
    assert (run.epochs, run.flip, run.batch, run.lr) == (3, 0.25, 6, 0.0002)


def test_vitdet_follows_the_size_of_the_backbone_and_of_the_batch() -> None:
    sizes = {"vitdet_b": 0.7, "vitdet_l": 0.8, "cascade_vitdet_h": 0.9, "fasterrcnn_vitdet": 0.7}
    for model, decay in sizes.items():
        assert make_run(data="d", recipe="vitdet", model=model).layer_decay == decay
    assert make_run(data="d", recipe="vitdet", backbone="timm:vit_large_patch16_224.mae").layer_decay == 0.8
    assert make_run(data="d", recipe="vitdet").learning_rate == pytest.approx(1e-4)
    assert make_run(data="d", recipe="vitdet", batch=64).learning_rate == pytest.approx(4e-4)


def test_another_optimizer_does_not_get_the_recipe_s_rate() -> None:
    assert make_run(data="d", recipe="vitdet", optimizer="sgd").learning_rate == 1e-3
    assert make_run(data="d", recipe="article", optimizer="adamw").learning_rate == 1e-4


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'vitde'\. Did you mean 'vitdet'"):
        make_run(data="d", recipe="vitde")


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h", 10800), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("2.5h", 9000), ("30min", 1800)]
)
def test_times(text: str, seconds: float) -> None:
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "3", "3x", "-1h", "0h", "1h 30", "nan", "3h\n; rm"])
def test_no_times(text: str) -> None:
    assert not seconds_in(text)
    with pytest.raises(UserError, match="time"):
        make_run(data="d", time_budget=text)

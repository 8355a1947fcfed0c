"""A run that was interrupted and goes on ends as if nothing had happened: bit for bit, and in its books."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from boxwright.__main__ import main
from boxwright.config import Schedule
from boxwright.folders import held
from boxwright.models import checkpoint
from boxwright.training import journal
from boxwright.training.state import KEPT, NAME, State, States
from boxwright.training.step import Step
from boxwright.types import Stopped, UserError
from boxwright.verbs import train

DEFAULTS: dict[str, Any] = {
    "model": "fasterrcnn_vitdet_nano", "epochs": 2, "batch": 3, "imgsz": 64, "optimizer": "adamw", "lr": 0.002,
    "device": "cpu", "name": "it", "seed": 3, "eval_batch": 4,
}  # fmt: skip


def run(data: Path, place: Path, **options: Any) -> Path:
    return train(**{**DEFAULTS, "data": str(data), "project_dir": place, **options}, quiet=True).folder


def interrupted(
    monkeypatch: pytest.MonkeyPatch, data: Path, place: Path, step: int, number: int = signal.SIGTERM, **options: Any
) -> Path:
    """A run that gets the signal right after a step (1-based)."""
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "step", signalling(journal.Journal.step, step, number))
        with pytest.raises((Stopped, KeyboardInterrupt)):
            run(data, place, **options)
    return place / "it"


def signalling(whole: Callable[..., None], at: int, number: int) -> Callable[..., None]:
    def step(self: journal.Journal, index: int, *values: Any) -> None:
        whole(self, index, *values)
        if index + 1 == at:
            signal.raise_signal(number)

    return step


# What a clock decides; everything else in the books must be the same.
TIMES = ("images_per_s", "seconds")


def books(folder: Path) -> dict[str, list[dict[str, Any]]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    results = [line.split(",") for line in (folder / "results.csv").read_text("utf-8").splitlines()]
    table = [dict(zip(results[0], row, strict=True)) for row in results[1:]]
    return {
        "metrics": [{k: v for k, v in row.items() if k not in TIMES} for row in rows],
        "results": [{k: v for k, v in row.items() if k not in TIMES} for row in table],
    }


def result(folder: Path) -> dict[str, Any]:
    """All that two equal runs have in common: weights, optimizer, average, scores, books."""
    state, faults = States(folder / "state").newest()
    assert state is not None
    assert not faults
    weights = {which: checkpoint.read_tensors(folder / f"{which}_model.safetensors") for which in ("last", "best")}
    values = {k: v for k, v in state.values.items() if k not in ("journal",)}
    return {"weights": weights, "state": state.tensors, "step": state.step, "values": values, "books": books(folder)}


def assert_same(one: Any, two: Any, path: str = "") -> None:
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key in one:
            assert_same(one[key], two[key], f"{path}/{key}")
    elif isinstance(one, Tensor):
        assert torch.equal(one, two), path
    elif isinstance(one, list):
        assert len(one) == len(two), path
        for i, (left, right) in enumerate(zip(one, two, strict=True)):
            assert_same(left, right, f"{path}/{i}")
    else:
        assert one == two or one != one, path


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "adamw, within an epoch": (2, {}),
    "at the end of an epoch": (3, {}),
    "after the first step": (1, {}),
    "within the second epoch": (5, {"ema": 0.99}),
    "sgd, cosine, augmented": (2, {"optimizer": "sgd", "schedule": "cosine", "use_train_aug": True, "flip": 0.5}),
    "one worker": (4, {"workers": 1, "flip": 0.5, "layer_decay": 0.7}),
    "three workers": (2, {"workers": 3, "ema": 0.9, "flip": 0.5}),
    "mixed, in parts": (4, {"mosaic": 0.7, "mixup": 0.5, "copy_paste": 0.5, "micro_batch": 2, "workers": 1}),
    "jittered, by steps": (4, {"scale_jitter": (0.5, 2.0), "schedule": "step", "optimizer": "sgd", "close_mosaic": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_and_two_are_four(case: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, options = CASES[case]
    monkeypatch.setattr(journal, "LOG_EVERY", 2)  # so that a line may be half collected at the interruption
    straight = run(drawn, tmp_path / "straight", **options)
    folder = interrupted(monkeypatch, drawn, tmp_path / "broken", step, **options)
    torch.rand(5)
    assert train(resume=folder, quiet=True).folder == folder
    assert_same(result(folder), result(straight))


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    step=st.integers(1, 5),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    schedule=st.sampled_from(get_args(Schedule)),
    ema=st.sampled_from([0.0, 0.9]),
    micro_batch=st.sampled_from([None, 1, 2]),
    mosaic=st.sampled_from([0.0, 0.6]),
    mixup=st.sampled_from([0.0, 0.6]),
    flip=st.sampled_from([0.0, 0.5]),
    scale_jitter=st.sampled_from([None, (0.3, 1.7)]),
    workers=st.sampled_from([0, 1, 3]),
    close_mosaic=st.integers(0, 2),
)
def test_two_and_two_are_four_whatever_the_options(
    drawn: Path, tmp_path_factory: pytest.TempPathFactory, step: int, **options: Any
) -> None:
    place = tmp_path_factory.mktemp("property")
    straight = run(drawn, place / "straight", **options)
    with pytest.MonkeyPatch.context() as patch:
        folder = interrupted(patch, drawn, place / "broken", step, **options)
    train(resume=folder, workers=3 - options["workers"], quiet=True)
    assert_same(result(folder), result(straight))


def test_interrupted_again_and_again(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run(drawn, tmp_path / "straight", ema=0.9)
    folder = interrupted(monkeypatch, drawn, tmp_path / "broken", 1, ema=0.9)
    for step in (2, 3, 4, 5):
        with monkeypatch.context() as patch:
            patch.setattr(journal.Journal, "step", signalling(journal.Journal.step, step, signal.SIGTERM))
            with pytest.raises(Stopped):
                train(resume=folder, quiet=True)
    train(resume=folder, quiet=True)
    assert_same(result(folder), result(straight))


def test_workers_may_change_when_it_goes_on(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run(drawn, tmp_path / "straight", flip=0.5)
    folder = interrupted(monkeypatch, drawn, tmp_path / "broken", 2, flip=0.5)
    train(resume=folder, workers=2, quiet=True)
    assert_same(result(folder), result(straight))


def test_asked_to_stop_while_judging(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = run(drawn, tmp_path / "straight")
    whole = journal.Journal.evaluating

    def evaluating(self: journal.Journal, done: int, pictures: int) -> None:
        whole(self, done, pictures)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "evaluating", evaluating)
        with pytest.raises(Stopped):
            run(drawn, tmp_path / "broken")
    folder = tmp_path / "broken/it"
    assert not (folder / "results.csv").exists()
    train(resume=folder, quiet=True)
    assert_same(result(folder), result(straight))


def test_a_run_that_died_before_its_first_state_begins_again(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(drawn, tmp_path / "straight")

    def dies(*_: Any, **__: Any) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", dies)
        with pytest.raises(SystemExit):
            run(drawn, tmp_path / "broken")
    train(resume=tmp_path / "broken/it", quiet=True)
    assert_same(result(tmp_path / "broken/it"), result(straight))


def test_a_finished_run_stays_as_it_is(drawn: Path, tmp_path: Path) -> None:
    folder = run(drawn, tmp_path)
    before = {p: p.read_bytes() for p in folder.rglob("*.safetensors")}
    done = train(resume=folder, quiet=True)
    assert done.steps == 6
    assert {p: p.read_bytes() for p in folder.rglob("*.safetensors")} == before


def test_exit_codes(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = ["--model", "fasterrcnn_vitdet_nano", "--epochs", "2", "--batch", "3", "--imgsz", "64", "--device", "cpu"]
    place = ["--data", str(drawn), "--project-dir", str(tmp_path), "--name", "it"]
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "step", signalling(journal.Journal.step, 2, signal.SIGTERM))
        assert main(["train", *words, *place]) == 75
    assert f"boxwright train --resume {tmp_path / 'it'}" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "step", signalling(journal.Journal.step, 3, signal.SIGINT))
        assert main(["train", "--resume", str(tmp_path / "it")]) == 130
    assert main(["train", "--resume", str(tmp_path / "it"), "--workers", "0"]) == 0


# States that cannot be used


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 4
    path.write_bytes({"flipped": bytes(content), "truncated": bytes(content[:-9]), "emptied": b""}[how])


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied"])
def test_a_damaged_state_is_told_and_the_one_before_used(
    how: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(drawn, tmp_path / "straight", save_minutes=0)
    folder = interrupted(monkeypatch, drawn, tmp_path / "broken", 5, save_minutes=0)
    newest = max((folder / "state").iterdir(), key=lambda p: p.name)
    spoil(newest, how)
    train(resume=folder, quiet=True)
    assert f"{newest} " in (folder / "train.log").read_text("utf-8")
    assert_same(result(folder), result(straight))


def test_the_newest_two_are_kept(drawn: Path, tmp_path: Path) -> None:
    states = sorted((run(drawn, tmp_path, save_minutes=0) / "state").iterdir())
    assert len(states) == KEPT == 2
    assert all(NAME.fullmatch(path.name) for path in states)


def test_other_data_is_refused(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = shutil.copytree(drawn.parent, tmp_path / "data")
    folder = interrupted(monkeypatch, data / "data.yaml", tmp_path / "runs", 2)
    labels = sorted((data / "train/labels").glob("*.xml"))
    text = labels[0].read_text("utf-8")
    labels[0].write_text(text.replace("<difficult>0<", "<difficult>1<"), "utf-8")
    with pytest.raises(UserError, match=r"the data has changed since .*\(train: other pictures or objects\)"):
        train(resume=folder, quiet=True)
    labels[0].write_text(text, "utf-8")
    train(resume=folder, quiet=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": 0.001}, "--lr was 0.002, now 0.001"),
        ({"epochs": 9}, "--epochs was 2, now 9"),
        ({"model": "fasterrcnn_vitdet_tiny"}, "--model was 'fasterrcnn_vitdet_nano'"),
        ({"ema": 0.9}, "--ema was 0.0, now 0.9"),
    ],
)
def test_other_options_are_refused_with_the_difference(
    options: dict[str, Any], told: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(monkeypatch, drawn, tmp_path, 2)
    with pytest.raises(UserError, match=told):
        train(resume=folder, **options, quiet=True)


def test_a_run_whose_states_are_gone_keeps_what_it_has(drawn: Path, tmp_path: Path) -> None:
    folder = run(drawn, tmp_path)
    for path in (folder / "state").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"cannot be gone on with: .*Start a new run with --weights .*last_model"):
        train(resume=folder, quiet=True)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    shutil.rmtree(folder / "state")
    with pytest.raises(UserError, match="its states are gone"):
        train(resume=folder, quiet=True)
    assert (folder / "best_model.safetensors").exists()


def test_a_run_without_its_best_weights(drawn: Path, tmp_path: Path) -> None:
    folder = run(drawn, tmp_path)
    (folder / "best_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"best_model\.safetensors is gone"):
        train(resume=folder, quiet=True)


@pytest.mark.parametrize("changed", [{"epochs": 1}, {"lr": 0.001}, {"optimizer": "sgd"}, {"imgsz": 96}])
def test_an_edited_run_is_refused(
    changed: dict[str, Any], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = interrupted(monkeypatch, drawn, tmp_path, 5)
    described = yaml.safe_load((folder / "run.yaml").read_text("utf-8"))
    (folder / "run.yaml").write_text(yaml.safe_dump({**described, **changed}), "utf-8")
    with pytest.raises(UserError, match=rf"run\.yaml is not what .*{next(iter(changed))} was"):
        train(resume=folder, quiet=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no locks on folders")
def test_two_processes_do_not_share_a_run(drawn: Path, tmp_path: Path) -> None:
    folder = run(drawn, tmp_path)
    with held(folder), pytest.raises(UserError, match="another process is working in"):
        train(resume=folder, quiet=True)
    train(resume=folder, quiet=True)


def test_a_trap_of_aliases(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
    (tmp_path / "run.yaml").write_text("\n".join(lines), "utf-8")
    with pytest.raises(UserError, match="uses YAML aliases"):
        train(resume=tmp_path, quiet=True)


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run at"):
        train(resume=tmp_path / "none", quiet=True)
    with pytest.raises(UserError, match=r"it has no run\.yaml"):
        train(resume=tmp_path, quiet=True)
    (tmp_path / "run.yaml").write_text("- a\n- b\n", "utf-8")
    with pytest.raises(UserError, match="no run that this version can read"):
        train(resume=tmp_path, quiet=True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": "x", "warp": 9}), "utf-8")
    with pytest.raises(UserError, match="warp"):
        train(resume=tmp_path, quiet=True)


def test_a_state_of_another_model_is_refused(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = interrupted(monkeypatch, drawn, tmp_path, 2)
    described = yaml.safe_load((folder / "run.yaml").read_text("utf-8"))
    (folder / "run.yaml").write_text(yaml.safe_dump({**described, "model": "fasterrcnn_squeezenet1_1"}), "utf-8")
    with pytest.raises(UserError, match="model was 'fasterrcnn_vitdet_nano', now 'fasterrcnn_squeezenet1_1'"):
        train(resume=folder, quiet=True)


# States by themselves


def test_a_state_is_what_was_saved_even_if_training_goes_on(tmp_path: Path) -> None:
    states, tensor = States(tmp_path), torch.arange(5.0)
    states.save(State(1, {"a": tensor, "b": torch.tensor(True)}, {"text": "x"}))
    tensor.add_(1)
    states.wait()
    found, faults = states.newest()
    assert found is not None
    assert not faults
    assert (found.step, found.values) == (1, {"text": "x"})
    assert_same(found.tensors, {"a": torch.arange(5.0), "b": torch.tensor(True)})


def test_what_the_writer_met_is_raised_in_the_training(tmp_path: Path) -> None:
    states = States(tmp_path / "none" / "state")
    states.save(State(1, {"a": torch.ones(2)}, {}))
    with pytest.raises(FileNotFoundError):
        states.wait()
    states.wait()  # told once


def test_leftovers_of_a_crash_are_no_states(tmp_path: Path) -> None:
    states = States(tmp_path)
    (tmp_path / "step_00000009.tmp").write_bytes(b"half")
    assert states.newest() == (None, [])
    states.save(State(10, {"a": torch.ones(2)}, {}))
    states.wait()
    found, faults = states.newest()
    assert found is not None
    assert (found.step, faults) == (10, [])

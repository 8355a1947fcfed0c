"""One run from data to weights: what it writes, what it depends on, how it ends."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
import signal
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from boxwright.__main__ import main
from boxwright.config import make_run
from boxwright.data.dataset import open_dataset
from boxwright.data.loader import training_batches
from boxwright.data.transforms import Fit
from boxwright.models import checkpoint
from boxwright.models.detectors.faster_rcnn import FasterRCNN
from boxwright.training import journal, loop, run_folder, state
from boxwright.training.loop import Trained
from boxwright.training.step import Asked
from boxwright.types import Batch, Detections, Diverged, Record, UserError
from boxwright.verbs import evaluate, train

Start = Callable[..., Trained]
MakeVoc = Callable[..., Path]


@pytest.fixture
def start(drawn: Path, tmp_path: Path) -> Start:
    """Trains the smallest detector on `drawn`, an epoch of two steps unless told otherwise."""

    def start(**options: Any) -> Trained:
        defaults = {
            "model": "fasterrcnn_vitdet_nano", "data": str(drawn), "epochs": 1, "batch": 4, "imgsz": 64,
            "optimizer": "adamw", "lr": 0.002, "device": "cpu", "project_dir": tmp_path / "runs",
        }  # fmt: skip
        return train(**{**defaults, **options}, quiet=True)

    return start


def weights(folder: Path, which: str = "last") -> dict[str, Tensor]:
    return checkpoint.read_tensors(folder / f"{which}_model.safetensors")


def header(folder: Path, which: str = "last") -> checkpoint.Header:
    return checkpoint.read_header(folder / f"{which}_model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


BOX = [[8.0, 8.0, 40.0, 40.0]]


# What a run writes


def promised() -> set[str]:
    """The files that the docstring of run_folder.py draws."""
    found: set[str] = set()
    for line in re.findall(r"^[├└]── (.+)", run_folder.__doc__ or "", re.MULTILINE):
        first, *others = line.split()
        names = re.findall(r"\b\w+\.\w+\b", line)
        found |= {first + name for name in names} if first.endswith("/") and others else set(names)
    return found


def test_the_run_folder_is_as_drawn(trained: Path) -> None:
    files = {p.relative_to(trained).as_posix() for p in trained.rglob("*") if p.is_file()}
    states = {name for name in files if name.startswith("state/")}
    pictures = {name for name in files if name.startswith("evaluation/pictures/")}
    assert files - states - pictures == promised()
    assert "evaluation/pictures/gallery.json" in pictures
    assert 1 <= len(states) <= 2
    assert all(state.NAME.fullmatch(Path(name).name) for name in states)
    assert len(promised()) == 16


def test_every_file_reads(trained: Path, drawn: Path) -> None:
    run = yaml.safe_load((trained / "run.yaml").read_text("utf-8"))
    assert run.pop("classes") == ["circle", "square"]
    assert make_run(**run) == make_run(**header(trained).run)  # run.yaml is a whole run, as is the header's
    assert run["data"] == str(drawn)

    env = json.loads((trained / "env.json").read_text("utf-8"))
    assert env["torch"] == torch.__version__
    dataset = open_dataset(drawn)
    assert env["data"] == {name: dataset.fingerprint(dataset.read(name)) for name in ("train", "val")}

    rows = list(csv.DictReader((trained / "results.csv").read_text("utf-8").splitlines()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "2"), ("2", "4")]
    evaluations = [row for row in metrics(trained) if row.get("evaluation")]
    assert [row["map"] for row in evaluations] == pytest.approx([float(row["map"]) for row in rows], rel=1e-4)
    steps = [row for row in metrics(trained) if not row.get("evaluation")]
    assert steps[-1]["step"] == 4
    parts = [value for name, value in steps[-1].items() if name.startswith("loss_")]
    assert steps[-1]["loss"] == pytest.approx(sum(parts))
    assert len(parts) == 4

    for picture in [*trained.glob("previews/*"), *trained.glob("plots/*")]:
        with Image.open(picture) as image:
            image.load()
            assert min(image.size) > 100
    log = (trained / "train.log").read_text("utf-8")
    parameters = sum(p.numel() for p in checkpoint.load(trained / "last_model.safetensors")[0].parameters())
    for expected in ("8 pictures", f"{parameters:,} parameters", "epoch 2/2", "best mAP"):
        assert expected in log


def test_the_end_is_the_evaluation_of_the_best_weights(trained: Path, drawn: Path, tmp_path: Path) -> None:
    weights, inside = trained / "best_model.safetensors", trained / "evaluation"
    again = evaluate(weights, drawn, device="cpu", batch=4, project_dir=tmp_path).folder
    theirs, ours = (json.loads((place / "scores.json").read_text("utf-8")) for place in (again, inside))
    assert ours["conventions"] == theirs["conventions"]
    assert ours["threshold"] == theirs["threshold"] == header(trained, "best").scores["threshold"]
    for name in ("detections.json", "analysis.json"):
        assert len((trained / "evaluation" / name).read_bytes()) > 100
    assert not (trained / "evaluation" / "found").exists()
    assert "<title>" in (trained / "report.html").read_text("utf-8")


def test_a_finished_run_that_is_resumed_keeps_its_evaluation(start: Start) -> None:
    folder = start().folder
    before = {path: path.read_bytes() for path in (folder / "evaluation").rglob("*") if path.is_file()}
    train(resume=folder, quiet=True)
    assert {path: path.read_bytes() for path in (folder / "evaluation").rglob("*") if path.is_file()} == before


def test_checkpoints_say_where_they_come_from(trained: Path) -> None:
    assert (header(trained).epoch, header(trained).step) == (2, 4)
    assert header(trained).fit == {"imgsz": 64, "square": False}
    assert header(trained).scores["map"] <= header(trained, "best").scores["map"]


# What it depends on


def test_weights_depend_on_the_run_alone(start: Start, tmp_path: Path) -> None:
    options = {"use_train_aug": True, "flip": 0.5, "batch": 3}
    first = weights(start(**options, workers=0).folder)
    torch.rand(7)
    again = weights(start(**options, workers=0).folder)
    in_workers = weights(start(**options, workers=2, eval_batch=1).folder)
    other_seed = weights(start(**options, workers=0, seed=1).folder)
    assert equal(first, again)
    assert equal(first, in_workers)
    assert not equal(first, other_seed)


def test_evaluating_more_often_changes_no_weights(start: Start) -> None:
    often, seldom = (start(epochs=2, eval_every=every).folder for every in (1, 2))
    assert equal(weights(often), weights(seldom))


def test_it_learns(start: Start) -> None:
    done = start(epochs=16, eval_every=16, batch=4, warmup_steps=2)
    losses = [row["loss"] for row in metrics(done.folder) if not row.get("evaluation")]
    assert losses[-1] < 0.7 * losses[0]


# Names


def test_a_name_that_exists_is_never_written_over(start: Start) -> None:
    first = start(name="mine", max_steps=1).folder
    before = {p.name: p.read_bytes() for p in first.iterdir() if p.is_file()}
    assert start(name="mine", max_steps=1).folder.name == "mine_2"
    assert {p.name: p.read_bytes() for p in first.iterdir() if p.is_file()} == before
    assert start(max_steps=1).folder.name == "res_1"


def test_exist_ok_writes_into_it_and_begins_new_books(start: Start) -> None:
    start(name="mine", epochs=2)
    again = start(name="mine", exist_ok=True, max_steps=1)
    assert again.folder.name == "mine"
    assert len(run_folder.read_rows(again.folder / "results.csv")) == 1
    assert [row["step"] for row in metrics(again.folder)] == [1, 1]
    assert header(again.folder).step == header(again.folder, "best").step == 1


# How long


def test_evaluations_come_when_due_and_at_the_end(start: Start) -> None:
    done = start(epochs=3, eval_every=2)
    rows = run_folder.read_rows(done.folder / "results.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [(2, 4), (3, 6)]


def test_max_steps_ends_within_an_epoch(start: Start) -> None:
    done = start(epochs=5, max_steps=3)
    rows = run_folder.read_rows(done.folder / "results.csv")
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 2), (2, 3)]
    assert (done.steps, header(done.folder).step, header(done.folder).epoch) == (3, 3, 2)


def scripted(monkeypatch: pytest.MonkeyPatch, maps: Iterable[float]) -> list[dict[str, Tensor]]:
    """Evaluations come to `maps`, one after another; the weights at each are kept."""
    scores, seen = iter(maps), []

    def evaluate(predictor: Any, records: Sequence[Record], *_: Any) -> tuple[Any, ...]:
        seen.append({name: t.clone() for name, t in predictor.detector.state_dict().items()})
        return {"map": next(scores), "map50": 0.5, "threshold": 0.5}, [Detections()] * len(records), Asked()

    monkeypatch.setattr(loop, "evaluate", evaluate)
    return seen


def test_patience_ends_it_and_the_best_is_the_best(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = scripted(monkeypatch, [0.1, 0.3, 0.3, 0.2, 0.9])
    done = start(epochs=10, batch=8, patience=2)
    assert (len(seen), done.steps) == (4, 4)
    assert (done.best["map"], done.best_epoch) == (0.3, 2)
    assert (header(done.folder, "best").epoch, header(done.folder).epoch) == (2, 4)
    assert equal(weights(done.folder, "best"), seen[1])
    assert equal(weights(done.folder, "last"), seen[3])
    assert "stopped early" in (done.folder / "train.log").read_text("utf-8")


def test_a_validation_set_without_objects_is_refused_before_training(
    start: Start, tmp_path: Path, make_voc: MakeVoc
) -> None:
    data = make_voc(tmp_path / "data", {"train/a.png": BOX, "valid/b.png": []})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="0 objects to be judged on in 1 validation pictures"):
        start(data=str(data), epochs=2)
    assert sorted(tmp_path.rglob("*")) == before


# Learning rates


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "LOG_EVERY", 1)


def rates(folder: Path) -> list[float]:
    return [row["lr"] for row in metrics(folder) if not row.get("evaluation")]


@pytest.mark.usefixtures("every_step")
def test_an_epoch_of_one_batch_warms_up_all_the_same(start: Start) -> None:
    # torchvision's references would stay at a thousandth of the rate for ever: min(1000, steps - 1) is 0.
    done = start(epochs=3, batch=8, optimizer="sgd", lr=0.01, eval_every=3)
    assert rates(done.folder) == pytest.approx([1e-5, 0.01, 0.01])


@pytest.mark.usefixtures("every_step")
def test_cosine_falls_to_a_hundredth(start: Start) -> None:
    done = start(epochs=4, lr=0.002, schedule="cosine", warmup_steps=1, eval_every=4)
    fallen = rates(done.folder)
    assert len(fallen) == 8
    assert fallen[1] == pytest.approx(0.002)
    assert all(later < earlier for earlier, later in pairwise(fallen[1:]))
    assert 0.00002 <= fallen[-1] < 0.0002


# Ends before the end


def poisoned(
    monkeypatch: pytest.MonkeyPatch, at: Container[int], spoil: Callable[[Tensor], Tensor]
) -> list[tuple[str, ...]]:
    """At the steps `at` (1-based, as they are done) a loss is spoilt; the ids of the batches are kept."""
    whole, seen = FasterRCNN.losses, []

    def losses(self: FasterRCNN, batch: Batch) -> dict[str, Tensor]:
        seen.append(batch.ids)
        found = whole(self, batch)
        if len(seen) in at:
            found["loss_box_reg"] = spoil(found["loss_box_reg"])
        return found

    monkeypatch.setattr(FasterRCNN, "losses", losses)
    return seen


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda loss: loss * math.nan, "loss_box_reg"),
        (lambda loss: loss + math.inf, "loss_box_reg"),
        (lambda loss: loss + (loss * 0).sqrt(), "the gradient"),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_what_stays_not_finite_stops_it_and_names_the_pictures(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor], told: str
) -> None:
    seen = poisoned(monkeypatch, range(3, 100), spoil)
    with pytest.raises(Diverged) as caught:
        start(epochs=9, name="it")
    message = str(caught.value)
    assert told in message
    assert all(name in message for name in seen[-1])
    log = (tmp_path / "runs/it/train.log").read_text("utf-8")
    third = next(line for line in log.splitlines() if "not finite at step 3," in line)
    assert all(name in third for name in seen[2])
    assert len(seen) == 2 + 4 + 4  # four left out, back to the last state, four more
    for which in ("best", "last"):
        assert all(t.isfinite().all() for t in weights(tmp_path / "runs/it", which).values())
    for path in (tmp_path / "runs/it/state").iterdir():
        assert all(t.isfinite().all() for t in checkpoint.read_tensors(path).values())


def test_one_bad_step_is_left_out(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, [3], lambda loss: loss * math.nan)
    done = start(epochs=3)
    assert (done.steps, done.left_out, done.rewound) == (6, 0, 0)
    assert all(t.isfinite().all() for t in weights(done.folder).values())
    rows = run_folder.read_rows(done.folder / "results.csv")
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_several_in_a_row_go_back_to_the_last_state_at_a_tenth_of_the_rate(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, range(3, 7), lambda loss: loss * math.nan)
    monkeypatch.setattr(journal, "LOG_EVERY", 1)
    done = start(epochs=3, warmup_steps=0, lr=0.004)
    assert (done.steps, done.rewound) == (6, 1)
    lines = (done.folder / "metrics.jsonl").read_text("utf-8").splitlines()
    rates = {row["step"]: row["lr"] for row in map(json.loads, lines) if "lr" in row}
    assert rates == pytest.approx({1: 0.004, 2: 0.004, 5: 0.0004, 6: 0.0004})


def test_running_statistics_that_saw_infinity_bring_the_last_state_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = FasterRCNN.losses, []

    def losses(self: FasterRCNN, batch: Batch) -> dict[str, Tensor]:
        seen.append(batch.ids)
        found = whole(self, batch)
        if len(seen) == 4:
            self.pixel_mean.fill_(math.nan)
            found["loss_box_reg"] = found["loss_box_reg"] * math.nan
        return found

    monkeypatch.setattr(FasterRCNN, "losses", losses)
    done = start(epochs=3)
    assert (done.steps, done.rewound) == (6, 1)
    assert all(t.isfinite().all() for t in weights(done.folder).values())


ARGUMENTS = ["--model", "fasterrcnn_vitdet_nano", "--epochs", "3", "--batch", "4", "--imgsz", "64", "--device", "cpu"]


def test_divergence_ends_the_program_with_70(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(monkeypatch, range(1, 100), lambda loss: loss * math.nan)
    place = ["--data", str(drawn), "--project-dir", str(tmp_path), "--name", "it"]
    assert main(["train", *ARGUMENTS, *place]) == 70
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("boxwright: error: loss_box_reg not finite at step")
    for path in tmp_path.rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in checkpoint.read_tensors(path).values())


def test_an_interrupt_saves_the_weights_and_ends_with_130(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = journal.Journal.step

    def interrupted(self: journal.Journal, step: int, *values: Any) -> None:
        whole(self, step, *values)
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(journal.Journal, "step", interrupted)
    place = ["--data", str(drawn), "--project-dir", str(tmp_path), "--name", "it"]
    assert main(["train", *ARGUMENTS, *place]) == 130
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert f"boxwright train --resume {tmp_path / 'it'}" in error.splitlines()[-1]
    assert header(tmp_path / "it").step == 3
    assert header(tmp_path / "it", "best").step == 2
    detector, _ = checkpoint.load(tmp_path / "it/last_model.safetensors")
    assert not equal(dict(detector.state_dict()), weights(tmp_path / "it", "best"))


def test_the_librarys_warnings_reach_the_log_and_no_longer_after(start: Start, monkeypatch: Any) -> None:
    before = list(logging.getLogger("boxwright").handlers)
    whole = FasterRCNN.losses

    def losses(self: FasterRCNN, batch: Batch) -> dict[str, Tensor]:
        logging.getLogger("boxwright.data.loader").warning("a.jpg is gone")
        return whole(self, batch)

    monkeypatch.setattr(FasterRCNN, "losses", losses)
    done = start(max_steps=1)
    assert "a.jpg is gone" in (done.folder / "train.log").read_text("utf-8")
    assert logging.getLogger("boxwright").handlers == before


# Refused before anything is written


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "fp16"}, "--precision fp16"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"model": "fasterrcnn_vitdet_nanno"}, "fasterrcnn_vitdet_nano"),
        ({"weights": "none.pth"}, "none.pth"),
        ({"weights": "mae_vit_bse"}, "mae_vit_base"),
        ({"imgsz": 65}, "use 64 or 80"),
    ],
)
def test_mistakes_are_told_before_a_folder_is_made(
    start: Start, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        start(**options)
    assert not (tmp_path / "runs").exists()


def test_an_empty_validation_folder_is_refused_before_training(start: Start, tmp_path: Path, make_voc: MakeVoc) -> None:
    data = make_voc(tmp_path / "data", {"train/a.png": BOX})
    for name in ("images", "labels"):
        (data / "valid" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="valid"):
        start(data=str(data))
    assert not (tmp_path / "runs").exists()


# What the article's codebase stumbled over


def test_pictures_without_objects_are_trained_on(start: Start, tmp_path: Path, make_voc: MakeVoc) -> None:
    data = make_voc(tmp_path / "data", {"train/a.png": [], "train/b.png": BOX, "train/c.png": [], "valid/d.png": BOX})
    done = start(data=str(data), batch=1, epochs=1)
    assert done.steps == 3
    assert all(math.isfinite(row["loss"]) for row in metrics(done.folder))


def test_every_usual_suffix_is_trained_on(start: Start, tmp_path: Path, make_voc: MakeVoc) -> None:
    names = ["a.JPEG", "b.PNG", "c.bmp", "d.webp", "e[1].jpg", "f 50%.jpeg"]
    data = make_voc(tmp_path / "data", {**{f"train/{name}": BOX for name in names}, "valid/v.Jpg": BOX})
    done = start(data=str(data), batch=6)
    assert "train: 6 pictures, 6 objects" in (done.folder / "train.log").read_text("utf-8")


def test_boxes_keep_their_fractions_of_a_pixel(tmp_path: Path, make_voc: MakeVoc) -> None:
    data = make_voc(tmp_path, {"train/a.png": [[8.25, 9.5, 40.75, 41.125]], "valid/b.png": BOX})
    batch = next(training_batches(open_dataset(data).read("train").records, Fit(64), batch=1)).batch
    assert batch.boxes[0].tolist() == [[8.25, 9.5, 40.75, 41.125]]


def test_evaluation_sees_what_training_saw(trained: Path, drawn: Path, tmp_path: Path) -> None:
    # The article's codebase evaluates at 800 px whatever it trained at.
    done = evaluate(trained / "best_model.safetensors", drawn, project_dir=tmp_path, device="cpu", batch=4)
    saved = header(trained, "best").scores
    in_training = {name: figure for name, figure in saved.items() if not name.startswith("val_")}
    assert in_training.pop("threshold") == done.threshold
    assert done.scores.summary() == pytest.approx(in_training, nan_ok=True)
    written = json.loads((done.folder / "scores.json").read_text("utf-8"))
    assert written["coco"]["AP"] == pytest.approx(saved["map"])

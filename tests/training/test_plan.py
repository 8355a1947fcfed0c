"""What a plan foretells holds for the run itself; `--batch auto` changes the number and nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from boxwright.__main__ import main
from boxwright.config import Run, make_run, read_run
from boxwright.data.loader import training_batches
from boxwright.data.transforms import Fit
from boxwright.models.checkpoint import read_tensors
from boxwright.models.detectors.base import Detector
from boxwright.training import budget as budgets
from boxwright.training import plan as planning
from boxwright.training.budget import Budget
from boxwright.training.loop import Trained
from boxwright.training.plan import (
    FASTER,
    Line,
    Measured,
    Plan,
    Probe,
    Room,
    Speed,
    choose,
    course_of,
    disk_needed,
    line_of,
    micro_batch_of,
    power_below,
    with_batch,
)
from boxwright.training.run_folder import check_space, read_rows
from boxwright.types import Batch, UserError
from boxwright.verbs import plan, train

NANO: dict[str, Any] = {"model": "fasterrcnn_vitdet_nano", "imgsz": 64, "device": "cpu"}
CPU = torch.device("cpu")
sizes = st.integers(1, 200)


@pytest.fixture
def options(drawn: Path, tmp_path: Path) -> dict[str, Any]:
    """The smallest detector on `drawn`: two steps an epoch."""
    return {**NANO, "data": str(drawn), "epochs": 1, "batch": 4, "project_dir": tmp_path / "runs"}


@pytest.fixture
def room_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """The network has memory for so many pictures at once."""

    def room_for(pictures: int) -> None:
        losses = Detector.losses

        def limited(self: Detector, batch: Batch) -> dict[str, torch.Tensor]:
            if len(batch) > pictures:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return losses(self, batch)

        monkeypatch.setattr(Detector, "losses", limited)

    return room_for


# Arithmetic


@given(sizes, sizes)
def test_a_micro_batch_divides_the_step_and_fits(pictures: int, largest: int) -> None:
    found = micro_batch_of(pictures, largest)
    assert pictures % found == 0
    assert found <= largest
    assert not [size for size in range(found + 1, min(pictures, largest) + 1) if pictures % size == 0]


@given(sizes)
def test_the_power_of_two_below(number: int) -> None:
    found = power_below(number)
    assert found <= number < 2 * found
    assert found.bit_count() == 1


points = st.dictionaries(sizes, st.floats(0, 1e12), min_size=1, max_size=6).map(lambda found: sorted(found.items()))


@given(points, st.floats(0, 1e12), st.integers(1, 100), st.floats(0, 1e13))
def test_no_measured_memory_lies_above_the_line_and_it_never_falls(
    measured: list[tuple[int, float]], base: float, cap: int, limit: float
) -> None:
    line = line_of(measured, base)
    assert line.each >= 0
    assert all(memory <= line.at(pictures) * (1 + 1e-9) + 1 for pictures, memory in measured)
    most = line.most(limit, cap)
    assert 0 <= most <= cap
    assert most == 0 or line.at(most) <= limit * (1 + 1e-9) + 1
    assert most == cap or line.at(most + 1) >= limit * (1 - 1e-9) - 1


def test_the_line_through_exact_points() -> None:
    line = line_of([(1, 700.0), (2, 900.0), (4, 1300.0)], base=0)
    assert (line.fixed, line.each) == pytest.approx((500, 200))
    assert line.most(2100, 100) == 8
    assert line_of([(2, 900.0)], base=500) == Line(500, 200)


@st.composite
def measurements(draw: st.DrawFn) -> tuple[Measured, int]:
    """Steps at 1, 2, 4, ... of any speed, and the most that may be chosen."""
    count = draw(st.integers(1, 7))
    probes = tuple(Probe(2**i, draw(st.floats(0.1, 10)) * 2**i, 100 * 2**i) for i in range(count))
    ended = draw(st.sampled_from(["memory", "time", "size"]))
    return Measured(probes, ended, 10**9, Line(0, 100), 0.1, 1), 2 ** draw(st.integers(count - 1, 6))


@given(measurements())
def test_a_gpu_takes_all_that_fits_and_a_cpu_more_than_four_only_if_faster(made: tuple[Measured, int]) -> None:
    measured, most = made
    largest = measured.probes[-1].pictures
    on_gpu, _ = choose(measured, most, on_cpu=False)
    assert on_gpu == largest or (largest < on_gpu <= min(4, most) and measured.ended == "time")
    on_cpu, _ = choose(measured, most, on_cpu=True)
    assert on_cpu <= max(on_gpu, 4)
    assert on_cpu.bit_count() == 1
    if on_cpu == largest > 4:
        assert measured.probes[-1].speed > FASTER * measured.probes[-2].speed


def test_in_parts_a_step_takes_the_sum_of_its_parts() -> None:
    measured = Measured((Probe(1, 1.0, 1), Probe(2, 1.5, 1), Probe(4, 2.5, 1)), "size", 10, Line(0, 1), 0.1, 1)
    assert measured.seconds_of(4, 4) == 2.5
    assert measured.seconds_of(3, 3) == pytest.approx(1.5 * 3 / 2)
    assert measured.seconds_of(7, 2) == pytest.approx(3 * 1.5 + 1.0)
    assert measured.seconds_of(32, 32) == pytest.approx(2.5 * 8)


# The same facts that training has


@pytest.mark.parametrize("more", [{"epochs": 3, "eval_every": 2}, {"epochs": 3, "batch": 3, "max_steps": 5}])
def test_a_run_has_the_steps_and_evaluations_of_its_plan(options: dict[str, Any], more: dict[str, Any]) -> None:
    run = make_run(**{**options, **more})
    course = course_of(run, Speed(1.0, 1.0, 1.0, None, 0), training=8, validation=4)
    trained = train(run, quiet=True)
    assert course.steps == trained.steps
    assert course.evaluations == len(read_rows(trained.folder / "results.csv"))


def test_a_time_budget_allows_what_the_budget_itself_says(monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(data="d", batch=4, eval_every=2, time_budget="1h")
    now = [0.0]
    monkeypatch.setattr(budgets, "time", SimpleNamespace(monotonic=lambda: now[0]))
    budget = Budget(run, validation_pictures=40, steps_per_epoch=25)
    while not budget.due():
        now[0] += 2.0  # seconds a step
    budget.evaluated(40 * 0.5)
    course = course_of(run, Speed(2.0, 2.0, 0.5, None, 0), training=100, validation=40)
    assert course.steps == budget.total(0, 0.0)
    assert course.epochs == course.steps / 25
    assert course.seconds <= 3600


@pytest.mark.parametrize("more", [{}, {"ema": 0.9}, {"optimizer": "adamw"}])
def test_the_disk_is_what_training_asks_for(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(data="d", **more)
    needed = disk_needed(run, 1000)
    copies = 1 + bool(run.ema) + (2 if run.optimizer == "adamw" else 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    check_space(tmp_path, 1000, copies)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    with pytest.raises(UserError, match="disk"):
        check_space(tmp_path, 1000, copies)


def test_the_scene_is_what_the_network_sees(drawn: Path) -> None:
    run = make_run(data=str(drawn), batch=4, imgsz=96)
    pictures = planning.pictures_of(run)
    assert pictures
    batches = training_batches(pictures.training.records, Fit(96), batch=4)
    scene = planning.scene_of(run, pictures, 4)
    assert scene.canvas == tuple(next(batches).batch.images.shape[-2:])
    assert scene.classes == 2
    assert 1 <= scene.boxes <= 2


# Measuring


def test_a_plan_says_all_and_writes_nothing(options: dict[str, Any], drawn: Path) -> None:
    before = sorted(drawn.parent.rglob("*"))
    found = plan(**options)
    assert not options["project_dir"].exists()
    assert sorted(drawn.parent.rglob("*")) == before
    assert [probe.pictures for probe in found.measured.probes] == [1, 2, 4]
    assert (found.micro_batch, found.accumulation, found.advice) == (4, 1, ())
    assert found.course
    assert found.course.steps == 2
    assert found.speed
    assert found.speed.reading
    if found.measured.limit:  # known on Linux
        assert found.measured.line
        assert found.memory == found.measured.line.at(4) <= found.measured.limit
        assert found.largest_micro_batch
        assert found.largest_micro_batch >= 4


def test_the_program_prints_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["plan", "--model", NANO["model"], "--imgsz", "64", "--device", "cpu", "--batch", "2", "--json"]
    assert main([*words, "--ranks", "2", "--project-dir", str(tmp_path / "runs")]) == 0
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert found.keys() == {field.name for field in dataclasses.fields(Plan)}
    assert (found["ranks"], found["micro_batch"], found["course"]) == (2, 1, None)
    assert found["measured"]["probes"][0].keys() == {"pictures", "seconds", "memory"}
    for word in ("images/s", "assumed", "measured", "2 ranks are 2 times as fast", "no --data: 5 objects"):
        assert word in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("fit", "micro_batch", "accumulation"), [(1, 1, 6), (2, 2, 3), (5, 3, 2), (9, 6, 1)])
def test_out_of_memory_leads_to_smaller_parts(
    options: dict[str, Any], room_for: Callable[[int], None], fit: int, micro_batch: int, accumulation: int
) -> None:
    room_for(fit)
    found = plan(**{**options, "batch": 6})
    assert [probe.pictures for probe in found.measured.probes] == [size for size in (1, 2, 4, 8) if size <= fit]
    assert (found.micro_batch, found.accumulation) == (micro_batch, accumulation)
    advised = [f"6 at once do not fit: add --micro-batch {micro_batch} --eval-batch {micro_batch}"]
    assert list(found.advice) == (advised if fit < 6 else [])


def test_where_nothing_fits_the_plan_says_what_to_try(
    room_for: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    room_for(0)
    words = ["plan", "--model", "fasterrcnn_vitdet_tiny", "--imgsz", "32", "--device", "cpu", "--json"]
    assert main(words) == 0
    out, error = capsys.readouterr()
    found = json.loads(out)
    assert (found["largest_micro_batch"], found["micro_batch"], found["speed"]) == (0, None, None)
    assert found["checkpoint_blocks"] == "not enough"
    assert "not even one picture fits" in error
    assert "--imgsz" in error


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux refuses a process what is over its limit")
def test_the_system_refuses_memory_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(planning, "available_memory", lambda: 200_000_000)
    before = resource.getrlimit(resource.RLIMIT_AS)
    room = Room(CPU)
    with room.guarded(), pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(500_000_000, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert torch.empty(500_000_000, dtype=torch.uint8).nbytes == 500_000_000


def test_memory_is_seen() -> None:
    room = Room(CPU)
    room.watch()
    before = room.peak()
    if before is None:
        pytest.skip("this system does not tell")
    torch.ones(200_000_000, dtype=torch.uint8)
    after = room.peak()
    assert after
    assert after - before > 150_000_000
    assert room.limit is None or room.limit > room.taken()


# --batch auto


def test_auto_is_as_if_its_number_had_been_given(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    chosen = train(**{**options, "batch": "auto", "name": "auto"}, quiet=False)
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("--batch auto"))
    batch = yaml.safe_load((chosen.folder / "run.yaml").read_text("utf-8"))["batch"]
    assert batch in (1, 2, 4, 8)  # 8 pictures to train on
    assert f"--batch auto: {batch} pictures a step: " in said
    asked = train(**{**options, "batch": batch, "name": "asked"}, quiet=True)
    one, two = (read_tensors(run.folder / "last_model.safetensors") for run in (chosen, asked))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_auto_takes_what_fits_and_stays_when_the_run_goes_on(
    options: dict[str, Any], room_for: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    room_for(2)
    begun = train(**{**options, "batch": "auto", "name": "it", "max_steps": 4}, quiet=True)
    assert read_run(begun.folder).batch == 2
    monkeypatch.setattr(planning, "measure", lambda *_, **__: pytest.fail("measured again"))
    for more in ({"resume": begun.folder}, {**options, "batch": "auto", "name": "it", "resume": "auto"}):
        again: Trained = train(**more, quiet=True)
        assert (again.folder, again.steps) == (begun.folder, 4)
    assert read_run(begun.folder).batch == 2


def test_auto_needs_room_for_one_picture(options: dict[str, Any], room_for: Callable[[int], None]) -> None:
    room_for(0)
    with pytest.raises(UserError, match="--batch auto: not even one picture fits"):
        train(**{**options, "batch": "auto"}, quiet=True)
    assert not options["project_dir"].exists()


def rate(batch: int, **more: Any) -> float:
    return with_batch(make_run(data="d", batch="auto", **more), batch).learning_rate


def test_a_recipe_s_own_rate_follows_the_batch_and_a_given_one_stands() -> None:
    for batch in (1, 8, 16, 64):
        asked: Run = make_run(data="d", recipe="vitdet", batch=batch)
        assert with_batch(make_run(data="d", recipe="vitdet", batch="auto"), batch) == asked
    assert rate(64, recipe="vitdet", lr=0.0003) == 0.0003
    assert rate(64, recipe="article") == 0.005
    assert rate(64, recipe="vitdet", optimizer="sgd") == rate(4) == 0.001


# Mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--ranks 0", "--ranks 0"),
        ("--model fasterrcnn_vitdet_nan", "Did you mean 'fasterrcnn_vitdet_nano'"),
        ("--imgsz 100", "--imgsz 100 is not a multiple of 16"),
        ("--batch 0", "--batch 0"),
        ("--batch many", "--batch many"),
        ("--data nowhere.yaml", "nowhere.yaml"),
        ("--precision fp16 --device cpu", "--precision fp16"),
        ("--device gpu", "unknown device 'gpu'"),
        ("--batch auto --shard --device cpu", "--shard"),
        ("--resume nowhere", "no run at nowhere"),
        ("--option speed=2", "speed"),
        ("--epochz 3", "--epochz"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(
    words: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "measure", lambda *_, **__: pytest.fail("measured"))
    assert main(["plan", *([] if "--model" in words else ["--model", NANO["model"]]), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("boxwright: error: ")
    assert error.count("\n") == 1
    assert told in error
    assert not list(tmp_path.iterdir())


def test_under_torchrun_there_is_nothing_to_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--ranks"):
        plan(**NANO)


@pytest.mark.slow
def test_two_processes_agree_on_a_batch(options: dict[str, Any], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = ["train", "--model", NANO["model"], "--imgsz", "64", "--device", "cpu", "--data", options["data"]]
    words += ["--batch", "auto", "--epochs", "1", "--name", "two", "--project-dir", str(tmp_path)]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "boxwright", *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=200)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    batch = read_run(tmp_path / "two").batch
    assert batch in (2, 4, 8)
    assert f"--batch auto: {batch} pictures a step, {batch // 2} on each of 2: " in told[0]
    assert "--batch auto" not in told[1]

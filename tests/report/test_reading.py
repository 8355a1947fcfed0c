"""What is read from a folder: whole, partial, damaged, hostile, still being written."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from tests.report import rig

from boxwright.errors import UserError
from boxwright.evaluation.analysis import Analysis, analyse
from boxwright.report.reading import FRESH, RUN_FILES, read
from boxwright.report.revive import revive


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return rig.write_run(tmp_path / "run")


def age(folder: Path) -> None:
    """Make the books look as if nothing had been written for long."""
    then = time.time() - 10 * FRESH
    for name in ("metrics.jsonl", "train.log"):
        if (folder / name).exists():
            os.utime(folder / name, (then, then))


def test_a_whole_run_has_everything_and_one_note(run: Path) -> None:
    found = read(run)
    assert (found.state, found.name) == ("finished", "run")
    assert len(found.steps) == 160
    assert [row["epoch"] for row in found.evaluations] == [1, 2, 3, 4]
    assert found.best["map"] == 0.5
    assert found.options["data"] == "data.yaml"
    assert set(found.previews) == {"first_batch", "validation"}
    assert found.faults == ("train: 1 × repaired", "train: a.xml:3: xmax beyond the picture (repaired)")
    assert len(found.notes) == 1
    assert "boxwright evaluate" in found.notes[0]


def test_the_state_follows_the_log_and_the_clock(tmp_path: Path) -> None:
    run = rig.write_run(tmp_path / "run", finished=False)
    assert read(run).state == "running"
    age(run)
    found = read(run)
    assert found.state == "not finished"
    assert any(f"--resume {run}" in note for note in found.notes)
    for name in ("metrics.jsonl", "results.csv"):
        (run / name).unlink()
    assert read(run).state == "not begun"


def test_a_half_last_line_is_left_for_the_next_time(run: Path) -> None:
    whole = read(run)
    for name in ("metrics.jsonl", "results.csv"):
        with (run / name).open("a") as file:
            file.write('{"step": 99999, "loss": 1' if name.endswith("jsonl") else "5,2000,0.1,0.9,0.")
    found = read(run)
    assert (found.steps, found.evaluations, found.notes) == (whole.steps, whole.evaluations, whole.notes)


def test_damaged_lines_are_counted_and_left_out(run: Path) -> None:
    text = (run / "metrics.jsonl").read_text().splitlines()
    text[3:5] = ["\0\0\0", "[1, 2]"]
    (run / "metrics.jsonl").write_text("\n".join(text) + "\n")
    with (run / "results.csv").open("a") as file:
        file.write("nonsense\n")
    found = read(run)
    assert len(found.steps) == 158
    assert len(found.evaluations) == 4
    assert "2 lines of metrics.jsonl are damaged and left out." in found.notes
    assert "1 rows of results.csv are damaged and left out." in found.notes


def test_numbers_that_are_none_become_nan(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": null, "lr": "x", "gradient": 1e999, "images_per_s": [1]}\n')
    last = read(run).steps[-1]
    assert all(math.isnan(last[key]) for key in ("loss", "lr", "gradient", "images_per_s"))


@pytest.mark.parametrize("name", [*RUN_FILES, "env.json"])
def test_any_file_may_be_missing(run: Path, name: str) -> None:
    (run / name).unlink()
    age(run)
    assert any(name in note for note in read(run).notes)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.yaml", b"a: [1"), ("run.yaml", b"- 1"), ("run.yaml", b"a: &x 1\nb: *x"), ("run.yaml", b"\xff\xfe\x00"),
        ("env.json", b"[1]"), ("env.json", b"{"), ("env.json", b"[" * 100_000),
    ],
)  # fmt: skip
def test_a_damaged_file_is_noted_and_the_rest_is_read(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    found = read(run)
    assert any(note.startswith(f"{name} cannot be read") for note in found.notes)
    assert len(found.steps) == 160


def test_the_only_file_of_a_run_is_enough(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("")
    found = read(tmp_path)
    assert not found.steps
    assert found.best == {}
    assert any("No evaluation yet" in note for note in found.notes)


def test_an_evaluation_is_found_inside_a_run_and_alone(run: Path, tmp_path: Path) -> None:
    rig.write_evaluation(run / "evaluation", tmp_path / "pictures")
    inside, alone = read(run), read(run / "evaluation")
    for found in (inside, alone):
        assert found.judged
        assert found.judged.analysis
        assert found.judged.analysis.images == 40
        assert {shown.group for shown in found.judged.gallery} == {"best", "worst", "random", "review"}
        assert not found.judged.notes
    assert not inside.notes
    assert alone.state == "no training"
    assert not alone.notes


def test_an_analysis_of_another_version_is_a_note(run: Path, tmp_path: Path) -> None:
    path = rig.write_evaluation(run / "evaluation", tmp_path / "pictures") / "analysis.json"
    described = json.loads(path.read_text())
    del described["errors"]["ap"]
    path.write_text(json.dumps(described))
    judged = read(run).judged
    assert judged
    assert judged.analysis is None
    assert judged.notes == (
        "analysis.json is not what this version writes (errors has no 'ap'): evaluate again to have it here.",
    )


def test_a_gallery_leads_nowhere_but_into_its_own_folder(run: Path, tmp_path: Path) -> None:
    gallery = rig.write_evaluation(run / "evaluation", tmp_path / "pictures") / "pictures" / "gallery.json"
    outside = tmp_path / "secret.jpg"
    outside.write_bytes((gallery.parent / "best_01.jpg").read_bytes())
    for file in (str(outside), "../../../secret.jpg", "nothing.jpg"):
        gallery.write_text(json.dumps({"pictures": [{"file": file, "group": "best", "image": "x", "caption": ""}]}))
        judged = read(run).judged
        assert judged
        assert judged.gallery == ()
        assert "names a picture that is not there" in judged.notes[0]


@pytest.mark.parametrize("gallery", [{"pictures": 5}, {"pictures": [1, None]}, {"skipped": 3}, []])
def test_a_strange_gallery_shows_nothing(run: Path, tmp_path: Path, gallery: object) -> None:
    path = rig.write_evaluation(run / "evaluation", tmp_path / "pictures") / "pictures" / "gallery.json"
    path.write_text(json.dumps(gallery))
    judged = read(run).judged
    assert judged
    assert judged.gallery == ()


def test_mistakes_name_the_nearest_right_folder(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run at .*rnu .*Did you mean 'run'\?"):
        read(tmp_path / "rnu")
    with pytest.raises(UserError, match=r"neither the folder of a training nor of an evaluation.*Inside are: run"):
        read(tmp_path)
    with pytest.raises(UserError, match="is a file; wanted is the folder"):
        read(run / "run.yaml")
    with pytest.raises(UserError, match=r"File name too long|no run at"):
        read(tmp_path / ("x" * 5000))


def test_revive_gives_back_what_as_json_wrote(tmp_path: Path) -> None:
    records, detections = rig.judged(tmp_path)
    analysis = analyse(records, detections, rig.CLASSES)
    text = json.dumps(analysis.as_json())
    back = revive(Analysis, json.loads(text))
    assert json.dumps(back.as_json()) == text
    assert dataclasses.asdict(back).keys() == dataclasses.asdict(analysis).keys()


@dataclass(frozen=True)
class _Small:
    number: float
    kind: Literal["a", "b"] | None
    pairs: dict[str, tuple[int, int]]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "it is list"),
        ({"number": "x", "kind": "a", "pairs": {}}, "number is str"),
        ({"number": True, "kind": "a", "pairs": {}}, "number is bool"),
        ({"number": 1, "kind": "c", "pairs": {}}, "kind is 'c', none of a, b"),
        ({"number": 1, "kind": None, "pairs": {"x": [1]}}, r"pairs\.x has 1 values instead of 2"),
        ({"number": 1, "kind": None, "pairs": {"x": [1, 2.5]}}, r"pairs\.x\[1\] is float"),
        ({"number": 1, "kind": None}, "it has no 'pairs'"),
    ],
)
def test_revive_names_what_is_wrong(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        revive(_Small, value)


def test_revive_takes_null_for_nan_and_passes_over_what_it_does_not_know() -> None:
    made = revive(_Small, {"number": None, "kind": "b", "pairs": {"x": [1, 2]}, "later": 5})
    assert math.isnan(made.number)
    assert (made.kind, made.pairs) == ("b", {"x": (1, 2)})


def test_what_a_training_really_writes_is_understood(trained: Path) -> None:
    found = read(trained)
    assert found.state == "finished"
    assert len(found.evaluations) == 2
    assert found.steps
    assert {"loss", "lr", "images_per_s", "gradient"} <= found.steps[0].keys()
    assert {"epoch", "step", "map", "map50", "val_loss", "seconds"} <= found.evaluations[0].keys()
    assert set(found.previews) == {"first_batch", "validation"}

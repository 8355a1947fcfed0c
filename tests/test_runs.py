"""Which run is meant: new, gone on with, from another's weights, or the one that a restarted job had begun."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from boxwright.config import make_run
from boxwright.errors import UserError
from boxwright.runs import settled


def test_auto_begins_and_then_goes_on(trained: Path, tmp_path: Path) -> None:
    new = settled(make_run(data="d", resume="auto", name="it", project_dir=tmp_path))
    assert (new.resume, new.name, new.exist_ok) == (None, "it", True)
    again = {"resume": "auto", "name": trained.name, "project_dir": trained.parent, "epochs": 2}
    old = settled(make_run(**again, workers=3))
    assert (old.resume, old.workers, old.epochs) == (trained, 3, 2)
    with pytest.raises(UserError, match="--batch was 4, now 8"):
        settled(make_run(**again, batch=8))


def test_auto_wants_data_where_nothing_has_begun(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data is missing"):
        settled(make_run(resume="auto", name="it", project_dir=tmp_path))


def test_a_new_run_and_an_old_one_at_once(trained: Path) -> None:
    with pytest.raises(UserError, match="one of them"):
        settled(make_run(resume=trained, init_from=trained))


def test_a_batch_that_was_settled_stays(trained: Path) -> None:
    assert settled(make_run(resume=trained, batch="auto")).batch == 4
    with pytest.raises(UserError, match="--batch was 4, now 2"):
        settled(make_run(resume=trained, batch=2))


def test_auto_needs_a_name() -> None:
    with pytest.raises(UserError, match="--name"):
        settled(make_run(data="d", resume="auto"))


def test_from_another_run(trained: Path) -> None:
    run = settled(make_run(init_from=trained, mosaic=0.5, epochs=7))
    assert run.weights == str(trained / "best_model.safetensors")
    assert (run.mosaic, run.epochs, run.imgsz, run.model) == (0.5, 7, 64, "fasterrcnn_vitdet_nano")
    assert (run.name, run.resume, run.exist_ok) == (None, None, False)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"init_from": "nowhere"}, "no run at nowhere"), ({"init_from": ".", "weights": "x"}, "best_model.safetensors")],
)
def test_what_another_run_lacks(
    options: dict[str, str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        settled(make_run(**options))


def test_weights_beside_another_run(trained: Path) -> None:
    with pytest.raises(UserError, match="--weights"):
        settled(make_run(init_from=trained, weights="pretrained"))


def test_a_restarted_job_finds_its_run(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = json.loads((trained / "env.json").read_text("utf-8"))
    data = yaml.safe_load((trained / "run.yaml").read_text("utf-8"))["data"]
    run = make_run(data=data, project_dir=trained.parent, name="another")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "seven")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert settled(run).resume is None
    (trained.parent / "other").mkdir()
    (trained.parent / "other/env.json").write_text("{ broken", "utf-8")
    folder = trained.parent / "seventh"
    folder.mkdir()
    (folder / "env.json").write_text(json.dumps({**described, "job": "seven"}), "utf-8")
    (folder / "run.yaml").write_bytes((trained / "run.yaml").read_bytes())
    assert settled(run).resume == folder
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert settled(run).resume is None

"""Hostile files in a run folder: each gives a page with a note, alone and compared."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.report import rig

from boxwright.report import write_comparison, write_report
from boxwright.report.charts import ticks
from boxwright.report.pictures import BUDGET

HUGE = "9" * 400
SCORES, ANALYSIS, GALLERY = (f"evaluation/{n}" for n in ("scores.json", "analysis.json", "pictures/gallery.json"))


def _gallery(*files: str) -> str:
    return json.dumps({"pictures": [{"file": file, "group": "best", "image": "x", "caption": ""} for file in files]})


HOSTILE: tuple[tuple[str, str, str], ...] = (
    (SCORES, '{"coco": {"AP": ' + HUGE + "}}", "scores.json cannot be read"),
    (SCORES, '{"coco": {"AP": 0.5}, "intervals": {"coco": {"AP": [' + HUGE + ", 1]}}}", "scores.json cannot be read"),
    (ANALYSIS, '{"iou": ' + HUGE + "}", "analysis.json cannot be read"),
    (ANALYSIS, '{"iou": 1e999}', "analysis.json cannot be read"),
    ("results.csv", "epoch,map\n-1,0.5\n1e308,0.5\n-1e308,0.5\n", "3 rows of results.csv are damaged"),
    ("run.yaml", "[" * 100_000, "run.yaml cannot be read"),
    ("run.yaml", "seed: 0x" + "f" * 6000, "run.yaml cannot be read"),
    (GALLERY, _gallery("n" * 5000), "names a picture that is not there"),
    (GALLERY, _gallery("\ud800.jpg", "\0"), "names a picture that is not there"),
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = rig.write_run(tmp_path / "run")
    rig.write_evaluation(folder / "evaluation", tmp_path / "drawn")
    return folder


@pytest.mark.parametrize(("name", "content", "said"), HOSTILE)
def test_a_hostile_file_is_a_note_on_the_page(run: Path, tmp_path: Path, name: str, content: str, said: str) -> None:
    (run / name).write_text(content)
    began = time.monotonic()
    assert said in write_report(run).read_text(encoding="utf-8")
    other = rig.write_run(tmp_path / "other")
    assert said in write_comparison([run, other]).read_text(encoding="utf-8")
    assert time.monotonic() - began < 30


def test_links_out_of_the_folder_are_not_followed(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("classified\n")
    (run / "train.log").unlink()
    (run / "train.log").symlink_to(secret)
    (run / "evaluation/pictures/p.jpg").symlink_to(tmp_path / "drawn/000.jpg")
    (run / GALLERY).write_text(_gallery("p.jpg"))
    page = write_report(run).read_text(encoding="utf-8")
    assert "classified" not in page
    assert "train.log is a link that leads out of the folder" in page
    assert "names a picture that is not there: &#x27;p.jpg" in page


def test_pictures_stop_when_the_page_is_full(run: Path) -> None:
    (run / GALLERY).write_text(_gallery(*["best_01.jpg"] * 3000))
    page = write_report(run).read_text(encoding="utf-8")
    assert len(page) < BUDGET * 2
    assert "pictures are left out: the page has no room for more" in page


def test_a_bomb_is_a_note(run: Path) -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (30000).to_bytes(4, "big") * 2 + b"\x08\0\0\0\0"
    (run / "evaluation/pictures/b.png").write_bytes(header + bytes(100))
    (run / GALLERY).write_text(_gallery("b.png"))
    assert "claim more than 100 megapixels: b.png" in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", [{}, {"evaluation": True, "map": 0.5, "epoch": 1}])
def test_long_books_are_thinned(run: Path, kind: dict[str, Any]) -> None:
    (run / "results.csv").unlink()
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps({"step": i, "loss": 1.0, **kind}) + "\n" for i in range(25_000))
    page = write_report(run).read_text(encoding="utf-8")
    assert "metrics.jsonl has 25,000 lines; 8,334 of them, evenly spaced, are shown." in page


def test_ticks_of_the_widest_range_are_few() -> None:
    assert 1 < len(ticks(-1e308, 1e308)) <= 7

"""Pictures of the report: the right ones, ground truth beside predictions, each decoded once."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.report import rig

from boxwright.evaluation.analysis import analyse
from boxwright.inference import gallery
from boxwright.inference.gallery import EACH, LARGEST, SUSPECTS, write_gallery
from boxwright.types import UserError


def write(folder: Path, records: Any, detections: Any, **options: Any) -> dict[str, Any]:
    analysis = analyse(records, detections, rig.CLASSES)
    target = write_gallery(folder, records, detections, rig.CLASSES, analysis, **options)
    assert target == folder / "pictures"
    return json.loads((target / "gallery.json").read_text(encoding="utf-8"))


def test_best_worst_random_and_suspicious_pictures_are_there(tmp_path: Path) -> None:
    records, detections = rig.judged(tmp_path / "data")
    analysis = analyse(records, detections, rig.CLASSES)
    told = write(tmp_path, records, detections)
    groups = Counter(shown["group"] for shown in told["pictures"])
    assert groups == {
        "best": EACH, "worst": EACH, "random": EACH, "review": min(SUSPECTS, len(analysis.review.suspects)),
    }  # fmt: skip
    f1 = {one.id: one.f1 for one in analysis.pictures}
    shown = {group: [one["image"] for one in told["pictures"] if one["group"] == group] for group in groups}
    assert min(f1[name] for name in shown["best"]) >= sorted(f1.values())[-EACH]
    assert max(f1[name] for name in shown["worst"]) <= sorted(f1.values())[EACH - 1]
    assert not set(shown["best"]) & set(shown["worst"])
    assert len({*shown["best"], *shown["worst"], *shown["random"]}) == 3 * EACH
    assert [one["suspect"] for one in told["pictures"] if one["group"] == "review"] == list(range(groups["review"]))
    files = {path.name for path in (tmp_path / "pictures").glob("*.jpg")}
    assert files == {one["file"] for one in told["pictures"]}
    assert told["threshold"] == analysis.thresholds.overall.threshold
    assert told["skipped"] == []


def test_the_same_seed_draws_the_same_pictures(tmp_path: Path) -> None:
    records, detections = rig.judged(tmp_path / "data")
    drawn = [write(tmp_path / str(i), records, detections, seed=seed) for i, seed in enumerate((0, 0, 1))]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_each_picture_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, detections = rig.judged(tmp_path / "data", count=10)
    seen: list[Path] = []
    decode = gallery.decode

    def counted(path: Any) -> Any:
        seen.append(path)
        return decode(path)

    monkeypatch.setattr(gallery, "decode", counted)
    told = write(tmp_path, records, detections)
    assert len(seen) == len(set(seen)) <= 10 < len(told["pictures"])


def test_truth_is_on_the_left_and_predictions_on_the_right(tmp_path: Path) -> None:
    records, detections = rig.judged(tmp_path / "data", count=1)
    Image.new("RGB", (128, 96)).save(tmp_path / "black.png")
    records = [replace(records[0], image=tmp_path / "black.png")]
    nothing = [detections[0][:0]]
    told = write(tmp_path, records, nothing, threshold=0.0)
    worst = next(one for one in told["pictures"] if one["group"] == "worst")
    pixels = np.asarray(Image.open(tmp_path / "pictures" / worst["file"])).astype(int)
    left, right = pixels[:, : pixels.shape[1] // 2 - 8], pixels[:, pixels.shape[1] // 2 + 8 :]
    coloured = [np.ptp(half, axis=2).max() for half in (left, right)]
    assert coloured[0] > 100
    assert coloured[1] < 40


def test_large_and_tiny_pictures_are_shown_in_a_size_to_be_looked_at(tmp_path: Path) -> None:
    records, detections = rig.judged(tmp_path / "data", count=2)
    for record, size in zip(records, ((40, 20), (5000, 300)), strict=True):
        Image.new("RGB", size).save(record.image)
    told = write(tmp_path, records, detections)
    for one in told["pictures"]:
        with Image.open(tmp_path / "pictures" / one["file"]) as image:
            assert max(image.size) <= 2.2 * LARGEST
            assert max(image.size) >= 300


def test_a_picture_that_cannot_be_read_is_left_out_and_said(tmp_path: Path) -> None:
    records, detections = rig.judged(tmp_path / "data", count=8)
    records[3].image.write_bytes(b"no picture")
    records[5].image.unlink()
    told = write(tmp_path, records, detections)
    assert len(told["skipped"]) == 2
    assert all(str(records[i].image) in " ".join(told["skipped"]) for i in (3, 5))
    assert not {"003", "005"} & {one["image"] for one in told["pictures"]}
    assert told["pictures"]


def test_names_of_files_never_come_from_ids(tmp_path: Path) -> None:
    records, detections = rig.judged(tmp_path / "data", count=8, ids={i: f"../../{i}/\0<b>" for i in range(8)})
    told = write(tmp_path / "here", records, detections)
    assert all(Path(one["file"]).name == one["file"] for one in told["pictures"])
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*")} == {"data", "here"}


def test_an_older_gallery_is_replaced(tmp_path: Path) -> None:
    records, detections = rig.judged(tmp_path / "data")
    write(tmp_path, records, detections)
    told = write(tmp_path, records[:2], detections[:2])
    assert {path.name for path in (tmp_path / "pictures").glob("*.jpg")} == {one["file"] for one in told["pictures"]}


def test_no_pictures_are_a_gallery_too(tmp_path: Path) -> None:
    assert write(tmp_path, [], [])["pictures"] == []


def test_a_place_that_cannot_be_written_to_is_a_mistake(tmp_path: Path) -> None:
    records, detections = rig.judged(tmp_path / "data", count=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        write(tmp_path / "file", records, detections)

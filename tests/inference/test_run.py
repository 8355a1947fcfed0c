"""Whatever is named as input comes out annotated and written down, and what cannot be read is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from boxwright.__main__ import main
from boxwright.data.transforms import Fit
from boxwright.inference.media import open_input, read_video
from boxwright.inference.output import VideoWriter
from boxwright.inference.predictor import Predictor
from boxwright.inference.run import Predicted, Style, predict_sources
from boxwright.types import Batch, Detections, UserError

CLASSES = ("whole", "corner", "middle")


class Thirds:
    """A detector whose answer is known: on every canvas a box of each class, in fractions of the picture."""

    def predict(self, batch: Batch) -> list[Detections]:
        return [self._of(*size) for size in batch.sizes]

    def _of(self, height: int, width: int) -> Detections:
        fractions = np.array([[0, 0, 1, 1], [0, 0, 0.25, 0.5], [0.25, 0.25, 0.75, 0.75]], np.float32)
        boxes = fractions * np.array([width, height, width, height], np.float32)
        return Detections(boxes, np.array([0.91236, 0.6, 0.3], np.float32), np.arange(3))


@pytest.fixture
def predict(tmp_path: Path) -> Callable[..., Predicted]:
    """Predicts on a file, folder or glob below tmp_path/in, into tmp_path/out."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()

    def predict(what: str = "", **style: Any) -> Predicted:
        sources = open_input(str(tmp_path / "in" / what))
        return predict_sources(Predictor(Thirds(), CLASSES, Fit(64)), sources, tmp_path / "out", Style(**style))

    return predict


def save(path: Path, size: tuple[int, int] = (60, 80)) -> Path:
    small = np.random.default_rng(len(path.name)).integers(40, 216, (3, 4, 3), np.uint8)
    Image.fromarray(small).resize(size[::-1]).save(path)
    return path


def make_clip(path: Path, frames: int = 9, rate: Fraction = Fraction(30000, 1001)) -> Path:
    with VideoWriter(path, rate, (48, 64)) as writer:
        for index in range(frames):
            writer.write(np.full((48, 64, 3), 40 + 10 * index, np.uint8))
    return path


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def written(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def answers(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "predictions.json").read_text("utf-8"))


# Pictures


def test_a_picture_comes_out_annotated_with_boxes_in_its_own_pixels(
    predict: Callable[..., Predicted], tmp_path: Path
) -> None:
    path = save(tmp_path / "in/street.jpg", (300, 400))
    done = predict("street.jpg", threshold=0.5)
    assert (done.pictures, done.frames, done.objects, done.skipped) == (1, 0, 2, [])
    assert written(done.folder) == ["predictions.json", "street.jpg"]
    assert answers(done.folder) == {
        "classes": list(CLASSES),
        "threshold": 0.5,
        "results": [
            {
                "image": str(path),
                "size": [300, 400],
                "detections": [
                    {"class": "whole", "score": 0.9124, "box": [0, 0, 400, 300]},
                    {"class": "corner", "score": 0.6, "box": [0, 0, 100, 150]},
                ],
            }
        ],
    }
    with Image.open(path) as plain, Image.open(done.folder / "street.jpg") as drawn:
        assert drawn.size == plain.size
        changed = np.abs(np.asarray(drawn).astype(int) - np.asarray(plain)).max(axis=2) > 60
    assert changed[:, 95:105].any()  # the corner's right edge
    assert not changed[180:280, 150:350].any()


def test_a_folders_neighbours_do_not_overwrite_each_other(predict: Callable[..., Predicted], tmp_path: Path) -> None:
    names = ["a.b.jpg", "a.c.jpg", "a.jpg", "a.png", "Ü [1] %d.jpeg"]
    for name in names:
        save(tmp_path / "in" / name)
    done = predict()
    assert done.pictures == len(names)
    assert len(written(done.folder)) == len(names) + 1
    assert {"a.b.jpg", "a.c.jpg", "a.jpg", "a_png.png"} <= set(written(done.folder))
    results = answers(done.folder)["results"]
    assert sorted(Path(r["image"]).name for r in results) == sorted(names)


def test_only_the_asked_classes_are_kept(predict: Callable[..., Predicted], tmp_path: Path) -> None:
    save(tmp_path / "in/a.jpg")
    done = predict("a.jpg", threshold=0.0, only=frozenset({0, 2}))
    (result,) = answers(done.folder)["results"]
    assert [d["class"] for d in result["detections"]] == ["whole", "middle"]
    assert done.objects == 2


def test_a_picture_without_detections_is_written_too(predict: Callable[..., Predicted], tmp_path: Path) -> None:
    save(tmp_path / "in/a.png")
    done = predict("a.png", threshold=1.0)
    assert answers(done.folder)["results"][0]["detections"] == []
    with Image.open(tmp_path / "in/a.png") as plain, Image.open(done.folder / "a.png") as out:
        np.testing.assert_array_equal(np.asarray(plain), np.asarray(out))


def test_names_beside_boxes_can_be_left_out(predict: Callable[..., Predicted], tmp_path: Path) -> None:
    save(tmp_path / "in/a.png", (200, 300))
    with Image.open(predict("a.png").folder / "a.png") as image:
        named = np.asarray(image)
    with Image.open(predict("a.png", names=False).folder / "a.png") as image:
        assert (np.asarray(image) != named).any()


# Videos


@pytest.mark.parametrize("batch", [1, 4])
def test_a_video_keeps_frames_and_rate(predict: Callable[..., Predicted], tmp_path: Path, batch: int) -> None:
    make_clip(tmp_path / "in/clip.mp4", frames=9)
    done = predict("clip.mp4", batch=batch)
    assert (done.pictures, done.frames, done.objects, done.skipped) == (0, 9, 18, [])
    assert written(done.folder) == ["clip.mp4", "predictions.json"]
    given, out = read_video(tmp_path / "in/clip.mp4"), read_video(done.folder / "clip.mp4")
    assert (out.rate, out.size) == (given.rate, given.size) == (Fraction(30000, 1001), (48, 64))
    times = [frame.time for frame in given.frames()]
    assert [frame.time for frame in out.frames()] == times
    (result,) = answers(done.folder)["results"]
    assert result["rate"] == pytest.approx(30000 / 1001)
    assert [frame["time"] for frame in result["frames"]] == pytest.approx([float(time) for time in times])
    assert all(frame["detections"][0]["box"] == [0, 0, 64, 48] for frame in result["frames"])


def test_pictures_and_videos_of_a_folder_go_together(predict: Callable[..., Predicted], tmp_path: Path) -> None:
    save(tmp_path / "in/clip.jpg")
    make_clip(tmp_path / "in/clip.mp4", frames=3)
    (tmp_path / "in/notes.txt").write_text("not for us")
    done = predict()
    assert (done.pictures, done.frames, done.skipped) == (1, 3, [])
    assert written(done.folder) == ["clip.jpg", "clip_mp4.mp4", "predictions.json"]


# What cannot be read


def test_what_cannot_be_read_is_skipped_and_named(predict: Callable[..., Predicted], tmp_path: Path) -> None:
    save(tmp_path / "in/a.jpg")
    cut(save(tmp_path / "in/b.jpg", (300, 400)))
    (tmp_path / "in/c.mp4").write_bytes(b"")
    save(tmp_path / "in/d.jpg")
    done = predict()
    assert done.pictures == 2
    assert [Path(r["image"]).name for r in answers(done.folder)["results"]] == ["a.jpg", "d.jpg"]
    assert [reason.split(":")[0] for reason in done.skipped] == [str(tmp_path / "in" / n) for n in ("b.jpg", "c.mp4")]
    assert "cut short" in done.skipped[0]
    assert written(done.folder) == ["a.jpg", "d.jpg", "predictions.json"]


def test_when_nothing_can_be_read_that_is_an_error(predict: Callable[..., Predicted], tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        cut(save(tmp_path / "in" / name, (300, 400)))
    with pytest.raises(UserError, match=r"none of 2 inputs.*a\.jpg"):
        predict()
    with pytest.raises(UserError, match=r"a\.jpg: is cut short"):
        predict("a.jpg")
    assert written(tmp_path / "out") == []


# The whole way


@pytest.fixture
def command(trained: Path, tmp_path: Path) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        weights = str(trained / "best_model.safetensors")
        place = ["--output", str(tmp_path / "results"), "--device", "cpu"]
        return main(["predict", "--weights", weights, "--input", str(tmp_path / "in"), *place, *arguments])

    (tmp_path / "in").mkdir()
    return run


def test_some_skipped_ends_with_3_and_lists_them(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in/good.jpg")
    cut(save(tmp_path / "in/bad.jpg", (300, 400)))
    assert command("--json", "--threshold", "0.01") == 3
    out, error = capsys.readouterr()
    assert f"skipped: {tmp_path / 'in/bad.jpg'}: is cut short" in error
    result = json.loads(out)
    assert len(result["skipped"]) == 1
    assert (result["pictures"], Path(result["folder"])) == (1, tmp_path / "results/res_1")
    assert written(tmp_path / "results/res_1") == ["good.jpg", "predictions.json"]


def test_all_skipped_ends_with_2_and_leaves_nothing(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.jpg", "b.jpg"):
        cut(save(tmp_path / "in" / name, (300, 400)))
    assert command() == 2
    assert "boxwright: error: none of 2 inputs" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "results").iterdir())


def test_another_size_than_in_training_is_said(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in/a.jpg")
    assert command("--imgsz", "96", "--square-img") == 0
    assert "trained at 64, aspect kept, predicting at 96 square" in capsys.readouterr().err
    assert command() == 0
    assert "trained at" not in capsys.readouterr().err

"""Any picture, however it is given, comes back with boxes in its own pixels, alone or among others."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from boxwright import verbs
from boxwright.data.dataset import open_dataset
from boxwright.data.images import decode
from boxwright.data.synth import synthesize
from boxwright.data.transforms import Fit
from boxwright.evaluation.thresholds import best_threshold
from boxwright.inference.predictor import Predictor, as_array, choose_device
from boxwright.models import checkpoint
from boxwright.types import Batch, Detections, Record, Size, UInt8, UserError


class Finder:
    """A detector that finds the bright rectangle on each canvas, and nothing in a dark picture."""

    def __init__(self) -> None:
        self.canvases: list[Size] = []

    def predict(self, batch: Batch) -> list[Detections]:
        self.canvases.append((batch.images.shape[2], batch.images.shape[3]))
        return [self._find(image[0].numpy() > 127) for image in batch.images]

    def _find(self, bright: np.ndarray[Any, np.dtype[np.bool_]]) -> Detections:
        rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
        if not len(rows):
            return Detections()
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        # the first score tells how much of the canvas is bright, so that answers cannot be swapped unnoticed
        score = 0.5 + float(bright.mean()) / 2
        return Detections(np.array([box, box], np.float32), np.array([score, 0.1], np.float32), np.array([1, 0]))


def picture(size: Size, box: tuple[int, int, int, int]) -> UInt8:
    image = np.zeros((*size, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    return image


PICTURES: list[tuple[Size, tuple[int, int, int, int]]] = [
    ((100, 200), (20, 10, 120, 90)),
    ((200, 100), (10, 20, 60, 180)),
    ((33, 47), (5, 6, 40, 30)),
    ((100, 200), (0, 0, 200, 100)),
    ((480, 640), (300, 200, 640, 480)),
    ((64, 64), (8, 8, 24, 40)),
]


@pytest.fixture(params=[Fit(64), Fit(96, square=True)], ids=["aspect", "square"])
def finder(request: pytest.FixtureRequest) -> Predictor:
    return Predictor(Finder(), ["dark", "bright"], request.param)


@pytest.fixture(scope="module")
def nano(trained: Path) -> Predictor:
    return Predictor.load(trained / "best_model.safetensors", device="cpu")


def assert_same(one: Detections, two: Detections, near: float = 0.0) -> None:
    np.testing.assert_array_equal(one.labels, two.labels)
    np.testing.assert_allclose(one.boxes, two.boxes, atol=near)
    np.testing.assert_allclose(one.scores, two.scores, atol=near)


# Boxes


@pytest.mark.parametrize(("size", "box"), PICTURES)
def test_boxes_are_in_the_pictures_own_pixels(finder: Predictor, size: Size, box: tuple[int, ...]) -> None:
    found = finder.predict(picture(size, box)).boxes[0]
    canvas_pixel = max(size) / finder.fit.imgsz
    assert found == pytest.approx(box, abs=max(canvas_pixel, 1))
    assert (found[:2] >= 0).all()
    assert (found[2:] <= (size[1], size[0])).all()


def test_a_box_over_the_padding_is_cut_at_the_picture() -> None:
    class Everything:
        def predict(self, batch: Batch) -> list[Detections]:
            height, width = batch.images.shape[2:]
            box = np.array([[-9, -9, width + 9, height + 9]], np.float32)
            return [Detections(box, np.ones(1, np.float32), np.zeros(1, np.int64)) for _ in batch.ids]

    found = Predictor(Everything(), ["all"], Fit(64)).predict(np.zeros((20, 50, 3), np.uint8))
    assert found.boxes.tolist() == [[0, 0, 50, 20]]


def test_the_threshold_leaves_out_lower_scores(finder: Predictor) -> None:
    image = picture(*PICTURES[0])
    assert len(finder.predict(image)) == 2
    assert finder.predict(image, threshold=0.5).labels.tolist() == [1]
    assert len(finder.predict(image, threshold=1.0)) == 0


def test_several_pictures_come_back_in_order_canvas_by_canvas(finder: Predictor) -> None:
    images = [picture(*given) for given in PICTURES]
    together = finder.predict_many(images)
    calls = len(finder.detector.canvases)  # pyright: ignore
    assert calls == len({finder.fit.place(size).canvas for size, _ in PICTURES})
    for image, found in zip(images, together, strict=True):
        assert_same(found, finder.predict(image))
    assert finder.predict_many([]) == []


# What a picture may be


def test_path_array_and_pil_are_one(nano: Predictor, drawn: Path) -> None:
    path = next((drawn.parent / "valid/images").glob("*.jpg"))
    array = decode(path)
    png = Image.fromarray(array)
    expected = nano.predict(path)
    assert len(expected)
    for form in (str(path), array, png, np.asfortranarray(array)):
        assert_same(nano.predict(form), expected)


def test_pil_pictures_are_turned_upright_as_files_are(tmp_path: Path) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    Image.fromarray(picture((20, 40), (0, 0, 10, 10))).save(path, exif=exif)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(as_array(opened), as_array(path))
    assert as_array(path).shape == (40, 20, 3)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1", "CMYK", "LA"])
def test_other_kinds_of_pil_pictures_become_rgb(mode: str) -> None:
    image = as_array(Image.new(mode, (7, 5)))
    assert (image.shape, image.dtype) == ((5, 7, 3), np.uint8)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pil_pictures_of_more_than_8_bits_are_refused(mode: str) -> None:
    # Pillow would cut each pixel above 255 to 255, which is most of them.
    with pytest.raises(UserError, match=re.escape(mode)):
        as_array(Image.new(mode, (7, 5)))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((5, 7, 3), np.float32),
        np.zeros((5, 7, 3), np.int64),
        np.zeros((5, 7), np.uint8),
        np.zeros((5, 7, 4), np.uint8),
        np.zeros((3, 5, 7), np.uint8),
        np.zeros((0, 7, 3), np.uint8),
        np.zeros((1, 5, 7, 3), np.uint8),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_other_arrays_are_refused(array: Any) -> None:
    with pytest.raises(UserError, match="uint8 RGB") as caught:
        as_array(array)
    assert str(array.shape) in str(caught.value)


def test_a_file_that_is_no_picture_is_named(nano: Predictor, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("<html>")
    for name in ("a.jpg", "none.jpg"):
        with pytest.raises(UserError, match=re.escape(str(tmp_path / name))):
            nano.predict(tmp_path / name)


def test_nothing_given_is_changed(nano: Predictor) -> None:
    image = picture((64, 64), (8, 8, 24, 40))
    image.flags.writeable = False
    nano.predict(image)


# A trained detector


def test_a_batch_equals_its_pictures_one_by_one(nano: Predictor, drawn: Path) -> None:
    images = [decode(path) for path in sorted((drawn.parent / "train/images").glob("*.jpg"))]
    images.insert(2, images[0][:32])  # another canvas
    for image, found in zip(images, nano.predict_many(images), strict=True):
        assert_same(found, nano.predict(image), near=1e-3)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Records of pictures of several sizes."""
    data = synthesize(
        tmp_path_factory.mktemp("mixed") / "data",
        train=1,
        valid=6,
        size=(60, 110),
        jitter=0.5,
        classes=("circle", "square"),
    )
    return list(open_dataset(data).read("val").records)


@pytest.mark.parametrize(("batch", "workers"), [(1, 0), (3, 0), (2, 1)])
def test_evaluation_is_predicting_one_by_one(nano: Predictor, mixed: list[Record], batch: int, workers: int) -> None:
    assert len({nano.fit.place(record.size).canvas for record in mixed}) > 1
    for record, found in zip(mixed, nano.predict_records(mixed, batch=batch, workers=workers), strict=True):
        assert_same(found, nano.predict(record.image), near=1e-3)


def test_each_record_is_told_once(nano: Predictor, mixed: list[Record]) -> None:
    assert sorted(index for index, _ in nano.each_record(mixed, batch=2)) == list(range(len(mixed)))


def test_it_reads_pictures_as_in_training_unless_told_otherwise(trained: Path) -> None:
    weights = trained / "best_model.safetensors"
    assert Predictor.load(weights, device="cpu").fit == Fit(64)
    assert Predictor.load(weights, device="cpu", imgsz=96, square=True).fit == Fit(96, square=True)


def test_a_run_folder_works_where_it_is_moved(trained: Path, drawn: Path, tmp_path: Path, monkeypatch: Any) -> None:
    moved, data = tmp_path / "élsewhere/my run", tmp_path / "data"
    shutil.copytree(trained, moved)
    shutil.copytree(drawn.parent, data)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    weights = "../élsewhere/my run/best_model.safetensors"
    path = next((data / "valid/images").glob("*.jpg"))
    there = Predictor.load(trained / "best_model.safetensors", device="cpu")
    assert_same(Predictor.load(weights, device="cpu").predict(path), there.predict(path))
    done = verbs.evaluate(weights, data / "data.yaml", device="cpu")
    before = verbs.evaluate(trained / "best_model.safetensors", drawn, device="cpu")
    assert done.scores.summary() == pytest.approx(before.scores.summary(), nan_ok=True)
    assert done.folder.resolve() == (tmp_path / "work/outputs/evaluation/res_1").resolve()


# Devices


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cuda", "no CUDA GPU"),
        ("cuda:1", "no CUDA GPU"),
        ("mps", "no Apple GPU"),
        ("gpu", "unknown device 'gpu'"),
        ("cpu:x", "unknown device"),
        ("", "unknown device"),
        ("meta", "only cpu, cuda and mps"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=told):
        choose_device(name)


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    available: Callable[[], bool] = lambda: True  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto").type == "cuda"
    assert choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="2 GPUs"):
        choose_device("cuda:7")


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(("scores", "threshold"), [({"threshold": 0.37}, 0.37), ({}, 0.5), ({"threshold": 7.0}, 0.5)])
def test_the_threshold_is_the_checkpoints_own(
    trained: Path, tmp_path: Path, scores: dict[str, float], threshold: float
) -> None:
    detector, header = checkpoint.load(trained / "best_model.safetensors")
    checkpoint.save(tmp_path / "w.safetensors", detector, replace(header, scores=scores))
    assert Predictor.load(tmp_path / "w.safetensors", device="cpu").threshold == threshold


def test_training_leaves_the_threshold_of_the_highest_f1(trained: Path, drawn: Path) -> None:
    predictor = Predictor.load(trained / "best_model.safetensors", device="cpu")
    records = open_dataset(drawn).read("val").records
    found = predictor.predict_records(records)
    assert predictor.threshold == pytest.approx(best_threshold(records, found, predictor.classes), abs=1e-6)


def test_predict_says_the_threshold_it_takes(trained: Path, drawn: Path, tmp_path: Path) -> None:
    said: list[str] = []
    picture = next((drawn.parent / "valid" / "images").iterdir())
    weights = trained / "best_model.safetensors"
    done = verbs.predict(weights, picture, device="cpu", output=tmp_path, say=said.append)
    expected = Predictor.load(weights, device="cpu").threshold
    assert json.loads((done.folder / "predictions.json").read_text())["threshold"] == expected
    assert any(line.startswith(f"threshold {expected:.2f}: the highest F1") for line in said)

"""`data show`: the sheets, and samples that are the training's own, bit for bit."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from boxwright import verbs
from boxwright.__main__ import main
from boxwright.config import make_run
from boxwright.data.dataset import open_dataset
from boxwright.data.images import decode
from boxwright.data.loader import EpochOrder, training_batches
from boxwright.data.transforms import Fit
from boxwright.training.seen import augmentations, mixing_of, seen
from boxwright.types import UserError

CHANCE: dict[str, Any] = {"flip": 0.5, "mosaic": 0.4, "mixup": 0.3, "copy_paste": 0.3, "scale_jitter": (0.5, 1.5)}


@pytest.mark.parametrize("epoch", [0, 2])
def test_samples_of_any_epoch_are_those_of_training(drawn: Path, epoch: int) -> None:
    run = make_run(data=str(drawn), imgsz=64, batch=3, seed=7, epochs=6, close_mosaic=2, use_train_aug=True, **CHANCE)
    dataset = open_dataset(drawn)
    records = dataset.read("train").records
    order = EpochOrder(len(records), 3, run.seed)
    steps, fit = order.steps_per_epoch, Fit(run.imgsz)
    trained = training_batches(
        records, fit, batch=3, seed=7, start_step=epoch * steps, scale_jitter=run.scale_jitter,
        augmentations=augmentations(run, fit, 2), mixing=mixing_of(run, 6 * steps, steps),
    )  # fmt: skip
    indices = [index for step in range(epoch * steps, (epoch + 1) * steps) for _, index in order[step]]
    again = iter(seen(run, records, indices, epoch=epoch, classes=2))
    for share in islice(trained, steps):
        for place in range(len(share.batch)):
            sample = next(again)
            height, width = sample.image.shape[:2]
            pixels = share.batch.images[place, :, :height, :width].permute(1, 2, 0)
            assert np.array_equal(pixels.numpy(), sample.image)
            assert torch.equal(share.batch.boxes[place], torch.from_numpy(sample.boxes))
            assert share.batch.seeds[place] == sample.seed
    assert next(again, None) is None


def test_epochs_differ(drawn: Path) -> None:
    run = make_run(data=str(drawn), imgsz=64, epochs=6, **CHANCE)
    records = open_dataset(drawn).read("train").records
    first, second = (seen(run, records, [0, 1, 2, 3], epoch=epoch, classes=2) for epoch in (0, 1))
    assert any(not np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))


def test_sheets_of_a_dataset(drawn: Path, tmp_path: Path) -> None:
    plain = verbs.show(drawn, count=3, project_dir=tmp_path)
    assert [sheet.name for sheet in plain.sheets] == ["truth.jpg"]
    both = verbs.show(drawn, count=3, each=True, flip=1.0, imgsz=64, project_dir=tmp_path)
    assert [sheet.name for sheet in both.sheets] == ["truth.jpg", "seen.jpg"]
    assert both.pictures == plain.pictures  # the same, drawn by chance
    assert decode(both.sheets[0]).tobytes() == decode(plain.sheets[0]).tobytes()
    alone = sorted(path.name for path in (both.folder / "seen").iterdir())
    assert [name[4:-4] for name in alone] == both.pictures
    flipped, straight = (decode(both.folder / view / alone[0]) for view in ("seen", "truth"))
    assert flipped.shape == straight.shape
    background = np.abs(flipped[:, ::-1].astype(int) - straight) < 8
    assert background.mean() > 0.6  # all but the drawn boxes


def test_a_run_says_what_its_network_sees(trained: Path, tmp_path: Path) -> None:
    shown = verbs.show(run=trained, epoch=2, pictures=["train_00003"], project_dir=tmp_path)
    assert shown.pictures == ["train_00003"]
    assert len(shown.sheets) == 2


def test_pictures_of_a_class(drawn: Path, tmp_path: Path) -> None:
    dataset = open_dataset(drawn)
    shown = verbs.show(drawn, classes=["square"], count=100, project_dir=tmp_path)
    label = dataset.classes.index("square")
    assert shown.pictures == [record.id for record in dataset.read("train").records if label in record.labels]


def test_a_picture_that_cannot_be_read_is_left_out_and_said(
    make_voc: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_voc(tmp_path / "d", {f"{s}/{n}.png": [[5, 5, 20, 20]] for s in ("train", "val") for n in "abc"})
    whole = (path := data / "train" / "images" / "b.png").read_bytes()
    path.write_bytes(whole[:60] + bytes(40) + whole[100:])  # its header and its end are there
    code = main(["data", "show", str(data), "--project-dir", str(tmp_path / "shown"), "--json"])
    told = capsys.readouterr()
    assert code == 3
    assert "skipped: " in told.err
    assert "b.png" in told.err
    assert json.loads(told.out)["pictures"] == ["a", "c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["sqare"]}, "Did you mean 'square'"),
        ({"pictures": ["00003"]}, "Did you mean 'train_00003'"),
        ({"pictures": ["elephant"]}, "names of files without extension, such as train_00000"),
        ({"epoch": 0}, "count from 1"),
        ({"count": 0}, "1 to 100 pictures"),
        ({"split": "val", "flip": 0.5}, "only training pictures"),
        ({"augment": Path("nothing.py")}, "no file at nothing.py"),
        ({"mosaic": 2.0}, "--mosaic 2.0"),
        ({"run": Path("nowhere")}, "no run at nowhere"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    drawn: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        verbs.show(None if "run" in options else drawn, project_dir=tmp_path / "shown", **options)
    assert not (tmp_path / "shown").exists()


def test_an_epoch_that_never_is(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--epoch 3: the run of .* has 2 of them"):
        verbs.show(run=trained, epoch=3, project_dir=tmp_path)


def test_a_files_own_name_will_do_where_only_one_has_it(make_voc: Any, tmp_path: Path) -> None:
    boxes = [[5, 5, 20, 20]]
    for year in ("VOC2007", "VOC2012"):
        made = make_voc(tmp_path / year, {f"x/{name}{year}.png": boxes for name in "ab"} | {"x/both.png": boxes})
        (made / "x" / "images").rename(made / "JPEGImages")
        (made / "x" / "labels").rename(made / "Annotations")
        (made / "ImageSets" / "Main").mkdir(parents=True)
        (made / "ImageSets" / "Main" / "train.txt").write_text(f"a{year}\nboth\n")
        (made / "ImageSets" / "Main" / "val.txt").write_text(f"b{year}\n")
    assert verbs.show(tmp_path, pictures=["aVOC2012"], project_dir=tmp_path / "o").pictures == ["VOC2012_aVOC2012"]
    with pytest.raises(UserError, match="no picture called 'both'"):
        verbs.show(tmp_path, pictures=["both"], project_dir=tmp_path / "o")


def test_a_picture_that_was_left_out_is_said(make_voc: Any, tmp_path: Path) -> None:
    data = make_voc(tmp_path / "d", {f"{s}/{n}.jpg": [[5, 5, 20, 20]] for s in ("train", "val") for n in "abc"})
    path = data / "train" / "images" / "b.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"b is left out of train: .*cut short"):
        verbs.show(data, pictures=["b"], project_dir=tmp_path / "o")
    said: list[str] = []
    verbs.show(data, project_dir=tmp_path / "o", say=said.append)
    assert "1 of 3 pictures are left out: `boxwright data check` says why" in said


def test_a_run_and_options_do_not_go_together(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out --flip"):
        verbs.show(run=trained, flip=0.5, project_dir=tmp_path)

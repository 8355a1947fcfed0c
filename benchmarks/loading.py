"""Pictures a second of one core, from files to batches: the article's way beside ours, and what makes it fast.

    python benchmarks/loading.py [--pictures 64] [--batch 8] [--rounds 5] [--imgsz 640]

The pictures are drawn JPEGs of 500x375, as VOC's are, with eight objects each; the canvas is 640x640, the augmentations
are the article's. "article's form" was written here after what the article describes: a picture is decoded by OpenCV,
made float32, stretched and divided by 255, its XML parsed, its list of augmentations built again for each picture with
the boxes in whole numbers, and PyTorch's DataLoader makes batches. All take turns in each round on one core, and
its own time is counted, so that a busy machine slows all alike. Large pictures, 2000x1500, follow by themselves; with
BOXWRIGHT_TEST_DATA also real pictures of VOC.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from boxwright.data.article import article_augmentation
from boxwright.data.cache import opened
from boxwright.data.dataset import open_dataset
from boxwright.data.images import decode, resized
from boxwright.data.loader import training_batches
from boxwright.data.transforms import Fit
from boxwright.types import Record


class ArticleForm(TorchDataset[Any]):
    """One sample as the article's pipeline makes it."""

    def __init__(self, records: Sequence[Record], side: int) -> None:
        self.records, self.side = records, side

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        record = self.records[index]
        image = cv2.cvtColor(cv2.imread(str(record.image)), cv2.COLOR_BGR2RGB).astype(np.float32)
        height, width = image.shape[:2]
        image = cv2.resize(image, (self.side, self.side)) / 255.0
        assert record.annotation is not None
        found = [
            [float(thing.findtext(f"bndbox/{corner}") or 0) for corner in ("xmin", "ymin", "xmax", "ymax")]
            for thing in ElementTree.parse(record.annotation).getroot().findall("object")
        ]
        scale = self.side / np.array([width, height] * 2, np.float32)
        boxes = np.minimum(np.array(found, np.float32).reshape(-1, 4) * scale, self.side).astype(np.int64)
        pipeline = A.Compose(
            [
                A.OneOf(
                    [A.Blur(blur_limit=3, p=0.5), A.MotionBlur(blur_limit=3, p=0.5), A.MedianBlur(blur_limit=3, p=0.5)],
                    p=0.5,
                ),
                A.ToGray(p=0.1),
                A.RandomBrightnessContrast(p=0.1),
                A.ColorJitter(p=0.1),
                A.RandomGamma(p=0.1),
                A.ToTensorV2(p=1.0),
            ],
            bbox_params=A.BboxParams(format="pascal_voc", label_fields=["labels"]),
        )
        made = pipeline(image=image, bboxes=boxes, labels=np.ones(len(boxes), np.int64))
        target = {"boxes": torch.tensor(np.array(made["bboxes"])), "labels": torch.tensor(made["labels"])}
        return made["image"], target


def article_epochs(records: Sequence[Record], side: int, batch: int) -> Iterator[Any]:
    loader = DataLoader(
        ArticleForm(records, side), batch, shuffle=True, collate_fn=lambda samples: tuple(zip(*samples, strict=True))
    )
    while True:
        yield from loader


OBJECT = (
    "<object><name>thing</name><difficult>0</difficult><bndbox><xmin>{:.1f}</xmin><ymin>{:.1f}</ymin>"
    "<xmax>{:.1f}</xmax><ymax>{:.1f}</ymax></bndbox></object>"
)


def draw(folder: Path, count: int, width: int, height: int) -> list[Record]:
    """Smooth noise, which compresses about as photographs do, with boxes anywhere."""
    records: list[Record] = []
    for index in range(count):
        rng = np.random.default_rng(index)
        path = folder / f"{width}_{index:04d}.jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
        corner = rng.uniform(0, height / 2, (8, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(20, height * 0.45, (8, 2))], axis=1).astype(np.float32)
        flags = np.zeros(8, bool)
        xml = path.with_suffix(".xml")
        objects = "".join(OBJECT.format(*box) for box in np.add(boxes, (1, 1, 0, 0)))
        xml.write_text(f"<annotation>{objects}</annotation>", encoding="utf-8")
        records.append(Record(path.stem, path, (height, width), boxes, rng.integers(0, 20, 8), flags, flags, xml))
    return records


def race(runners: dict[str, Iterator[Any]], steps: int, pictures: int, rounds: int) -> dict[str, float]:
    """Pictures a second of each, medians over rounds in which all take turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name, batches in runners.items():
            start = time.process_time()
            for _ in islice(batches, steps):
                pass
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: pictures / statistics.median(times) for name, times in seconds.items()}


def told(title: str, speeds: dict[str, float]) -> None:
    print(f"\n{title}")
    first = next(iter(speeds.values()))
    for name, speed in speeds.items():
        print(f"  {name:58}{speed:8.0f} a second{speed / first:8.1f} x")


def compare(title: str, records: list[Record], side: int, batch: int, rounds: int, folder: Path) -> None:
    os.environ["BOXWRIGHT_CACHE"] = str(folder / "cache")
    steps = len(records) // batch
    fit = Fit(side, square=True)
    ours: Callable[..., Iterator[Any]] = partial(training_batches, records[: steps * batch], fit, batch=batch)
    augmented = {"augmentations": (article_augmentation(),)}
    with opened("disk", 8e9, title, 0) as disk, opened("memory", 8e9, title, 0) as memory:
        told(
            f"{title}, canvas {side}x{side}, batches of {batch}",
            race(
                {
                    "article's form": article_epochs(records[: steps * batch], side, batch),
                    "ours, from JPEG": ours(**augmented),
                    "ours, from the cache on disk": ours(**augmented, cache=disk),
                    "ours, from the cache in memory": ours(**augmented, cache=memory),
                    "ours, from JPEG, no augmentation": ours(),
                    "ours, from the cache in memory, no augmentation": ours(cache=memory),
                },
                steps,
                steps * batch,
                rounds,
            ),
        )


def large(records: list[Record], rounds: int) -> None:
    fit = Fit(640)

    def full() -> Iterator[Any]:
        while True:
            for record in records:
                yield resized(decode(record.image), fit.content(record.size))

    def scaled() -> Iterator[Any]:
        while True:
            for record in records:
                yield replace(fit, decode_scaled=True).read(record.image)

    runners = {"decoded whole, then resized": full(), "--decode-scaled": scaled()}
    told("JPEGs of 2000x1500 to 640", race(runners, len(records), len(records), rounds))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("pictures", 64), ("batch", 8), ("rounds", 5), ("imgsz", 640)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drawn = draw(folder, options.pictures, 500, 375)
        compare("drawn JPEGs of 500x375", drawn, options.imgsz, options.batch, options.rounds, folder)
        large(draw(folder, 12, 2000, 1500), options.rounds)
        if real := os.environ.get("BOXWRIGHT_TEST_DATA"):
            found = open_dataset(Path(real) / "voc12_subset").read("train").records[: options.pictures]
            compare("VOC 2012, real pictures", list(found), options.imgsz, options.batch, options.rounds, folder)


if __name__ == "__main__":
    main()

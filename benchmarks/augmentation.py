"""Pictures a second that one core makes into training samples, for each augmentation beside decoding and the Fit alone.

    python benchmarks/augmentation.py [--pictures 40] [--imgsz 640] [--rounds 7]

The pictures are drawn, JPEGs of 500x375 as VOC's are, eight objects each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from boxwright.data.article import article_augmentation, article_faults
from boxwright.data.loader import Samples
from boxwright.data.mixing import Mixing
from boxwright.data.own_augmentation import own_augmentation
from boxwright.data.transforms import Fit, random_flip
from boxwright.types import Record

PLAIN = "decode + Fit only"
OWN = {
    "Albumentations": "import albumentations as A\naugment = A.HorizontalFlip(p=0.5)",
    "torchvision v2": "from torchvision.transforms import v2\naugment = v2.RandomHorizontalFlip(0.5)",
    "function": "def augment(image, boxes, labels, rng):\n    return image, boxes, labels",
}


def draw(folder: Path, count: int) -> list[Record]:
    """Smooth noise, which compresses about as photographs do, with boxes anywhere."""
    records: list[Record] = []
    for index in range(count):
        rng = np.random.default_rng(index)
        path = folder / f"{index:04d}.jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        corner = rng.uniform(0, 200, (8, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(20, 170, (8, 2))], axis=1).astype(np.float32)
        flags = np.zeros(8, bool)
        records.append(Record(path.stem, path, (375, 500), boxes, rng.integers(0, 20, 8), flags, flags))
    return records


def contestants(records: list[Record], fit: Fit, folder: Path) -> dict[str, Samples]:
    plain = Samples(records, fit)
    found = {
        PLAIN: plain,
        "flip 0.5": Samples(records, fit, (random_flip(0.5),)),
        "the article's": Samples(records, fit, (article_augmentation(),)),
        "the article's faults": Samples(records, fit, (article_faults,)),
        "scale jitter 0.1 to 2": Samples(records, fit, scale_jitter=(0.1, 2.0)),
        "mosaic": Samples(records, fit, mixing=Mixing(mosaic=1.0)),
        "mixup": Samples(records, fit, mixing=Mixing(mixup=1.0)),
        "copy-paste": Samples(records, fit, mixing=Mixing(copy_paste=1.0)),
    }
    for name, text in OWN.items():
        path = folder / f"{name.split()[0].lower()}_own.py"
        path.write_text(text, encoding="utf-8")
        found[f"own: {name}"] = Samples(records, fit, (own_augmentation(path, fit, classes=20),))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("pictures", 40), ("imgsz", 640), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        named = contestants(draw(folder, options.pictures), Fit(options.imgsz), folder)
        seconds: dict[str, list[float]] = {name: [] for name in named}
        for epoch in range(options.rounds + 1):  # interleaved, so that a busy machine slows all alike
            for name, samples in named.items():
                start = time.perf_counter()
                for index in range(options.pictures):
                    samples[(epoch, index)]
                if epoch:  # the first warms up
                    seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) / options.pictures for name, times in seconds.items()}
    print(
        f"{options.pictures} JPEGs of 500x375 at --imgsz {options.imgsz}, one core, medians of {options.rounds} rounds"
    )
    print(f"{'':24}{'pictures/s':>12}{'ms more':>10}{'of its speed':>14}")
    for name, value in median.items():
        print(f"{name:24}{1 / value:12.0f}{1000 * (value - median[PLAIN]):10.2f}{median[PLAIN] / value:14.2f}")


if __name__ == "__main__":
    main()

"""The article's augmentation list (`--use-train-aug`), by Albumentations; the only file that knows that library."""

from __future__ import annotations

import os

import numpy as np

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would ask the network for a newer version
import albumentations as A

from boxwright.data.transforms import Augmentation, Labelled


def article_augmentation() -> Augmentation:
    """One of three blurs (.5), grey (.1), brightness and contrast (.1), colour (.1), gamma (.1).

    Labels travel with their boxes as indices, so a transform that drops a box drops its label too.
    """
    pipeline = A.Compose(
        [
            A.OneOf(
                [
                    A.Blur(blur_limit=3, p=0.5),
                    A.MotionBlur(blur_limit=3, p=0.5),
                    A.MedianBlur(blur_limit=3, p=0.5),
                ],
                p=0.5,
            ),
            A.ToGray(p=0.1),
            A.RandomBrightnessContrast(p=0.1),
            A.ColorJitter(p=0.1),
            A.RandomGamma(p=0.1),
        ],
        bbox_params=A.BboxParams(format="pascal_voc", label_fields=["index"], clip=True),
    )

    def augment(picture: Labelled, rng: np.random.Generator) -> Labelled:
        pipeline.set_random_seed(int(rng.integers(2**31)))
        out = pipeline(image=picture.image, bboxes=picture.boxes, index=np.arange(len(picture.boxes)))
        index = np.asarray(out["index"], np.int64)
        boxes = np.asarray(out["bboxes"], np.float32).reshape(-1, 4)
        return Labelled(np.asarray(out["image"], np.uint8), boxes, picture.labels[index], picture.difficult[index])

    return augment

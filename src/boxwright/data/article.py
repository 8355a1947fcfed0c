"""The article's augmentation list (`--use-train-aug`), by Albumentations; the only file that knows that library."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from functools import partial

import numpy as np

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would ask the network for a newer version
import albumentations as A

from boxwright.data.transforms import Augmentation, Labelled


def article_augmentation() -> Augmentation:
    """One of three blurs (.5), grey (.1), brightness and contrast (.1), colour (.1), gamma (.1).

    All of them change pixels only, so the objects pass untouched.
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
        ]
    )
    return partial(_augment, pipeline)  # not a closure: reading workers may get it pickled


def _augment(pipeline: A.Compose, picture: Labelled, rng: np.random.Generator) -> Labelled:
    # One stream for all: `set_random_seed` would seed each transform alike, and all or none of them would act.
    pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    return replace(picture, image=np.asarray(pipeline(image=picture.image)["image"], np.uint8))

"""What the article's pipeline did to a placed picture and to its objects, and how Albumentations draws."""

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
    """`--use-train-aug`: one of three blurs (.5), grey (.1), brightness and contrast (.1), colour (.1), gamma (.1).

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


def article_faults(picture: Labelled, rng: np.random.Generator) -> Labelled:
    """`--article-faults`: boxes cut to integers, `difficult` objects learnt as any other; after all augmentations.

    To measure what mending that is worth. Boxes that have no area then are left out: there, they ended the training.
    """
    boxes = picture.boxes.astype(np.int64).astype(np.float32)
    kept = np.asarray((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    picture = picture.keep(kept, boxes[kept])
    return replace(picture, difficult=np.zeros_like(picture.difficult))


def reseed(pipeline: A.Compose, rng: np.random.Generator) -> None:
    """Let a pipeline and all of its transforms draw from one stream.

    `set_random_seed` would seed each transform alike, and all or none of them would act.
    """
    pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))


def _augment(pipeline: A.Compose, picture: Labelled, rng: np.random.Generator) -> Labelled:
    reseed(pipeline, rng)
    return replace(picture, image=np.asarray(pipeline(image=picture.image)["image"], np.uint8))

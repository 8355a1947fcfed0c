"""Complete training recipes by name: the options that a run takes where its own say nothing.

A recipe is a function of the options given: it may look at the model's name, and leaves alone what it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from boxwright import registry
from boxwright.errors import UserError

Options = dict[str, Any]


def article(_: Mapping[str, Any]) -> Options:
    """The article's: SGD with Nesterov momentum, a constant rate after warm-up, square pictures, its augmentations.

    `boxwright train --recipe article --model fasterrcnn_vitdet --data VOC` is its command; mAP 51.8 was reported for
    it by a convention of its own (docs/guides/from-the-article.md). `--article-faults` brings its faults back.
    """
    return {
        "epochs": 50,
        "batch": 2,
        "imgsz": 640,
        "square_training": True,
        "use_train_aug": True,
        "optimizer": "sgd",
        "lr": 0.005,
        "schedule": "constant",
        "warmup_steps": 1000,
    }


def vitdet(given: Mapping[str, Any]) -> Options:
    """ViTDet's: AdamW at 1e-4 for 16 pictures, layer-wise decay, scale jitter, the rate / 10 at 89 % and at 96 %.

    The backbone's size decides the layer decay: B .7, L .8, H .9 (Li et al. 2022 and its configurations in
    detectron2); its drop path (.1, .4, .5) is the builders' default. The average of the weights is judged and saved.
    16 pictures in a step: add `--micro-batch` where they do not fit; another batch scales the rate with it.
    """
    text = f"{given.get('backbone') or ''} {given.get('model') or ''}"
    layer_decay = next((decay for decay, marks in LAYER_DECAY.items() if any(m in text for m in marks)), 0.7)
    batch = given.get("batch", 16)
    return {
        "epochs": 100,
        "batch": 16,
        "optimizer": "adamw",
        "lr": 1e-4 * (batch if isinstance(batch, int) else 16) / 16,
        "weight_decay": 0.1,
        "layer_decay": layer_decay,
        "schedule": "step",
        "warmup_steps": 250,
        "clip": 1.0,
        "flip": 0.5,
        "scale_jitter": (0.1, 2.0),
        "ema": 0.9998,
    }


LAYER_DECAY = {0.8: ("vitdet_l", "vit_large", "vitl"), 0.9: ("vitdet_h", "vit_huge", "vith")}

RECIPES: dict[str, Callable[[Mapping[str, Any]], Options]] = {"article": article, "vitdet": vitdet}


def resolved(name: str, given: Mapping[str, Any]) -> Options:
    """The options of recipe `name` under those that are given; an unknown name is a `UserError`."""
    if name not in RECIPES:
        hint = registry.nearest(name, RECIPES) or f" There are {', '.join(RECIPES)}"
        raise UserError(f"unknown recipe {name!r}.{hint}")
    found = RECIPES[name](given)
    if given.get("optimizer", found["optimizer"]) != found["optimizer"]:
        del found["lr"]  # it belongs to the recipe's own optimizer
    return {**found, **given}

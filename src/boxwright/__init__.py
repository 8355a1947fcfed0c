"""Boxwright: the toolkit with which people make object detectors.

import boxwright

boxwright.train(model="fasterrcnn_vitdet", data="data.yaml", epochs=50)
predictor = boxwright.Predictor.load("outputs/training/res_1/best_model.safetensors")
detections = predictor.predict("street.jpg")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from boxwright.version import __version__

if TYPE_CHECKING:
    from boxwright.data.dataset import open_dataset
    from boxwright.data.synth import synthesize
    from boxwright.errors import BoxwrightError, DiskFailed, Diverged, Stopped, UserError
    from boxwright.evaluation import score
    from boxwright.inference.predictor import Predictor
    from boxwright.models.join import build_detector
    from boxwright.registry import register
    from boxwright.types import Batch, Detections, Record, Sample, Scores
    from boxwright.verbs import check, demo, evaluate, plan, predict, show, train

_HOMES = {
    "build_detector": "boxwright.models.join",
    "open_dataset": "boxwright.data.dataset",
    "register": "boxwright.registry",
    "synthesize": "boxwright.data.synth",
    "score": "boxwright.evaluation",
    "Predictor": "boxwright.inference.predictor",
    **dict.fromkeys(("BoxwrightError", "DiskFailed", "Diverged", "Stopped", "UserError"), "boxwright.errors"),
    **dict.fromkeys(("Batch", "Detections", "Record", "Sample", "Scores"), "boxwright.types"),
    **dict.fromkeys(("check", "demo", "evaluate", "plan", "predict", "show", "train"), "boxwright.verbs"),
}

__all__ = [
    "Batch", "BoxwrightError", "Detections", "DiskFailed", "Diverged", "Predictor", "Record", "Sample", "Scores",
    "Stopped", "UserError",
    "__version__", "build_detector", "check", "demo", "evaluate", "open_dataset", "plan", "predict", "register",
    "score", "show", "synthesize", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: `import boxwright` loads no PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'boxwright' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

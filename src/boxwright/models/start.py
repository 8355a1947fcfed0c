"""The weights that training starts from: published ones by name, or a file of any known kind, with an account."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from boxwright.models import weights as published
from boxwright.models.vit import ViT
from boxwright.models.weights import PUBLISHED, Account, Tensors, Weights, load, load_mae, read_tensors
from boxwright.progress import Progress
from boxwright.registry import nearest
from boxwright.types import UserError

# Heads that depend on the classes: left as initialised where the file's are for another number of them.
CLASS_HEADS = ("roi_heads.box_predictor.*",)
PIXEL_BUFFERS = ("pixel_mean", "pixel_std")  # torchvision keeps them outside of its state dict
CLASSIFIERS = ("fc.*", "classifier.*", "head.*")  # of backbones trained to classify


@dataclass(frozen=True)
class Origin:
    """Where a detector's first weights come from."""

    text: str  # for a person
    sources: list[str]  # for the checkpoint: file or name, with licence


def start_from(detector: nn.Module, weights: str | None, *, say: Callable[[str], None] = lambda _: None) -> Origin:
    """Load what `--weights` names into the detector and say what became of every tensor.

    Neither a known name nor a file that fits is a `UserError`.
    """
    if weights is None:
        return Origin("from random weights", [])
    path = Path(weights).expanduser()
    source = str(path)
    if not path.exists():
        if weights not in PUBLISHED:
            hint = nearest(weights, PUBLISHED) or f" Published ones: {', '.join(PUBLISHED)}."
            raise UserError(f"no weights at {path} (looked in {Path.cwd()}).{hint}")
        entry = PUBLISHED[weights]
        path = published.fetch(entry, progress=_download_progress(entry, say))
        source = f"{entry.name} ({entry.licence}, {entry.source})"
    account = load_into(detector, read_tensors(path), source)
    return Origin(f"from {account}", [source])


def load_into(detector: nn.Module, tensors: Tensors, source: str) -> Account:
    """Recognise by their names what the tensors are of: a detector, a masked autoencoder, a classifier's backbone."""
    body = detector.get_submodule("backbone.body")
    if any(name.startswith(("rpn.", "roi_heads.")) for name in tensors):
        return load(detector, tensors, source=source, may_miss=(*CLASS_HEADS, *PIXEL_BUFFERS), may_leave=())
    if isinstance(body, ViT):
        return load_mae(body, tensors, source=source)
    return load(body, tensors, source=source, rename=_without_features, may_leave=CLASSIFIERS)


def _without_features(name: str) -> str:
    return name.removeprefix("features.")  # torchvision's classifiers keep their layers under it


def _download_progress(entry: Weights, say: Callable[[str], None]) -> Callable[[int, int | None], None]:
    """Says what is fetched, under which licence, and how far it is."""
    size = f"{entry.size / 1e6:.0f} MB, " if entry.size else ""
    began: list[Progress] = []

    def progress(done: int, total: int | None) -> None:
        if not began:
            say(f"downloading {entry.name} ({size}{entry.licence}) from {entry.url}")
            began.append(Progress("kB", total and total // 1000, say))
        began[0](done // 1000)

    return progress

"""The loss on validation pictures, measured while they are judged: the backbone looks at each of them once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from math import fsum

import torch

from boxwright.models import chance
from boxwright.models.detectors.base import Detector
from boxwright.types import Batch, Detections


class WithLosses:
    """A detector that predicts as it does alone, and adds up the losses of the annotated pictures it is given.

    What the losses draw at random, such as the anchors that are compared, a picture draws from its id: the order of the
    pictures and what shares their batch change nothing. `terms` has each batch's part of the sums, and the number of
    its pictures under "".
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.terms: dict[str, list[float]] = {}

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """The boxes of each picture, best first; the detector must be in evaluation mode."""
        assert not self.detector.training
        maps = self.detector.backbone(self.detector.normalise(batch))
        found = self.detector.detections_of(maps, batch.sizes)
        with chance.of_pictures([picture_seed(name) for name in batch.ids], batch.images.device) as generators:
            losses = self.detector.losses_of(maps, batch.sizes, self.detector.truths_of(batch, generators))
        means = {name: [loss.item() * len(batch)] for name, loss in losses.items()}  # over the batch's pictures
        self.add({**means, "": [float(len(batch))]})
        return found

    def add(self, terms: Mapping[str, Sequence[float]]) -> None:
        """Count what another saw, too."""
        for name, more in terms.items():
            self.terms.setdefault(name, []).extend(more)

    def means(self) -> dict[str, float]:
        """Each loss, averaged over the pictures so far; nothing where there were none.

        The sums are exact before they are rounded, so that the order of the batches shows nowhere.
        """
        return {name: fsum(parts) / fsum(self.terms[""]) for name, parts in self.terms.items() if name}


def picture_seed(name: str) -> int:
    """A seed of its own for the picture of that id."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())

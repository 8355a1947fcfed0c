"""What every detector does besides detecting: pixels to numbers, losses while training, predictions otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from boxwright.models import chance
from boxwright.models.detectors.boxes import Truth
from boxwright.models.pyramid import Maps
from boxwright.types import Batch, Detections, Size, UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0 .. 1, as all of torchvision's and MAE's weights expect
IMAGENET_STD = (0.229, 0.224, 0.225)

Found = list[tuple[Tensor, Tensor, Tensor]]  # for each picture boxes (N, 4), scores (N,) and labels (N,), best first


class Detector(nn.Module):
    """A backbone with its pyramid, and what finds objects in their maps. Boxes are in canvas pixels.

    A kind of detector gives `num_classes`, `losses_of`, `detect` and `work`. `mean` and `std` of the pixels (0 .. 1)
    are the backbone's own where it has them, else ImageNet's.
    """

    num_classes: int  # foreground classes

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        mean, std = getattr(backbone, "mean", IMAGENET_MEAN), getattr(backbone, "std", IMAGENET_STD)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))

    def losses_of(self, maps: Maps, sizes: Sequence[Size], truths: Sequence[Truth]) -> dict[str, Tensor]:
        """Named scalar losses of the backbone's maps {stride: (B, C, H/S, W/S)}."""
        raise NotImplementedError

    def detect(self, maps: Maps, sizes: Sequence[Size]) -> Found:
        """What is found in each picture."""
        raise NotImplementedError

    def work(self, maps: Maps) -> None:
        """Run every layer that a prediction of one picture runs, on anything: what its FLOPs are counted from."""
        raise NotImplementedError

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses of a batch, to be added up: means over its pictures."""
        with chance.of_pictures(batch.seeds, batch.images.device) as generators:
            maps = self.backbone(self.normalise(batch))
            return self.losses_of(maps, batch.sizes, self.truths_of(batch, generators))

    @staticmethod
    def truths_of(batch: Batch, generators: Sequence[torch.Generator | None]) -> list[Truth]:
        """What is in each picture; objects marked `difficult` are ignored. Without `generators` draws are global."""
        return [
            Truth(boxes[~ignored], labels[~ignored], boxes[ignored], generator)
            for boxes, labels, ignored, generator in zip(
                batch.boxes, batch.labels, batch.difficult, generators or [None] * len(batch), strict=True
            )
        ]

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """The boxes of each picture, best first."""
        return self.detections_of(self.backbone(self.normalise(batch)), batch.sizes)

    def detections_of(self, maps: Maps, sizes: Sequence[Size]) -> list[Detections]:
        """The boxes of each picture of the backbone's maps, best first."""
        return [Detections(*(values.cpu().numpy() for values in picture)) for picture in self.detect(maps, sizes)]

    def forward(self, batch: Batch) -> dict[str, Tensor] | list[Detections]:
        """`losses` while training, else `predict`; for wrappers that only know `forward`."""
        return self.losses(batch) if self.training else self.predict(batch)

    def normalise(self, batch: Batch) -> Tensor:
        """uint8 pixels → (B, 3, H, W) of about unit variance; padding becomes exactly zero."""
        mean, std = cast(Tensor, self.pixel_mean), cast(Tensor, self.pixel_std)
        images = (batch.images.to(mean.dtype) / 255 - mean) / std
        for image, (height, width) in zip(images, batch.sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return images


def require_levels(backbone: nn.Module, strides: Iterable[int], channels: int, detector: str) -> None:
    """Refuse, with the reason, a pyramid that lacks a level that a detector looks at, or is of another width."""
    levels = cast(Mapping[int, int], backbone.channels)
    lacking = sorted(set(strides) - set(levels))
    if lacking:
        raise UserError(
            f"{detector} looks at strides {_list(strides)}, but the pyramid gives {_list(levels)}: "
            f"{_list(lacking)} are missing"
        )
    wrong = {stride: levels[stride] for stride in strides if levels[stride] != channels}
    if wrong:
        raise UserError(f"{detector} expects levels of {channels} channels, but the pyramid gives {wrong}")


def _list(strides: Iterable[int]) -> str:
    return " ".join(str(stride) for stride in sorted(strides))

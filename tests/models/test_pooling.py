"""Our RoIAlign on the CPU against torchvision's kernel."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align

from boxwright.models.detectors.pooling import align_regions


def regions(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 260 - 40  # some begin outside of the map
    side = torch.rand(count, 2, generator=generator) * 150
    image = torch.randint(0, 2, (count, 1), generator=generator)
    return torch.cat([image, corner, corner + side], dim=1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("pool", "stride"), [(7, 16), (5, 4), (1, 8)])
def test_same_features_and_gradients_as_torchvision(channels_last: bool, pool: int, stride: int) -> None:
    generator = torch.Generator().manual_seed(1)
    level = torch.randn(2, 6, 192 // stride, 224 // stride, generator=generator)
    if channels_last:
        level = level.contiguous(memory_format=torch.channels_last)
    boxes = regions(40, seed=stride)
    boxes[0, 1:] = torch.tensor([0.0, 0, 224, 192])
    boxes[1, 1:] = torch.tensor([50.0, 50, 50, 50])  # narrower than a cell
    upstream = torch.randn(40, 6, pool, pool, generator=generator)
    results = []
    for pooled in (
        lambda x: align_regions(x, boxes, pool, stride),
        lambda x: roi_align(x, boxes, pool, 1 / stride, 2),
    ):
        x = level.clone().requires_grad_()
        out = pooled(x)
        out.backward(upstream)
        results.append((out, x.grad))
    (ours, our_grad), (theirs, their_grad) = results
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_grad, their_grad, atol=1e-5, rtol=1e-5)


def test_no_regions() -> None:
    assert align_regions(torch.zeros(1, 4, 8, 8), torch.zeros(0, 5), 7, 16).shape == (0, 4, 7, 7)

"""Our RoIAlign on the CPU against torchvision's kernel, and which level a box is pooled from."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import roi_align

from boxwright.models.detectors.pooling import MOST_POINTS, align_regions, pool_regions


def regions(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 260 - 40  # some begin outside of the map
    side = torch.rand(count, 2, generator=generator) * 150
    image = torch.randint(0, 2, (count, 1), generator=generator)
    return torch.cat([image, corner, corner + side], dim=1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("points", [2, 1, 0])
@pytest.mark.parametrize(("pool", "stride"), [(7, 16), (5, 4), (1, 32)])
def test_same_features_and_gradients_as_torchvision(
    channels_last: bool, aligned: bool, points: int, pool: int, stride: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    level = torch.randn(2, 6, 192 // stride, 224 // stride, generator=generator)
    if channels_last:
        level = level.contiguous(memory_format=torch.channels_last)
    boxes = regions(40, seed=stride)
    boxes[0, 1:] = torch.tensor([0.0, 0, 224, 192])
    boxes[1, 1:] = torch.tensor([50.0, 50, 50.25, 50.5])  # narrower than a cell
    upstream = torch.randn(40, 6, pool, pool, generator=generator)
    results = []
    for pooled in (
        lambda x: align_regions(x, boxes, pool, stride, points=points, aligned=aligned),
        lambda x: roi_align(x, boxes, pool, 1 / stride, points, aligned),
    ):
        x = level.clone().requires_grad_()
        out = pooled(x)
        out.backward(upstream)
        results.append((out, x.grad))
    (ours, our_grad), (theirs, their_grad) = results
    torch.testing.assert_close(ours, theirs, atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(our_grad, their_grad, atol=3e-5, rtol=1e-5)


def test_a_bin_over_many_cells_has_a_point_for_each() -> None:
    """Also where there are more than our own gather takes."""
    side = 3 * MOST_POINTS
    level = torch.arange(float(side * side)).reshape(1, 1, side, side)
    everything = torch.tensor([[0.0, 0, 0, side, side]])
    for pool in (1, 3):
        mean = level.reshape(pool, side // pool, pool, side // pool).mean(dim=(1, 3))
        torch.testing.assert_close(align_regions(level, everything, pool, 1, points=0, aligned=True)[0, 0], mean)


def test_no_regions() -> None:
    for points in (2, 0):
        assert align_regions(torch.zeros(1, 4, 8, 8), torch.zeros(0, 5), 7, 16, points=points).shape == (0, 4, 7, 7)


def square(side: float) -> list[float]:
    return [10.0, 10.0, 10 + side, 10 + side]


@pytest.mark.parametrize(
    ("strides", "levels"),
    [
        ((4, 8, 16, 32), [4, 4, 8, 16, 16, 32, 32]),
        ((8, 16), [8, 8, 8, 16, 16, 16, 16]),
        ((4, 32), [4, 4, 4, 4, 4, 32, 32]),
    ],
)
def test_a_box_comes_from_the_level_of_its_size(strides: tuple[int, ...], levels: list[int]) -> None:
    """224 px from stride 16 and half of it from stride 8; from the next finer level where there is none."""
    maps = {stride: torch.full((2, 1, 512 // stride, 512 // stride), float(stride)) for stride in strides}
    boxes = torch.tensor([square(side) for side in (0, 60, 112, 224, 440, 448, 480)])
    pooled = pool_regions(maps, [boxes[:3], boxes[3:]], strides, 2)
    assert pooled[:, 0, 0, 0].tolist() == levels
    assert pooled.shape == (7, 1, 2, 2)


def test_pictures_keep_their_features() -> None:
    maps = {8: torch.stack([torch.full((3, 16, 16), float(i)) for i in range(3)])}
    boxes = [torch.tensor([square(30), square(50)]), torch.zeros(0, 4), torch.tensor([square(20)])]
    assert pool_regions(maps, boxes, (8,), 2).mean(dim=(1, 2, 3)).tolist() == [0, 0, 2]

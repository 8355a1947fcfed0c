"""Winograd's convolution against the direct one, and when it is taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from boxwright.models import winograd as module
from boxwright.models.winograd import FEWEST_CHANNELS, Conv, convolve, kernel_matrices


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(1, 5),
    C=st.integers(1, 5),
    K=st.integers(1, 5),
    H=st.integers(1, 18),
    W=st.integers(1, 18),
    tiles=st.sampled_from([1, 3, 7, 160]),
    bias=st.booleans(),
    channels_last=st.booleans(),
)
def test_same_as_the_direct_convolution(
    B: int, C: int, K: int, H: int, W: int, tiles: int, bias: bool, channels_last: bool
) -> None:
    x, weight, shift = torch.randn(B, C, H, W), torch.randn(K, C, 3, 3), torch.randn(K) if bias else None
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x.double(), weight.double(), None if shift is None else shift.double(), padding=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILES", tiles)
        found = convolve(x, kernel_matrices(weight), shift)
    assert found.shape == expected.shape
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - expected).abs().max() <= 3e-5 * expected.abs().max().clamp(min=1)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The inputs of every convolution by Winograd's form from now on."""
    calls: list[torch.Size] = []

    def spied(x: Tensor, kernels: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(x.shape)
        return convolve(x, kernels, bias)

    monkeypatch.setattr(module, "convolve", spied)
    return calls


def large(**options: bool) -> tuple[Conv, Tensor]:
    torch.manual_seed(0)
    return Conv(FEWEST_CHANNELS, FEWEST_CHANNELS, 3, **options), torch.randn(2, FEWEST_CHANNELS, 20, 24)


def direct(net: Conv, x: Tensor) -> Tensor:
    return F.conv2d(x, net.weight, net.bias, padding=1)


@pytest.mark.parametrize("bias", [True, False])
def test_taken_in_prediction_only(bias: bool, taken: list[torch.Size]) -> None:
    net, x = large(bias=bias)
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in nn.Conv2d(FEWEST_CHANNELS, FEWEST_CHANNELS, 3, padding=1, bias=bias).state_dict().items()
    }
    net(x).sum().backward()
    net.eval()(x)
    with torch.no_grad():
        net.train()(x)
        net.eval()(x[..., :4])
        with torch.autocast("cpu", torch.bfloat16):
            net(x)
        net.double()(x.double())
        assert not taken
        torch.testing.assert_close(net.float()(x), direct(net, x), atol=1e-4, rtol=1e-4)
    assert taken == [x.shape]


def test_small_convolutions_stay_direct(taken: list[torch.Size]) -> None:
    with torch.no_grad():
        Conv(16, FEWEST_CHANNELS, 3).eval()(torch.randn(1, 16, 40, 40))
        Conv(FEWEST_CHANNELS, 16, 3).eval()(torch.randn(1, FEWEST_CHANNELS, 40, 40))
    assert not taken


def test_kernels_follow_the_weight() -> None:
    net, x = large()
    net.eval()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    with torch.no_grad():
        before = net(x)
    net(x).square().mean().backward()
    with torch.no_grad():
        net(x)
        optimizer.step()
        torch.testing.assert_close(net(x), direct(net, x), atol=1e-4, rtol=1e-4)
        assert (net(x) - before).abs().max() > 1e-3
        optimizer.zero_grad()
        net.load_state_dict(large()[0].state_dict())
        torch.testing.assert_close(net(x), before)

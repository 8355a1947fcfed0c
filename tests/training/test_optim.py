"""Every parameter learns exactly once, decays only where it should, and in numbers that the device has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from boxwright import registry
from boxwright.config import Run, make_run
from boxwright.training.optim import autocast_type, make_optimizer, parameter_groups
from boxwright.types import UserError


@pytest.fixture(scope="module", params=["fasterrcnn_vitdet_nano", "fasterrcnn_squeezenet1_1"])
def detector(request: pytest.FixtureRequest) -> nn.Module:
    return registry.build(request.param, num_classes=2)


def run_of(**options: Any) -> Run:
    return make_run(data="anything", **options)


def test_every_parameter_is_in_one_group(detector: nn.Module) -> None:
    grouped = [p for group in parameter_groups(detector, 0.1) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in detector.parameters()}


def test_norms_biases_and_positions_do_not_decay(detector: nn.Module) -> None:
    decay = {id(p): group["weight_decay"] for group in parameter_groups(detector, 0.1) for p in group["params"]}
    kinds_of_norm = (nn.LayerNorm, nn.BatchNorm2d, nn.GroupNorm)
    norms = {id(p) for m in detector.modules() if isinstance(m, kinds_of_norm) for p in m.parameters()}
    kinds = {"norm": 0, "bias": 0, "position": 0, "weight": 0}
    for name, parameter in detector.named_parameters():
        kind = "norm" if id(parameter) in norms else "bias" if name.endswith("bias") else "weight"
        kind = "position" if "pos" in name.rpartition(".")[2] else kind
        kinds[kind] += 1
        assert decay[id(parameter)] == (0.1 if kind == "weight" else 0.0), name
    assert kinds["weight"]
    assert kinds["bias"]
    if hasattr(detector.get_submodule("backbone.body"), "pos_embed"):
        assert kinds["norm"]
        assert kinds["position"] > 1  # the embedding and the tables of each block


def test_what_is_frozen_is_left_out() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(requires_grad=True)
    layers[0].requires_grad_(requires_grad=False)
    assert {id(p) for group in parameter_groups(layers, 0) for p in group["params"]} == {
        id(p) for p in layers[1].parameters()
    }


def test_sgd_is_the_articles(detector: nn.Module) -> None:
    optimizer = make_optimizer(detector, run_of(lr=0.005))
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (
        0.005,
        0.9,
        True,
    )
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_step_of_either_changes_what_has_a_gradient(name: str) -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(layer, run_of(optimizer=name))
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert (layer.weight != before).all()


CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "chosen"),
    [
        ("auto", CPU, False, None),
        ("auto", MPS, False, None),
        ("auto", CUDA, True, torch.bfloat16),
        ("auto", CUDA, False, torch.float16),
        ("fp32", CUDA, True, None),
        ("bf16", CPU, False, torch.bfloat16),
        ("bf16", CUDA, True, torch.bfloat16),
        ("fp16", CUDA, True, torch.float16),
    ],
)
def test_the_type_of_products(
    precision: Any, device: torch.device, has_bf16: bool, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert autocast_type(precision, device) is chosen


@pytest.mark.parametrize(("precision", "device"), [("fp16", CPU), ("fp16", MPS), ("bf16", CUDA)])
def test_what_the_device_lacks_is_refused(precision: Any, device: torch.device, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="--precision"):
        autocast_type(precision, device)

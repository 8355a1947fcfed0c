"""torchvision's classifiers as backbones: its numbers, its keys, maps where their strides say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from boxwright.models.backbones import from_torchvision
from boxwright.models.backbones.from_torchvision import Staged, build
from boxwright.models.start import load_into
from boxwright.models.tensors import Tensors
from boxwright.testing import assert_is_backbone
from boxwright.types import UserError

ALL = torchvision.models.list_models(module=torchvision.models)
REFUSED = ["maxvit_t", "vit_h_14"]
TOO_LARGE = ["regnet_y_128gf"]  # 2.6 GB of what regnet_y_32gf is
VITS = ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32"]
ONE_OF_EACH_KIND = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5",
    "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_0", "swin_t", "vgg11",
]  # fmt: skip


def options_of(name: str) -> dict[str, bool]:
    return {"aux_logits": False, "init_weights": True} if name in ("googlenet", "inception_v3") else {}


def torchvision_s(name: str) -> Any:
    """The classifier with statistics as after training, without its heads that only help to train it."""
    net = torchvision.models.get_model(name, weights=None, **options_of(name)).eval()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 1.5)
            norm.running_mean.normal_(std=0.1)
    return net


@contextmanager
def heard(net: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What those of its layers put out, at the moment when they do."""
    outputs: dict[str, Tensor] = {}
    handles = [
        net.get_submodule(name).register_forward_hook(lambda *call, name=name: outputs.update({name: call[2].clone()}))
        for name in names
    ]
    yield outputs
    for handle in handles:
        handle.remove()


def without_mending(body: Staged, net: nn.Module) -> None:
    """The padding that the layers were published with."""
    body.padding = {}
    theirs = {name.removeprefix("features."): layer for name, layer in net.named_modules()}
    for name, layer in body.named_modules():
        if isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            layer.ceil_mode = theirs[name].ceil_mode


@pytest.fixture(scope="module", params=ONE_OF_EACH_KIND)
def one(request: pytest.FixtureRequest) -> tuple[str, Staged]:
    return request.param, cast(Staged, build(request.param))


def test_maps_are_of_whole_strides_at_any_size(one: tuple[str, Staged]) -> None:
    _, body = one
    assert_is_backbone(body)
    assert list(body.channels) == [stride for stride in (4, 8, 16, 32) if stride in body.channels]
    assert len(body.channels) >= 3


@torch.no_grad()
def test_maps_are_what_torchvision_s_layers_give(one: tuple[str, Staged]) -> None:
    """Its state dict by key, and each map what that layer gives in torchvision's own forward."""
    torch.manual_seed(0)
    name, body = one
    net = torchvision_s(name)
    body = copy.deepcopy(body).eval()
    state = {key.removeprefix("features."): value for key, value in net.state_dict().items()}
    body.load_state_dict({key: value for key, value in state.items() if key in body.state_dict()})
    without_mending(body, net)
    prefix = "features." if hasattr(net, "features") else ""
    places = {tap: prefix + tap if tap != "permute" else tap for tap in body.taps}
    images = torch.randn(1, 3, 128, 192)
    with heard(net, list(places.values())) as outputs:
        net(images)
    maps = body(images)
    assert {stride: level.shape[1] for stride, level in maps.items()} == body.channels
    for tap, place in places.items():
        wanted = outputs[place].permute(0, 3, 1, 2) if tap in body.channels_last else outputs[place]
        torch.testing.assert_close(maps[body.taps[tap][0]], wanted, msg=tap)


@pytest.mark.parametrize("name", [name for name in ALL if name not in (*REFUSED, *TOO_LARGE)])
@pytest.mark.slow
def test_every_classifier(name: str) -> None:
    body = build(name)
    assert set(body.channels) <= {4, 8, 16, 32}
    assert list(body.channels) == [body.patch] if name in VITS else len(body.channels) >= 3
    maps = body.to("meta")(torch.empty(2, 3, 64, 96, device="meta"))
    for stride, level in maps.items():
        assert level.shape == (2, body.channels[stride], 64 // stride, 96 // stride)


# ------ Padding


@pytest.mark.parametrize(
    "name", ["alexnet", "googlenet", "inception_v3", "mobilenet_v2", "resnet50", "squeezenet1_0", "squeezenet1_1"]
)
@torch.no_grad()
def test_cells_lie_on_their_strides(name: str) -> None:
    """What a pixel at 640 reaches lies evenly about cell 640 / stride: there the anchors stand and regions are read."""
    net = build(name, norm="frozen").eval()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 0.1 if parameter.ndim > 1 else 0)
    image = torch.zeros(1, 3, 32, 1280)
    image[:, :, 16, 640] = 1
    for stride, level in net(image).items():
        if stride == 32 and name in ("googlenet", "inception_v3"):
            continue  # the one pools 2 x 2 before it, the other's cells see all of the image
        reached = level.amax(dim=(0, 1, 2)).nonzero()  # columns
        assert (reached.min() + reached.max()).item() == 2 * 640 // stride, stride
        assert len(reached) < level.shape[3] * 0.75


# ------ Vision Transformers


@torch.no_grad()
def test_a_vit_is_torchvision_s_at_the_size_that_it_was_trained_at() -> None:
    torch.manual_seed(0)
    net, body = torchvision_s("vit_b_32"), build("vit_b_32").eval()
    state = {key: value for key, value in net.state_dict().items() if not key.startswith("heads.")}
    body.load_state_dict(state)
    images = torch.randn(2, 3, 224, 224)
    with heard(net, ["encoder"]) as outputs:
        net(images)
    tokens = outputs["encoder"][:, 1:]
    torch.testing.assert_close(body(images)[32], tokens.transpose(1, 2).reshape(2, 768, 7, 7))


def test_a_vit_at_other_sizes() -> None:
    assert_is_backbone(build("vit_b_32"))


# ------ Weights


@pytest.mark.parametrize("name", ["regnet_y_400mf", "efficientnet_b0", "swin_t", "vit_b_32", "mnasnet0_5"])
def test_a_published_classifier_loads_into_a_detector(name: str) -> None:
    """All of the backbone's tensors are taken from a file of torchvision's; what is left over is its head."""
    theirs = torchvision.models.get_model(name, weights=None)
    detector = nn.Module()
    detector.backbone = nn.Module()
    detector.backbone.body = build(name)
    account = load_into(detector, Tensors(theirs.state_dict()), name)
    assert not account.missing
    assert {key.split(".")[0] for key in account.unexpected} <= {"fc", "classifier", "head", "heads"}
    assert account.used == len(detector.state_dict())


def test_the_pixels_that_published_weights_expect() -> None:
    assert build("resnet18").mean == (0.485, 0.456, 0.406)
    assert build("resnet18").std == (0.229, 0.224, 0.225)
    assert torchvision.models.EfficientNet_V2_L_Weights.DEFAULT.transforms().mean == [0.5, 0.5, 0.5]
    net = torchvision.models.googlenet(weights=None, transform_input=True, aux_logits=False, init_weights=False)
    body = build("googlenet")
    pixels = torch.rand(1, 3, 8, 8)
    imagenet, own = (
        (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        for mean, std in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), (body.mean, body.std))
    )
    torch.testing.assert_close(net._transform_input(imagenet), own)


def test_the_name_of_the_published_weights() -> None:
    assert build("resnet18").weights_name == from_torchvision.resnet(18).weights_name == "torchvision:resnet18"


# ------ Frozen norms


@pytest.mark.parametrize(("name", "eps"), [("mobilenet_v3_small", 1e-3), ("resnet18", 1e-5), ("regnet_y_400mf", 1e-5)])
@torch.no_grad()
def test_frozen_norms_are_the_norms_as_trained(name: str, eps: float) -> None:
    net, body = torchvision_s(name), build(name, norm="frozen")
    learning = build(name).eval()
    state = {key.removeprefix("features."): value for key, value in net.state_dict().items()}
    for each in (body, learning):
        each.load_state_dict({key: value for key, value in state.items() if key in learning.state_dict()})
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    assert {module.eps for module in body.modules() if isinstance(module, FrozenBatchNorm2d)} == {eps}
    before = {key: value.clone() for key, value in body.state_dict().items()}
    images = torch.randn(2, 3, 64, 96)
    for stride, level in body.train()(images).items():
        torch.testing.assert_close(level, learning(images)[stride])
    assert all(torch.equal(value, before[key]) for key, value in body.state_dict().items())


# ------ Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build("maxvit_t"), "torchvision's maxvit_t is no backbone: it takes pictures of one size only"),
        pytest.param(
            lambda: build("vit_h_14"),
            "torchvision's vit_h_14 is no backbone: no pyramid stands on its stride of 14",
            marks=pytest.mark.slow,  # as big as it is
        ),
        (lambda: build("resnet5"), r"torchvision has no classifier 'resnet5'\. Did you mean 'resnet50'\?"),
        (lambda: build("fasterrcnn_resnet50_fpn"), "torchvision has no classifier"),
        (lambda: build("resnet18", norm="froze"), "unknown norm 'froze' of torchvision:resnet18: wanted is train or"),
    ],
)
def test_what_cannot_be_a_backbone(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


# ------ Shapes without values


@pytest.mark.parametrize("name", ["resnet18", "regnet_y_400mf", "vit_b_32", "swin_t"])
def test_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        body = build(name, norm="frozen")
    assert {value.device.type for value in body.state_dict().values()} == {"meta"}
    assert body.channels == build(name).channels


# ------ Staged


def test_layers_behind_the_last_tap_are_left_out() -> None:
    layers = {"a": nn.Conv2d(3, 4, 2, stride=2), "b": nn.Conv2d(4, 5, 2, stride=2), "c": nn.Conv2d(5, 6, 2, stride=2)}
    body = Staged(layers, {"b": (4, 5), "a": (2, 4)})
    assert list(body.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    assert {s: tuple(m.shape) for s, m in body(torch.zeros(1, 3, 8, 8)).items()} == {2: (1, 4, 4, 4), 4: (1, 5, 2, 2)}


@torch.no_grad()
def test_layers_with_dots_in_their_names_and_padding() -> None:
    layers = {"stem": nn.Conv2d(3, 4, 2, stride=2), "trunk.one": nn.Conv2d(4, 5, 3), "trunk.two.a": nn.Conv2d(5, 6, 1)}
    body = Staged(layers, {"trunk.one": (2, 5), "trunk.two.a": (4, 6)}, padding={"trunk.one": 1})
    assert list(body.state_dict())[2:] == [
        "trunk.one.weight",
        "trunk.one.bias",
        "trunk.two.a.weight",
        "trunk.two.a.bias",
    ]
    images = torch.randn(1, 3, 8, 8)
    padded = nn.functional.conv2d(
        layers["stem"](images), layers["trunk.one"].weight, layers["trunk.one"].bias, padding=1
    )
    torch.testing.assert_close(body(images)[2], padded)


@torch.no_grad()
def test_taps_with_their_channels_last_come_out_with_channels_first() -> None:
    layers = {"a": nn.Conv2d(3, 4, 2, stride=2), "b": torchvision.ops.Permute([0, 2, 3, 1]), "c": nn.LayerNorm(4)}
    body = Staged(layers, {"c": (2, 4)}, channels_last=["b", "c"])
    images = torch.randn(1, 3, 8, 12)
    wanted = layers["c"](layers["a"](images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(body(images)[2], wanted)

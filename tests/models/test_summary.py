"""What `boxwright models` and the reference page say of a model is what the model is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from boxwright import registry
from boxwright.__main__ import main
from boxwright.models.summary import summarise
from boxwright.verbs import describe

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> dict[str, str]:
    lines = (DOCS / "reference/models.md").read_text("utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def test_the_page_has_every_model() -> None:
    assert set(rows()) == set(registry.entries()), "run `make reference`"


SMALL = (
    "fasterrcnn_squeezenet1_1",
    "fasterrcnn_vitdet",
    "fasterrcnn_nano",
    "retinanet_resnet50_fpn",
    "cascade_vitdet_b",
)


@pytest.mark.parametrize("name", SMALL)
def test_a_row_of_the_page_is_current(name: str, reference: ModuleType) -> None:
    assert reference.row(name) == rows()[name], "run `make reference`"


@pytest.mark.slow
def test_every_row_of_the_page_is_current(reference: ModuleType) -> None:
    assert {name: reference.row(name) for name in registry.entries()} == rows()


def test_counting_needs_no_values() -> None:
    counted = summarise("fasterrcnn_squeezenet1_1", num_classes=3)
    real = registry.build("fasterrcnn_squeezenet1_1", num_classes=3)
    assert counted.parameters == sum(p.numel() for p in real.parameters())
    assert counted.levels == real.backbone.channels


def test_flops_of_a_vitdet_are_those_worked_out_by_hand() -> None:
    # ViT-B at 640: 1,600 tokens through 12 blocks of 12 D^2 weights, attention over 1,600 or 196 of them.
    tokens, width, window = 40 * 40, 768, 14
    linear = 12 * 2 * tokens * 12 * width**2
    padded = 42 * 42  # places in windows
    attention = 4 * 2 * 2 * tokens * tokens * width + 8 * 2 * 2 * padded * window**2 * width
    patches = 2 * tokens * 3 * 16 * 16 * width
    pyramid = summarise("fasterrcnn_vitdet").backbone_gflops - (linear + attention + patches) / 1e9
    assert 50 < pyramid < 62  # the design's count of pyramid is 56; relative positions are in it here


def test_options_change_the_figures() -> None:
    one = summarise("fasterrcnn", backbone="torchvision:resnet18")
    two = summarise("fasterrcnn", backbone="torchvision:resnet18", width=128)
    assert two.parameters < one.parameters
    assert two.gflops < one.gflops


def test_describing_a_model() -> None:
    told = describe("fasterrcnn_vitdet")
    assert told["parameters"] == "106,046,264"
    assert "mae_vit_base (CC-BY-NC-4.0)" in told["weights"]
    assert told["options"] == "num_classes, drop_path, checkpoint_blocks"
    assert told["builder"].startswith("boxwright/models/zoo/vitdet.py:")


def test_models_on_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "fasterrcnn_squeezenet1_1", "--json"]) == 0
    out, error = capfd.readouterr()
    assert json.loads(out)["name"] == "fasterrcnn_squeezenet1_1"
    assert "GFLOPs" in error
    assert main(["models", "fasterrcnn_squeezenet1_2"]) == 2
    assert "Did you mean 'fasterrcnn_squeezenet1_1'" in capfd.readouterr().err
    assert main(["models", "timm:vit_small*dinov3*", "--json"]) == 0
    names = json.loads(capfd.readouterr().out)
    assert "dinov3" in names["vit_small_patch16_dinov3.lvd1689m"]
    assert main(["models", "timm:no_such_net*"]) == 2
    assert "no model of timm matches" in capfd.readouterr().err
    for heading in ("backbones", "pyramids", "weights"):
        assert main(["models"]) == 0
        out, error = capfd.readouterr()
        assert heading in out
        assert not error
    assert torch.get_default_device().type == "cpu"

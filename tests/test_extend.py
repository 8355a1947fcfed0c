"""Parts of a user's own: the examples of docs/extend work outside the package, and what is wrong with one is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import boxwright
from boxwright import registry, testing
from boxwright.__main__ import main
from boxwright.models.join import build_backbone, join
from boxwright.types import UserError

EXTEND = Path(__file__).parents[1] / "docs" / "extend"
EXAMPLES = sorted(EXTEND.glob("my_*.py"))


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    registry._plugged.clear()


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_keeps_its_contract(path: Path) -> None:
    (entry,) = registry.use_plugin(path)
    assert (entry.name, entry.path) == (path.stem, path)
    if entry.kind == "backbone":
        testing.assert_is_backbone(registry.build(entry.name, kind="backbone"))
    elif entry.kind == "pyramid":
        channels = {4: 8, 8: 16, 16: 24}
        pyramid = registry.build(entry.name, kind="pyramid", channels=channels, width=12, levels=(4, 8, 16), extra=None)
        testing.assert_is_pyramid(pyramid, channels)
    else:
        testing.assert_is_detector(boxwright.build_detector(entry.name, num_classes=3))


def test_there_is_an_example_of_each_kind() -> None:
    kinds = {registry.use_plugin(path)[0].kind for path in EXAMPLES}
    assert kinds == set(registry.WORDS)


LINES = {
    "my_backbone": "--backbone my_backbone",
    "my_pyramid": "--model fasterrcnn --backbone torchvision:resnet18 --pyramid my_pyramid",
    "my_detector": "--model my_detector --backbone torchvision:resnet18",
}


@pytest.mark.parametrize("name", LINES)
def test_the_lines_of_the_page_train_and_predict(
    name: str, drawn: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert f"--plugin docs/extend/{name}.py {LINES[name]} " in (EXTEND / "index.md").read_text("utf-8")
    plugin = ["--plugin", str(EXTEND / f"{name}.py")]
    words = f"--imgsz 64 --max-steps 2 --batch 2 --device cpu --name it {LINES[name]}".split()
    assert main(["train", *plugin, "--data", str(drawn), "--project-dir", str(tmp_path), *words]) == 0, (
        capfd.readouterr()
    )
    weights = tmp_path / "it" / "best_model.safetensors"
    picture = next((drawn.parent / "valid/images").iterdir())
    predict = ["predict", "--weights", str(weights), "--input", str(picture), "--output", str(tmp_path / "out")]
    registry._plugged.clear()
    assert main(predict) == 2  # a checkpoint runs no code by itself
    assert f"It was trained with --plugin '{plugin[1]}': name it again" in capfd.readouterr().err
    assert main([*predict, *plugin]) == 0


def test_what_is_wrong_with_a_plugin_is_told(tmp_path: Path) -> None:
    def plugin(text: str) -> Path:
        path = tmp_path / "part.py"
        path.write_text(text, "utf-8")
        return path

    line = '@register("{}", kind="backbone")\ndef part():\n    """A part."""\n    {}\n'
    assert refusal(lambda: registry.use_plugin(tmp_path / "none.py")) == f"no plug-in at {tmp_path / 'none.py'}"
    assert "no Python that can be read" in refusal(lambda: registry.use_plugin(plugin("def (")))
    assert "registers nothing" in refusal(lambda: registry.use_plugin(plugin("x = 1\n")))
    taken = next(iter(registry.entries("backbone")))
    assert f"registers {taken!r}, which" in refusal(lambda: registry.use_plugin(plugin(line.format(taken, "..."))))
    registry.use_plugin(plugin("from nowhere import nothing\n" + line.format("part", "return 1")))
    assert "does not run: ModuleNotFoundError: No module named 'nowhere'" in refusal(lambda: build_backbone("part"))
    registry.use_plugin(plugin("from boxwright import register\n" + line.format("part", "return 1")))
    os.utime(tmp_path / "part.py")
    assert "part built a int, no nn.Module" in refusal(lambda: build_backbone("part"))


def test_a_module_from_python_needs_no_name() -> None:
    registry.use_plugin(EXTEND / "my_backbone.py")
    body = registry.build("my_backbone", kind="backbone", width=8)
    detector = boxwright.build_detector("fasterrcnn", num_classes=2, backbone=body)
    assert detector.backbone.body is body


BROKEN = {
    "another stride": ("return {4: x, 8: x}", "gives maps {4: (1, 3, 4, 6), 8: (1, 3, 4, 6)} of a picture of 16 x 24"),
    "no maps": ("return x", "does not run on a picture of 16 x 24"),
    "raises": ("raise KeyError('x')", "does not run on a picture of 16 x 24: 'x'"),
    "detached": ("return {4: x.detach(), 8: F.avg_pool2d(x, 2).detach()}", "would never learn"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_backbone_that_breaks_its_contract_is_refused_before_training(case: str, drawn: Path, tmp_path: Path) -> None:
    body, told = BROKEN[case]
    (tmp_path / "part.py").write_text(
        "import torch.nn.functional as F\nfrom torch import nn\nfrom boxwright import register\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.channels = {4: 3, 8: 3}\n"
        "        self.layer = nn.Conv2d(3, 3, 4, stride=4)\n\n"
        f"    def forward(self, images):\n        x = self.layer(images)\n        {body}\n\n"
        '@register("part", kind="backbone")\ndef part():\n    return Net()\n',
        "utf-8",
    )
    options = {"plugin": (tmp_path / "part.py",), "backbone": "part", "data": str(drawn), "imgsz": 64, "device": "cpu"}
    message = refusal(lambda: boxwright.train(**options, project_dir=tmp_path / "runs", quiet=True))
    assert told in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "text",
    [
        "@register()\ndef part(): ...",
        "@register(5)\ndef part(): ...",
        '@register("part", kind="banana")\ndef part(): ...',
        '@register("part", kind=["backbone"])\ndef part(): ...',
        "@register(str(5))\ndef part(): ...",
        '@register("a b")\ndef part(): ...',
        '@register("part")\ndef one(): ...\n@register("part")\ndef two(): ...',
        "\0",
        "x = " + "-" * 100_000 + "1",
    ],
)
def test_a_registration_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "part.py").write_text(text, "utf-8")
    assert refusal(lambda: registry.use_plugin(tmp_path / "part.py"))


@pytest.mark.parametrize("line", ["import sys; sys.exit(0)", "1 / 0", "raise MemoryError", "del part"])
def test_a_plugin_that_ends_badly_ends_in_one_line(line: str, tmp_path: Path) -> None:
    text = 'from boxwright import register\n@register("part", kind="backbone")\ndef part():\n    return 1\n'
    (tmp_path / f"part{len(line)}.py").write_text(text + line + "\n", "utf-8")
    registry.use_plugin(tmp_path / f"part{len(line)}.py")
    assert refusal(lambda: build_backbone("part"))


# What does not fit together is refused with the reason


class Odd(nn.Module):
    def __init__(self, channels: object) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        assert isinstance(self.channels, dict)
        return {s: F.avg_pool2d(images[:, :1], s).expand(-1, c, -1, -1) for s, c in self.channels.items()}


@pytest.mark.parametrize("channels", [None, {}, [4, 8]])
def test_a_backbone_without_channels(channels: object) -> None:
    assert "it needs `channels`" in refusal(lambda: join(Odd(channels)))


def test_strides_that_no_pyramid_stands_on() -> None:
    assert "strides [14]" in refusal(lambda: join(Odd({14: 8})))


def test_pyramids_and_backbones_that_do_not_agree() -> None:
    many, one = Odd({8: 4, 16: 8}), Odd({16: 8})
    assert refusal(lambda: join(many, "simple"))
    assert refusal(lambda: join(one, "fpn"))
    assert "Did you mean 'fpn'" in refusal(lambda: join(many, "fpm"))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("resnet18", "unknown backbone 'resnet18'"),
        ("tim:resnet18", "wanted is timm:NAME, torchvision:NAME or a registered name"),
        ("timm:resnet81", "resnet"),
        ("torchvision:resnet81", "Did you mean 'resnet"),
    ],
)
def test_unknown_backbones(name: str, told: str) -> None:
    assert told in refusal(lambda: build_backbone(name))


def test_a_model_with_a_backbone_of_its_own_takes_no_other(drawn: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "fasterrcnn_vitdet", "--backbone", "timm:resnet18", "--data", str(drawn)]
    assert main(["train", *words]) == 2
    error = capfd.readouterr().err
    assert "fasterrcnn_vitdet has a backbone of its own; --backbone goes with " in error
    assert "fasterrcnn, " in error


# The checks themselves can fail


class Wrong(nn.Module):
    """A backbone with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault
        self.channels = {4: 8}
        self.layer = nn.Conv2d(3, 8, 4, stride=4)
        self.spare = nn.Linear(2, 2) if fault == "a parameter without use" else nn.Identity()

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        level = self.layer(images)
        if self.fault == "a map too small":
            level = level[..., 1:]
        if self.fault == "not finite":
            level = level / 0
        return {8 if self.fault == "another stride" else 4: level}


@pytest.mark.parametrize("fault", ["a map too small", "another stride", "a parameter without use", "not finite"])
def test_a_wrong_backbone_is_caught(fault: str) -> None:
    torch.manual_seed(0)
    testing.assert_is_backbone(Wrong(""))
    with pytest.raises(AssertionError):
        testing.assert_is_backbone(Wrong(fault))

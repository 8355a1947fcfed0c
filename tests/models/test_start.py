"""Training starts from what `--weights` names, says what became of every tensor, and refuses the rest in one line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

from boxwright import registry
from boxwright.models import checkpoint
from boxwright.models.checkpoint import Header
from boxwright.models.start import load_into, start_from
from boxwright.models.weights import PUBLISHED, Tensors, Weights
from boxwright.types import UserError


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def built(name: str, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return registry.build(name, **{"num_classes": 3} | options)


def changed(before: dict[str, Tensor], after: nn.Module) -> set[str]:
    return {name for name, value in after.state_dict().items() if not torch.equal(value, before[name])}


# ------ From classifiers

CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {
    "fasterrcnn_squeezenet1_1": lambda: torchvision.models.squeezenet1_1(weights=None),
    "fasterrcnn_mobilenet_v2": lambda: torchvision.models.mobilenet_v2(weights=None),
    "fasterrcnn_resnet50_fpn_v2": lambda: torchvision.models.resnet50(weights=None),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_of_torchvision_gives_its_layers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier = CLASSIFIERS[name]()
    torch.save(classifier.state_dict(), tmp_path / "c.pth")
    detector = built(name)
    before = state(detector)
    origin = start_from(detector, str(tmp_path / "c.pth"))
    body = detector.get_submodule("backbone.body").state_dict()
    theirs = {key.removeprefix("features."): value for key, value in classifier.state_dict().items()}
    assert all(torch.equal(value, theirs[key]) for key, value in body.items())
    assert all(key.startswith("backbone.body.") for key in changed(before, detector))
    assert origin.sources == [str(tmp_path / "c.pth")]
    assert f"{tmp_path / 'c.pth'}: {len(body)} of {len(body)} tensors loaded" in origin.text
    assert "not used from the file" in origin.text


def test_a_classifier_of_another_kind_changes_nothing(tmp_path: Path) -> None:
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "c.pth")
    detector = built("fasterrcnn_mobilenet_v2")
    before = state(detector)
    assert "these weights are for another architecture" in refusal(
        lambda: start_from(detector, str(tmp_path / "c.pth"))
    )
    assert not changed(before, detector)


@pytest.mark.real_data
def test_published_classifiers_start_a_detector(real_data: Path) -> None:
    for name, file, count in (
        ("squeezenet1_1", "squeezenet1_1_imagenet_features_torchvision.pth", 50),
        ("mobilenet_v2", "mobilenet_v2_imagenet_from_int8_torchvision.pth", 260),
    ):
        origin = start_from(built(f"fasterrcnn_{name}"), str(real_data / "weights" / name / file))
        assert f"{count} of {count} tensors loaded" in origin.text


# ------ From a masked autoencoder


def mae_like(detector: nn.Module) -> dict[str, Tensor]:
    """What MAE publishes for a ViT of this size: its encoder, with a class token and a last norm."""
    vit = detector.get_submodule("backbone.body")
    encoder = {name: torch.randn_like(value) for name, value in vit.state_dict().items() if "rel_pos" not in name}
    width = vit.get_parameter("pos_embed").shape[2]
    ends = {"cls_token": torch.randn(1, 1, width), "norm.weight": torch.ones(width), "norm.bias": torch.ones(width)}
    return encoder | ends


@pytest.mark.parametrize("name", ["fasterrcnn_vitdet_tiny", "fasterrcnn_vitdet_nano"])
def test_a_masked_autoencoder_gives_its_encoder(name: str, tmp_path: Path) -> None:
    detector = built(name)
    tensors = mae_like(detector)
    torch.save({"model": tensors}, tmp_path / "mae.pth")
    before = state(detector)
    origin = start_from(detector, str(tmp_path / "mae.pth"))
    loaded = detector.get_submodule("backbone.body").state_dict()
    shared = {key for key in loaded if "rel_pos" not in key}
    assert all(torch.equal(loaded[key], tensors[key]) for key in shared)
    assert changed(before, detector) == {f"backbone.body.{key}" for key in shared}
    assert f"{len(shared)} of {len(loaded)} tensors loaded" in origin.text
    assert "not used from the file (3): cls_token, norm.bias, norm.weight" in origin.text


def test_an_encoder_of_another_width_changes_nothing() -> None:
    tensors, detector = mae_like(built("fasterrcnn_vitdet_tiny")), built("fasterrcnn_vitdet_nano")
    before = state(detector)
    assert "another" in refusal(lambda: load_into(detector, Tensors(tensors), "mae.pth"))
    assert not changed(before, detector)


# ------ From detectors


def test_a_detector_of_torchvision_gives_all_but_its_class_heads() -> None:
    """All 404 tensors where the classes are as many; COCO's 90 classes leave the heads as they were."""
    theirs = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).state_dict()
    detector = built("fasterrcnn_resnet50_fpn_v2")
    before = state(detector)
    text = str(load_into(detector, Tensors(theirs), "coco.pth"))
    heads = {name for name in before if name.startswith("roi_heads.box_predictor.")}
    kept = heads | {"pixel_mean", "pixel_std"}
    assert len(heads) == 4
    assert not changed(before, detector) & kept
    after = detector.state_dict()
    assert all(torch.equal(after[name], theirs[name]) for name in after.keys() - kept)
    assert "coco.pth: 400 of 406 tensors loaded" in text
    assert "of another shape, left as initialised (4): roi_heads.box_predictor." in text
    same = {**theirs, **{name: torch.randn_like(before[name]) for name in heads}}
    assert "404 of 406 tensors loaded" in str(load_into(detector, Tensors(same), "mine.pth"))
    assert all(torch.equal(detector.state_dict()[name], same[name]) for name in heads)


def save_nano(path: Path, classes: list[str]) -> nn.Module:
    source = built("fasterrcnn_vitdet_nano", seed=1, num_classes=len(classes))
    with torch.no_grad():
        source.get_parameter("backbone.body.blocks.1.attn.rel_pos_h").normal_()
    checkpoint.save(path, source, Header("fasterrcnn_vitdet_nano", {}, classes, {"imgsz": 64, "square": True}))
    return source


def test_our_own_checkpoint_gives_everything(tmp_path: Path) -> None:
    source = save_nano(tmp_path / "own.safetensors", ["a", "b", "c"])
    detector = built("fasterrcnn_vitdet_nano")
    count = len(state(detector))
    origin = start_from(detector, str(tmp_path / "own.safetensors"))
    assert not changed(state(source), detector)
    assert origin.text == f"from {tmp_path / 'own.safetensors'}: {count} of {count} tensors loaded"


def test_our_own_checkpoint_of_other_classes_leaves_the_heads_and_says_so(tmp_path: Path) -> None:
    source = save_nano(tmp_path / "own.safetensors", ["a", "b", "c", "d", "e"])
    detector = built("fasterrcnn_vitdet_nano")
    before = state(detector)
    origin = start_from(detector, str(tmp_path / "own.safetensors"))
    heads = {name for name in before if name.startswith("roi_heads.box_predictor.")}
    assert not changed(before, detector) & heads
    after, theirs = detector.state_dict(), source.state_dict()
    assert all(torch.equal(after[name], theirs[name]) for name in after.keys() - heads)
    assert "of another shape, left as initialised (4): roi_heads.box_predictor." in origin.text
    assert "(in the file (6, 256) float32, in the model (4, 256) float32)" in origin.text


def test_our_own_checkpoint_of_another_model_changes_nothing(tmp_path: Path) -> None:
    save_nano(tmp_path / "own.safetensors", ["a", "b", "c"])
    detector = built("fasterrcnn_squeezenet1_1")
    before = state(detector)
    message = refusal(lambda: start_from(detector, str(tmp_path / "own.safetensors")))
    assert message.startswith(f"{tmp_path / 'own.safetensors'}: ")
    assert not changed(before, detector)


# ------ By name


def test_nothing_named_is_random_numbers() -> None:
    detector = built("fasterrcnn_vitdet_nano")
    before = state(detector)
    origin = start_from(detector, None)
    assert (origin.text, origin.sources) == ("from random weights", [])
    assert not changed(before, detector)


@pytest.mark.parametrize(
    ("typed", "meant"), [("mae_vit_bas", "mae_vit_base"), ("squeezenet1_1", "squeezenet1_1_imagenet")]
)
def test_a_mistyped_name_gets_the_nearest(typed: str, meant: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(lambda: start_from(nn.Module(), typed))
    assert message == f"no weights at {typed} (looked in {tmp_path}). Did you mean {meant!r}?"


def test_a_name_near_nothing_gets_the_list() -> None:
    message = refusal(lambda: start_from(nn.Module(), "outputs/best.pth"))
    assert message.endswith(f"Published ones: {', '.join(PUBLISHED)}.")


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the file of a published entry `squeezenet_of_ours` in it; nothing may be downloaded."""
    torch.manual_seed(1)
    content = safetensors.torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict())
    file = tmp_path / "cache" / "squeezenet_of_ours.safetensors"
    file.parent.mkdir()
    file.write_bytes(content)
    entry = Weights(
        "squeezenet_of_ours", f"https://example.org/{file.name}", hashlib.sha256(content).hexdigest(), len(content),
        "BSD-3-Clause", "https://example.org/paper", True,
    )  # fmt: skip
    monkeypatch.setitem(PUBLISHED, entry.name, entry)
    monkeypatch.setenv("BOXWRIGHT_CACHE", str(file.parent))
    monkeypatch.setenv("BOXWRIGHT_OFFLINE", "1")
    return file


def test_a_published_name_tells_its_licence(published: Path) -> None:
    origin = start_from(built("fasterrcnn_squeezenet1_1"), "squeezenet_of_ours")
    assert origin.sources == ["squeezenet_of_ours (BSD-3-Clause, https://example.org/paper)"]
    assert origin.text.startswith(f"from {origin.sources[0]}: 50 of 50 tensors loaded")


def test_a_published_name_that_cannot_be_had(published: Path) -> None:
    published.unlink()
    detector = built("fasterrcnn_squeezenet1_1")
    before = state(detector)
    message = refusal(lambda: start_from(detector, "squeezenet_of_ours"))
    assert (
        f"BOXWRIGHT_OFFLINE forbids it; name a local copy with --weights FILE, or put the file at {published}"
        in message
    )
    assert not changed(before, detector)


def test_a_file_comes_before_a_published_name(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_nano(tmp_path / "squeezenet_of_ours", ["a", "b", "c"])
    assert start_from(built("fasterrcnn_vitdet_nano"), "squeezenet_of_ours").sources == ["squeezenet_of_ours"]


def test_a_download_says_what_under_which_licence_and_from_where(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from boxwright.models import weights

    def fetch(entry: Weights, *, progress: Callable[[int, int | None], None]) -> Path:
        for done in (10**6, 2 * 10**6, 5 * 10**6):
            progress(done, entry.size)
        return published

    monkeypatch.setattr(weights, "fetch", fetch)
    said: list[str] = []
    start_from(built("fasterrcnn_squeezenet1_1"), "squeezenet_of_ours", say=said.append)
    size = published.stat().st_size / 1e6
    url = f"https://example.org/{published.name}"
    assert said == [f"downloading squeezenet_of_ours ({size:.0f} MB, BSD-3-Clause) from {url}"]

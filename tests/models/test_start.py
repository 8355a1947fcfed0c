"""Training starts from what `--weights` names, says what became of every tensor, and refuses the rest in one line."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

from boxwright import download, registry
from boxwright.models import checkpoint
from boxwright.models.checkpoint import Header
from boxwright.models.published import PUBLISHED, Weights, find
from boxwright.models.start import load_into, start_from
from boxwright.models.tensors import Tensors, read_tensors
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


def save_nano(path: Path, classes: list[str], weights_from: list[str] | None = None) -> nn.Module:
    source = built("fasterrcnn_vitdet_nano", seed=1, num_classes=len(classes))
    with torch.no_grad():
        source.get_parameter("backbone.body.blocks.1.attn.rel_pos_h").normal_()
    fit = {"imgsz": 64, "square": True}
    checkpoint.save(path, source, Header("fasterrcnn_vitdet_nano", {}, classes, fit, weights_from=weights_from or []))
    return source


def test_our_own_checkpoint_gives_everything(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    source = save_nano(path, ["a", "b", "c"], weights_from=["mae_vit_base (CC-BY-NC-4.0, a page)"])
    detector = built("fasterrcnn_vitdet_nano")
    count = len(state(detector))
    origin = start_from(detector, str(path), model="fasterrcnn_vitdet_nano")
    assert not changed(state(source), detector)
    assert origin.text == f"from {path} (fasterrcnn_vitdet_nano; a, b, c): {count} of {count} tensors loaded"
    assert origin.sources == [str(path), "mae_vit_base (CC-BY-NC-4.0, a page)"]


def test_a_damaged_checkpoint_of_ours_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_nano(path, ["a", "b", "c"])
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    detector = built("fasterrcnn_vitdet_nano")
    before = state(detector)
    assert "is damaged" in refusal(lambda: start_from(detector, str(path)))
    assert not changed(before, detector)


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
    message = refusal(lambda: start_from(detector, str(tmp_path / "own.safetensors"), model="fasterrcnn_squeezenet1_1"))
    assert message.startswith(
        f"{tmp_path / 'own.safetensors'} (fasterrcnn_vitdet_nano, not fasterrcnn_squeezenet1_1; a, b, c): matched"
    )
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
    assert message.endswith(f"Published ones: {', '.join(PUBLISHED)}, torchvision:NAME, timm:NAME.")


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
    def fetch(entry: Weights, *, progress: Callable[[int, int | None], None]) -> Path:
        for done in (10**6, 2 * 10**6, 5 * 10**6):
            progress(done, entry.size)
        return published

    monkeypatch.setattr(download, "fetch", fetch)
    said: list[str] = []
    start_from(built("fasterrcnn_squeezenet1_1"), "squeezenet_of_ours", say=said.append)
    size = published.stat().st_size / 1e6
    url = f"https://example.org/{published.name}"
    assert said == [f"downloading squeezenet_of_ours ({size:.0f} MB, BSD-3-Clause) from {url}"]


# ------ From torchvision's published detectors

DETECTORS = {entry.fits[0]: name.removesuffix("_coco") for name, entry in PUBLISHED.items() if name.endswith("_coco")}
OLDER = (  # names of torchvision before 0.13, in which most of its files are, from today's
    (r"(.*\.fpn\.(?:inner|layer)_blocks\.\d+)\.0\.(weight|bias)", lambda m: f"{m[1]}.{m[2]}"),
    (r"(rpn\.head\.conv)\.0\.0\.(weight|bias)", lambda m: f"{m[1]}.{m[2]}"),
    (r"(head\.\w+_head\.conv)\.(\d)\.0\.(weight|bias)", lambda m: f"{m[1]}.{2 * int(m[2])}.{m[3]}"),
)


def older(name: str) -> str:
    for pattern, rename in OLDER:
        name = re.sub(f"^{pattern}$", rename, name)
    return name


def zeros(name: str, **options: Any) -> nn.Module:
    """A model of ours in which every number is zero, quickly."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detector = registry.build(name, **{"num_classes": 3} | options)
    detector.to_empty(device="cpu")
    for tensor in detector.state_dict().values():
        tensor.zero_()
    return detector


def numbered(module: nn.Module) -> dict[str, Tensor]:
    """The module's names and shapes, each tensor full of a number of its own."""
    tensors = module.state_dict().items()
    return {name: torch.full(t.shape, i + 1.0, device="cpu").to(t.dtype) for i, (name, t) in enumerate(tensors)}


def torchvisions(name: str, **options: Any) -> dict[str, Tensor]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return numbered(torchvision.models.get_model(name, weights=None, weights_backbone=None, **options))


def arrived(detector: nn.Module, wanted: dict[str, Tensor]) -> set[str]:
    """Names of ours that hold what the file has under the same name; those without a number of their own aside."""
    own = detector.state_dict()
    return {name for name, tensor in own.items() if name in wanted and torch.equal(tensor, wanted[name])}


def untouched(detector: nn.Module) -> set[str]:
    return {name for name, tensor in detector.state_dict().items() if not tensor.any()}


@pytest.mark.parametrize("name", DETECTORS)
def test_a_published_detector_of_torchvision_gives_all_but_its_class_layers(name: str) -> None:
    tensors = torchvisions(DETECTORS[name])  # 91 classes
    published = tensors if name.endswith("_v2") else {older(key): value for key, value in tensors.items()}
    detector = zeros(name)
    own = set(detector.state_dict())
    account = load_into(detector, Tensors(published), "coco.pth")
    classes = {key for key in own if re.search(r"box_predictor|classification_head.cls_logits", key)}
    assert classes
    assert untouched(detector) == classes | {"pixel_mean", "pixel_std"}
    assert arrived(detector, tensors) == own - untouched(detector)
    assert {mismatch.name for mismatch in account.mismatched} == classes
    assert set(account.unexpected) <= {key for key in published if key.endswith("num_batches_tracked")}


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"])
def test_as_many_classes_give_everything(name: str) -> None:
    """torchvision counts a class 0, in whose place ours have nothing or the background."""
    detector = zeros(name)
    account = load_into(detector, Tensors(torchvisions(DETECTORS[name], num_classes=4)), "mine.pth")
    assert untouched(detector) == {"pixel_mean", "pixel_std"} == set(account.missing)
    assert not account.mismatched


def test_older_names_are_those_that_torchvision_reads() -> None:
    name = "retinanet_resnet50_fpn"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=4)
    published = {older(key): value for key, value in theirs.state_dict().items()}
    assert published.keys() != theirs.state_dict().keys()
    theirs.load_state_dict(published)  # strictly
    detector = zeros(name)
    load_into(detector, Tensors(published), "old.pth")
    assert untouched(detector) >= {"pixel_mean", "pixel_std"}
    first = "head.regression_head.conv.3.0.weight"
    assert torch.equal(detector.state_dict()[first], theirs.state_dict()[first])


def test_our_own_dense_detector_keeps_all_its_class_rows() -> None:
    """Its class layers have names and shapes that a torchvision file may have too."""
    source = numbered(zeros("fcos_resnet50_fpn"))
    detector = zeros("fcos_resnet50_fpn")
    account = load_into(detector, Tensors(source), "own")
    assert arrived(detector, source) == source.keys()
    assert account.used == account.total


def test_a_head_of_another_form_is_left_whole_and_said() -> None:
    """Half of a head, or one layer of its two, would be noise with a good name."""
    tensors = torchvisions("fasterrcnn_resnet50_fpn", num_classes=4)
    detector = zeros("fasterrcnn_resnet50_fpn_v2")
    account = load_into(detector, Tensors(tensors), "v1.pth")
    after = detector.state_dict()
    left = {"backbone.fpn", "rpn.head", "roi_heads.box_head"}
    assert f"of another form in the file, left whole: {', '.join(sorted(left))}" in account.notes
    for name in after:
        if ".".join(name.split(".")[:2]) in left:
            assert not after[name].any()
            assert name in account.missing
        elif name.startswith("backbone.body"):
            assert torch.equal(after[name], tensors[name])
    assert {"rpn.head.conv.0.0.weight", "rpn.head.cls_logits.bias"} <= set(account.unexpected)


def test_a_retinanet_starts_from_a_faster_rcnns_backbone() -> None:
    tensors = torchvisions("fasterrcnn_resnet50_fpn_v2")
    detector = zeros("retinanet_resnet50_fpn_v2")
    account = load_into(detector, Tensors(tensors), "faster.pth")
    loaded = arrived(detector, tensors)
    assert {name for name in detector.state_dict() if name.startswith("backbone.body.")} <= loaded
    assert not any(name.startswith("head.") for name in loaded)
    assert any(name.startswith("roi_heads.") for name in account.unexpected)


def test_a_deeper_backbone_is_another_one() -> None:
    detector = zeros("fasterrcnn_resnet50_fpn_v2")
    deeper = numbered(torchvision.models.resnet101(weights=None))
    assert "no place in the model: layer3.10." in refusal(lambda: load_into(detector, Tensors(deeper), "resnet101.pth"))
    assert untouched(detector) == detector.state_dict().keys()


def test_a_prefix_of_everything_comes_off() -> None:
    tensors = torchvisions("fasterrcnn_resnet50_fpn_v2", num_classes=4)
    detector = zeros("fasterrcnn_resnet50_fpn_v2")
    account = load_into(detector, Tensors({f"model.{name}": t for name, t in tensors.items()}), "lightning.ckpt")
    assert (account.used, account.notes) == (404, ("'model.' taken off",))


def test_one_tensor_under_two_names_is_refused() -> None:
    tensors = torchvisions("fasterrcnn_resnet50_fpn", num_classes=4)
    both = {**tensors, **{older(name): tensor for name, tensor in tensors.items()}}
    detector = zeros("fasterrcnn_resnet50_fpn")
    assert "older and a present name" in refusal(lambda: load_into(detector, Tensors(both), "both.pth"))


# ------ From the article's codebase


def save_article(path: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint as its trainer saves it."""
    data = {"TRAIN_DIR_IMAGES": "a", "CLASSES": ["__background__", "b", "c", "d"], "NC": 4}
    torch.save({"epoch": 3, "model_state_dict": tensors, "data": data, "model_name": "x"}, path)
    return path


def test_the_articles_vitdet_gives_everything(tmp_path: Path) -> None:
    detector, wanted = zeros("fasterrcnn_vitdet_tiny"), numbered(zeros("fasterrcnn_vitdet_tiny"))
    own = ("pixel_mean", "pixel_std")
    theirs = {
        re.sub(r"^backbone\.fpn\.", "backbone.", re.sub(r"^backbone\.body\.", "backbone.net.", name)): tensor
        for name, tensor in wanted.items()
        if name not in own
    }
    assert {"backbone.net.pos_embed", "backbone.simfp_2.4.norm.weight", "backbone.net.blocks.11.attn.rel_pos_h"} <= set(
        theirs
    )
    path = save_article(tmp_path / "best_model.pth", theirs)
    origin = start_from(detector, str(path))
    assert untouched(detector) == set(own)
    assert arrived(detector, wanted) == wanted.keys() - set(own)
    assert "taken from 'model_state_dict', beside it: epoch, data, model_name" in origin.text
    assert "renamed: backbone." in origin.text


@pytest.mark.parametrize(
    "name", ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenetv3_large_fpn"]
)
def test_the_articles_other_detectors_are_torchvisions(name: str, tmp_path: Path) -> None:
    path = save_article(tmp_path / "best_model.pth", torchvisions(DETECTORS[name], num_classes=4))
    detector = zeros(name)
    start_from(detector, str(path))
    assert untouched(detector) == {"pixel_mean", "pixel_std"}


@pytest.mark.parametrize(
    ("name", "trunk"),
    [
        (
            "fasterrcnn_resnet18",
            lambda: nn.Sequential(*list(torchvision.models.resnet18(weights=None).children())[:-2]),
        ),
        ("fasterrcnn_squeezenet1_1", lambda: torchvision.models.squeezenet1_1(weights=None).features),
    ],
)
def test_the_articles_trunks_of_one_map_give_the_trunk(name: str, trunk: Callable[[], nn.Module]) -> None:
    """Its heads look at another map, with other channels: they are left whole."""
    with torch.device("meta"):
        layers = trunk()
    theirs = {f"backbone.{key}": tensor for key, tensor in numbered(layers).items()}
    heads = {
        "rpn.head.conv.0.0.weight": torch.ones(512, 512, 3, 3),
        "roi_heads.box_head.fc7.weight": torch.ones(1024, 1024),
    }
    detector = zeros(name)
    account = load_into(detector, Tensors({**theirs, **heads}), "best_model.pth")
    body = {key for key in detector.state_dict() if key.startswith("backbone.body.")}
    assert account.used == len(body) == len(theirs)
    assert untouched(detector) == detector.state_dict().keys() - body
    by_number = sorted(float(tensor.flatten()[0]) for tensor in theirs.values())
    assert sorted(float(detector.state_dict()[key].flatten()[0]) for key in body) == by_number
    assert set(heads) <= set(account.unexpected)


# ------ From detectron2


def detectron2s(detector: nn.Module, classes: int) -> dict[str, Tensor]:
    """A ViTDet Mask R-CNN's names and order: background last, and no boxes of it; and a mask head."""
    names = (
        (r"^backbone\.body\.", "backbone.net."),
        (r"^backbone\.fpn\.", "backbone."),
        (r"^rpn\.head\.conv\.(\d)\.0\.", r"proposal_generator.rpn_head.conv.conv\1."),
        (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
        (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
        (r"^roi_heads\.box_head\.5\.", "roi_heads.box_head.fc1."),
        *((rf"^roi_heads\.box_head\.{i}\.0\.", f"roi_heads.box_head.conv{i + 1}.") for i in range(4)),
        *((rf"^roi_heads\.box_head\.{i}\.1\.", f"roi_heads.box_head.conv{i + 1}.norm.") for i in range(4)),
    )
    found = {"roi_heads.mask_head.predictor.weight": torch.ones(classes, 4, 1, 1)}
    for name, tensor in numbered(detector).items():
        if name.startswith("pixel_"):
            continue
        if "box_predictor.cls_score" in name:
            tensor = torch.cat([tensor[1:], tensor[:1]])
        if "box_predictor.bbox_pred" in name:
            tensor = tensor[4:]
        for pattern, theirs in names:
            name = re.sub(pattern, theirs, name)
        found[name] = tensor
    return found


@pytest.mark.parametrize("classes", [3, 80])
def test_a_vitdet_of_detectron2_gives_all_but_its_mask_head(classes: int, tmp_path: Path, monkeypatch: Any) -> None:
    from boxwright.models.zoo import vitdet

    monkeypatch.setattr(vitdet, "BASE", vitdet.Size(48, 2, 3, global_blocks=(1,)))  # else 440 MB
    published = detectron2s(zeros("vitdet_b", num_classes=classes), classes)
    content = {"model": {name: tensor.numpy() for name, tensor in published.items()}, "__author__": "third_party"}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(content))
    detector = zeros("vitdet_b")
    wanted = numbered(detector)
    origin = start_from(detector, str(tmp_path / "model_final.pkl"))
    left = {"pixel_mean", "pixel_std"}
    if classes != 3:
        left |= {name for name in wanted if "roi_heads.box_predictor" in name}
    assert untouched(detector) == left
    plain = {name for name in wanted if "box_predictor" not in name}
    assert plain - left <= arrived(detector, wanted)
    assert "mask head" in origin.text


def test_a_vitdet_of_detectron2_gives_its_backbone_to_the_articles_model(monkeypatch: Any) -> None:
    from boxwright.models.zoo import vitdet

    monkeypatch.setattr(vitdet, "BASE", vitdet.Size(48, 2, 3, global_blocks=(1,)))
    published = detectron2s(zeros("vitdet_b"), 3)
    side = "backbone.net.blocks.1.attn.rel_pos_h"
    published[side] = torch.randn(31, published[side].shape[1])  # trained at another size
    detector = zeros("fasterrcnn_vitdet")
    account = load_into(detector, Tensors(published), "d2.pkl")
    assert not {name for name in untouched(detector) if name.startswith("backbone.")}
    assert "of another form in the file, left whole: roi_heads.box_head, rpn.head" in account.notes
    assert "relative positions resampled from 31 to 127 rows: backbone.body.blocks.1.attn.rel_pos_h" in account.notes


# ------ From timm's and torchvision's classifiers


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_384"])
def test_a_vit_of_timm_gives_its_encoder(name: str) -> None:
    with torch.device("meta"):
        theirs = timm.create_model(name)
    detector = zeros("fasterrcnn_vitdet_tiny")
    account = load_into(detector, Tensors(numbered(theirs)), name)
    left = {key for key in untouched(detector) if key.startswith("backbone.body.")}
    assert left == {key for key in detector.state_dict() if "rel_pos" in key}
    assert set(account.unexpected) == {"cls_token", "head.weight", "head.bias", "norm.weight", "norm.bias"}
    assert bool(account.notes) == name.endswith("384")  # its positions are of a larger grid


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mnasnet0_5", "googlenet"])
@pytest.mark.parametrize("prefix", ["", "bare"])
def test_any_classifier_of_torchvision_gives_its_layers(name: str, prefix: str) -> None:
    detector = zeros("fasterrcnn", backbone=f"torchvision:{name}")
    body = detector.get_submodule("backbone.body")
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = numbered(torchvision.models.get_model(name, weights=None, **options))
    tensors = numbered(body) if prefix else theirs
    account = load_into(detector, Tensors(tensors), name)
    assert account.used == account.total == len(body.state_dict())
    if not prefix:
        assert account.unexpected
        assert all(re.match(r"fc|classifier|heads|aux", key) for key in account.unexpected)


@pytest.mark.parametrize(("name", "of_other_size"), [("resnet18", False), ("vit_tiny_patch16_224", True)])
def test_a_model_of_timm_gives_its_layers_to_timms_backbone(name: str, of_other_size: bool) -> None:
    detector = zeros("fasterrcnn", backbone=f"timm:{name}")
    body = detector.get_submodule("backbone.body")
    with torch.device("meta"):
        theirs = numbered(timm.create_model(name.replace("224", "384")))
    account = load_into(detector, Tensors(theirs), name)
    assert account.used + sum("num_batches_tracked" in key for key in account.missing) == account.total
    assert not {key for key, tensor in body.state_dict().items() if not tensor.any()}
    assert any("pos_embed resampled" in note for note in account.notes) == of_other_size
    assert account.unexpected


def test_a_deeper_model_of_timm_is_another_one() -> None:
    detector = zeros("fasterrcnn", backbone="timm:resnet18")
    with torch.device("meta"):
        theirs = numbered(timm.create_model("resnet34"))
    assert "no place in the model: layer1.2." in refusal(lambda: load_into(detector, Tensors(theirs), "resnet34"))


def test_weights_that_timm_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pretrained`, `timm` and their name are the same weights; the licence is asked first."""
    from boxwright.models.backbones import from_timm

    with torch.device("meta"):
        theirs = numbered(timm.create_model("resnet18"))
    asked: list[str] = []

    def pretrained(name: str) -> tuple[Tensors, str]:
        asked.append(name)
        return Tensors(theirs), "timm's resnet18 (cc-by-nc-4.0, a page)"

    monkeypatch.setattr(from_timm, "pretrained", pretrained)
    monkeypatch.setattr(from_timm, "licence", lambda _: ("cc-by-nc-4.0", False))
    for weights in ("pretrained", "timm", "timm:resnet18"):
        detector = zeros("fasterrcnn", backbone="timm:resnet18")
        said: list[str] = []
        origin = start_from(detector, weights, backbone="timm:resnet18", say=said.append)
        assert origin.sources == ["timm's resnet18 (cc-by-nc-4.0, a page)"]
        assert said == ["licence cc-by-nc-4.0: not for commercial use"]
        assert not {k for k in untouched(detector) if k.startswith("backbone.body.")}
    assert asked == ["resnet18"] * 3
    words = refusal(lambda: start_from(detector, "pretrained", require_license="permissive"))
    assert words.startswith("--require-license permissive: timm:resnet18 has the licence cc-by-nc-4.0")
    assert len(asked) == 3


# ------ Licences


def nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: object, **__: object) -> Path:
        raise AssertionError("downloaded")

    monkeypatch.setattr(download, "fetch", fetch)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("mae_vit_base", "mae_vit_base has the licence CC-BY-NC-4.0 (not for commercial use)"),
        ("mask_rcnn_vitdet_b", "mask_rcnn_vitdet_b has the licence CC-BY-SA-3.0 (what is made from it"),
        ("torchvision:vit_h_14", "vit_h_14_imagenet has the licence CC-BY-NC-4.0"),
    ],
)
def test_a_licence_that_is_not_permissive_is_refused_before_any_download(
    weights: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing_is_downloaded(monkeypatch)
    detector = zeros("fasterrcnn_vitdet_nano")
    message = refusal(lambda: start_from(detector, weights, require_license="permissive"))
    assert message.startswith(f"--require-license permissive: {words}")
    assert message.endswith("name other weights, or leave --require-license out")


def test_a_file_has_a_licence_that_nobody_knows(tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    save_nano(path, ["a", "b", "c"])
    detector = zeros("fasterrcnn_vitdet_nano")
    message = refusal(lambda: start_from(detector, str(path), require_license="permissive"))
    assert f"the licence of the file {path} is not known" in message
    assert "leave --require-license out" in message
    assert untouched(detector) == detector.state_dict().keys()
    assert start_from(detector, None, require_license="permissive").sources == []
    assert "'permissiv' is not known" in refusal(lambda: start_from(detector, str(path), require_license="permissiv"))


def test_a_permissive_licence_is_let_through_in_silence(published: Path) -> None:
    said: list[str] = []
    start_from(zeros("fasterrcnn_squeezenet1_1"), "squeezenet_of_ours", require_license="permissive", say=said.append)
    assert said == []


def test_another_licence_is_said_when_it_is_used(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = PUBLISHED["squeezenet_of_ours"]
    of_nobody = Weights(entry.name, entry.url, entry.sha256, entry.size, "CC-BY-NC-4.0", entry.source, False)
    monkeypatch.setitem(PUBLISHED, entry.name, of_nobody)
    said: list[str] = []
    origin = start_from(zeros("fasterrcnn_squeezenet1_1"), "squeezenet_of_ours", say=said.append)
    assert said == ["licence CC-BY-NC-4.0: not for commercial use"]
    assert origin.sources == ["squeezenet_of_ours (CC-BY-NC-4.0, https://example.org/paper)"]


# ------ The backbone's own


def test_pretrained_is_what_the_backbone_says(published: Path) -> None:
    detector = zeros("fasterrcnn_squeezenet1_1")
    detector.get_submodule("backbone.body").weights_name = "squeezenet_of_ours"
    origin = start_from(detector, "pretrained", backbone="torchvision:resnet18")
    assert origin.sources == ["squeezenet_of_ours (BSD-3-Clause, https://example.org/paper)"]
    loaded = {name.removeprefix("features."): tensor for name, tensor in read_tensors(published).items()}
    assert all(torch.equal(t, loaded[k]) for k, t in detector.get_submodule("backbone.body").state_dict().items())


def test_pretrained_without_such_weights_is_refused() -> None:
    message = refusal(lambda: start_from(zeros("fasterrcnn_vitdet_nano"), "pretrained"))
    assert "this model's backbone has no published weights of its own" in message


def test_the_zoos_torchvision_backbones_know_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(entry: Weights, **_: object) -> Path:
        asked.append(entry.url)
        raise UserError("offline")

    monkeypatch.setattr(download, "fetch", fetch)
    for name, url in (
        ("fasterrcnn_resnet18", find("torchvision:resnet18").url),
        ("fasterrcnn_mobilenetv3_large_fpn", find("torchvision:mobilenet_v3_large").url),
    ):
        assert refusal(lambda name=name: start_from(zeros(name), "pretrained")) == "offline"
        assert asked.pop() == url

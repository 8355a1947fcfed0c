"""Every published file is named with its licence, hash and use, and a name that is near one is answered with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torchvision

from boxwright import registry
from boxwright.models.published import PUBLISHED, Weights, find, fitting, licence_of, own_weights, resolve
from boxwright.types import UserError

PERMISSIVE = {"BSD-3-Clause", "Apache-2.0", "MIT"}
CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everything() -> list[Weights]:
    return [*PUBLISHED.values(), *(find(f"torchvision:{name}") for name in CLASSIFIERS)]


def test_every_entry_is_whole() -> None:
    for entry in everything():
        assert find(entry.name) == entry
        assert entry.url.startswith("https://")
        assert entry.source.startswith("https://")
        assert entry.sha256 is None or (len(entry.sha256) >= 8 and int(entry.sha256, 16))
        assert entry.permissive == (entry.licence in PERMISSIVE)
        assert entry.fits
        assert "--weights FILE" in entry.way_out
    assert all(name == entry.name for name, entry in PUBLISHED.items())


def test_no_two_files_have_one_name_in_the_cache() -> None:
    names = [Path(urlsplit(entry.url).path).name for entry in everything()]
    assert len(set(names)) == len(names)


def test_addresses_and_hashes_are_torchvisions_own() -> None:
    detectors = {name.removesuffix("_coco"): entry for name, entry in PUBLISHED.items() if name.endswith("_coco")}
    assert len(detectors) == 7
    for name, entry in detectors.items():
        assert entry.url == torchvision.models.get_model_weights(name).DEFAULT.url
        assert f"-{entry.sha256}.pth" in entry.url
        assert find(f"torchvision:{name}") == entry
    for name in CLASSIFIERS:
        entry, versions = find(f"torchvision:{name}"), torchvision.models.get_model_weights(name)
        assert entry == find(f"{name}_imagenet")
        assert (entry.url, entry.source) == (versions.DEFAULT.url, versions.DEFAULT.meta["recipe"])
        assert entry.fits == (f"torchvision:{name}",)


def test_swag_is_not_for_sale_and_the_rest_of_torchvision_is() -> None:
    """Its weights are under a licence of their own; some models have no others."""
    for model in CLASSIFIERS:
        for version in torchvision.models.get_model_weights(model):
            entry = find(f"torchvision:{model}.{version.name}")
            assert entry.url == version.url
            assert entry.licence == ("CC-BY-NC-4.0" if "SWAG" in version.name else "BSD-3-Clause")
    assert not find("torchvision:vit_h_14").permissive
    assert not find("torchvision:regnet_y_128gf").permissive
    assert find("torchvision:vit_b_16").permissive


def test_licences_of_detectors_and_autoencoders() -> None:
    for name, entry in PUBLISHED.items():
        wanted = "BSD-3-Clause"
        if "vitdet" in name:
            wanted = "CC-BY-SA-3.0"
        elif name.startswith("mae"):
            wanted = "CC-BY-NC-4.0"
        assert entry.licence == wanted


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mae_vit_bas", "Did you mean 'mae_vit_base'?"),
        ("resnet18", "Did you mean 'resnet18_imagenet'?"),
        ("torchvision:resnt18", "Did you mean 'torchvision:resnet18'?"),
        ("torchvision:resnet50.IMAGENET1K_V3", "Did you mean 'IMAGENET1K_V2'?"),
        ("fasterrcnn_resnet50_fpn_imagenet", "Did you mean"),
        ("yolo", "torchvision:NAME, timm:NAME."),
        ("torchvision:", "list_models()"),
    ],
)
def test_a_name_that_is_none_gets_the_nearest(name: str, hint: str) -> None:
    assert hint in refusal(lambda: find(name))
    assert hint in refusal(lambda: resolve(name, None))


def test_what_a_name_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mae_vit_base").write_bytes(b"x")
    assert resolve("mae_vit_base", None) == Path("mae_vit_base")  # a file comes first
    assert resolve("mae_vit_large", None) == PUBLISHED["mae_vit_large"]
    assert resolve("pretrained", "torchvision:resnet18") == find("resnet18_imagenet")
    assert resolve("torchvision", "torchvision:resnet18") == find("resnet18_imagenet")
    assert resolve("pretrained", "mae_vit_large") == PUBLISHED["mae_vit_large"]


@pytest.mark.parametrize(
    ("weights", "own"), [("pretrained", None), ("timm", "torchvision:resnet18"), ("torchvision", "timm:resnet18")]
)
def test_a_backbone_without_such_weights_says_so(weights: str, own: str | None) -> None:
    message = refusal(lambda: resolve(weights, own))
    assert message.startswith(f"--weights {weights}: this model's backbone has no")


def test_licence_of_any_spelling(tmp_path: Path) -> None:
    (tmp_path / "mine.pth").write_bytes(b"x")
    model = "fasterrcnn_vitdet_nano"
    assert licence_of(None, model) == ("none: random weights", True)
    assert licence_of(str(tmp_path / "mine.pth"), model) == ("unknown", False)
    assert licence_of("mae_vit_base", model) == ("CC-BY-NC-4.0", False)
    assert licence_of("resnet50_imagenet", model) == ("BSD-3-Clause", True)
    assert licence_of("torchvision:vit_h_14", model) == ("CC-BY-NC-4.0", False)
    assert licence_of("pretrained", "fasterrcnn", "torchvision:resnet50") == ("BSD-3-Clause", True)
    assert licence_of("timm:resnet18.a1_in1k", model) == ("apache-2.0", True)
    assert licence_of("timm", "fasterrcnn", "timm:vit_small_patch16_dinov3") == ("dinov3-license", False)
    assert "no published weights of its own" in refusal(lambda: licence_of("pretrained", model))
    assert "no weights at" in refusal(lambda: licence_of("nothing", model))


def test_the_backbones_own_weights_are_found_without_building_it(monkeypatch: pytest.MonkeyPatch) -> None:
    build = registry.build

    def with_weights(name: str, **options: Any) -> Any:
        detector = build(name, **options)
        assert all(parameter.is_meta for parameter in detector.parameters())
        detector.get_submodule("backbone.body").weights_name = "torchvision:squeezenet1_1"
        return detector

    assert own_weights("fasterrcnn_vitdet_nano") is None
    assert own_weights("fasterrcnn_mobilenet_v2") == "torchvision:mobilenet_v2"
    assert own_weights("anything", "timm:vit_tiny_patch16_224") == "timm:vit_tiny_patch16_224"
    monkeypatch.setattr(registry, "build", with_weights)
    assert own_weights("fasterrcnn_squeezenet1_1") == "torchvision:squeezenet1_1"
    assert licence_of("pretrained", "fasterrcnn_squeezenet1_1") == ("BSD-3-Clause", True)


def test_what_fits_a_model_is_listed() -> None:
    names = [entry.name for entry in fitting("fasterrcnn_resnet50_fpn_v2", "torchvision:resnet50")]
    assert names == ["fasterrcnn_resnet50_fpn_v2_coco", "resnet50_imagenet"]
    assert [entry.name for entry in fitting("vitdet_b", "mae_vit_base")] == ["mae_vit_base", "mask_rcnn_vitdet_b"]
    assert fitting("fasterrcnn_vitdet_nano") == []
    assert fitting("x", "timm:resnet18") == []  # timm's are not in a table of ours


def test_what_is_listed_for_a_model_is_registered() -> None:
    known = registry.entries()
    assert {name for entry in PUBLISHED.values() for name in entry.fits} <= known.keys()


def test_asking_for_the_table_imports_no_torch() -> None:
    code = (
        "import sys, boxwright.models.published as p; assert p.find('mae_vit_base'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""Which weights are published where, under which licence and for what; nothing is downloaded to answer that."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from boxwright import registry
from boxwright.download import File
from boxwright.types import UserError

OWN = ("pretrained", "timm", "torchvision")  # say "the backbone's own" instead of a name
TIMM, TORCHVISION = "timm:", "torchvision:"  # before a name of theirs


@dataclass(frozen=True)
class Weights(File):
    """One published file of weights."""

    licence: str  # SPDX
    source: str  # paper or page
    permissive: bool  # use, change and sale are all allowed, under terms of one's own
    fits: tuple[str, ...] = ()  # the detectors and backbones that it is for
    way_out: str = field(default="name a local copy with --weights FILE", kw_only=True)


@dataclass(frozen=True)
class FromTimm:
    """Weights that timm finds and downloads itself."""

    name: str
    licence: str
    permissive: bool


def _mae(size: str, url: str, sha256: str | None, bytes_: int | None, *fits: str) -> Weights:
    return Weights(
        f"mae_vit_{size}",
        url,
        sha256,
        bytes_,
        licence="CC-BY-NC-4.0",
        source="https://github.com/facebookresearch/mae (He et al., arXiv:2111.06377)",
        permissive=False,
        fits=fits,
    )


def _coco(file: str, fits: str) -> Weights:
    """A detector of torchvision's, trained on COCO."""
    name, hashed = file.removesuffix(".pth").rsplit("-", 1)
    model = name.removesuffix("_coco")
    return Weights(
        f"{model}_coco",
        url=f"https://download.pytorch.org/models/{file}",
        sha256=hashed,  # torchvision puts the first 8 digits into the file's name, and publishes no size
        size=None,
        licence="BSD-3-Clause",  # torchvision's own; the training images' terms are another matter
        source=f"https://docs.pytorch.org/vision/stable/models/generated/torchvision.models.detection.{model}.html",
        permissive=True,
        fits=(fits,),
    )


def _vitdet(name: str, file: str, *fits: str) -> Weights:
    """A ViTDet of detectron2's, trained on COCO; its page publishes neither hash nor size."""
    return Weights(
        name,
        url=f"https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/{name}/{file}",
        sha256=None,
        size=None,
        # MODEL_ZOO.md says it of "all models available for download through this document"; projects/ViTDet,
        # which lists these, says nothing of its own. The backbones began as MAE's, which are CC-BY-NC-4.0.
        licence="CC-BY-SA-3.0",
        source="https://github.com/facebookresearch/detectron2/tree/main/projects/ViTDet (arXiv:2203.16527)",
        permissive=False,
        fits=fits,
    )


MAE = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit"

PUBLISHED: dict[str, Weights] = {
    weights.name: weights
    for weights in (
        # Their authors publish only the beginning of the MD5 (8cad7c, b8b06e, 9bdbb0), and no size. Those of the base
        # are what several unrelated public projects found in it (a git-LFS pointer, a pinned download from there).
        _mae(
            "base",
            f"{MAE}_base.pth",
            "aec5f0b68e5f3193a00b07bc65a37440db549c15b36b8bea242606cc40c4bc5d",
            343_249_461,
            "fasterrcnn_vitdet",
            "vitdet_b",
            "cascade_vitdet_b",
        ),
        _mae("large", f"{MAE}_large.pth", None, None, "vitdet_l", "cascade_vitdet_l"),
        _mae("huge", f"{MAE}_huge.pth", None, None, "vitdet_h", "cascade_vitdet_h"),  # 14-px patches
        _coco("fasterrcnn_resnet50_fpn_coco-258fb6c6.pth", "fasterrcnn_resnet50_fpn"),
        _coco("fasterrcnn_resnet50_fpn_v2_coco-dd69338a.pth", "fasterrcnn_resnet50_fpn_v2"),
        _coco("fasterrcnn_mobilenet_v3_large_fpn-fb6a3cc7.pth", "fasterrcnn_mobilenetv3_large_fpn"),
        _coco("fasterrcnn_mobilenet_v3_large_320_fpn-907ea3f9.pth", "fasterrcnn_mobilenetv3_large_320_fpn"),
        _coco("retinanet_resnet50_fpn_coco-eeacb38b.pth", "retinanet_resnet50_fpn"),
        _coco("retinanet_resnet50_fpn_v2_coco-5905b1c5.pth", "retinanet_resnet50_fpn_v2"),
        _coco("fcos_resnet50_fpn_coco-99b0c9b7.pth", "fcos_resnet50_fpn"),
        _vitdet("mask_rcnn_vitdet_b", "f325346929/model_final_61ccd1.pkl", "vitdet_b", "fasterrcnn_vitdet"),
        _vitdet("mask_rcnn_vitdet_l", "f325599698/model_final_6146ed.pkl", "vitdet_l"),
        _vitdet("mask_rcnn_vitdet_h", "f329145471/model_final_7224f1.pkl", "vitdet_h"),
        _vitdet("cascade_mask_rcnn_vitdet_b", "f325358525/model_final_435fa9.pkl", "cascade_vitdet_b"),
        _vitdet("cascade_mask_rcnn_vitdet_l", "f328021305/model_final_1a9f28.pkl", "cascade_vitdet_l"),
        _vitdet("cascade_mask_rcnn_vitdet_h", "f328730692/model_final_f05665.pkl", "cascade_vitdet_h"),
    )
}


def find(name: str) -> Weights:
    """Published weights by name: of `PUBLISHED`, `torchvision:resnet18` or, the same, `resnet18_imagenet`.

    `torchvision:resnet50.IMAGENET1K_V1` is one that is not torchvision's default. A name that is neither is a
    `UserError` with the nearest right one.
    """
    if found := _look_up(name):
        return found
    raise UserError(f"no published weights {name!r}.{_hint(name)}")


def fitting(model: str, own: str | None = None) -> list[Weights]:
    """Published weights for a detector: those of the table, and its backbone's `own` where torchvision has them."""
    listed = [weights for weights in PUBLISHED.values() if model in weights.fits]
    more = [find(own)] if own and not own.startswith(TIMM) else []
    return [*listed, *(weights for weights in more if weights not in listed)]


def resolve(weights: str, own: str | None) -> Path | Weights | FromTimm:
    """What `--weights` means: a file first, then a name; `own` is the name of the backbone's own weights.

    What means nothing is a `UserError`.
    """
    if weights in OWN and not Path(weights).exists():
        if own is None or not (weights == "pretrained" or own.startswith(f"{weights}:")):
            whose = "published weights" if weights == "pretrained" else f"weights from {weights}"
            raise UserError(
                f"--weights {weights}: this model's backbone has no {whose} of its own; "
                "name published ones or a file, or leave --weights out"
            )
        return resolve(own, None)
    if weights.startswith(TIMM):
        from boxwright.models.backbones import from_timm

        licence, permissive = from_timm.licence(weights.removeprefix(TIMM))
        return FromTimm(weights, licence, permissive)
    if weights.startswith(TORCHVISION):
        return find(weights)
    path = Path(weights).expanduser()
    if path.exists():
        return path
    if found := _look_up(weights):
        return found
    raise UserError(f"no weights at {path} (looked in {Path.cwd()}).{_hint(weights)}")


def licence_of(weights: str | None, model: str, backbone: str | None = None) -> tuple[str, bool]:
    """(licence, whether it is permissive) of what `--weights` names for this model; "unknown" for a file of one's own.

    Nothing is downloaded. What `start_from` would refuse is a `UserError` here too.
    """
    if weights is None:
        return "none: random weights", True
    chosen = resolve(weights, own_weights(model, backbone) if weights in OWN else None)
    return ("unknown", False) if isinstance(chosen, Path) else (chosen.licence, chosen.permissive)


def own_weights(model: str, backbone: str | None = None) -> str | None:
    """The name of the published weights that a detector's backbone was made for; None where it has none."""
    if backbone and backbone.startswith((TIMM, TORCHVISION)):
        return backbone
    import torch

    options: dict[str, Any] = {"backbone": backbone} if backbone else {}
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, that tensors there have shapes but no values: as is meant
        detector = registry.build(model, num_classes=1, **options)
    return getattr(detector.get_submodule("backbone.body"), "weights_name", None)


def _look_up(name: str) -> Weights | None:
    if name in PUBLISHED:
        return PUBLISHED[name]
    if name.startswith(TORCHVISION):
        model, _, variant = name.removeprefix(TORCHVISION).partition(".")
        if f"{model}_coco" in PUBLISHED:
            return PUBLISHED[f"{model}_coco"]
    else:
        model, variant = name.removesuffix("_imagenet"), ""
    return _classifier(model, variant) if model != name and model in _classifiers() else None


def _hint(name: str) -> str:
    if name.startswith(TORCHVISION):
        hint = registry.nearest(name.removeprefix(TORCHVISION), _classifiers())
        return hint.replace("mean '", f"mean '{TORCHVISION}") or " Its names: torchvision.models.list_models()"
    hint = registry.nearest(name, [*PUBLISHED, *(f"{known}_imagenet" for known in _classifiers())])
    return hint or f" Published ones: {', '.join(PUBLISHED)}, {TORCHVISION}NAME, {TIMM}NAME."


@cache
def _classifiers() -> frozenset[str]:
    import torchvision

    return frozenset(torchvision.models.list_models(module=torchvision.models))


def _classifier(name: str, variant: str) -> Weights:
    import torchvision

    versions: Any = torchvision.models.get_model_weights(name)
    if variant and variant not in versions.__members__:
        known = ", ".join(version.name for version in versions)
        raise UserError(
            f"torchvision has no {variant} of {name}.{registry.nearest(variant, versions.__members__)} It has {known}."
        )
    entry = versions[variant] if variant else versions.DEFAULT
    # Only SWAG's say a licence of their own there: https://github.com/facebookresearch/SWAG/blob/main/LICENSE
    swag = "license" in entry.meta
    return Weights(
        f"{TORCHVISION}{name}.{variant}" if variant else f"{name}_imagenet",
        url=entry.url,
        sha256=entry.url.removesuffix(".pth").rpartition("-")[2],
        size=None,
        licence="CC-BY-NC-4.0" if swag else "BSD-3-Clause",  # torchvision's own, as above
        source=entry.meta["recipe"],
        permissive=not swag,
        fits=(f"{TORCHVISION}{name}",),
    )

"""The weights that training starts from: published ones by name, or a file of any known kind, with an account."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from boxwright import download
from boxwright.models import checkpoint
from boxwright.models.published import OWN, TIMM, TORCHVISION, FromTimm, Weights, resolve
from boxwright.models.tensors import Tensors, listed, read_tensors
from boxwright.models.vit import ViT
from boxwright.models.weights import Account, fitted, load, load_vit, matches
from boxwright.types import UserError

BODY = "backbone.body"
# Layers that depend on the classes: left as initialised where the file's are for another number of them.
CLASS_HEADS = ("roi_heads.*cls_score.*", "roi_heads.*bbox_pred.*", "head.*cls_logits.*")
PIXEL_BUFFERS = ("pixel_mean", "pixel_std")  # torchvision keeps them outside of its state dict
VIT_ENDS = ("head.*", "fc_norm.*", "neck.*")  # of classifiers, and of Segment Anything's encoder
# Names of torchvision before 0.13, which its published COCO detectors still have.
OLDER_NAMES = (
    (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)", r"\1.0.\2"),
    (r"(rpn\.head\.conv)\.(weight|bias)", r"\1.0.0.\2"),
)


@dataclass(frozen=True)
class Origin:
    """Where a detector's first weights come from."""

    text: str  # for a person
    sources: list[str]  # for the checkpoint: file or name, with licence


def start_from(
    detector: nn.Module,
    weights: str | None,
    *,
    model: str | None = None,
    backbone: str | None = None,
    require_license: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Origin:
    """Load what `--weights` names into the detector and say what became of every tensor.

    `weights` is None, a file, a published name (`published.find`), `timm:NAME`, or `pretrained` for what the
    backbone's own weights are called (its `weights_name`, else `backbone`). `model` is the detector's registered name,
    for messages. Neither a known name nor a file that fits, and, before anything is downloaded, a licence that
    `require_license` ("permissive") does not allow, is a `UserError`.
    """
    if weights is None:
        return Origin("from random weights", [])
    chosen = resolve(weights, _own_weights(detector, backbone) if weights in OWN else None)
    _require_licence(chosen, require_license)
    if isinstance(chosen, Path):
        tensors = read_tensors(chosen)
        source, sources = _describe_file(chosen, tensors, model)
    else:
        if not chosen.permissive:
            say(f"licence {chosen.licence}: {_terms(chosen.licence)}")
        tensors, source = _published(chosen, say)
        sources = [source]
    account = load_into(detector, tensors, source)
    return Origin(f"from {account}", sources)


def load_into(detector: nn.Module, tensors: Tensors, source: str) -> Account:
    """Recognise by their names what the tensors are of, in this order, and load what fits.

    1. a detector of detectron2's: its names become ours;
    2. a detector, that is `backbone.` before names: ours, torchvision's (also under its older names), or one of the
       article's codebase, whose trunk is `backbone.net` (ViTDet) or follows `backbone.` (backbones of one map);
    3. for a plain ViT of ours: a masked autoencoder, or a classifier of the same architecture;
    4. for a backbone from timm: what timm's own adapter takes;
    5. a classifier of torchvision's or a bare backbone, with or without `features.` before its names.
    """
    from boxwright.models import detectron2

    tensors = _bare(tensors)
    body = detector.get_submodule(BODY)
    if detectron2.looks_like(tensors):
        ours, notes = detectron2.to_ours(tensors)
        return _load_detector(detector, Tensors(ours, notes=(*tensors.notes, *notes)), source)
    if any(name.startswith("backbone.") for name in tensors):
        return _load_detector(detector, _our_names(tensors, body), source)
    if isinstance(body, ViT):
        return load_vit(body, tensors, source=source, may_leave=VIT_ENDS)
    if str(getattr(body, "weights_name", "")).startswith(TIMM):
        from boxwright.models.backbones import from_timm

        adapted = from_timm.adapt(body, tensors)
        last = _without_net(list(body.state_dict())[-1]).partition(".")[0]  # within which the body may end
        may_leave = [*_behind(adapted, body, _without_net), f"{last}.*"]
        return load(body, adapted, source=source, may_leave=may_leave)
    may_leave = _behind(tensors, body, _without_features)
    return load(body, tensors, source=source, rename=_without_features, may_leave=may_leave)


# ------ Whose weights, under which licence


def _own_weights(detector: nn.Module, backbone: str | None) -> str | None:
    named = getattr(detector.get_submodule(BODY), "weights_name", None)
    return named or (backbone if backbone and backbone.startswith((TIMM, TORCHVISION)) else None)


def _require_licence(chosen: Path | Weights | FromTimm, required: str | None) -> None:
    if required is None:
        return
    if required != "permissive":
        raise UserError(f"--require-license {required!r} is not known; it can be 'permissive'")
    if isinstance(chosen, Path):
        raise UserError(
            f"--require-license permissive: the licence of the file {chosen} is not known; name published weights, "
            "or read the file's terms and leave --require-license out"
        )
    if not chosen.permissive:
        raise UserError(
            f"--require-license permissive: {chosen.name} has the licence {chosen.licence} "
            f"({_terms(chosen.licence)}); name other weights, or leave --require-license out"
        )


def _terms(licence: str) -> str:
    if "-NC" in licence.upper():
        return "not for commercial use"
    if "-SA" in licence.upper():
        return "what is made from it is to be passed on under the same licence"
    return "read its terms before use"


def _published(chosen: Weights | FromTimm, say: Callable[[str], None]) -> tuple[Tensors, str]:
    if isinstance(chosen, FromTimm):
        from boxwright.models.backbones import from_timm

        return from_timm.pretrained(chosen.name.removeprefix(TIMM))
    path = download.fetch(chosen, progress=download.told(chosen, say, terms=chosen.licence))
    return read_tensors(path), f"{chosen.name} ({chosen.licence}, {chosen.source})"


def _describe_file(path: Path, tensors: Tensors, model: str | None) -> tuple[str, list[str]]:
    """A file for a person, and what is to be remembered of it: a checkpoint of ours tells where its own start was."""
    if checkpoint.KEY not in tensors.metadata:
        return str(path), [str(path)]
    header = checkpoint.read_header(path)
    if checkpoint.digest(tensors) != header.sha256:
        raise UserError(f"{path} is damaged: its tensors are not those that were saved. Copy it again from its source")
    other = f", not {model}" if model not in (None, header.model) else ""
    return f"{path} ({header.model}{other}; {listed(header.classes)})", [str(path), *header.weights_from]


# ------ Detectors


def _load_detector(detector: nn.Module, tensors: Tensors, source: str) -> Account:
    """The backbone's body must fit; pyramid and heads are taken part by part, each whole or not at all.

    Half of a head, or one layer of two, would be noise with a good name. Class layers of another number of classes do
    not count: they are left as initialised.
    """
    own = detector.state_dict()
    tensors = fitted(tensors, own, source)
    parts = {_part(name) for name in (*own, *tensors) if not name.startswith(f"{BODY}.")}
    foreign = {part for part in parts if not _is_whole(part, own, tensors)}
    used = [part for part in sorted(foreign) if any(_part(name) == part for name in tensors)]
    if used:
        tensors.notes += (f"of another form in the file, left whole: {', '.join(used)}",)
    return load(
        detector,
        tensors,
        source=source,
        rename=lambda name: None if _part(name) in foreign else name,
        may_miss=(*CLASS_HEADS, *PIXEL_BUFFERS, *(f"{part}.*" for part in foreign)),
        may_leave=(*(f"{part}.*" for part in foreign), *_behind(tensors, detector.get_submodule(BODY), _in_body)),
    )


def _part(name: str) -> str:
    """`rpn.head` of `rpn.head.conv.0.0.weight`: the first two words."""
    return ".".join(name.split(".")[:2])


def _is_whole(part: str, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the file has all of a part but its class layers, in the same shapes, and nothing more."""

    def shapes(of: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        names = [name for name in of if _part(name) == part and not name.endswith("num_batches_tracked")]
        return {name: tuple(of[name].shape) for name in names}

    wanted, found = shapes(own), shapes(tensors)
    return wanted.keys() == found.keys() and all(
        shape == found[name] for name, shape in wanted.items() if not matches(name, CLASS_HEADS)
    )


# ------ Names


def _bare(tensors: Tensors) -> Tensors:
    """Without `model.` or `ema.` before every name of a detector, where Lightning and others put it."""
    for prefix in ("model.", "ema."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            names = {name: name.removeprefix(prefix) for name in tensors}
            return _renamed(tensors, names, f"'{prefix}' taken off")
    return tensors


def _our_names(tensors: Tensors, body: nn.Module) -> Tensors:
    """A detector's tensors under the names that ours has."""
    logits, boxes = "head.classification_head.cls_logits.bias", "head.regression_head.bbox_reg.bias"
    if logits in tensors and boxes in tensors and "pixel_mean" not in tensors:  # which all of ours have
        from boxwright.models.detectors.dense import published_tensors

        tensors = Tensors(
            published_tensors(tensors), notes=(*tensors.notes, "class logits without torchvision's class 0")
        )
    patterns = list(OLDER_NAMES)
    # The article's codebase: its ViTDet; and any other trunk, whose layers may be counted where ours have names.
    patterns += [(r"backbone\.net\.(.+)", rf"{BODY}.\1"), (r"backbone\.(simfp_.+)", r"backbone.fpn.\1")]
    layers = [name for name, _ in body.named_children()]
    counted = [(str(i), name) for i, name in enumerate(layers) if str(i) not in layers]
    patterns += [(rf"backbone\.{i}\.(.+)", rf"{BODY}.{name}.\1") for i, name in counted]
    patterns += [(r"backbone\.(?!body\.|fpn\.)(.+)", rf"{BODY}.\1")]
    names = {name: _first_match(name, patterns) for name in tensors}
    changed = [f"{name} → {ours}" for name, ours in names.items() if name != ours]
    return _renamed(tensors, names, f"renamed: {listed(changed, 1)}") if changed else tensors


def _first_match(name: str, patterns: Iterable[tuple[str, str]]) -> str:
    for pattern, target in patterns:
        if found := re.fullmatch(pattern, name):
            return found.expand(target)
    return name


def _renamed(tensors: Tensors, names: Mapping[str, str], note: str) -> Tensors:
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise UserError(
            f"the file holds tensors under an older and a present name at once ({note}): it is not one model's"
        )
    return Tensors(renamed, notes=(*tensors.notes, note))


def _without_features(name: str) -> str:
    return name.removeprefix("features.")  # torchvision's classifiers keep their layers under it


def _without_net(name: str) -> str:
    return name.removeprefix("net.")  # our bodies keep a net from timm under it


def _in_body(name: str) -> str | None:
    return name.removeprefix(f"{BODY}.") if name.startswith(f"{BODY}.") else None


def _behind(tensors: Iterable[str], body: nn.Module, rename: Callable[[str], str | None]) -> list[str]:
    """Names of what may stand behind the end of a backbone, which has no place for it: further layers, a head.

    What it lacks of a layer that it has is no such thing: that belongs to a deeper backbone.
    """
    own = {(rename(name) or name).partition(".")[0] for name in body.state_dict()}
    layers = {name: bare.partition(".")[0] for name in tensors if (bare := rename(name)) is not None}
    return [glob.escape(name) for name, layer in layers.items() if layer not in own]

"""Backbones from timm by name: plain ViTs in ViTDet's form, all others as their maps by stride; and their weights."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from boxwright.models.backbones.vitdet_form import WINDOW, Body, ViTDetForm
from boxwright.models.pyramid import Maps
from boxwright.models.tensors import Tensors, listed, read_tensors
from boxwright.registry import nearest
from boxwright.types import Size, UserError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # timm's own, on import
    import huggingface_hub
    import timm
    from timm.layers.norm_act import freeze_batch_norm_2d
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

PLAIN = (VisionTransformer, VisionTransformerDistilled, Eva)  # classes whose layers ViTDetForm knows how to run
ANY_SIZE = {"dynamic_img_size": True, "strict_img_size": False}  # what timm's classes call taking any
SQUARE = (256, 256)  # px, on which the strides of a net's maps are seen
FINEST = 4  # a map of stride 2 costs more than all others together, and no pyramid begins below 4
PATCH = 16  # in place of one that is no power of two, such as 14, so that a pyramid's strides are
DECIDED_HERE = (
    "pretrained", "pretrained_cfg", "checkpoint_path", "features_only", "out_indices", "num_classes", "in_chans",
    "drop_path_rate", "patch_drop_rate", "use_naflex", "scriptable",
)  # fmt: skip
PERMISSIVE = ("apache-2.0", "mit", "bsd")  # beginnings of licences that allow use, change and sale


class Stages(Body):
    """A net from timm as its maps by stride: (B, 3, H, W) → {stride: (B, C, H/stride, W/stride)}.

    `taps` is {stride: which of the maps that the net can give}.
    """

    def __init__(self, net: nn.Module, taps: Mapping[int, int], channels: Mapping[int, int], **about: Any) -> None:
        super().__init__(**about)
        self.net = net
        self.taps = dict(taps)
        self.channels = dict(channels)

    def forward(self, images: Tensor) -> Maps:
        return dict(zip(self.taps, _maps(self.net, images, list(self.taps.values())), strict=True))


# ------ Building


def build(
    name: str,
    *,
    frozen: bool = False,
    norm: Literal["train", "frozen"] = "train",
    patch: int | None = None,
    window: int = WINDOW,
    global_blocks: Sequence[int] | None = None,
    drop_path: float | None = None,
    checkpoint_blocks: bool = False,
    **timm_options: Any,
) -> Body:
    """The body of timm's model `name` (a tag such as `.a1_in1k` may follow), with random weights.

    `frozen` trains nothing of it. `norm` "frozen" keeps BatchNorm's statistics and scales as they are loaded: right for
    published weights and a few pictures a step, wrong from random weights. `patch` (16 where the model's own is no
    power of two), `window` and `global_blocks` are for plain ViTs, see `ViTDetForm`. Other options go to timm. Unknown
    names and options, and models that give no maps for pictures of every size, are a `UserError`.
    """
    _require_known(name)
    _require_free(name, timm_options)
    if norm not in ("train", "frozen"):
        raise UserError(f"unknown norm {norm!r} of timm:{name}: wanted is train or frozen")
    outline = _outline(name, timm_options)
    options = {**timm_options, **_any_size(outline)}
    about = {"name": name, "mean": outline.pretrained_cfg["mean"], "std": outline.pretrained_cfg["std"]}
    if type(outline) in PLAIN:
        options |= _patched(outline, patch, name)
        body = ViTDetForm(
            _create(name, options),
            window=window,
            global_blocks=global_blocks,
            drop_path=drop_path or 0.0,
            checkpoint_blocks=checkpoint_blocks,
            options=options,
            **about,
        )
    else:
        if patch is not None or window != WINDOW or global_blocks is not None:
            raise UserError(f"timm:{name} is no plain ViT: patch, window and global_blocks are not for it")
        options |= {} if drop_path is None else {"drop_path_rate": drop_path}
        body = _stages(name, options, outline if options == timm_options else _outline(name, options), about)
        if checkpoint_blocks:
            _checkpoint(body.net, name)
    if norm == "frozen":
        freeze_batch_norm_2d(body)
    if frozen:
        body.freeze()
    return body


def _require_known(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(f"timm has no model {architecture!r}.{nearest(architecture, timm.list_models())}")
    tagged = timm.list_models(f"{architecture}.*", pretrained=True)
    if tag and name not in tagged:
        hint = nearest(name, tagged) or f" It has {listed(tagged) or 'none'}."
        raise UserError(f"timm's {architecture} has no weights {tag!r}.{hint}")


def _require_free(name: str, options: Mapping[str, Any]) -> None:
    for option in options:
        if option in DECIDED_HERE:
            way = " (say drop_path)" if option == "drop_path_rate" else ""
            raise UserError(f"timm:{name} as a backbone takes no option {option!r}: it is decided here{way}")


def _create(name: str, options: Mapping[str, Any], **how: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old names and on operators: nothing that a detector's user could mend
            return timm.create_model(name, num_classes=0, **options, **how)
    except Exception as error:  # whatever a constructor makes of options that are not for it
        given = f" with {dict(options)}" if options else ""
        raise UserError(f"timm does not build {name}{given}: {_first_line(error)}") from error


def _outline(name: str, options: Mapping[str, Any]) -> Any:
    """The model without memory behind its tensors: what is asked of it is only its shapes."""
    with torch.device("meta"):
        return _create(name, options).eval()


def _any_size(outline: nn.Module) -> dict[str, Any]:
    """The options by which its class takes pictures of any size."""
    classes = [kind for kind in type(outline).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]
    known = {option for kind in classes for option in inspect.signature(kind).parameters}
    return {option: value for option, value in ANY_SIZE.items() if option in known}


def _patched(outline: Any, patch: int | None, name: str) -> dict[str, Any]:
    """The options by which a plain ViT has that patch, and its table of positions as many cells as in training."""
    embed = outline.patch_embed
    own = int(embed.feat_ratio())
    patch = patch or (own if _is_power_of_two(own) else PATCH)
    if not _is_power_of_two(patch):
        raise UserError(f"a patch of {patch} gives a map of stride {patch}, which no pyramid stands on: try 8 or 16")
    if patch == own:
        return {}
    if not isinstance(embed, PatchEmbed):
        raise UserError(f"timm:{name} makes its tokens by convolutions of stride {own}: no other patch is possible")
    rows, columns = cast(tuple[int, int], embed.grid_size)
    return {"patch_size": patch, "img_size": (rows * patch, columns * patch)}


def _checkpoint(net: Any, name: str) -> None:
    try:
        net.set_grad_checkpointing()
    except (AttributeError, AssertionError) as error:
        raise UserError(f"timm:{name} cannot run its blocks again for their gradients (checkpoint_blocks)") from error


# ------ Maps by stride


def _stages(name: str, options: dict[str, Any], outline: nn.Module, about: Mapping[str, Any]) -> Stages:
    """The net with every map that it can give; what no map depends on is frozen, where it cannot be left out."""
    taps, channels, unused = _survey(outline, name)
    net = _pruned(_create(name, options), taps)
    for parameter in unused:
        net.get_parameter(parameter).requires_grad_(False)
    return Stages(net, taps, channels, options=options, **about)


def _maps(net: Any, images: Tensor, indices: list[int] | None = None) -> list[Tensor]:
    """The net's intermediate maps (B, C, h, w): those of `indices`, or all."""
    return net.forward_intermediates(images, indices=indices, intermediates_only=True, output_fmt="NCHW")


def _pruned(net: Any, taps: Mapping[int, int]) -> nn.Module:
    """The net without what stands behind the last of its taps: layers, last norm, classifier."""
    net.prune_intermediate_layers(list(taps.values()), prune_norm=True)
    return net


def _survey(outline: nn.Module, name: str) -> tuple[dict[int, int], dict[int, int], list[str]]:
    """{stride: index of its last map}, {stride: channels}, and the parameters that none of these maps depends on.

    A net whose maps are not the picture's size divided by a power of two, at every size that its coarsest stride
    divides, is a `UserError`.
    """
    square = _tried(outline, SQUARE, name)
    last = {round(SQUARE[0] / shape[2]): i for i, shape in enumerate(square)}
    taps = {stride: last[stride] for stride in sorted(last) if stride >= FINEST}
    coarsest = max(last)
    oblong = (3 * coarsest, 5 * coarsest)  # no power of two: what only fits 256 px shows
    for size, shapes in ((SQUARE, square), (oblong, _tried(outline, oblong, name))):
        for stride, i in taps.items():
            if not _is_power_of_two(stride) or shapes[i][2:] != (size[0] / stride, size[1] / stride):
                raise UserError(
                    f"timm:{name} is no backbone for detection: of {size[0]}x{size[1]} px it makes a map of "
                    f"{shapes[i][2]}x{shapes[i][3]}, which no stride of 4, 8, 16, ... gives"
                )
    return taps, {stride: square[i][1] for stride, i in taps.items()}, _unused(_pruned(outline, taps), taps, oblong)


def _unused(net: nn.Module, taps: Mapping[int, int], size: Size) -> list[str]:
    """The parameters that no map depends on in training; in evaluation some nets keep what they made of theirs."""
    maps = _maps(net.train(), _empty(size, 2), list(taps.values()))  # two pictures: what normalises 1x1 wants them
    torch.stack([level.mean() for level in maps]).sum().backward()
    return [name for name, parameter in net.named_parameters() if parameter.grad is None]


def _tried(outline: nn.Module, size: Size, name: str) -> list[tuple[int, ...]]:
    """The shapes of all maps of a picture of that size."""
    try:
        with torch.no_grad():
            return [tuple(m.shape) for m in _maps(outline, _empty(size))]
    except Exception as error:  # each net has its own way to fail on a size that it is not made for
        raise UserError(
            f"timm:{name} is no backbone for detection: it does not take pictures of every size "
            f"(at {size[0]}x{size[1]} px: {_first_line(error)})"
        ) from error


def _empty(size: Size, pictures: int = 1) -> Tensor:
    return torch.empty(pictures, 3, *size, device="meta")


# ------ Weights


def adapt(body: nn.Module, tensors: Mapping[str, Tensor]) -> Tensors:
    """`tensors` of any layout that timm knows for the body's model (its own, the authors') under the body's names.

    timm's own filter for that model renames them and resamples patches and tables to the body's sizes; `notes` says
    what it changed. What the body has no place for keeps its name. Raises UserError where the filter fails.
    """
    assert isinstance(body, Body), "only for what `build` gave"
    reference, fit = _filter_of(body)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # one of the filters prints
            fitted = fit(dict(tensors), reference)
    except Exception as error:  # each filter has its own way to fail on another model's tensors
        raise UserError(f"these are no weights of {body.weights_name}: {_first_line(error)}") from error
    own = body.state_dict()
    prefix = "net." if isinstance(body, Stages) else ""
    renamed = {prefix + name if prefix + name in own else name: tensor for name, tensor in fitted.items()}
    earlier = tensors.notes if isinstance(tensors, Tensors) else ()
    return Tensors(renamed, notes=(*earlier, *_changes(tensors, fitted)))


def _filter_of(body: Body) -> tuple[nn.Module, Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]]:
    """timm's model as the body has it, of no memory, and what timm would do to tensors before it loads them there.

    timm hands that filter only to its own loader, so for this one call another stands in the loader's place.
    """
    builder: Any = importlib.import_module("timm.models._builder")
    caught: list[Any] = []

    def catch(model: nn.Module, *, filter_fn: Any = None, **_: Any) -> None:
        caught.append(filter_fn)

    loader, builder.load_pretrained = builder.load_pretrained, catch
    try:
        with torch.device("meta"):
            reference = _create(body.weights_name.removeprefix("timm:"), body.options, pretrained=True)
    finally:
        builder.load_pretrained = loader
    return reference, next((fit for fit in caught if fit), lambda tensors, _: tensors)


def _changes(found: Mapping[str, Tensor], fitted: Mapping[str, Tensor]) -> list[str]:
    """What a filter made of the tensors, by name and identity."""
    names = {id(tensor): name for name, tensor in found.items()}
    notes: list[str] = []
    rewritten: list[str] = []
    for name, tensor in fitted.items():
        before = next((found[key] for key in found if key == name or key.endswith(f".{name}")), None)
        if id(tensor) not in names and before is not None and before.shape != tensor.shape:
            notes.append(f"{name} resampled from {tuple(before.shape)} to {tuple(tensor.shape)}")
        elif id(tensor) not in names:
            rewritten.append(name)
    kept = {names[id(tensor)] for tensor in fitted.values() if id(tensor) in names}
    renamed = sorted(kept - set(fitted))
    left = [name for name in found if name not in kept and name not in fitted]
    for what, which in (("rewritten", rewritten), ("renamed", renamed), ("left out or merged", left)):
        if which:
            notes.append(f"{len(which)} {what} as timm does: {listed(which)}")
    return notes


def pretrained(name: str) -> tuple[Tensors, str]:
    """timm's published weights of that name, as they are in their file, and in words where they are from.

    They come through huggingface-hub into its own cache, as safetensors only; BOXWRIGHT_OFFLINE allows only what is
    there already. `adapt` fits them to a body. Raises UserError, with the ways out, where they cannot be had.
    """
    _require_known(name)
    config: Any = timm.get_pretrained_cfg(name)
    repository, _, revision = (config.hf_hub_id or "").partition("@")
    file = _safetensors(config.hf_hub_filename)
    if not repository or not file or config.custom_load:
        where = f"https://huggingface.co/{repository}" if repository else config.url
        raise UserError(
            f"timm publishes no weights of {name} as safetensors"
            + (f", only at {where}: download them and name the file with --weights FILE" if where else "")
        )
    page = f"https://huggingface.co/{repository}"
    offline = os.environ.get("BOXWRIGHT_OFFLINE", "0") not in ("", "0")
    try:
        path = huggingface_hub.hf_hub_download(repository, file, revision=revision or None, local_files_only=offline)
    except Exception as error:  # of the network, the server, the disk: the hub has dozens
        reason = "BOXWRIGHT_OFFLINE forbids it" if offline else _first_line(error)
        raise UserError(f"cannot download {file} of {page}: {reason}; name a local copy with --weights FILE") from error
    return read_tensors(Path(path)), f"timm's {repository.rpartition('/')[2]} ({licence(name)[0]}, {page})"


def _safetensors(file: str | None) -> str | None:
    """The name under which the hub has the same weights as safetensors."""
    if file is None:
        return "model.safetensors"
    stem, _, kind = file.rpartition(".")
    if file == "open_clip_pytorch_model.bin":
        return "open_clip_model.safetensors"
    return f"{stem}.safetensors" if kind in ("bin", "safetensors") else None


def matching(pattern: str) -> dict[str, str]:
    """timm's names that match a pattern such as `*dinov3*`, with tags where there are weights, and their licences.

    A pattern that nothing matches is a `UserError`.
    """
    tagged = timm.list_models(pattern, pretrained=True) or timm.list_models(f"{pattern}.*", pretrained=True)
    bare = [name for name in timm.list_models(pattern) if not any(t.startswith(f"{name}.") for t in tagged)]
    if not tagged and not bare:
        raise UserError(f"no model of timm matches {pattern!r}.{nearest(pattern.strip('*'), timm.list_models())}")
    return {name: licence(name)[0] for name in tagged} | dict.fromkeys(bare, "no weights")


def licence(name: str) -> tuple[str, bool]:
    """The licence that timm gives for the published weights, and whether it allows use, change and sale."""
    _require_known(name)
    config: Any = timm.get_pretrained_cfg(name)
    known = config.license or "unknown"
    return known, known.lower().startswith(PERMISSIVE)


def _is_power_of_two(stride: int) -> bool:
    return stride > 0 and stride & (stride - 1) == 0


def _first_line(error: Exception) -> str:
    return textwrap.shorten(str(error).partition("\n")[0], 150) or type(error).__name__

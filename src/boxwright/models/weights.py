"""Tensors into a module by name and shape, with an account of every one; ViT tables fitted to the module's sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boxwright.models.tensors import Tensors, listed
from boxwright.types import UserError

COUNTERS = (
    "num_batches_tracked",
    "*.num_batches_tracked",
)  # BatchNorm's; files before PyTorch 0.4.1 lack them, and a frozen BatchNorm has none
DETECTOR_PREFIXES = ("", "model.", "ema.")  # Lightning and others put the model under an attribute


class Mismatch(NamedTuple):
    """A tensor that both have, in another shape or kind."""

    name: str  # in the module
    found: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.name} (in the file {self.found}, in the model {self.wanted})"


@dataclass(frozen=True)
class Account:
    """What became of every tensor.

    Each of the module's is used, missing or mismatched; each of the file's is used, mismatched or unexpected.
    """

    source: str
    used: int
    missing: tuple[str, ...]  # of the module, left as they were
    unexpected: tuple[str, ...]  # of the file, not used
    mismatched: tuple[Mismatch, ...]  # left as they were
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Tensors of the module."""
        return self.used + len(self.missing) + len(self.mismatched)

    def check(self, minimum_fraction: float) -> Account:
        """Itself; UserError where none, or less than this fraction, of the module's tensors were found."""
        lacking = [*self.missing, *(mismatch.name for mismatch in self.mismatched)]
        if not self.used or self.used < minimum_fraction * self.total:
            raise UserError(
                f"{self.source}: matched {self.used} of {self.total} tensors: "
                f"these weights are for another architecture (missing: {listed(lacking, 2) or 'none'}; "
                f"in the file instead: {listed(self.unexpected, 2) or 'nothing else'})"
            )
        return self

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.used} of {self.total} tensors loaded"]
        if self.missing:
            lines.append(f"  left as initialised ({len(self.missing)}): {listed(self.missing)}")
        if self.mismatched:
            others = listed([str(mismatch) for mismatch in self.mismatched])
            lines.append(f"  of another shape, left as initialised ({len(self.mismatched)}): {others}")
        if self.unexpected:
            lines.append(f"  not used from the file ({len(self.unexpected)}): {listed(self.unexpected)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def load(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    rename: Callable[[str], str | None] | None = None,
    may_miss: Sequence[str] = (),
    may_leave: Sequence[str] = ("*",),
) -> Account:
    """Copy `tensors` into `module` by name and shape, in the module's own dtypes.

    `rename` gives the module's name for a name of the file, None to leave it out. Tensors of the module that
    match a pattern of `may_miss` ("*.cls_score.*") may be missing or of another shape, and keep their values;
    tensors of the file that match one of `may_leave` may stay unused. Anything else raises UserError, before
    any change.
    """
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    names, notes = _names(tensors, own, rename, source)
    mismatched = tuple(
        Mismatch(name, _kind(tensors[original]), _kind(own[name]))
        for name, original in names.items()
        if not _same_kind(tensors[original], own[name])
    )
    used = {name: tensors[original] for name, original in names.items() if _same_kind(tensors[original], own[name])}
    account = Account(
        source,
        used=len(used),
        missing=tuple(name for name in own if name not in names),
        unexpected=tuple(sorted(set(tensors) - set(names.values()))),
        mismatched=mismatched,
        notes=(*(tensors.notes if isinstance(tensors, Tensors) else ()), *notes),
    )
    _require_allowed(account, (*COUNTERS, *may_miss), (*COUNTERS, *may_leave))
    module.load_state_dict(used, strict=False)
    return account


def _names(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    rename: Callable[[str], str | None] | None,
    source: str,
) -> tuple[dict[str, str], tuple[str, ...]]:
    """The file's name for each of the module's that it has."""
    for prefix in DETECTOR_PREFIXES:
        if not all(name.startswith(prefix) for name in tensors):
            continue
        bare = {original: original.removeprefix(prefix) for original in tensors}
        pairs = [(rename(name) if rename else name, original) for original, name in bare.items()]
        known = [(name, original) for name, original in pairs if name is not None and name in own]
        if known:
            names = dict(known)
            if len(names) < len(known):
                raise UserError(f"{source}: two of its tensors would both become {_twice([n for n, _ in known])}")
            return names, (f"'{prefix}' taken off",) if prefix else ()
    return {}, ()


def _twice(names: Sequence[str]) -> str:
    return next(name for i, name in enumerate(names) if name in names[:i])


def _same_kind(found: Tensor, wanted: Tensor) -> bool:
    return found.shape == wanted.shape and found.is_floating_point() == wanted.is_floating_point()


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _require_allowed(account: Account, may_miss: Sequence[str], may_leave: Sequence[str]) -> None:
    missing = [name for name in account.missing if not matches(name, may_miss)]
    mismatched = [str(m) for m in account.mismatched if not matches(m.name, may_miss)]
    left = [name for name in account.unexpected if not matches(name, may_leave)]
    account.check(0.5 if missing or mismatched else 0)
    for names, fault in (
        (mismatched, "are of another shape"),
        (missing, "of the model are missing"),
        (left, "have no place in the model"),
    ):
        if names:
            raise UserError(f"{account.source}: {len(names)} tensors {fault}: {listed(names)}")


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a tensor's name fits one of the patterns, whose stars match dots too."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


# What ViTDet adds to the encoder that MAE trains, and what it leaves of it (Li et al., arXiv:2203.16527).
VITDET_ADDS = ("blocks.*.attn.rel_pos_h", "blocks.*.attn.rel_pos_w")
VITDET_LEAVES = ("cls_token", "norm.weight", "norm.bias", "mask_token", "decoder_*")
WITHOUT_POSITIONS = ("pos_embed", *VITDET_ADDS)  # where the detector's ViT was built without them


def load_vit(
    vit: nn.Module, tensors: Mapping[str, Tensor], *, source: str = "MAE weights", may_leave: Sequence[str] = ()
) -> Account:
    """Load a plain ViT's encoder, such as a masked autoencoder's, into the ViT of a detector.

    Tables of another size are resampled (`fitted`); relative positions that the file lacks keep their zeros; class
    token, last norm and decoder are left out, and what matches `may_leave`. Raises UserError on all else that is
    missing or left over.
    """
    adapted = fitted(tensors, vit.state_dict(), source)
    may_leave = (*VITDET_LEAVES, *WITHOUT_POSITIONS, *may_leave)
    return load(vit, adapted, source=source, may_miss=VITDET_ADDS, may_leave=may_leave)


def fitted(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> Tensors:
    """`tensors` with a ViT's tables at the sizes of `own`, where the names say that they are such; notes say which.

    Position tables (`pos_embed`, torchvision's `pos_embedding`) are resampled bicubically, relative ones (`rel_pos_h`,
    `rel_pos_w`) linearly, patch embeddings (`patch_embed.proj.weight`) by the pseudo-inverse of resizing the patch.
    """
    adapted = Tensors(tensors, notes=tensors.notes if isinstance(tensors, Tensors) else ())
    resampled: dict[str, list[str]] = {}
    for name, found in tensors.items():
        wanted = own.get(name)
        if wanted is None or found.shape == wanted.shape:
            continue
        table = name.rpartition(".")[2]
        if table in ("pos_embed", "pos_embedding"):
            adapted[name], notes = _fit_positions(found, wanted, source)
            adapted.notes += notes
        elif table in ("rel_pos_h", "rel_pos_w") and found.ndim == 2 and found.shape[1] == wanted.shape[1]:
            adapted[name] = F.interpolate(found.float().T[None], size=len(wanted), mode="linear")[0].T
            resampled.setdefault(f"from {len(found)} to {len(wanted)} rows", []).append(name)
        elif name.endswith("patch_embed.proj.weight") and found.ndim == 4 and found.shape[:2] == wanted.shape[:2]:
            old, new = tuple(found.shape[2:]), tuple(wanted.shape[2:])
            adapted[name] = resize_patches(found, (new[0], new[1]))
            adapted.notes += (f"patch embedding resampled from {old[0]}×{old[1]} to {new[0]}×{new[1]} px",)
    adapted.notes += tuple(f"relative positions resampled {how}: {listed(names)}" for how, names in resampled.items())
    return adapted


def resize_patches(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """A patch embedding (D, C, P, P) for patches of `size`: (D, C, *size), float32.

    Its answer to a patch that was enlarged is the answer to the patch before (exactly), to one that was made smaller
    nearly so: the pseudo-inverse resize of FlexiViT (Beyer et al., 2023, arXiv:2212.08013, section 3.4).
    """
    height, width = kernel.shape[2:]
    if (height, width) == size:
        return kernel.float()
    pixels = torch.eye(height * width).reshape(-1, 1, height, width)  # one patch for each pixel of the old ones
    resize = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).flatten(1).double()  # (old px, new px)
    resized = kernel.flatten(2).double() @ torch.linalg.pinv(resize).T  # (D, C, new px)
    return resized.reshape(*kernel.shape[:2], *size).float()


def _fit_positions(found: Tensor, own: Tensor, source: str) -> tuple[Tensor, tuple[str, ...]]:
    """`found` (1, T, D) on the grid of `own`, bicubic; where `own` has a class token, its row comes first.

    Some files keep the grid's two sides, (1, G, G, D), such as timm's of Segment Anything.
    """
    if found.ndim == 4 and found.shape[1] == found.shape[2]:
        found = found.flatten(1, 2)
    if found.shape == own.shape or found.ndim != 3 or found.shape[-1] != own.shape[-1]:
        return found, ()  # another width is another architecture, which `load` says
    (found_side, found_extra), (side, extra) = _grid(found, source), _grid(own, "the model")
    grid = found[:, found_extra:].float().unflatten(1, (found_side, found_side))  # (1, G, G, D)
    grid = grid.permute(0, 3, 1, 2)  # (1, D, G, G)
    if found_side != side:
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    first = found[:, :1].float() if found_extra else own[:, :1].float().cpu()  # (1, 1, D)
    table = torch.cat([first[:, :extra], grid.flatten(2).transpose(1, 2)], dim=1)  # (1, T, D)
    class_token = ("without", "with")
    return table, (
        f"positions fitted from a {found_side}×{found_side} grid {class_token[found_extra]} class token "
        f"to {side}×{side} {class_token[extra]}",
    )


def _grid(positions: Tensor, source: str) -> tuple[int, int]:
    """Side of the grid, and how many rows (0 or 1) stand before it for the class token."""
    tokens = positions.shape[1]
    for extra in (1, 0):
        side = math.isqrt(max(tokens - extra, 0))
        if side and side**2 == tokens - extra:
            return side, extra
    raise UserError(
        f"{source}: the position table has {tokens} tokens, neither a square grid nor one plus a class token; "
        "a grid that is not square cannot be resampled, because the file does not tell its height and width"
    )

"""detectron2's ViTDet weights under our names and in our order: (Cascade) (Mask) R-CNN, the mask head left out.

detectron2 puts the background behind the classes, where ours stands before them, and has no boxes for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

LEFT_OUT = {
    "roi_heads.mask_head.": "the mask head",
    "proposal_generator.anchor_generator.": "the anchors, which follow from the strides",  # in files of before 2020
    "pixel_": "the pixels' mean and deviation, which are ImageNet's",
}
RENAMED = (
    (r"^backbone\.net\.", r"backbone.body."),
    (r"^backbone\.simfp_", r"backbone.fpn.simfp_"),
    (r"^proposal_generator\.rpn_head\.conv\.conv(\d)\.", r"rpn.head.conv.\1.0."),
    (r"^proposal_generator\.rpn_head\.objectness_logits\.", r"rpn.head.cls_logits."),
    (r"^proposal_generator\.rpn_head\.anchor_deltas\.", r"rpn.head.bbox_pred."),
    (r"^roi_heads\.(box_head|box_predictor)\.(\d)\.", r"roi_heads.stages.\2.\1."),  # of a cascade
    (r"\bbox_head\.fc1\.", r"box_head.5."),  # after four convolutions and the flattening
    *((rf"\bbox_head\.conv{i + 1}\.norm\.", rf"box_head.{i}.1.") for i in range(4)),
    *((rf"\bbox_head\.conv{i + 1}\.", rf"box_head.{i}.0.") for i in range(4)),
)
LVIS = 1203  # classes of LVIS 1.0


def looks_like(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a ViTDet of detectron2."""
    names = list(names)
    return all(any(name.startswith(part) for name in names) for part in ("backbone.net.", "proposal_generator."))


def to_ours(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors of our `vitdet_*` and `cascade_vitdet_*`, and a note for each thing that was changed or left out.

    Tensors of unknown names keep theirs.
    """
    notes = ["detectron2's names and order made ours: the background is the first class"]
    taken = dict(tensors)
    for prefix, what in LEFT_OUT.items():
        if left := [name for name in taken if name.startswith(prefix)]:
            notes.append(f"left out: {what} ({len(left)} tensors)")
            taken = {name: tensor for name, tensor in taken.items() if name not in left}
    classes = {len(tensor) - 1 for name, tensor in taken.items() if name.endswith("cls_score.bias")}
    if LVIS in classes:
        notes.append("trained on LVIS with a sigmoid for each class: as a softmax, its scores mean little")
    return {_renamed(name): _reordered(name, tensor, classes) for name, tensor in taken.items()}, tuple(notes)


def _renamed(name: str) -> str:
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name


def _reordered(name: str, tensor: Tensor, classes: set[int]) -> Tensor:
    if re.search(r"\.box_predictor\.(\d\.)?cls_score\.", name):  # (K+1, ...)
        return torch.cat([tensor[-1:], tensor[:-1]])
    # A cascade's boxes (4, ...) are for all classes at once; others (K*4, ...) lack those of the background.
    if ".box_predictor.bbox_pred." in name and len(tensor) in {4 * count for count in classes}:
        return torch.cat([torch.zeros_like(tensor[:4]), tensor])
    return tensor

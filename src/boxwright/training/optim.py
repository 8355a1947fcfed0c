"""Which parameters learn how: groups with and without weight decay, the optimizer, the scaler for fp16."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from boxwright.config import Precision, Run
from boxwright.models.layers import decay_scales
from boxwright.types import UserError

UNDECAYED = ("pos_embed", "rel_pos", "relative_position", "_token")  # positions, class and register tokens


def make_optimizer(detector: nn.Module, run: Run) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, or AdamW; fused where the device has it."""
    groups = list(parameter_groups(detector, run.weight_decay, run.layer_decay))
    if run.optimizer == "sgd":
        fused = not run.shard  # PyTorch's fused SGD does not know parameters in pieces; its fused AdamW does
        return torch.optim.SGD(groups, lr=run.learning_rate, momentum=0.9, nesterov=True, fused=fused)
    return torch.optim.AdamW(groups, lr=run.learning_rate, fused=True)


def parameter_groups(detector: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> Iterator[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms, position embeddings and relative-position tables do not.

    The learning rate of a group is to be multiplied by its `scale`: with `layer_decay` below 1 the backbone's layers
    learn the slower the deeper they lie under the heads.
    """
    scales = decay_scales(detector, layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in detector.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim < 2 or any(part in name for part in UNDECAYED)
        groups.setdefault((scales[name], 0.0 if plain else weight_decay), []).append(parameter)
    for (scale, decay), parameters in groups.items():
        yield {"params": parameters, "weight_decay": decay, "scale": scale}


def autocast_type(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The type that matrix products run in, None for float32 throughout.

    `auto` is bf16 on a GPU that has it, fp16 on an older one, float32 on a CPU (where bf16 was measured slower).
    """
    if precision == "fp32" or (precision == "auto" and device.type != "cuda"):
        return None
    if precision == "fp16":
        if device.type != "cuda":
            raise UserError(f"--precision fp16 needs a CUDA GPU, and the device is {device}. Use bf16 or fp32")
        return torch.float16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        if precision == "bf16":
            raise UserError("--precision bf16: this GPU has no bf16. Use fp16")
        return torch.float16
    return torch.bfloat16

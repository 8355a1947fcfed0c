"""Whether a run can be gone on with: its states, its data, its options must be those that it had."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from boxwright.config import MAY_CHANGE, Run
from boxwright.data.dataset import Dataset, Split
from boxwright.types import UserError

# Where things are, not what they are.
FOLDERS = ("name", "project_dir", "exist_ok", "plugin", "data", "weights", "augment")


def identity(run: Run, dataset: Dataset, splits: Sequence[Split]) -> dict[str, Any]:
    """What must stay the same while a run goes on."""
    return {
        "data": {split.name: dataset.fingerprint(split) for split in splits},
        "classes": list(dataset.classes),
        "run": {k: v for k, v in run.model_dump(mode="json").items() if k not in MAY_CHANGE + FOLDERS},
    } | ({"augment": hashlib.sha256(run.augment.read_bytes()).hexdigest()} if run.augment else {})


def require_unborn(folder: Path, faults: Sequence[str]) -> None:
    """Refuse to begin again where something would be lost: a run that has weights or states, if spoilt ones."""
    weights = [name for name in ("last_model.safetensors", "best_model.safetensors") if (folder / name).exists()]
    if not weights and not faults:
        return
    reason = "; ".join(fault.partition(": the state before")[0] for fault in faults) or "its states are gone"
    hint = f" Start a new run with --weights {folder / weights[0]}" if weights else " Start a new run"
    raise UserError(f"{folder} cannot be gone on with: {reason}.{hint}")


def require_same(saved: dict[str, Any], found: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with other data or classes than the state was made with."""
    if saved["classes"] != found["classes"]:
        raise UserError(f"{folder} was saved with the classes {saved['classes']}, the data now has {found['classes']}")
    defaults = Run.model_construct().model_dump(mode="json")  # of options that there were not when it was saved
    before, now = {**defaults, **saved.get("run", {})}, found["run"]
    other = [k for k in now if before[k] != now[k]]
    if other:
        what = ", ".join(f"{k} was {before.get(k)!r}, now {now[k]!r}" for k in other)
        raise UserError(f"run.yaml is not what {folder} was saved with: {what}. Put it back, or start a new run")
    if saved.get("augment") != found.get("augment"):
        raise UserError(f"the file of --augment is not what {folder} was saved with. Put it back, or start a new run")
    changed = [name for name, value in found["data"].items() if saved["data"].get(name) != value]
    if changed:
        raise UserError(
            f"the data has changed since {folder} was saved ({' and '.join(changed)}: other pictures or objects). "
            "Put it back, or start a new run from its weights with --weights"
        )

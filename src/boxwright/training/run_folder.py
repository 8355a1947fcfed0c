"""Where a run writes, and how: each file complete under its name.

outputs/training/<name>/
├── run.yaml  env.json  train.log
├── metrics.jsonl            one line a log step or evaluation
├── results.csv              one row an evaluation
├── best_model.safetensors   last_model.safetensors
├── state/                   what an exact resume needs: the newest two, each complete or absent
├── previews/                first_batch.jpg  validation.jpg
├── plots/                   map.png  loss.png  learning_rate.png
├── evaluation/              of the best weights: scores.json  analysis.json  detections.json  pictures/
└── report.html              all of it on one page
"""

from __future__ import annotations

import csv
import json
import math
import platform
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torchvision
import yaml

from boxwright.config import Run
from boxwright.folders import claim, commit, held
from boxwright.runs import job
from boxwright.training.distributed import World
from boxwright.types import DiskFailed, UserError
from boxwright.version import __version__


def place(run: Run, world: World, stack: ExitStack) -> Path:
    """The folder that a run writes to, kept from other runs by the first rank; a new one unless it is resumed."""
    folder = None
    if world.first and not run.resume:
        folder = make_folder(run)
        stack.enter_context(held(folder))
    return Path(run.resume or world.from_first(folder) or "")


@contextmanager
def written(folder: Path) -> Generator[None]:
    """Around what writes into a run folder: a disk that is full, failing or gone is a `DiskFailed`."""
    try:
        yield
    except OSError as error:
        raise DiskFailed(
            f"cannot write {error.filename or folder} ({error.strerror or error}). The states in {folder / 'state'} "
            f"are whole; once the disk is well: boxwright train --resume {folder}"
        ) from error


def make_folder(run: Run) -> Path:
    """A new folder for the run, or with `exist_ok` an old one, still as it was."""
    folder = claim(run.project_dir, run.name, exist_ok=run.exist_ok)
    for name in ("previews", "plots"):
        (folder / name).mkdir(exist_ok=True)
    return folder


def check_space(folder: Path, model_bytes: int, copies: int) -> None:
    """Refuse to start where the run would not fit: a state has `copies` of the model's weights or their moments."""
    # Best and last weights, one of them being written; two states, one being written; and pictures.
    needed = (3 + 3 * copies) * model_bytes + 50_000_000
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    if free < needed:
        raise UserError(f"the disk of {folder} has {free / 1e6:.0f} MB free, this run needs {needed / 1e6:.0f} MB")


def write_run(folder: Path, run: Run, identity: Mapping[str, Any], device: torch.device, ranks: int = 1) -> None:
    """run.yaml and env.json, in the place of what an earlier run left here: nothing can be refused any more."""
    for name in ("metrics.jsonl", "results.csv", "train.log", "best_model.safetensors", "last_model.safetensors"):
        (folder / name).unlink(missing_ok=True)
    (folder / "report.html").unlink(missing_ok=True)
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    described = {**run.model_dump(mode="json"), "classes": identity["classes"]}
    write_text(folder / "run.yaml", yaml.safe_dump(described, sort_keys=False, allow_unicode=True))
    described = {**environment(device, identity["data"]), "ranks": ranks, "job": job()}
    write_text(folder / "env.json", json.dumps(described, indent=1) + "\n")


def environment(device: torch.device, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """What a result depends on besides the run: versions, machine, data."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "boxwright": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": dict(fingerprints),
    }


def write_text(path: Path, text: str) -> None:
    """Write a small file whole: under another name, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    commit(temporary, path)


def append_json(path: Path, values: dict[str, Any]) -> None:
    """One more line of JSON; numbers that JSON does not have become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def append_row(path: Path, values: dict[str, Any]) -> None:
    """One more row of a CSV, with a header in front of the first."""
    new = not path.exists() or not path.stat().st_size
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(values))
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()})


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of results.csv as numbers."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]

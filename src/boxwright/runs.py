"""Which run is meant: a new one, one to go on with, or a new one from an old one's weights. Loads no PyTorch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from boxwright.config import MAY_CHANGE, Run, make_run, read_run
from boxwright.errors import UserError

BEST = "best_model.safetensors"
WHERE = frozenset({"name", "project_dir", "exist_ok", "init_from"})  # of a command that is said again as it was


def settled(run: Run) -> Run:
    """The run with everything decided that its command line left to what is on the disk.

    Under torchrun this is to be asked by one process only: what it finds may be what another has just made.
    """
    if run.resume and run.init_from:
        raise UserError("--init-from begins a new run, --resume goes on with one: say one of them")
    if run.resume is None and restarted() and (folder := _folder_of_job(run)):
        return resumed(run.model_copy(update={"resume": folder}), leave=WHERE)
    if str(run.resume) == "auto":
        if not run.name:
            raise UserError("--resume auto goes on with the run of --name, which is missing")
        folder = run.project_dir / run.name
        if (folder / "run.yaml").is_file():
            return resumed(run.model_copy(update={"resume": folder}), leave=WHERE)
        given = {name: getattr(run, name) for name in run.model_fields_set - {"resume"}}
        return make_run(**{**given, "exist_ok": True})
    if run.resume is not None:
        return resumed(run)
    return started_from(run) if run.init_from else run


def of_folder(folder: Path) -> Run:
    """The run whose folder this is."""
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"no run at {folder} (looked in {Path.cwd()})")
    return read_run(folder)


def resumed(run: Run, *, leave: frozenset[str] = frozenset()) -> Run:
    """The run of the folder `run.resume`; options given beside it, but for `leave`, may change the machine only."""
    assert run.resume is not None
    folder = run.resume.expanduser()
    saved = of_folder(folder)
    options = {name: getattr(run, name) for name in run.model_fields_set - {"resume"} - leave}
    if options.get("batch") == "auto":  # it was settled when the run began
        del options["batch"]
    changed = [k for k, v in options.items() if k not in MAY_CHANGE and v != getattr(saved, k)]
    if changed:
        what = ", ".join(f"--{k.replace('_', '-')} was {getattr(saved, k)!r}, now {options[k]!r}" for k in changed)
        raise UserError(
            f"--resume goes on with the run of {folder} as it was: {what}. Leave it out, or start a new run "
            f"from its weights with --init-from {folder}"
        )
    return saved.model_copy(update={**options, "resume": folder})


def started_from(run: Run) -> Run:
    """A new run with the options of the run folder `init_from` where none are given, from its best weights."""
    assert run.init_from is not None
    folder = run.init_from.expanduser()
    if not folder.is_dir():
        raise UserError(f"no run at {folder} (looked in {Path.cwd()})")
    if not (folder / BEST).is_file():
        raise UserError(f"{folder} has no {BEST} to start from")
    if run.weights:
        raise UserError(f"--init-from {folder} brings weights of its own: leave out --weights")
    saved = read_run(folder).model_dump(mode="json", exclude={"name", "exist_ok", "project_dir", "weights", "recipe"})
    given: dict[str, Any] = {name: getattr(run, name) for name in run.model_fields_set - {"init_from"}}
    return make_run(**{**saved, **given, "weights": str(folder / BEST)})


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def job() -> str | None:
    """The name of the job that torchrun gave it, the same after every restart; None where it has none."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def ranks() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def first() -> bool:
    """Whether this process is the one that speaks and writes: alone, or the first of torchrun's."""
    return ranks() == 1 or os.environ.get("RANK", "0") == "0"


def _folder_of_job(run: Run) -> Path | None:
    """The run folder that this job's processes made before they were started again."""
    if not job():
        return None
    for described in run.project_dir.glob("*/env.json"):
        try:
            if json.loads(described.read_text(encoding="utf-8")).get("job") == job():
                return described.parent
        except (OSError, ValueError):
            continue
    return None

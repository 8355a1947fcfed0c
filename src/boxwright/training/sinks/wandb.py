"""Weights & Biases as a place that a run also logs to: only what is logged here is sent, and nothing without a key."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# Read at import: W&B would send its own faults too, and lose the last 15 seconds of an offline run that is killed.
os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "1")  # seconds
import wandb  # pyright: ignore[reportMissingImports] optional

from boxwright.training.sinks import keep_id, kept_id, one_line

CONNECT_SECONDS = 20.0  # that a run may wait at its start for the server
QUIET: dict[str, Any] = {"silent": True, "console": "off", "disable_git": True, "disable_code": True}


class WeightsAndBiases:
    """Logs to W&B's server where there is a key, else into RUN/wandb, from where `wandb sync` sends it later.

    W&B's own settings hold (WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, ...). Nobody is ever asked for a key.
    """

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, run_folder: Path, run: Mapping[str, Any], total_steps: int) -> str:
        if self._run:  # W&B's own process has died, and with it the run there
            _tear_down()
        place = run_folder / "wandb"
        run_id = kept_id(place) or uuid.uuid4().hex[:12]
        keep_id(place, run_id)
        settings = wandb.setup(settings=wandb.Settings(**QUIET)).settings
        options: dict[str, Any] = {
            "dir": str(run_folder),
            "id": run_id,
            "resume": "allow",
            "project": settings.project or "boxwright",
            "name": settings.run_name or run_folder.name,
            "config": {**run, "total_steps": total_steps},
            "settings": wandb.Settings(**QUIET, init_timeout=CONNECT_SECONDS, finish_timeout=CONNECT_SECONDS),
        }
        reason = ""
        try:
            if settings.mode in ("offline", "disabled") or wandb.login(prompt=False, verify=False):
                self._run = wandb.init(**options)
            else:
                reason = "no key (`wandb login`, WANDB_API_KEY), so "
        except wandb.Error as error:  # no network, a wrong key: what is kept here is not lost
            reason = f"{one_line(error)}, so "
        if reason:
            _tear_down()  # otherwise the id is in use by what could not be begun
            self._run = wandb.init(**options, mode="offline")
        if self._run.disabled:
            return "disabled by W&B's own settings"
        if self._run.offline:
            return f"{reason}nothing is sent; `wandb sync {place}{os.sep}offline-run-*` sends it"
        return str(self._run.url)

    def has(self, handed: Mapping[str, int]) -> Mapping[str, int]:
        return handed if self._run.offline else {}  # the server itself drops steps that it has

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: wandb.Image(str(path))}, step=step)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def _tear_down() -> None:
    with suppress(OSError):  # of a connection to a process that has died
        wandb.teardown(exit_code=1)

"""What the training loop costs beside the network, and whether its memory grows.

    python benchmarks/loop.py [--model fasterrcnn_vitdet_tiny --imgsz 320 --steps 60]
    python benchmarks/loop.py --model fasterrcnn_vitdet_nano --imgsz 64 --batch 1 --steps 5000

Beside the network is everything but forward, backward, clipping and the optimizer: data at hand, logging, agreeing,
states (one each minute); no average of the weights. The slope of the resident memory is of the second half.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from boxwright import verbs
from boxwright.data.synth import synthesize
from boxwright.training import journal
from boxwright.training.step import Step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="fasterrcnn_vitdet_tiny")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--save-minutes", type=float, default=1.0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    network, ends, resident = [0.0], [], []
    timed(Step, "_with_gradients", network)
    timed(torch.optim.SGD, "step", network)
    timed(torch.nn.utils, "clip_grad_norm_", network)
    whole = journal.Journal.step

    def step(self: journal.Journal, *values: Any) -> None:
        whole(self, *values)
        ends.append((time.perf_counter(), network[0]))
        resident.append(memory())

    journal.Journal.step = step  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        data = synthesize(Path(folder) / "data", train=64, valid=2, size=(asked.imgsz, asked.imgsz))
        verbs.train(
            data=str(data), model=asked.model, imgsz=asked.imgsz, batch=asked.batch, epochs=10**6,
            max_steps=asked.steps, eval_every=10**6, workers=asked.workers, device="cpu", project_dir=Path(folder),
            quiet=True,
            save_minutes=asked.save_minutes,
        )  # fmt: skip
    warm = min(10, asked.steps // 5)
    seconds = ends[-1][0] - ends[warm][0]
    inside = ends[-1][1] - ends[warm][1]
    count = len(ends) - 1 - warm
    print(f"{asked.model} at {asked.imgsz}, batch {asked.batch}: {1000 * seconds / count:.1f} ms a step")
    print(f"beside the network {1000 * (seconds - inside) / count:.2f} ms, {100 * (1 - inside / seconds):.2f} % of it")
    half = np.array(resident[len(resident) // 2 :])
    slope = np.polyfit(np.arange(len(half)), half, 1)[0]
    print(
        f"resident {half[0] / 2**20:.0f} → {half[-1] / 2**20:.0f} MiB, {slope / 1024:+.3f} KiB a step over {len(half)}"
    )


def timed(owner: Any, name: str, total: list[float]) -> None:
    whole = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        began = time.perf_counter()
        done = whole(*arguments, **options)
        total[0] += time.perf_counter() - began
        return done

    setattr(owner, name, wrapped)


def memory() -> int:
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()

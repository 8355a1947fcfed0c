"""What each part of the strong recipe brings: the article's recipe with its faults, then one change after the other.

    python benchmarks/ablation.py --data VOC --model fasterrcnn_vitdet --weights mae_vit_base --epochs 12 --seeds 3

Every rung has the same model, data, number of steps and seeds, and is judged on the validation split.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

from boxwright import verbs

ARTICLE: dict[str, Any] = {
    "use_train_aug": True, "article_faults": True, "optimizer": "sgd", "lr": 0.005, "schedule": "constant",
}  # fmt: skip
RUNGS: dict[str, dict[str, Any]] = {  # each on top of those before it
    "article, with its faults": {},
    "+ boxes with fractions, difficult objects ignored": {"article_faults": False},
    "+ flip": {"flip": 0.5},
    "+ scale jitter": {"scale_jitter": (0.5, 1.5)},
    "+ AdamW, layer decay, decay of the rate": {
        "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.1, "layer_decay": 0.7, "schedule": "step", "clip": 1.0,
    },
    "+ average of the weights": {"ema": 0.998},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="fasterrcnn_vitdet")
    parser.add_argument("--weights")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--adamw-lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("outputs/ablation"))
    asked = parser.parse_args()
    common = {
        "data": asked.data, "model": asked.model, "weights": asked.weights, "epochs": asked.epochs,
        "batch": asked.batch, "imgsz": asked.imgsz, "warmup_steps": asked.warmup_steps, "patience": 1000,
        "project_dir": asked.folder,
    }  # fmt: skip
    print("| rung | last AP | last AP50 | best AP | AP of each seed | minutes |")
    print("|---|--:|--:|--:|---|--:|")
    options = dict(ARTICLE)
    for name, change in RUNGS.items():
        options |= change
        if change.get("optimizer") == "adamw":
            options["lr"] = asked.adamw_lr
        began, rows, best = time.monotonic(), [], []
        for seed in range(asked.seeds):
            done = verbs.train(**common, **options, seed=seed, name=f"{name.strip('+ ')[:20]} {seed}", quiet=True)
            with (done.folder / "results.csv").open(encoding="utf-8") as file:
                rows.append(list(csv.DictReader(file))[-1])
            best.append(done.best["map"])
        last = [float(row["map"]) for row in rows]
        last50 = [float(row["map50"]) for row in rows]
        minutes = (time.monotonic() - began) / 60
        each = " ".join(f"{figure:.3f}" for figure in last)
        means = " | ".join(f"{statistics.mean(figures):.3f}" for figures in (last, last50, best))
        print(f"| {name} | {means} | {each} | {minutes:.1f} |", flush=True)


if __name__ == "__main__":
    main()

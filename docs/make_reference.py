"""Writes docs/reference/models.md: every named model with its figures. `make reference` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

from boxwright import registry
from boxwright.models.published import fitting, licence_of, own_weights
from boxwright.models.summary import summarise

PAGE = Path(__file__).parent / "reference" / "models.md"
HEAD = """# Models

Written by `make reference`; not to be edited. `boxwright models NAME` says the same of one model.

GFLOPs are those of predicting one picture of 640 x 640 (a multiply-add counts as two), 1,000 proposals where the model
has proposals; parameters are with 20 classes. Weights that fit a model are named by `--weights`; `pretrained` means its
backbone's own, the last column. A licence in brackets is that of the weights.

| model | what it is | parameters | GFLOPs | strides | published weights | the backbone's own |
|---|---|--:|--:|---|---|---|
"""


def row(name: str) -> str:
    """One line of the table."""
    summary, entry = summarise(name), registry.find(name)
    own = own_weights(name)
    weights = ", ".join(f"`{w.name}` ({w.licence})" for w in fitting(name))
    strides = " ".join(str(stride) for stride in sorted(summary.levels))
    cells = (
        f"`{name}`", entry.summary, f"{summary.parameters / 1e6:.2f} M", f"{summary.gflops:.1f}", strides, weights,
        f"`{own}` ({licence_of(own, name)[0]})" if own else "",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the page; print what is slow to wait for."""
    rows = []
    for name in sorted(registry.entries()):
        sys.stderr.write(f"{name}\n")
        rows.append(row(name))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

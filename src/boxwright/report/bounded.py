"""Files of a run → values that can be drawn: a file from elsewhere may be huge, nested without end, or lead away.

`reading` takes its files through here, so that everything behind it meets finite numbers only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT = 10_000  # lines of a kind that are read of the books: a graph shows 300 points
MOST_DIGITS = 20  # of a whole number: counts and steps have far fewer
LARGEST_NUMBER = 1e100  # beyond it sums and differences of what is drawn leave the floats
MOST_YAML = 1_000_000  # bytes
MOST_NODES = 50_000  # keys and values: 20,000 classes are far fewer
MOST_DEPTH = 50


def mapping(text: str) -> dict[str, Any]:
    """A JSON object whose numbers are all finite; anything else is a `ValueError`."""
    value = json.loads(text, parse_int=_whole, parse_float=_finite, parse_constant=_finite)
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def options(text: str) -> dict[str, Any]:
    """A run.yaml, read no further than a run.yaml of ours can go; anything else is a `ValueError`."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses while it reads: the scanner alone is busy for minutes with 100,000 brackets."""

        nodes = depth = 0

        def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it uses YAML aliases, which no run.yaml of ours does")
            self.nodes += 1
            self.depth += 1
            if self.nodes > MOST_NODES or self.depth > MOST_DEPTH:
                raise ValueError(f"it has more than {MOST_NODES:,} values or {MOST_DEPTH} levels")
            made = super().compose_node(parent, index)
            self.depth -= 1
            return made

        def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
            if len(node.value) > MOST_DIGITS:
                raise ValueError(f"it has a whole number of {len(node.value)} characters")
            return super().construct_yaml_int(node)

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    if len(text) > MOST_YAML:
        raise ValueError(f"it is larger than {MOST_YAML // 1_000_000} MB")
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    if not isinstance(value, dict):
        raise ValueError("it holds no options")
    return {str(key): part for key, part in value.items()}


def number(value: Any) -> float:
    """A figure of the books; NaN for what is none or too large to be drawn."""
    if not isinstance(value, str | int | float):
        return math.nan
    try:
        made = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return made if abs(made) <= LARGEST_NUMBER else math.nan


def leads_away(path: Path, folder: Path) -> bool:
    """Whether a file is a link to somewhere outside `folder`, or cannot be followed at all."""
    try:
        return not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        return True


def complete_lines(path: Path) -> Iterator[bytes]:
    """The lines that are complete: the last one may still be growing."""
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def is_evaluation(line: bytes) -> bool:
    """Whether a line of metrics.jsonl is an evaluation's, told without parsing it."""
    return b'"evaluation"' in line


def thinned(path: Path) -> tuple[list[str], int]:
    """The complete lines of metrics.jsonl and how many there were: at most about `KEPT` of each kind, evenly spaced.

    The last line of each kind is among them. Raises `OSError`.
    """
    counts = [0, 0]
    for line in complete_lines(path):
        counts[is_evaluation(line)] += 1
    every = [-(-count // KEPT) or 1 for count in counts]
    place = [0, 0]
    kept: list[str] = []
    for line in complete_lines(path):
        kind = is_evaluation(line)
        place[kind] += 1
        if place[kind] <= counts[kind] and (counts[kind] - place[kind]) % every[kind] == 0:
            kept.append(line.decode("utf-8", "replace"))
    return kept, sum(counts)


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"it has a whole number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not abs(value) <= LARGEST_NUMBER:
        raise ValueError(f"it has the number {text[:20]}, which is no figure")
    return value

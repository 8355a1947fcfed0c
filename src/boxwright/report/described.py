"""What a run was: its options, the machine, what was wrong in the data, and the commands that make it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from boxwright.config import Run, make_run
from boxwright.errors import UserError
from boxwright.report.followed import Section
from boxwright.report.markup import Html, join, name, table, tag
from boxwright.report.reading import Found

PLACE = ("name", "project_dir", "exist_ok")  # where a run is written, not what it is
MOST_LINES = 40  # of faults, and of the log's end
BEST = "best_model.safetensors"


def sections(found: Found) -> list[Section]:
    """The last parts of the page."""
    made: list[Section] = []
    if found.faults:
        listed = [tag("li", line) for line in found.faults[:MOST_LINES]]
        more = len(found.faults) - MOST_LINES
        body = [tag("ul", *listed, class_="lines"), tag("p", f"... and {more} more in train.log") if more > 0 else None]
        made.append(Section("faults", "Noted in data and training", join(body), "Noted"))
    made.append(Section("again", "How to reproduce", _again(found), "Reproduce"))
    described = [part for part in (_options(found), _machine(found), _end_of_log(found)) if part]
    if described:
        made.append(Section("run", "The run", join(described), "Run"))
    return made


def defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every option as it is where only data and recipe are given."""
    given: dict[str, Any] = {"data": "none"}
    try:
        return make_run(**given, recipe=options.get("recipe") or None).model_dump(mode="json")
    except UserError:  # a recipe that this version does not have
        return make_run(**given).model_dump(mode="json")


def changed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not as they are by default, or by the recipe."""
    usual = defaults(options)
    usual["recipe"] = None
    return {k: v for k, v in options.items() if k != "classes" and (k not in usual or v != usual[k])}


def train_command(options: Mapping[str, Any], ranks: int = 1) -> list[str]:
    """The words of the command line that trains the same again."""
    words = ["torchrun", f"--nproc-per-node={ranks}", "-m", "boxwright"] if ranks > 1 else ["boxwright"]
    words.append("train")
    for key, value in changed(options).items():
        if key in Run.model_fields and key != "exist_ok":
            words += _spelled("--" + key.replace("_", "-"), value)
    return words


def commands(found: Found) -> list[tuple[str, list[str]]]:
    """What can be done again, and the words of the command."""
    listed: list[tuple[str, list[str]]] = []
    options, folder = found.options, found.folder
    if options:
        ranks = found.environment.get("ranks", 1)
        listed.append(("Train the same again", train_command(options, ranks if isinstance(ranks, int) else 1)))
        if found.state != "finished":
            listed.append(("Go on where it stopped", ["boxwright", "train", "--resume", str(folder)]))
        weights, data = str(folder / BEST), str(options.get("data", "DATA"))
        listed.append(("Judge it", ["boxwright", "evaluate", "--weights", weights, "--data", data]))
        listed.append(("Use it", ["boxwright", "predict", "--weights", weights, "--input", "PICTURES"]))
    elif found.judged and found.judged.scores:
        scores = found.judged.scores
        words = ["boxwright", "evaluate"]
        words += ["--detections", str(scores["detections"])] if scores.get("detections") else [
            "--weights", str(scores.get("weights", "WEIGHTS"))]  # fmt: skip
        words += ["--truth" if scores.get("detections") else "--data", str(scores.get("data", "DATA"))]
        if scores.get("split") not in (None, "val"):
            words += ["--split", str(scores["split"])]
        listed.append(("Judge the same again", words))
    listed.append(("Make this page again", ["boxwright", "report", str(folder)]))
    return listed


def _spelled(flag: str, value: Any) -> list[str]:
    if value is True:
        return [flag]
    if value is False:
        return [f"{flag}=false"]
    if value is None:
        return []
    if isinstance(value, list):
        if flag == "--scale-jitter":
            return [flag, *map(str, value)]
        return [word for part in value for word in (flag, str(part))]
    text = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _again(found: Found) -> Html:
    parts: list[Html] = []
    for said, words in commands(found):
        parts.append(tag("h3", said))
        parts.append(tag("pre", tag("code", _wrapped(words)), class_="command", tabindex="0"))
    facts = [f"seed {found.options['seed']}"] if "seed" in found.options else []
    prints = found.environment.get("data")
    if isinstance(prints, dict):
        facts += [f"{split} data {value}" for split, value in prints.items()]
    facts += [f"{what} {found.environment[what]}" for what in ("boxwright", "commit", "torch", "torchvision", "device")
              if found.environment.get(what)]  # fmt: skip
    if facts:
        told = "The same needs the same data (compare its fingerprint in env.json), versions and kind of device: "
        parts.append(tag("p", told, "; ".join(facts), "."))
    return join(parts)


def _wrapped(words: list[str]) -> str:
    """A command as a shell takes it, broken before its options where it is long."""
    quoted = [shlex.quote(word) for word in words]
    if sum(len(word) + 1 for word in quoted) <= 90:
        return " ".join(quoted)
    lines, line = [], quoted[0]
    for word in quoted[1:]:
        if word.startswith("--") and len(line) + len(word) > 60:
            lines.append(line)
            line = "  " + word
        else:
            line += " " + word
    return " \\\n".join([*lines, line])


def _options(found: Found) -> Html | None:
    if not found.options:
        return None
    usual, different = defaults(found.options), changed(found.options)
    known = Run.model_fields

    def rows(keys: list[str]) -> list[tuple[Any, ...]]:
        return [(f"--{k.replace('_', '-')}", shown(found.options[k]), shown(usual.get(k, "")),
                 (known[k].description or "") if k in known else "") for k in keys]  # fmt: skip

    head = ("option", "here", "by default", "what it is")
    plain = [k for k in found.options if k not in different and k != "classes"]
    classes = found.options.get("classes")
    listed = [tag("p", f"{len(classes)} classes: ", join(_commas(classes)))] if isinstance(classes, list) else []
    return join(
        [
            tag("h3", "Options given"),
            table(head, rows(list(different)), caption="Options that differ from the default", words=4),
            tag("details", tag("summary", f"The other {len(plain)} options"),
                table(head, rows(plain), caption="Options as they are by default", words=4)),
            *listed,
        ]
    )  # fmt: skip


def _commas(words: list[Any]) -> list[Any]:
    return [part for i, word in enumerate(words) for part in ((", " if i else None), name(word))]


def shown(value: Any) -> str:
    """An option's value as it would be typed."""
    if value is None or value in ([], ""):
        return "–"
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return json.dumps(value) if isinstance(value, bool) else str(value)


def _machine(found: Found) -> Html | None:
    environment = {k: v for k, v in found.environment.items() if v not in (None, {}, [])}
    if not environment:
        return None
    rows = [(key, shown(value))
            for key, value in environment.items()]  # fmt: skip
    return join([tag("h3", "Machine and versions"), table(("what", "here"), rows, caption="From env.json", words=2)])


def _end_of_log(found: Found) -> Html | None:
    if not found.log:
        return None
    text = "\n".join(found.log[-MOST_LINES:])
    return tag("details", tag("summary", "The end of train.log"), tag("pre", text, tabindex="0"))

"""Names for things that can be built: register, list, build; a mistyped name gets the nearest right one.

The registry lists the package's own folder by reading its source, so that names, lines and one-line descriptions are
known before PyTorch is imported. A registration is one decorator with a literal name:

    @register("fasterrcnn_vitdet")
    def fasterrcnn_vitdet(*, num_classes: int, drop_path: float = 0.1) -> FasterRCNN:
        \"\"\"One line that says what it is.\"\"\"
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from boxwright.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])

PACKAGE = Path(__file__).parent
BUILDERS = PACKAGE / "models"


@dataclass(frozen=True)
class Entry:
    """One registered builder, as its source says it."""

    name: str
    module: str
    function: str
    path: Path
    line: int
    summary: str


def register(name: str) -> Callable[[F], F]:
    """Mark a builder as `name`; its options are its keyword-only parameters."""

    def mark(builder: F) -> F:
        assert name.isidentifier(), f"{name!r} is not a name"
        return builder

    return mark


def nearest(word: str, choices: Iterable[str]) -> str:
    """\" Did you mean 'x'?\", or nothing when no choice is near."""
    close = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


@cache
def entries() -> dict[str, Entry]:
    """Every registered name, in the order of the source files."""
    found: dict[str, Entry] = {}
    for path in sorted(BUILDERS.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for name in _registered_names(node):
                assert name not in found, f"{name} is registered twice: {found[name].path} and {path}"
                module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
                summary = (ast.get_docstring(node) or "").split("\n")[0]
                found[name] = Entry(name, module, node.name, path, node.lineno, summary)
    return found


def _registered_names(function: ast.FunctionDef) -> list[str]:
    return [
        str(ast.literal_eval(decorator.args[0]))
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Name)
        and decorator.func.id == register.__name__
    ]


def find(name: str) -> Entry:
    """The entry of that name; a name that is not there is a `UserError` with the nearest one."""
    if name not in entries():
        hint = nearest(name, entries()) or " `boxwright models` lists them."
        raise UserError(f"unknown model {name!r}.{hint}")
    return entries()[name]


def build(name: str, **options: Any) -> Any:
    """Build what is registered as `name`; options that its builder does not take are a `UserError`."""
    entry = find(name)
    builder = getattr(importlib.import_module(entry.module), entry.function)
    known = inspect.signature(builder).parameters
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}.{nearest(option, known)}")
    return builder(**options)

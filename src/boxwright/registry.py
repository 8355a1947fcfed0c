"""Names for things that can be built: register, list, build; a mistyped name gets the nearest right one.

The registry lists the package's own folder by reading its source, so that names, lines and one-line descriptions are
known before PyTorch is imported. A registration is one decorator with literal arguments:

    @register("fasterrcnn_vitdet")
    def fasterrcnn_vitdet(*, num_classes: int, drop_path: float = 0.1) -> FasterRCNN:
        \"\"\"One line that says what it is.\"\"\"

    @register("my_net", kind="backbone")
    def my_net() -> nn.Module: ...

A user's own file is listed and built the same way once `use_plugin` was given its path.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

from boxwright.errors import UserError

F = TypeVar("F", bound=Callable[..., Any])
Kind = Literal["detector", "backbone", "pyramid"]

PACKAGE = Path(__file__).parent
BUILDERS = PACKAGE / "models"
WORDS: dict[Kind, str] = {"detector": "model", "backbone": "backbone", "pyramid": "pyramid"}  # as users call them


@dataclass(frozen=True)
class Entry:
    """One registered builder, as its source says it."""

    name: str
    kind: Kind
    module: str
    function: str
    path: Path
    line: int
    summary: str
    options: tuple[str, ...]  # the builder's keyword-only parameters


def register(name: str, *, kind: Kind = "detector") -> Callable[[F], F]:
    """Mark a builder as `name`; its options are its keyword-only parameters."""

    def mark(builder: F) -> F:
        assert name.isidentifier(), f"{name!r} is not a name"
        assert kind in get_args(Kind), f"{kind!r} is no kind of builder"
        return builder

    return mark


def nearest(word: str, choices: Iterable[str]) -> str:
    """\" Did you mean 'x'?\", or nothing when no choice is near."""
    close = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def entries(kind: Kind = "detector") -> dict[str, Entry]:
    """Every registered name of a kind: the package's own in the order of the source files, then the plug-ins'."""
    return {name: entry for (of, name), entry in {**_own(), **_plugged}.items() if of == kind}


def find(name: str, kind: Kind = "detector") -> Entry:
    """The entry of that name; a name that is not there is a `UserError` with the nearest one."""
    known = entries(kind)
    if name not in known:
        hint = nearest(name, known) or " `boxwright models` lists them."
        raise UserError(f"unknown {WORDS[kind]} {name!r}.{hint}")
    return known[name]


def build(name: str, *, kind: Kind = "detector", **options: Any) -> Any:
    """Build what is registered as `name`; options that its builder does not take are a `UserError`."""
    entry = find(name, kind)
    require_options(entry, options)
    builder = getattr(_module(entry), entry.function, None)
    try:
        return builder(**options)  # pyright: ignore[reportOptionalCall] None is a TypeError as any other mistake
    except UserError:
        raise
    except Exception as error:  # of options that are not for it, or of a plug-in
        given = {k: v for k, v in options.items() if isinstance(v, str | int | float | bool | list)}
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"cannot build {name} with {given!a}: {reason}") from error


def require_options(entry: Entry, options: Iterable[str]) -> None:
    """Refuse options that a builder does not take."""
    for option in options:
        if option in entry.options:
            continue
        if option in ("backbone", "pyramid") and entry.kind == "detector":
            joinable = [e.name for e in entries().values() if option in e.options]
            raise UserError(f"{entry.name} has a {option} of its own; --{option} goes with {', '.join(joinable)}")
        hint = nearest(option, entry.options) or f" It has: {', '.join(entry.options) or 'none'}."
        raise UserError(f"{entry.name} has no option {option!r}.{hint}")


def use_plugin(path: str | Path) -> list[Entry]:
    """List what a user's Python file registers; the file is run when something of it is built.

    Raises `UserError` for a file that is not there, is no Python or registers nothing or a name that is taken.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"no plug-in at {path}")
    module = f"boxwright_plugin_{path.stem}"
    try:
        found = list(_entries_of(path, module))
    except (SyntaxError, ValueError, TypeError, OSError, MemoryError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is no Python that can be read, or no @register as it should be: {reason}") from None
    if not found:
        raise UserError(f'{path} registers nothing: a builder needs @register("its_name", kind="backbone") above it')
    names = [(entry.kind, entry.name) for entry in found]
    for entry in found:
        if names.count((entry.kind, entry.name)) > 1:
            raise UserError(f"{path}:{entry.line} registers {entry.name!r} twice")
    taken = {**_own(), **{key: entry for key, entry in _plugged.items() if entry.path != path}}
    for entry in found:
        if earlier := taken.get((entry.kind, entry.name)):
            raise UserError(f"{path}:{entry.line} registers {entry.name!r}, which {earlier.path}:{earlier.line} has")
    for key in [key for key, entry in _plugged.items() if entry.path == path]:
        del _plugged[key]
    _plugged.update({(entry.kind, entry.name): entry for entry in found})
    return found


_plugged: dict[tuple[Kind, str], Entry] = {}


@cache
def _own() -> dict[tuple[Kind, str], Entry]:
    found: dict[tuple[Kind, str], Entry] = {}
    for path in sorted(BUILDERS.rglob("*.py")):
        for entry in _entries_of(path, ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)):
            earlier = found.setdefault((entry.kind, entry.name), entry)
            assert earlier is entry, f"{entry.name} is registered twice: {earlier.path} and {path}"
    return found


def _entries_of(path: Path, module: str) -> Iterable[Entry]:
    for node in ast.parse(path.read_bytes()).body:  # bytes: Python's own rules of encoding hold
        if isinstance(node, ast.FunctionDef):
            summary = (ast.get_docstring(node) or "").split("\n")[0]
            for name, kind in _registrations(node):
                options = tuple(argument.arg for argument in node.args.kwonlyargs)
                yield Entry(name, kind, module, node.name, path, node.lineno, summary, options)


def _registrations(function: ast.FunctionDef) -> Iterable[tuple[str, Kind]]:
    for decorator in function.decorator_list:
        if not isinstance(decorator, ast.Call) or _last_name(decorator.func) != register.__name__:
            continue
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in decorator.keywords}
        name = ast.literal_eval(decorator.args[0]) if decorator.args else options.get("name")
        kind = options.get("kind", "detector")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"line {function.lineno}: {name!r} is no name")
        if kind not in get_args(Kind):
            raise ValueError(f"line {function.lineno}: {kind!r} is none of {', '.join(get_args(Kind))}")
        yield name, kind


def _last_name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _module(entry: Entry) -> ModuleType:
    if entry not in _plugged.values():
        return importlib.import_module(entry.module)
    loaded = sys.modules.get(entry.module)
    if loaded is not None and loaded.__file__ == str(entry.path):
        return loaded
    spec = importlib.util.spec_from_file_location(entry.module, entry.path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[entry.module] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[entry.module]
        raise UserError(f"the plug-in {entry.path} does not run: {type(error).__name__}: {error}") from error
    return module

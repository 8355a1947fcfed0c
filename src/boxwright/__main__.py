"""Where the program starts and ends: finds the verbs, and turns every mistake into one line and an exit code."""

from __future__ import annotations

import ast
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts import App

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
GROUPS = {"data": "Prepare and draw datasets."}

# The article's short spellings.
SHORT = {
    "-m": "--model", "-d": "--device", "-e": "--epochs", "-j": "--workers", "-b": "--batch", "-ims": "--imgsz",
    "-n": "--name", "-uta": "--use-train-aug", "-w": "--weights", "-st": "--square-training",
    "-i": "--input", "-o": "--output", "-th": "--threshold", "-si": "--show", "-nlb": "--no-labels",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit codes are those of docs/guides/command-line.md."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return 130


def _main(arguments: Sequence[str] | None) -> int:
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # its own words on a damaged picture; ours name the file
    from cyclopts import CycloptsError

    from boxwright.errors import BoxwrightError, Stopped

    tokens = [SHORT.get(token, token) for token in (sys.argv[1:] if arguments is None else arguments)]
    try:
        code = make_app()(tokens, print_error=False, exit_on_error=False) or 0
        if sys.stdout:  # None where the caller closed it: `>&-`
            sys.stdout.flush()  # here, where a reader that has gone is no error
        return code
    except CycloptsError as error:
        return _fail(2, _parse_error(error), error)
    except Stopped as error:
        return error.exit_code  # the journal has said it
    except BoxwrightError as error:
        return _fail(error.exit_code, str(error), error)
    except BrokenPipeError:  # whoever read standard output has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        if error.errno not in DISK:
            raise
        return _fail(
            74,
            f"{error.strerror}: {error.filename or 'while writing'}. What was saved before is whole",
            error,
        )


def make_app() -> App:
    """The command line. A verb's own code is imported when it is called, so that `--help` answers at once."""
    from cyclopts import App, Parameter

    from boxwright.version import __version__

    def new_app(name: str, text: str) -> App:
        return App(
            name=name,
            help=text,
            help_format="plaintext",
            version=__version__,
            default_parameter=Parameter(negative=()),
            result_action="return_value",
            suppress_keyboard_interrupt=False,
        )

    app = new_app("boxwright", "Make object detectors: train, judge, predict. Begin with `boxwright demo`.")
    groups = {name: new_app(name, text) for name, text in GROUPS.items()}
    for group in groups.values():
        app.command(group)
    for function, text in verbs():
        group, _, name = function.partition("_")
        target = groups.get(group, app)
        target.command(f"boxwright.cli:{function}", name=name if group in groups else function, help=text)
    return app


def verbs() -> Iterator[tuple[str, str]]:
    """The functions of cli.py and the first line of what each says of itself, read without importing it."""
    source = Path(__file__).with_name("cli.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, (ast.get_docstring(node) or "").partition("\n")[0]


def _fail(code: int, message: str, error: BaseException) -> int:
    if os.environ.get("BOXWRIGHT_DEBUG") == "1":
        raise error
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(message.split()))  # names of files
    sys.stderr.write(f"boxwright: error: {text}\n")
    return code


def _parse_error(error: BaseException) -> str:
    from pydantic import ValidationError

    from boxwright.config import explain

    if isinstance(error.__cause__, ValidationError):
        return "; ".join(explain(e) for e in error.__cause__.errors())
    return str(error)


if __name__ == "__main__":
    sys.exit(main())

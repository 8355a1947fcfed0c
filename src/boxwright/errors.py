"""What ends a command with one line on standard error and an exit code of its own, never a traceback."""

from __future__ import annotations


class BoxwrightError(Exception):
    """Base of the errors that are told in one line."""

    exit_code = 1


class UserError(BoxwrightError):
    """A mistake that the person at the keyboard can mend: what, where, and the nearest right word or what to do."""

    exit_code = 2


class Diverged(BoxwrightError):
    """Training has left the finite numbers."""

    exit_code = 70


class DiskFailed(BoxwrightError):
    """What has to be kept cannot be written (sysexits.h: EX_IOERR)."""

    exit_code = 74


class Stopped(BoxwrightError):
    """Asked to stop from outside, with everything saved that going on needs (sysexits.h: EX_TEMPFAIL)."""

    exit_code = 75

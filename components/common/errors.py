"""Errors that a person can cause. Each carries its exit status and says the way out."""

from __future__ import annotations


class RetortError(Exception):
    """The work failed for a reason that the message names: file, key or value, and the way out.

    The command line prints the message (one or two lines, no traceback) and exits with ``status``. ``rule``:
    the id of the rule that was broken, if there is one; the step's report then says it.
    """

    status = 1
    rule = ""


class ConfigError(RetortError):
    """The command or its configuration cannot be understood. Raised before any work."""

    status = 2


class FindingsError(RetortError):
    """A step found something of level error; its ``report.json`` holds the details."""


class Terminated(BaseException):
    """SIGTERM arrived. A BaseException, as KeyboardInterrupt is, so that no handler swallows it."""

    status = 143

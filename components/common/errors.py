"""Errors that a person can cause. Each carries its exit status and says the way out."""

from __future__ import annotations

from typing import Any

NAMED = 3  # images that an error names


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


class ImageError(RetortError):
    """One image cannot be used; ``rule`` is the rule it breaks, such as ``image.unreadable``."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageError, (self.rule, str(self))  # loader processes hand it over


class ChangedError(ImageError):
    """Images that are no longer those of the manifest (``image.changed``); ``what`` says of each how."""

    def __init__(self, *what: str) -> None:
        more = f"; and {len(what) - NAMED} more near them" if len(what) > NAMED else ""
        super().__init__(
            "image.changed",
            f"image.changed: {'; '.join(what[:NAMED])}{more}: not what 'retort ingest' read. Put it back, or "
            "run 'retort ingest' and 'retort validate' again",
        )
        self.what = what

    def __reduce__(self) -> tuple[Any, ...]:
        return ChangedError, self.what

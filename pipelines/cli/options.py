"""The global options, and what follows from them: the parameters of this call, and the lock of its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from components.common.errors import ConfigError
from components.common.progress import LEVELS

if TYPE_CHECKING:
    from pipelines.params import Params

# global options that take a value, and an example of one
VALUED = {"-o": "global.seed=1", "--params": "params.yaml", "--log-level": "warning"}


@dataclass(frozen=True)
class Options:
    """The global options of one call; a command finds them in its context (``context.obj``)."""

    file: Path = Path("params.yaml")
    overrides: tuple[str, ...] = ()
    debug: bool = False
    log_level: str = ""  # empty: as RETORT_LOG_LEVEL says

    @classmethod
    def take(cls, arguments: Sequence[str]) -> tuple[Options, list[str]]:
        """Take the global options off the command line, wherever they stand; also returns the rest.

        Raises:
            ConfigError: when a value is missing, or is no level.
        """
        given: dict[str, list[str]] = {option: [] for option in VALUED}
        debug, rest = False, list[str]()
        items = iter(arguments)
        for item in items:
            option, equals, value = item.partition("=")
            if item == "--":
                rest += [item, *items]
            elif item in given:
                following = next(items, None)
                if following is None:
                    raise ConfigError(f"{item}: a value is missing, such as {item} {VALUED[item]}")
                given[item].append(following)
            elif equals and option in given and option.startswith("--"):
                given[option].append(value)
            elif equals and item.startswith("-o") and not item.startswith("--"):
                given["-o"].append(item.removeprefix("-o"))
            elif item == "--debug":
                debug = True
            else:
                rest.append(item)
        (level,) = given["--log-level"][-1:] or [""]
        if given["--log-level"] and level.upper() not in LEVELS:
            raise ConfigError(f"--log-level {level}: expected one of {', '.join(LEVELS).lower()}")
        file = Path(given["--params"][-1]) if given["--params"] else cls.file
        return cls(file, tuple(given["-o"]), debug, level.lower()), rest

    def overridden(self, *overrides: str) -> Options:
        """The same options with more overrides, which come last and therefore win."""
        return replace(self, overrides=(*self.overrides, *overrides))

    def params(self) -> Params:
        """The parameters of this call: the file, with the overrides applied."""
        from pipelines.params import load

        return load(self.file, self.overrides)

    def in_file(self) -> Params:
        """The parameters as the file has them, without the overrides."""
        return replace(self, overrides=()).params()

    @contextmanager
    def working(self, command: str) -> Iterator[Params]:
        """Parameters first (exit status 2 comes before any work), then the lock of this folder."""
        from components.common.storage import project_lock

        loaded = self.params()
        with project_lock(command):
            yield loaded


class Context(typer.Context):
    """What a command is called with."""

    obj: Options

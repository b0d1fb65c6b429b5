"""The global options, and what follows from them: the parameters of this call, and the lock of its folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from components.common.errors import ConfigError

if TYPE_CHECKING:
    from pipelines.params import Params


@dataclass(frozen=True)
class Options:
    """The global options of one call; a command finds them in its context (``context.obj``)."""

    file: Path = Path("params.yaml")
    overrides: tuple[str, ...] = ()
    debug: bool = False

    @classmethod
    def take(cls, arguments: Sequence[str]) -> tuple[Options, list[str]]:
        """Take --params, -o and --debug off the command line, wherever they stand; also returns the rest.

        Raises:
            ConfigError: when a value is missing.
        """
        file, overrides, debug, rest = cls.file, list[str](), False, list[str]()
        items = iter(arguments)
        for item in items:
            if item == "--":
                rest += [item, *items]
            elif item in ("-o", "--params"):
                value = next(items, None)
                if value is None:
                    raise ConfigError(f"{item}: a value is missing, such as -o global.seed=1")
                if item == "-o":
                    overrides.append(value)
                else:
                    file = Path(value)
            elif item.startswith("--params="):
                file = Path(item.removeprefix("--params="))
            elif item.startswith("-o") and "=" in item and not item.startswith("--"):
                overrides.append(item.removeprefix("-o"))
            elif item == "--debug":
                debug = True
            else:
                rest.append(item)
        return cls(file, tuple(overrides), debug), rest

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

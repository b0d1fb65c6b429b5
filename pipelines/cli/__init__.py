"""The command line: every word a person can say.

``frame`` is what all commands have around them: the global options and the exit status. ``steps`` makes the
commands of the table of steps; the other files hold the rest, by subject.

Imports stand inside the commands: ``retort --help`` answers at once, and a step loads only what it needs.
"""

from pipelines.cli.frame import main, run

__all__ = ["main", "run"]

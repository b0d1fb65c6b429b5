"""The frame of every command: its options, its exit status, and an error in a line or two."""

from __future__ import annotations

import errno
import gc
import io
import logging
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import typer
from typer.exceptions import TyperException

from components.common import signals
from components.common.environment import collect_less_often
from components.common.errors import RetortError, Terminated
from components.common.progress import doing, logging_from
from components.common.storage import disk_full
from pipelines.catalogue import PIPELINES
from pipelines.cli import tools
from pipelines.cli.app import app
from pipelines.cli.options import Options
from pipelines.steps import DATA, OUTPUTS

log = logging.getLogger(__name__)

NEXT_TO_NOTHING = 1 << 20  # bytes free on a disk that work failed on

# commands that take long before their work begins: what they load is named, from so many seconds on
LONG = {stage.step.command.split()[0] for pipeline in PIPELINES for stage in pipeline.stages} | {
    command.name or getattr(command.callback, "__name__", "")
    for command in tools.commands.registered_commands
}
IMPORT_SECONDS = 4.0


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``retort``: runs one command and exits with the contract's status."""
    collect_less_often()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a name that the terminal's encoding lacks must stop no work
            stream.reconfigure(errors="backslashreplace")
    status = run(sys.argv[1:] if arguments is None else arguments)
    # the process ends: what is left need not be looked through once more (DuckDB calls that a leak, aloud)
    if "duckdb" not in sys.modules:
        gc.freeze()
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit status, after one or two lines on standard error if it failed."""
    signals.catch()
    debug = "--debug" in arguments
    try:
        options, rest = Options.take(arguments)
        debug = options.debug
        with logging_from(options.log_level) if options.log_level else nullcontext():
            return _call(options, rest)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Exception, KeyboardInterrupt, Terminated) as error:  # noqa: BLE001 - the last resort
        message, status = _explained(error)
        if debug:
            traceback.print_exc()
        if os.environ.get("RETORT_SHARED"):
            message = "\n".join([message, *getattr(error, "__notes__", [])])
        lines = message.strip().splitlines() or ["failed"]
        log.error("\n".join([f"retort: {lines[0]}", *(f"  {line}" for line in lines[1:])]))
        return status


def _call(options: Options, rest: list[str]) -> int:
    with doing(rest[0], "loading", IMPORT_SECONDS) if rest and rest[0] in LONG else nullcontext():
        result: Any = app(args=rest, prog_name="retort", standalone_mode=False, obj=options)
    if result == 130:  # what Typer makes of a KeyboardInterrupt
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _explained(error: BaseException) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    if isinstance(error, TyperException):  # an unknown command or option, or a wrong value
        command = getattr(getattr(error, "ctx", None), "command_path", "retort")
        return f"{error.format_message()} (see '{command} --help')", 2
    if isinstance(error, RetortError):
        return str(error), error.status
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno == errno.EROFS:
            return _read_only(where), 1
        return (_full(where) if disk_full(error) else f"{where}{(error.strerror or str(error)).lower()}"), 1
    # a library may have made something else of what the signal's handler raised
    stopped = KeyboardInterrupt() if isinstance(error, typer.Abort) else signals.stopped_by(error)
    if stopped is not None:
        word, status = ("terminated", 143) if isinstance(stopped, Terminated) else ("interrupted", 130)
        return f"{word}; the next run goes on from what was finished", status
    if disk_full(error) or _full_folder() is not None:  # torch's writer, for one, gives no reason
        return _full(""), 1
    said = next(iter(str(error).splitlines()), "")
    return f"internal error: {type(error).__name__}: {said} (--debug shows where)", 1


def _read_only(where: str) -> str:
    here, temporary = Path.cwd(), Path("/tmp")  # noqa: S108 - where Ray and the health check write
    return (
        f"{where}read-only file system; commands write to the folder that they start in ({here}) and to "
        f"{temporary}. A container whose root is read-only needs a volume at both: "
        f"docker run --tmpfs {here} --tmpfs {temporary}, or emptyDir in a pod"
    )


def _full(where: str) -> str:
    folder = None if where else _full_folder()
    named = f" ({folder.absolute()} lies on it)" if folder is not None else ""
    return (
        f"{where}the disk is full{named}; nothing half-written was left. Free some space "
        "('retort clean' removes what can be remade) and run again"
    )


def _full_folder() -> Path | None:
    """The folder that commands write to whose disk has next to nothing left, if there is one."""
    import shutil
    import tempfile

    state = Path(os.environ.get("RETORT_STATE", ".retort"))
    folders = [
        place for place in (state, OUTPUTS, DATA, Path(), Path(tempfile.gettempdir())) if place.is_dir()
    ]
    return next((place for place in folders if shutil.disk_usage(place).free < NEXT_TO_NOTHING), None)

"""``retort promote``, ``rollback`` and ``promotions``: who is champion, decided by a person, and who was."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from typing import Any

from components.common.errors import RetortError
from components.registry.actor import actor
from components.registry.notify import notify
from components.registry.params import RegisterParams
from components.registry.versions import CHAMPION, OvertakenError, Versions, opened

log = logging.getLogger(__name__)

NARROW = 100  # columns that a table has at least


def promote(params: RegisterParams, version: int, why: str = "") -> dict[str, Any] | None:
    """Make ``version`` champion; returns the record of it, or None when it is champion already.

    Raises:
        RetortError: when there is no such version, or the tracker does not answer.
    """
    with opened(params.registry, f"promote {version}") as versions:
        versions.get(version)
        expected = _champion(versions)
        while True:  # a person's word holds whoever is champion
            if expected == version:
                log.info(f"{versions.name} version {version} is champion already")
                return None
            try:
                record = versions.set_champion(version, "promote", expected=expected, who=actor(), why=why)
                break
            except OvertakenError as error:
                expected = error.champion
    before = record["replaced"]
    log.info(
        f"{versions.name}: version {version} is champion" + (f", in place of {before}" if before else "")
    )
    _tell(params, record)
    return record


def rollback(params: RegisterParams, why: str = "") -> dict[str, Any]:
    """Make that version champion again which the present one replaced; returns the record of it.

    A second rollback goes one further back, never forward again; versions that were deleted are passed over.

    Raises:
        RetortError: when there is no champion, or none before it, when another became champion meanwhile, or
            when the tracker does not answer.
    """
    with opened(params.registry, "rollback") as versions:
        present = _champion(versions)
        if present is None:
            raise RetortError(
                f"registry.name: '{versions.name}' has no champion; 'retort register' makes one"
            )
        records = versions.promotions()
        replaced = _replaced(records, present)
        while replaced is not None and not versions.there(replaced):
            log.warning(f"version {replaced} of '{versions.name}' was deleted: one further back")
            replaced = _replaced(records, replaced)
        if replaced is None:
            raise RetortError(
                f"registry.name: version {present} of '{versions.name}' replaced no other, so there is "
                "nothing to go back to; 'retort promote VERSION' names a champion"
            )
        try:
            record = versions.set_champion(replaced, "rollback", expected=present, who=actor(), why=why)
        except OvertakenError as error:
            raise RetortError(f"{error}; run 'retort rollback' again if that one has to go, too") from None
    log.info(f"{versions.name}: version {replaced} is champion again, in place of {present}")
    _tell(params, record)
    return record


def promotions(params: RegisterParams) -> list[dict[str, Any]]:
    """All promotions of ``registry.name``, the oldest first, as ``Versions.promotions`` gives them.

    Raises:
        RetortError: when there is no such registered model, or the tracker does not answer.
    """
    with opened(params.registry, "promotions") as versions:
        versions.need()
        return versions.promotions()


def _champion(versions: Versions) -> int | None:
    holder = versions.holder(CHAMPION)
    return int(holder.version) if holder else None


def _replaced(records: Sequence[dict[str, Any]], version: int) -> int | None:
    """What ``version`` took the place of when it last became champion, but for rollbacks to it."""
    found = (
        record["replaced"]
        for record in reversed(records)
        if record["version"] == version and record["how"] != "rollback"
    )
    return next(found, None)


def _tell(params: RegisterParams, record: dict[str, Any]) -> None:
    failed = "" if record.get("known") else notify(params.registry, record)
    if failed:
        log.warning(f"{failed}; the promotion stands")


def show(records: Sequence[dict[str, Any]]) -> None:
    """Print the record as a table, the oldest first."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    columns = ("number", "version", "replaced", "at", "how", "who", "why")
    for name in columns:
        right = name in columns[:3]
        table.add_column(name, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for record in records:
        cells = ["" if record.get(name) is None else str(record[name]) for name in columns]
        table.add_row(*map(escape, cells))
    Console(width=max(NARROW, shutil.get_terminal_size((160, 24)).columns), highlight=False).print(
        table if records else "no version was promoted yet"
    )

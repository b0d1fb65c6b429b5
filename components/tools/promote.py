"""``retort promote`` and ``retort rollback``: who is champion, decided by a person."""

from __future__ import annotations

import logging
from typing import Any

from components.common.errors import RetortError
from components.registry.params import RegisterParams
from components.registry.versions import CHAMPION, opened

log = logging.getLogger(__name__)


def promote(params: RegisterParams, version: int) -> dict[str, Any] | None:
    """Make ``version`` champion; returns the record of it, or None when it is champion already.

    Raises:
        RetortError: when there is no such version, or the tracker does not answer.
    """
    with opened(params.registry, f"promote {version}") as versions:
        versions.get(version)
        champion = versions.holder(CHAMPION)
        if champion and int(champion.version) == version:
            log.info(f"{versions.name} version {version} is champion already")
            return None
        record = versions.set_champion(version, "promote")
    before = record["replaced"]
    log.info(
        f"{versions.name}: version {version} is champion" + (f", in place of {before}" if before else "")
    )
    return record


def rollback(params: RegisterParams) -> dict[str, Any]:
    """Make that version champion again which the present one replaced; returns the record of it.

    A second rollback goes one further back, never forward again.

    Raises:
        RetortError: when there is no champion, or none before it, or the tracker does not answer.
    """
    with opened(params.registry, "rollback") as versions:
        champion = versions.holder(CHAMPION)
        if champion is None:
            raise RetortError(
                f"registry.name: '{versions.name}' has no champion; 'retort register' makes one"
            )
        present = int(champion.version)
        replaced = next(
            (
                record["replaced"]
                for record in reversed(versions.promotions())
                if record["version"] == present and record["how"] != "rollback"
            ),
            None,
        )
        if replaced is None:
            raise RetortError(
                f"registry.name: version {present} of '{versions.name}' replaced no other, so there is "
                "nothing to go back to; 'retort promote VERSION' names a champion"
            )
        versions.get(replaced)
        record = versions.set_champion(replaced, "rollback")
    log.info(f"{versions.name}: version {replaced} is champion again, in place of {present}")
    return record

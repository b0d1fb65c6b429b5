"""The champion as a checkpoint: what ``compare-weights`` may start a network from."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from components.common.errors import RetortError
from components.common.params import Registry
from components.common.storage import replace, sha256_file
from components.models import checkpoint
from components.models.card import read_card
from components.registry.files import CARD, CHECKPOINT, PROOFS
from components.registry.versions import CHAMPION, opened

log = logging.getLogger(__name__)


def fetch_champion(registry: Registry, folder: Path) -> Path | None:
    """Put the champion's ``model.safetensors`` and ``model.json`` into ``folder``.

    Returns:
        ``folder``; None when there is no champion, when its version carries no checkpoint, or when the
        tracker does not answer. The last two are said: a comparison goes on without it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _fetch(registry, folder)
    except RetortError as error:
        log.warning(f"compare-weights: without the champion: {str(error).splitlines()[0]}")
        return None


def _fetch(registry: Registry, folder: Path) -> Path | None:
    with opened(registry, "compare-weights") as versions, tempfile.TemporaryDirectory(dir=folder) as scratch:
        champion = versions.holder(CHAMPION)
        if champion is None:
            return None
        card, weights = (
            versions.download(champion, f"{PROOFS}/{name}", Path(scratch)) for name in (CARD, CHECKPOINT)
        )
        if card is None or weights is None or read_card(card).sha256 != sha256_file(weights):
            log.warning(
                f"champion: version {champion.version} of '{registry.name}' carries no whole checkpoint to "
                "start from; give its model.safetensors, if you have it, in compare_weights.candidates"
            )
            return None
        replace(weights, folder / checkpoint.FILE)
        replace(card, folder / checkpoint.CARD)
    return folder

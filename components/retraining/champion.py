"""The champion as retraining needs it: its network, its card, and the images that it was made from."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from components.common.params import Registry
from components.common.storage import replace, sha256_file
from components.models import checkpoint
from components.models.card import ModelCard, read_card
from components.models.params import Net
from components.registry.files import CARD, CHECKPOINT, MANIFEST, PROOFS
from components.registry.versions import CHALLENGER, CHAMPION, opened

LOST = "challenger.parquet"


@dataclass(frozen=True)
class Champion:
    """What was fetched of it into ``folder``.

    Attributes:
        card: None: its version carries no whole checkpoint, so that nothing can start from it.
        manifest: None: it was registered by a program that kept none.
        challenger: the manifest of the version that has lost since; None: there is none.
    """

    version: int
    folder: Path
    card: ModelCard | None
    manifest: Path | None
    challenger: Path | None = None


def fetch(registry: Registry, folder: Path) -> Champion | None:
    """Put the champion's ``model.safetensors``, ``model.json`` and ``manifest.parquet`` into ``folder``.

    Returns:
        What there is of it; None: there is no champion.

    Raises:
        RetortError: when the tracker does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with opened(registry, "retrain") as versions, tempfile.TemporaryDirectory(dir=folder) as scratch:
        holder = versions.holder(CHAMPION)
        if holder is None:
            return None
        got = {
            name: versions.download(holder, f"{PROOFS}/{name}", Path(scratch))
            for name in (CARD, CHECKPOINT, MANIFEST)
        }
        card, weights, manifest = got[CARD], got[CHECKPOINT], got[MANIFEST]
        if manifest is not None:
            replace(manifest, folder / MANIFEST)
        lost = versions.holder(CHALLENGER)
        later = versions.download(lost, f"{PROOFS}/{MANIFEST}", Path(scratch)) if lost else None
        if later is not None:
            replace(later, folder / LOST)
        read = None
        if card is not None and weights is not None and read_card(card).sha256 == sha256_file(weights):
            read = read_card(card)
            replace(weights, folder / checkpoint.FILE)
            replace(card, folder / checkpoint.CARD)
    kept = [path if path.exists() else None for path in (folder / MANIFEST, folder / LOST)]
    return Champion(int(holder.version), folder, read, *kept)


def unfit(card: ModelCard | None, student: Net, image_size: int) -> str:
    """Why a student of these parameters cannot start from the champion; empty: it can."""
    if card is None:
        return "its version carries no whole checkpoint"
    if card.arch != student.arch:
        return f"it is another network ({card.arch.name}; student.arch.name is {student.arch.name})"
    if card.input_size[-1] != image_size:
        return f"it was made for {card.input_size[-1]} pixels; global.image_size is {image_size}"
    return ""

"""The model card ``model.json``: what a trained network is, what it was made of, and how to feed it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from components.common.errors import RetortError
from components.common.storage import read_json, write_json
from components.models.params import Arch

SCHEMA_VERSION = 1


class Lineage(BaseModel):
    """Where weights came from: ``coverage`` is the share of the backbone's parameters they filled, 0..1."""

    source: str
    sha256: str
    coverage: float


class ModelCard(BaseModel):
    """``input_size`` is [3, height, width]; ``mean`` and ``std`` are per RGB channel, for pixels in 0..1."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    schema_version: int = SCHEMA_VERSION
    arch: Arch
    class_names: list[str]
    input_size: list[int]
    mean: list[float]
    std: list[float]
    data_fingerprint: str
    lineage: list[Lineage]
    sha256: str

    def write(self, path: Path) -> None:
        write_json(path, self.model_dump(mode="json"))


def read_card(path: Path) -> ModelCard:
    """Raises RetortError naming the file when it is missing, no model card, or newer than this program."""
    try:
        card = ModelCard.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RetortError(f"{path}: not a model card: {key}: {first['msg']}") from None
    if card.schema_version > SCHEMA_VERSION:
        raise RetortError(f"{path}: schema_version {card.schema_version} is newer than {SCHEMA_VERSION}")
    return card

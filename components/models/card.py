"""The model card ``model.json``: what a trained network is, what it was made of, and how to feed it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from components.common.errors import RetortError
from components.common.storage import read_json, sha256_json, write_json
from components.models.params import Arch

SCHEMA_VERSION = 1
DIGEST = "digest"  # in the file: sha256 of all else that it says, so that a change by hand is noticed
RULE = "model.class_names"
NAMED = 3  # class names that a message lists


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
        """Write the card, and the digest of what it says."""
        content = self.model_dump(mode="json")
        write_json(path, {**content, DIGEST: sha256_json(content)})


def read_card(path: Path, changed: bool = False) -> ModelCard:
    """A model card; those that carry no digest (of earlier versions) are taken as they are.

    Args:
        changed: take it even if its digest says that it was changed.

    Raises:
        RetortError: naming the file when it is missing, no model card, newer than this program, or changed
            since it was written: its classes, or how images are prepared, would be wrong without a sign.
    """
    content = read_json(path)
    try:
        card = ModelCard.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RetortError(f"{path}: not a model card: {key}: {first['msg']}") from None
    if card.schema_version > SCHEMA_VERSION:
        raise RetortError(f"{path}: schema_version {card.schema_version} is newer than {SCHEMA_VERSION}")
    digest = content.pop(DIGEST, None)
    if not changed and digest is not None and digest != sha256_json(content):
        raise RetortError(
            f"{path}: changed since it was written: its digest is of another content; restore it (such as by "
            "'dvc checkout --force'), or run the step that writes it again"
        )
    return card


def first_difference(own: Sequence[str], data: Mapping[int, str]) -> int | None:
    """The first label at which a network's class names are not those of the data; None: they agree.

    Args:
        own: by output. Names beyond the data's are no difference: there may be classes without images.
        data: by label, of labels that occur.
    """
    return next((label for label in sorted(data) if label >= len(own) or own[label] != data[label]), None)


def names_finding(
    own: Sequence[str], data: Mapping[int, str], subject: str, where: str, advice: str
) -> dict[str, Any]:
    """The finding ``model.class_names``: whether outputs are called what the data call them, by label.

    Args:
        own, data: as for ``first_difference``.
        where: the file that names the outputs.
        advice: the way out, where they differ.
    """
    twice = [name for name, count in Counter(own).items() if count > 1]
    beyond = [name for label, name in enumerate(own) if label not in data and name != str(label)]
    differs = first_difference(own, data)
    level, said = "info", f"All {len(data)} class names of {where} are those of the data, in their order."
    measured: Any = len(own)
    if differs is not None:
        wrong = sum(label >= len(own) or own[label] != name for label, name in data.items())
        measured = own[differs] if differs < len(own) else None
        named = f"'{measured}'" if measured is not None else f"nothing (it has {len(own)} classes)"
        wanted = data[differs]
        order = ", the same names in another order" if sorted(own) == sorted(data.values()) else ""
        level, said = (
            "error",
            (
                f"Class names differ: {where} calls label {differs} {named}, the data call it '{wanted}' "
                f"({wrong} of {len(data)} labels differ{order}). Its predictions would bear wrong names."
            ),
        )
    elif twice:
        level, said = "error", f"{where} calls several outputs {_some(twice)}: which one is meant is unknown."
    elif beyond:
        level, advice = "warning", "If these classes are gone for good, train on this data."
        said = (
            f"{where} and the data agree on {len(data)} class names, but the network also knows "
            f"{_some(beyond)}, of which the data have no image: nothing measures those outputs here."
        )
    return {
        "rule": RULE, "level": level, "subject": subject, "message": said, "row": "1.1",
        "measured": measured, "limit": len(data) if differs is None else data[differs],
        "advice": "" if level == "info" else advice,
    }  # fmt: skip


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:NAMED]) + more

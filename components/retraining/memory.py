"""What the last retraining saw: kept with the registered model in MLflow, and in this folder's state.

A pod's disk ends with the pod, so the registry is asked first; a copy of our own (in the place that pods
share, too) answers for it while it is away: a quiet week needs no tracker.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from components.common import shared
from components.common.errors import RetortError
from components.common.object_store import MissingError, Storage
from components.common.params import Registry
from components.common.storage import read_own_json, sha256_json, state_dir, write_json
from components.registry.versions import CHAMPION, opened

log = logging.getLogger(__name__)

TAG = "retrain.seen"  # of the registered model


@dataclass(frozen=True)
class Seen:
    """What a retraining was given: fingerprints of data, code and parameters, and how many images.

    ``clean`` is that of the rows that validation left, by content; see ``decide``.
    """

    data: str
    code: str
    params: str
    rows: int
    clean: str = ""


@dataclass(frozen=True)
class Memory:
    """What is known of the last retraining. ``away``: why the registry could not be asked; else empty."""

    seen: Seen | None
    champion: int | None
    away: str = ""


def recall(registry: Registry) -> Memory:
    """What the last retraining saw, and which version is champion now."""
    from mlflow.exceptions import MlflowException

    try:
        with opened(registry, "retrain") as versions:
            try:
                tags = versions.client.get_registered_model(registry.name).tags
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return Memory(None, None)
            champion = versions.holder(CHAMPION)
    except RetortError as error:
        return Memory(_read(_own(registry)), None, str(error).splitlines()[0])
    return Memory(_parsed(tags.get(TAG, "")), None if champion is None else int(champion.version))


def remember(registry: Registry, seen: Seen) -> None:
    """Keep it for the next retraining.

    Raises:
        RetortError: when the tracker does not answer.
    """
    path = _file(registry)
    write_json(path, asdict(seen))
    if (place := shared.place()) is not None:
        name, text = path.name, json.dumps(asdict(seen))
        place.attempt(lambda storage: shared.put_text(storage, text, f"retrain/{name}"))
    with opened(registry, "retrain") as versions:
        versions.client.set_registered_model_tag(registry.name, TAG, json.dumps(asdict(seen)))


def _file(registry: Registry) -> Path:
    """Of one registered model of one tracker: its name alone may stand for other models elsewhere."""
    return state_dir("retrain") / f"seen-{sha256_json([registry.tracking_uri, registry.name])[:16]}.json"


def _own(registry: Registry) -> dict[str, object]:
    path = _file(registry)
    place = shared.place()

    def fetch(storage: Storage) -> str:
        try:
            return shared.read_text(storage, f"retrain/{path.name}")
        except MissingError:
            return ""

    if place is not None and (text := place.attempt(fetch)):
        found: dict[str, object] = json.loads(text)
        return found
    return read_own_json(path)


def _parsed(text: str) -> Seen | None:
    try:
        return _read(json.loads(text))
    except ValueError:
        return None


def _read(values: object) -> Seen | None:
    """None where it is not what this program writes: then nothing is known, and all is looked at again."""
    names = {field.name for field in fields(Seen)}
    if not isinstance(values, dict) or set(values) != names:
        return None
    return Seen(**values)

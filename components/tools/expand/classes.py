"""Which classes an expanded network has, and the manifest and the plan with its labels."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from components.audit.plan_schema import Plan
from components.common.errors import RetortError
from components.dataset import manifest as manifests

NAMED = 5  # classes that a message names


@dataclass(frozen=True)
class Classes:
    """Which classes the expanded network has: old ones first, in their old order, then new ones.

    ``kept`` are the old classifier's rows of the old ones.
    """

    names: tuple[str, ...]
    kept: tuple[int, ...]

    @property
    def new(self) -> range:
        """Labels of the new classes."""
        return range(len(self.kept), len(self.names))


def choose(
    known: Sequence[str], table: pa.Table, wanted: Sequence[str] | None, manifest: Path, model: Path
) -> Classes:
    """The classes of the expanded network: of the ``known`` ones all, or those ``wanted``, and the new ones.

    Raises:
        RetortError: when a wanted class is unknown, or no class is new.
    """
    for name in wanted or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it knows {some(known)}"
            raise RetortError(f"expand.old_classes: '{name}' is no class of {model}; {hint}")
    old, chosen = set(known), set(known if wanted is None else wanted)  # there may be 100,000
    kept = [row for row, name in enumerate(known) if name in chosen]
    names = manifests.class_names(table)
    occurring = np.unique(table["label"].to_numpy())
    new = dict.fromkeys(
        names[label] for label in occurring.tolist() if label >= 0 and names[label] not in old
    )
    if not new:
        raise RetortError(
            f"{manifest}: every class in it is known to {model} ({some(known)}); add images of the new "
            "classes, then 'retort ingest && retort expand'"
        )
    return Classes((*(known[row] for row in kept), *new), tuple(kept))


def remap(table: pa.Table, classes: Classes) -> tuple[pa.Table, dict[int, int]]:
    """The manifest with the expanded network's labels, without classes that it does not have.

    Returns:
        The table, and the new label by the old one.
    """
    place = {name: label for label, name in enumerate(classes.names)}
    names = manifests.class_names(table)
    labels = np.array([*(place.get(name, -2) for name in names), manifests.UNLABELED], dtype=np.int32)
    mapped = labels[table["label"].to_numpy()]  # UNLABELED is -1: the last entry
    keep = mapped != -2
    named = pa.array([*classes.names, None], pa.string()).take(
        pa.array(np.where(mapped < 0, len(place), mapped))
    )
    table = table.set_column(
        table.schema.get_field_index("label"), manifests.SCHEMA.field("label"), pa.array(mapped)
    )
    table = table.set_column(
        table.schema.get_field_index("class_name"), manifests.SCHEMA.field("class_name"), named
    )
    mapping = {old: int(labels[old]) for old in range(len(names)) if labels[old] >= 0}
    return table.filter(pa.array(keep)), mapping


def relabel(plan: Plan, labels: dict[int, int]) -> Plan:
    """The plan with other labels; what it says of classes that are left out is left out."""

    def moved(values: dict[int, Any]) -> dict[int, Any]:
        return {labels[label]: value for label, value in values.items() if label in labels}

    sampling_ = plan.sampling
    by_label = {
        name: moved(getattr(sampling_, name)) for name in ("by_class", "by_source", "counts", "expected")
    }
    arguments = dict(plan.loss.arguments)
    if arguments.get("weights"):
        given = {int(label): weight for label, weight in arguments["weights"].items()}
        arguments["weights"] = {str(label): weight for label, weight in moved(given).items()}
    return plan.model_copy(
        update={
            "sampling": sampling_.model_copy(update=by_label),
            "loss": plan.loss.model_copy(update={"arguments": arguments}),
        }
    )


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:NAMED]) + more

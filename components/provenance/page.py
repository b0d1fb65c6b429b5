"""The page of a bundle that a person reads: what the model is, how good, of what, and how to check it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.links import Link
from components.common.storage import read_own_json

if TYPE_CHECKING:
    from components.step import StepContext

TEMPLATES = Path(__file__).with_name("templates")
TEMPLATE = "README.md.jinja"
SPLITS = {"val": "validation", "test": "test"}
FEW = 30  # images below which the recall of a class says little
CONFIDENCE = 0.95
MOST = 200  # classes that are named: the lowest recalls, where there are more


@dataclass(frozen=True)
class Measured:
    """A share of images: ``value``, and the ends of its 95 % interval, all 0..1."""

    split: str
    name: str
    value: float
    low: float
    high: float
    images: int


@dataclass(frozen=True)
class About:
    """What page and bill say of a model."""

    name: str
    card: dict[str, Any]
    data: dict[str, int]
    counts: dict[str, dict[str, int]]
    top1: list[Measured]
    classes: list[Measured]
    choice: dict[str, Any]
    parity: dict[str, Any]
    links: Sequence[Link]
    parameters: dict[str, Any]
    size: int
    few: list[str] = field(default_factory=list)
    rest: int = 0
    synthetic: int = 0


def about(folder: Path, links: Mapping[str, Link], run: StepContext) -> About:
    """Read off the bundle in ``folder`` what page and bill say."""
    proofs = folder / "extra_files"
    card, metrics = read_own_json(proofs / "card.json"), read_own_json(proofs / "metrics.json")
    counts, synthetic = _counts(proofs / "manifest.parquet")
    top1, classes = [], []
    for split, said in SPLITS.items():
        scores, images = metrics.get(split, {}), counts.get(split, {})
        total = int(scores.get("images") or sum(images.values()))
        if "top1" in scores and total:
            top1.append(_measured(said, "all classes", scores["top1"], total))
        classes += [
            _measured(said, name, value, images[name])
            for name, value in scores.get("per_class", {}).items()
            if value is not None and images.get(name)
        ]
    few = [one.name for one in classes if one.split == SPLITS["val"] and one.images < FEW]
    rest = max(0, len(classes) - MOST)
    if rest:
        classes = sorted(classes, key=lambda one: one.value)[:MOST]
    parameters: dict[str, Any] = {}
    for link in links.values():
        parameters |= link.parameters
    return About(
        name=run.params.registry.name,
        card=card,
        data={split: sum(images.values()) for split, images in counts.items()},
        counts=counts,
        top1=top1,
        classes=classes,
        choice=read_own_json(proofs / "choice.json").get("recommended") or {},
        parity=read_own_json(proofs / "parity.json"),
        links=list(links.values()),
        parameters=parameters,
        size=(folder / "model.onnx").stat().st_size,
        rest=rest,
        few=few[:MOST],
        synthetic=synthetic,
    )


def _counts(manifest: Path) -> tuple[dict[str, dict[str, int]], int]:
    """Images by split and class, and how many of them are not real."""
    import pyarrow.parquet as pq

    if not manifest.is_file():
        return {}, 0
    table = pq.read_table(manifest, columns=["split", "class_name", "label", "source"])
    counts: dict[str, dict[str, int]] = {}
    grouped = table.group_by(["split", "class_name", "label"]).aggregate([("source", "count")])
    for row in grouped.to_pylist():
        name = row["class_name"] if row["label"] is not None and row["label"] >= 0 else "(no label)"
        images = counts.setdefault(str(row["split"]), {})
        images[str(name)] = images.get(str(name), 0) + row["source_count"]
    return counts, sum(source != "real" for source in table["source"].to_pylist())


def _measured(split: str, name: str, value: float, images: int) -> Measured:
    """With the interval of Wilson (1927), as scipy works it out."""
    from scipy.stats import binomtest

    interval = binomtest(round(value * images), images).proportion_ci(CONFIDENCE, method="wilson")
    return Measured(split, name, float(value), float(interval.low), float(interval.high), images)


def render(about: About) -> str:
    """The page, as Markdown."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(  # noqa: S701 - Markdown; names are escaped by the filter
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = _cell
    environment.filters["percent"] = lambda share: f"{share:.1%}".replace("%", " %")
    return environment.get_template(TEMPLATE).render(about=about)


def _cell(text: object) -> str:
    """Text that stands in a table of Markdown as it is: names come from folders, and may hold anything."""
    plain = " ".join(str(text).split())
    for character in "\\`*_[]<>|#":
        plain = plain.replace(character, f"\\{character}")
    return plain

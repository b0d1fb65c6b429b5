"""What the audits and the plan show: histograms before and after, contact sheets, the probe's scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from components.audit.balance import Balance, effective_number, ratio
from components.audit.counts import SOURCES, Counts
from components.audit.params import Audit, AuditParams
from components.audit.plan_schema import Plan
from components.common.page import Page
from components.dataset.images import thumbnail

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from components.audit.rules import Class
    from components.audit.suspects import Judgement, Sample

BARS = 40  # classes up to which each has a bar of its own
# Okabe and Ito's palette, as on the page of validate
COLOURS = {"real": "#0072B2", "semi_synthetic": "#CC79A7", "synthetic": "#E69F00"}
SHEET = 24  # images of a contact sheet
SHEETS = (
    ("labels.suspect", "Suspect labels"),
    ("synthetic.degradation", "Synthetic images that look like a class which they harm"),
    ("synthetic.recognisable", "Synthetic images that are not recognised"),
    ("hard", "Hard images: their label stands, and the probe takes them for another class"),
)
AFTER = "#009E73"


def imbalance(page: Page, counts: Counts, found: Balance, audit: Audit) -> None:
    """The classes as they are, and as this audit alone would have them drawn."""
    page.figure(
        "Training images per class, and what an epoch would draw",
        histogram(counts.names, counts.train, counts.train.astype(np.float64), found.expected),
        note=f"Proposed by class sizes alone: {found.distribution}. {found.why} The plan adds what the "
        "synthetic audit says.",
    )
    total = counts.total
    there = total[total > 0]
    page.table(
        "How even the classes are",
        ["", "before", "as drawn"],
        [
            ["largest class to smallest", ratio(total), ratio(found.expected)],
            ["by effective number of samples", ratio(effective_number(there)), ""],
            ["smallest class", int(there.min()), float(found.expected[found.expected > 0].min())],
            ["median class", float(np.median(there)), float(np.median(found.expected))],
            ["largest class", int(there.max()), float(found.expected.max())],
            ["classes", len(counts.labels), ""],
            [f"classes below audit.min_per_class ({audit.min_per_class})",
             int((total < audit.min_per_class).sum()), ""],
        ],
        note="Effective number: Cui et al., 2019; beside the n-th image of a class the next one adds less.",
    )  # fmt: skip


def histogram(
    names: Sequence[str],
    before: NDArray[np.int64],
    drawn: NDArray[np.float64],
    expected: NDArray[np.float64],
) -> Figure:
    """Two bars a class: images by source, and what an epoch draws of them. Beyond BARS classes: curves.

    Args:
        before: int64 [C, 3] by source.
        drawn: float64 [C, 3], the weight of each source within its class, in any unit.
        expected: float64 [C].
    """
    from matplotlib import pyplot

    total = before.sum(axis=1)
    if len(names) > BARS:
        figure, axes = pyplot.subplots(figsize=(8, 3.4))
        order = np.argsort(-total, kind="stable")
        ranks = np.unique(np.geomspace(1, len(order), 400).round().astype(int))  # a page stays small
        axes.plot(ranks, total[order][ranks - 1], color=COLOURS["real"], label="images")
        axes.plot(ranks, expected[order][ranks - 1], color=AFTER, linestyle="--", label="drawn in an epoch")
        axes.set(xlabel="classes, largest first", yscale="symlog", xscale="log", xlim=(1, len(order)))
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    else:
        figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.42 * len(names)))
        places = np.arange(len(names), dtype=np.float64)
        share = drawn / np.maximum(drawn.sum(axis=1, keepdims=True), 1e-12)
        left, right = np.zeros(len(names)), np.zeros(len(names))
        for column in (0, 2, 1):
            source = SOURCES[column]
            if not before[:, column].any():
                continue
            colour, name = COLOURS[source], source.replace("_", "-")
            axes.barh(places - 0.2, before[:, column], left=left, height=0.36, color=colour, label=name)
            after = share[:, column] * expected
            axes.barh(
                places + 0.2, after, left=right, height=0.36, color=colour, alpha=0.45, hatch="///",
                edgecolor="white", linewidth=0, label=f"{name}, drawn in an epoch",
            )  # fmt: skip
            left, right = left + before[:, column], right + after
        axes.set_yticks(places, [shortened(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("images")
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def shortened(name: str) -> str:
    """A class's name that fits beside an axis, and that matplotlib does not take for mathematics."""
    return (name if len(name) <= 24 else name[:23] + "…").replace("$", r"\$")


def plan(
    page: Page,
    names: Sequence[str],
    before: NDArray[np.int64],
    drawn: NDArray[np.float64],
    found: Balance,
    made: Plan,
) -> None:
    """The class histogram before and after the plan, and the plan in words."""
    page.figure(
        "Class histogram before and after the plan",
        histogram(names, before, drawn, found.expected),
        note=f"Sampling: {made.sampling.distribution}. {found.why} Loss: {made.loss.name}. {made.loss.why}",
    )
    weighted = list(made.sampling.by_source.items())
    if weighted:
        by_label = dict(zip(made.sampling.counts, names, strict=True))
        page.table(
            "Weights by source",
            ["class", *(source.replace("_", "-") for source in SOURCES)],
            [
                [by_label[label], *(weights.get(source, 1.0) for source in SOURCES)]
                for label, weights in weighted[:BARS]
            ],
            note=f"Of {len(weighted):,} classes; 1 everywhere else." if len(weighted) > BARS else "",
        )
    if made.leave_out:
        page.table(
            "Rows left out",
            ["path", "asked for by"],
            [[row.path, row.finding] for row in made.leave_out[:BARS]],
            note=f"{len(made.leave_out):,} in all: plan.json lists them.",
        )


def labels(page: Page, split: NDArray[np.object_], judged: Judgement) -> None:
    """How many labels are suspect, beside how many of them are expected to be right.

    Args:
        split: object [n], of the real images that were judged.
    """
    table = []
    for name in ("train", "val", "test"):
        mine = split == name
        suspect = judged.suspect & mine
        if mine.any():
            right = float((1 - judged.wrong[suspect]).sum())
            table.append([name, int(mine.sum()), int(suspect.sum()), f"{right:.1f}"])
    page.table(
        "Suspect labels by split",
        ["split", "real images", "suspect", "of them expected to be right"],
        table,
        note="Suspect: both models, which have learnt from real training images other than the one they "
        "judge, prefer one other class, and together hold the label for wrong with 40 % or more. Expected "
        "to be right: the sum of the probabilities that these labels are right after all, taking wrong "
        "labels to fall on any class alike; images that look like another class, and are not of it, come "
        "on top.",
    )


def synthetic(
    page: Page, counts: Counts, classes: Sequence[Class], samples: Sequence[Sample], params: AuditParams
) -> None:
    """The probe's scores by class, and contact sheets of the worst findings."""
    if classes:
        worst = sorted(classes, key=lambda one: (not one.named, one.place))[:BARS]
        page.table(
            "Classes with synthetic images",
            [
                "class", "real", "synthetic", "x median", "recognised",
                "beyond chance", "recall without", "recall with", "gap (AUC)", "weight",
            ],
            [
                [counts.names[one.place], int(counts.train[one.place, 0]), one.made, one.to_median,
                 _percent(one.recognised), _percent(one.beyond_chance), _percent(one.real_recall),
                 _percent(one.with_made), "" if one.auc is None else one.auc, one.weight]
                for one in worst
            ],
            note="x median: synthetic images to the median size of the other classes. Recognised: by "
            "one of two classifiers that know only real images; beyond chance: less what two tries give "
            "by chance. Recall: of real held-out images, learnt without "
            "synthetic images and with them. Gap: how well real and synthetic images are told apart, 0.5 is "
            "chance. Weight: of its synthetic images in the plan.",
        )  # fmt: skip
    if params.report.thumbnails:
        for rule, title in SHEETS:
            chosen = [one for one in samples if one.rule == rule][:SHEET]
            if chosen:
                page.images(
                    title,
                    [
                        (
                            thumbnail(params.data.root, one.path),
                            f"{one.path}: {one.class_name}, rather {one.suggested}"
                            + ("" if one.split == "train" else f" ({one.split})"),
                        )
                        for one in chosen
                    ],
                )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"

"""What ``expand`` says of the expanded network: of old classes, of new ones, and of what was trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from components.common.page import Page
from components.step import StepContext
from components.tools.expand.classes import Classes, some

WAYS = {"all": "whole network", "new_rows": "new rows only"}  # expand.mode and the name of its phase
ROW = "5.4"


def find_old(run: StepContext, classes: Classes, counts: np.ndarray, old: dict[str, Any]) -> None:
    """Accuracy on old classes, and what would let it fall or hide that it fell."""
    rule, subject = "expand.old_accuracy", "old classes"
    bare = [classes.names[label] for label in range(len(classes.kept)) if not counts[label]]
    if bare:
        which = "any" if len(bare) == len(classes.kept) else f"{len(bare)} of {len(classes.kept)}"
        run.add_finding(
            rule, "warning", subject,
            f"there are no training images of {which} old classes ({some(bare)}): nothing reminds the "
            "network of them while it learns the new ones",
            measured=len(bare), limit=0, row=ROW,
            advice="Add some of their images to the data, or leave them out with expand.old_classes.",
        )  # fmt: skip
    if old["after"] is None:
        run.add_finding(
            rule, "warning", subject,
            "there are no validation images of old classes, so it is not known what they have lost",
            row=ROW, advice="Add some of their images to the split 'val'.",
        )  # fmt: skip
        return
    low, high = (old["difference"] + sign * old["half_width"] for sign in (-1, 1))
    fell = high < 0
    run.add_finding(
        rule, "warning" if fell else "info", subject,
        f"{old['before']:.2%} of {old['images']} validation images before (by the old network), "
        f"{old['start']:.2%} once the new rows stood beside the old ones, {old['after']:.2%} after training: "
        f"{old['difference']:+.2%} (95 % interval {low:+.2%} to {high:+.2%})",
        measured=round(old["difference"], 6), limit=0.0, row=ROW,
        advice="Add images of the classes that lost most (see the table of recall), train fewer epochs, or "
        "lower expand.lr." if fell else "",
    )  # fmt: skip


def find_new(run: StepContext, classes: Classes, new: dict[str, Any]) -> None:
    """How well the new classes are recognised, before and after training."""
    rule, subject = "expand.new_accuracy", "new classes"
    if new["after"] is None:
        run.add_finding(
            rule, "warning", subject,
            "there are no validation images of new classes, so it is not known how well they were learnt",
            row=ROW, advice="Add some of their images to the split 'val'.",
        )  # fmt: skip
        return
    run.add_finding(
        rule, "info", subject,
        f"{new['before']:.2%} of {new['images']} validation images before training, with rows from class "
        f"means; {new['after']:.2%} after it",
        measured=round(new["after"], 6), row=ROW,
    )  # fmt: skip


def find_mode(run: StepContext, mode: str, gain: dict[str, float] | None) -> None:
    """What the choice of what is trained cost or gave; only the new rows is always worth a warning."""
    rows_only = mode == "new_rows"
    said = "only the new rows were trained: the features stay blind to what tells the new classes apart"
    if gain is None:
        if rows_only:
            run.add_finding(
                "expand.mode", "warning", "expand.mode", said, measured=mode, limit="all", row=ROW,
                advice="Set expand.mode to all, or expand.control to true to see the difference.",
            )  # fmt: skip
        return
    value, half = gain["val_top1"], gain["val_half_width"]
    apart = ", ".join(
        f"{part} classes {gain[f'{part}_top1']:+.2%}" for part in ("old", "new") if f"{part}_top1" in gain
    )
    compared = (
        f"training the whole network gives {value:+.2%} top-1 over training only the new rows, on the same "
        f"validation images, after as many epochs (95 % interval {value - half:+.2%} to {value + half:+.2%}; "
        f"{apart})"
    )
    clear = abs(value) > half
    better = ("all" if value > 0 else "new_rows") if clear else mode
    advice = "" if clear else "The difference is within the noise: more validation images would tell."
    if better != mode:
        advice = f"Set expand.mode to {better}."
    run.add_finding(
        "expand.mode", "warning" if rows_only or better != mode else "info", "expand.mode",
        f"{said}; {compared}" if rows_only else compared,
        measured=round(value, 6), limit=0.0, row=ROW, advice=advice,
    )  # fmt: skip


def show(page: Page, mode: str, written: dict[str, Any]) -> None:
    """Top-1 of old and of new classes, before and after, and by the other way where there was a control.

    Args:
        written: as in ``metrics.json``.
    """
    control = written.get("control")
    columns = ["classes", "images", "old network", "before training", f"after ({WAYS[mode]})", "difference"]
    lines = []
    for part in ("old", "new"):
        entry = written[part]
        first = entry["before"] if part == "old" else None
        half = (
            "" if entry["difference"] is None else f"{entry['difference']:+.1%} ± {entry['half_width']:.1%}"
        )
        line = [part, entry["images"], *(_share(v) for v in (first, entry["start"], entry["after"])), half]
        lines.append([*line, _share(control[part]["after"])] if control else line)
    if control:
        columns.append(f"after ({WAYS[control['mode']]})")
    page.table(
        "Old and new classes", columns, lines,
        note="Top-1 on the validation images of these classes, among all classes. New rows begin at class "
        "means of what the classifier is fed; the difference is to the old network, or for new classes to "
        "that beginning, with half its 95 % interval.",
    )  # fmt: skip


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"

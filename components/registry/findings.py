"""What the step ``register`` says of a trial, of the images that were judged by, and of its decision."""

from __future__ import annotations

from components.common.progress import counted
from components.registry.decision import Decision
from components.registry.scores import Chosen
from components.registry.slices import MIN_IMAGES
from components.registry.trial import Trial
from components.step import StepContext

BY_HAND = "'retort promote VERSION' makes it champion all the same."
ADVICE = {
    "registry.class": "Look at that class's training images and at what the plan gives it.",
    "registry.slice": "Look at the images that got worse, and at how many such images training has.",
    "registry.frozen": "Look at the new validation rows: their labels may be what is wrong.",
    "registry.latency": "A smaller network or image; or a benchmark.latency_budget_ms that allows it.",
}


def say_trial(run: StepContext, version: int, trial: Trial) -> None:
    """``registry.trial``: whether the bundle could be served."""
    if trial.failure:
        run.add_finding(
            "registry.trial", "warning", f"version {version}",
            f"the new version is not promoted, its trial failed: {trial.failure}",
            advice="The bundle was loaded in a clean process with what its requirements.txt brings; "
            "'retort export' and 'retort register' make it anew.",
        )  # fmt: skip
        return
    said = trial.said
    run.add_finding(
        "registry.trial", "info", f"version {version}",
        f"Loaded in a clean process in {said['load_s']:.1f} s, it answers with the scores that were proved, "
        f"in {said['p50_ms']:.3g} ms an image; after {len(said['refused'])} images that it refused, and in a "
        f"burst, it does so still",
        measured=said["p50_ms"],
    )  # fmt: skip


def say_unmeasured(run: StepContext, champion: int, error: Exception) -> None:
    """``registry.better`` of a champion that cannot be asked."""
    run.add_finding(
        "registry.better", "warning", f"champion, version {champion}",
        f"it has no model.onnx of ours that could be measured ({str(error).splitlines()[0]}), so the new "
        "version stays challenger",
        advice="'retort promote VERSION' makes it champion.",
    )  # fmt: skip


def say_images(run: StepContext, champion: int, chosen: Chosen) -> None:
    """``registry.data``: which images both were judged by, and which not."""
    subject = f"champion, version {champion}"
    total = chosen.table.num_rows
    if chosen.frozen is None:
        suspect = f", without {chosen.suspects:,} suspect labels" if chosen.suspects else ""
        run.add_finding(
            "registry.data", "warning", subject,
            "its version does not say which images it was judged by, so both are judged by the present "
            f"validation split alone{suspect}; the champion may have trained on some of them",
            measured=total,
        )  # fmt: skip
        return
    left = {
        "are no longer there": chosen.gone,
        "are in another split now": chosen.moved,
        "have another class now": chosen.relabelled,
    }
    aside = {"with suspect labels": chosen.suspects, "that the champion trained on": chosen.trained}
    frozen = int(chosen.frozen.sum())
    if frozen == total and not any([*left.values(), *aside.values()]):
        return
    lost = "".join(f"; {count:,} {what}" for what, count in left.items() if count)
    out = "".join(f"; {count:,} new ones {what} are left out" for what, count in aside.items() if count)
    many = sum(left.values()) > frozen
    run.add_finding(
        "registry.data", "warning" if many else "info", subject,
        f"both are judged by {counted(frozen, 'image')} of the champion's validation split and "
        f"{total - frozen:,} new ones{lost}{out}",
        measured=frozen, limit=frozen + sum(left.values()),
    )  # fmt: skip


def say_decision(run: StepContext, champion: int, decision: Decision) -> None:
    """A finding for each reason against it, or why it was promoted; and what was too few to judge."""
    if decision.promoted:
        run.add_finding(
            "registry.better", "info", f"champion, version {champion}",
            f"the new version becomes champion, {decision.reason}",
            measured=decision.challenger, limit=decision.champion,
        )  # fmt: skip
    for refusal in decision.refusals:
        doubt = refusal.rule == "registry.better" and decision.images and decision.difference.high >= 0
        said = refusal.reason if refusal.reason.startswith("not ") else f"not better: {refusal.reason}"
        run.add_finding(
            refusal.rule, "info" if doubt else "warning",
            f"champion, version {champion}" if refusal.rule == "registry.better" else refusal.subject,
            f"the new version stays challenger, {said}",
            measured=refusal.measured, limit=refusal.limit,
            advice=" ".join(filter(None, [ADVICE.get(refusal.rule, "See the table of slices;"), BY_HAND])),
        )  # fmt: skip
    if decision.few:
        named = ", ".join(f"'{name}'" for name in decision.few[:5])
        run.add_finding(
            "registry.class", "info", counted(len(decision.few), "class", "classes"),
            f"judged together, not one by one, with fewer than {MIN_IMAGES} validation images each: {named}"
            + (", ..." if len(decision.few) > 5 else ""),
            measured=len(decision.few),
        )  # fmt: skip

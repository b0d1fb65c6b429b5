"""``retort report``: the whole run on one page, from what the steps left in ``outputs/``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.findings import Report, read_report
from components.common.page import read_sections, render
from components.common.progress import counted
from components.common.storage import human_bytes, read_json, write_text
from components.registry.decision import verdict
from pipelines.params import Params
from pipelines.steps import MAIN, OUTPUTS, Pipeline, Stage

TEMPLATES = Path(__file__).with_name("templates")


@dataclass
class Left:
    """What one stage left: its report (None: it did not run) and the sections of its page."""

    name: str
    title: str
    report: Report | None
    sections: list[dict[str, str]]

    @property
    def verdict(self) -> str:
        """``passed``, ``failed`` or ``not run``."""
        if self.report is None:
            return "not run"
        return "passed" if self.report.passed else "failed"

    def count(self, level: str) -> int:
        """Findings of a level."""
        return sum(f.level == level for f in self.report.findings) if self.report else 0


def report(params: Params, outputs: Path, pipeline: Pipeline = MAIN) -> None:
    """Write ``outputs/index.html`` (self-contained, no network) and print the run's summary.

    Raises:
        RetortError: when a file in ``outputs`` is damaged; missing ones are shown as not run.
    """
    steps = [_read(outputs, stage) for stage in pipeline.stages]
    answers, headline = _answers(outputs), _headline(outputs)
    write_text(outputs / "index.html", _page(params, steps, answers, headline))
    for question, answer in answers:
        print(f"{question} {answer}")
    for step in steps:
        counts = ", ".join(
            counted(step.count(level), level) for level in ("error", "warning") if step.count(level)
        )
        print(f"  {step.title:<26} {step.verdict:<8} {counts}".rstrip())
    for label, value, _ in headline:
        print(f"  {label:<26} {value}")
    print(f"The whole run on one page: {outputs / 'index.html'}")


def retrained(params: Params, stages: Sequence[Stage], said: str, page: Path) -> None:
    """Write the page of one retraining: what came of it, and the report of each stage that it ran."""
    left = [_read(OUTPUTS, stage) for stage in stages]
    failed = any(step.verdict == "failed" for step in left)
    write_text(
        page,
        render(
            "run.html", TEMPLATES, title=f"Retort: {params.registry.name}, trained again",
            name=params.registry.name, state="failed" if failed else "passed", sentence=said,
            answers=[], headline=[], steps=left, counted=counted,
        ),
    )  # fmt: skip


def _read(outputs: Path, stage: Stage) -> Left:
    folder = outputs / stage.folder.relative_to(OUTPUTS)
    path = folder / "report.json"
    found = read_report(path) if path.exists() else None
    if found and stage.name == "plan":
        # the plan's report repeats the findings of both audits, which stand under their own steps here
        own = [finding for finding in found.findings if finding.rule.startswith("plan")]
        found = found.model_copy(update={"findings": own})
    return Left(stage.name, stage.title, found, read_sections(folder) if found else [])


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _answers(outputs: Path) -> list[tuple[str, str]]:
    """What a person wants to know before any number: did the teacher help, and is the student in use?"""
    answers = []
    student = _json(outputs / "student" / "metrics.json")
    if "control" in student and "kept" in student:
        answers.append(("Which network is shipped?", _shipped(student)))
    if "val" in student:
        answers.append(("Did the teacher help?", _helped(student)))
    registered = _json(outputs / "register" / "registered.json")
    if registered:
        said = verdict(
            registered["version"], registered["alias"], registered.get("champion"),
            registered.get("reason", ""),
        )  # fmt: skip
        answers.append(("Champion or challenger?", f"{registered['name']} {said}."))
    return answers


def _shipped(student: dict[str, Any]) -> str:
    """Student or control: said first, since all that follows is of that one."""
    tops = {who: student.get(who, {}).get("val", {}).get("top1") for who in ("distilled", "control")}
    numbers = ", ".join(f"{who} {value:.1%}" for who, value in tops.items() if value is not None)
    which = (
        "The student trained without the teacher: it is no worse than the distilled one"
        if student["kept"] == "control"
        else "The distilled student"
    )
    return f"{which} (top-1 on validation: {numbers}). See distill.kept."


def _helped(student: dict[str, Any]) -> str:
    """The student beside the same student without a teacher, on the same validation images."""
    gain, control = student.get("gain", {}), student.get("control", {}).get("val", {})
    taught = student.get("distilled", student)["val"]
    if "val_top1" not in gain or "top1" not in control:
        return "Not measured: there is no student without a teacher beside it (distill.control)."
    value, low, high, images = gain["val_top1"], gain["val_low"], gain["val_high"], taught["images"]
    seeds = gain.get("seeds", 1)
    if low > 0:
        said = "Yes" if seeds > 2 else "It seems so, of one training"
    elif high < 0:
        said = "No, it did harm" if seeds > 2 else "It seems not, of one training"
    else:
        said = "Unknown, the difference is within the noise"
    numbers = (
        f"{said}: {taught['top1']:.1%} top-1 with it, {control['top1']:.1%} without it, "
        f"{100 * value:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f}) on "
        f"{counted(images, 'validation image')}."
    )
    if high < 0:
        numbers += " See distill.gain for the way out."
    elif low <= 0:
        numbers += " More validation images would tell."
    return numbers


def _headline(outputs: Path) -> list[tuple[str, str, str]]:
    """(label, value, note) of the numbers that a person asks for first, where they are there."""
    lines: list[tuple[str, str, str]] = []
    for label, folder in (("Teacher, top-1", "teacher"), ("Student, top-1", "student")):
        metrics = _json(outputs / folder / "metrics.json")
        arch = _json(outputs / folder / "model.json").get("arch", {}).get("name", "")
        for split, note in (("test", "on real held-out test images"), ("val", "on the validation split")):
            if "top1" in metrics.get(split, {}):  # own splits may have no test images
                lines.append((label, f"{metrics[split]['top1']:.1%}", f"{arch}, {note}"))
                break
    choice = _json(outputs / "benchmark" / "choice.json")
    compared = _json(outputs / "benchmark" / "metrics.json").get("student_to_teacher")
    if compared:
        note = "of the teacher's p50, one image, measured side by side"
        lines.append(("Student's latency", f"{compared['p50_ratio']:.2f} x", note))
    model = outputs / "export" / "model.onnx"
    if model.exists():
        teacher = outputs / "export" / "teacher" / "model.onnx"
        note = f"teacher: {human_bytes(teacher.stat().st_size)}" if teacher.exists() else "model.onnx"
        lines.append(("Student's file", human_bytes(model.stat().st_size), note))
    if best := choice.get("recommended"):
        note = f"p50, {best['model']} in {_configuration(best)}"
        lines.append(("Recommended", f"{best['p50_ms']:.2f} ms", note))
    registered = _json(outputs / "register" / "registered.json")
    if registered:
        champion = registered.get("champion")
        alias = registered["alias"] or "neither champion nor challenger"
        stays = f"; champion: v{champion}" if champion not in (None, registered["version"]) else ""
        name = f"v{registered['version']}, {alias}"
        lines.append(("Registered", name, f"as {registered['name']}{stays}"))
    return lines


def _configuration(row: dict[str, Any]) -> str:
    return f"{row['engine']}, {counted(row['threads'], 'thread')}, {row['precision']}, batch {row['batch']}"


def _page(
    params: Params, steps: list[Left], answers: list[tuple[str, str]], headline: list[tuple[str, str, str]]
) -> str:
    failed = [step for step in steps if step.verdict == "failed"]
    missing = [step for step in steps if step.verdict == "not run"]
    if failed:
        state, sentence = "failed", f"Stopped at: {failed[0].title}."
    elif missing:
        state, sentence = "unfinished", f"Not run yet: {', '.join(step.title for step in missing)}."
    else:
        state, sentence = "passed", "Every step passed its checks."
    name = params.registry.name
    return render(
        "run.html", TEMPLATES, title=f"Retort: {name}", name=name, state=state, sentence=sentence,
        answers=answers, headline=headline, steps=steps, counted=counted,
    )  # fmt: skip

"""What passed the gate: written by the check, demanded by the distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.common.errors import RetortError
from components.common.findings import read_report
from components.common.storage import need, read_json, sha256_file, write_json
from components.step import name_of
from components.training.params import CheckParams

SCHEMA_VERSION = 3  # 3: what the check has found, beside what it was given
FILE = "gate.json"
# what changes neither what is trained nor what was judged: where and how fast the work is done, what is kept
FREE = {
    "student.train.num_workers", "student.train.checkpoint_minutes", "student.train.compile",
    "distill.keep", "distill.control", "distill.seeds",
}  # fmt: skip


def inputs(
    manifest: Path, plan: Path, teacher: Path, weights: Path, teachers: Sequence[str] = ()
) -> list[Path]:
    """The files that the gate judges.

    Args:
        teachers: folders of more teachers (``distill.teachers``).
    """
    trained = [teacher, *map(Path, teachers)]
    return [
        manifest,
        plan,
        *(weights / f"{who}.{kind}" for who in ("teacher", "student") for kind in ("safetensors", "json")),
        *(folder / name for folder in trained for name in ("model.safetensors", "model.json")),
    ]


def checked_values(params: CheckParams) -> dict[str, Any]:
    """The values that the gate judges, or that decide what is trained, by their keys in params.yaml."""
    sections = {
        "student": params.student.model_dump(mode="json", exclude={"valid"}),
        "distill": params.distill.model_dump(mode="json"),
    }
    return {
        "global.image_size": params.general.image_size,
        "global.class_num": params.general.class_num,
        "global.seed": params.general.seed,
        "teacher.arch": params.teacher.arch.model_dump(mode="json"),
        "teacher.weights": params.teacher.weights,
        "ray.workers": params.ray.workers,
        "checks.waive": sorted(rule for rule in params.checks.waive if rule.startswith("distill.")),
        **{key: value for key, value in _flat(sections).items() if key not in FREE},
    }


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested sections by dotted keys; an architecture stays whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{above}{name}"
        if isinstance(value, Mapping) and name != "arch":
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = value
    return flat


def _hashes(files: Mapping[str, Path]) -> dict[str, str]:
    return {name: sha256_file(path) for name, path in files.items() if path.is_file()}


def write(
    path: Path, params: CheckParams, files: Sequence[Path], found: Mapping[str, Path] | None = None
) -> None:
    """Write down what passed.

    Args:
        found: what the check has made beside it, by its path there, and where that lies now.
    """
    content = {
        "inputs": _hashes({name_of(file): file for file in files}),
        "found": _hashes(found or {}),
        "judged": checked_values(params),
    }
    write_json(path, {"schema_version": SCHEMA_VERSION, **content})


def require_passed(folder: Path, params: CheckParams, files: Sequence[Path]) -> None:
    """Raises RetortError unless the check in ``folder`` passed for exactly these files and values."""
    again = "run 'retort check' again"
    report = read_report(need(folder / "report.json", "check"))
    if not report.passed or report.step != "check":
        raise RetortError(f"{folder / 'report.json'}: the check before distillation did not pass; see there")
    gate = read_json(need(folder / FILE, "check"))
    if gate.get("schema_version") != SCHEMA_VERSION:
        raise RetortError(f"{folder / FILE}: not a gate of this program; {again}")
    now = _hashes({name_of(file): file for file in files})
    for name in sorted({*now, *gate["inputs"]}):
        if now.get(name) != gate["inputs"].get(name):
            raise RetortError(f"{name}: not the file that passed the check before distillation; {again}")
    made = _hashes({name: folder / name for name in gate["found"]})
    for name, sha256 in gate["found"].items():
        if made.get(name) != sha256:
            raise RetortError(f"{folder / name}: not the file that the check has written; {again}")
    values = checked_values(params)
    for key in [*values, *(key for key in gate["judged"] if key not in values)]:
        if gate["judged"].get(key) != values.get(key):
            raise RetortError(
                f"{key}: the check before distillation passed with {gate['judged'].get(key)!r}, "
                f"not with {values.get(key)!r}; {again}"
            )

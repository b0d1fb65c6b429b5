"""Of what was trained, the better network goes on, with the manifest, plan and gate that belong to it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from components.audit.plan_schema import Plan, Sampling, read_plan
from components.common.errors import RetortError
from components.common.params import StepParams
from components.common.storage import read_json, sha256_file, write_json
from components.dataset import manifest as manifests
from components.models.card import Lineage, ModelCard
from components.models.params import Arch
from components.retraining.choose import choose

CLEAN, PLAN = Path("data/clean.parquet"), Path("plan/plan.json")
UPDATED, DISTILLED, PASSED = Path("updated"), Path("distilled"), Path("passed")
OUT, MADE = Path("outputs/retrain/chosen"), Path("data/retrained.parquet")
OLD = ["b", "a"]  # the champion's order


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest of two classes, its plan, and what both trainings left."""
    monkeypatch.chdir(tmp_path)
    write_manifest(CLEAN, ["a", "b"])
    plan = Plan(manifest=sha256_file(CLEAN), sampling=Sampling(by_class={0: 2.0}))
    PLAN.parent.mkdir()
    plan.write(PLAN)
    UPDATED.mkdir()
    write_manifest(UPDATED / "clean.parquet", OLD)
    write_network(UPDATED, UPDATED / "clean.parquet", OLD, 0.9)
    PASSED.mkdir()
    write_json(PASSED / "gate.json", {"schema_version": 3})


def write_manifest(path: Path, names: list[str]) -> None:
    rows = [
        {"path": f"{name}.png", "label": names.index(name), "class_name": name, "split": "train",
         "source": "real"}
        for name in ("a", "b")
    ]  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    manifests.write(pa.Table.from_pylist(rows, schema=manifests.SCHEMA), path)


def write_network(folder: Path, manifest: Path, names: list[str], accuracy: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(folder.name.encode())
    ModelCard(
        arch=Arch(name="linear"), class_names=names, input_size=[3, 8, 8], mean=[0.5] * 3, std=[0.5] * 3,
        data_fingerprint=manifests.fingerprint(manifest), sha256="00",
        lineage=[Lineage(source="champion, version 3", sha256="11", coverage=1.0)],
    ).write(folder / "model.json")  # fmt: skip
    split = {"top1": accuracy, "macro_recall": accuracy}
    write_json(folder / "metrics.json", {"val": split, "test": {"images": 0}})


def run(distilled: Path | None = DISTILLED) -> str:
    choose(
        StepParams(), manifest=CLEAN, plan=PLAN, updated=UPDATED, distilled=distilled,
        passed=PASSED if distilled else None, clean=MADE, out=OUT,
    )  # fmt: skip
    return (OUT / "model.safetensors").read_text()


def test_the_champions_own_order_of_classes_goes_with_it() -> None:
    assert run(None) == "updated"
    assert manifests.class_names(manifests.read(MADE)) == OLD
    plan = read_plan(OUT / "plan.json", sha256_file(MADE))
    assert plan.sampling.by_class == {1: 2.0}, "class a is label 1 there"
    gate = read_json(OUT / "gate.json")
    assert gate["judged"]["start"] == "11"
    assert gate["inputs"][str(UPDATED / "model.safetensors")] == sha256_file(UPDATED / "model.safetensors")


@pytest.mark.parametrize(("accuracy", "chosen"), [(0.95, "distilled"), (0.9, "updated"), (0.8, "updated")])
def test_the_better_one_by_validation_goes_on(accuracy: float, chosen: str) -> None:
    write_network(DISTILLED, CLEAN, ["a", "b"], accuracy)
    assert run() == chosen
    names = {"updated": OLD, "distilled": ["a", "b"]}[chosen]
    assert manifests.class_names(manifests.read(MADE)) == names
    assert read_json(OUT / "gate.json").get("judged", {}).get("start", "of the check") == (
        "of the check" if chosen == "distilled" else "11"
    )


def test_a_student_of_other_data_has_no_part_in_it() -> None:
    """As an earlier run has left it, where nothing was trained beside the champion this time."""
    write_manifest(Path("data/earlier.parquet"), ["b", "a"])
    write_network(DISTILLED, Path("data/earlier.parquet"), ["a", "b"], 0.99)
    assert run() == "updated"


def test_without_any_network_it_says_what_to_run() -> None:
    (UPDATED / "model.json").unlink()
    (UPDATED / "model.safetensors").unlink()
    with pytest.raises(RetortError, match="run 'retort retrain update' first"):
        run(None)

"""What would help most: told from what was measured; real trainings with planted causes are told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from components.audit.plan_schema import Plan
from components.common.page import Page
from components.common.storage import sha256_file
from components.dataset import manifest as manifests
from components.training import advice, driver
from components.training.advice import Asked, Facts
from components.training.params import FinetuneParams
from components.training.spec import Phase
from tests.components.training import local


def asked(recall: float, classes: int = 10, images: int = 100) -> Asked:
    """Of each class as many are recognised; it is unsure about the others."""
    actual = np.repeat(np.arange(classes), images)
    wrong = np.tile(np.arange(images) >= recall * images, classes)
    return Asked(actual, np.where(wrong, (actual + 1) % classes, actual), np.where(wrong, 0.5, 0.9))


def known(reached: float, fitted: float, recalls: list[float] | None = None, **more: Any) -> Facts:
    rows = [
        {"epoch": i, "val_macro_recall": recall, "val_loss": 1.0, "train_top1": recall}
        for i, recall in enumerate(recalls or [reached] * 8)
    ]
    names = [f"class {i}" for i in range(10)]
    values: dict[str, Any] = {"counts": np.full(10, 100), "steps": 1000, "rate": 0.02, "usual": 0.025} | more
    return Facts("teacher", rows, asked(reached), asked(fitted), names, **values)


def first(facts: Facts) -> str:
    return next((one.cause for one in advice.advise(facts)), "")


def test_what_is_perfect_needs_no_advice() -> None:
    assert advice.advise(known(1.0, 1.0)) == []


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        (known(0.6, 1.0), "more labels"),
        (known(0.6, 1.0, pool=5000), "unlabelled images"),
        (known(0.6, 1.0, pool=5000, used=1000), "more labels"),
        (known(0.5, 0.5, [0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5], steps=200), "more epochs"),
        (known(0.5, 0.5, steps=10_000), "larger network"),
        (known(0.5, 0.5, rate=1e-6), "rate too low"),
    ],
)
def test_the_first_advice_is_what_the_numbers_say(facts: Facts, cause: str) -> None:
    assert first(facts) == cause


def test_epochs_are_those_of_the_long_phase_and_of_the_key_that_sets_them() -> None:
    recalls = [0.1, 0.2, 0.3, 0.35, 0.4, 0.5, 0.1]
    found = {one.cause: one for one in advice.advise(known(0.5, 0.5, recalls, finetuned=1))}
    assert "teacher.train.epochs: 12 or more" in str(found["more epochs"])
    assert "from 30% to 50% in the second half, after 6 epochs" in str(found["more epochs"])
    own = known(0.5, 0.5, recalls, finetuned=1, epochs_key="distill.epochs")
    assert any("(distill.epochs: 12 or more)" in str(one) for one in advice.advise(own))


def test_it_is_said_in_the_report_on_the_page_and_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[dict[str, Any]] = []
    page = Page()

    def find(rule: str, level: str, subject: str, message: str, **values: Any) -> None:
        found.append({"rule": rule, "level": level, "message": message, **values})

    run: Any = SimpleNamespace(name="finetune", add_finding=find, page=page)
    advice.tell(run, known(0.6, 1.0))
    assert found[0]["rule"] == "train.advice"
    assert found[0]["level"] == "info"
    assert "  " not in found[0]["message"]
    assert "macro recall 60.0% on validation, 100.0% on images it learnt from" in found[0]["message"]
    assert "more labels, twice as many first of class" in capsys.readouterr().err
    assert page.sections[0]["title"] == "What would help the teacher most"


# --- planted causes -----------------------------------------------------------------------------------------


def planted(cause: str, folder: Path, seed: int) -> Facts:
    """A real training on scikit-learn's digits that has one fault; what is known when it is done."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    order = rng.permutation(len(digits.target))
    labels = digits.target[order].astype(int)
    splits = np.array(["val"] * 599 + ["test"] * 20 + ["train"] * (len(labels) - 619), dtype=object)
    train, kept = splits == "train", np.ones(len(labels), bool)
    first = np.concatenate([np.flatnonzero(train & (labels == digit))[:8] for digit in range(10)])
    if cause == "more labels":
        kept = ~train | np.isin(np.arange(len(labels)), first)
    elif cause == "unlabelled images":
        splits[train & ~np.isin(np.arange(len(labels)), first)] = "unlabeled"
    elif cause == "wrong labels":
        wrong = (rng.uniform(size=len(labels)) < 0.3) & (splits != "test")
        labels = np.where(wrong, (labels + rng.integers(1, 10, len(labels))) % 10, labels)
    elif cause == "starving classes":
        kept[np.flatnonzero(train & (labels == 3))[4:]] = False
    rows = []
    for i in np.flatnonzero(kept):
        target = folder / "images" / f"{i:04}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[order[i]] * 255 / 16).astype(np.uint8)).save(target)
        none = splits[i] == "unlabeled"
        rows.append(
            {"path": target.name, "label": -1 if none else int(labels[i]), "split": splits[i],
             "source": "real", "class_name": None if none else f"digit {labels[i]}",
             "sha256": sha256_file(target)}
        )  # fmt: skip
    manifests.write(pa.Table.from_pylist(rows, schema=manifests.SCHEMA), folder / "clean.parquet")
    few = cause in ("more labels", "unlabelled images")
    epochs = {"more epochs": 3, "larger network": 10, "rate too high": 5, "rate too low": 5}.get(cause, 6)
    high = cause == "rate too high"
    rates = {"more epochs": 0.002, "rate too high": 0.1, "rate too low": 2e-4}
    arch: dict[str, Any] = {"name": "test_vit" if high else "test_efficientnet"}
    if cause == "larger network":
        arch["head"] = {"bottleneck": 1}  # ten classes by one number
    params = FinetuneParams.model_validate(
        {
            "global": {"image_size": 32, "seed": seed},
            "data": {"root": str(folder / "images")},
            "teacher": {
                "arch": arch,
                "lr": {"initial": rates.get(cause, 0.02)},
                "optimizer": {"name": "adamw" if high else "sgd"},
                "train": {"epochs": 30 if few else epochs, "batch_size": 16 if few else 32},
            },
        }
    )
    net = params.teacher
    phases = (Phase("finetune", "teacher", net.train.epochs, net.lr),)
    spec = driver.make_spec(
        params, net, params.ray, params.data, folder / "clean.parquet", Plan(), None, phases
    )
    result = local.run(replace(spec, waived=True)).result
    return advice.facts(spec, result, "teacher", "teacher")


PLANTED = [
    "more epochs", "rate too high", "rate too low", "more labels", "unlabelled images", "larger network",
    "wrong labels", "starving classes",
]  # fmt: skip


@pytest.mark.parametrize("cause", ["more epochs", "rate too low"])
def test_the_first_advice_is_the_planted_cause(
    cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", ".retort")
    assert first(planted(cause, tmp_path, 1)) == cause


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3, 4])
@pytest.mark.parametrize("cause", PLANTED)
def test_the_first_advice_is_the_planted_cause_whatever_the_seed(
    cause: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", ".retort")
    assert first(planted(cause, tmp_path, seed)) == cause

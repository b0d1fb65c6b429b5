"""The step ``finetune``: train the teacher on the user's data, as the plan says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from components.common.storage import need
from components.step import step
from components.training import advice, budget, driver, preflight, report
from components.training.metrics import evaluate
from components.training.params import FinetuneParams
from components.training.spec import Phase


def finetune(params: FinetuneParams, *, manifest: Path, plan: Path, weights: Path, out: Path) -> None:
    """Train the teacher; writes its model, metrics, history and confusion matrix into ``out``.

    Args:
        manifest: the clean manifest.
        plan: ``plan.json`` of the audits.
        weights: folder with ``teacher.safetensors`` (absent when ``teacher.weights`` is none).

    Raises:
        FindingsError: preflight.shm, train.finite or train.learns.
        RetortError: a file, the plan, Ray or a worker is at fault.
    """
    with step("finetune", params, out, [manifest, plan, weights / "teacher.safetensors"]) as run:
        need(manifest, "validate")
        train = params.teacher.train
        whole = driver.make_spec(
            params, params.teacher, params.ray, params.data, manifest, driver.load_plan(run, plan, manifest),
            driver.start_weights(weights, "teacher", params.teacher), (),
        )  # fmt: skip
        spec = budget.within(
            run,
            lambda epochs: replace(whole, phases=(Phase("finetune", "teacher", epochs, params.teacher.lr),)),
            params.ray, "teacher", train.epochs, train.time_budget_minutes,
        )  # fmt: skip
        preflight.preflight(run, spec, params.ray, "teacher")
        folder = driver.checkpoints("finetune", spec)
        result = driver.train(run, spec, params.ray, folder)
        names = spec.class_names
        predictions = result.predictions["teacher"]
        metrics = {
            split: evaluate(driver.labels(spec, split), predictions[split], names)
            for split in ("val", "test")
        }
        lineage = driver.start_lineage(weights, "teacher", params.teacher)
        driver.write_model(run, spec, result.nets["teacher"], lineage, out)
        report.write_network(
            run, out, "the teacher", metrics=metrics, history=result.history,
            actual=driver.labels(spec, "val"), predicted=predictions["val"], class_names=names,
        )  # fmt: skip
        advice.tell(run, advice.facts(spec, result, "teacher", "teacher"))
    driver.forget(folder)

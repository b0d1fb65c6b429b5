"""Uses what ``test_contributing`` added to a copy of the tree; run there, it prints what came of each."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from components.step import StepContext

TRACKER: Any = SimpleNamespace(metrics=lambda numbers: None, summary=lambda numbers: None)


def found_by(run: StepContext, rule: str) -> str:
    return next(finding.level for finding in run.report.findings if finding.rule == rule)


def check() -> None:
    from components.audit import imbalance
    from components.audit.counts import Counts
    from components.audit.params import AuditParams

    sizes = np.array([10, 10])
    train = np.stack([sizes, 0 * sizes, 0 * sizes], axis=1)
    params = AuditParams.model_validate({"checks": {"waive": ["imbalance.dummy"]}})
    run = StepContext("audit-imbalance", params, Path("out"), TRACKER)
    imbalance._ratio(run, Counts(np.arange(2), ["a", "b"], train, sizes, sizes), 4.0)
    assert found_by(run, "imbalance.dummy") == "warning", "an error that is waived"


def rule_of_rows() -> None:
    import duckdb

    from components.dataset import quarantine, rules
    from components.dataset.params import ValidateParams

    with duckdb.connect() as db:
        columns = "row, path, split, source, label"
        good, bad = "a.png", f"{'b' * 20}.png"
        rows = ", ".join(f"({i}, '{path}', 'train', 'real', 0)" for i, path in enumerate([good, bad]))
        db.execute(f"create table m as select * from (values {rows}) as t({columns})")
        db.execute("create table cases (rule varchar, row int, path varchar, other varchar, detail varchar)")
        quarantine.broken_rows(db)
        assert db.execute("select rule, path from cases").fetchall() == [("manifest.dummy", bad)]
        run = StepContext("validate", ValidateParams(), Path("out"), TRACKER)
        quarantine.report_cases(run, db)
    assert found_by(run, "manifest.dummy") == "warning"
    assert "manifest.dummy" in rules.KEPT


def quality_check() -> None:
    from components.dataset.quality import CHECKS, measure

    numbers = np.frombuffer(measure(Image.new("L", (32, 32), 7)), np.float32)
    (place,) = [i for i, one in enumerate(CHECKS) if one.rule == "quality.dummy"]
    assert len(numbers) == len(CHECKS)
    assert numbers[place] == 7


def source_of_images() -> None:
    from components.dataset import sources
    from components.dataset.params import IngestParams

    Path("all.names").write_text("a/1.png\nb/2.png\n")
    found = sources.read(IngestParams.model_validate({"data": {"source": "all.names"}}))
    assert [row.class_name for row in found.rows] == ["a", "b"]


def loss() -> None:
    import torch

    from components.audit.balance import balance
    from components.audit.params import Audit
    from components.audit.plan_schema import Plan, read_plan
    from components.training import losses

    counts = np.array([50, 50])
    settings = Audit.model_validate({"loss": "dummy"})
    asked = balance(counts, counts.astype(float), np.arange(2), settings).loss
    Plan(loss=asked).write(Path("plan.json"))
    network = torch.nn.Linear(4, 2)
    before = network.weight.detach().clone()
    criterion = losses.from_plan(read_plan(Path("plan.json")), 2)
    value = criterion(network(torch.ones(3, 4)), torch.tensor([0, 1, 0]))
    value.backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    assert not torch.equal(network.weight, before)
    # p = 1/4: twice 1 - p
    logits = torch.tensor([[0.0, float(np.log(3))]])
    assert abs(criterion(logits, torch.tensor([0])).item() - 1.5) < 1e-6


def method_of_distillation() -> None:
    import torch

    from components.training.params import Distill
    from components.training.tasks import task_of
    from components.training.tasks.base import Setup

    settings = Distill.model_validate({"method": "dummy", "label_share": 0.5})
    answers: Any = SimpleNamespace(crops=(), mixer=None)
    network = torch.nn.Linear(4, 2, bias=False)
    torch.nn.init.zeros_(network.weight)
    criterion: Any = lambda logits, labels: torch.zeros(())  # noqa: E731
    setup = Setup(np.zeros(1, np.int64), criterion, answers, torch.device("cpu"), settings)
    task: Any = task_of(settings.method)(setup, network)
    loss = task.compare(network(torch.ones(1, 4)), torch.tensor([[0.75, 0.25]]), None, None)
    assert loss.item() == 0.5, "both answers are a half without weights"
    loss.sum().backward()
    assert network.weight.grad is not None
    assert network.weight.grad.any()


def augmentation() -> None:
    import torch

    from components.models.params import Train
    from components.training.augmentation import Augment

    name = Train.model_validate({"augment": "dummy"}).augment
    pixels, numbers = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8), np.arange(2)
    assert (Augment(name, 1, 8)(pixels, numbers, numbers) == 100).all()


def _exported(root: Path, settings: dict[str, Any]) -> tuple[StepContext, dict[str, Path]]:
    """Write and prove a small network's files; where they lie."""
    import pyarrow as pa
    import torch

    from components.dataset import manifest as manifests
    from components.export import export, exported, report, verdicts
    from components.export.params import ExportParams
    from components.models.card import ModelCard
    from components.models.params import Arch

    root.mkdir()
    rows: dict[str, list[Any]] = {"path": [], "label": [], "class_name": [], "split": [], "source": []}
    for i in range(8):
        Image.fromarray(np.full((16, 16, 3), 30 * i, np.uint8)).save(root / f"{i}.png")
        for key, value in zip(
            rows, (f"{i}.png", i % 2, "ab"[i % 2], "val" if i < 4 else "train", "real"), strict=True
        ):
            rows[key].append(value)
    absent = {name: pa.nulls(8) for name in manifests.SCHEMA.names if name not in rows}
    table = pa.table({**rows, **absent}).select(manifests.SCHEMA.names).cast(manifests.SCHEMA)
    manifests.write(table, root / "clean.parquet")
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 2)
    ).eval()
    card = ModelCard(
        arch=Arch(name="small"), class_names=["a", "b"], input_size=[3, 16, 16], mean=[0.5] * 3,
        std=[0.5] * 3, data_fingerprint="", lineage=[], sha256="0" * 64,
    )  # fmt: skip
    params = ExportParams.model_validate({"data": {"root": str(root)}, "export": settings})
    run = StepContext("export", params, root / "out", TRACKER)
    files = export._write(run, params, module, card, root / "clean.parquet", root / "out")
    proof, _ = export._prove(params, module, card, exported.rows(root / "clean.parquet", "val"), files)
    assert not verdicts.parity(run, proof, files, "student")
    verdicts.reduced(run, proof, files)
    report.write(run, proof, None, files, root / "out")
    return run, {name: written.path for name, written in files.items()}


def precision() -> None:
    from components.benchmark.choice import Result, choose
    from components.benchmark.params import Benchmark
    from components.benchmark.sweep import Config, sweep

    run, files = _exported(Path("precision"), {"precisions": ["dummy"]})
    assert found_by(run, "export.precision") == "info"
    assert set(files) == {"model.onnx", "model.dummy.onnx"}
    (kind,) = Benchmark.model_validate({"precisions": ["dummy"]}).precisions
    config = Config(1, 1, "student", "onnxruntime", kind)
    images = np.zeros((2, 3, 16, 16), np.float32)
    named = {("student", "fp32"): files["model.onnx"], ("student", kind): files["model.dummy.onnx"]}
    done = sweep([config], named, {"student": images}, budget_s=1.0, seed=1)
    assert not done.refused
    p50 = done.timings[config].p50_ms
    result = Result("student", "f", "f0", "onnxruntime", 1, 1, kind, p50, p50, 0.1, 1.0, 1, 1, 1, 0.5)
    assert choose([result], None).recommended.result == result


def format_of_files() -> None:
    _, files = _exported(Path("format"), {"formats": ["dummy"]})
    assert set(files) == {"model.onnx", "model.dummy"}


def engine() -> None:
    from components.benchmark.choice import Result, choose
    from components.benchmark.params import Benchmark
    from components.benchmark.sweep import Config, sweep

    _, files = _exported(Path("engine"), {})
    names = Benchmark.model_validate({"engines": ["onnxruntime", "dummy"]}).engines
    configs = [Config(1, 1, "student", name, "fp32") for name in names]
    images = np.zeros((2, 3, 16, 16), np.float32)
    done = sweep(configs, {("student", "fp32"): files["model.onnx"]}, {"student": images}, budget_s=1, seed=1)
    assert set(done.timings) == set(configs)
    results = [Result("s", "f", "f0", name, 1, 1, "fp32", 1.0, 1.0, 0.1, 1.0, 1, 1, 1, 0.5) for name in names]
    chosen = choose(results, None).recommended.result
    assert chosen.engine == "onnxruntime" or list(names).index("dummy") == 0


def format_of_weights() -> None:
    from components.weights.readers import read

    Path("net.plain").write_bytes(b"RTRT" + np.array([1, 2], "<f4").tobytes())
    assert np.asarray(read(Path("net.plain")).tensors["w"]).tolist() == [1.0, 2.0]


def source_of_start_weights() -> None:
    from components.dataset.params import S3
    from components.weights.source import locate

    assert locate("dummy:net", None, S3()).origin == "made by a dummy"


def main() -> None:
    """Print a JSON object: by kind, what went wrong, or nothing."""
    results = {}
    uses = (
        check, rule_of_rows, quality_check, source_of_images, loss, method_of_distillation, augmentation,
        precision, format_of_files, engine, format_of_weights, source_of_start_weights,
    )  # fmt: skip
    for use in uses:
        try:
            use()
            results[use.__name__] = ""
        except Exception:  # noqa: BLE001 - the test of that kind says it
            results[use.__name__] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""The step ``benchmark`` on real engines, and the engines by themselves."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from pydantic import ValidationError

from components.benchmark.benchmark import benchmark, cost, family
from components.benchmark.engines import ENGINES, Engine, Job, Run
from components.benchmark.params import Benchmark
from components.benchmark.processors import processors
from components.benchmark.sweep import Config, sweep
from components.common.errors import FindingsError, RetortError
from components.common.storage import sha256_file
from components.export import exported
from tests.components.benchmark.conftest import Exports
from tests.conftest import findings


@pytest.fixture(scope="module")
def measured(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``outputs/benchmark`` with everything asked for that the step knows."""
    out = tmp_path_factory.mktemp("outputs") / "benchmark"
    params = exports.params(
        engines=["onnxruntime", "openvino"],
        precisions=["fp32", "bf16", "int8"],
        threads=[1, 512],
        time_budget_s=12,
        latency_budget_ms=1000.0,
    )
    benchmark(params, manifest=exports.digits.manifest, exports=exports.folders, out=out)
    return out


def test_every_number_of_the_table_is_there(measured: Path, exports: Exports) -> None:
    with (measured / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    kinds = {(row["model"], row["engine"], row["precision"]) for row in rows}
    for model in ("student", "teacher"):
        assert {
            (model, "onnxruntime", "fp32"),
            (model, "openvino", "fp32"),
            (model, "onnxruntime", "int8"),
        } <= kinds
    for row in rows:
        assert 0 < float(row["p50_ms"]) <= float(row["p95_ms"])
        assert float(row["throughput"]) == pytest.approx(
            1e3 * int(row["batch"]) / float(row["p50_ms"]), rel=0.01
        )
        assert int(row["size_bytes"]) > 0
        assert int(row["threads"]) == 1
    parity = json.loads((exports.folders["student"] / "parity.json").read_text())["compared"]
    student = next(row for row in rows if row["model"] == "student" and row["precision"] == "fp32")
    assert float(student["val_top1"]) == pytest.approx(parity["model.onnx, batches"]["top1"])
    assert {row["family"] for row in rows} == {"test_efficientnet", "test_resnet"}


def test_the_choice_and_the_pair_are_answered(measured: Path) -> None:
    choice = json.loads((measured / "choice.json").read_text())
    assert choice["recommended"]["model"] in ("student", "teacher")
    assert set(choice["answers"]) == {"speed", "size", "mobile-like", "server-like"}
    assert choice["latency_budget"]["fitting"] == choice["latency_budget"]["of"]
    for pair in choice["student_against_teacher"]:
        assert pair["ratio_low"] <= pair["ratio"] <= pair["ratio_high"]
        assert pair["size_ratio"] < 1  # test_efficientnet is the smaller of the two
    metrics = json.loads((measured / "metrics.json").read_text())
    assert metrics["student"]["p50_ms"] > 0
    assert metrics["student_to_teacher"]["size_ratio"] < 1
    assert len(choice["preprocessing_ms"]) == 5


def test_the_curves_are_drawn_once_and_stand_alone(measured: Path) -> None:
    with Image.open(measured / "curves.png") as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert len(colours) > 50
    page = (measured / "curves.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")


def test_what_cannot_be_measured_here_is_said(measured: Path) -> None:
    found = findings(measured)
    reasons = " ".join(f"{finding.subject}: {finding.message}" for finding in found["benchmark.engine"])
    assert "onnxruntime bf16: " in reasons
    assert found["benchmark.threads"][0].measured == 512
    for rule in ("benchmark.choice", "benchmark.noise", "benchmark.curves", "benchmark.latency_budget"):
        assert rule in found


def test_a_budget_that_nothing_keeps_is_said(exports: Exports, tmp_path: Path) -> None:
    params = exports.params(latency_budget_ms=1e-6, engines=["onnxruntime"], batch_sizes=[1], time_budget_s=3)
    benchmark(params, manifest=exports.digits.manifest, exports=exports.folders, out=tmp_path / "benchmark")
    found = findings(tmp_path / "benchmark")["benchmark.latency_budget"][0]
    assert found.level == "warning"
    assert found.message.startswith("Nothing fits")
    assert (
        json.loads((tmp_path / "benchmark" / "choice.json").read_text())["latency_budget"]["chosen"] is None
    )


def test_time_that_is_too_short_measures_the_first_and_names_the_rest(
    exports: Exports, tmp_path: Path
) -> None:
    params = exports.params(batch_sizes=[1, 256, 512], time_budget_s=1.5)
    benchmark(params, manifest=exports.digits.manifest, exports=exports.folders, out=tmp_path / "benchmark")
    missed = findings(tmp_path / "benchmark")["benchmark.time_budget"][0]
    assert "512 images" in " ".join([missed.message, missed.subject]) or missed.measured > 3
    with (tmp_path / "benchmark" / "results.csv").open() as file:
        assert "1" in {row["batch"] for row in csv.DictReader(file)}


def test_an_int8_file_that_stayed_behind_is_not_measured(exports: Exports, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exports.folders["student"], folder)
    with (folder / "model.int8.onnx").open("ab") as file:
        file.write(b" ")  # another file than parity.json proves
    params = exports.params(candidates=["student"], precisions=["fp32", "int8"], time_budget_s=3)
    benchmark(params, manifest=exports.digits.manifest, exports={"student": folder}, out=tmp_path / "out")
    with (tmp_path / "out/results.csv").open() as file:
        assert {row["precision"] for row in csv.DictReader(file)} == {"fp32"}


def test_one_huge_batch_does_not_keep_the_others_from_being_measured(
    exports: Exports, tmp_path: Path
) -> None:
    params = exports.params(candidates=["student"], batch_sizes=[1, 20_000], threads=[1], time_budget_s=1)
    benchmark(params, manifest=exports.digits.manifest, exports=exports.folders, out=tmp_path / "out")
    with (tmp_path / "out/results.csv").open() as file:
        assert "1" in {row["batch"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("key", ["threads", "batch_sizes", "engines", "precisions", "candidates"])
def test_an_empty_sweep_is_refused(key: str) -> None:
    with pytest.raises(ValidationError):
        Benchmark.model_validate({key: []})
    if key in ("threads", "batch_sizes"):
        with pytest.raises(ValidationError):
            Benchmark.model_validate({key: [0]})


@pytest.mark.parametrize(
    ("key", "name", "said"),
    [
        (
            "engines",
            "tensorrt",
            "'tensorrt' is none of onnxruntime, openvino; opening a model in TensorRT is",
        ),
        ("engines", "openvin", "did you mean 'openvino'?"),
        ("precisions", "fp16", "'fp16' is none of fp32, int8, bf16"),
    ],
)
def test_what_is_not_written_is_refused_before_any_work(key: str, name: str, said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Benchmark.model_validate({key: [name]})
    assert said in str(raised.value)


def test_a_candidate_without_an_export_is_named(exports: Exports, tmp_path: Path) -> None:
    with pytest.raises(RetortError, match="'smaller'"):
        benchmark(
            exports.params(candidates=["student", "smaller"]),
            manifest=exports.digits.manifest,
            exports=exports.folders,
            out=tmp_path / "benchmark",
        )


def images_of(exports: Exports, count: int) -> np.ndarray:
    rows = exported.rows(exports.digits.manifest, "val").spread(count)
    _, pixels = next(rows.images(str(exports.digits.root)).squares(32, count))
    return exported.normalise(pixels, [0.5] * 3, [0.5] * 3)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_engines_agree_on_validation_images(exports: Exports, batch: int) -> None:
    path, images = exports.folders["student"] / "model.onnx", images_of(exports, batch)
    job = Job(path, "fp32", 1, batch)
    left, right = (np.array(ENGINES[name].open(job)(images)) for name in ("onnxruntime", "openvino"))
    np.testing.assert_allclose(left, right, atol=1e-4)


def test_an_engine_that_answers_otherwise_is_not_timed(
    exports: Exports, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of an engine, played by one that names the classes in another order."""
    honest = ENGINES["openvino"]

    def wrong(job: Job) -> Run:
        run = honest.open(job)
        return lambda images: np.roll(run(images), 1, axis=1)

    monkeypatch.setitem(ENGINES, "openvino", Engine(honest.refusal, wrong))
    configs = [Config(1, 1, "student", engine, "fp32") for engine in ("onnxruntime", "openvino")]
    done = sweep(
        configs,
        {("student", "fp32"): exports.folders["student"] / "model.onnx"},
        {"student": images_of(exports, 8)},
        budget_s=2,
        seed=1,
    )
    assert list(done.timings) == [configs[0]]
    assert "other answers than ONNX Runtime" in done.refused[configs[1]]


def test_costs_are_counted_on_the_graph(exports: Exports) -> None:
    """A 3x3 convolution of 8 channels to 16 on 10 x 10 pixels, then a fully connected layer to 5."""
    import torch

    from components.export import graph

    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 5),
    ).eval()
    path = exports.digits.root.parent / "counted.onnx"
    graph.save(graph.to_onnx(network, 10), path, {})
    params, macs = cost(path)
    assert params == 3 * 16 * 9 + 16 + 16 * 5 + 5
    assert macs == 16 * 10 * 10 * 3 * 9 + 16 * 5
    assert onnx.load(path).graph.input[0].name == "images"


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        ("tf_efficientnet_lite0", "tf_efficientnet_lite"),
        ("resnet50d", "resnet"),
        ("resnet18_vd", "resnet"),
        ("mobilenetv3_small_100", "mobilenetv3_small"),
        ("vit_tiny_patch16_224", "vit_tiny_patch"),
        ("convnext_atto", "convnext_atto"),
    ],
)
def test_families(arch: str, expected: str) -> None:
    assert family(arch) == expected


@pytest.mark.parametrize(
    ("files", "own", "count"),
    [
        ({"pod/cpu.max": "150000 100000"}, "0::/pod\n", 1.5),
        ({"pod/cpu.max": "max 100000", "cpu.max": "50000 100000"}, "0::/pod\n", 0.5),
        ({"cpu.max": "100000 100000"}, "0::/not/visible/from/inside\n", 1.0),
        ({"cpu,cpuacct/pod/cpu.cfs_quota_us": "25000", "cpu,cpuacct/pod/cpu.cfs_period_us": "100000"},
         "3:cpu,cpuacct:/pod\n", 0.25),
    ],
)  # fmt: skip
def test_the_quota_of_a_container_limits_threads(
    files: dict[str, str], own: str, count: float, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    have = processors(tmp_path / "cgroup", tmp_path / "own")
    assert have.count == count or have.count < count  # a machine with fewer processors limits it further
    assert have.threads >= 1
    if have.count == count:
        assert "quota" in have.limit


def test_without_a_quota_the_machine_limits_threads(tmp_path: Path) -> None:
    import os

    (tmp_path / "own").write_text("5:cpu:/\n0::/\n")
    assert processors(tmp_path, tmp_path / "own").count == len(os.sched_getaffinity(0))


def test_a_candidate_of_other_class_names_is_refused(exports: Exports, tmp_path: Path) -> None:
    other = Path(shutil.copytree(exports.folders["teacher"], tmp_path / "other"))
    model = onnx.load(other / "model.onnx")
    names = {prop.key: prop for prop in model.metadata_props}["class_names"]
    names.value = json.dumps(json.loads(names.value)[::-1])
    onnx.save(model, other / "model.onnx")
    proof = json.loads((other / "parity.json").read_text())
    proof["files"]["model.onnx"]["sha256"] = sha256_file(other / "model.onnx")
    (other / "parity.json").write_text(json.dumps(proof))
    params = exports.params(candidates=["student", str(other)])
    with pytest.raises(FindingsError, match=r"model\.class_names: .*label 0 'digit 9', the data call it"):
        benchmark(params, manifest=exports.digits.manifest, exports=exports.folders, out=tmp_path / "out")

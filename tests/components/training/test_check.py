"""The gate before distillation: each fault of row 2.3 closes it, and it opens for exactly what passed."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from components.common.errors import FindingsError, RetortError
from components.common.findings import Finding, Report, read_report
from components.common.storage import sha256_file
from components.dataset import manifest as manifests
from components.models import build, checkpoint
from components.models.card import read_card
from components.models.params import Arch
from components.step import StepContext
from components.tracking.tracker import Tracker
from components.training import driver, gate, margin
from components.training.check import check, rules
from components.training.gate.evidence import constant_share
from components.training.gate.rate import reference
from components.training.gate.teacher import Subject, above, chance, correlations, judge_accuracy
from components.training.params import CheckParams, DistillParams
from tests.components.training.conftest import train, write_start

Judge = Callable[..., dict[str, Finding]]


@pytest.fixture
def judge(
    data: SimpleNamespace, params: DistillParams, weights: Path, teacher: Path, tmp_path: Path
) -> Judge:
    """Ask the rules with some values changed; of each rule the worst level, and what was said at it."""

    def run(**changes: dict[str, Any]) -> dict[str, Finding]:
        changed = with_values(params, **changes)
        asked = StepContext("check", changed, tmp_path / "outputs/check", Tracker("check", changed.registry))
        rules(asked, changed, manifest=data.manifest, teacher=teacher, weights=weights)
        found: dict[str, Finding] = {}
        for level in ("info", "warning", "error"):
            for rule in {finding.rule for finding in asked.report.findings if finding.level == level}:
                of = [f for f in asked.report.findings if (f.rule, f.level) == (rule, level)]
                said = "\n".join(finding.message for finding in of)
                found[rule] = of[0].model_copy(update={"message": said})
        return found

    return run


@pytest.fixture(autouse=True)
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained here: test_control.py has what comes after the rules."""
    monkeypatch.setattr(margin, "judge", lambda run, *_, **__: run.stop_on_errors())


def with_values(params: DistillParams, **changes: dict[str, Any]) -> CheckParams:
    values = params.model_dump(by_alias=True)
    for section, change in changes.items():
        values[section] = {**values[section], **change}
    return CheckParams.model_validate(values)


def run_check(params: CheckParams, data: SimpleNamespace, out: Path) -> Report:
    """The whole step, and its report."""
    failed = False
    try:
        check(params, manifest=data.manifest, plan=data.plan, teacher=data.teacher,
              weights=data.weights, out=out)  # fmt: skip
    except FindingsError:
        failed = True
    report = read_report(out / "report.json")
    assert report.passed is not failed
    assert (out / gate.FILE).exists() is not failed, "a gate is written only when it is open"
    return report


def levels(findings: dict[str, Finding]) -> dict[str, str]:
    return {rule.removeprefix("distill."): finding.level for rule, finding in findings.items()}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change a teacher's tensors, and its card with them: a valid file of wrong content."""
    card = read_card(folder / "model.json")
    module, _ = checkpoint.load(folder)
    tensors = module.state_dict()
    change(tensors)
    module.load_state_dict(tensors)
    checkpoint.save(folder / "model.safetensors", folder / "model.json", module, card)


def test_the_gate_opens_when_nothing_is_wrong(judge: Judge) -> None:
    found = judge()
    assert not [(f.rule, f.message, f.measured) for f in found.values() if f.level != "info"]
    assert set(levels(found)) == {"teacher_accuracy", "teacher_weights", "student_weights", "initial_lr"}
    assert 0.3 <= found["distill.teacher_accuracy"].measured <= 1


def test_replaced_images_are_not_blamed_on_the_teacher(
    data: SimpleNamespace, params: DistillParams, tmp_path: Path
) -> None:
    row = next(i for i, path in enumerate(data.paths) if path.startswith("val/"))
    (Path(data.root) / data.paths[row]).write_bytes((Path(data.root) / data.paths[row + 1]).read_bytes())
    with pytest.raises(RetortError, match=rf"image\.changed: {data.paths[row]} "):
        run_check(with_values(params), data, tmp_path / "outputs/check")
    report = read_report(tmp_path / "outputs/check/report.json")
    assert [finding.rule for finding in report.errors()] == ["image.changed"]


def test_a_weak_teacher(judge: Judge, teacher: Path) -> None:
    def forget(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.startswith("classifier"):
                tensors[name] = torch.zeros_like(tensors[name])

    rewrite(teacher, forget)
    found = judge(distill={"min_teacher_accuracy": 0.6})
    assert levels(found)["teacher_accuracy"] == "error"
    assert found["distill.teacher_accuracy"].measured < 0.6
    assert (
        levels(judge(distill={"min_teacher_accuracy": 0.6}, checks={"waive": ["distill.teacher_accuracy"]}))[
            "teacher_accuracy"
        ]
        == "warning"
    )


def test_what_is_asked_of_a_teacher_follows_from_the_data(judge: Judge, teacher: Path) -> None:
    found = judge(distill={"min_teacher_accuracy": None})["distill.teacher_accuracy"]
    assert found.level == "info"
    assert 0.35 < found.limit < 0.6, "four classes, about equal: chance is a quarter or a little more"
    assert "well above chance" in found.message

    def guess(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.startswith("classifier"):
                tensors[name] = torch.zeros_like(tensors[name])

    rewrite(teacher, guess)
    assert judge(distill={"min_teacher_accuracy": None})["distill.teacher_accuracy"].level == "error"


@pytest.mark.parametrize(
    ("labels", "floor"),
    [([0, 1, 2, 3] * 5, 0.4), ([0] * 95 + [1] * 5, 0.6), ([0, 9] * 5, 0.6), ([3] * 5, 0.6)],
)
def test_the_floor_lies_a_fifth_of_the_way_above_chance(labels: list[int], floor: float) -> None:
    assert above(chance(np.array(labels))) == pytest.approx(floor)


@pytest.mark.parametrize(
    ("top1", "macro", "level"),
    [
        (0.95, 0.5, "error"),  # it always names the commonest class
        (0.93, 0.88, "info"),  # it knows both, at the price of some of the commonest
        (0.3, 0.62, "error"),  # it names the rarest nearly always
    ],
)
def test_a_teacher_is_asked_for_both_classes_of_95_to_5(
    params: DistillParams, tmp_path: Path, top1: float, macro: float, level: str
) -> None:
    asked = CheckParams.model_validate(
        {**params.model_dump(by_alias=True), "distill": {"min_teacher_accuracy": None}}
    )
    run = StepContext("check", asked, tmp_path, Tracker("check", asked.registry))
    metrics = {"top1": top1, "macro_recall": macro, "images": 100}
    judge_accuracy(run, asked, metrics, np.array([0] * 95 + [1] * 5), Subject("teacher", tmp_path))
    assert [finding.level for finding in run.report.findings] == [level]


def test_naming_the_commonest_class_is_not_enough(
    data: SimpleNamespace, judge: Judge, teacher: Path, tmp_path: Path
) -> None:
    def always_two(tensors: dict[str, torch.Tensor]) -> None:
        tensors["classifier.weight"] = torch.zeros_like(tensors["classifier.weight"])
        tensors["classifier.bias"] = torch.tensor([0.0, 0.0, 9.0, 0.0])

    table = manifests.read(data.manifest).to_pylist()
    val = [row for row in table if row["split"] == "val"]
    for row in val[:-2]:
        row |= {"label": 2, "class_name": "digit 2"}
    manifests.write(pa.Table.from_pylist(table, schema=manifests.SCHEMA), data.manifest)
    rewrite(teacher, always_two)
    found = judge(distill={"min_teacher_accuracy": 0.9})["distill.teacher_accuracy"]
    assert found.level == "error"
    assert found.measured < found.limit <= 0.6, "macro recall"
    assert "names the commonest class" in found.advice


def test_a_teacher_of_random_weights(judge: Judge, teacher: Path, params: DistillParams) -> None:
    torch.manual_seed(99)
    random = build.create(params.teacher.arch, 4).state_dict()
    rewrite(teacher, lambda tensors: tensors.update(random))
    found = judge(distill={"min_teacher_accuracy": 0.0})
    assert levels(found)["teacher_weights"] == "error"
    assert "never trained" in found["distill.teacher_weights"].message
    assert "do not resemble" in found["distill.teacher_weights"].message


def test_a_teacher_that_is_still_what_it_started_from(judge: Judge, teacher: Path, weights: Path) -> None:
    start = load_file(str(weights / "teacher.safetensors"))
    rewrite(teacher, lambda tensors: tensors.update(start))
    found = judge(distill={"min_teacher_accuracy": 0.0})
    assert levels(found)["teacher_weights"] == "error"
    assert "still what it started from" in found["distill.teacher_weights"].message


def test_a_teacher_of_other_data(judge: Judge, teacher: Path) -> None:
    card = read_card(teacher / "model.json").model_copy(update={"data_fingerprint": "0" * 64})
    card.write(teacher / "model.json")
    found = judge()
    assert levels(found)["teacher_weights"] == "error"
    assert "other data" in found["distill.teacher_weights"].message


def test_a_teacher_of_other_classes_or_size_is_refused(judge: Judge, teacher: Path) -> None:
    card = read_card(teacher / "model.json")
    for names, said in (
        (["a", "b", "c", "d"], "calls label 0 'a', the data call it 'digit 0'"),
        (card.class_names[::-1], "the same names in another order"),
    ):
        card.model_copy(update={"class_names": names}).write(teacher / "model.json")
        found = judge()["model.class_names"]
        assert (found.level, found.row) == ("error", "1.1")
        assert said in found.message
        assert "retort finetune" in found.advice
    card.model_copy(update={"input_size": [3, 64, 64]}).write(teacher / "model.json")
    found = judge()["distill.teacher_weights"]
    assert found.level == "error"
    assert "trained at 64 px" in found.message


def test_a_teacher_that_is_damaged_or_changed_is_a_finding(judge: Judge, teacher: Path) -> None:
    path = teacher / "model.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "mean": [0.0, 0.0, 0.0]}))
    found = judge()["distill.teacher_weights"]
    assert found.level == "error"
    assert "changed since it was written" in found.message

    tensors = load_file(str(teacher / "model.safetensors"))
    tensors["conv_stem.weight"][0] = torch.nan
    save_file(tensors, str(teacher / "model.safetensors"))
    card = read_card(path, changed=True).model_copy(update={"mean": content["mean"]})
    digest = sha256_file(teacher / "model.safetensors")
    card.model_copy(update={"sha256": digest}).write(path)
    found = judge()["distill.teacher_weights"]
    assert found.level == "error"
    assert "holds NaN or infinite values: conv_stem.weight (27 of" in found.message


def test_a_student_of_random_weights(judge: Judge, weights: Path, params: DistillParams) -> None:
    random = build.create(params.student.arch, 0).state_dict()
    write_start(weights, "student", random)
    found = judge()
    assert levels(found)["student_weights"] == "error"
    assert "not trained weights" in found["distill.student_weights"].message
    assert levels(judge(student={"weights": "none"}))["student_weights"] == "error"


def test_a_student_with_values_that_are_not_numbers(judge: Judge, weights: Path) -> None:
    tensors = load_file(str(weights / "student.safetensors"))
    tensors["conv_stem.weight"][0] = torch.nan
    write_start(weights, "student", tensors)
    found = judge()["distill.student_weights"]
    assert found.level == "error"
    assert "NaN or infinite values: conv_stem.weight (27 of" in found.message


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_start_weights_that_are_not_the_file_that_was_proved(
    judge: Judge, weights: Path, params: DistillParams, who: str
) -> None:
    """All shapes and names right, kernels shuffled: only the digest of the record tells."""
    path = weights / f"{who}.safetensors"
    tensors = load_file(str(path))
    for name, tensor in tensors.items():
        if tensor.ndim > 1:
            tensors[name] = tensor.flatten()[torch.randperm(tensor.numel())].view(tensor.shape)
    save_file(tensors, str(path))
    net = getattr(params, who)
    with pytest.raises(RetortError, match=rf"{who}\.safetensors: sha256 .*retort weights"):
        driver.start_weights(weights, who, net)
    found = judge()[f"distill.{who}_weights"]
    assert found.level == "error"
    assert f"{who}.json beside it names" in found.message
    assert "retort weights" in found.advice


def test_a_student_that_is_not_the_proved_file_is_no_matter_of_opinion(judge: Judge, weights: Path) -> None:
    """Distillation would refuse it as well, so waiving the rule opens no gate."""
    with (weights / "student.safetensors").open("ab") as file:
        file.write(b" ")
    assert levels(judge(checks={"waive": ["distill.student_weights"]}))["student_weights"] == "error"


def test_a_teacher_of_another_architecture_is_not_called_a_descendant(
    judge: Judge, teacher: Path, data: SimpleNamespace
) -> None:
    """Another network's folder copied over the teacher's: nothing was compared, so nothing is claimed."""
    card = read_card(teacher / "model.json").model_copy(update={"arch": Arch(name="test_resnet")})
    other = build.create(card.arch, 4)
    train(other, card.arch, Path.cwd(), 10)
    checkpoint.save(teacher / "model.safetensors", teacher / "model.json", other.eval(), card)
    found = judge(distill={"min_teacher_accuracy": 0.0})["distill.teacher_weights"]
    assert found.level == "error"
    assert "it is a test_resnet, teacher.arch is test_efficientnet" in found.message
    assert "descend" not in found.message


def test_a_teacher_from_random_weights_is_not_called_a_descendant(judge: Judge) -> None:
    found = judge(teacher={"weights": "none"})["distill.teacher_weights"]
    assert found.level == "info"
    assert "nothing to compare" in found.message


def test_a_student_whose_file_lacks_a_tensor(judge: Judge, weights: Path) -> None:
    tensors = load_file(str(weights / "student.safetensors"))
    tensors.pop("conv_stem.weight")
    write_start(weights, "student", tensors)
    with pytest.raises((RetortError, AssertionError), match="conv_stem"):  # told by loading, or by the gate
        assert levels(judge())["student_weights"] == "info", "conv_stem.weight is not in the file"


@pytest.mark.parametrize(
    ("lr", "workers", "level"),
    # the reference is 0.1 at 24 images: as much at 2 x 12, half of it at 1 x 12
    [(0.1, 2, "info"), (0.11, 2, "error"), (0.05, 1, "info"), (0.06, 1, "error"), (0.2, 4, "info")],
)
def test_the_learning_rate_is_scaled_by_the_total_batch(
    judge: Judge, lr: float, workers: int, level: str
) -> None:
    found = judge(student={"lr": {"initial": lr}}, ray={"workers": workers})
    assert levels(found)["initial_lr"] == level
    assert found["distill.initial_lr"].limit == pytest.approx(0.05 * workers)


def test_an_unknown_limit_is_a_warning(judge: Judge) -> None:
    found = judge(distill={"reference_lr": None, "reference_batch": None})
    assert levels(found)["initial_lr"] == "warning"
    with pytest.raises(RetortError, match="go together"):
        judge(distill={"reference_lr": 0.1, "reference_batch": None})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50d", (0.1, 256)),
        ("resnet50d.ra2_in1k", (0.1, 256)),
        ("mobilenetv3_small_100", (1.3, 2048)),
        ("mobilenetv3_small_100_paddle", (1.3, 2048)),
        ("resnet18_vd", (0.1, 256)),
        ("tf_efficientnet_lite0", None),
    ],
)
def test_the_table_of_recipes(name: str, expected: tuple[float, int] | None) -> None:
    known = reference(CheckParams.model_validate({"student": {"arch": {"name": name}}}))
    assert (known[:2] if known else None) == expected


def test_the_gate_is_for_exactly_what_passed(
    data: SimpleNamespace, params: DistillParams, weights: Path, teacher: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "outputs/check"
    assert run_check(with_values(params), data, folder).passed
    files = gate.inputs(data.manifest, data.plan, teacher, weights)
    gate.require_passed(folder, params, files)

    other = params.model_copy(update={"student": params.student.model_copy(update={"weights": "other"})})
    with pytest.raises(RetortError, match=r"student\.weights.*start\.safetensors.*other.*retort check"):
        gate.require_passed(folder, other, files)

    with (weights / "student.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(RetortError, match=r"outputs/weights/student\.safetensors: not the file that passed"):
        gate.require_passed(folder, params, files)

    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "passed": False}))
    with pytest.raises(RetortError, match="did not pass"):
        gate.require_passed(folder, params, files)

    (folder / "report.json").unlink()
    with pytest.raises(RetortError, match="retort check"):
        gate.require_passed(folder, params, files)


def test_constant_share_tells_new_networks_from_trained_ones(params: DistillParams, weights: Path) -> None:
    assert constant_share(build.create(params.student.arch, 4).state_dict()) > 0.8
    assert constant_share(load_file(str(weights / "student.safetensors"))) < 0.2


def test_correlation_of_kernels() -> None:
    a = torch.arange(9.0).view(3, 3)
    assert correlations({"k": a}, {"k": a * 2 + 1}) == pytest.approx([1.0])
    assert correlations({"k": a}, {"k": -a}) == pytest.approx([-1.0])
    assert correlations({"k": a}, {"other": a}) == []

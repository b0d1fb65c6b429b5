"""What can be known to be wrong before training starts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from components.audit.plan import read_plan
from components.common.findings import Finding
from components.common.step import step
from components.training import driver, engine, preflight
from components.training.params import DistillParams


def findings(
    data: SimpleNamespace, params: DistillParams, start: Path | None, **net: object
) -> dict[str, Finding]:
    teacher = type(params.teacher).model_validate({**params.teacher.model_dump(), **net})
    job = driver.make_job(
        params, teacher, params.ray, params.data, data.manifest, read_plan(data.plan), start,
        (engine.Phase("finetune", "teacher", 1, teacher.lr),),
    )  # fmt: skip
    with step("finetune", params, Path("out")) as run:
        preflight.preflight(run, job, params.ray, "teacher")
        return {finding.rule: finding for finding in run.report.findings}


def test_a_transformer_without_pretraining_is_told_that_the_data_is_too_little(
    data: SimpleNamespace, params: DistillParams
) -> None:
    """Rows 4.2 to 4.5."""
    warned = findings(data, params, None, arch={"name": "test_vit"})["arch.vit_data"]
    assert (warned.level, warned.measured) == ("warning", 96)
    assert "teacher.weights" in warned.advice
    assert "augment: deit" in warned.advice


@pytest.mark.parametrize(
    ("arch", "pretrained"), [("test_efficientnet", False), ("test_vit", True)], ids=["cnn", "pretrained"]
)
def test_others_are_not(data: SimpleNamespace, params: DistillParams, arch: str, pretrained: bool) -> None:
    start = data.weights / "teacher.safetensors" if pretrained else None
    assert "arch.vit_data" not in findings(data, params, start, arch={"name": arch})

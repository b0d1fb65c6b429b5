"""The Kubeflow face of finetune, check and distill.

A dict argument is the section of params.yaml of that name (``general``: global, ``validation``: validate).
"""

from kfp import dsl


@dsl.component(base_image="retort", install_kfp_package=False)
def finetune(
    general: dict,
    data: dict,
    teacher: dict,
    ray: dict,
    checks: dict,
    report: dict,
    registry: dict,
    manifest: dsl.Input[dsl.Dataset],
    images: dsl.Input[dsl.Dataset],
    plan: dsl.Input[dsl.Artifact],
    weights: dsl.Input[dsl.Model],
    trained: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Finetune the teacher on Ray Train, following the plan.

    Args:
        manifest: the clean manifest.
        images: the embedded digits as files.
        plan: what the audits tell training.
        weights: the start weights.
        trained: the teacher: model.safetensors, its card, metrics and history.
        metrics: its accuracy and recall.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.common.face import headline, rooted, show
    from components.training.finetune import finetune as step
    from components.training.params import FinetuneParams

    params = FinetuneParams.model_validate(
        {
            "global": general,
            "data": rooted(data, images.path),
            "teacher": teacher,
            "ray": ray,
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    step(
        params,
        manifest=Path(manifest.path),
        plan=Path(plan.path) / "plan.json",
        weights=Path(weights.path),
        out=Path(trained.path),
    )
    for name, value in headline(trained.path):
        metrics.log_metric(name, value)
    show(trained.path, page.path)


@dsl.component(base_image="retort", install_kfp_package=False)
def check(
    general: dict,
    data: dict,
    teacher: dict,
    student: dict,
    distill: dict,
    ray: dict,
    checks: dict,
    report: dict,
    registry: dict,
    manifest: dsl.Input[dsl.Dataset],
    images: dsl.Input[dsl.Dataset],
    plan: dsl.Input[dsl.Artifact],
    teacher_model: dsl.Input[dsl.Model],
    weights: dsl.Input[dsl.Model],
    passed: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """The gate before distillation: teacher, weights and learning rate; then the student without a teacher.

    Args:
        manifest: the clean manifest.
        images: the embedded digits as files.
        plan: what the audits tell training.
        teacher_model: the finetuned teacher.
        weights: the start weights.
        passed: the gate's report, which distillation asks for, and the student trained alone.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.common.face import rooted, show
    from components.training.check import check as step
    from components.training.params import CheckParams

    params = CheckParams.model_validate(
        {
            "global": general,
            "data": rooted(data, images.path),
            "teacher": teacher,
            "student": student,
            "distill": distill,
            "ray": ray,
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    step(
        params,
        manifest=Path(manifest.path),
        plan=Path(plan.path) / "plan.json",
        teacher=Path(teacher_model.path),
        weights=Path(weights.path),
        out=Path(passed.path),
    )
    show(passed.path, page.path)


@dsl.component(base_image="retort", install_kfp_package=False)
def distill(
    general: dict,
    data: dict,
    teacher: dict,
    student: dict,
    distill: dict,
    ray: dict,
    checks: dict,
    report: dict,
    registry: dict,
    manifest: dsl.Input[dsl.Dataset],
    images: dsl.Input[dsl.Dataset],
    plan: dsl.Input[dsl.Artifact],
    teacher_model: dsl.Input[dsl.Model],
    weights: dsl.Input[dsl.Model],
    passed: dsl.Input[dsl.Artifact],
    trained: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Distil the teacher into the student with SSLD on Ray Train.

    Args:
        manifest: the clean manifest.
        images: the embedded digits as files.
        plan: what the audits tell training.
        teacher_model: the finetuned teacher.
        weights: the start weights.
        passed: the passed gate of exactly these inputs.
        trained: the student: model.safetensors, its card, metrics and history.
        metrics: its accuracy and recall.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.common.face import headline, rooted, show
    from components.training.distill import distill as step
    from components.training.params import DistillParams

    params = DistillParams.model_validate(
        {
            "global": general,
            "data": rooted(data, images.path),
            "teacher": teacher,
            "student": student,
            "distill": distill,
            "ray": ray,
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    step(
        params,
        manifest=Path(manifest.path),
        plan=Path(plan.path) / "plan.json",
        teacher=Path(teacher_model.path),
        weights=Path(weights.path),
        check=Path(passed.path),
        out=Path(trained.path),
    )
    for name, value in headline(trained.path):
        metrics.log_metric(name, value)
    show(trained.path, page.path)

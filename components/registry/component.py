"""The Kubeflow face of register.

A dict argument is the section of params.yaml of that name (``general``: global, ``validation``: validate).
"""

from kfp import dsl


@dsl.component(base_image="retort", install_kfp_package=False)
def register(
    general: dict,
    data: dict,
    checks: dict,
    report: dict,
    registry: dict,
    manifest: dsl.Input[dsl.Dataset],
    images: dsl.Input[dsl.Dataset],
    student: dsl.Input[dsl.Model],
    exported: dsl.Input[dsl.Model],
    measured: dsl.Input[dsl.Artifact],
    passed: dsl.Input[dsl.Artifact],
    plan: dsl.Input[dsl.Artifact],
    registered: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Register the student in MLflow, as champion when it is better, else as challenger.

    Args:
        manifest: the clean manifest.
        images: the embedded digits as files.
        student: the trained student.
        exported: the exported student.
        measured: what the benchmark measured.
        passed: the gate's report.
        plan: what the audits told training.
        registered: registered.json, which names the model version.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.common.face import rooted, show
    from components.registry.params import RegisterParams
    from components.registry.register import register as step

    params = RegisterParams.model_validate(
        {
            "global": general,
            "data": rooted(data, images.path),
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    step(
        params,
        manifest=Path(manifest.path),
        student=Path(student.path),
        exported=Path(exported.path),
        benchmark=Path(measured.path),
        check=Path(passed.path),
        plan=Path(plan.path) / "plan.json",
        out=Path(registered.path),
    )
    show(registered.path, page.path)

"""The Kubeflow face of export.

A dict argument is the section of params.yaml of that name (``general``: global, ``validation``: validate).
"""

from kfp import dsl


@dsl.component(base_image="retort", install_kfp_package=False)
def export(
    of: str,
    general: dict,
    data: dict,
    export: dict,
    checks: dict,
    report: dict,
    registry: dict,
    manifest: dsl.Input[dsl.Dataset],
    images: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    exported: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Export to ONNX and prove that the file equals the trained network.

    Args:
        of: which network it is, student or teacher.
        manifest: the clean manifest.
        images: the embedded digits as files.
        model: the trained network.
        exported: model.onnx and its siblings.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.common.face import rooted, show
    from components.export.export import export as step
    from components.export.params import ExportParams

    params = ExportParams.model_validate(
        {
            "global": general,
            "data": rooted(data, images.path),
            "export": export,
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    step(
        params,
        manifest=Path(manifest.path),
        model=Path(model.path),
        out=Path(exported.path),
        of="teacher" if of == "teacher" else "student",
    )
    show(exported.path, page.path)

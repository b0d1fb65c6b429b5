"""The Kubeflow face of weights.

A dict argument is the section of params.yaml of that name (``general``: global, ``validation``: validate).
"""

from kfp import dsl


@dsl.component(base_image="retort", install_kfp_package=False)
def weights(
    general: dict,
    data: dict,
    teacher: dict,
    student: dict,
    checks: dict,
    report: dict,
    registry: dict,
    weights: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Fetch, convert and prove the weights that teacher and student start from.

    Args:
        weights: teacher.safetensors, student.safetensors, features.onnx, and their lineage.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.common.face import show
    from components.weights.params import WeightsParams
    from components.weights.weights import weights as step

    params = WeightsParams.model_validate(
        {
            "global": general,
            "data": data,
            "teacher": teacher,
            "student": student,
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    step(params, out=Path(weights.path))
    show(weights.path, page.path)

"""The Kubeflow face of benchmark.

A dict argument is the section of params.yaml of that name (``general``: global, ``validation``: validate).
"""

from kfp import dsl


@dsl.component(base_image="retort", install_kfp_package=False)
def benchmark(
    general: dict,
    data: dict,
    benchmark: dict,
    checks: dict,
    report: dict,
    registry: dict,
    manifest: dsl.Input[dsl.Dataset],
    images: dsl.Input[dsl.Dataset],
    student: dsl.Input[dsl.Model],
    teacher: dsl.Input[dsl.Model],
    measured: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Measure the exported models on the node that this runs on; recommend one configuration.

    Args:
        manifest: the clean manifest.
        images: the embedded digits as files.
        student: the exported student.
        teacher: the exported teacher.
        measured: results.csv, choice.json and the curves.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.benchmark.benchmark import benchmark as step
    from components.benchmark.params import BenchmarkParams
    from components.common.face import rooted, show

    params = BenchmarkParams.model_validate(
        {
            "global": general,
            "data": rooted(data, images.path),
            "benchmark": benchmark,
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    exports = {"student": Path(student.path), "teacher": Path(teacher.path)}
    step(params, manifest=Path(manifest.path), exports=exports, out=Path(measured.path))
    show(measured.path, page.path)

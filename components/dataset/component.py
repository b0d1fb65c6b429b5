"""The Kubeflow face of ingest and validate.

A dict argument is the section of params.yaml of that name (``general``: global, ``validation``: validate).
"""

from kfp import dsl


@dsl.component(base_image="retort", install_kfp_package=False)
def ingest(
    general: dict,
    data: dict,
    checks: dict,
    report: dict,
    registry: dict,
    manifest: dsl.Output[dsl.Dataset],
    images: dsl.Output[dsl.Dataset],
    out: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Read data.source into a manifest.

    Args:
        manifest: Parquet, one row an image.
        images: the embedded digits as files; an empty folder for every other source.
        out: the step's report and files.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.common.face import rooted, show
    from components.dataset.ingest import ingest as step
    from components.dataset.params import IngestParams

    params = IngestParams.model_validate(
        {
            "global": general,
            "data": rooted(data, images.path),
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    step(params, manifest=Path(manifest.path), out=Path(out.path))
    show(out.path, page.path)


@dsl.component(base_image="retort", install_kfp_package=False)
def validate(
    general: dict,
    data: dict,
    validation: dict,
    checks: dict,
    report: dict,
    registry: dict,
    manifest: dsl.Input[dsl.Dataset],
    images: dsl.Input[dsl.Dataset],
    clean: dsl.Output[dsl.Dataset],
    quarantine: dsl.Output[dsl.Dataset],
    out: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Check every image and row of a manifest.

    Args:
        manifest: what ingest read.
        images: the embedded digits as files.
        clean: the manifest's good rows.
        quarantine: its bad rows, with the reason.
        out: the step's report, Data Docs and files.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.common.face import rooted, show
    from components.dataset.params import ValidateParams
    from components.dataset.validate import validate as step

    params = ValidateParams.model_validate(
        {
            "global": general,
            "data": rooted(data, images.path),
            "validate": validation,
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    step(
        params,
        manifest=Path(manifest.path),
        clean=Path(clean.path),
        quarantine=Path(quarantine.path),
        out=Path(out.path),
    )
    show(out.path, page.path)

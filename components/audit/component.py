"""The Kubeflow face of the two audits and of the plan.

A dict argument is the section of params.yaml of that name (``general``: global, ``validation``: validate).
"""

from kfp import dsl


@dsl.component(base_image="retort", install_kfp_package=False)
def audit_imbalance(
    general: dict,
    data: dict,
    audit: dict,
    checks: dict,
    report: dict,
    registry: dict,
    manifest: dsl.Input[dsl.Dataset],
    images: dsl.Input[dsl.Dataset],
    part: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Measure the imbalance of classes; propose sampling and loss.

    Args:
        manifest: the clean manifest.
        images: the embedded digits as files.
        part: this audit's part of the plan, and its report.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.audit.imbalance import audit_imbalance as step
    from components.audit.params import AuditParams
    from components.common.face import rooted, show

    params = AuditParams.model_validate(
        {
            "global": general,
            "data": rooted(data, images.path),
            "audit": audit,
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    step(params, manifest=Path(manifest.path), out=Path(part.path))
    show(part.path, page.path)


@dsl.component(base_image="retort", install_kfp_package=False)
def audit_synthetic(
    general: dict,
    data: dict,
    audit: dict,
    checks: dict,
    report: dict,
    registry: dict,
    manifest: dsl.Input[dsl.Dataset],
    images: dsl.Input[dsl.Dataset],
    weights: dsl.Input[dsl.Model],
    part: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Measure whether synthetic images help, harm or flood; list suspect labels by file.

    Args:
        manifest: the clean manifest.
        images: the embedded digits as files.
        weights: the start weights; features.onnx of them.
        part: this audit's part of the plan, and its report.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.audit.params import AuditParams
    from components.audit.synthetic import audit_synthetic as step
    from components.common.face import rooted, show

    params = AuditParams.model_validate(
        {
            "global": general,
            "data": rooted(data, images.path),
            "audit": audit,
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    features = Path(weights.path) / "features.onnx"
    step(params, manifest=Path(manifest.path), features=features, out=Path(part.path))
    show(part.path, page.path)


@dsl.component(base_image="retort", install_kfp_package=False)
def plan(
    general: dict,
    data: dict,
    audit: dict,
    checks: dict,
    report: dict,
    registry: dict,
    imbalance: dsl.Input[dsl.Artifact],
    synthetic: dsl.Input[dsl.Artifact],
    plan: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Merge what the audits found into the plan that training carries out.

    Args:
        imbalance: the imbalance audit's part.
        synthetic: the synthetic audit's part.
        plan: plan.json, and a report with the findings of both.
        page: the report, for the UI.
    """
    from pathlib import Path

    from components.audit.params import AuditParams
    from components.audit.plan import plan as step
    from components.common.face import show

    params = AuditParams.model_validate(
        {
            "global": general,
            "data": data,
            "audit": audit,
            "checks": checks,
            "report": report,
            "registry": registry,
        }
    )
    step(params, imbalance=Path(imbalance.path), synthetic=Path(synthetic.path), out=Path(plan.path))
    show(plan.path, page.path)

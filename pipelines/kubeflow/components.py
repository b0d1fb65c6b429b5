"""The body of each Kubeflow component: its parameters, its artifacts, and one call.

A dict is the section of params.yaml of that name (``general``: global, ``validation``: validate), one that
can change the products; the others are in the pod's settings, since a parameter is part of the cache's key.
KFP writes the source of a body into the pipeline, and runs it in the pod: what it needs is imported inside.
"""

from kfp import dsl


@dsl.component(base_image="retort", install_kfp_package=False)
def ingest(
    general: dict,
    data: dict,
    checks: dict,
    manifest: dsl.Output[dsl.Dataset],
    out: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Read data.source into a manifest.

    Args:
        manifest: Parquet, one row an image.
        out: the step's report and files.
        page: the report, for the UI.
    """
    from pipelines.kubeflow.adapter import run

    run("ingest", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def validate(
    general: dict,
    data: dict,
    validation: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    clean: dsl.Output[dsl.Dataset],
    quarantine: dsl.Output[dsl.Dataset],
    out: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Check every image and row of a manifest.

    Args:
        manifest: what ingest read.
        clean: the manifest's good rows.
        quarantine: its bad rows, with the reason.
        out: the step's report, Data Docs and files.
        page: the report, for the UI.
    """
    from pipelines.kubeflow.adapter import run

    run("validate", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def weights(
    general: dict,
    teacher: dict,
    student: dict,
    checks: dict,
    weights: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Fetch, convert and prove the weights that teacher and student start from.

    Args:
        weights: teacher.safetensors, student.safetensors, features.onnx, and their lineage.
        page: the report, for the UI.
    """
    from pipelines.kubeflow.adapter import run

    run("weights", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def audit_imbalance(
    general: dict,
    audit: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    part: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Measure the imbalance of classes; propose sampling and loss.

    Args:
        manifest: the clean manifest.
        part: this audit's part of the plan, and its report.
        page: the report, for the UI.
    """
    from pipelines.kubeflow.adapter import run

    run("audit-imbalance", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def audit_synthetic(
    general: dict,
    audit: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    weights: dsl.Input[dsl.Model],
    part: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Measure whether synthetic images help, harm or flood; list suspect labels by file.

    Args:
        manifest: the clean manifest.
        weights: the start weights; features.onnx of them.
        part: this audit's part of the plan, and its report.
        page: the report, for the UI.
    """
    from pipelines.kubeflow.adapter import run

    run("audit-synthetic", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def plan(
    general: dict,
    audit: dict,
    checks: dict,
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
    from pipelines.kubeflow.adapter import run

    run("plan", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def finetune(
    general: dict,
    teacher: dict,
    ray: dict,
    manifest: dsl.Input[dsl.Dataset],
    plan: dsl.Input[dsl.Artifact],
    weights: dsl.Input[dsl.Model],
    trained: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    page: dsl.Output[dsl.HTML],
    task_config: dsl.TaskConfig,
) -> None:
    """Finetune the teacher on Ray Train, following the plan.

    Args:
        manifest: the clean manifest.
        plan: what the audits tell training.
        weights: the start weights.
        trained: the teacher: model.safetensors, its card, metrics and history.
        metrics: its accuracy and recall.
        confusion: what validation images are, and what it took them for; of 30 classes at most.
        page: the report, for the UI.
        task_config: where Ray's workers may run, if they have pods of their own.
    """
    from pipelines.kubeflow.adapter import run

    run("finetune", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def check(
    general: dict,
    teacher: dict,
    student: dict,
    distill: dict,
    ray: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    plan: dsl.Input[dsl.Artifact],
    teacher_model: dsl.Input[dsl.Model],
    weights: dsl.Input[dsl.Model],
    passed: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    task_config: dsl.TaskConfig,
) -> None:
    """The gate before distillation: teacher, weights and learning rate; then the student without a teacher.

    Args:
        manifest: the clean manifest.
        plan: what the audits tell training.
        teacher_model: the finetuned teacher.
        weights: the start weights.
        passed: the gate's report, which distillation asks for, and the student trained alone.
        page: the report, for the UI.
        task_config: where Ray's workers may run, if they have pods of their own.
    """
    from pipelines.kubeflow.adapter import run

    run("check", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def distill(
    general: dict,
    teacher: dict,
    student: dict,
    distill: dict,
    ray: dict,
    manifest: dsl.Input[dsl.Dataset],
    plan: dsl.Input[dsl.Artifact],
    teacher_model: dsl.Input[dsl.Model],
    weights: dsl.Input[dsl.Model],
    passed: dsl.Input[dsl.Artifact],
    trained: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    page: dsl.Output[dsl.HTML],
    task_config: dsl.TaskConfig,
) -> None:
    """Distil the teacher into the student with SSLD on Ray Train.

    Args:
        manifest: the clean manifest.
        plan: what the audits tell training.
        teacher_model: the finetuned teacher.
        weights: the start weights.
        passed: the passed gate of exactly these inputs.
        trained: the student: model.safetensors, its card, metrics and history.
        metrics: its accuracy and recall.
        confusion: what validation images are, and what it took them for; of 30 classes at most.
        page: the report, for the UI.
        task_config: where Ray's workers may run, if they have pods of their own.
    """
    from pipelines.kubeflow.adapter import run

    run("distill", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def export(
    of: str,
    general: dict,
    export: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    model: dsl.Input[dsl.Model],
    exported: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Export to ONNX and prove that the file equals the trained network.

    Args:
        of: which network it is, student or teacher.
        manifest: the clean manifest.
        model: the trained network.
        exported: model.onnx and its siblings.
        page: the report, for the UI.
    """
    from pipelines.kubeflow.adapter import run

    run("export", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def benchmark(
    general: dict,
    benchmark: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    student: dsl.Input[dsl.Model],
    teacher: dsl.Input[dsl.Model],
    measured: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Measure the exported models on the node that this runs on; recommend one configuration.

    Args:
        manifest: the clean manifest.
        student: the exported student.
        teacher: the exported teacher.
        measured: results.csv, choice.json and the curves.
        page: the report, for the UI.
    """
    from pipelines.kubeflow.adapter import run

    run("benchmark", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def register(
    general: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    student: dsl.Input[dsl.Model],
    exported: dsl.Input[dsl.Model],
    measured: dsl.Input[dsl.Artifact],
    passed: dsl.Input[dsl.Artifact],
    plan: dsl.Input[dsl.Artifact],
    listed: dsl.Input[dsl.Artifact],
    registered: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Register the student in MLflow, as champion when it is better, else as challenger.

    Args:
        manifest: the clean manifest.
        student: the trained student.
        exported: the exported student.
        measured: what the benchmark measured.
        passed: the gate's report.
        plan: what the audits told training.
        listed: what the audit lists file by file, suspect labels among them.
        registered: registered.json, which names the model version.
        page: the report, for the UI.
    """
    from pipelines.kubeflow.adapter import run

    run("register", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def retrain_changes(
    general: dict,
    data: dict,
    validation: dict,
    audit: dict,
    teacher: dict,
    student: dict,
    distill: dict,
    export: dict,
    retrain: dict,
    ray: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    out: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    go_on: dsl.OutputPath(str),  # type: ignore[valid-type]  # kfp asks for a call
) -> None:
    """Compare data, code and parameters with those that the last retraining saw.

    Args:
        manifest: what ingest read.
        out: the decision, and the step's report.
        page: the report, for the UI.
        go_on: yes or no.
    """
    from pipelines.kubeflow.adapter import run

    run("retrain-changes", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def retrain_decide(
    general: dict,
    data: dict,
    student: dict,
    retrain: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    changes: dsl.Input[dsl.Artifact],
    champion: dsl.Output[dsl.Model],
    out: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    go_on: dsl.OutputPath(str),  # type: ignore[valid-type]  # kfp asks for a call
) -> None:
    """Compare the clean data with the champion's.

    Args:
        manifest: the clean manifest.
        changes: what has changed since the last retraining.
        champion: the champion's network, card and manifest.
        out: the decision, and the step's report.
        page: the report, for the UI.
        go_on: yes or no.
    """
    from pipelines.kubeflow.adapter import run

    run("retrain-decide", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def retrain_update(
    general: dict,
    teacher: dict,
    student: dict,
    expand: dict,
    retrain: dict,
    ray: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    plan: dsl.Input[dsl.Artifact],
    decided: dsl.Input[dsl.Artifact],
    champion: dsl.Input[dsl.Model],
    trained: dsl.Output[dsl.Model],
    page: dsl.Output[dsl.HTML],
    task_config: dsl.TaskConfig,
) -> None:
    """Train the champion on, on Ray Train; its head grows for new classes.

    Args:
        manifest: the clean manifest.
        plan: what the audits tell training.
        decided: how it is trained.
        champion: the champion's network.
        trained: the network that learnt on, and the manifest with its labels.
        page: the report, for the UI.
        task_config: where Ray's workers may run, if they have pods of their own.
    """
    from pipelines.kubeflow.adapter import run

    run("retrain-update", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def retrain_choose(
    general: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    plan: dsl.Input[dsl.Artifact],
    updated: dsl.Input[dsl.Model],
    chosen: dsl.Output[dsl.Model],
    clean: dsl.Output[dsl.Dataset],
    page: dsl.Output[dsl.HTML],
    distilled: dsl.Input[dsl.Model] = None,
    passed: dsl.Input[dsl.Artifact] = None,
) -> None:
    """Of what was trained, keep the better network by validation.

    Args:
        manifest: the clean manifest.
        plan: what the audits told training.
        updated: the champion that learnt on.
        chosen: the better network, with the plan and the gate that belong to it.
        clean: the manifest with its labels.
        page: the report, for the UI.
        distilled: the student from its start weights, where one was trained.
        passed: the gate that it passed.
    """
    from pipelines.kubeflow.adapter import run

    run("retrain-choose", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def retrain_benchmark(
    general: dict,
    benchmark: dict,
    checks: dict,
    manifest: dsl.Input[dsl.Dataset],
    student: dsl.Input[dsl.Model],
    measured: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Measure the exported network on the node that this runs on.

    Args:
        manifest: the manifest with its labels.
        student: the exported network.
        measured: results.csv, choice.json and the curves.
        page: the report, for the UI.
    """
    from pipelines.kubeflow.adapter import run

    run("retrain-benchmark", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def retrain_record(
    general: dict,
    checks: dict,
    decided: dsl.Input[dsl.Artifact],
    chosen: dsl.Input[dsl.Model],
    registered: dsl.Input[dsl.Artifact],
    out: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    """Remember what was seen, and put what came of it on one page.

    Args:
        decided: why it was trained.
        chosen: the network that went on.
        registered: the model version.
        out: the step's report.
        page: the report, for the UI.
    """
    from pipelines.kubeflow.adapter import run

    run("retrain-record", locals())


@dsl.component(base_image="retort", install_kfp_package=False)
def close_run(status: dsl.PipelineTaskFinalStatus) -> None:
    """End the run in MLflow, however the steps ended: a pod that was killed could not say so.

    Args:
        status: how the steps ended.
    """
    from pipelines.kubeflow.adapter import close

    close(status.state)

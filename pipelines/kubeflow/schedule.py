"""Run the DAG again and again: one recurring run of the pipeline on a KFP server."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import kfp_server_api as api

from components.common.errors import ConfigError, RetortError
from pipelines.kubeflow import cron as crontab
from pipelines.kubeflow import dag
from pipelines.kubeflow.client import Server, ensure
from pipelines.kubeflow.upload import Uploaded, find_experiment, upload
from pipelines.params import Params
from pipelines.steps import MAIN, Pipeline

SHOWN = 3  # times that are said ahead


def schedule(params: Params, in_file: Params, cron: str, pipeline: Pipeline = MAIN) -> list[str]:
    """Run the pipeline whenever ``cron`` matches: one recurring run in the experiment, named as the pipeline.

    The server cannot change a recurring run: where time, version or values differ, a new one takes the old
    one's place, paused if that was. Runs that were missed are not made up for, and none starts beside
    another.

    Returns:
        What there is now, and when it runs next, line by line.

    Raises:
        ConfigError: when the expression cannot be read, or no time matches.
        RetortError: when the pipeline cannot run there, with all reasons; when the server refuses.
    """
    times = crontab.parse(cron)
    uploaded = upload(params, in_file, pipeline)
    server, name = uploaded.server, uploaded.name
    with server.asked():
        before = list(_own(server, name, uploaded.experiment_id))
        wanted = _message(uploaded, params, times.text, paused=any(_paused(run) for run in before))
        kept = next((run for run in before if _same(run, wanted)), None)
        there = {run.recurring_run_id for run in before}

        def new() -> Any:
            made = _own(server, name, uploaded.experiment_id)
            return next((run for run in made if run.recurring_run_id not in there), None)

        if kept is None:
            made = ensure(new, lambda: server.schedules.recurring_run_service_create_recurring_run(wanted))
            kept = made
        # only now: should making it fail, the old one still runs
        for run in before:
            if run.recurring_run_id != kept.recurring_run_id:
                server.schedules.recurring_run_service_delete_recurring_run(run.recurring_run_id)
    verb = "unchanged" if kept.recurring_run_id in there else "updated" if before else "created"
    head = f"schedule {name} {verb}: '{times.text}', version {uploaded.version}"
    if _paused(wanted):
        return [head, "it is paused: 'retort schedule --resume' starts it"]
    return [head, *_ahead(times)]


def listed(params: Params) -> list[str]:
    """The schedules of the experiment: each with its state, its times and when it runs next."""
    server, experiment = _connect(params)
    lines: list[str] = []
    with server.asked():
        call = server.schedules.recurring_run_service_list_recurring_runs
        for run in server.listed(call, "recurring_runs", experiment_id=experiment) if experiment else ():
            text = _cron(run)
            state = "paused" if _paused(run) else "runs"
            lines.append(f"{run.display_name}: {state}, '{text or 'by interval'}'")
            if text and not _paused(run):
                try:
                    lines += [f"  {line}" for line in _ahead(crontab.parse(text))]
                except ConfigError as error:  # made by another client
                    lines.append(f"  {error}")
    return lines or [f"no schedule in experiment {params.kubeflow.experiment}"]


def pause(params: Params, pipeline: Pipeline = MAIN) -> list[str]:
    """Let no more runs start; those that run go on."""
    return _each(params, pipeline, "recurring_run_service_disable_recurring_run", "paused")


def resume(params: Params, pipeline: Pipeline = MAIN) -> list[str]:
    """Let runs start again; those that were missed meanwhile are not made up for."""
    return _each(params, pipeline, "recurring_run_service_enable_recurring_run", "resumed")


def delete(params: Params, pipeline: Pipeline = MAIN) -> list[str]:
    """Take the schedule away; its runs stay."""
    return _each(params, pipeline, "recurring_run_service_delete_recurring_run", "deleted")


def _each(params: Params, pipeline: Pipeline, request: str, done: str) -> list[str]:
    server, experiment = _connect(params)
    name = dag.pipeline_name(params, pipeline)
    with server.asked():
        found = list(_own(server, name, experiment)) if experiment else []
        for run in found:
            getattr(server.schedules, request)(run.recurring_run_id)
    if not found:
        raise RetortError(
            f"no schedule {name} in experiment {params.kubeflow.experiment} (registry.name, "
            "kubeflow.experiment); 'retort schedule --list' shows those that are"
        )
    return [f"schedule {name} {done}"]


def _connect(params: Params) -> tuple[Server, str]:
    """The server, and the id of the experiment; '' when there is none yet."""
    server = Server(params.kubeflow)
    if server.multi_user and not server.namespace:
        raise RetortError("kubeflow.namespace is empty: this server has users; give your profile's namespace")
    with server.asked():
        experiment = find_experiment(server, params)
    return server, experiment.experiment_id if experiment else ""


def _own(server: Server, name: str, experiment: str) -> Iterator[Any]:
    call = server.schedules.recurring_run_service_list_recurring_runs
    return server.named(call, "recurring_runs", name, experiment_id=experiment)


def _message(uploaded: Uploaded, params: Params, cron: str, *, paused: bool) -> Any:
    return api.V2beta1RecurringRun(
        display_name=uploaded.name,
        experiment_id=uploaded.experiment_id,
        pipeline_version_reference=uploaded.reference,
        runtime_config=api.V2beta1RuntimeConfig(parameters=uploaded.values),
        service_account=params.kubeflow.service_account,
        trigger=api.V2beta1Trigger(cron_schedule=api.V2beta1CronSchedule(cron=cron)),
        mode=api.RecurringRunMode.DISABLE if paused else api.RecurringRunMode.ENABLE,
        max_concurrency="1",
        no_catchup=True,
    )


def _same(run: Any, wanted: Any) -> bool:
    """Whether a recurring run is the wanted one; of the account, the server fills in its default."""
    reference = run.pipeline_version_reference
    config = run.runtime_config
    return (
        _cron(run) == _cron(wanted)
        and reference is not None
        and reference.pipeline_version_id == wanted.pipeline_version_reference.pipeline_version_id
        and config is not None
        and config.parameters == wanted.runtime_config.parameters
        and bool(run.no_catchup)
        and wanted.service_account in (None, run.service_account)
    )


def _cron(run: Any) -> str:
    trigger = run.trigger.cron_schedule if run.trigger else None
    return str(trigger.cron) if trigger and trigger.cron else ""


def _paused(run: Any) -> bool:
    return run.mode == api.RecurringRunMode.DISABLE or run.status == "DISABLED"


def _ahead(times: crontab.Cron) -> list[str]:
    coming = itertools.islice(times.times(datetime.now(UTC)), SHOWN)
    return [f"next: {time:%a %Y-%m-%d %H:%M:%S} UTC" for time in coming]

"""Schedules: one recurring run of the pipeline, whatever is done how often."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from components.common.errors import ConfigError, RetortError
from pipelines.cli import frame
from pipelines.kubeflow import dag
from pipelines.kubeflow.schedule import delete, listed, pause, resume, schedule
from pipelines.retraining import RETRAIN
from tests.pipelines.kubeflow.conftest import on
from tests.pipelines.kubeflow.kfp_server import Fault, KfpServer


def make(server: KfpServer, cron: str = "30 3 * * 1", *overrides: str) -> list[str]:
    return schedule(*on(server.url, *overrides), cron)


def test_five_fields_get_a_second_and_the_next_three_times_are_said(server: KfpServer) -> None:
    first, *times = make(server)
    (made,) = server.schedules
    assert made.trigger.cron_schedule.cron == "0 30 3 * * 1"
    assert first.startswith("schedule retort-digits created: '0 30 3 * * 1', version ")
    assert len(times) == 3
    assert all(line.startswith("next: Mon ") and line.endswith(" 03:30:00 UTC") for line in times)
    assert made.mode == "ENABLE"
    assert made.no_catchup is True
    assert made.max_concurrency == "1"
    assert made.runtime_config.parameters == dag.arguments(on(server.url)[0])
    assert made.pipeline_version_reference.pipeline_version_id == server.versions[0].pipeline_version_id


def test_the_same_again_changes_nothing(server: KfpServer) -> None:
    make(server)
    before = len(server.writes())
    first, *_ = make(server, "0 30 3 * * 1")
    assert "unchanged" in first
    assert server.writes()[before:] == []


@pytest.mark.parametrize(
    ("cron", "override"),
    [
        ("0 4 * * *", "global.seed=7"),
        ("30 3 * * 1", "student.train.epochs=9"),
        ("30 3 * * 1", "kubeflow.shm=4Gi"),
    ],
    ids=["other times", "another value", "another version"],
)
def test_a_change_takes_the_old_ones_place(serve: Callable[..., KfpServer], cron: str, override: str) -> None:
    server = serve(page=1)
    make(server)
    first, *_ = make(server, cron, override)
    assert "updated" in first
    (kept,) = server.schedules
    assert kept.trigger.cron_schedule.cron == f"0 {cron}"
    assert kept.runtime_config.parameters == dag.arguments(on(server.url, override)[0])
    writes = server.writes()
    assert writes[-1].startswith("DELETE /recurringruns/"), "the old one goes when the new one is there"
    assert writes[-2] == "POST /recurringruns"


def test_a_change_that_fails_leaves_the_old_one(server: KfpServer) -> None:
    make(server)
    server.faults = [Fault("POST /recurringruns", 500)]
    with pytest.raises(RetortError, match="500"):
        make(server, "0 4 * * *")
    (kept,) = server.schedules
    assert kept.trigger.cron_schedule.cron == "0 30 3 * * 1"


def test_a_second_one_that_an_ended_process_left_goes(server: KfpServer) -> None:
    make(server)
    server.faults = [Fault("DELETE /recurringruns", 500)]
    with pytest.raises(RetortError, match="500"):
        make(server, "0 4 * * *")
    assert len(server.schedules) == 2
    make(server, "0 4 * * *")
    (kept,) = server.schedules
    assert kept.trigger.cron_schedule.cron == "0 0 4 * * *"


def test_a_lost_answer_makes_no_second_one(server: KfpServer) -> None:
    server.faults = [Fault("POST /recurringruns", done=True)]
    assert "created" in make(server)[0]
    assert len(server.schedules) == 1


def test_a_paused_schedule_stays_paused_when_it_changes(server: KfpServer) -> None:
    make(server)
    assert pause(on(server.url)[0]) == ["schedule retort-digits paused"]
    assert server.schedules[0].mode == "DISABLE"
    said = make(server, "0 4 * * *")
    assert said[1:] == ["it is paused: 'retort schedule --resume' starts it"]
    assert server.schedules[0].mode == "DISABLE"
    assert listed(on(server.url)[0]) == ["retort-digits: paused, '0 0 4 * * *'"]
    assert resume(on(server.url)[0]) == ["schedule retort-digits resumed"]
    assert server.schedules[0].mode == "ENABLE"
    first, *times = listed(on(server.url)[0])
    assert first == "retort-digits: runs, '0 0 4 * * *'"
    assert len(times) == 3
    assert delete(on(server.url)[0]) == ["schedule retort-digits deleted"]
    assert server.schedules == []


def test_pausing_what_is_not_there(server: KfpServer) -> None:
    assert listed(on(server.url)[0]) == ["no schedule in experiment retort"]
    for change in (pause, resume, delete):
        with pytest.raises(RetortError, match=r"no schedule retort-digits in experiment retort .*--list"):
            change(on(server.url)[0])
    assert server.writes() == []


def test_schedules_of_a_user(serve: Callable[..., KfpServer], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(users=["ada"], token="secret")
    monkeypatch.setenv("RETORT_KFP_TOKEN", "secret")
    make(server, "0 4 * * *", "kubeflow.namespace=ada")
    assert len(server.schedules) == 1
    with pytest.raises(RetortError, match=r"kubeflow.namespace is empty"):
        listed(on(server.url)[0])


def test_what_cannot_work_in_pods_is_not_scheduled(server: KfpServer) -> None:
    with pytest.raises(RetortError, match=r"data.source 'photos' lies on this machine"):
        make(server, "0 4 * * *", "data.source=photos")
    assert server.schedules == []


def test_a_typo_is_found_before_anything_is_asked(server: KfpServer) -> None:
    with pytest.raises(ConfigError, match=r"--cron '0 25 \* \* \*': hour '25': 25 is not within 0 to 23"):
        make(server, "0 25 * * *")
    assert server.requests == []


def test_on_the_command_line(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-o", f"kubeflow.host={server.url}"]
    assert frame.run(["schedule", "--list", *words]) == 0
    assert "no schedule in experiment retort" in capsys.readouterr().out
    assert frame.run(["schedule", "--list", "--pause", *words]) == 2
    assert "give one of --cron" in " ".join(capsys.readouterr().err.split())
    assert frame.run(["schedule", "--cron", "0 25 * * *", *words]) == 2


def test_the_second_pipeline_has_a_schedule_of_its_own(server: KfpServer) -> None:
    make(server)
    first, *_ = schedule(*on(server.url), "0 4 * * 2", RETRAIN)
    assert first.startswith("schedule retort-digits-retrain created: '0 0 4 * * 2'")
    ours, again = sorted(server.schedules, key=lambda each: str(each.display_name))
    assert again.runtime_config.parameters == dag.arguments(on(server.url)[0], RETRAIN)
    assert set(again.runtime_config.parameters) - set(ours.runtime_config.parameters) == {"expand", "retrain"}
    assert delete(on(server.url)[0], RETRAIN) == ["schedule retort-digits-retrain deleted"]
    assert [each.display_name for each in server.schedules] == ["retort-digits"]

"""Promotions: one writer, a record that is only ever added to, and whoever dies in between."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import RetortError
from components.common.params import Registry
from components.registry import actor, ledger, notify
from components.registry.params import RegisterParams
from components.registry.versions import CHAMPION, OvertakenError, Versions, opened
from components.tools import promote as tool
from components.tracking.client import connect
from tests.components.conftest import free_port, no_other_keys

REPO_ROOT = Path(__file__).resolve().parents[3]
RACERS = Path(__file__).with_name("racers.py")
NAME = "raced"


def race(uri: str, count: int, mode: str, *more: str) -> list[dict[str, Any]]:
    """What the racers say; all must have ended well, but for those that are to die."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPO_ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, RACERS, uri, str(count), mode, *more],
        capture_output=True, text=True, timeout=500, check=False, env=environment,
    )  # fmt: skip
    *said, ended = [json.loads(line) for line in done.stdout.splitlines()] or [None]
    assert ended == [-9 if mode == "dies" else 0] * count, done.stderr[-4000:]
    return said


def champion(versions: Versions) -> int | None:
    holder = versions.holder(CHAMPION)
    return int(holder.version) if holder else None


def check_chain(versions: Versions) -> list[dict[str, Any]]:
    """Each record replaced the one before it, none is missing, and the last one is champion."""
    records = versions.promotions()
    assert [record["number"] for record in records] == list(range(1, len(records) + 1))
    assert records[0]["replaced"] is None
    assert all(after["replaced"] == before["version"] for before, after in pairwise(records))
    assert champion(versions) == records[-1]["version"]
    assert all(record["settled"] for record in records)
    return records


def check_race(uri: str, count: int) -> None:
    said = race(uri, count, "all")
    with opened(Registry(tracking_uri=uri, name=NAME), "promote") as versions:
        records = check_chain(versions)
        assert sorted(record["version"] for record in records) == list(range(1, count + 1)), "none twice"
        told = sorted((racer["record"] for racer in said), key=lambda record: record["number"])
        assert [record["id"] for record in told] == [record["id"] for record in records]
        tags = versions.client.get_registered_model(NAME).tags
        assert sum(key.startswith("promotion.") for key in tags) == count
        names = [found.name for found in versions.client.search_registered_models()]
        assert [name for name in names if name.startswith(NAME)] == [NAME], "nothing is left of the election"
    # those who decided by the same champion: one takes its place
    said = race(uri, 3, "one")
    won = [racer["version"] for racer in said if racer["record"]]
    assert len(won) == 1
    with opened(Registry(tracking_uri=uri, name=NAME), "promote") as versions:
        assert check_chain(versions)[-1]["version"] == won[0]


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_many_at_once_make_one_chain(count: int, tmp_path: Path) -> None:
    check_race(f"sqlite:///{tmp_path}/mlflow.db", count)


@pytest.mark.slow
def test_twenty_steps_that_register_at_once(project: Any, tmp_path: Path) -> None:
    """Each with a student of its own, which may be better than the one before."""
    for number in range(20):
        project.train(regularisation=0.01 * 1.5**number)
        shutil.copytree(project.folder, tmp_path / "projects" / str(number))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    said = race(uri, 20, "register", str(tmp_path / "projects"))
    with opened(Registry(tracking_uri=uri, name=NAME), "promote") as versions:
        records = check_chain(versions)
        assert sorted(one["version"] for one in said) == list(range(1, 21))
        crowned = {one["version"] for one in said if one["alias"] == "champion"}
        assert crowned == {record["version"] for record in records}
        assert len({record["version"] for record in records}) == len(records), "none twice"


@pytest.mark.slow
def test_twenty_at_once_on_a_server_with_postgresql(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file to lock there: it is the store that takes one of them."""
    from tests.infra.servers import need, running

    need()
    with running("local", free_port) as servers:
        servers.set_up()
        for name, value in servers.login().items():
            monkeypatch.setenv(name, value)
        check_race(servers.tracker, 20)
        check_kill(servers.tracker)


def check_kill(uri: str) -> None:
    """A process that dies between record and alias: the next one ends its work."""
    with opened(Registry(tracking_uri=uri, name=NAME), "promote") as versions:
        versions.make()
        first = int(versions.add("s3://bucket/model").version)
        versions.set_champion(first, "promote", expected=champion(versions), who="a person")
        race(uri, 1, "dies")
        last = versions.promotions()[-1]
        assert (last["replaced"], last["settled"]) == (first, False)
        assert champion(versions) == first
        with pytest.raises(OvertakenError) as caught:
            versions.set_champion(first, "promote", expected=None, who="a person")
        assert caught.value.champion == champion(versions) == last["version"]
        check_chain(versions)
        versions.set_champion(first, "promote", expected=last["version"], who="a person")
        check_chain(versions)


def test_who_dies_between_record_and_alias_holds_nobody_up(tmp_path: Path) -> None:
    check_kill(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_server_too_ends_what_another_left(mlflow_server: Any) -> None:
    check_kill(mlflow_server.uri)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without any model, made once."""
    place = tmp_path_factory.mktemp("empty") / "mlflow.db"
    connect(f"sqlite:///{place}")
    return place


@pytest.fixture
def registry(empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    place = tmp_path / "mlflow.db"
    place.write_bytes(empty.read_bytes())
    return Registry(tracking_uri=f"sqlite:///{place}", name="digits")


@pytest.fixture
def versions(registry: Registry) -> Iterator[Versions]:
    """Three versions, none of them champion."""
    with opened(registry, "promote") as found:
        found.make()
        for _ in range(3):
            found.add("s3://bucket/model")
        yield found


def crown(versions: Versions, version: int, **more: Any) -> dict[str, Any]:
    return versions.set_champion(
        version, "promote", **{"expected": champion(versions), "who": "a person", **more}
    )


def test_a_record_cannot_be_changed(versions: Versions) -> None:
    from mlflow.exceptions import MlflowException

    crown(versions, 1, why="the first")
    run = versions.client.get_registered_model("digits").tags[ledger.RUN]
    with pytest.raises(MlflowException, match="Changing param values is not allowed"):
        versions.client.log_param(run, "promotion.0001", "{}")
    assert check_chain(versions)[0]["why"] == "the first"


def test_clocks_that_differ_change_no_order(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import UTC, datetime

    from components.registry import versions as module

    class Behind(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2001, 1, 1, tzinfo=tz or UTC)

    crown(versions, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "datetime", Behind)
        crown(versions, 2)
    crown(versions, 3)
    records = check_chain(versions)
    assert [record["version"] for record in records] == [1, 2, 3]
    assert records[1]["at"].startswith("2001")


def test_tags_of_before_are_a_part_of_the_record(versions: Versions) -> None:
    """What an earlier release left: tags alone."""
    for number, (version, replaced) in enumerate([(1, None), (2, 1)], start=1):
        record = {
            "version": version,
            "replaced": replaced,
            "at": "2025-01-01T00:00:00+00:00",
            "how": "register",
        }
        versions.client.set_registered_model_tag("digits", f"promotion.{number:04d}", json.dumps(record))
    versions.client.set_registered_model_alias("digits", CHAMPION, "2")
    assert [record["version"] for record in check_chain(versions)] == [1, 2]
    crown(versions, 3)
    assert [record["version"] for record in check_chain(versions)] == [1, 2, 3]


@pytest.mark.parametrize("how", ["deleted", "forgotten"])
def test_the_record_survives_what_a_person_removes(how: str, versions: Versions) -> None:
    crown(versions, 1)
    crown(versions, 2)
    run = versions.client.get_registered_model("digits").tags[ledger.RUN]
    if how == "deleted":
        versions.client.delete_run(run)
    else:
        versions.client.delete_registered_model_tag("digits", ledger.RUN)
    again = Versions(versions.client, versions.uri, "digits")
    crown(again, 3)
    assert [record["version"] for record in check_chain(again)] == [1, 2, 3]


def test_an_alias_that_was_moved_in_mlflow_is_respected_and_recorded(versions: Versions) -> None:
    crown(versions, 1)
    versions.client.set_registered_model_alias("digits", CHAMPION, "2")
    crown(versions, 3)
    records = check_chain(versions)
    assert [(record["version"], record["how"]) for record in records] == [
        (1, "promote"), (2, "alias"), (3, "promote"),
    ]  # fmt: skip
    assert "moved in MLflow itself" in records[1]["why"]


def test_a_version_that_is_deleted_under_us(versions: Versions, monkeypatch: pytest.MonkeyPatch) -> None:
    crown(versions, 1)
    written = versions.ledger.append

    def and_deleted(number: int, record: dict[str, Any]) -> bool:
        done = written(number, record)
        versions.client.delete_model_version("digits", str(record["version"]))
        return done

    with monkeypatch.context() as patch:
        patch.setattr(versions.ledger, "append", and_deleted)
        with pytest.raises(RetortError, match="version 2: 'digits' has no such version"):
            crown(versions, 2)
    assert champion(versions) == 1, "the alias stays where it was"
    crown(versions, 3)
    assert [record["version"] for record in check_chain(versions)] == [1, 2, 1, 3]
    versions.client.delete_model_version("digits", "3")  # and with it the alias
    assert champion(versions) is None
    crown(versions, 1)
    assert check_chain(versions)[-1]["replaced"] == 3


def params(registry: Registry, **more: Any) -> RegisterParams:
    return RegisterParams(registry=registry.model_copy(update=more))


def test_a_bucket_without_keys_is_named(
    versions: Versions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    no_other_keys(monkeypatch, tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(
        RetortError, match=r"version 1 of 'digits': its files lie in s3://bucket/model, and no keys"
    ):
        versions.download(versions.get(1), "model.onnx", tmp_path)


def test_rollback_passes_over_versions_that_were_deleted(versions: Versions, registry: Registry) -> None:
    for version in (1, 2, 3):
        crown(versions, version)
    versions.client.delete_model_version("digits", "2")
    record = tool.rollback(params(registry), why="blind to the new camera")
    assert (record["version"], record["replaced"], record["why"]) == (1, 3, "blind to the new camera")
    with pytest.raises(RetortError, match="nothing to go back to"):
        tool.rollback(params(registry))


def test_two_rollbacks_at_once_go_one_back(
    versions: Versions, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (1, 2, 3):
        crown(versions, version)
    decided = Versions.set_champion

    def late(self: Versions, version: int, how: str, **more: Any) -> dict[str, Any]:
        decided(self, version, how, **more)  # the other one, which had seen the same
        return decided(self, 1, how, **more)

    monkeypatch.setattr(Versions, "set_champion", late)
    with pytest.raises(RetortError, match="version 2 is champion by now"):
        tool.rollback(params(registry))
    assert [record["version"] for record in check_chain(versions)] == [1, 2, 3, 2]


def test_the_record_as_a_table(
    versions: Versions, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.show(tool.promotions(params(registry)))
    assert "no version was promoted yet" in capsys.readouterr().out
    tool.promote(params(registry), 2, why="[asked] for")
    tool.show(tool.promotions(params(registry)))
    shown = capsys.readouterr().out
    assert "[asked] for" in shown
    assert actor.actor().partition("@")[0] in shown
    with pytest.raises(RetortError, match=r"registry\.name: no model 'others'"):
        tool.promotions(params(registry, name="others"))


def test_who_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "pipeline")
    assert actor.actor().endswith(" (login pipeline)")
    said = base64.urlsafe_b64encode(json.dumps({"sub": "system:serviceaccount:ml:runner"}).encode())
    token = tmp_path / "token"
    token.write_bytes(b"e30." + said.rstrip(b"=") + b".signature")
    monkeypatch.setattr(actor, "TOKEN", token)
    monkeypatch.setenv("_KFP_RUNTIME", "true")
    monkeypatch.setenv("RETORT_RUN", "6f1b")
    assert actor.actor() == "Kubeflow run 6f1b (system:serviceaccount:ml:runner, login pipeline)"
    token.write_text("no token")
    assert actor.account() == ""


class Receiver:
    """A webhook that keeps what it is sent, and answers with ``status``, or not at all."""

    def __init__(self, status: int) -> None:
        kept = self.kept = []  # type: list[dict[str, Any]]
        self.silent = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                kept.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                if status:
                    self.send_response(status)
                    self.end_headers()
                else:
                    receiver.silent.wait(60)

            def log_message(self, *_: Any) -> None:
                pass

        receiver = self
        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/secret"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.mark.parametrize("status", [200, 500, 0])
def test_a_webhook_is_told_and_cannot_undo_a_promotion(
    status: int, versions: Versions, registry: Registry, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(notify, "SECONDS", 20.0 if status else 0.5)
    receiver = Receiver(status)
    monkeypatch.setenv("HOOK", "secret")
    url = receiver.url.replace("secret", "${HOOK}")
    try:
        tool.promote(params(registry, notify=url), 2, why="a test")
    finally:
        receiver.silent.set()
        receiver.server.shutdown()
        receiver.server.server_close()
    (told,) = receiver.kept
    assert (told["event"], told["version"], told["replaced"], told["why"]) == ("promotion", 2, None, "a test")
    assert told["text"].startswith("digits: version 2 is champion (promote by ")
    assert champion(versions) == 2
    said = capsys.readouterr().err
    assert ("127.0.0.1 was not told" in said) == (status != 200)
    assert "secret" not in said


@pytest.mark.parametrize(
    ("command", "failed"),
    [
        ('{python} -c \'import sys; open("told", "w").write(sys.stdin.read())\' ; touch shell', ""),
        ("{python} -c 'raise SystemExit(\"mail: no route\")'", "ended with status 1 (mail: no route)"),
        ("no-such-command", "'no-such-command' cannot be run (No such file or directory)"),
        ("{python} -c 'import time; time.sleep(60)'", "took over"),
    ],
)
def test_a_command_is_told_on_standard_input_without_a_shell(
    command: str, failed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(notify, "SECONDS", 1.0 if failed == "took over" else 60.0)
    registry = Registry(name="digits", notify=command.format(python=sys.executable))
    record = {
        "number": 4,
        "version": 7,
        "replaced": 3,
        "at": "",
        "how": "register",
        "who": "me",
        "why": "better",
    }
    said = notify.notify(registry, record)
    assert failed in said
    assert bool(said) == bool(failed)
    if not failed:
        told = json.loads(Path("told").read_text())
        assert (told["version"], told["model_uri"]) == (7, "models:/digits/7")
        assert not Path("shell").exists()
    monkeypatch.setenv("_KFP_RUNTIME", "true")
    assert "not run in a pod" in notify.notify(registry, record)


def test_the_same_model_from_two_runs_at_once_is_one_version(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither found it when it looked; whoever saved it later takes the other one's."""
    first = project.register()
    found = Versions.of_content
    looked = []

    def not_at_first(self: Versions, sha256: str) -> Any:
        looked.append(sha256)
        return found(self, sha256) if len(looked) > 1 else None

    monkeypatch.setattr(Versions, "of_content", not_at_first)
    again = project.register()
    assert (again["version"], again["alias"]) == (first["version"], "champion")
    with opened(project.params().registry, "promote") as versions:
        assert [version.version for version in versions.client.search_model_versions("name = 'digits'")] == [
            1
        ]
        assert len(check_chain(versions)) == 1


def test_a_registration_is_compared_again_when_another_won(
    project: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The champion that it was compared with is none any more when it would take its place."""
    project.register()
    decided = Versions.set_champion
    overtaken = []

    def late(self: Versions, version: int, how: str, **more: Any) -> dict[str, Any]:
        if not overtaken:
            overtaken.append(int(self.add((project.folder / "nothing").as_uri()).version))
            decided(self, overtaken[0], "promote", expected=more["expected"], who="another")
        return decided(self, version, how, **more)

    monkeypatch.setattr(Versions, "set_champion", late)
    project.train(regularisation=0.5)
    registered = project.register(project.params(tolerance=0.01))
    assert registered["compared_with"] == registered["champion"] == overtaken[0]
    assert registered["alias"] == "challenger", "that one has no file that could be measured"
    assert len(project.findings()["registry.better"]) == 1, "what was said of the first is not said any more"

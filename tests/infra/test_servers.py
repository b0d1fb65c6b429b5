"""The servers as the manifests start them: what they hold, refuse and take, and what they survive."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from components.common.params import StepParams
from components.step import read_run_id, step
from components.tracking import tracker
from components.tracking.replay import sync
from tests.components.conftest import free_port
from tests.infra.servers import NAMES, Servers, need, running

BUCKETS = {"mlflow": "mlflow", "dvc": "dvc", "data": "dvc", "pipeline": "pipeline"}  # -> who writes into it
GIB = 2**30

# MLflow's server makes its tables first
pytestmark = pytest.mark.large


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    """All three, set up; who has an idle machine measures them on it."""
    with running("local", free_port) as found:
        found.set_up()
        yield found


@pytest.fixture
def logged_in(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> Servers:
    """With the pipeline's login in the environment, as in its pods."""
    for name, value in servers.login().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return servers


def status(url: str, login: tuple[str, str] | None = None) -> int:
    request = urllib.request.Request(url)
    if login is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(':'.join(login).encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "path",
    [
        "/api/2.0/mlflow/experiments/get?experiment_id=0",
        "/api/2.0/mlflow-artifacts/artifacts?path=1",
        "/ajax-api/2.0/mlflow/experiments/get?experiment_id=0",
        "/",
    ],
)
def test_mlflow_answers_nobody_without_a_login(servers: Servers, path: str) -> None:
    assert status(servers.tracker + path) == 401
    assert status(servers.tracker + path, ("pipeline", "a guess")) == 401
    login = servers.login()
    right = (login["MLFLOW_TRACKING_USERNAME"], login["MLFLOW_TRACKING_PASSWORD"])
    assert status(servers.tracker + path, right) == 200


def test_probes_need_no_login(servers: Servers) -> None:
    assert status(f"{servers.tracker}/health") == 200


def test_set_up_may_run_twice_and_the_login_goes_on(servers: Servers) -> None:
    servers.set_up()
    login = servers.login()
    right = (login["MLFLOW_TRACKING_USERNAME"], login["MLFLOW_TRACKING_PASSWORD"])
    assert status(f"{servers.tracker}/api/2.0/mlflow/experiments/get?experiment_id=0", right) == 200
    assert status(f"{servers.tracker}/api/2.0/mlflow/users/get?username=admin", right) == 403


def may(action: Any, **arguments: str) -> bool:
    """Whether the store does it; any refusal but the one that is asked about fails the test."""
    try:
        action(**arguments)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("AccessDenied", "403"):
            raise
        return False
    return True


def test_a_key_of_the_store_opens_its_users_buckets_alone(servers: Servers) -> None:
    for bucket, owner in BUCKETS.items():
        servers.store(owner).put_object(Bucket=bucket, Key="mine", Body=b"x")
    reads = {user: set[str]() for user in ("mlflow", "dvc", "pipeline")}
    writes, lists = {user: set[str]() for user in reads}, {user: set[str]() for user in reads}
    for user in reads:
        client = servers.store(user)
        for bucket in BUCKETS:
            if may(client.get_object, Bucket=bucket, Key="mine"):
                reads[user].add(bucket)
            if may(client.list_objects_v2, Bucket=bucket):
                lists[user].add(bucket)
            if may(client.put_object, Bucket=bucket, Key=f"by-{user}"):
                writes[user].add(bucket)
    assert reads == lists == {"mlflow": {"mlflow"}, "dvc": {"dvc", "data"}, "pipeline": {"pipeline", "data"}}
    assert writes == {"mlflow": {"mlflow"}, "dvc": {"dvc", "data"}, "pipeline": {"pipeline"}}


@pytest.mark.parametrize("user", ["mlflow", "dvc", "pipeline"])
def test_a_user_of_the_store_makes_and_removes_no_bucket(servers: Servers, user: str) -> None:
    client = servers.store(user)
    assert not may(client.create_bucket, Bucket=f"of-{user}")
    own = next(bucket for bucket, owner in BUCKETS.items() if owner == user)
    assert not may(client.delete_bucket, Bucket=own)


def test_the_store_knows_no_stranger(servers: Servers) -> None:
    url = f"http://127.0.0.1:{servers.ports['retort-store:8333']}"
    assert status(f"{url}/mlflow/mine") == 403
    assert status(f"{url}/") == 403


def test_servers_write_into_their_volumes_alone(servers: Servers) -> None:
    """Their root file systems are read-only; the working folder is ours."""
    made = {path.name for path in servers.folder.iterdir() if path.suffix != ".log"}
    assert made == {"data", "database", "socket", "tmp", "seaweedfs", "mlflow"}
    assert {path.name for path in (servers.folder / "mlflow").iterdir()} == {"basic_auth.ini"}
    assert {path.name for path in (servers.folder / "seaweedfs").iterdir()} == {"s3.json"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_buckets_take_a_gibibyte_each() -> None:
    """On a new disk of the claim's size, where we may mount one; the third bucket could not hold a MiB."""
    need()
    if shutil.disk_usage("/tmp").free < 8 * GIB:
        pytest.skip("the disk has no 8 GiB to spare")
    part = 32 * 2**20
    with running("local", free_port, "retort-store", as_claimed=True) as servers:
        admin = servers.store("admin")
        for bucket in BUCKETS:
            admin.create_bucket(Bucket=bucket)
        digests: dict[tuple[str, int], str] = {}
        for bucket, owner in BUCKETS.items():
            client = servers.store(owner)
            for number in range(GIB // part):
                body = os.urandom(part)
                client.put_object(Bucket=bucket, Key=f"part-{number}", Body=body)
                digests[bucket, number] = hashlib.sha256(body).hexdigest()
        admin.create_bucket(Bucket="fifth")
        admin.put_object(Bucket="fifth", Key="more", Body=os.urandom(2**20))
        for (bucket, number), digest in digests.items():
            body = (
                servers.store(BUCKETS[bucket]).get_object(Bucket=bucket, Key=f"part-{number}")["Body"].read()
            )
            assert hashlib.sha256(body).hexdigest() == digest, f"{bucket}/part-{number}"
        held, limit = servers.memory("retort-store")
        print(f"{held / 2**20:.0f} of {limit / 2**20:.0f} MiB")
        assert held < 0.75 * limit, f"{held / 2**20:.0f} of {limit / 2**20:.0f} MiB"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_runs_leave_a_quarter_of_the_memory(
    logged_in: Servers, tmp_path: Path, record_property: Any
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=logged_in.tracker)
    experiment = client.create_experiment("two hundred")
    page = tmp_path / "report.html"
    page.write_bytes(os.urandom(1_000_000))

    def run(number: int) -> str:
        made = client.create_run(experiment, run_name=f"run-{number}")
        for epoch in range(10):
            client.log_metric(made.info.run_id, "val_top1", epoch / 10, step=epoch)
        client.log_param(made.info.run_id, "number", number)
        client.log_artifact(made.info.run_id, page)
        client.set_terminated(made.info.run_id)
        return made.info.run_id

    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(run, range(200)))
    assert len(set(ids)) == 200
    assert len(client.search_runs([experiment], max_results=1000)) == 200
    held = {name: logged_in.memory(name) for name in NAMES}
    said = {name: f"{used / 2**20:.0f} of {limit / 2**20:.0f} MiB" for name, (used, limit) in held.items()}
    record_property("memory", said)
    print(said)
    assert all(used < 0.75 * limit for used, limit in held.values()), said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_each_server_is_killed_in_mid_run_and_nothing_is_lost(
    logged_in: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step goes on while a server is away; what it recorded then arrives when it is back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_RUN", "killed")
    monkeypatch.setattr(tracker, "EVERY_SECONDS", 0.0)
    # on a busy machine a step would leave a request that still runs to itself, and hold its spool as it does
    monkeypatch.setattr(tracker, "BUDGET_SECONDS", 300.0)
    params = StepParams.model_validate({"registry": {"tracking_uri": logged_in.tracker, "name": "killed"}})
    files: dict[str, bytes] = {}
    epoch = 0
    for victim in NAMES:
        out = tmp_path / victim
        with step(f"away-{victim}", params, out, []) as run:
            for away in (False, True, False):
                if away:
                    logged_in.kill(victim)
                for _ in range(3):
                    run.tracker.metrics({"val_top1": epoch / 100}, step=epoch)
                    epoch += 1
                name = f"{victim}-{'away' if away else epoch}.json"
                files[name] = os.urandom(10_000)
                (tmp_path / name).write_bytes(files[name])
                run.tracker.artifact(tmp_path / name)
                if away:
                    logged_in.start(victim)
        read_run_id(out)
    assert sync(params.registry)["running"] == 0

    client = tracker.connect(logged_in.tracker)
    experiment = client.get_experiment_by_name("killed")
    found = client.search_runs([experiment.experiment_id])
    steps = {run.info.run_name: run for run in found}
    assert set(steps) >= {f"away-{victim}" for victim in NAMES}
    recorded: dict[int, float] = {}
    arrived: dict[str, bytes] = {}
    for victim in NAMES:
        run_id = steps[f"away-{victim}"].info.run_id
        assert steps[f"away-{victim}"].info.status == "FINISHED"
        history = client.get_metric_history(run_id, "val_top1")
        assert len(history) == 9
        recorded |= {metric.step: metric.value for metric in history}
        for name in files:
            if name.startswith(victim):
                arrived[name] = Path(client.download_artifacts(run_id, name, tmp_path)).read_bytes()
    assert recorded == {number: number / 100 for number in range(epoch)}
    assert arrived == files
    assert not list((tmp_path / ".retort/spool").iterdir())

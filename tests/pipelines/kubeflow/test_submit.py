"""Submitting: the contract with a KFP server, and what a person reads when something is in the way."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace

import kfp_server_api as api
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import components.common.progress  # noqa: F401 - lines get their handler
from components.common.errors import RetortError
from pipelines.cli import frame
from pipelines.kubeflow import client, dag, follow, submit, upload
from pipelines.params import Params
from tests.conftest import bare
from tests.pipelines.kubeflow.conftest import REPO_ROOT, on
from tests.pipelines.kubeflow.kfp_server import Fault, KfpServer

Serve = Callable[..., KfpServer]


def start(server: KfpServer, *overrides: str, wait: bool = False) -> str:
    return submit.submit(*on(server.url, *overrides), wait=wait)


def run(state: str, tasks: dict[str, str] | None = None, error: str = "") -> api.V2beta1Run:
    """What a poll sees."""
    details = [api.V2beta1PipelineTaskDetail(display_name=name, state=s) for name, s in (tasks or {}).items()]
    return api.V2beta1Run(
        state=state,
        error=api.GoogleRpcStatus(message=error) if error else None,
        run_details=api.V2beta1RunDetails(task_details=details),
    )


def _pause(monkeypatch: pytest.MonkeyPatch, instead: Callable[[float], None]) -> None:
    """Do something else while the next poll is waited for."""
    monkeypatch.setattr(follow, "time", SimpleNamespace(monotonic=time.monotonic, sleep=instead))


def test_a_run_gets_the_pipeline_its_parameters_and_its_experiment(server: KfpServer) -> None:
    overrides = ("kubeflow.experiment=nightly", "student.train.epochs=9", "kubeflow.service_account=trainer")
    run_id = start(server, *overrides)
    (sent,) = server.runs
    assert sent.run_id == run_id
    (experiment,) = server.experiments
    assert experiment.display_name == "nightly"
    assert sent.experiment_id == experiment.experiment_id
    assert sent.service_account == "trainer"
    assert sent.pipeline_version_reference.pipeline_version_id == server.versions[0].pipeline_version_id
    assert sent.runtime_config.parameters == dag.arguments(on(server.url, *overrides)[0])
    assert sent.runtime_config.parameters["student"]["train"]["epochs"] == 9
    assert server.versions[0].pipeline_spec["pipeline_spec"]["pipelineInfo"]["name"] == "retort-digits"


def test_a_value_of_the_run_makes_no_version_and_one_of_the_pods_does(
    server: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "git_state", lambda: ("0123456789abcdef", True))
    given = [
        ("student.train.epochs=9",),
        ("student.train.epochs=10", "global.seed=8"),
        ("kubeflow.shm=4Gi",),
        ("kubeflow.shm=4Gi", "student.train.epochs=9"),
        ("ray.workers=3",),
    ]
    for overrides in given:
        start(server, *overrides)
    used = [sent.pipeline_version_reference.pipeline_version_id for sent in server.runs]
    assert used[0] == used[1]
    assert used[2] == used[3]
    assert len(set(used)) == 3 == len(server.versions)
    assert len(server.pipelines) == len(server.experiments) == 1
    assert [sent.runtime_config.parameters["student"]["train"]["epochs"] for sent in server.runs[:2]] == [
        9,
        10,
    ]
    executors = server.versions[2].pipeline_spec["pipeline_spec"]["deploymentSpec"]["executors"]
    assert executors["exec-finetune"]["container"]["resources"]["cpuLimit"] == 4
    for version in server.versions:
        commit, dirty, digest = version.display_name.split("-")
        assert (commit, dirty) == ("0123456789ab", "dirty")
        assert len(digest) == 12
        int(digest, 16)


def test_outside_a_repository_a_version_has_no_commit(
    server: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "git_state", lambda: ("", False))
    start(server)
    assert server.versions[0].display_name.startswith("nogit-")


def test_what_lies_on_a_later_page_is_found(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(page=1)
    start(server)
    # as a server that does not know the filter would answer: all of them, page by page
    monkeypatch.setattr(client.Server, "named", _unfiltered)
    server.experiments.insert(0, api.V2beta1Experiment(experiment_id="x", display_name="another"))
    server.pipelines.insert(0, api.V2beta1Pipeline(pipeline_id="y", display_name="another"))
    own = server.pipelines[1].pipeline_id
    older = api.V2beta1PipelineVersion(pipeline_id=own, pipeline_version_id="z", display_name="older")
    server.versions.insert(0, older)
    start(server)
    assert len(server.experiments) == len(server.pipelines) == len(server.versions) == 2
    first, second = server.runs
    assert second.pipeline_version_reference == first.pipeline_version_reference


def _unfiltered(self: client.Server, call: object, field: str, name: str, **where: object) -> object:
    return (m for m in self.listed(call, field, **where) if m.display_name == name)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["/experiments", "/pipelines", "/pipelines/upload_version"])
def test_another_client_that_makes_the_same_at_once(server: KfpServer, what: str) -> None:
    start(server)
    listed = "/pipelines/pipeline-2/versions" if "version" in what else what
    server.faults = [Fault(f"GET {listed}", empty=True, times=1 if what != "/experiments" else 2)]
    start(server)
    assert f"POST {what}" in server.writes()[4:], "it was made again, and refused with 409"
    assert len(server.experiments) == len(server.pipelines) == len(server.versions) == 1
    assert len(server.runs) == 2


def test_an_answer_that_is_lost_starts_no_second_run(server: KfpServer) -> None:
    server.faults = [Fault("POST /runs", done=True)]
    run_id = start(server)
    assert [sent.run_id for sent in server.runs] == [run_id]


def test_a_start_that_never_arrived_is_an_error(server: KfpServer) -> None:
    server.faults = [Fault("POST /runs")]
    with pytest.raises(RetortError, match=rf"kubeflow.host {server.url}: .*(aborted|closed)"):
        start(server)
    assert server.runs == []


def test_a_list_is_asked_again_while_the_server_restarts(server: KfpServer) -> None:
    server.faults = [Fault("GET /experiments"), Fault("GET /pipelines", 503)]
    start(server)
    assert len(server.runs) == 1


def test_a_server_that_fails_is_told_in_its_words(server: KfpServer) -> None:
    server.faults = [Fault("POST /pipelines/upload_version", 500, "Failed to create a pipeline version")]
    with pytest.raises(RetortError, match="500 Internal Server Error Failed to create a pipeline version"):
        start(server)


def test_a_slow_answer_ends(server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "REQUEST_SECONDS", 0.2)
    server.faults = [Fault("GET /experiments", seconds=1.0, times=9)]
    with pytest.raises(RetortError, match=rf"kubeflow.host {server.url}: .*timed out"):
        start(server)


def test_a_server_with_users_gets_token_and_namespace(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(users=["ada"], token="secret")
    file = tmp_path / "token"
    file.write_text("secret\n")
    start(server, f"kubeflow.token_file={file}", "kubeflow.namespace=ada")
    assert {server.experiments[0].namespace, server.pipelines[0].namespace} == {"ada"}
    for variable, value in (("RETORT_KFP_TOKEN", "secret"), ("KF_PIPELINES_SA_TOKEN_PATH", os.fspath(file))):
        with monkeypatch.context() as outside:
            outside.setenv(variable, value)
            start(server, "kubeflow.namespace=ada")
    assert len(server.runs) == 3
    assert "secret" not in str([sent.to_dict() for sent in server.runs])


def test_a_server_with_users_needs_a_namespace(serve: Serve) -> None:
    server = serve(users=["ada"])
    with pytest.raises(RetortError, match=r"^kubeflow.namespace is empty: this server has users"):
        start(server)
    assert server.writes() == []


def test_a_server_without_users_is_told_no_namespace(server: KfpServer) -> None:
    start(server, "kubeflow.namespace=ada")
    assert server.experiments[0].namespace is None


def test_a_namespace_without_rights(serve: Serve) -> None:
    server = serve(users=["ada"])
    told = r"403 Forbidden User 'ada' is not authorized .*\n.*no right to this in kubeflow.namespace 'eve'"
    with pytest.raises(RetortError, match=told):
        start(server, "kubeflow.namespace=eve")
    assert server.runs == []


def test_an_expired_token(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(token="new")
    monkeypatch.setenv("RETORT_KFP_TOKEN", "old")
    with pytest.raises(
        RetortError, match=r"401 Unauthorized .*\n.*expired: .* kubeflow.token_file or RETORT_KFP"
    ):
        start(server)


def test_a_token_that_is_renewed_while_a_run_is_followed(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(token="first")
    file = tmp_path / "token"
    file.write_text("first")
    server.states = [run("RUNNING"), run("SUCCEEDED")]

    def renew(_: float) -> None:
        server.token = "second"
        file.write_text("second")

    _pause(monkeypatch, renew)
    start(server, f"kubeflow.token_file={file}", wait=True)
    assert server.requests[-1].startswith("GET /runs/")


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "cannot be read \\(No such file"), ("", "expected one line"), ("a\nb", "expected one line")],
)
def test_a_token_file_that_holds_none(
    server: KfpServer, tmp_path: Path, content: str | None, told: str
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with pytest.raises(RetortError, match=rf"kubeflow.token_file {file}: {told}"):
        start(server, f"kubeflow.token_file={file}")
    assert server.requests == []


def test_a_token_in_clear_is_warned_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETORT_KFP_TOKEN", "secret")
    with pytest.raises(RetortError, match="no KFP server answers"):
        client.Server(on("http://kfp.invalid:80")[0].kubeflow)
    said = bare(capsys.readouterr().err)
    assert "kubeflow.host http://kfp.invalid:80: the token goes there unencrypted" in " ".join(said.split())
    assert "secret" not in said


@pytest.fixture
def authority(tmp_path: Path) -> tuple[Path, Path]:
    """A CA's certificate, and a server's certificate and key that it signed."""
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
    now = datetime.now(UTC)

    def sign(name: x509.Name, public: ec.EllipticCurvePublicKey, *more: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder(
            issuer,
            name,
            public,
            x509.random_serial_number(),
            now - timedelta(hours=1),
            now + timedelta(hours=1),
        )
        for extension in more:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
        decipher_only=False,
    )  # fmt: skip
    ca = tmp_path / "ca.pem"
    ca.write_bytes(sign(issuer, ca_key.public_key(), x509.BasicConstraints(True, 0), identifier, usage))
    own = tmp_path / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kfp")])
    own.write_bytes(private + sign(named, key.public_key(), alternative, above))
    return ca, own


def test_a_servers_own_ca(serve: Serve, authority: tuple[Path, Path]) -> None:
    ca, own = authority
    server = serve(certificate=own)
    with pytest.raises(RetortError, match=r"CERTIFICATE_VERIFY_FAILED.*the CA in kubeflow.ca_file"):
        start(server)
    assert server.requests == []
    start(server, f"kubeflow.ca_file={ca}")
    assert len(server.runs) == 1
    with pytest.raises(RetortError, match=r"kubeflow.ca_file nowhere.pem: no such file"):
        start(server, "kubeflow.ca_file=nowhere.pem")


@pytest.mark.parametrize("new", [True, False], ids=["v2beta1 says it", "only v1beta1 does"])
def test_a_server_that_would_drop_settings_of_pods(serve: Serve, new: bool) -> None:
    server = serve(tag="v2.2.0", new=new)
    with pytest.raises(RetortError, match=r"^kubeflow.host: KFP 2.2 has no emptyDirMounts, KFP 2.3 does: "):
        start(server)
    assert server.writes() == []


def test_a_server_that_does_not_say_how_old_it_is(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve(tag="")
    start(server)
    assert "the server does not say its version" in " ".join(bare(capsys.readouterr().err).split())


def test_all_that_stands_against_it_is_told_at_once(server: KfpServer) -> None:
    wrong = [
        "data.source=/home/me/photos", "student.weights=best.pth", "kubeflow.image=retort:latest",
        "registry.tracking_uri=sqlite:///mlflow.db", "ray.gpus_per_worker=1",
    ]  # fmt: skip
    with pytest.raises(RetortError) as caught:
        start(server, *wrong)
    told = str(caught.value)
    for override in wrong:
        assert override.split("=")[0] in told
    assert server.writes() == []


def test_waiting_says_each_tasks_state_and_outlives_a_broken_poll(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.states = [
        run("RUNNING", {"ingest-driver": "SUCCEEDED", "ingest": "RUNNING"}),
        None,
        run("RUNNING", {"ingest": "SUCCEEDED", "validate": "RUNNING"}),
        run("SUCCEEDED", {"ingest": "SUCCEEDED", "validate": "SUCCEEDED"}),
    ]
    run_id = start(server, wait=True)
    said = " ".join(bare(capsys.readouterr().err).split())
    states = ["ingest: running", "ingest: succeeded", "validate: running", "validate: succeeded"]
    places = [said.index(state) for state in [f"/#/runs/details/{run_id}", *states, "the run succeeded"]]
    assert places == sorted(places)


def test_a_failed_run_is_an_error_that_names_the_step(server: KfpServer) -> None:
    around = dict.fromkeys(["retort-digits-x7k2p", "root", "exit-handler-1", "executor"], "FAILED")
    states = {**around, "ingest": "SUCCEEDED", "check": "FAILED"}
    server.states = [run("FAILED", states, error="exit status 1")]
    with pytest.raises(RetortError, match=r"the run failed at check: exit status 1\n.*/runs/details/run-"):
        start(server, wait=True)


def test_a_pod_of_kfps_own_that_failed_is_named(server: KfpServer) -> None:
    server.states = [run("FAILED", {"ingest-driver": "FAILED", "root-driver": "SUCCEEDED"})]
    with pytest.raises(RetortError, match=r"the run failed at ingest-driver\n"):
        start(server, wait=True)


def test_a_cancelled_run_ends_the_waiting(server: KfpServer) -> None:
    server.states = [run("RUNNING"), run("CANCELING"), run("CANCELED")]
    with pytest.raises(RetortError, match="the run canceled"):
        start(server, wait=True)


def test_a_pod_that_does_not_start_is_spoken_of(
    server: KfpServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs that no node has, an image that cannot be pulled, a quota: KFP's API says that the pod waits."""
    monkeypatch.setattr(follow, "PENDING_SECONDS", 0.05)
    waits = run("RUNNING", {"ingest": "SUCCEEDED", "finetune": "RUNNING", "executor": "PENDING"})
    server.states = [*[waits] * 8, run("FAILED", {"finetune": "FAILED"}, error="exceeded its deadline")]
    with pytest.raises(RetortError, match="the run failed at finetune: exceeded its deadline"):
        start(server, wait=True)
    said = " ".join(bare(capsys.readouterr().err).split())
    assert "finetune: its pod has not started for" in said
    assert f"get workflows -l pipeline/runid={server.runs[0].run_id}" in said


def test_pods_that_start_in_time_are_not_spoken_of(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.states = [run("RUNNING", {"ingest": "RUNNING", "executor": "PENDING"})] * 5 + [run("SUCCEEDED")]
    start(server, wait=True)
    assert "has not started" not in " ".join(capsys.readouterr().err.split())


def test_a_right_that_is_lost_while_waiting(server: KfpServer) -> None:
    server.states = [run("RUNNING")]
    server.faults = [Fault("GET /runs/", 401, "token expired")]
    with pytest.raises(
        RetortError, match=r"the token has expired .*401 .*it may go on\n'retort submit --follow run-"
    ):
        start(server, wait=True)


def test_a_run_is_followed_again(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = start(server)
    assert frame.run(["submit", "--follow", run_id, "-o", f"kubeflow.host={server.url}"]) == 0
    assert "the run succeeded" in capsys.readouterr().err
    assert frame.run(["submit", "--follow", "run-0", "-o", f"kubeflow.host={server.url}"]) == 1
    assert "no such run" in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_leaves_the_run(
    server: KfpServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    server.states = [run("RUNNING")]
    _pause(monkeypatch, interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(server, wait=True)
    assert "the run goes on" in capsys.readouterr().err


def test_no_host_says_what_to_give() -> None:
    with pytest.raises(RetortError, match=r"kubeflow.host is empty.*--local"):
        client.Server(Params().kubeflow)


def test_a_host_that_is_no_url() -> None:
    with pytest.raises(RetortError, match=r"kubeflow.host 'kfp:8888': expected a URL"):
        client.Server(on("kfp:8888")[0].kubeflow)


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(RetortError, match=rf"127.0.0.1:{port}: no KFP server answers there .*refused"):
        client.Server(on(f"http://127.0.0.1:{port}")[0].kubeflow)


def test_a_server_that_accepts_and_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RetortError, match=r"no KFP server answers there .*timed out"):
            client.Server(on(url)[0].kubeflow)


def test_a_login_page_is_no_kfp_server(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KfpServer, "health", lambda self, version: ["<html>"])
    with pytest.raises(
        RetortError, match=r"answered with a page.*\n.*kubeflow.token_file.*https://HOST/pipeline"
    ):
        client.Server(on(serve().url)[0].kubeflow)


def test_a_path_without_kfp(server: KfpServer) -> None:
    with pytest.raises(RetortError, match=r"404 .*\n.*https://HOST/pipeline"):
        client.Server(on(f"{server.url}/pipeline")[0].kubeflow)


COMPILE = (
    "import hashlib, sys\n"
    "from pathlib import Path\n"
    "from components.common.storage import sha256_json\n"
    "from pipelines.kubeflow import dag\n"
    "from pipelines.params import load\n"
    "documents = dag.compile(load(Path('params.yaml')), Path(sys.argv[1]))\n"
    "print(hashlib.sha256(Path(sys.argv[1]).read_bytes()).hexdigest(), sha256_json(documents))\n"
)


def test_two_processes_compile_the_same(tmp_path: Path) -> None:
    said = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": os.fspath(REPO_ROOT), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", COMPILE, os.fspath(tmp_path / f"{seed}.yaml")]
        done = subprocess.run(
            command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, check=True
        )
        said.append(done.stdout)
    assert said[0] == said[1]
    head = (tmp_path / "1.yaml").read_text().split("components:")[0]
    assert "# Name: retort-digits\n" in head
    assert '#    checks: dict [Default: {"waive": []}]\n' in head

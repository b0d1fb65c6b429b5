"""What several rooms' tests share: a real MLflow server, and a real S3 server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import BotoCoreError, ClientError

KEY, SECRET = "retort-tests", "not-a-secret-but-long-enough"
PARTS = ("master", "volume", "filer", "s3")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class MlflowServer:
    """``mlflow server`` on 127.0.0.1, with a SQLite file and artifacts of its own, stopped and started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
            "--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}",
            "--artifacts-destination", str(self.folder / "artifacts"),
        ]  # fmt: skip
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **quiet}, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(1800):  # a busy machine takes its time
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
            except OSError:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()
                time.sleep(0.1)
            else:
                return
        raise AssertionError("the MLflow server did not come up")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and its worker."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End the server and its worker as a power cut would."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One server for the session; a test that kills it starts it again."""
    server = MlflowServer(tmp_path_factory.mktemp("mlflow_server"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


class Store:
    """``weed server`` with one user, and a client that fills it; ``more``: arguments of the server."""

    def __init__(self, folder: Path, *more: str) -> None:
        ports = {part: free_port() for part in PARTS}
        self.port = ports["s3"]
        self.url = f"http://127.0.0.1:{self.port}"
        keys = {"accessKey": KEY, "secretKey": SECRET}
        identity = {"name": "tests", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        command = [
            os.fspath(Path(sys.executable).with_name("weed")),
            "server",
            f"-dir={folder}",
            "-s3",
            f"-s3.config={folder / 's3.json'}",
            "-s3.iam=false",
        ]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.volumeSizeLimitMB=64"]
        for part, port in ports.items():
            command += [f"-{part}.port={port}", f"-{part}.port.grpc={free_port()}"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", *more]
        with (folder / "server.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )
        for attempt in range(300):
            assert self.process.poll() is None, (folder / "server.log").read_text()[-3000:]
            try:
                self.client.create_bucket(Bucket="photos")
                self.client.put_object(Bucket="photos", Key="ready", Body=b"x")
                return
            except (BotoCoreError, ClientError):
                assert attempt < 299, (folder / "server.log").read_text()[-3000:]
                time.sleep(0.2)

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket="photos", Key=key, Body=content)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store for the tests of one file."""
    server = Store(tmp_path_factory.mktemp("weed"))
    try:
        yield server
    finally:
        server.stop()


def no_other_keys(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """The store's keys in the environment, the first place of the standard chain, and nowhere else."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ACCESS_KEY_ID", KEY)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_CONFIG_FILE", str(folder / "no-config"))
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "no-credentials"))

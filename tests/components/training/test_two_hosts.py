"""Two hosts without a shared disk: namespaces with folders of their own, an S3 server between them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow as pa
import pytest

from components.common.storage import sha256_file
from components.dataset import manifest
from components.training.check import check
from components.training.distill import distill
from components.training.finetune import finetune
from components.training.params import CheckParams, DistillParams, FinetuneParams
from tests.components.conftest import KEY, SECRET

REPO_ROOT = Path(__file__).resolve().parents[3]
FIRST, SECOND = "10.77.0.1", "10.77.0.2"
PORT, S3_PORT = 6379, 8333  # of namespaces that hold nothing else
URL = f"http://{FIRST}:{S3_PORT}"


def _missing() -> str:
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = [tool for tool in ("ip", "unshare", "nsenter", "mount") if shutil.which(tool) is None]
    if tools:
        return f"{', '.join(tools)} not found"
    if Path("/tmp") in REPO_ROOT.parents:
        return "the second host has a /tmp of its own, and the checkout lies in /tmp"
    tried = subprocess.run(["unshare", "-m", "-n", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "no right to make namespaces here"


MISSING = _missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=MISSING or "-"),
]


def call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class Host:
    """A network namespace, and a mount namespace in which ``hidden`` folders are empty ones of its own."""

    def __init__(self, name: str, hidden: list[Path], environment: dict[str, str]) -> None:
        self.name, self._environment = name, environment
        mounts = "; ".join(f"mount -t tmpfs tmpfs {folder}" for folder in hidden)
        call("ip", "netns", "add", name)
        script = f"mount --make-rprivate /; {mounts}; echo ready; exec sleep infinity"
        command = ["ip", "netns", "exec", name, "unshare", "-m", "sh", "-ec", script]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.run("ip", "link", "set", "lo", "up")

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self._holder.pid), "-m", "-n", "--", *command]

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, **self._environment}
        return subprocess.Popen(self.inside(*command), env=environment, text=True, **options)

    def run(self, *command: str) -> str:
        with self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{command}: {said}"
        return said

    def end_all(self) -> None:
        """Kill every process in it, but the one that holds it."""
        for _ in range(50):
            found = subprocess.run(
                ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True
            )
            numbers = [int(line) for line in found.stdout.split() if int(line) != self._holder.pid]
            if not numbers:
                return
            for number in numbers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.1)
        raise AssertionError(f"{self.name}: {numbers} do not end")

    def cut(self) -> None:
        """Take it off the network, as a power cut does: nobody is told."""
        self.run("ip", "link", "set", "eth0", "down")

    def mend(self) -> None:
        self.run("ip", "link", "set", "eth0", "up")

    def remove(self) -> None:
        self.end_all()
        self._holder.kill()
        self._holder.wait()
        call("ip", "netns", "del", self.name)


class Cluster:
    """Ray on two hosts with one core each, and SeaweedFS on the first; only the first has our files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "OMP_NUM_THREADS": "1",
        }
        mark = secrets.token_hex(3)
        sessions = Path("/tmp/ray")
        sessions.mkdir(exist_ok=True)
        self.first = Host(f"retort-{mark}-1", [sessions], self.environment)
        # the second has no folder of the test's, and not even the code: that comes with the job
        self.second = Host(f"retort-{mark}-2", [Path("/tmp"), REPO_ROOT / "components"], self.environment)
        try:
            self._connect(mark)
        except BaseException:
            self.remove()
            raise

    def _connect(self, mark: str) -> None:
        ends = [f"rt{mark}a", f"rt{mark}b"]
        call("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, end, address in zip((self.first, self.second), ends, (FIRST, SECOND), strict=True):
            call("ip", "link", "set", end, "netns", host.name, "name", "eth0")
            host.run("ip", "addr", "add", f"{address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        self._store()
        self.join(
            self.first, "--head", f"--port={PORT}", f"--node-ip-address={FIRST}", "--include-dashboard=false"
        )
        self.join_second()

    def _store(self) -> None:
        folder = self.folder / "store"
        folder.mkdir()
        keys = {"accessKey": KEY, "secretKey": SECRET}
        identity = {"name": "tests", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        weed = os.fspath(Path(sys.executable).with_name("weed"))
        options = [
            f"-dir={folder}",
            "-s3",
            f"-s3.port={S3_PORT}",
            f"-s3.config={folder / 's3.json'}",
            "-s3.iam=false",
        ]
        options += [f"-ip={FIRST}", "-ip.bind=0.0.0.0", "-master.volumeSizeLimitMB=64", "-volume.max=0"]
        log = (folder / "log").open("wb")
        self.first.start(weed, "server", *options, stdout=log, stderr=log)
        self.python(
            f"""
            import boto3, time
            client = boto3.client("s3", endpoint_url="{URL}")
            for attempt in range(200):
                try:
                    client.create_bucket(Bucket="photos")
                    client.put_object(Bucket="photos", Key="ready", Body=b"x")
                    break
                except Exception:
                    time.sleep(0.2)
            else:
                raise SystemExit("the store did not come up")
            """
        )

    def python(self, code: str) -> str:
        """Run Python on the first host."""
        return self.first.run(sys.executable, "-c", textwrap.dedent(code))

    def join(self, host: Host, *options: str) -> None:
        ray = os.fspath(Path(sys.executable).with_name("ray"))
        command = [ray, "start", "--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
        host.run(*command, *options)

    def join_second(self) -> None:
        self.join(self.second, f"--address={FIRST}:{PORT}", f"--node-ip-address={SECOND}")

    def remove(self) -> None:
        for host in (self.second, self.first):
            host.remove()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("hosts"))
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture
def in_store(
    cluster: Cluster, data: SimpleNamespace, params: DistillParams, monkeypatch: pytest.MonkeyPatch
) -> DistillParams:
    """The project with its images in the store only, eight epochs, and the place that both hosts reach."""
    cluster.python(
        f"""
        import boto3
        from pathlib import Path
        client = boto3.client("s3", endpoint_url="{URL}")
        root = Path({data.root!r})
        for file in root.rglob("*.png"):
            client.upload_file(str(file), "photos", "digits/" + file.relative_to(root).as_posix())
        """
    )
    shutil.copy(data.manifest, "data/local.parquet")
    table = manifest.read(data.manifest)
    paths = pa.array([f"s3://photos/digits/{path}" for path in table["path"].to_pylist()])
    table = table.set_column(table.column_names.index("path"), "path", paths)
    manifest.write(table, data.manifest)
    values = params.model_dump(by_alias=True)
    values["teacher"]["train"]["epochs"] = 8
    values["data"]["s3"] = {"endpoint_url": URL, "region": "us-east-1"}
    values["ray"] |= {"address": "auto", "storage": f"s3://photos/training-{secrets.token_hex(3)}"}
    return DistillParams.model_validate(values)


FINETUNE = """
made = Path("data/clean.parquet"), Path("outputs/audit/plan.json"), Path("outputs/weights")
finetune(FinetuneParams.model_validate(values), manifest=made[0], plan=made[1], weights=made[2], out=out)
"""
DISTILL = """
made = {"manifest": Path("data/clean.parquet"), "plan": Path("outputs/audit/plan.json")}
made["weights"] = Path("outputs/weights")
made["teacher"], gate = Path("outputs/teacher"), Path("outputs/check")
params = DistillParams.model_validate(values)
shard(ShardParams.model_validate({"data": values["data"], "ray": values["ray"]}), manifest=made["manifest"])
check(CheckParams.model_validate(values), **made, out=gate)
distill(params, **made, check=gate, out=out)
"""

KUBERAY = """
from components.training.kuberay import Work, run
from tests.components.training.kuberay.cluster import Cluster
from tests.components.training.kuberay.pods import POD, connect

# the entry point sees none of the driver's files: it has the code, as an image has, and the store
hidden, home = os.getcwd(), os.environ["HOME"]
kubernetes = Cluster(Path(hidden))
script = f"mount --make-rprivate /; mount -t tmpfs tmpfs {hidden}; cd {home}; exec \\"$@\\""
kubernetes.command = ["unshare", "-m", "sh", "-ec", script, "entry"]
kubernetes.add_pod(POD)
os.environ["KFP_POD_NAME"] = POD
run(
    Work(
        "finetune", "components.training.finetune:finetune", "components.training.params:FinetuneParams",
        FinetuneParams.model_validate(values),
        {"manifest": Path("data/clean.parquet"), "plan": Path("outputs/audit/plan.json"),
         "weights": Path("outputs/weights"), "out": out},
    ),
    api=connect(kubernetes.url),
)
"""


class Command:
    """A step on the first host, as the command line runs it."""

    def __init__(
        self,
        cluster: Cluster,
        params: DistillParams,
        out: str,
        work: str = FINETUNE,
    ) -> None:
        Path("params.json").write_text(params.model_dump_json(by_alias=True))
        code = textwrap.dedent(
            f"""
            import json, os
            from pathlib import Path
            os.chdir({os.fspath(Path.cwd())!r})
            from components.common import signals
            from components.common.errors import Terminated
            from components.dataset import s3
            from components.training.check import check
            from components.training.distill import distill
            from components.training.finetune import finetune
            from components.training.inputs.shards import shard
            from components.training.params import CheckParams, DistillParams, FinetuneParams, ShardParams

            signals.catch()
            values, out = json.loads(Path("params.json").read_text()), Path({out!r})
            s3.remember_store("photos", DistillParams.model_validate(values).data.s3)  # as ingest does
            try:
            """
        )
        code += textwrap.indent(work, "    ")
        code += "except Terminated as error:\n    raise SystemExit(error.status)\n"
        self.process = cluster.first.start(
            "env", f"PYTHONPATH={REPO_ROOT}", sys.executable, "-c", code, stderr=subprocess.PIPE
        )
        self.lines: list[str] = []

    def until(self, text: str) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if text in line:
                return
        raise AssertionError(f"{text!r} never came:\n{''.join(self.lines)}")

    def finish(self) -> str:
        assert self.process.stderr is not None
        self.lines += self.process.stderr.readlines()
        said = "".join(self.lines)
        assert self.process.wait() == 0, said
        return said


def checkpoint_reported(cluster: Cluster, params: DistillParams) -> None:
    """Wait until the second epoch's checkpoint is in the store."""
    prefix = params.ray.storage.removeprefix("s3://photos/")
    cluster.python(
        f"""
        import boto3, time
        client = boto3.client("s3", endpoint_url="{URL}")
        seen = set()
        for _ in range(300):
            found = client.list_objects_v2(Bucket="photos", Prefix="{prefix}/checkpoints/")
            seen |= {{entry["Key"] for entry in found.get("Contents", []) if "/checkpoint_" in entry["Key"]
                     and entry["Key"].endswith("state.pt")}}
            if len(seen) > 1:
                break
            time.sleep(0.2)
        else:
            raise SystemExit("no checkpoint came")
        """
    )


def longer(params: DistillParams, **ray: object) -> DistillParams:
    """With so many epochs that a node can be lost in the midst of them."""
    values = params.model_dump(by_alias=True)
    values["teacher"]["train"]["epochs"] = 40
    values["ray"] |= ray
    return DistillParams.model_validate(values)


def top1(out: str) -> float:
    return json.loads(Path(out, "metrics.json").read_text())["val"]["top1"]


def test_two_hosts_train_as_two_processes_do(
    cluster: Cluster, data: SimpleNamespace, in_store: DistillParams, params: DistillParams
) -> None:
    said = Command(cluster, in_store, "out").finish()
    assert "2 nodes answered: " in said
    assert FIRST in said
    assert SECOND in said

    values = params.model_dump(by_alias=True)
    values["teacher"] = in_store.model_dump(by_alias=True)["teacher"]
    finetune(FinetuneParams.model_validate(values), manifest=Path("data/local.parquet"), plan=data.plan,
             weights=data.weights, out=Path("local"))  # fmt: skip
    assert sha256_file(Path("out/model.safetensors")) == sha256_file(Path("local/model.safetensors"))
    left = cluster.python(
        f"""
        import boto3
        client = boto3.client("s3", endpoint_url="{URL}")
        prefix = "{in_store.ray.storage.removeprefix("s3://photos/")}/checkpoints/"
        print([entry["Key"] for entry in
               client.list_objects_v2(Bucket="photos", Prefix=prefix).get("Contents", [])])
        """
    )
    assert "checkpoint_" not in left, "a finished step keeps none"


def test_distillation_of_images_that_only_the_driver_has(
    cluster: Cluster, data: SimpleNamespace, params: DistillParams
) -> None:
    """Images go there as shards; what the teacher says of them is given from node to node."""
    values = params.model_dump(by_alias=True)
    values["data"]["s3"] = {"endpoint_url": URL, "region": "us-east-1"}
    storage = f"s3://photos/distilled-{secrets.token_hex(3)}"
    values["ray"] |= {"address": "auto", "storage": storage}
    said = Command(cluster, DistillParams.model_validate(values), "two", DISTILL).finish()
    assert "2 nodes answered: " in said

    check(CheckParams.model_validate(params.model_dump(by_alias=True)), manifest=data.manifest,
          plan=data.plan, teacher=data.teacher, weights=data.weights, out=Path("outputs/check"))  # fmt: skip
    distill(params, manifest=data.manifest, plan=data.plan, teacher=data.teacher, weights=data.weights,
            check=Path("outputs/check"), out=Path("one"))  # fmt: skip
    assert sha256_file(Path("two/model.safetensors")) == sha256_file(Path("one/model.safetensors"))


def test_a_lost_node_is_waited_for_and_the_weights_are_the_same(
    cluster: Cluster, data: SimpleNamespace, in_store: DistillParams
) -> None:
    params = longer(in_store)
    Command(cluster, params, "whole").finish()
    command = Command(cluster, params, "out")
    checkpoint_reported(cluster, params)
    cluster.second.cut()
    cluster.second.end_all()
    command.until("is lost")
    cluster.second.mend()
    cluster.join_second()
    said = command.finish()
    assert f"node {os.uname().nodename} ({SECOND}) is lost" in said
    assert "training waits until others join" in said
    assert f"({SECOND}) has joined" in said
    assert "a worker was lost; going on from its last checkpoint" in said
    assert sha256_file(Path("out/model.safetensors")) == sha256_file(Path("whole/model.safetensors"))


def test_where_fewer_workers_will_do_a_lost_node_is_not_waited_for(
    cluster: Cluster, data: SimpleNamespace, in_store: DistillParams
) -> None:
    params = longer(in_store, min_workers=1)
    command = Command(cluster, params, "out")
    checkpoint_reported(cluster, params)
    cluster.second.end_all()
    try:
        said = command.finish()
    finally:
        cluster.join_second()
    assert "a worker was lost; going on from its last checkpoint" in said
    assert "waits" not in said
    assert top1("out") > 0.9


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_lost_driver_goes_on_where_it_was(
    cluster: Cluster, data: SimpleNamespace, in_store: DistillParams, stop: signal.Signals
) -> None:
    params = longer(in_store)
    command = Command(cluster, params, "out")
    checkpoint_reported(cluster, params)
    (driver,) = psutil.Process(command.process.pid).children() or [psutil.Process(command.process.pid)]
    driver.send_signal(stop)
    assert command.process.wait(60) == (143 if stop == signal.SIGTERM else -stop)
    said = Command(cluster, params, "out").finish()
    assert "an earlier run was interrupted; going on" in said
    whole = Command(cluster, longer(in_store, storage=f"{in_store.ray.storage}-whole"), "whole")
    whole.finish()
    assert sha256_file(Path("out/model.safetensors")) == sha256_file(Path("whole/model.safetensors"))


def test_a_thin_client_trains_in_the_cluster(
    cluster: Cluster, data: SimpleNamespace, in_store: DistillParams
) -> None:
    values = in_store.model_dump(by_alias=True)
    values["ray"]["address"] = f"ray://{FIRST}:10001"
    said = Command(cluster, DistillParams.model_validate(values), "out").finish()
    assert "2 nodes answered: " in said
    assert top1("out") > 0.9


def test_what_the_cluster_does_not_have_is_said_at_once(
    cluster: Cluster, data: SimpleNamespace, in_store: DistillParams
) -> None:
    command = Command(cluster, longer(in_store, workers=3), "out")
    assert command.process.stderr is not None
    said = command.process.stderr.read()
    assert command.process.wait() == 1
    assert "3 workers x 1 cores = 3, and the cluster has 2: Ray would wait for ever" in said


def test_a_rayjobs_entry_point_trains_on_both_and_its_network_comes_back(
    cluster: Cluster, data: SimpleNamespace, params: DistillParams, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Images that only the driver has; the Kubernetes API is a stand-in, the entry point and Ray are real."""
    values = params.model_dump(by_alias=True)
    values["data"]["s3"] = {"endpoint_url": URL, "region": "us-east-1"}
    storage = f"s3://photos/kuberay-{secrets.token_hex(3)}"
    values["ray"] |= {"address": "kuberay", "storage": storage}
    home = tmp_path_factory.mktemp("home")
    cluster.first._environment["HOME"] = os.fspath(home)
    try:
        said = Command(cluster, DistillParams.model_validate(values), "away", KUBERAY).finish()
    finally:
        del cluster.first._environment["HOME"]
    assert "2 nodes answered: " in said
    assert "finetune: done in" in said
    assert (home / "retort").is_dir(), "the entry point worked in a folder of its own"
    assert json.loads(Path("away/report.json").read_text())["passed"]

    finetune(FinetuneParams.model_validate(params.model_dump(by_alias=True)), manifest=data.manifest,
             plan=data.plan, weights=data.weights, out=Path("local"))  # fmt: skip
    assert sha256_file(Path("away/model.safetensors")) == sha256_file(Path("local/model.safetensors"))

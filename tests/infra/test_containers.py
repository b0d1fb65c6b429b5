"""The images that ``make images`` made, as the most careful cluster would run them: one by one, and the DAG.

Skipped where no engine answers, or where the images are of another commit.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from components.common.storage import sha256_file
from pipelines.kubeflow import dag
from pipelines.params import Params, load
from pipelines.steps import MAIN
from tests.components.conftest import free_port
from tests.conftest import Checkout
from tests.infra.servers import Servers, running

REPO_ROOT = Path(__file__).resolve().parents[2]
IMAGES = {"data": "retort-data:latest", "train": "retort:latest"}
BUILT = ("requirements.lock", "pyproject.toml", "components", "pipelines", "infra/images")
USER = 1_000_740_000  # a number as OpenShift gives, to which no image has a name
GB = 1_000_000_000
# as small as tests/test_main_job.py, and every step does its work
SMALLER = [
    "global.image_size=32", "teacher.train.epochs=3", "student.train.epochs=3", "distill.control=false",
    "distill.min_teacher_accuracy=0.5", "export.min_accuracy=0.3", "benchmark.time_budget_s=6.0",
    "benchmark.threads=[1]", "benchmark.batch_sizes=[1]",
]  # fmt: skip


def docker(*words: str, timeout: float = 120, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["docker", *words], capture_output=True, text=True, check=False, timeout=timeout, **more
    )


@functools.cache
def missing(image: str) -> str:
    """Why an image cannot be run here."""
    if shutil.which("docker") is None or docker("info").returncode != 0:
        return "no Docker engine answers (DOCKER_HOST)"
    found = docker("image", "inspect", "--format", "{{json .Config.Labels}}", image)
    if found.returncode != 0:
        return f"there is no image {image} (make images)"
    built = (json.loads(found.stdout) or {}).get("org.opencontainers.image.revision", "")
    same = ["git", "diff", "--quiet", built or "none", "--", *BUILT]
    if subprocess.run(same, cwd=REPO_ROOT, capture_output=True, check=False).returncode != 0:
        return f"{image} is of another commit (make images)"
    return ""


def need(*targets: str) -> None:
    """Skip the test where one of these images cannot be run."""
    for target in targets:
        if reason := missing(IMAGES[target]):
            pytest.skip(reason)


@pytest.fixture(params=IMAGES)
def target(request: pytest.FixtureRequest) -> str:
    need(request.param)
    return request.param


def inspect(image: str) -> dict[str, Any]:
    return json.loads(docker("image", "inspect", image).stdout)[0]


# a user without a name, no privilege, nothing of the image can be written; two volumes, as pods have them
LOCKED = [
    "--rm", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--user", f"{USER}:0",
    "--tmpfs", "/tmp:mode=1777,exec", "--tmpfs", "/work:mode=1777,exec", "--network", "none",
]  # fmt: skip


def locked(target: str, *words: str, timeout: float = 300) -> str:
    done = docker("run", *LOCKED, IMAGES[target], *words, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_an_image_says_what_it_is(target: str) -> None:
    settings = inspect(IMAGES[target])["Config"]
    labels = {
        name.removeprefix("org.opencontainers.image."): text for name, text in settings["Labels"].items()
    }
    assert re.fullmatch(r"[0-9a-f]{40}", labels["revision"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", labels["version"])
    assert {"title", "description", "created", "licenses", "base.name"} <= set(labels)
    assert settings["User"] == "10001:0"
    assert settings["Healthcheck"]["Test"][0] == "CMD"
    assert f"RETORT_COMMIT={labels['revision']}" in settings["Env"]


def test_the_data_image_is_small() -> None:
    need("data")
    size = inspect(IMAGES["data"])["Size"]
    print(f"{size / GB:.2f} GB")
    assert size < 1.5 * GB


def test_what_is_in_an_image_is_written_in_it(target: str) -> None:
    bill = json.loads(locked(target, "cat", "/opt/retort/sbom.cdx.json"))
    assert bill["bomFormat"] == "CycloneDX"
    listed = {item["name"].lower().replace("_", "-"): item["version"] for item in bill["components"]}
    lock = (REPO_ROOT / "requirements.lock").read_text(encoding="utf-8")
    versions = dict(re.findall(r"(?m)^([a-z0-9][a-z0-9-]*)==([^ ;]+)", lock))
    assert len(listed) > 50
    assert not {name: at for name, at in listed.items() if name in versions and versions[name] != at}
    assert ("torch" in listed) == (target == "train")
    assert not {"pip", "dvc", "pytest", "cyclonedx-bom"} & set(listed)


def test_a_user_without_a_name_works_in_a_read_only_image(target: str) -> None:
    assert "ingest" in locked(target, "retort", "--help")
    steps = "retort ingest && retort validate && retort audit imbalance"
    said = locked(target, "sh", "-c", f"id -u; id -g; touch params.yaml; ({steps}) >/dev/null; ls data")
    assert said.split()[:2] == [str(USER), "0"]
    assert {"manifest.parquet", "clean.parquet"} <= set(said.split())


def test_a_read_only_image_without_volumes_says_what_is_missing(target: str) -> None:
    fixed = [word for word in LOCKED if word != "--tmpfs" and not word.startswith(("/tmp:", "/work:"))]
    words = ["--volume", "/dev/null:/work/params.yaml:ro", IMAGES[target], "retort", "ingest"]
    done = docker("run", *fixed, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert ".retort: read-only file system" in done.stderr
    assert "docker run --tmpfs /work --tmpfs /tmp" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_health_check_passes_and_sees_a_full_disk(target: str) -> None:
    locked(target, "healthy")
    full = ["--tmpfs", "/work:mode=1777,size=8k"]
    options = [word for word in LOCKED if word != "/work:mode=1777,exec"]
    at = max(number for number, word in enumerate(options) if word == "--tmpfs")
    done = docker("run", *options[:at], *full, *options[at + 1 :], IMAGES[target], "healthy")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "/work" in done.stderr


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    need(*IMAGES)
    with running("local", free_port) as found:
        found.set_up()
        yield found


def images_in_the_store(servers: Servers) -> str:
    """Written digits as a person's own images: a folder a class in the bucket ``data``."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    client = servers.store("dvc")
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        content = io.BytesIO()
        grey = Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        grey.convert("RGB").save(content, "PNG")
        client.put_object(Bucket="data", Key=f"digits/{label}/{number:04}.png", Body=content.getvalue())
    return "s3://data/digits"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_dag_in_its_images(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through KFP's DockerRunner, locked in; the student is that of ``dvc repro`` in the same image."""
    from kfp import local

    changes = [
        *SMALLER,
        f"data.source={images_in_the_store(servers)}",
        f"data.s3.endpoint_url=http://127.0.0.1:{servers.ports['retort-store:8333']}",
        f"registry.tracking_uri={servers.tracker}",
        f"kubeflow.image={IMAGES['train']}",
        f"kubeflow.light_image={IMAGES['data']}",
        # what MLflow did not take in a step's ten seconds, on a busy machine, a later step sends
        "kubeflow.state=s3://pipeline/retort",
    ]
    params = load(REPO_ROOT / "params.yaml", changes)
    keys = servers.secrets["retort-store-pipeline"]
    login = servers.login()
    variables = {
        "RETORT_SETTINGS": dag.settings(params),
        "RETORT_RUN": "in-images",
        "RETORT_S3_ACCESS_KEY_ID": keys["AWS_ACCESS_KEY_ID"],
        "RETORT_S3_SECRET_ACCESS_KEY": keys["AWS_SECRET_ACCESS_KEY"],
        "RETORT_MLFLOW_USERNAME": login["MLFLOW_TRACKING_USERNAME"],
        "RETORT_MLFLOW_PASSWORD": login["MLFLOW_TRACKING_PASSWORD"],
        "OMP_NUM_THREADS": "1",
    }
    root = Path(tempfile.mkdtemp(prefix="retort-dag-"))
    root.chmod(0o2770)  # of group 0, to which the pods' user belongs
    monkeypatch.chdir(tmp_path)
    runner = local.DockerRunner(
        network_mode="host",
        user=f"{USER}:0",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        tmpfs={"/tmp": "mode=1777,exec", "/work": "mode=1777,exec"},
        shm_size="1g",
        environment=variables,
    )
    try:
        local.init(runner, pipeline_root=os.fspath(root))
        dag.build(params)(**dag.arguments(params))
        stage, _, output = MAIN.result.partition(".")
        (student,) = root.glob(f"*/{stage}/{output}/model.safetensors")
        recorded(servers, params)
        assert sha256_file(student) == in_dvc(params, variables | keys | login, tmp_path / "dvc")
    finally:
        shutil.rmtree(root, ignore_errors=True)


def in_dvc(params: Params, variables: dict[str, str], folder: Path) -> str:
    """The student's sha256 by ``dvc repro`` in the image; DVC itself, which it lacks, is this machine's."""
    folder.mkdir()
    project = Checkout(folder).folder
    (project / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json", by_alias=True)))
    subprocess.run([sys.executable, "-m", "dvc", "config", "core.no_scm", "true"], cwd=project, check=True)
    for path in [project, *project.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o070)
    packages = sysconfig.get_paths()["purelib"]
    repro = "import sys; sys.path.append('/dvc'); from dvc.cli import main; sys.exit(main(['repro']))"
    options = [word for word in LOCKED if word not in ("--network", "none")]
    options += ["--network", "host", "--shm-size", "1g", "--workdir", "/project"]
    options += ["--volume", f"{project}:/project", "--volume", f"{packages}:/dvc:ro"]
    # DVC's own place for what all its repositories share is in the image, which is read-only
    for name, value in (variables | {"RETORT_RUN": "in-dvc", "DVC_SITE_CACHE_DIR": "/tmp/dvc"}).items():
        options += ["--env", f"{name}={value}"]
    done = docker("run", *options, IMAGES["train"], "python3", "-c", repro, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return sha256_file(project / "outputs/student/model.safetensors")


def recorded(servers: Servers, params: Params) -> None:
    """MLflow, on PostgreSQL, has every step's run of the DAG, and the registered version."""
    from mlflow import MlflowClient

    with pytest.MonkeyPatch.context() as patch:
        for name, value in servers.login().items():
            patch.setenv(name, value)
        client = MlflowClient(tracking_uri=servers.tracker, registry_uri=servers.tracker)
        experiment = client.get_experiment_by_name(params.registry.name)
        runs = client.search_runs([experiment.experiment_id])
        parent, *children = sorted(runs, key=lambda run: "mlflow.parentRunId" in run.data.tags)
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
        assert {run.info.run_name for run in children} == {stage.name for stage in MAIN.stages}
        assert parent.info.status == "FINISHED", parent.data.tags
        assert client.search_model_versions(f"name='{params.registry.name}'")

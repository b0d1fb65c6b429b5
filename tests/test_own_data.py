"""Own data of many kinds, through the whole pipeline at the smallest size.

Each kind ends with the right names on the right outputs (pictures that were in no split are recognised), or
with the one finding that says why not.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import onnxruntime
import pytest

from components.common import object_store
from components.models.card import read_card
from components.step import StepContext
from components.training import budget, driver, preflight
from components.training import cluster as cluster_of_ray
from components.training.params import Ray
from components.training.spec import TrainSpec
from components.training.state import TrainResult
from tests.components.conftest import Store, free_port, no_other_keys, store
from tests.components.training import local
from tests.own_data import page
from tests.own_data.kinds import KINDS, STOPPED, Data
from tests.own_data.pictures import UNSEEN, encoded, picture, put
from tests.own_data.project import SMALLEST, STEPS, Project, merged
from tests.own_data.published import large_scale_weights

__all__ = ["store"]  # a fixture

pytestmark = pytest.mark.large  # whole pipelines, minutes each

TOKEN = "only-for-the-cluster-of-these-tests-0"
# what the ordinary suite runs to the end; of the others it takes the first two steps
QUICK = {"lists with paddle labels", "mixed formats", "unlabelled beside"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray cluster for all kinds, found by ``ray.address: auto``: its start is most of a step's time.

    Its node has the keys of the store of these tests, as each node needs them where images lie in a bucket.
    """
    from ray._private.authentication_test_utils import reset_auth_token_state
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        no_other_keys(patch, tmp_path_factory.mktemp("keys"))
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.fspath(Path(__file__).resolve().parents[1]))
        reset_auth_token_state()  # what the environment says now
        one = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100_000_000}
        for attempt in range(5):
            try:
                started = Cluster(initialize_head=True, head_node_args=one)
                break
            except Exception:  # what Ray raises when a busy machine needs more than its 30 s
                if attempt == 4:
                    raise
        patch.setenv("RAY_ADDRESS", started.address)
        try:
            yield
        finally:
            started.shutdown()
    reset_auth_token_state()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``outputs/weights`` of the smallest setting, made once: no image decides about it."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        project = Project.made(folder / "mine", [], SMALLEST)
        assert project.steps("weights") == ("weights", 0)
    return folder / "mine/outputs/weights"


@pytest.fixture
def made(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Data, Project]:
    """The data of the kind that the test's parameter names, and a project for them at the smallest size."""
    monkeypatch.chdir(tmp_path)
    data = {**KINDS, **STOPPED}[request.param](tmp_path)
    changes = merged(SMALLEST, {**data.changes, "ray": {"address": "auto"}})
    if data.bucket:
        no_other_keys(monkeypatch, tmp_path)
        monkeypatch.setattr(object_store, "_clients", {})
        store: Store = request.getfixturevalue("store")
        for file in filter(Path.is_file, data.bucket.rglob("*")):
            store.put(file.relative_to(data.bucket).as_posix(), file.read_bytes())
        changes = merged(changes, {"data": {"s3": {"endpoint_url": store.url}}})
    given = [] if data.images is None else ["--images", os.fspath(data.images)]
    return data, Project.made(tmp_path / "mine", given, changes)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "made",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in KINDS],
    indirect=True,
)
def test_own_data(
    made: tuple[Data, Project], cluster: None, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, project = made
    shutil.copytree(weights, project.folder / "outputs/weights")
    ended = project.steps(*(step for step in STEPS if step != "weights"))
    assert ended == (STEPS[-1], 0), capsys.readouterr().err
    must_be_right(project, data)


@pytest.mark.parametrize("made", [name for name in KINDS if name not in QUICK], indirect=True)
def test_the_names_of_own_data(made: tuple[Data, Project], capsys: pytest.CaptureFixture[str]) -> None:
    """Which name belongs to which label is settled by the first two steps: in the ordinary suite, too."""
    data, project = made
    assert project.steps("ingest", "validate") == ("validate", 0), capsys.readouterr().err
    labels = {row["label"]: row["class_name"] for row in project.rows() if row["split"] != "unlabeled"}
    assert labels == {label: name for label, name in enumerate(data.names) if data.names[name]}
    must_have_said(project, data)


@pytest.mark.parametrize("made", STOPPED, indirect=True)
def test_own_data_that_cannot_be_trained_on(
    made: tuple[Data, Project], capsys: pytest.CaptureFixture[str]
) -> None:
    data, project = made
    assert data.stops
    step, rule, piece = data.stops
    ended = project.steps("ingest", "validate")
    said = capsys.readouterr().err
    assert ended == (step, 1), said
    errors = [] if rule is None else [one.rule for one in project.findings(step) if one.level == "error"]
    assert errors == ([] if rule is None else [rule])
    last = said[said.rindex("retort: ") :]
    assert piece in last
    assert len(last.splitlines()) <= 3
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("made", ["unicode and spaces", "lists from 1"], indirect=True)
def test_own_data_through_dvc(made: tuple[Data, Project], cluster: None) -> None:
    """As a person runs it; DVC sees no list a split, so its line goes, as the comment there says."""
    data, project = made
    project.edit({"export": {"preprocess_in_graph": True}})
    if data.images is None:
        stages = project.folder / "dvc.yaml"
        text = stages.read_text(encoding="utf-8")
        stages.write_text(text.replace("      - ${data.source}\n", ""), encoding="utf-8")
    done = subprocess.run(["dvc", "repro"], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    must_be_right(project, data)
    must_be_served(project, data)


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings run in this process: what is tested is what the steps hand to one another."""

    def train(run: StepContext, spec: TrainSpec, ray: Ray, folder: Path, *_: object) -> TrainResult:
        return local.run(spec).result

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(driver, "fit", train)
    monkeypatch.setattr(cluster_of_ray, "running", lambda *_: nullcontext())
    monkeypatch.setattr(preflight, "preflight", lambda *_: None)
    monkeypatch.setattr(budget, "expected", lambda *_: None)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("made", ["a folder"], indirect=True)
def test_a_finetune_at_a_higher_resolution(
    made: tuple[Data, Project], trained_here: None, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is exported, measured, registered and predicted with follows the student's card."""
    data, project = made
    project.edit(
        {
            "student": {"train": {"keep": "last"}},
            "distill": {"finetune_size": 96, "finetune_epochs": 2, "control": True},
        }
    )
    shutil.copytree(weights, project.folder / "outputs/weights")
    ended = project.steps(*(step for step in STEPS if step != "weights"))
    assert ended == (STEPS[-1], 0), capsys.readouterr().err
    must_be_right(project, data)
    outputs = project.folder / "outputs"
    sizes = {of: read_card(outputs / of / "model.json").input_size[1:] for of in ("teacher", "student")}
    assert sizes == {"teacher": [64, 64], "student": [96, 96]}
    session = onnxruntime.InferenceSession(outputs / "export/model.onnx")
    assert session.get_inputs()[0].shape[2:] == [96, 96]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("made", ["a folder"], indirect=True)
def test_start_weights_of_100_000_classes(
    made: tuple[Data, Project], trained_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tar of one file a variable, without FC, teaches a light student: the whole way."""
    data, project = made
    tar = large_scale_weights(project.folder, list(data.names.values()), range(18))
    teacher = {
        "arch": {"name": "resnet50d"}, "weights": str(tar), "lr": {"initial": 0.0005},
        "train": {"epochs": 4},
    }  # fmt: skip
    project.edit({"teacher": teacher})
    assert project.steps() == (STEPS[-1], 0), capsys.readouterr().err
    must_be_right(project, data)
    (start,) = read_card(project.folder / "outputs/teacher/model.json").lineage
    assert (Path(start.source).name, start.coverage) == (tar.name, 1.0)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **more}


def must_be_served(project: Project, data: Data) -> None:
    """By the command and the client that docs/own-data.md shows, but for the port and the model's name."""
    (command,) = [one for one in page.commands() if one.startswith("mlflow models serve")]
    port = str(free_port())
    words = shlex.split(command.removesuffix("&").replace("5001", port).replace("hands@", "mine@"))
    log = project.folder / "serve.log"
    with log.open("wb") as out:
        uri = "sqlite:///.retort/mlflow/mlflow.db"
        server = subprocess.Popen(
            words, env=environment(MLFLOW_TRACKING_URI=uri), stdout=out, stderr=out, start_new_session=True
        )
    try:
        await_answer(server, f"http://127.0.0.1:{port}/ping", log)
        code = page.python().replace("5001", port)
        for place in range(len(data.names)):
            image = project.folder / f"new/{place}_{UNSEEN}.png"
            said = subprocess.run(
                [sys.executable, "-c", code, image], capture_output=True, text=True, check=False
            )
            assert said.stdout.startswith(project.predicted(image)[image.name]), said.stderr
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def await_answer(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(1200):
        try:
            urllib.request.urlopen(url, timeout=2).close()
        except OSError:
            assert server.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"nothing answers at {url}: {log.read_text()[-2000:]}")


def must_be_right(project: Project, data: Data) -> None:
    assert project.labels() == list(data.names)
    must_have_said(project, data)
    new = project.folder / "new"
    seen = {name: subject for name, subject in data.names.items() if subject}
    for place, subject in enumerate(seen.values()):
        for number in range(UNSEEN, UNSEEN + 5):
            put(new / f"{place}_{number}.png", encoded(picture(subject, number)))
    said = project.predicted(new)
    for place, name in enumerate(seen):
        # a name that stands on another output is never said; one picture in five may be mistaken
        own = [said[f"{place}_{number}.png"] for number in range(UNSEEN, UNSEEN + 5)]
        assert own.count(name) >= 3, f"pictures of {name!r}: {own}"


def must_have_said(project: Project, data: Data) -> None:
    for step, rule in data.warns:
        if (project.folder / "outputs" / step).exists():
            assert rule in [one.rule for one in project.findings(step) if one.level == "warning"], step
    for step in data.silent:
        assert [one for one in project.findings(step) if one.level != "info"] == [], step

"""Registering against a real MLflow registry: what is in a version, who is champion, and who was."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest

from components.common.errors import FindingsError, RetortError
from components.common.findings import Report
from components.common.params import Registry
from components.common.storage import read_json, sha256_file, write_json
from components.export import exported as exports
from components.models.card import read_card
from components.registry.versions import Versions
from components.tools.promote import promote, rollback
from components.tracking.client import connect, tracking_uri

URI = "sqlite:///.retort/mlflow/mlflow.db"


def holder(alias: str) -> int:
    found = connect(tracking_uri(Registry(tracking_uri=URI))).get_model_version_by_alias("digits", alias)
    return int(found.version)


def aliases() -> set[str]:
    return set(connect(tracking_uri(Registry(tracking_uri=URI))).get_registered_model("digits").aliases)


@pytest.fixture
def loads_from(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Point MLflow's own functions at a store, as a person who deploys the model does."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, "")  # so that what MLflow sets there is taken back

    def point(uri: str) -> None:
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)

    yield point
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    mlflow.set_registry_uri("")


def test_mlflow_is_left_pointing_where_it_pointed(project: Any) -> None:
    """A later step, test or script of the same process must not find this project's store by accident."""
    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
    before = (mlflow.is_tracking_uri_set(), mlflow.get_registry_uri())
    project.register()
    assert (mlflow.is_tracking_uri_set(), mlflow.get_registry_uri()) == before
    assert "MLFLOW_REGISTRY_URI" not in os.environ


@pytest.mark.parametrize("where", ["file", "server"])
def test_a_registered_model_is_loaded_and_predicts_as_the_exported_file(
    where: str, project: Any, loads_from: Any, request: pytest.FixtureRequest
) -> None:
    uri = tracking_uri(Registry(tracking_uri=URI))
    if where == "server":
        uri = request.getfixturevalue("mlflow_server").uri
    registered = project.register(project.params(tracking_uri=uri))
    assert (registered["version"], registered["alias"]) == (1, "champion")
    assert registered["sha256"] == sha256_file(project.folder / "export/model.onnx")

    loads_from(uri)
    loaded = mlflow.pyfunc.load_model("models:/digits@champion")
    example = loaded.input_example
    file = exports.session(project.folder / "export/model.onnx")
    expected = exports.run(file, example["images"].astype(np.float32))
    np.testing.assert_array_equal(loaded.predict(example)["scores"], expected)
    assert mlflow.onnx.load_model("models:/digits/1").graph.name == "linear"

    info = loaded.metadata
    assert info.metadata["class_names"][3] == "digit 3"
    assert info.metadata["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert info.get_input_schema().input_names() == ["images"]
    assert info.run_id == registered["run_id"]
    folder = Path(mlflow.artifacts.download_artifacts("models:/digits/1"))
    assert sha256_file(folder / "model.onnx") == registered["sha256"], "the very file that was proved"
    assert {path.name for path in (folder / "extra_files").iterdir()} >= {
        "plan.json", "gate.json", "parity.json", "choice.json", "metrics.json", "inputs.json",
    }  # fmt: skip
    requirements = (folder / "requirements.txt").read_text().split()
    assert [line.split("==")[0] for line in requirements] == ["mlflow", "numpy", "onnx", "onnxruntime"]
    version = connect(uri).get_model_version("digits", "1")
    assert version.tags["data.fingerprint"] == registered["data_fingerprint"]
    outputs = connect(uri).get_run(registered["parent_run_id"]).outputs.model_outputs
    shown = [f"models:/{output.model_id}" for output in outputs]
    assert shown == [version.source], "the pipeline's run shows its model"


@pytest.mark.parametrize("file", ["benchmark/choice.json", "check/gate.json", "plan.json"])
def test_a_damaged_proof_is_no_part_of_a_version(project: Any, file: str) -> None:
    path = project.folder / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RetortError, match=rf"{path.name}: not valid JSON"):
        project.register()
    assert not (project.folder / "outputs/register/registered.json").exists()


def test_no_user_image_goes_along_where_none_may_be_shown(project: Any, loads_from: Any) -> None:
    params = project.params().model_copy(
        update={"report": project.params().report.model_copy(update={"thumbnails": False})}
    )
    project.register(params)
    loads_from(tracking_uri(Registry(tracking_uri=URI)))
    example = mlflow.pyfunc.load_model("models:/digits/1").input_example["images"]
    noise = np.random.default_rng(7).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    np.testing.assert_allclose(example, exports.normalise(noise, [0.5] * 3, [0.5] * 3), rtol=1e-6)


def test_the_same_model_twice_is_one_version(project: Any) -> None:
    first = project.register()
    again = project.register()
    assert again == first
    assert (
        "is version 1 of 'digits' already, its champion" in project.findings()["registry.known"][0]["message"]
    )
    # what was registered but not settled (the step was killed between the two) is settled now
    client = connect(tracking_uri(Registry(tracking_uri=URI)))
    client.delete_model_version_tag("digits", "1", "decided")
    client.delete_registered_model_alias("digits", "champion")
    assert project.register() == first
    assert holder("champion") == 1


def test_a_model_that_is_as_good_takes_over_and_can_be_rolled_back(project: Any) -> None:
    project.register()
    project.train(regularisation=0.5)
    second = project.register(project.params(tolerance=0.01))
    assert (second["version"], second["alias"], second["compared_with"]) == (2, "champion", 1)
    assert project.findings()["registry.better"][0]["level"] == "info"
    assert aliases() == {"champion"}

    record = rollback(project.params(), why="a test")
    said = {key: record[key] for key in ("number", "version", "replaced", "how", "why")}
    assert said == {"number": 3, "version": 1, "replaced": 2, "how": "rollback", "why": "a test"}
    assert holder("champion") == 1
    with pytest.raises(RetortError, match="nothing to go back to"):
        rollback(project.params())
    assert project.register()["alias"] == "", "what was rolled back is not promoted by registering it again"
    assert holder("champion") == 1


def test_an_equal_model_stays_challenger(project: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The very same answers from another file: a tie is not better."""
    first = project.register()
    assert first["reason"] == "it is the first: nothing to compare with"
    assert "register: digits v1, champion because it is the first: nothing" in capsys.readouterr().err
    project.train(scale=2.0)
    second = project.register()
    assert (second["alias"], second["champion"]) == ("challenger", 1)
    assert "not better: equal, top-1" in second["reason"]
    finding = project.findings()["registry.better"][0]
    assert finding["message"].startswith("the new version stays challenger, not better: equal")
    assert "register: digits v2, challenger (champion stays v1): not better: equal" in capsys.readouterr().err
    assert (holder("champion"), holder("challenger")) == (1, 2)
    assert project.register()["reason"] == second["reason"]
    promote(project.params(), 2)
    assert "promotion" in project.register()["reason"]


def test_a_model_that_loses_a_class_stays_challenger(project: Any) -> None:
    project.register()
    project.train(blind_to=4)
    params = project.params(tolerance=0.5)  # even where top-1 may drop, no class may be lost
    challenger = project.register(params)
    assert (challenger["alias"], challenger["compared_with"]) == ("challenger", 1)
    assert (holder("champion"), holder("challenger")) == (1, 2)
    finding = project.findings()["registry.class"][0]
    assert (finding["level"], finding["subject"], finding["measured"]) == ("warning", "class 'digit 4'", 0.0)
    page = (project.folder / "outputs/register/report.html").read_text()
    assert "stays challenger" in page

    promote(project.params(), 2)  # a person knows better
    assert holder("champion") == 2
    assert aliases() == {"champion"}
    rollback(project.params())
    assert holder("champion") == 1
    with pytest.raises(RetortError, match="version 9: 'digits' has no such version"):
        promote(project.params(), 9)


def test_on_new_data_the_champion_is_measured_again(project: Any) -> None:
    project.register()
    project.write_data(1200)
    project.train(regularisation=0.9, blind_to=0)
    assert project.register()["alias"] == "challenger"
    assert project.findings()["registry.data"][0]["level"] == "info"
    page = (project.folder / "outputs/register/report.html").read_text()
    # 1,200 digits have 400 validation images; the champion's recall is its own file's on those
    images, labels = project._pixels("val")
    assert "400" in page
    model = connect(tracking_uri(Registry(tracking_uri=URI))).get_model_version_download_uri("digits", "1")
    said = exports.run(exports.session(Path(model.removeprefix("file://")) / "model.onnx"), images)
    recall = (said.argmax(axis=1)[labels == 0] == 0).mean()
    assert project.findings()["registry.class"][0]["limit"] == pytest.approx(recall - 0.05)


def test_files_that_do_not_belong_together_are_refused(project: Any) -> None:
    (project.folder / "student/model.safetensors").write_bytes(b"another checkpoint")
    Report(step="check", passed=False).write(project.folder / "check/report.json")
    with pytest.raises(FindingsError, match=r"registry\.proofs"):
        project.register()
    subjects = [finding["subject"] for finding in project.findings()["registry.proofs"]]
    assert subjects == ["model.onnx", "check/report.json"]
    assert not (project.folder / "outputs/register/registered.json").exists()


@pytest.mark.parametrize("by_hand", [True, False])
def test_class_names_that_are_not_the_datas_are_not_registered(by_hand: bool, project: Any) -> None:
    path = project.folder / "student/model.json"
    names = [f"digit {label}" for label in reversed(range(10))]
    if by_hand:
        write_json(path, {**read_json(path), "class_names": names})
    else:
        read_card(path).model_copy(update={"class_names": names}).write(path)
    with pytest.raises(FindingsError, match=r"model\.class_names: .*calls label 0 'digit 9', the data call"):
        project.register()
    assert "restore them, or train again" in project.findings()["model.class_names"][0]["advice"]
    assert not (project.folder / "outputs/register/registered.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_names": "reversed"}, "class names than the student's model.json ('digit 9', not 'digit 0'"),
        ({"mean": [0.1, 0.5, 0.5]}, "mean than the student's model.json ('0.1', not '0.5', at place 0)"),
        ({"input_size": [3, 8, 8]}, "image size than the student's model.json (8, not 16)"),
    ],
)
def test_an_exported_file_that_says_otherwise_than_the_card_is_refused(
    change: dict[str, Any], said: str, project: Any
) -> None:
    """The card was right again after a wrong export."""
    import onnx

    card = read_card(project.folder / "student/model.json")
    if change.get("class_names"):
        change = {"class_names": card.class_names[::-1]}
    path = project.folder / "export/model.onnx"
    model = onnx.load(path)
    onnx.helper.set_model_props(model, exports.metadata(card.model_copy(update=change), in_graph=False))
    onnx.save(model, path)
    write_json(path.with_name("parity.json"), {"files": {"model.onnx": {"sha256": sha256_file(path)}}})
    with pytest.raises(FindingsError, match=r"registry\.proofs"):
        project.register()
    assert said in project.findings()["registry.proofs"][0]["message"]


def test_without_the_tracker_there_is_no_registration(project: Any) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        params = project.params(tracking_uri=f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(RetortError, match="run 'retort register' again"):
            project.register(params)
        with pytest.raises(RetortError, match="run 'retort rollback' again"):
            rollback(params)
    report = read_json(project.folder / "outputs/register/report.json")
    assert report["passed"] is False


def test_a_missing_proof_fails_the_step_and_leaves_nothing_of_the_run_before(project: Any) -> None:
    project.register()
    (project.folder / "plan.json").unlink()
    with pytest.raises(RetortError, match=r"plan\.json: no such file; run 'retort plan' first"):
        project.register()
    out = project.folder / "outputs/register"
    assert not read_json(out / "report.json")["passed"]
    assert not (out / "registered.json").exists()


def test_what_both_said_of_each_image_is_kept_and_shown(project: Any) -> None:
    project.register()
    project.train(blind_to=4)
    project.register()
    out = project.folder / "outputs/register"
    table = pq.read_table(out / "outcomes.parquet")
    assert table.num_rows == 300
    assert set(table["frozen"].to_pylist()) == {True}, "the very images that the champion was judged by"
    lost = [row for row in table.to_pylist() if row["champion_right"] and not row["challenger_right"]]
    assert {row["class_name"] for row in lost} == {"digit 4"}
    assert read_json(out / "decision.json")["slices"][0]["worse"]
    page = (out / "report.html").read_text()
    assert "Images that got worse" in page
    assert page.count("data:image/png") == min(len(lost), 24)
    hidden = project.params()
    hidden = hidden.model_copy(update={"report": hidden.report.model_copy(update={"thumbnails": False})})
    project.train(blind_to=5)
    project.register(hidden)
    page = (out / "report.html").read_text()
    assert "Images that got worse" in page
    assert "data:image" not in page


def test_suspect_labels_among_new_images_judge_nobody(project: Any) -> None:
    project.register()
    project.write_data(1200)
    rows = exports.rows(project.folder / "clean.parquet", "val")
    project.suspect(rows.paths[:250:50] + rows.paths[-40:])
    project.train(regularisation=0.9)
    project.register()
    message = project.findings()["registry.data"][0]["message"]
    assert "300 images of the champion's validation split and 60 new ones" in message
    assert "40 new ones with suspect labels are left out" in message


def test_a_champion_that_cannot_be_compared_with_stays(project: Any) -> None:
    """Of other classes; and one whose version carries no data."""
    project.register()
    client = connect(tracking_uri(Registry(tracking_uri=URI)))
    folder = Path(client.get_model_version_download_uri("digits", "1").removeprefix("file://"))
    (folder / "extra_files/manifest.parquet").unlink()
    project.train(regularisation=0.5)
    assert project.register()["compared_with"] == 1
    finding = project.findings()["registry.data"][0]
    assert finding["level"] == "warning"
    assert "does not say which images it was judged by" in finding["message"]

    import onnx

    model = onnx.load(folder / "model.onnx")
    card = read_card(project.folder / "student/model.json")
    other = card.model_copy(update={"class_names": [f"letter {label}" for label in range(10)]})
    onnx.helper.set_model_props(model, exports.metadata(other, in_graph=False))
    onnx.save(model, folder / "model.onnx")
    project.train(regularisation=0.4)
    third = project.register()
    assert third["alias"] == "challenger"
    assert third["reason"].startswith("not comparable")


def test_a_champion_that_is_deleted_under_us_is_none(project: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    project.register()
    client = connect(tracking_uri(Registry(tracking_uri=URI)))
    download = Versions.download

    def deleted(self: Versions, version: Any, path: str, folder: Path) -> Path | None:
        if int(version.version) != 1:
            return download(self, version, path, folder)
        if self.there(1):
            client.delete_model_version("digits", "1")
        return None

    monkeypatch.setattr(Versions, "download", deleted)
    project.train(regularisation=0.5)
    second = project.register()
    assert (second["alias"], second["champion"], second["compared_with"]) == ("champion", 2, None)
    assert "registry.better" not in project.findings()

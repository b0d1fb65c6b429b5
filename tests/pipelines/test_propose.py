"""The rules of ``retort init``'s proposal, by table; and what it sees of images and of the machine."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from moto import mock_aws
from PIL import Image

from components.common import object_store
from components.common.errors import RetortError
from components.dataset.params import Data
from components.training.estimate import Speed
from components.training.gate.rate import limit
from components.training.params import CheckParams
from pipelines import cli
from pipelines.facts import DataFacts, MachineFacts, look, machine
from pipelines.init import OWN_DATA
from pipelines.params import Params, load
from pipelines.propose import Proposal, Speeds, guess, propose

TWO_CORES = MachineFacts(cores=2)
SPEEDS = Speeds(teacher=Speed(90, 300), student=Speed(140, 500))


def photos(labelled: int = 2_000, smallest: int = 200, side: int = 400, **more: int) -> DataFacts:
    return DataFacts(classes=10, labelled=labelled, smallest=smallest, largest=smallest, side=side, **more)


def proposed(data: DataFacts, machine: MachineFacts = TWO_CORES, *, fast: bool = False) -> Proposal:
    made = propose(data, machine, guess(machine) if machine.gpus else SPEEDS, fast=fast)
    Params.model_validate(made.values)  # every key is one of params.yaml
    return made


@pytest.mark.parametrize(
    ("side", "fast", "size"),
    [(28, False, 32), (50, False, 32), (70, False, 64), (100, False, 96), (100, True, 96), (4000, True, 96)],
)
def test_the_image_size_is_never_above_the_images_own(side: int, fast: bool, size: int) -> None:
    assert proposed(photos(labelled=300, side=side), fast=fast).values["global"]["image_size"] == size


@pytest.mark.parametrize(
    ("labelled", "batch"), [(40, 16), (2_000, 32), (4_500, 32), (6_000, 64), (1_000_000, 64)]
)
def test_few_images_get_small_batches_a_rate_to_match_and_steps_enough(labelled: int, batch: int) -> None:
    made = proposed(photos(labelled))
    for net in ("teacher", "student"):
        train = made.values[net]["train"]
        assert train["batch_size"] == batch
        assert made.values[net]["lr"]["initial"] == pytest.approx(0.002 * batch / 64)
        steps = train["epochs"] * labelled * 0.6 / batch
        assert steps >= 290 or train["epochs"] == 60


def test_the_gate_takes_the_proposed_rate_whatever_the_batch() -> None:
    for labelled in (40, 2_000, 10_000):
        values = proposed(photos(labelled)).values
        student = values["student"]
        student = {**OWN_DATA["student"], **student, "lr": student["lr"]}
        params = CheckParams.model_validate({"student": student, "distill": OWN_DATA["distill"]})
        total = params.student.train.batch_size  # of one worker; more of them are let have more
        assert params.student.lr.initial <= limit(params, total).rate


@pytest.mark.parametrize(
    ("labelled", "smallest", "given", "splits"),
    [
        (2_000, 200, {}, (0.2, 0.2)),
        (500, 40, {}, (0.25, 0.2)),
        (500, 3, {}, (0.3, 0.2)),
        (80_000, 2_000, {}, (0.1, 0.1)),
        (80_000, 2_000, {"validation": 5_000, "test": 5_000}, (0.2, 0.2)),
    ],
)
def test_small_classes_give_more_to_validation_and_many_images_less(
    labelled: int, smallest: int, given: dict[str, int], splits: tuple[float, float]
) -> None:
    values = proposed(photos(labelled, smallest, **given)).values
    assert (values["data"]["splits"]["val"], values["data"]["splits"]["test"]) == splits


@pytest.mark.parametrize(
    ("cores", "gpus", "workers", "each"),
    [(1, 0, 1, 1), (2, 0, 1, 2), (16, 0, 2, 8), (16, 1, 1, 16), (64, 4, 4, 16)],
)
def test_workers_share_the_machine(cores: int, gpus: int, workers: int, each: int) -> None:
    made = proposed(photos(30_000), MachineFacts(cores, gpus))
    ray = made.values["ray"]
    assert (ray["workers"], ray["cpus_per_worker"], ray["gpus_per_worker"]) == (workers, each, min(1, gpus))
    assert (made.values["teacher"]["train"]["num_workers"] > 0) == bool(gpus)
    if gpus:
        assert made.values["global"]["image_size"] == 224
        assert made.values["student"]["train"]["batch_size"] * workers == 256


@pytest.mark.parametrize("side", [100, 500])
@pytest.mark.parametrize("labelled", [300, 2_062, 5_000])
def test_fast_keeps_ten_minutes_on_two_cores(labelled: int, side: int) -> None:
    made = proposed(photos(labelled, side=side), fast=True)
    assert made.total <= 10
    assert made.values["distill"]["control"] is False
    assert any("no control" in reason for reason in made.reasons)


def test_more_work_takes_more_minutes_and_what_does_not_fit_is_said() -> None:
    assert proposed(photos(500)).total < proposed(photos(2_000)).total, "at one size"
    much = proposed(photos(1_000_000))
    assert much.total > 60
    assert "more than the 60 minutes" in much.reasons[-1]


def test_large_photographs_are_said_to_take_long_to_decode() -> None:
    data = photos(5_000, side=4_000)
    slow = replace(data, decode_seconds=0.15)
    assert not [reason for reason in proposed(data).reasons if "decoding images" in reason]
    assert "decoding images of 4000 px" in " ".join(proposed(slow).reasons)
    assert proposed(slow, fast=True).total > proposed(data, fast=True).total


def test_a_gpu_that_pytorch_cannot_use_is_said_and_not_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\necho 'GPU 0: a card (UUID: GPU-1)'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # this PyTorch's, wherever the test runs
    assert machine().gpus == 0
    assert "the driver lists 1 GPU, but this PyTorch" in capsys.readouterr().err


def test_images_are_counted_as_ingest_reads_them(tmp_path: Path) -> None:
    for name, count in {
        "train/a": 6, "train/b": 3, "val/a": 2, "val/b": 2, "test/a": 1, "test/b": 1,
        "train/a/synthetic": 4, "unlabeled": 5,
    }.items():  # fmt: skip
        for number in range(count):
            path = tmp_path / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (90, 60 + number)).save(path)
    (tmp_path / "train/b/broken.jpg").write_text("no image")
    seen = look(Data(**{**OWN_DATA["data"], "source": str(tmp_path), "root": str(tmp_path)}))
    assert (seen.classes, seen.smallest, seen.largest) == (2, 4, 6)  # names alone: nothing is decoded
    assert (seen.labelled, seen.validation, seen.test) == (16, 4, 2)
    assert (seen.unlabelled, seen.synthetic, seen.side) == (5, 4, 61)


def test_a_list_a_manifest_and_a_wrong_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(6):
        Image.fromarray(np.full((80, 70), number, np.uint8)).save(tmp_path / f"photos/{number}.png")
    (tmp_path / "list.txt").write_text("".join(f"photos/{n}.png {n % 2}\n" for n in range(6)))
    seen = look(Data(source="list.txt", root="."))
    assert (seen.classes, seen.labelled, seen.side) == (2, 6, 70)
    table = pa.table({"path": [f"photos/{n}.png" for n in range(6)], "label": [n % 3 for n in range(6)]})
    pq.write_table(table, "mine.parquet")
    assert look(Data(source="mine.parquet", root=".")).classes == 3
    with pytest.raises(RetortError, match="root=FOLDER"):
        look(Data(source="list.txt", root="photos"))


@mock_aws
def test_a_bucket_is_looked_at_and_nothing_of_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(object_store, "_clients", {})
    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="photos")
    content = io.BytesIO()
    Image.new("RGB", (120, 90)).save(content, "PNG")
    for key in (f"own/{label}/{number}.png" for label in "abc" for number in range(4)):
        client.put_object(Bucket="photos", Key=key, Body=content.getvalue())
    words = ["--images", "s3://photos/own", "--no-git", "--no-measure", "-o", "data.s3.region=us-east-1"]
    assert cli.run(["init", "mine", *words]) == 0
    values = load(tmp_path / "mine/params.yaml")
    assert (values.data.source, values.general.image_size) == ("s3://photos/own", 64)
    assert values.data.s3.region == "us-east-1"
    assert "data.source" not in (tmp_path / "mine/dvc.yaml").read_text(), "DVC sees no bucket"
    assert not list(tmp_path.rglob("stores.json"))


def test_pictures_that_stand_in_no_folder_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos/1.png")
    with pytest.raises(RetortError, match=r"photos: none of 1 entry can be used: 1\.png: .*class"):
        look(Data(source=str(tmp_path / "photos"), root=str(tmp_path / "photos")))


def test_init_writes_what_it_proposes_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for label in "ab":
        for number in range(30):
            path = tmp_path / "photos" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (100, 130)).save(path)
    words = ["--images", "photos", "--no-git", "--no-measure"]
    assert cli.run(["init", "mine", *words, "--fast", "-o", "student.train.epochs=3"]) == 0
    told = capsys.readouterr().out
    text = (tmp_path / "mine/params.yaml").read_text()
    values = load(tmp_path / "mine/params.yaml")
    assert (values.general.image_size, values.distill.control) == (96, False)
    assert values.student.train.epochs == 3, "-o stands above what is proposed"
    assert "minutes" in told
    assert all(f"# - {line}" in text for line in told.splitlines()[:4])

    assert cli.run(["init", "empty", "--no-git"]) == 0
    assert cli.run(["init", "empty", "--propose", "--no-measure"]) == 1
    assert "no image in this folder" in capsys.readouterr().err
    (tmp_path / "empty/images").rmdir()
    (tmp_path / "photos").rename(tmp_path / "empty/images")
    before = (tmp_path / "empty/params.yaml").read_bytes()
    assert cli.run(["init", "empty", "--propose", "--no-measure"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["global"]["image_size"] == 96
    assert (tmp_path / "empty/params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (["--images", "nowhere"], "nowhere: no such folder", 1),
        (["--images", "empty"], "no image in this folder", 1),
        (["-o", "student.train.epoch=3"], "did you mean 'student.train.epochs'", 2),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    words: list[str], said: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert cli.run(["init", "mine", *words]) == status
    assert said in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()

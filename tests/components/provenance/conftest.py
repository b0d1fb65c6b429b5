"""A working tree as the steps leave it, by the steps' own frame, and a sealed bundle of its model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

from components.common.params import StepParams
from components.dataset import manifest as manifests
from components.provenance import bundle
from components.step import step

# step, folder, what it reads, what it leaves there, and what it leaves outside
TREE = (
    ("ingest", "outputs/ingest", (), (), ("data/manifest.parquet",)),
    ("validate", "outputs/validate", ("data/manifest.parquet",), (), ("data/clean.parquet",)),
    ("weights", "outputs/weights", (), ("teacher.safetensors", "student.safetensors", "features.onnx"), ()),
    ("audit-imbalance", "outputs/audit/imbalance", ("data/clean.parquet",), ("part.json",), ()),
    ("audit-synthetic", "outputs/audit/synthetic", ("data/clean.parquet", "outputs/weights/features.onnx"),
     ("part.json",), ()),
    ("plan", "outputs/audit", ("outputs/audit/imbalance/part.json", "outputs/audit/synthetic/part.json"),
     ("plan.json",), ()),
    ("finetune", "outputs/teacher", ("data/clean.parquet", "outputs/audit/plan.json",
     "outputs/weights/teacher.safetensors"), ("model.safetensors", "model.json"), ()),
    ("check", "outputs/check", ("data/clean.parquet", "outputs/audit/plan.json",
     "outputs/teacher/model.safetensors"), ("gate.json",), ()),
    ("distill", "outputs/student", ("data/clean.parquet", "outputs/audit/plan.json",
     "outputs/teacher/model.safetensors", "outputs/check/gate.json"),
     ("model.safetensors", "model.json", "metrics.json"), ()),
    ("export", "outputs/export", ("data/clean.parquet", "outputs/student/model.safetensors"),
     ("model.onnx", "parity.json"), ()),
    ("benchmark", "outputs/benchmark", ("outputs/export/model.onnx",), ("choice.json",), ()),
)  # fmt: skip
FILES = {
    "model.onnx": "outputs/export/model.onnx",
    "extra_files/plan.json": "outputs/audit/plan.json",
    "extra_files/gate.json": "outputs/check/gate.json",
    "extra_files/parity.json": "outputs/export/parity.json",
    "extra_files/choice.json": "outputs/benchmark/choice.json",
    "extra_files/card.json": "outputs/student/model.json",
    "extra_files/model.safetensors": "outputs/student/model.safetensors",
    "extra_files/metrics.json": "outputs/student/metrics.json",
    "extra_files/manifest.parquet": "data/clean.parquet",
}
NAMES = ["cat", "a|dog"]
CARD = {
    "arch": {"name": "tf_efficientnet_lite0"}, "class_names": NAMES, "input_size": [3, 56, 56],
    "lineage": [{"source": "package:some-weights", "sha256": "ab" * 32, "coverage": 1.0}],
}  # fmt: skip
METRICS = {"val": {"top1": 0.75, "per_class": {"cat": 1.0, "a|dog": 0.5}, "images": 4}}
CHOICE = {"recommended": {"engine": "onnxruntime", "precision": "fp32", "threads": 1, "batch": 1,
          "p50_ms": 0.58, "p95_ms": 1.1}}  # fmt: skip
AWAY = "http://127.0.0.1:9"  # nobody listens: no test here is about MLflow


def content(name: str, folder: str) -> bytes:
    known = {"choice.json": CHOICE, "metrics.json": METRICS}
    if name == "model.json":
        return json.dumps(CARD).encode()
    return json.dumps(known.get(name, {"of": folder})).encode() + b"\n"


def params(**registry: object) -> StepParams:
    return StepParams.model_validate({"registry": {"tracking_uri": AWAY, "name": "pets", **registry}})


def write_manifest(path: Path) -> None:
    rows = [
        {
            "path": f"{label}/{place}.png", "label": label, "class_name": NAMES[label], "split": split,
            "source": "real", "sha256": f"{label}{place}" * 32,
        }
        for label in range(2)
        for place, split in enumerate(["val", "val", "train", "train"])
    ]  # fmt: skip
    manifests.write(pa.Table.from_pylist(rows, schema=manifests.SCHEMA), path)


def make_tree() -> None:
    """Every step in turn, in the working directory."""
    for name, folder, read, left, outside in TREE:
        out = Path(folder)
        keep = ("imbalance", "synthetic") if name == "plan" else ()
        with step(
            name, params(), out, [Path(one) for one in read], keep, [Path(one) for one in outside]
        ) as run:
            for one in left:
                run.product(out / one).write_bytes(content(one, folder))
            for one in outside:
                write_manifest(run.product(Path(one)))


def seal(folder: Path, **registry: object) -> bundle.Sealed:
    """A version's folder, as MLflow saves it, sealed by a step that registers it."""
    for name, source in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    (folder / "MLmodel").write_text("flavors: {}\n")
    files = {name: Path(source) for name, source in FILES.items()}
    with step("register", params(**registry), Path("outputs/register"), list(files.values())) as run:
        return bundle.seal(folder, run, files)


def openssl(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(["openssl", *map(str, words)], cwd=cwd, check=True, capture_output=True, text=True)
    return done.stdout


@dataclass(frozen=True)
class Keys:
    """A key pair, another's public key, and a certificate with its root: made by the openssl command."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other", "root", "leaf"):
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.key", cwd=folder)
        openssl("ec", "-in", f"{name}.key", "-pubout", "-out", f"{name}.pub", cwd=folder)
    openssl("req", "-x509", "-new", "-key", "root.key", "-subj", "/CN=Root", "-days", "30", "-out",
            "root.pem", "-addext", "basicConstraints=critical,CA:TRUE", "-addext",
            "keyUsage=critical,keyCertSign", cwd=folder)  # fmt: skip
    (folder / "extensions").write_text("keyUsage=critical,digitalSignature\nextendedKeyUsage=codeSigning\n")
    openssl("req", "-new", "-key", "leaf.key", "-subj", "/CN=Signer", "-out", "leaf.csr", cwd=folder)
    openssl("x509", "-req", "-in", "leaf.csr", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial",
            "-days", "10", "-extfile", "extensions", "-out", "leaf.pem", cwd=folder)  # fmt: skip
    (folder / "chain.pem").write_bytes(
        (folder / "leaf.pem").read_bytes() + (folder / "root.pem").read_bytes()
    )
    return Keys(folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, keys: Keys) -> Path:
    """A working tree, with a signed bundle and an unsigned one beside it: made once."""
    folder = tmp_path_factory.mktemp("made")
    before, run = Path.cwd(), os.environ.get("RETORT_RUN")
    os.chdir(folder)
    os.environ["RETORT_RUN"] = "tests"
    try:
        make_tree()
        seal(folder / "plain")
        seal(folder / "signed", sign_key=str(keys["own.key"]), trusted_keys=[str(keys["own.pub"])])
        seal(folder / "certified", sign_key=str(keys["leaf.key"]), sign_certificate=str(keys["chain.pem"]))
    finally:
        os.chdir(before)
        if run is None:
            del os.environ["RETORT_RUN"]
        else:
            os.environ["RETORT_RUN"] = run
    return folder


@pytest.fixture
def tree(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it for one test, which works there."""
    place = tmp_path / "tree"
    shutil.copytree(made, place)
    monkeypatch.chdir(place)
    return place

"""A version that is signed when it is registered, verified from the registry, and asked for by predict."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.common.errors import ConfigError, RetortError
from components.common.links import Link, content_of
from components.common.storage import sha256_file, write_json
from components.provenance import bundle
from components.registry.versions import opened
from components.tools.promote import promote
from components.tools.verify import fetched, require, verify
from pipelines.cli import run


def link(step: str, folder: Path, read: list[Path], left: list[Path]) -> Link:
    sides = [{str(path): sha256_file(path) for path in paths} for paths in (read, left)]
    when = "2026-01-01T00:00:00+00:00"
    return Link(step=step, folder=str(folder), started=when, read=sides[0], left=sides[1])


def write_links(folder: Path) -> None:
    """The links that the steps before ``register`` would have left in their folders."""
    clean, plan, student = folder / "clean.parquet", folder / "plan.json", folder / "student"
    raw = folder / "manifest.parquet"
    raw.write_bytes(b"all rows")
    check, export, choice = folder / "check", folder / "export", folder / "benchmark/choice.json"
    files = [student / name for name in ("model.safetensors", "model.json", "metrics.json")]
    chain = [
        link("ingest", folder / "ingest", [], [raw]),
        link("validate", folder / "validate", [raw], [clean]),
        link("audit-synthetic", folder / "synthetic", [clean], [folder / "samples.parquet"]),
        link("plan", folder / "audit", [], [plan]),
        link("check", check, [clean, plan], [check / "gate.json", check / "report.json"]),
        link("distill", student, [clean, plan, check / "gate.json"], files),
        link("export", export, [clean, files[0]], [export / name for name in
             ("model.onnx", "parity.json", "report.json")]),
        link("benchmark", folder / "benchmark", [export / "model.onnx"], [choice]),
    ]  # fmt: skip
    before = {one.folder: one for one in chain[:-1]}
    write_json(folder / "benchmark/run.json", content_of(chain[-1], before))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    for name in ("own", "other"):
        for words in (
            ["ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", f"{name}.key"],
            ["ec", "-in", f"{name}.key", "-pubout", "-out", f"{name}.pub"],
        ):
            subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
    return folder


def test_a_signed_version_is_verified_from_the_registry_and_predicts(project: Any, keys: Path) -> None:
    write_links(project.folder)
    params = project.params(
        sign_key=str(keys / "own.key"), trusted_keys=[str(keys / "own.pub")], require_signature=True
    )
    registered = project.register(params)
    assert "registry.lineage" not in project.findings()
    answer = verify("1", keys=[keys / "own.pub"], required=True, registry=lambda: params.registry)
    assert str(keys / "own.pub") in answer.what
    assert [line.split()[0] for line in answer.lines][-3:] == ["benchmark", "register", "promotion"]
    assert "register" in answer.lines[-1]
    again = verify("champion", keys=[], required=False, registry=lambda: params.registry)
    assert again.lines == answer.lines
    with pytest.raises(RetortError, match=r"signed by the key .* which is not known"):
        verify("1", keys=[keys / "other.pub"], required=True, registry=lambda: params.registry)
    with pytest.raises(RetortError, match="challenger: 'digits' has none"):
        verify("challenger", keys=[], required=False, registry=lambda: params.registry)

    # what a person downloads predicts, and only as it was signed
    with fetched("1", params.registry, "verify 1") as (folder, about, promotions):
        sums = sha256_file(folder / bundle.SUMS)
        assert about["tags"]["bundle.sha256"] == sums
        assert [one["sha256"] for one in promotions] == [sums]
        assert sha256_file(folder / "model.onnx") == registered["sha256"]
        image = project.folder / "one.png"
        Image.new("RGB", (16, 16), (200, 200, 200)).save(image)
        command = ["predict", str(image), "--model", str(folder), "--key"]
        assert run([*command, str(keys / "own.pub")]) == 0
        assert run([*command, str(keys / "other.pub")]) == 1
        assert run([*command, str(keys / "none.pub")]) == 2
        model = folder / "model.onnx"
        model.write_bytes(model.read_bytes()[:-1] + b"x")
        with pytest.raises(RetortError, match=r"model\.onnx: changed"):
            require(folder, params.registry)


def test_what_the_registry_keeps_may_not_change(project: Any) -> None:
    write_links(project.folder)
    params = project.params()
    project.register(params)
    verify("1", keys=[], required=False, registry=lambda: params.registry)
    (file,) = project.folder.glob(".retort/mlflow/**/extra_files/gate.json")
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"{", b"{ ", 1))
    with pytest.raises(RetortError, match=r"extra_files/gate\.json: changed"):
        verify("1", keys=[], required=False, registry=lambda: params.registry)
    # all of it written anew, by somebody who has no key: the registry remembers another bundle
    file.write_bytes(whole)
    (sums,) = project.folder.glob(".retort/mlflow/**/SHA256SUMS")
    page = sums.with_name("README.md")
    statement = sums.parent / bundle.STATEMENT
    for path in (page, statement):
        old = sha256_file(path)
        path.write_bytes(path.read_bytes() + b"\n")
        for other in (statement, sums):
            other.write_text(other.read_text().replace(old, sha256_file(path)))
    sums.write_text("".join(
        f"{sha256_file(sums.parent / line[66:])}  {line[66:]}\n" for line in sums.read_text().splitlines()
    ))  # fmt: skip
    with pytest.raises(RetortError, match=r"version 1: the registry says that its SHA256SUMS has sha256"):
        verify("1", keys=[], required=False, registry=lambda: params.registry)
    # and the tag, too: what was promoted cannot be written again
    with opened(params.registry, "a test") as versions:
        versions.client.set_model_version_tag(versions.name, "1", "bundle.sha256", sha256_file(sums))
    with pytest.raises(RetortError, match=r"version 1: its promotion at .* was of other files"):
        verify("1", keys=[], required=False, registry=lambda: params.registry)


def test_what_is_not_signed_is_neither_registered_nor_used_where_it_must_be(project: Any, keys: Path) -> None:
    write_links(project.folder)
    with pytest.raises(RetortError, match=r"require_signature: there is nothing to sign with"):
        project.register(project.params(require_signature=True))
    with pytest.raises(RetortError, match=r"signed by the key .* which is not known"):
        project.register(
            project.params(
                require_signature=True, sign_key=str(keys / "own.key"), trusted_keys=[str(keys / "other.pub")]
            )
        )
    with pytest.raises(ConfigError, match=r"registry\.sign_key: .*no such file"):
        project.register(project.params(sign_key="nowhere.key"))
    params = project.params()
    assert project.register(params)["version"] == 1, "nothing of what was refused became a version"
    strict = project.params(require_signature=True, sign_key=str(keys / "own.key"),
                            trusted_keys=[str(keys / "own.pub")])  # fmt: skip
    with pytest.raises(RetortError, match=r"version 1: is not signed, and registry\.require_signature"):
        project.register(strict)
    with pytest.raises(RetortError, match=r"this model is not signed"):
        require(project.folder / "export", strict.registry)
    with pytest.raises(ConfigError, match="no key is trusted"):
        require(project.folder / "export", project.params(require_signature=True).registry)
    promote(params, 1)

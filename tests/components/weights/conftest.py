"""Weights files of every kind, made small, and the rule that the reference values were made by."""

from __future__ import annotations

import io
import json
import math
import pickle
import struct
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PADDLE = Path(__file__).resolve().parents[2] / "data" / "paddle"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own, downloads and tracking included."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", ".retort")
    monkeypatch.setenv("RETORT_RUN", "tests")


def paddle_values(salt: str, name: str, shape: list[int]) -> np.ndarray:
    """The values of a parameter, float32: what Paddle was given when it computed the reference logits."""
    rng = np.random.default_rng(zlib.crc32(f"{salt}:{name}".encode()))
    if name.endswith("._mean"):
        values = rng.normal(0, 0.1, shape)
    elif name.endswith("._variance"):
        values = rng.uniform(0.5, 1.5, shape)
    elif name.startswith(("fc.", "out.")):
        values = rng.normal(0, 0.05, shape)
    elif len(shape) == 4:
        values = rng.normal(0, math.sqrt(2 / math.prod(shape[1:])), shape)
    elif name.endswith(".weight"):
        values = rng.uniform(0.2, 0.6, shape)
    else:
        values = rng.normal(0, 0.1, shape)
    return values.astype(np.float32)


def reference(name: str) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Tensors by Paddle's names, the input float32 [N, 3, H, W], and the logits that Paddle computed."""
    known = json.loads((PADDLE / f"{name}.json").read_text(encoding="utf-8"))
    tensors = {key: paddle_values(known["salt"], key, shape) for key, shape in known["params"]}
    rng = np.random.default_rng(zlib.crc32(f"{known['salt']}:input".encode()))
    return tensors, rng.normal(0, 1, known["input_shape"]).astype(np.float32), np.array(known["logits"])


def lodtensor(values: np.ndarray) -> bytes:
    """A float32 variable as Paddle's static graph saves it."""

    def varint(number: int) -> bytes:
        out = bytearray()
        while number > 0x7F:
            out.append(number & 0x7F | 0x80)
            number >>= 7
        return bytes([*out, number])

    described = b"\x08\x05" + b"".join(b"\x10" + varint(side) for side in values.shape)
    head = struct.pack("<IQI", 0, 0, 0) + struct.pack("<i", len(described)) + described
    return head + values.astype("<f4").tobytes()


def tar_of(files: Mapping[str, bytes], *others: tarfile.TarInfo) -> bytes:
    """A plain tar of files, and of members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in others:
            archive.addfile(info)
    return buffer.getvalue()


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A few tensors of the shapes that networks have."""
    rng = np.random.default_rng(seed)
    shapes = {
        "conv.weight": (4, 3, 3, 3),
        "bn.weight": (4,),
        "bn.bias": (4,),
        "fc.weight": (4, 6),
        "fc.bias": (6,),
    }
    return {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def torch_file(content: Any, zipped: bool = True) -> bytes:
    """What ``torch.save`` writes, in its present form or in that before PyTorch 1.6."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def examples() -> dict[str, bytes]:
    """One small file of every kind that can be read, all with the tensors of ``tensors()``."""
    import torch
    from safetensors.numpy import save

    plain = tensors()
    torches = {name: torch.from_numpy(values) for name, values in plain.items()}
    return {
        "lodtensor.tar": tar_of({f"net/{name}": lodtensor(values) for name, values in plain.items()}),
        "pdparams": pickle.dumps({**plain, "StructuredToParameterName@@": {"fc.bias": "b"}}, protocol=4),
        "pdparams, protocol 2": pickle.dumps(plain, protocol=2),
        "pth": torch_file({"model": torches, "epoch": 3}),
        "pth, row": torch_file(torches, zipped=False),
        "safetensors": save(plain),
    }

"""The trial: a registered bundle is loaded and asked in a clean process before it can be champion.

After TFX's InfraValidator. What is tried is the bundle as the registry gives it, in a process of this Python
in isolated mode, in which nothing can be imported but what the bundle's ``requirements.txt`` brings, in the
versions that are installed here: ``try_bundle.py``. Another machine, or an image of a server, is not tried.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.common.storage import read_json
from components.export import exported as exports

SCRIPT = Path(__file__).with_name("try_bundle.py")
IMAGES = 32  # that it must answer
SECONDS = 300  # after which it hangs
SLOWER = 4.0  # times the benchmark's p50 that the whole call may take
OVERHEAD_MS = 20.0  # of MLflow around the runtime, which outweighs a small network
LIMIT = 1e-4  # of a score, where parity says none


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        failure: why it failed, a clause; empty: it passed.
        said: what ``try_bundle.py`` measured.
    """

    failure: str
    said: dict[str, Any]


def attempt(
    bundle: Path, model: exports.Exported, squares: np.ndarray, parity: Path, p50_ms: float | None
) -> Trial:
    """Try a bundle.

    Args:
        bundle: a folder of MLflow's format.
        model: the exported file that parity proved.
        squares: uint8 [n, size, size, 3], validation images.
        parity: ``parity.json``.
        p50_ms: of one image, as the benchmark measured the same file; None: it did not.
    """
    fed = model.feed(squares)
    session = exports.session(model.path, threads=1)
    scores = np.concatenate([exports.run(session, fed[row : row + 1]) for row in range(len(fed))])
    compared = read_json(parity).get("compared", {})
    # of whole images there is another limit: they are resized in the graph
    proved = (name for name in compared if name.startswith("model.onnx") and "whole" not in name)
    limits = [compared[name]["limit"] for name in proved]
    requests = bundle.parent / "requests.npz"
    np.savez(requests, images=fed, scores=scores, limit=max([LIMIT, *limits]))
    kept = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    home = {"HOME": str(bundle.parent), "TMPDIR": str(bundle.parent), "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-I", str(SCRIPT), str(bundle.resolve()), str(requests.resolve())]
    try:
        done = subprocess.run(
            command, env=env | home, cwd=bundle.parent, capture_output=True, text=True, timeout=SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Trial(f"it does not answer within {SECONDS} s", {})
    if done.returncode < 0:
        return Trial(f"its process died by signal {-done.returncode}", {})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return Trial(f"it does not load or answer in a clean process: {last[:300]}", {})
    said = json.loads(done.stdout.strip().splitlines()[-1])
    failures = list(said["failures"])
    if p50_ms is not None and not failures:
        allowed = max(SLOWER * p50_ms, p50_ms + OVERHEAD_MS)
        if said["p50_ms"] > allowed:
            failures.append(
                f"one image takes {said['p50_ms']:.3g} ms, the benchmark's p50 is {p50_ms:.3g} ms "
                f"({allowed:.3g} ms with what serving adds)"
            )
    return Trial(failures[0] if failures else "", said)

"""Load a registered bundle and ask it, with nothing but what its requirements bring.

A program of its own that imports nothing of this package: ``python -I try_bundle.py BUNDLE REQUESTS``.
``REQUESTS`` is an .npz of ``images`` [n, ...] and ``scores`` [n, classes]. It prints one line of JSON.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import sysconfig
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

THREADS = 8
BURST = 64  # requests at once
ROUNDS = 5
CALLS = 10  # in a round


class Only:
    """A finder of modules that refuses whatever neither Python nor the requirements bring."""

    def __init__(self, requirements: list[str]) -> None:
        self.allowed = set(sys.stdlib_module_names) | {"__main__"}
        self.own = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib")]
        for name in closure(requirements):
            try:
                distribution = metadata.distribution(name)
            except metadata.PackageNotFoundError:
                continue  # an optional one, of another platform
            for file in distribution.files or []:
                self.allowed.add(file.parts[0].split(".")[0])

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        first = name.partition(".")[0]
        if first in self.allowed or first in sys.modules:
            return
        # Python's own, too, has modules without a name in the list, such as what it was configured with
        found = PathFinder.find_spec(first)
        origin = Path(found.origin).resolve() if found and found.origin else None
        inside = [place for place in self.own if origin and place in origin.parents]
        if origin is None or not inside or "site-packages" in origin.parts:
            raise ModuleNotFoundError(f"{name}: not among the bundle's requirements", name=name)


def closure(requirements: list[str]) -> set[str]:
    """Names of the distributions that these bring, without extras."""
    todo, found = list(requirements), set()
    while todo:
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", todo.pop())
        name = re.sub(r"[-_.]+", "-", match[1]).lower() if match else ""
        if not name or name in found:
            continue
        found.add(name)
        try:
            needed = metadata.distribution(name).requires or []
        except metadata.PackageNotFoundError:
            continue
        todo += [one for one in needed if "extra ==" not in one]
    return found


def main(bundle: Path, requests: Path) -> dict[str, Any]:
    """Load, ask, time, ask wrongly, ask at once; what failed is a list of sentences."""
    required = (bundle / "requirements.txt").read_text(encoding="utf-8").splitlines()
    sys.meta_path.insert(0, Only(required))
    warnings.simplefilter("ignore")
    begun = time.perf_counter()
    import mlflow.pyfunc
    import numpy as np

    given = np.load(requests, allow_pickle=False)
    images, expected, limit = given["images"], given["scores"], float(given["limit"])
    model = mlflow.pyfunc.load_model(str(bundle))
    said: dict[str, Any] = {"load_s": time.perf_counter() - begun, "failures": []}

    def ask(number: int) -> Any:
        return model.predict({"images": images[number : number + 1]})["scores"]

    def differs(scores: Any, number: int) -> str:
        wanted = expected[number : number + len(scores)]
        if scores.shape != wanted.shape or not np.isfinite(scores).all():
            return f"scores of the shape {list(scores.shape)}, or that are no numbers"
        worst = float(np.abs(scores - wanted).max())
        return f"scores that differ by {worst:.2g} (limit {limit:.2g})" if worst > limit else ""

    answers = [differs(ask(number), number) for number in range(len(images))]
    whole = differs(model.predict({"images": images})["scores"], 0)
    if wrong := [answer for answer in [*answers, whole] if answer]:
        said["failures"].append(f"it gives other answers than were proved: {wrong[0]}")
        return said

    rounds = []
    for _ in range(ROUNDS):
        calls = []
        for number in range(CALLS):
            begun = time.perf_counter()
            ask(number % len(images))
            calls.append(time.perf_counter() - begun)
        rounds.append(statistics.median(calls))
    said["p50_ms"] = 1e3 * min(rounds)  # the best of them: what the machine does besides only adds

    malformed = {
        "no image": images[:0],
        "a flat image": images[0],
        "an image of one pixel": images[:1, :1, :1, :1],
        "an image of text": np.array([["an image"]]),
        "an image of another type": images[:1].astype(np.float64) * 1e300,
        "an image of no numbers": np.full_like(images[:1], np.nan, dtype=np.float32),
    }
    said["refused"] = []
    for name, image in malformed.items():
        try:
            model.predict({"images": image})
        except Exception:  # noqa: BLE001 - whatever it raises, it has refused
            said["refused"].append(name)
        if wrong := [answer for answer in [differs(ask(0), 0)] if answer]:
            said["failures"].append(f"after {name} it gives {wrong[0]}")
            return said

    begun = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        numbers = [number % len(images) for number in range(BURST)]
        burst = list(pool.map(lambda number: differs(ask(number), number), numbers))
    said["burst_s"] = time.perf_counter() - begun
    if wrong := [answer for answer in burst if answer]:
        said["failures"].append(f"{len(wrong)} of {BURST} requests at once get {wrong[0]}")
    return said


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))

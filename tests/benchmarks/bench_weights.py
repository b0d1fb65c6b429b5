"""Weights: reading the published 100 MB tar and converting it; ten thousand damaged files a reader."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.measure import Row, at_most
from tests.components.weights.conftest import PADDLE, examples, lodtensor, tar_of

REPO_ROOT = Path(__file__).resolve().parents[2]
MUTATIONS = 10_000
HANG_SECONDS = 10
GIB = 1 << 30


def measure(seeds: int) -> list[Row]:
    """``seeds``: so many times ten thousand files are damaged, each in its own way."""
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder:
        return _tar(Path(folder)) + _fuzz(Path(folder), seeds)


def _python(code: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run code in a process of its own; what it prints last is JSON."""
    command = [sys.executable, "-c", code, *arguments]
    environment = {"PYTHONPATH": str(REPO_ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"status {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


MEMORY = """
import json, sys, time
from pathlib import Path
def memory(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024
def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")
"""

# the bare process has imported everything, and built another network once
READ = (
    MEMORY
    + """
import torch
from components.models import build, heads
from components.models.params import Arch
from components.weights import weights as step
from components.weights.convert import Target, convert
from components.weights.coverage import compare, shapes
from components.weights.readers import read
torch.set_num_threads(1)
arch = Arch(name="resnet50d")
with torch.device("meta"):
    network = shapes(build.plain(arch, 0).state_dict())
target, path = Target("resnet50d", network, ("fc",)), Path(sys.argv[1])
build.plain(Arch(name="resnet18d"), 0)
forget_peak()
bare = memory("VmRSS")
started = time.perf_counter()
converted = convert(read(path), target, path)
seconds = time.perf_counter() - started
peak = memory("VmHWM") - bare
started = time.perf_counter()
module = build.plain(arch, 0)
built = time.perf_counter() - started
started = time.perf_counter()
coverage = compare(network, shapes(converted.backbone))
step._save(module, converted, coverage, Path("net.safetensors"))
step._prove(module, Path("net.safetensors"), converted)
proved = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "peak": peak, "proved": proved, "all": memory("VmHWM") - bare,
                  "built": built, "share": coverage.share}))
"""
)


def _tar(folder: Path) -> list[Row]:
    """A tar with the names and sizes of ResNet50_vd_10w_pretrained.tar: no FC."""
    named = json.loads((PADDLE / "names.json").read_text(encoding="utf-8"))["ResNet50_vd"]
    rng = np.random.default_rng(0)
    files = {
        f"ResNet50_vd_10w_pretrained/{name}": lodtensor(rng.uniform(0.1, 1, shape).astype(np.float32))
        for _, name, shape in named
        if not name.startswith("fc")
    }
    path = folder / "ResNet50_vd_10w_pretrained.tar"
    path.write_bytes(tar_of(files))
    size = path.stat().st_size
    del files
    runs = [_python(READ, folder, str(path)) for _ in range(3)]
    best = min(runs, key=lambda run: run["seconds"])
    note = f"{size / 1e6:.0f} MB, {best['share']:.0%} of the backbone covered, best of 3"
    return [
        at_most("tar: reading and converting", best["seconds"], 3, "s", note),
        at_most("tar: peak memory above the bare process", best["peak"] / size, 3, "x", "of its size"),
        Row("  writing, loading, comparing every value", best["proved"], "s"),
        Row("  peak memory of all, the network among it", best["all"] / size, "x"),
    ]


FUZZ = (
    MEMORY
    + """
import os, signal
from components.common.errors import RetortError
from components.weights.readers import read
from tests.components.weights.fuzz import mutate
content, start, count, limit = Path(sys.argv[1]).read_bytes(), *map(int, sys.argv[2:5])
b"x".decode("cp437")  # what zipfile reads names with is loaded before anything is watched
ran = []
watching = False
def watch(event, arguments):
    if watching and event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork",
                              "os.mkdir", "os.remove", "os.rename", "socket.connect", "exec", "compile"):
        ran.append(event)
sys.addaudithook(watch)
def hang(*_):
    raise SystemExit("a reader hangs")
signal.signal(signal.SIGALRM, hang)
path = Path("damaged")
read_whole = refused = unclear = 0
slowest = 0.0
for seed in range(start, start + count):
    path.write_bytes(mutate(seed, content))
    signal.setitimer(signal.ITIMER_REAL, limit)
    began = time.perf_counter()
    watching = True
    try:
        read(path)
        read_whole += 1
    except RetortError as error:
        refused += 1
        text = str(error)
        unclear += not (text.startswith("damaged") and text.isprintable() and len(text) < 600)
    finally:
        watching = False
    slowest = max(slowest, time.perf_counter() - began)
    signal.setitimer(signal.ITIMER_REAL, 0)
print(json.dumps({"read": read_whole, "refused": refused, "unclear": unclear, "ran": len(ran),
                  "slowest": slowest, "peak": memory("VmHWM")}))
"""
)


def _fuzz(folder: Path, seeds: int) -> list[Row]:
    rows = []
    for kind, content in examples().items():
        place = folder / "example"
        place.write_bytes(content)
        found = _python(FUZZ, folder, str(place), "0", str(MUTATIONS * seeds), str(HANG_SECONDS))
        note = f"seeds 0 to {MUTATIONS * seeds - 1}: {found['refused']} refused, {found['read']} read"
        bad = found["unclear"] + found["ran"]
        rows += [
            at_most(f"{kind}: crashes, hangs, runs, unclear errors", bad, 0, "", note),
            at_most(
                f"{kind}: peak memory", found["peak"] / GIB, 1, "GiB", f"slowest {found['slowest']:.2f} s"
            ),
        ]
    return rows

"""Training's parts on a CPU: the input path beside the commit before and timm, 43 million rows."""

from __future__ import annotations

import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from components.audit.plan_schema import Plan, Sampling
from components.dataset import manifest
from components.training import sampling
from components.training.augmentation import Augment
from components.training.inputs.feed import open_feed
from components.training.inputs.index import known_fingerprint, open_index
from components.training.inputs.pictures import open_store
from tests.benchmarks.measure import Row, at_least, at_most

REPO_ROOT = Path(__file__).resolve().parents[2]
BEFORE = "2e8f4f8"  # the last commit with components/training/loader.py
GIB = 1 << 30

IMAGES, ROUNDS = 480, 3
CACHED_ROUNDS = 8  # of cached labels and plain ones, in turns
INPUTS = {  # by what is said: arguments of input_path.py
    "decoded, before": ("before", "decoded", "light", "0"),
    "decoded, now": ("now", "decoded", "light", "0"),
    "JPEG, before": ("before", "jpeg", "light", "0"),
    "JPEG, now": ("now", "jpeg", "light", "0"),
    "JPEG, now, recipe standard": ("now", "jpeg", "standard", "0"),
    "JPEG, timm, 1 process": ("timm", "jpeg", "", "1"),
    "JPEG, timm, 2 processes": ("timm", "jpeg", "", "2"),
}

ROWS = int(os.environ.get("RETORT_BENCH_ROWS", "43_000_000"))
CLASSES, BATCH = 100_000, 256
WORKERS = 8  # each of which draws what all of them take
CARD = {"resnet50d": 5_261, "mobilenetv3_small_100": 19_607}  # images/s of an H100 alone (``bench_gpu``)
DRAWS = 3 * sampling.BLOCK // BATCH  # timed: some blocks are drawn in them


def measure(seeds: int) -> list[Row]:
    return input_path() + cached_labels() + large_index()


# --- the input path --------------------------------------------------------------------------------------


def input_path() -> list[Row]:
    """Images/s of training from each input path, in turns; the best epoch of each, as others disturb them."""
    best = dict.fromkeys(INPUTS, 0.0)
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as name:
        folder = Path(name)
        _write_photographs(folder)
        there = _commit_before(folder / "before")
        for _ in range(ROUNDS):
            for said, arguments in INPUTS.items():
                if arguments[0] == "before" and not there:
                    continue
                code = folder / "before" if arguments[0] == "before" else REPO_ROOT
                best[said] = max(best[said], *_rates(folder, code, arguments))
    rows = [Row(f"training, {said}", value, "images/s") for said, value in best.items() if value]
    if there:
        for kind in ("decoded", "JPEG"):
            ratio = best[f"{kind}, now"] / best[f"{kind}, before"]
            rows.append(at_least(f"{kind}: now over before", ratio, 1, "x"))
    timm = max(value for said, value in best.items() if "timm" in said)
    for said in ("JPEG, now", "JPEG, now, recipe standard"):
        rows.append(
            at_least(f"{said}: over timm", best[said] / timm, 1.1, "x", "its best number of processes")
        )
    return rows


def cached_labels() -> list[Row]:
    """Images/s of learning from cached soft labels, beside learning from labels, in turns."""
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as name:
        folder = Path(name)
        _write_photographs(folder)
        script = REPO_ROOT / "tests/benchmarks/cached_labels.py"
        command = [sys.executable, "-W", "ignore", script, "clean.parquet", "images", str(CACHED_ROUNDS)]
        env = {**os.environ, "PYTHONPATH": str(REPO_ROOT), "RETORT_STATE": str(folder / ".retort")}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"cached labels: {done.stderr[-2000:]}")
    rates: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    rows = [Row(f"training, {said}", max(found), "images/s") for said, found in rates.items()]
    for said, plain, wanted in (
        ("cached, decoded", "plain, decoded", 1.0),
        ("cached, decoded, mixed", "plain, decoded, mixed", None),
        ("cached, JPEG", "plain, JPEG", 1.0),
        ("cached, JPEG, 4 views", "plain, JPEG", 1.2),
    ):
        pairs = [one / other for one, other in zip(rates[said], rates[plain], strict=True)]
        ratio, note = statistics.median(pairs), f"median of {len(pairs)} rounds"
        name = f"{said}: over plain"
        rows.append(
            Row(name, ratio, "x", note=note) if wanted is None else at_least(name, ratio, wanted, "x", note)
        )
    return rows


def _rates(folder: Path, code: Path, arguments: tuple[str, ...]) -> list[float]:
    script = REPO_ROOT / "tests/benchmarks/input_path.py"
    command = [sys.executable, "-W", "ignore", script, *arguments, "clean.parquet", "images"]
    env = {
        **os.environ,
        "PYTHONPATH": str(code),
        "RETORT_STATE": str(folder / ".retort"),
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _commit_before(folder: Path) -> bool:
    """The code of the commit before; False where git does not have it."""
    archive = subprocess.run(["git", "-C", REPO_ROOT, "archive", BEFORE, "components"], capture_output=True)
    if archive.returncode:
        print(f"training: git has no {BEFORE} here: nothing is compared with it", file=sys.stderr)
        return False
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return True


def _write_photographs(folder: Path) -> None:
    """Crops of scikit-learn's two photographs, 500 x 375 pixels, as JPEG files in ten classes."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng = np.random.default_rng(0)
    rows = []
    for number in range(IMAGES):
        image, share = photographs[number % 2], rng.uniform(0.5, 1)
        width, height = int(500 * share), int(375 * share)
        left, top = rng.integers(0, image.width - width), rng.integers(0, image.height - height)
        path = folder / "images" / f"class {number % 10}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.crop((left, top, left + width, top + height)).resize((500, 375)).save(path, quality=90)
        content = path.read_bytes()
        rows.append(
            {
                "path": path.relative_to(folder / "images").as_posix(), "label": number % 10,
                "class_name": f"class {number % 10}", "split": "train", "source": "real",
                "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(),
            }
        )  # fmt: skip
    manifest.write(pa.Table.from_pylist(rows, schema=manifest.SCHEMA), folder / "clean.parquet")


# --- 43 million rows -------------------------------------------------------------------------------------


def large_index() -> list[Row]:
    """A manifest of ROWS rows and CLASSES classes: its index, then a worker's first batch and its drawing."""
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as name:
        folder = Path(name)
        env = {**os.environ, "RETORT_STATE": str(folder / ".retort"), "PYTHONPATH": str(REPO_ROOT)}
        manifest.write_all(_portions(), folder / "clean.parquet")

        def run(what: str) -> dict[str, float]:
            command = [sys.executable, "-m", "tests.benchmarks.bench_training", what]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{what}: {done.stderr[-2000:]}")
            return json.loads(done.stdout.splitlines()[-1])

        built, worker = run("build"), run("worker")
    said = f"{ROWS:,} rows"
    return [
        Row(f"{said}: the index built", built["seconds"], "s", note="with the manifest's fingerprint"),
        Row(f"{said}: the index on disk", built["bytes"] / GIB, "GiB"),
        Row(f"{said}: memory to build it", built["peak"] / GIB, "GiB"),
        at_most(f"{said}: a worker's first batch", worker["first"], 10, "s", f"of {BATCH}, imports apart"),
        at_most(f"{said}: memory of a worker", worker["peak"] / GIB, 1, "GiB", "mapped files apart"),
        at_most(
            f"{said}: drawing", worker["draw"] * CARD["resnet50d"] / BATCH, 0.05, "",
            f"of resnet50d's step on an H100; {1e3 * worker['draw']:.2g} ms for one of {WORKERS} workers",
        ),
        Row(
            f"{said}: drawing, a faster network", worker["draw"] * CARD["mobilenetv3_small_100"] / BATCH, "",
            note="of mobilenetv3_small_100's step; drawn by the feeding thread, beside the step",
        ),
    ]  # fmt: skip


def _portions() -> Iterator[pa.Table]:
    """Rows of a manifest, a million at a time: many images in some classes, few in most."""
    rng = np.random.default_rng(0)
    shares = 1 / (np.arange(CLASSES) + 1_000)
    shares /= shares.sum()
    for start in range(0, ROWS, 1_000_000):
        count = min(1_000_000, ROWS - start)
        numbers = pa.array(np.arange(start, start + count))
        labels = rng.choice(CLASSES, count, p=shares).astype(np.int32)
        names = pc.binary_join_element_wise("n", pa.array(labels).cast(pa.string()), "")
        paths = pc.binary_join_element_wise(names, "/", numbers.cast(pa.string()), ".JPEG", "")
        digests = rng.bytes(32 * count).hex()
        hashes = pa.StringArray.from_buffers(
            count, pa.py_buffer(np.arange(count + 1, dtype=np.int32) * 64), pa.py_buffer(digests.encode())
        )
        split = rng.choice(["train", "val", "test"], count, p=[0.98, 0.01, 0.01])
        columns = {
            "path": paths, "label": labels, "class_name": names, "split": split,
            "source": np.full(count, "real"), "bytes": rng.integers(50_000, 200_000, count), "sha256": hashes,
        }  # fmt: skip
        arrays = [
            pa.array(columns[field.name]) if field.name in columns else pa.nulls(count)
            for field in manifest.SCHEMA
        ]
        yield pa.table(arrays, names=manifest.SCHEMA.names).cast(manifest.SCHEMA)


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Anonymous memory of this process at its highest, sampled: pages of mapped files are anybody's."""
    found, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    found[0] = max(found[0], int(line.split()[1]) * 1024)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()


def build() -> dict[str, float]:
    started = time.perf_counter()
    with _peak() as peak:
        index = open_index(Path("clean.parquet"))
    seconds = time.perf_counter() - started
    assert index.folder is not None
    size = sum(file.stat().st_size for file in index.folder.iterdir())
    return {"seconds": seconds, "bytes": size, "peak": peak[0]}


def worker() -> dict[str, float]:
    """What a worker does before its first step, and then draws."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (128, 128, 3)).astype(np.uint8)).save(
        content, "JPEG"
    )
    classes = np.random.default_rng(1).uniform(0.5, 2, CLASSES).tolist()
    plan = Plan(sampling=Sampling(by_class=dict(enumerate(classes))))
    known_fingerprint(Path("clean.parquet"))
    with _peak() as peak:
        started = time.perf_counter()
        index = open_index(Path("clean.parquet"))
        rows = sampling.training_rows(index, plan)
        weights = sampling.Weights(index, rows, plan)
        epochs = sampling.Epochs(index, rows, weights, rows[:0], 7)
        part = open_store(
            index, "images", 128, limit=0, contents=lambda row: _read(index, row, content)
        ).learn

        def draws(number: int) -> Iterator[sampling.Draw]:
            return epochs.draws(
                number, BATCH, WORKERS, 3, lambda number, before: np.full(len(before), number)
            )

        with open_feed(part, Augment("light", 7, 128), torch.device("cpu"), threads=2) as feed:
            next(feed(draws(0)))
        first = time.perf_counter() - started
        drawing = draws(1)
        started = time.perf_counter()
        count = sum(
            1 for _ in islice(drawing, DRAWS // 8)
        )  # one of eight workers: all of them draw each block
    draw = (time.perf_counter() - started) / count
    return {"first": first, "peak": peak[0], "draw": draw}


def _read(index: object, row: int, content: io.BytesIO) -> bytes:
    """One file's bytes for each row, after the look-ups that its own would take."""
    index.path(row), index.pin(row)  # type: ignore[attr-defined]
    return content.getvalue()


if __name__ == "__main__":
    print(json.dumps({"build": build, "worker": worker}[sys.argv[1]]()))

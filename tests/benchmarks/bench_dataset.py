"""Data: ingest, validate, drift, imbalance audit up to 43 million rows; near-duplicates; images; copies."""

from __future__ import annotations

import io
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageFilter

from components.dataset import quality
from components.dataset.quality import CHECKS
from components.dataset.quality.judge import judge
from tests.benchmarks import fashion
from tests.benchmarks.measure import Command, Row, at_least, at_most, run

REPO_ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
CLASSES = 100_000
SIZES = (1_000_000, 4_000_000, 16_000_000, 43_000_000)
VALIDATE = ("-o", "validate.images=none", "-o", "data.root=.")


def measure(seeds: int) -> list[Row]:
    """Every number about data; only the planted copies depend on a seed."""
    return [*_scale(SIZES), *_near(1_000_000), *_images(), *_quality(), *_planted(seeds)]


def _retort(folder: Path, *arguments: str) -> Command:
    env = {**os.environ, "PYTHONPATH": os.fspath(REPO_ROOT), "CI": "true", "RETORT_RUN": "benchmark"}
    done = run([sys.executable, "-m", "pipelines.cli", *arguments], folder, env)
    if done.status != 0:
        raise SystemExit(f"retort {' '.join(arguments)} failed:\n{done.output[-2000:]}")
    return done


# -- scale


def generate(rows: int, path: Path) -> None:
    """A manifest of ``rows`` rows in CLASSES classes of equal size, sorted by class.

    One row in 20 is for validation, one in 10 synthetic; one in 1,000 repeats a training row's content,
    and one in 1,000 that of a validation row.
    """
    import duckdb

    with duckdb.connect() as db:
        db.execute(
            f"set threads = 2; set memory_limit = '2GB'; set temp_directory = '{path.parent / 'spill'}'"
        )
        db.execute(
            f"""copy (select printf('class_%06d/%09d.jpg', label, i) as path, label::int as label,
                'class ' || label as class_name, case when i % 20 = 0 then 'val' else 'train' end as split,
                case when i % 10 = 1 then 'synthetic' else 'real' end as source, null::varchar as "group",
                (200 + h % 800)::int as width, (200 + h // 1000 % 800)::int as height,
                (20000 + h % 100000)::bigint as bytes,
                sha256((i - (i % 1000 in (7, 21))::int)::varchar) as sha256, h::ubigint as phash
            from (select i, i * {CLASSES} // {rows} as label, hash(i) as h from range({rows}) t(i)))
            to '{path}' (format parquet, compression zstd)"""
        )


def _scale(sizes: tuple[int, ...]) -> list[Row]:
    rows = []
    curve = {}
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="retort-bench-") as name:
            folder = Path(name)
            (folder / "data").mkdir()
            (folder / "params.yaml").write_text("{}\n", encoding="utf-8")
            generate(size, folder / "source.parquet")
            ingest = _retort(folder, "-o", "data.source=source.parquet", "-o", "data.root=.", "ingest")
            (folder / "source.parquet").unlink()
            _earlier_counts(folder, size)
            validate = _retort(folder, *VALIDATE, "-o", "validate.baseline=earlier.parquet", "validate")
            rows += _exact(folder, size)
            audit = _retort(folder, "audit", "imbalance")
            loaded = _plan(folder) if size == max(sizes) else []
        both, peak = validate.seconds + audit.seconds, max(validate.peak_bytes, audit.peak_bytes)
        curve[size] = both
        title = f"ingest of a manifest of {size / 1e6:.0f} M rows"
        rows += [
            at_most(title, ingest.seconds, 300, "s"),
            at_most("  peak memory", ingest.peak_bytes / GIB, 4, "GiB"),
        ]
        note = f"validate and drift {validate.seconds:.1f} s, audit {audit.seconds:.1f} s"
        title = f"validate, drift, imbalance audit at {size / 1e6:.0f} M rows"
        if size == max(SIZES):
            rows += [at_most(title, both, 120, "s", note), at_most("  peak memory", peak / GIB, 4, "GiB")]
            rows += loaded
        else:
            rows += [Row(title, both, "s", note=note), Row("  peak memory", peak / GIB, "GiB")]
    small, large = min(curve), max(curve)
    if large > small:
        ratio = (curve[large] / curve[small]) / (large / small)
        rows.append(at_most("  time a row, largest to smallest", ratio, 1.1, "x", "1 is linear"))
    return rows


LOAD = """
import json, resource, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from components.audit.plan_schema import read_plan
from components.training import sampling

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before, started = peak(), time.perf_counter()
plan = read_plan(Path("outputs/audit/plan.json"))
rows = np.arange(CLASSES)
columns = SimpleNamespace(labels=rows, sources=np.zeros(CLASSES, np.int8), source_names=["synthetic"])
sampling.Weights(columns, rows, plan)(rows)  # one row a class: every weight is looked up
print(json.dumps({"seconds": time.perf_counter() - started, "bytes": peak() - before}))
"""


def _plan(folder: Path) -> list[Row]:
    """The rest of the audits without their probe, and how long training takes to load what they ask for."""
    _retort(folder, "weights")
    synthetic = _retort(folder, "audit", "synthetic")
    plan = _retort(folder, "plan", "-o", "audit.distribution=uniform")
    env = {**os.environ, "PYTHONPATH": os.fspath(REPO_ROOT)}
    script = LOAD.replace("CLASSES", str(CLASSES))
    done = run([sys.executable, "-c", script], folder, env)
    if done.status:
        raise RuntimeError(done.output)
    found = json.loads(done.output.splitlines()[-1])
    size = (folder / "outputs/audit/plan.json").stat().st_size
    return [
        Row("audit synthetic, the probe skipped", synthetic.seconds, "s"),
        Row("plan", plan.seconds, "s", note=f"{CLASSES:,} classes, {size / 1e6:.0f} MB"),
        at_most("the plan loads", found["seconds"], 5, "s"),
        at_most("  memory above the bare process", found["bytes"] / GIB, 1, "GiB"),
    ]


def _earlier_counts(folder: Path, size: int) -> None:
    """Saved counts of an earlier manifest: class 0 did not exist, class 1 had four times as many rows."""
    import duckdb

    with duckdb.connect() as db:
        db.execute(
            f"""copy (select label, any_value(class_name) as class_name, split, source,
                count(*) * case when label = 1 then 4 else 1 end as rows
            from read_parquet('{folder / "data" / "manifest.parquet"}') where label > 0
            group by label, split, source) to '{folder / "earlier.parquet"}' (format parquet)"""
        )


def _exact(folder: Path, size: int) -> list[Row]:
    """Counts against arithmetic: no sampling."""
    report = json.loads((folder / "outputs/validate/report.json").read_text(encoding="utf-8"))
    found = {(one["rule"], one["subject"].split(":")[0]): one["measured"] for one in report["findings"]}
    measured = {rule: value for (rule, _), value in found.items()}
    leaks = size // 1000  # i % 1000 == 21 repeats i - 1, which is for validation
    repeated = size // 1000  # i % 1000 == 7 repeats i - 1, for training too
    drift = pq.read_table(
        folder / "outputs/validate/drift.parquet", columns=["class_name", "kind"]
    ).to_pylist()
    changed = {one["class_name"]: one["kind"] for one in drift if one["kind"] != "same"}
    wanted_drift = {"class 0": "new", "class 1": "changed"} if size // CLASSES >= 40 else {"class 0": "new"}
    clean = pq.read_metadata(folder / "data/clean.parquet").num_rows
    exact = (
        measured["leakage.exact"] == leaks
        and measured["duplicates.exact"] == repeated
        and measured["validate.rows"] == leaks
        and clean == size - leaks
        and changed == wanted_drift
    )
    note = f"{leaks:,} leaks, {repeated:,} copies, {len(wanted_drift)} drifted classes planted"
    return [Row(f"  counts exact at {size / 1e6:.0f} M rows", float(exact), "", "1", exact, note)]


# -- near-duplicates

SEARCH = """
import sys, time
import numpy as np
from components.dataset.near import near_duplicates
from tests.conftest import bare
count = int(sys.argv[1])
random = np.random.default_rng(0)
hashes = random.integers(0, 2**64, count, dtype=np.uint64)
copies = count // 20  # of these, each within 0 to 8 bits of another
flips = np.zeros(copies, np.uint64)
for turn in range(8):
    bit = np.uint64(1) << random.integers(0, 64, copies).astype(np.uint64)
    flips ^= np.where(random.random(copies) < 0.5, bit, np.uint64(0))
hashes[-copies:] = hashes[:copies] ^ flips
looks = random.integers(0, 256, (count, 256), np.uint8)
looks[-copies:] = looks[:copies]
started = time.perf_counter()
pairs = near_duplicates(hashes, looks, np.zeros(count, np.int64), 6)
seconds = time.perf_counter() - started
found = set(zip(pairs.one.tolist(), pairs.other.tolist()))
sample = np.r_[np.arange(1000), random.integers(0, count, 1000)]
wrong = 0
for one in sample.tolist():
    near = np.flatnonzero(np.bitwise_count(hashes ^ hashes[one]) <= 6)
    near = near[(near != one) & (looks[near] == looks[one]).all(axis=1)]
    mine = {(one, int(other)) for other in near}
    wrong += mine != {pair for pair in found if pair[0] == one} if len(near) < 2 else 0
print(seconds, len(found) // 2, wrong)
"""


def _near(count: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder:
        env = {**os.environ, "PYTHONPATH": os.fspath(REPO_ROOT)}
        done = run([sys.executable, "-c", SEARCH, str(count)], Path(folder), env)
    if done.status != 0:
        raise SystemExit(f"the search for near-duplicates failed:\n{done.output[-2000:]}")
    seconds, pairs, wrong = (float(value) for value in done.output.split()[-3:])
    return [
        at_most(
            "near-duplicates within 6 bits, 1 M hashes", seconds, 60, "s", f"{pairs:,.0f} pairs confirmed"
        ),
        at_most("  peak memory", done.peak_bytes / GIB, 2, "GiB"),
        at_most("  images that differ from brute force", wrong, 0, "", "of 2,000"),
    ]


# -- image checks


def _images(count: int = 3_000, repeats: int = 3) -> list[Row]:
    """The rate of ``inspect_all``, cache and all, against decoding alone; turn and turn about."""
    from sklearn.datasets import load_sample_images

    from components.dataset.inspection import inspect_all

    cores = len(os.sched_getaffinity(0))
    random = np.random.default_rng(0)
    ratios, rates = [], []
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as name:
        root = Path(name)
        pictures = [Image.fromarray(pixels) for pixels in load_sample_images().images]
        paths = [f"{number}.jpg" for number in range(count)]
        for number, path in enumerate(paths):
            left, top = (int(random.integers(0, side)) for side in (140, 50))
            picture = pictures[number % 2].crop((left, top, left + 500, top + 375))
            picture.save(root / path, quality=90)

        def bare(path: str) -> None:
            with Image.open(root / path) as image:
                image.convert("RGB")

        before = os.environ.get("RETORT_STATE")
        for turn in range(repeats):
            os.environ["RETORT_STATE"] = os.fspath(root / f"state{turn}")
            started = time.perf_counter()
            with ThreadPoolExecutor(cores) as pool:
                list(pool.map(bare, paths))
            middle = time.perf_counter()
            inspect_all(os.fspath(root), paths)
            ended = time.perf_counter()
            ratios.append((middle - started) / (ended - middle))
            rates.append(count / (ended - middle))
        os.environ.pop("RETORT_STATE")
        if before is not None:
            os.environ["RETORT_STATE"] = before
    note = f"{statistics.median(rates):.0f} images/s of 500 x 375 on {cores} cores, median of {repeats}"
    return [at_least("image checks to bare decoding", statistics.median(ratios), 0.8, "x", note)]


# -- quality


DAMAGE = {
    "blurry": lambda image: image.filter(ImageFilter.GaussianBlur(0.05 * min(image.size))),
    "dark": lambda image: image.point([int(0.15 * level) for level in range(256)]),
    "light": lambda image: image.point([min(255, 4 * level) for level in range(256)]),
    "information": lambda image: image.point([255 * (level > 127) for level in range(256)]),
    "flat": lambda image: image.point([120 + level // 12 for level in range(256)]),
}


def _quality(count: int = 3_000) -> list[Row]:
    """Shares named of clean images, and of damaged ones: one in 100, one in 10, one in 3, and a class."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    sets = {"8 x 8 digits": ((digits.images * 255 / 16).astype(np.uint8), digits.target)}
    if fashion.there("quality of Fashion-MNIST"):
        pixels, labels = fashion.read()
        sets["Fashion-MNIST"] = (pixels[:count], labels[:count])
    rows = []
    for name, (pixels, labels) in sets.items():
        clean = _measures([Image.fromarray(one) for one in pixels])
        named = _named(clean, labels)
        worst = int(np.argmax(named.mean(axis=0)))
        note = f"of {len(clean):,} images; the most: {CHECKS[worst].rule}"
        rows.append(
            at_most(f"quality, {name}: clean images named", 100 * named[:, worst].mean(), 0.5, "%", note)
        )
        for place, (kind, damage) in enumerate(DAMAGE.items()):
            if min(pixels.shape[1:]) < 16 and kind in ("blurry", "light"):
                continue  # 8 pixels: 5 % of them is no blur, and strokes are white anyway
            bad = _measures([damage(Image.fromarray(one)) for one in pixels])
            recalls = {}
            for share in ("1 %", "10 %", "33 %", "a class"):
                struck = labels == 0
                if share != "a class":
                    struck = np.random.default_rng(0).random(len(labels)) < int(share[:-2]) / 100
                mixed = np.where(struck[:, None], bad, clean)
                recalls[share] = _named(mixed, labels)[struck, place].mean()
            note = ", ".join(f"{share}: {recall:.3f}" for share, recall in recalls.items())
            least = min(recalls["1 %"], recalls["10 %"])
            rows.append(at_least(f"  recall of {kind} ones at 1 and 10 %", least, 0.9, "", note))
    return rows


def _measures(pictures: list[Image.Image]) -> np.ndarray:
    blobs = b"".join(quality.measure(picture) for picture in pictures)
    return np.frombuffer(blobs, np.float32).reshape(len(pictures), -1).astype(np.float64)


def _named(measures: np.ndarray, labels: np.ndarray) -> np.ndarray:
    same = np.zeros(len(labels), np.int64)
    verdicts = [judge(check, measures[:, place], labels, same) for place, check in enumerate(CHECKS)]
    return np.stack([verdict.named for verdict in verdicts], axis=1)


# -- planted copies


def _planted(seeds: int, train: int = 20_000, held: int = 10_000) -> list[Row]:
    if not fashion.there("planted copies"):
        return []
    pixels, labels = fashion.read()
    rows = []
    recalls: dict[str, list[float]] = {"duplicates": [], "leakage": []}
    false: list[float] = []
    for seed in range(seeds):
        random = np.random.default_rng(seed)
        chosen = np.r_[random.permutation(60_000)[:train], 60_000 + random.permutation(10_000)[:held]]
        with tempfile.TemporaryDirectory(prefix="retort-bench-") as name:
            folder = Path(name)
            (folder / "params.yaml").write_text("{}\n", encoding="utf-8")
            for place, number in enumerate(chosen):
                split = "train" if place < train else "val"
                path = folder / "images" / split / str(labels[number]) / f"{number:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[number]).save(path)
            untouched = _cases(folder)
            leaked = {(path, other) for rule, path, other in untouched if rule == "leakage.near"}
            false.append(len({other for _, other in leaked}) / held)
            if seed == 0:
                _show_pairs(folder, sorted(leaked))
            planted = _plant(folder, chosen, labels, random, train, held)
            found = _cases(folder)
            for kind, rules in (("duplicates", "duplicates"), ("leakage", "leakage")):
                named = {path for rule, path, _ in found if rule.startswith(rules)}
                recalls[kind].append(len(named & planted[kind]) / len(planted[kind]))
    images = f"{train + held:,} images, {seeds} seeds, worst"
    for kind, values in recalls.items():
        rows.append(at_least(f"recall of planted {kind}", min(values), 0.95, "", f"{images}; 3 % planted"))
    note = "all of them: a person judges outputs/bench/untouched_pairs.png, 1 ‰ may look different"
    rows.append(Row("validation images in pairs, untouched", 1000 * max(false), "‰", note=note))
    return rows


def _cases(folder: Path) -> set[tuple[str, str, str]]:
    options = ["-o", "data.source=images", "-o", "data.root=images", "-o", "report.thumbnails=false"]
    _retort(folder, *options, "ingest")
    _retort(folder, *options, "validate")
    table = pq.read_table(folder / "outputs/validate/findings.parquet").to_pylist()
    return {(one["rule"], one["path"], one["other"]) for one in table}


def _plant(
    folder: Path, chosen: np.ndarray, labels: np.ndarray, random: np.random.Generator, train: int, held: int
) -> dict[str, set[str]]:
    """3 % copies of training images, and as many of validation images, at another size and quality."""
    count = int(0.03 * train)
    planted: dict[str, set[str]] = {"duplicates": set(), "leakage": set()}
    for kind, split, pool in (("duplicates", "train", chosen[:train]), ("leakage", "val", chosen[-held:])):
        for number in random.permutation(pool)[:count]:
            source = folder / "images" / split / str(labels[number]) / f"{number:05d}.png"
            side, quality = int(random.choice([20, 24, 36, 42, 56])), int(random.integers(60, 96))
            with Image.open(source) as image:
                copy = image.resize((side, side), Image.Resampling.BICUBIC)
            path = f"train/{labels[number]}/zz_{kind}_{number:05d}.jpg"
            copy.save(folder / "images" / path, quality=quality)
            planted[kind].add(path)
    return planted


def _show_pairs(folder: Path, pairs: list[tuple[str, str]]) -> None:
    """The pairs side by side, for a person to judge."""
    sheet = Image.new("L", (10 * 124, max(1, -(-len(pairs) // 10)) * 64), 255)
    for place, pair in enumerate(pairs[:400]):
        for side, path in enumerate(pair):
            with Image.open(io.BytesIO((folder / "images" / path).read_bytes())) as image:
                big = image.resize((56, 56), Image.Resampling.NEAREST)
            sheet.paste(big, (place % 10 * 124 + side * 58, place // 10 * 64))
    target = REPO_ROOT / "outputs" / "bench" / "untouched_pairs.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(target)

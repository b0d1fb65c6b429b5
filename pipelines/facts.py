"""What ``retort init`` sees before it proposes: the images, by their names and a sample, and the machine."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.compute as pc

from components.common.environment import cores
from components.common.errors import ImageError, RetortError
from components.common.progress import counted
from components.dataset import images, manifest, sources
from components.dataset.columns import matches
from components.dataset.params import Data, IngestParams
from components.dataset.sources.found import Rejected, matcher

log = logging.getLogger(__name__)

SAMPLE = 300  # images whose header is read
FETCHED = 16  # ... of a bucket, where each is fetched whole
TIMED = 8  # of them decoded, to see how long one takes


@dataclass(frozen=True)
class DataFacts:
    """The images. Splits are zero where the source makes none; ``side`` is their median shorter side, px."""

    classes: int
    labelled: int  # real ones
    smallest: int  # of a class: its real images (for training, where the source has splits)
    largest: int
    side: int
    decode_seconds: float = 0.002  # of one image
    validation: int = 0
    test: int = 0
    unlabelled: int = 0
    synthetic: int = 0


@dataclass(frozen=True)
class MachineFacts:
    """The machine: cores that this process may use, and GPUs that PyTorch or the driver sees."""

    cores: int
    gpus: int = 0


def look(data: Data) -> DataFacts:
    """Count what ``data.source`` holds, and open a sample of it.

    Raises:
        RetortError: when there is nothing to read, or nothing of the sample lies where it should.
    """
    started = time.monotonic()
    log.info(
        f"looking at {data.source if isinstance(data.source, str) else ', '.join(data.source.values())} ..."
    )
    with _state():
        found = sources.read(IngestParams(data=data))
        counts, paths, lost = _counted(found, data)
        if not paths:
            where, why = lost[0]
            entries = counted(len(lost), "entry", "entries")
            raise RetortError(f"{data.source}: none of {entries} can be used: {where}: {why}")
        labelled: Counter[str] = Counter()
        splits: Counter[str] = Counter()
        unlabelled = synthetic = 0
        for (name, split, real), count in counts.items():
            if name is None or split == "unlabeled":
                unlabelled += count
            elif not real:
                synthetic += count
            else:
                splits[split or ""] += count
                labelled[name] += 0 if split in ("val", "test") else count
        side, seconds = _opened(paths, data)
    rows = splits.total()
    if time.monotonic() - started > 2:
        log.info(f"{rows + unlabelled + synthetic:,} images in {time.monotonic() - started:.0f} s")
    return DataFacts(
        classes=len(labelled),
        labelled=rows,
        smallest=min(labelled.values(), default=0),
        largest=max(labelled.values(), default=0),
        side=side,
        decode_seconds=seconds,
        validation=splits["val"],
        test=splits["test"],
        unlabelled=unlabelled,
        synthetic=synthetic,
    )


def machine() -> MachineFacts:
    """Cores by the scheduler's and the container's limits; GPUs that this PyTorch can use."""
    return MachineFacts(cores(), _gpus() if shutil.which("nvidia-smi") else 0)


def _gpus() -> int:
    """GPUs that PyTorch sees; a line if the driver has some that it does not see."""
    import torch

    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    there = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    usable = torch.cuda.device_count()
    if there and not usable:
        why = "is built without CUDA" if torch.version.cuda is None else "may use none of them"
        log.warning(f"the driver lists {counted(there, 'GPU')}, but this PyTorch {why}: the CPU is proposed")
    return usable


@contextmanager
def _state() -> Iterator[None]:
    """What a store sends while we look is kept nowhere: there is no project yet."""
    before = os.environ.get("RETORT_STATE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RETORT_STATE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["RETORT_STATE"]
            else:
                os.environ["RETORT_STATE"] = before


Kind = tuple[str | None, str | None, bool]  # class, split, real


def _counted(found: sources.Found, data: Data) -> tuple[Counter[Kind], list[str], Rejected]:
    """Rows of each kind, a sample of paths that is spread over all of them, and what is no row and why."""
    made_up = matcher([*data.synthetic, *data.semi_synthetic])
    unlabeled = matcher(data.unlabeled)
    counts: Counter[Kind] = Counter()
    sample: list[str] = []
    lost = list(found.rejected)
    for columns, rejected in found.portions(["path", "below", "label", "class_name", "split", "source"]):
        lost += rejected
        below, size = columns["below"], len(columns["path"])
        names = pc.coalesce(columns["class_name"], columns["label"].cast("string"))
        real = pc.fill_null(pc.equal(columns["source"], "real"), True)
        if made_up:
            real = pc.and_(real, pc.invert(matches(made_up, below)))
        if unlabeled:
            names = pc.if_else(matches(unlabeled, below), None, names)
        table = pa.table({"name": names, "split": columns["split"], "real": real})
        for row in table.group_by(table.column_names).aggregate([([], "count_all")]).to_pylist():
            counts[row["name"], row["split"], row["real"]] += row["count_all"]
        sample += columns["path"][:: max(1, size // SAMPLE)].to_pylist()
    return counts, sample[:: max(1, len(sample) // SAMPLE)][:SAMPLE], lost


def _opened(paths: list[str], data: Data) -> tuple[int, float]:
    """Median shorter side of these images, in pixels, and median seconds to decode one."""
    if any("://" in path for path in paths):
        paths = paths[:: max(1, len(paths) // FETCHED)][:FETCHED]
    sides = [side for path in paths if (side := _side(path, data.root))]
    if not sides:
        raise RetortError(
            f"{data.source}: none of {len(paths)} images that were tried can be read, such as {paths[0]} "
            f"below {data.root};\ngive the folder where the paths begin: -o data.root=FOLDER"
        )
    taken = []
    for path in paths[:: max(1, len(paths) // TIMED)][:TIMED]:
        started = time.perf_counter()
        try:
            images.load_rgb(data.root, path, 64)
        except ImageError:
            continue
        taken.append(time.perf_counter() - started)
    return int(median(sides)), median(taken or [0.002])


def _side(path: str, root: str) -> int | None:
    """The shorter side of an image by its header; None when it cannot be read."""
    from PIL import Image

    if "://" in path:
        try:
            return min(images.open_header(images.read_bytes(root, path)).size)
        except ImageError:
            return None
    place = Path(manifest.image_path(root, path))
    try:
        if not place.is_file():
            return None
        with Image.open(place, formats=images.FORMATS) as image:
            return min(image.size)
    except Exception:  # noqa: BLE001 - a hostile header may raise anything; validate says which and why
        return None

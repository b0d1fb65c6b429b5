"""Champion and challenger on the same images, now: which images, what both say, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from components.benchmark.timing import Timing, ratio
from components.common.environment import cores
from components.common.progress import track
from components.dataset import manifest as manifests
from components.dataset.images import Images, central_square, pins
from components.export import exported as exports
from components.registry.decision import Facts, Latency, Outcomes

BATCH = 64
ROUNDS = 15  # of latency, both models in each
ROUND_SECONDS = 0.02  # of one model in a round, at least
CALLS = 3  # in a round, at least
ALPHA = 0.05  # of recognising a new class better than by chance
SAID = tuple(f"{whose}{what}" for whose in ("champion", "challenger") for what in ("", "_score", "_right"))
# of the manifest: what tells images apart in another way here, or does not tell them apart at all
NO_SLICE = ("path", "label", "class_name", "split", "group", "width", "height", "bytes", "sha256", "phash")


@dataclass(frozen=True)
class Chosen:
    """The rows of the present manifest that both are judged by, and those that were left out.

    Attributes:
        table: as in the manifest.
        frozen: bool [n], of the champion's own validation split; None: its version does not say.
        gone, moved: images of that split that are no longer there, or in another split now.
        relabelled: images of it that have another class now.
        suspects: new validation images whose label the audit suspects.
        trained: new validation images that the champion has trained on.
    """

    table: pa.Table
    frozen: NDArray[np.bool_] | None
    gone: int = 0
    moved: int = 0
    relabelled: int = 0
    suspects: int = 0
    trained: int = 0


def choose(manifest: Path, samples: Path, kept: Path | None) -> Chosen:
    """The champion's validation split, and new validation rows that nothing speaks against.

    Args:
        manifest: the clean manifest, of now.
        samples: the audit's ``samples.parquet``.
        kept: the champion's own clean manifest; None: its version has none.
    """
    manifests.check(manifest)
    with manifests.whole(manifest):
        table = _named(pq.read_table(manifest))
    split, name, sha256 = (_column(table, key) for key in ("split", "class_name", "sha256"))
    validation = split == "val"
    suspect = validation & _among(_column(table, "path"), _suspects(samples))
    if kept is None:
        keep = validation & ~suspect
        return Chosen(table.filter(pa.array(keep)), None, suspects=int(suspect.sum()))
    old = _named(manifests.read(kept, ["sha256", "split", "label", "class_name"])).filter(
        pc.is_valid(pc.field("sha256"))  # what has no hash cannot be found again
    )
    judged = old.filter(pc.field("split") == "val")
    names = dict(zip(judged["sha256"].to_pylist(), judged["class_name"].to_pylist(), strict=True))
    known = _among(sha256, names)
    found = set(sha256[known].tolist())
    frozen = validation & known
    same = np.zeros(len(name), bool)
    same[known] = [name[row] == names[sha256[row]] for row in np.flatnonzero(known)]
    new = validation & ~known
    learnt = old.filter(pc.field("split") == "train")["sha256"].to_pylist()
    trained = new & _among(sha256, set(learnt))
    keep = (frozen & same) | (new & ~suspect & ~trained)
    return Chosen(
        table=table.filter(pa.array(keep)), frozen=frozen[keep], gone=len(names) - len(found),
        moved=len(found) - len(set(sha256[frozen].tolist())), relabelled=int((frozen & ~same).sum()),
        suspects=int((new & suspect & ~trained).sum()), trained=int(trained.sum()),
    )  # fmt: skip


def _named(table: pa.Table) -> pa.Table:
    """The table with a name for each row's class: that of its label where it has none."""
    name, label = table["class_name"], pc.cast(table["label"], pa.string())
    unnamed = pc.equal(pc.fill_null(name, ""), "")
    place = table.schema.get_field_index("class_name")
    return table.set_column(place, "class_name", pc.if_else(unnamed, label, name))


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    return table[name].to_numpy(zero_copy_only=False)


def _among(values: NDArray[Any], these: Any) -> NDArray[np.bool_]:
    return np.fromiter((value in these for value in values), bool, len(values))


def _suspects(samples: Path) -> set[str]:
    """Paths whose label the audit suspects."""
    listed = pq.read_table(samples, columns=["rule", "path"])
    if not len(listed):
        return set()  # of no rows, the columns have no type
    return set(listed.filter(pc.field("rule") == "labels.suspect")["path"].to_pylist())


class Opened(NamedTuple):
    """An exported model that can be asked."""

    path: Path
    session: Any
    about: exports.Exported

    def scores(self, squares: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Scores [n, classes] of uint8 [n, size, size, 3]."""
        return exports.run(self.session, self.about.feed(squares))


def opened(path: Path, threads: int = 0) -> Opened:
    """Raises RetortError when it is no exported model of ours."""
    session = exports.session(path, threads)
    return Opened(path, session, exports.describe(session, path))


@dataclass(frozen=True)
class Compared:
    """What both said of each image, and all else that is decided by.

    Attributes:
        table: ``outcomes.parquet``, a row an image.
        outcomes: of the images whose class the champion knows.
        new: recall of the challenger by class that only it knows, with the number of images.
    """

    chosen: Chosen
    table: pa.Table
    outcomes: Outcomes
    facts: Facts
    new: dict[str, tuple[int, float]]


def compare(
    champion: Path, challenger: Path, chosen: Chosen, root: str, budget: tuple[float, float] | None = None
) -> Compared:
    """Ask both about every image, and measure both side by side.

    Args:
        champion, challenger: exported models.
        root: ``data.root``.
        budget: milliseconds that one image may take, and that the benchmark measured of the challenger.

    Raises:
        RetortError: a file is no exported model of ours.
        ImageError: an image cannot be read, or is no longer the manifest's.
    """
    both = opened(champion), opened(challenger)
    table = _answers(both, chosen, root)
    before, now = (one.about.class_names for one in both)
    names = _column(table, "class_name")
    known = np.isin(names, before)
    right = _column(table, "challenger_right")
    new = {
        name: (int((names == name).sum()), float(right[names == name].mean()))
        for name in now
        if name not in before and (names == name).any()
    }
    facts = Facts(
        lost=[name for name in before if name not in now],
        gained=[name for name, (images, recall) in new.items() if _known(images, recall, len(now))],
        size=challenger.stat().st_size / champion.stat().st_size,
        latency=side_by_side(champion, challenger),
        budget_ms=budget[0] if budget else None,
        p50_ms=budget[1] if budget else None,
    )
    return Compared(chosen, table, _outcomes(table.filter(pa.array(known)), chosen), facts, new)


def _known(images: int, recall: float, classes: int) -> bool:
    """Whether a class is recognised more often than by naming one of the classes at random."""
    from scipy.stats import binomtest

    right = round(images * recall)
    return bool(binomtest(right, images, 1 / classes, alternative="greater").pvalue < ALPHA)


def _answers(both: tuple[Opened, Opened], chosen: Chosen, root: str) -> pa.Table:
    """The rows that were judged, with what each model said and what was measured of the picture."""
    rows = chosen.table
    images = Images(root, rows["path"].to_pylist(), pins(rows))
    said: list[list[NDArray[Any]]] = [[], []]
    sizes = [one.about.size for one in both]
    pictures: list[_Picture] = []
    batches = track(_pictures(images, sizes), "champion and challenger", -(-rows.num_rows // BATCH))
    for batch in batches:
        pictures += [picture._replace(squares={}) for picture in batch]
        for one, answers in zip(both, said, strict=True):
            answers.append(one.scores(np.stack([picture.squares[one.about.size] for picture in batch])))
    names = rows["class_name"].to_pylist()
    columns: dict[str, Any] = {
        **{name: rows[name] for name in ("path", "sha256", "class_name", "group", "source", "bytes")},
        **{name: rows[name] for name in rows.column_names if name not in (*NO_SLICE, "source")},
        "frozen": pa.array([None] * len(names) if chosen.frozen is None else chosen.frozen, pa.bool_()),
        "width": [picture.width for picture in pictures],
        "height": [picture.height for picture in pictures],
        "brightness": [picture.brightness for picture in pictures],
        "contrast": [picture.contrast for picture in pictures],
    }
    for whose, one, parts in zip(("champion", "challenger"), both, said, strict=True):
        scores = np.concatenate(parts) if parts else np.zeros((0, len(one.about.class_names)))
        best = scores.argmax(axis=1) if len(scores) else np.zeros(0, int)
        answers = [one.about.class_names[index] for index in best.tolist()]
        columns[whose] = pa.array(answers, pa.string())
        columns[f"{whose}_score"] = scores[np.arange(len(best)), best].astype(np.float32)
        columns[f"{whose}_right"] = np.array([a == b for a, b in zip(answers, names, strict=True)], bool)
    return pa.table(columns)


class _Picture(NamedTuple):
    """One image: its central squares by side, its size, mean and spread of its grey levels, 0..255."""

    squares: dict[int, NDArray[np.uint8]]
    width: int
    height: int
    brightness: float
    contrast: float


def _pictures(images: Images, sizes: list[int]) -> Iterator[list[_Picture]]:
    """All images, decoded once, ``BATCH`` at a time."""

    def picture(number: int) -> _Picture:
        image = images.whole(number)
        squares = {size: central_square(image, size) for size in set(sizes)}
        grey = np.asarray(image.resize((64, 64)).convert("L"), np.float32)
        return _Picture(squares, *image.size, float(grey.mean()), float(grey.std()))

    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes and resizes without the interpreter's lock
        for start in range(0, len(images.paths), BATCH):
            yield list(pool.map(picture, range(start, min(start + BATCH, len(images.paths)))))


def _outcomes(table: pa.Table, chosen: Chosen) -> Outcomes:
    """What is decided by, of the rows whose class the champion knows."""
    width, height = (_column(table, name).astype(np.float64) for name in ("width", "height"))
    columns: dict[str, NDArray[Any]] = {
        "short side": np.minimum(width, height),
        "aspect": np.round(width / np.maximum(height, 1), 3),
        **{name: _column(table, name) for name in ("source", "brightness", "contrast")},
        "file size": np.array([np.nan if b is None else b for b in table["bytes"].to_pylist()], float),
        "folder": np.array([path.rpartition("/")[0] for path in table["path"].to_pylist()], object),
    }
    own = {*columns, *NO_SLICE, *SAID, "frozen"}
    columns |= {name: _column(table, name) for name in table.column_names if name not in own}
    frozen = None
    if chosen.frozen is not None:
        frozen = _column(table, "frozen").astype(bool)
        columns["validation rows"] = np.where(frozen, "the champion's split", "new")
    groups, group = None, table["group"].to_pylist()
    if any(name is not None for name in group):
        columns["group"] = np.array(group, object)
        alone = (f"row {row}" if name is None else f"group {name}" for row, name in enumerate(group))
        groups = np.unique(list(alone), return_inverse=True)[1].astype(np.int64)
    return Outcomes(
        classes=_column(table, "class_name"), champion=_column(table, "champion_right").astype(bool),
        challenger=_column(table, "challenger_right").astype(bool), groups=groups, frozen=frozen,
        columns=columns,
    )  # fmt: skip


def side_by_side(champion: Path, challenger: Path) -> Latency:
    """Time of one image on one thread, challenger over champion; rounds of both take turns."""
    runs = []
    for path in (champion, challenger):
        model = opened(path, threads=1)
        size = model.about.size
        fed = model.about.feed(np.full((1, size, size, 3), 127, np.uint8))
        exports.run(model.session, fed)
        runs.append((model.session, fed, Timing()))
    for number in range(ROUNDS):
        for session, fed, timing in runs if number % 2 else runs[::-1]:
            calls: list[float] = []
            until = time.perf_counter() + ROUND_SECONDS
            while len(calls) < CALLS or time.perf_counter() < until:
                begun = time.perf_counter()
                exports.run(session, fed)
                calls.append(time.perf_counter() - begun)
            timing.rounds.append(calls)
    return Latency(*ratio(runs[1][2], runs[0][2]))

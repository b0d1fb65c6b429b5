"""What the teacher says about every image: computed once per view, kept on disk, looked up by row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from components.common.errors import RetortError
from components.common.storage import atomic_path, remove, sha256_json
from components.dataset import images
from components.models.card import ModelCard
from components.training import augmentation, seals
from components.training.context import Exchange
from components.training.group import Group
from components.training.inputs.feed import Feed
from components.training.precision import Precision
from components.training.sampling import in_order
from components.training.teacher import Teacher

SEAL = "seal.json"  # beside the arrays: their sizes and checksums
ALL_CLASSES = 1000  # up to so many classes a soft label is kept whole
CHUNK = 16_384  # rows of a file: each is written once, and found again by any number of workers


def kept_classes(class_num: int, top_k: int | None) -> int:
    """How many classes of a soft label are stored."""
    return min(class_num, top_k or ALL_CLASSES)


def stored_bytes(images: int, class_num: int, top_k: int | None) -> int:
    """Disk that the soft labels of one view take."""
    kept = kept_classes(class_num, top_k)
    return images * (8 + kept * (2 if kept == class_num else 6))


def key(
    card: ModelCard, data: str, rows: np.ndarray, view: Sequence[object], kept: int, precision: Precision
) -> str:
    """What decides soft labels, as the name of their folder: all that the teacher is and sees, and our code.

    Args:
        data: the fingerprint of the manifest.
        view: size, number, augmentation and seed.
        precision: how the teacher computes, and on what kind of device: views are made there, too.
    """
    values = {
        "teacher": [card.sha256, card.mean, card.std, card.input_size],
        "data": data,
        "rows": hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").data).hexdigest(),
        "view": view,
        "kept": kept,
        "precision": [precision.device.type, precision.bf16],
        "code": [torch.__version__, version("timm"), images.decoder(), augmentation.VERSION, CHUNK],
    }
    return sha256_json(values)[:32]


class SoftLabels:
    """Stored probabilities of some rows: a folder with ``rows.npy``, chunks of both arrays, and a seal.

    ``00000-prob.npy`` is float16 [n, k]; ``00000-index.npy`` int32 [n, k] names the classes, and is absent
    when all are kept. What the k classes leave is spread evenly over the others, so that a label always sums
    to one.
    """

    def __init__(self, folder: Path) -> None:
        self.rows: np.ndarray = np.load(folder / "rows.npy", mmap_mode="r")  # ascending
        count = -(-len(self.rows) // CHUNK)
        self._prob = [np.load(_prob(folder, chunk), mmap_mode="r") for chunk in range(count)]
        self.whole = not _index(folder, 0).exists()
        self._index = (
            [] if self.whole else [np.load(_index(folder, chunk), mmap_mode="r") for chunk in range(count)]
        )

    def take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """``prob`` float16 [B, k] and, unless all classes are kept, ``index`` int32 [B, k] of some rows."""
        at = np.searchsorted(self.rows, rows)
        assert (self.rows[np.minimum(at, len(self.rows) - 1)] == rows).all(), "a row without a soft label"
        taken = {"prob": _gathered(self._prob, at)}
        if not self.whole:
            taken["index"] = _gathered(self._index, at)
        return taken

    def surest(self) -> tuple[np.ndarray, np.ndarray]:
        """The class that the teacher is surest of, int64 [n], and how sure it is, float32 [n]."""
        classes, confidence = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for chunk, prob in enumerate(self._prob):
            best = prob.argmax(axis=1)
            confidence.append(np.take_along_axis(prob, best[:, None], 1)[:, 0].astype(np.float32))
            if not self.whole:
                best = np.take_along_axis(self._index[chunk], best[:, None], 1)[:, 0]
            classes.append(best.astype(np.int64))
        return np.concatenate(classes), np.concatenate(confidence)


def dense(taken: dict[str, Tensor], class_num: int) -> Tensor:
    """Probabilities float32 [B, C] from what ``SoftLabels.take`` gave, on the device where that lies."""
    prob = taken["prob"].float()
    if "index" not in taken:
        return prob / prob.sum(1, keepdim=True)
    rest = (1 - prob.sum(1, keepdim=True)).clamp_min(0) / max(1, class_num - prob.shape[1])
    full = rest.expand(-1, class_num).clone().scatter_(1, taken["index"].long(), prob)
    return full / full.sum(1, keepdim=True)


def _gathered(chunks: list[np.ndarray], at: np.ndarray) -> np.ndarray:
    result = np.empty((len(at), *chunks[0].shape[1:]), chunks[0].dtype)
    places = at // CHUNK
    for place in np.unique(places).tolist():
        here = places == place
        result[here] = chunks[place][at[here] - place * CHUNK]
    return result


def _names(folder: Path, chunk: int, whole: bool) -> list[Path]:
    """The files of a chunk, in the order in which they are written."""
    return [_prob(folder, chunk)] if whole else [_index(folder, chunk), _prob(folder, chunk)]


def _here(paths: Sequence[Path], exchange: Exchange | None) -> bool:
    """Whether files are there, or could be fetched from another node."""
    return all(path.exists() or (exchange is not None and exchange.fetch(path)) for path in paths)


def _prob(folder: Path, chunk: int) -> Path:
    return folder / f"{chunk:05}-prob.npy"


def _index(folder: Path, chunk: int) -> Path:
    return folder / f"{chunk:05}-index.npy"


class Answers:
    """The teacher's answers as a task asks for them: from the caches of its crops, or from itself.

    Args:
        crops: soft labels of each augmented view; empty: the teacher is asked at every step.
    """

    def __init__(self, teacher: Teacher, crops: list[SoftLabels]) -> None:
        self.teacher, self.crops = teacher, crops

    def take(self, rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        """What is stored about views of rows; see ``SoftLabels.take``."""
        if not self.crops:
            return {}
        if len(self.crops) == 1:
            return self.crops[0].take(rows)
        result: dict[str, np.ndarray] = {}
        for crop in np.unique(views).tolist():
            here = views == crop
            for name, part in self.crops[crop].take(rows[here]).items():
                whole = result.setdefault(name, np.empty((len(rows), part.shape[1]), part.dtype))
                whole[here] = part
        return result

    def dense(self, taken: dict[str, Tensor]) -> Tensor:
        """Probabilities float32 [B, C] of what ``take`` gave."""
        return dense(taken, len(self.teacher.card.class_names))


def make(
    folder: Path,
    teacher: Teacher,
    feed: Feed,
    rows: np.ndarray,
    view: int,
    kept: int,
    batch_size: int,
    group: Group,
    advance: Callable[[int], None],
    note: Callable[[str], None],
    exchange: Exchange | None = None,
) -> SoftLabels:
    """Ask the teacher about one view of each row, each worker about its share, and keep the answers.

    A folder that is there already is read instead, unless it is damaged; one that an interrupted run left is
    gone on with. Every worker must call this in the same order.

    Args:
        rows: int64, ascending.
        kept: classes kept of each answer.
        advance: told how many images this worker has done.
        note: told what a person should know.
    """
    have = usable(folder, note) if group.leads else True
    if not all(group.gather(have)):
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        teacher.assert_frozen()
        asker = _Asker(teacher, feed, view, kept, batch_size, advance)
        chunks = range(-(-len(rows) // CHUNK))
        names = [_names(partial, chunk, asker.whole) for chunk in chunks]
        alone = len(chunks) // group.world * group.world  # what is left of them is made by all together
        for chunk in [*chunks[:alone][group.rank :: group.world], *chunks[alone:]]:
            part = rows[chunk * CHUNK : (chunk + 1) * CHUNK]
            together = chunk >= alone
            there = (not together or group.rank == 0) and _here(names[chunk], exchange)
            if group.agree(there) if together else there:
                advance(len(part[group.rank :: group.world]) if together else len(part))
                continue
            answers = asker.share(part, group) if together else asker(part)
            if answers is not None:
                _write(partial, chunk, *answers)
                if exchange is not None:
                    for path in names[chunk]:
                        exchange.publish(path)
        group.barrier()
        if group.leads:
            if not have:
                _need_all(names, exchange)
            _finish(partial, folder, rows)
        group.barrier()
    else:
        advance(len(rows[group.rank :: group.world]))
    return SoftLabels(folder)


def _need_all(names: Sequence[Sequence[Path]], exchange: Exchange | None) -> None:
    missing = [path.name for paths in names for path in paths if not _here([path], exchange)]
    if missing:
        raise RetortError(
            f"soft labels that another worker has made are not on this node ({missing[0]}); set ray.storage, "
            "and run the same command again"
        )


def usable(folder: Path, note: Callable[[str], None]) -> bool:
    """Whether stored soft labels are there and whole. Damaged ones are removed, and ``note`` is told."""
    if not folder.exists():
        return False
    fault = seals.fault(folder / SEAL, folder)
    if fault is None:
        return True
    note(f"{folder}: {fault}; the teacher is asked again")
    remove(folder)
    return False


@dataclass(frozen=True)
class _Asker:
    """Asks the teacher about one view of some rows."""

    teacher: Teacher
    feed: Feed
    view: int
    kept: int
    batch_size: int
    advance: Callable[[int], None]

    @property
    def whole(self) -> bool:
        """Whether all classes are kept."""
        return self.kept == len(self.teacher.card.class_names)

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Probabilities float16 [n, k] and, unless all are kept, their classes int32 [n, k]."""
        prob = np.empty((len(rows), self.kept), np.float16)
        index = None if self.whole else np.empty((len(rows), self.kept), np.int32)
        done = 0
        for top, classes, copied in _one_behind(self._answers(rows)):
            if copied is not None:
                copied.synchronize()
            here = slice(done, done + len(top))
            prob[here] = top.numpy()
            if index is not None and classes is not None:
                index[here] = classes.numpy()
            done = here.stop
            self.advance(len(top))
        return prob, index

    def share(self, rows: np.ndarray, group: Group) -> tuple[np.ndarray, np.ndarray | None] | None:
        """The same, each worker asking about every so-many-th row; rank 0 has all of it, others None."""
        shares = group.gather(self(rows[group.rank :: group.world]))
        if group.rank:
            return None
        prob = np.empty((len(rows), self.kept), np.float16)
        index = None if self.whole else np.empty((len(rows), self.kept), np.int32)
        for rank, (top, classes) in enumerate(shares):
            prob[rank :: group.world] = top
            if index is not None and classes is not None:
                index[rank :: group.world] = classes
        return prob, index

    def _answers(self, rows: np.ndarray) -> Iterator[_Copied]:
        for batch in self.feed(in_order(rows, self.batch_size, self.view)):
            prob = self.teacher(batch.pixels).probabilities
            if self.whole:
                yield _copied(prob.half(), None)
            else:
                top, classes = prob.topk(self.kept, dim=1)
                yield _copied(top.half(), classes.int())


_Copied = tuple[Tensor, Tensor | None, torch.cuda.Event | None]


def _copied(top: Tensor, classes: Tensor | None) -> _Copied:
    """Answers on their way to the host, and the event after which they are there."""
    if top.device.type == "cpu":
        return top, classes, None
    here = [None if part is None else part.to("cpu", non_blocking=True) for part in (top, classes)]
    event = torch.cuda.Event()
    event.record()
    assert here[0] is not None
    return here[0], here[1], event


def _one_behind(values: Iterable[_Copied]) -> Iterator[_Copied]:
    """The same, each when the next one has been asked for: a GPU works on while the host takes one."""
    held: _Copied | None = None
    for value in values:
        if held is not None:
            yield held
        held = value
    if held is not None:
        yield held


def _write(folder: Path, chunk: int, prob: np.ndarray, index: np.ndarray | None) -> None:
    if index is not None:  # first: where there is a chunk's prob, all of it is there
        _save(_index(folder, chunk), index)
    _save(_prob(folder, chunk), prob)


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def _finish(partial: Path, folder: Path, rows: np.ndarray) -> None:
    """Seal what all have written."""
    if folder.exists():  # it was here already, and made for nodes that had none
        remove(partial)
        return
    _save(partial / "rows.npy", rows.astype(np.int64))
    seals.write(partial / SEAL, sorted(partial.glob("*.npy")))
    partial.rename(folder)


def choose(labels: SoftLabels, per_class: int) -> np.ndarray:
    """The ``per_class`` rows that the teacher is surest of, for each class it sees in them; int64, sorted."""
    if not len(labels.rows) or not per_class:
        return np.empty(0, dtype=np.int64)
    predicted, confidence = labels.surest()
    order = np.lexsort((labels.rows, -confidence, predicted))
    _, starts, counts = np.unique(predicted[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(starts, counts)
    return np.sort(labels.rows[order[place < per_class]])

"""What the teacher says about every image: computed once per view, kept on disk, looked up by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from components.common.errors import RetortError
from components.common.storage import atomic_path, read_json, remove, sha256_json, write_json
from components.dataset import images
from components.models.card import ModelCard
from components.training import augmentation, seals
from components.training.context import Exchange
from components.training.group import Group
from components.training.inputs.feed import Feed
from components.training.label_form import LabelForm
from components.training.mixing import Mixer
from components.training.precision import Precision
from components.training.sampling import in_order
from components.training.teacher import Teacher

SEAL, ABOUT = "seal.json", "about.json"  # beside the arrays: sizes and checksums, and what they are of
SHOWN = 80  # characters of a value in a message
CHUNK = 16_384  # rows of a file: each is written once, and found again by any number of workers
SCHEMA_VERSION = 1  # of ABOUT


class Form(Protocol):
    """What is kept of a teacher's answer, in how many bytes."""

    @property
    def bytes(self) -> int:
        """Of one answer."""

    def ask(self, teacher: Teacher, pixels: Tensor) -> Tensor:
        """Pictures uint8 [B, 3, S, S] -> uint8 [B, bytes], on the same device."""

    def apart(self, stored: Tensor, again: Tensor) -> Tensor:
        """How far answers are from others about the same pictures, in nats.

        Args:
            stored, again: uint8 [B, bytes].

        Returns:
            Float32 [B].
        """

    def key(self) -> list[object]:
        """What decides the bytes."""


def stored_bytes(images: int, class_num: int, top_k: int | None) -> int:
    """Disk that the soft labels of one view of some images take."""
    return images * (8 + LabelForm.of(class_num, top_k).bytes)


def about(
    cards: Sequence[ModelCard],
    data: str,
    rows: np.ndarray,
    view: Mapping[str, object],
    form: Form,
    precision: Precision,
) -> dict[str, object]:
    """What decides soft labels, part by part: all that the teacher is and sees, and our code.

    With it each label can be made again to the byte: the row names the image, ``view`` the picture of it.

    Args:
        cards: of all teachers that answer.
        data: the fingerprint of the manifest.
        rows: int64, ascending.
        view: number, seed, recipe and size of the pictures.
        precision: how the teacher computes, and on what kind of device: views are made there, too.
    """
    return {
        "teacher": [card.sha256 for card in cards],
        "normalisation": [[card.mean, card.std] for card in cards],
        "input size": [card.input_size for card in cards],
        "manifest": data,
        "rows": hashlib.sha256(np.ascontiguousarray(rows, dtype="<i8").data).hexdigest(),
        "view": dict(view),
        "form": form.key(),
        "precision": [precision.device.type, "bf16" if precision.bf16 else "float32"],
        "torch": torch.__version__,
        "timm": version("timm"),
        "decoder": images.decoder(),
        "augmentation": augmentation.VERSION,
        "chunk": CHUNK,
    }


def name_of(what: Mapping[str, object]) -> str:
    """The folder of soft labels of which ``about`` says what they are."""
    return sha256_json(what)[:32]


class SoftLabels:
    """Stored answers about some rows: a folder with ``rows.npy``, chunks of labels, what they are, a seal.

    ``00000.npy`` is uint8 [n, bytes], as the form has them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: np.ndarray = np.load(folder / "rows.npy", mmap_mode="r")  # ascending
        count = -(-len(self.rows) // CHUNK)
        self.chunks: list[np.ndarray] = [
            np.load(_chunk(folder, chunk), mmap_mode="r") for chunk in range(count)
        ]

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Labels uint8 [B, bytes] of some rows."""
        at = np.searchsorted(self.rows, rows)
        assert (self.rows[np.minimum(at, len(self.rows) - 1)] == rows).all(), "a row without a soft label"
        result = np.empty((len(at), self.chunks[0].shape[1]), np.uint8)
        places = at // CHUNK
        for place in np.unique(places).tolist():
            here = places == place
            result[here] = self.chunks[place][at[here] - place * CHUNK]
        return result


def _chunk(folder: Path, chunk: int) -> Path:
    return folder / f"{chunk:05}.npy"


def _here(path: Path, exchange: Exchange | None) -> bool:
    """Whether a file is there, or could be fetched from another node."""
    return path.exists() or (exchange is not None and exchange.fetch(path))


class Answers:
    """The teacher's answers as a task asks for them: from the caches of its crops, or from itself.

    Args:
        crops: soft labels of each augmented view; empty: the teacher is asked at every step.
        form: of the labels.
        mixer: how their pictures are mixed; None: they are not.
        recheck: compares some of them with what the teacher says, from a feed; told the epoch's number.
    """

    def __init__(
        self,
        teacher: Teacher,
        crops: list[SoftLabels],
        form: LabelForm,
        mixer: Mixer | None = None,
        recheck: Callable[[Feed, int], None] | None = None,
    ) -> None:
        self.teacher, self.crops, self.form, self.mixer, self._recheck = teacher, crops, form, mixer, recheck

    def recheck(self, feed: Feed, number: int) -> None:
        """Compare some kept labels with what the teacher says; all workers must call it.

        Raises:
            Stop: with ``distill.labels_drift``.
        """
        if self._recheck is not None:
            self._recheck(feed, number)

    def take(self, rows: np.ndarray, views: np.ndarray) -> dict[str, np.ndarray]:
        """``stored``: what is kept about views of rows, uint8 [B, bytes]; nothing where nothing is cached."""
        if not self.crops:
            return {}
        if len(self.crops) == 1:
            return {"stored": self.crops[0].take(rows)}
        result = np.empty((len(rows), self.form.bytes), np.uint8)
        for crop in np.unique(views).tolist():
            here = views == crop
            result[here] = self.crops[crop].take(rows[here])
        return {"stored": result}

    def logits(self, taken: Mapping[str, Tensor]) -> Tensor:
        """Logarithms of probabilities float32 [B, C] of what ``take`` gave, on the device where that lies."""
        return self.form.logits(taken["stored"])

    def dense(self, taken: Mapping[str, Tensor]) -> Tensor:
        """Probabilities float32 [B, C] of what ``take`` gave."""
        return self.logits(taken).exp()


def make(
    folder: Path,
    what: Mapping[str, object],
    asker: Asker,
    rows: np.ndarray,
    group: Group,
    note: Callable[[str], None],
    exchange: Exchange | None = None,
) -> SoftLabels:
    """Ask the teacher about one view of each row, each worker about its share, and keep the answers.

    A folder that is there already is read instead, unless it is damaged or of something else; one that an
    interrupted run left is gone on with. Every worker must call this in the same order.

    Args:
        what: as ``about`` has it.
        rows: int64, ascending.
        note: told what a person should know.
    """
    have = usable(folder, what, note) if group.leads else True
    if not all(group.gather(have)):
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        asker.teacher.assert_frozen()
        chunks = range(-(-len(rows) // CHUNK))
        names = [_chunk(partial, chunk) for chunk in chunks]
        alone = len(chunks) // group.world * group.world  # what is left of them is made by all together
        for chunk in [*chunks[:alone][group.rank :: group.world], *chunks[alone:]]:
            part = rows[chunk * CHUNK : (chunk + 1) * CHUNK]
            together = chunk >= alone
            there = (not together or group.rank == 0) and _here(names[chunk], exchange)
            if group.agree(there) if together else there:
                asker.advance(len(part[group.rank :: group.world]) if together else len(part))
                continue
            answers = asker.share(part, group) if together else asker(part)
            if answers is not None:
                _save(names[chunk], answers)
                if exchange is not None:
                    exchange.publish(names[chunk])
        group.barrier()
        if group.leads:
            if not have:
                _need_all(names, exchange)
            _finish(partial, folder, rows, what)
        group.barrier()
    else:
        asker.advance(len(rows[group.rank :: group.world]))
    return SoftLabels(folder)


def _need_all(names: Sequence[Path], exchange: Exchange | None) -> None:
    missing = [path.name for path in names if not _here(path, exchange)]
    if missing:
        raise RetortError(
            f"soft labels that another worker has made are not on this node ({missing[0]}); set ray.storage, "
            "and run the same command again"
        )


def usable(folder: Path, what: Mapping[str, object], note: Callable[[str], None]) -> bool:
    """Whether stored soft labels are there, whole, and what is wanted.

    Others are removed, and ``note`` is told why.
    """
    if not folder.exists():
        return False
    fault = seals.fault(folder / SEAL, folder) or _stale(folder / ABOUT, what)
    if fault is None:
        return True
    note(f"{folder}: {fault}; the teacher is asked again")
    remove(folder)
    return False


def _stale(path: Path, what: Mapping[str, object]) -> str | None:
    """Which part of what stored labels are made of is another one now, in words; None: none is."""
    found = read_json(path)
    if found.get("schema_version") != SCHEMA_VERSION:
        return f"{path.name} has another schema_version"
    made: dict[str, Any] = found["labels"]
    for part, wanted in json.loads(json.dumps(what)).items():
        if made.get(part) != wanted:
            return f"made of another {part} ({_shown(made.get(part))}, now {_shown(wanted)})"
    return None


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


@dataclass(frozen=True)
class Asker:
    """Asks the teacher about one view of some rows.

    Args:
        form: what is kept of each answer.
        advance: told how many images were asked about.
        mixer: how their pictures are mixed; None: they are not.
    """

    teacher: Teacher
    feed: Feed
    view: int
    form: Form
    batch_size: int
    advance: Callable[[int], None]
    mixer: Mixer | None = None

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Labels uint8 [n, bytes]."""
        result = np.empty((len(rows), self.form.bytes), np.uint8)
        done = 0
        for labels, copied in _one_behind(self._answers(rows)):
            if copied is not None:
                copied.synchronize()
            result[done : done + len(labels)] = labels.numpy()
            done += len(labels)
            self.advance(len(labels))
        return result

    def share(self, rows: np.ndarray, group: Group) -> np.ndarray | None:
        """The same, each worker asking about every so-many-th row; rank 0 has all of it, others None."""
        shares = group.gather(self(rows[group.rank :: group.world]))
        if group.rank:
            return None
        result = np.empty((len(rows), self.form.bytes), np.uint8)
        for rank, labels in enumerate(shares):
            result[rank :: group.world] = labels
        return result

    def _answers(self, rows: np.ndarray) -> Iterator[_Copied]:
        draws = in_order(rows, self.batch_size, self.view)
        for batch in self.feed(draws if self.mixer is None else map(self.mixer, draws)):
            yield _copied(self.form.ask(self.teacher, batch.pixels))


_Copied = tuple[Tensor, torch.cuda.Event | None]


def _copied(labels: Tensor) -> _Copied:
    """Labels on their way to the host, and the event after which they are there."""
    if labels.device.type == "cpu":
        return labels, None
    here = labels.to("cpu", non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return here, event


def _one_behind(values: Iterable[_Copied]) -> Iterator[_Copied]:
    """The same, each when the next one has been asked for: a GPU works on while the host takes one."""
    held: _Copied | None = None
    for value in values:
        if held is not None:
            yield held
        held = value
    if held is not None:
        yield held


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.save(file, array)


def _finish(partial: Path, folder: Path, rows: np.ndarray, what: Mapping[str, object]) -> None:
    """Seal what all have written."""
    if folder.exists():  # it was here already, and made for nodes that had none
        remove(partial)
        return
    _save(partial / "rows.npy", rows.astype(np.int64))
    write_json(partial / ABOUT, {"schema_version": SCHEMA_VERSION, "labels": what})
    seals.write(partial / SEAL, [*partial.glob("*.npy"), partial / ABOUT])
    partial.rename(folder)

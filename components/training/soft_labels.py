"""What the teacher says about every image: computed once per crop, kept on disk, looked up by row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch import distributed as dist

from components.common.errors import RetortError
from components.common.storage import atomic_path, remove, sha256_json
from components.dataset import images
from components.models import checkpoint
from components.models.card import ModelCard, first_difference
from components.training import seals
from components.training.loader import AUGMENTATION, Normalise, Views, load, pairs

SEAL = "seal.json"  # beside the arrays: their sizes and checksums
ALL_CLASSES = 1000  # up to so many classes a soft label is kept whole


class Teacher:
    """A trained network that only answers: frozen, in eval mode, fed as its own card says."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        module, card = checkpoint.load(folder)
        self.card: ModelCard = card
        self._module: nn.Module = module.to(device).to(memory_format=torch.channels_last).eval()
        self._module.requires_grad_(False)
        self._normalise = Normalise(card.mean, card.std, device)

    def assert_frozen(self) -> None:
        """Raises AssertionError when a part of the teacher could train, or normalises by the batch."""
        assert not any(part.training for part in self._module.modules()), "the teacher left eval mode"
        assert not any(parameter.requires_grad for parameter in self._module.parameters())

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Uint8 [B, 3, S, S] -> probabilities float32 [B, C]."""
        return self._module(self._normalise(pixels)).softmax(dim=1)


def kept_classes(class_num: int, top_k: int | None) -> int:
    """How many classes of a soft label are stored."""
    return min(class_num, top_k or ALL_CLASSES)


def stored_bytes(images: int, class_num: int, top_k: int | None) -> int:
    """Disk that the soft labels of one crop take."""
    kept = kept_classes(class_num, top_k)
    return images * (8 + kept * (2 if kept == class_num else 6))


def key(card: ModelCard, data: str, rows: np.ndarray, view: list[object], kept: int) -> str:
    """What decides soft labels, as the name of their folder: all that the teacher is and sees, and our code.

    Args:
        data: the fingerprint of the manifest.
        view: size, number, augmentation and seed.
    """
    values = {
        "teacher": [card.sha256, card.mean, card.std, card.input_size],
        "data": data,
        "rows": sha256_json(rows.tolist()),
        "view": view,
        "kept": kept,
        "code": [images.decoder(), AUGMENTATION],
    }
    return sha256_json(values)[:32]


class SoftLabels:
    """Stored probabilities of some rows: a folder with ``rows.npy``, ``prob.npy``, ``index.npy`` and a seal.

    ``prob`` is float16 [n, k]; ``index`` int32 [n, k] names the classes, and is absent when all are kept.
    What the k classes leave is spread evenly over the others, so that a label always sums to one.
    """

    def __init__(self, folder: Path, class_num: int, row_num: int) -> None:
        self.rows = np.load(folder / "rows.npy")
        self._prob = np.load(folder / "prob.npy", mmap_mode="r")
        index = folder / "index.npy"
        self._index = np.load(index, mmap_mode="r") if index.exists() else None
        self._class_num = class_num
        self._position = np.full(row_num, -1, dtype=np.int64)
        self._position[self.rows] = np.arange(len(self.rows))

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Rows int64 [B] -> probabilities float32 [B, C]."""
        at = self._position[rows]
        assert (at >= 0).all(), "a row without a soft label"
        prob = torch.from_numpy(self._prob[at].astype(np.float32))
        if self._index is None:
            return prob / prob.sum(1, keepdim=True)
        index = torch.from_numpy(self._index[at].astype(np.int64))
        rest = (1 - prob.sum(1, keepdim=True)).clamp_min(0) / max(1, self._class_num - prob.shape[1])
        full = rest.expand(-1, self._class_num).clone().scatter_(1, index, prob)
        return full / full.sum(1, keepdim=True)


def make(
    folder: Path,
    teacher: Teacher,
    views: Views,
    rows: np.ndarray,
    view: int,
    kept: int,
    batch_size: int,
    num_workers: int,
    advance: Callable[[int], None],
    note: Callable[[str], None],
) -> SoftLabels:
    """Ask the teacher about one view of each row, each Ray worker about its share, and keep the answers.

    A folder that is there already is read instead, unless it is damaged. Every worker must call this in the
    same order.

    Args:
        kept: classes kept of each answer.
        advance: told how many images this worker has done.
        note: told what a person should know.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    found = [rank == 0 and usable(folder, note)]
    dist.broadcast_object_list(found)  # one worker looks: all must go the same way
    class_num = len(teacher.card.class_names)
    if not found[0]:
        mine = rows[rank::world]
        parts = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
        loader = load(views, [pairs(part, view) for part in parts], num_workers)
        teacher.assert_frozen()
        with atomic_path(folder.with_name(f"{folder.name}.{rank}")) as shard:
            shard.mkdir()
            np.save(shard / "rows.npy", mine)
            prob = _array(shard / "prob.npy", (len(mine), kept), np.float16)
            index = None if kept == class_num else _array(shard / "index.npy", (len(mine), kept), np.int32)
            done = 0
            for part, pixels in zip(parts, loader, strict=True):
                top = teacher(pixels).float().cpu()
                here = slice(done, done + len(part))
                if index is not None:
                    top, classes = top.topk(kept, dim=1)
                    index[here] = classes.numpy()
                prob[here] = top.numpy()
                done += len(part)
                advance(len(part))
            del prob, index  # written back before the folder gets its name
        dist.barrier()
        if rank == 0:
            _merge(folder, world, len(rows))
        dist.barrier()
    else:
        advance(len(rows[rank::world]))
    return SoftLabels(folder, class_num, len(views))


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


def _array(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> np.ndarray:
    """A new .npy file to fill; one without entries cannot be mapped and is written at once."""
    if 0 in shape:
        np.save(path, np.empty(shape, dtype))
        return np.empty(shape, dtype)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)


def _merge(folder: Path, world: int, count: int) -> None:
    shards = [folder.with_name(f"{folder.name}.{rank}") for rank in range(world)]
    with atomic_path(folder) as partial:
        partial.mkdir()
        for name in sorted(path.name for path in shards[0].iterdir()):
            parts = [np.load(shard / name, mmap_mode="r") for shard in shards]
            whole = _array(partial / name, (count, *parts[0].shape[1:]), parts[0].dtype)
            start = 0
            for part in parts:
                whole[start : start + len(part)] = part
                start += len(part)
            del whole
        seals.write(partial / SEAL, list(partial.iterdir()))
    for shard in shards:
        remove(shard)


def choose(labels: SoftLabels, per_class: int) -> np.ndarray:
    """The ``per_class`` rows that the teacher is surest of, for each class it sees in them; int64, sorted."""
    if not len(labels.rows) or not per_class:
        return np.empty(0, dtype=np.int64)
    confidence, predicted = (part.numpy() for part in labels(labels.rows).max(dim=1))
    chosen = []
    for label in np.unique(predicted):
        rows = labels.rows[predicted == label]
        order = np.lexsort((rows, -confidence[predicted == label]))
        chosen.append(rows[order[:per_class]])
    return np.sort(np.concatenate(chosen))


def need_same_classes(teacher: ModelCard, class_names: list[str], size: int) -> None:
    """Raises RetortError when the teacher was trained for other classes or another input size."""
    own, again = teacher.class_names, "run 'retort finetune' on this data first"
    if len(own) != len(class_names):
        raise RetortError(
            f"teacher: trained for {len(own)} classes, this data has {len(class_names)} (or "
            f"global.class_num asks for them); {again}"
        )
    label = first_difference(own, dict(enumerate(class_names)))
    if label is not None:
        raise RetortError(
            f"teacher: its classes are named otherwise: it calls label {label} '{own[label]}', this data "
            f"'{class_names[label]}'; {again}"
        )
    if teacher.input_size[1:] != [size, size]:
        raise RetortError(
            f"teacher: trained at {teacher.input_size[1]} px, global.image_size is {size}; "
            "run 'retort finetune' again"
        )

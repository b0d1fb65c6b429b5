"""What a network says of images: every row once, over all workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from components.training.augmentation import NO_AUGMENT
from components.training.group import Group
from components.training.inputs.feed import Feed
from components.training.inputs.index import Index
from components.training.normalise import Normalise
from components.training.precision import Precision
from components.training.sampling import Draw, in_order

ASKED_BATCHES = 8  # between two questions whether to stop


class Interrupted(Exception):  # noqa: N818
    """The workers were asked to stop while they judged."""


@dataclass(frozen=True)
class Answers:
    """What a network says of some images.

    Attributes:
        classes: int64 [n].
        sure: float32 [n], the probability that it gives to them.
        loss: mean cross-entropy in nats.
    """

    classes: np.ndarray
    sure: np.ndarray
    loss: float


def predict(
    module: nn.Module,
    index: Index,
    rows: np.ndarray,
    feed: Feed,
    batch_size: int,
    normalise: Normalise,
    precision: Precision,
    group: Group,
    wish: Callable[[], bool] = lambda: False,
) -> Answers:
    """Ask a network for each of the rows (int64 [n]), as they are; answers come in their order.

    Args:
        wish: asked now and then whether this worker is to stop: where one is, all do.

    Raises:
        Interrupted: in all workers alike.
    """

    def labels(draw: Draw) -> dict[str, np.ndarray]:
        return {"labels": index.labels[draw.rows].astype(np.int64)}

    mine = rows[group.rank :: group.world]
    module.eval()
    classes: list[Tensor] = []
    sure: list[Tensor] = []
    loss = torch.zeros((), dtype=torch.float64, device=precision.device)
    with torch.no_grad(), precision.eager():
        batches = feed(in_order(mine, batch_size, NO_AUGMENT), labels)
        most = -(-len(rows) // group.world)  # rows of a worker
        for place in range(-(-most // batch_size)):  # the same for all of them
            if place % ASKED_BATCHES == 0 and any(group.gather(wish())):
                raise Interrupted
            batch = next(batches, None)
            if batch is None:
                continue
            with precision.autocast():
                logits = module(normalise(batch.pixels)).float()
            loss += nn.functional.cross_entropy(logits, batch.extra["labels"], reduction="sum")
            highest, said = logits.max(1)
            classes.append(said)
            sure.append((highest - logits.logsumexp(1)).exp())
    own = _joined(classes, np.int64), _joined(sure, np.float32), float(loss)
    gathered = group.gather(own)
    predicted, certain = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.float32)
    for rank, (part, certainty, _) in enumerate(gathered):
        predicted[rank :: group.world], certain[rank :: group.world] = part, certainty
    return Answers(predicted, certain, sum(loss for _, _, loss in gathered) / max(1, len(rows)))


def _joined(parts: list[Tensor], dtype: type) -> np.ndarray:
    return torch.cat(parts).cpu().numpy() if parts else np.empty(0, dtype=dtype)

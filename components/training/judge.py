"""What a network says about a split: every row once, over all workers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from components.training.augmentation import PLAIN
from components.training.group import Group
from components.training.inputs.feed import Feed
from components.training.inputs.index import Index
from components.training.normalise import Normalise
from components.training.precision import Precision
from components.training.sampling import Draw, in_order


def predict(
    module: nn.Module,
    index: Index,
    split: str,
    feed: Feed,
    batch_size: int,
    normalise: Normalise,
    precision: Precision,
    group: Group,
) -> tuple[np.ndarray, float]:
    """Predicted classes int64 [n], in the order of the manifest's rows, and mean cross-entropy in nats."""

    def labels(draw: Draw) -> dict[str, np.ndarray]:
        return {"labels": index.labels[draw.rows].astype(np.int64)}

    rows = np.asarray(index.rows(split), dtype=np.int64)
    mine = rows[group.rank :: group.world]
    module.eval()
    classes: list[Tensor] = []
    loss = torch.zeros((), dtype=torch.float64, device=precision.device)
    with torch.no_grad(), precision.eager():
        for batch in feed(in_order(mine, batch_size, PLAIN), labels):
            with precision.autocast():
                logits = module(normalise(batch.pixels)).float()
            loss += nn.functional.cross_entropy(logits, batch.extra["labels"], reduction="sum")
            classes.append(logits.argmax(1))
    own = torch.cat(classes).cpu().numpy() if classes else np.empty(0, dtype=np.int64)
    gathered = group.gather((own, float(loss)))
    predicted = np.empty(len(rows), dtype=np.int64)
    for rank, (part, _) in enumerate(gathered):
        predicted[rank :: group.world] = part
    return predicted, sum(loss for _, loss in gathered) / max(1, len(rows))

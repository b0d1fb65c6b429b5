"""Learning from labels, with the loss that the plan asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from components.training.sampling import Draw
from components.training.tasks.base import Learnt, Task

if TYPE_CHECKING:
    from components.training.augmentation import Mix
    from components.training.inputs.feed import Batch


class Labels(Task):
    """The plan's loss; of mixed images that of both labels, by their shares (Zhang et al., "mixup", 2018)."""

    def extra(self, draw: Draw) -> dict[str, np.ndarray]:
        return {"labels": self.setup.labels[draw.rows].astype(np.int64)}

    def forward(self, inputs: Tensor, batch: Batch, mix: Mix | None) -> Learnt:
        criterion, labels = self.setup.criterion, batch.extra["labels"]
        logits = self.network(inputs).float()
        if mix is None:
            values = criterion.per_image(logits, labels)
        else:
            values = mix.loss(criterion.per_image, logits, labels)
        return Learnt(criterion.reduce(values), logits)

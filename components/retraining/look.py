"""What the champion says of images, and whether new ones look as those did that it was judged on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from components.common.progress import track
from components.dataset.images import pins
from components.export.exported import Rows
from components.models import checkpoint
from components.training import class_expansion

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

BATCH = 64
PERMUTATIONS = 199  # of the drift test: the smallest p is then 1 in 200
FEWEST = 20  # images of each side below which nothing is tested
A_CLASS = 5  # images of a predicted class, of each side, from which on it takes part


@dataclass(frozen=True)
class Answers:
    """What the champion says of n images.

    Attributes:
        features: float32 [n, D], what its classifier is fed.
        said: its class for each, by name.
        named: what the data call each.
    """

    features: NDArray[np.float32]
    said: NDArray[np.str_]
    named: NDArray[np.str_]

    @property
    def wrong(self) -> int:
        """On how many they differ."""
        return int((self.said != self.named).sum())

    def __len__(self) -> int:
        return len(self.said)


def ask(folder: Path, root: str, rows: pa.Table, what: str) -> Answers:
    """Ask the network in ``folder`` about rows of a manifest.

    Raises:
        ImageError: when an image is gone, or another one.
    """
    import torch

    from components.training.normalise import Normalise

    module, card = checkpoint.load(folder)
    fed: list[torch.Tensor] = []
    layer = class_expansion.classifiers(module)[0]
    hook = layer.register_forward_pre_hook(lambda layer, inputs: fed.append(inputs[0].float()))
    normalise = Normalise(card.mean, card.std, torch.device("cpu"))
    images = Rows(rows["path"].to_pylist(), rows["label"].to_numpy(), pins(rows)).images(root)
    said: list[str] = []
    try:
        with torch.inference_mode():
            batches = images.squares(card.input_size[-1], BATCH)
            for _, pixels in track(batches, what, -(-rows.num_rows // BATCH)):
                inputs = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
                said += [card.class_names[index] for index in module(inputs).argmax(1).tolist()]
    finally:
        hook.remove()
    features = torch.cat(fed).numpy() if fed else np.zeros((0, layer.in_features), np.float32)
    return Answers(features, np.array(said, np.str_), np.array(rows["class_name"].to_pylist(), np.str_))


@dataclass(frozen=True)
class Drift:
    """Whether new images look otherwise.

    Attributes:
        distance: the energy distance's coefficient, 0 (the same) to 1.
        p: of the permutation test that there is no difference.
        images: of each side that were compared.
    """

    distance: float
    p: float
    images: int


def drift(old: Answers, new: Answers, seed: int) -> Drift | None:
    """Whether new images look as old ones do, to the champion's eyes; None: there are too few to tell.

    As many of each side are compared in each class *that the champion says*: so neither another mix of
    classes nor wrong labels count as another look. The statistic is the energy distance of what its head is
    fed (Szekely and Rizzo, "Energy statistics", J. Statistical Planning and Inference 143, 2013), as its
    coefficient H = (2 A - B - C) / (2 A), with A the mean distance between the sides, B and C inside them.
    """
    random = np.random.default_rng(seed)
    one, other = _matched(old.said, new.said, random)
    if len(one) < FEWEST:
        return None
    features = np.concatenate([old.features[one], new.features[other]]).astype(np.float64)
    scale = old.features[one].std(axis=0)
    return energy(features / np.where(scale > 0, scale, 1.0), len(one), random)


def energy(features: NDArray[np.float64], count: int, random: np.random.Generator) -> Drift:
    """The test on float64 [n, D], whose first ``count`` rows are the one side."""
    from scipy.spatial.distance import cdist

    apart = cdist(features, features)
    side = np.arange(len(features)) < count

    def coefficient(one: NDArray[np.bool_]) -> float:
        between = apart[np.ix_(one, ~one)].mean()
        inside = apart[np.ix_(one, one)].mean() + apart[np.ix_(~one, ~one)].mean()
        return float((2 * between - inside) / (2 * between)) if between > 0 else 0.0

    found = coefficient(side)
    others = [coefficient(random.permutation(side)) for _ in range(PERMUTATIONS)]
    p = (1 + sum(other >= found for other in others)) / (1 + PERMUTATIONS)
    return Drift(found, p, count)


def _matched(
    one: NDArray[np.str_], other: NDArray[np.str_], random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of both sides, as many of each class in the one as in the other."""
    rows: tuple[list[int], list[int]] = ([], [])
    counts: Mapping[str, int] = {
        name: min(int((one == name).sum()), int((other == name).sum())) for name in np.unique(one).tolist()
    }
    for name, count in counts.items():
        if count >= A_CLASS:
            for taken, side in zip(rows, (one, other), strict=True):
                taken += random.choice(np.flatnonzero(side == name), count, replace=False).tolist()
    return np.array(rows[0], np.int64), np.array(rows[1], np.int64)

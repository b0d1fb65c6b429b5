"""The forecast of what distilling changes, beside what it then changed: many random set-ups, none fitted to.

Images: scikit-learn's digits, or those of a folder (a folder a class) that RETORT_FORECAST_IMAGES
names, taken at 16 x 16 pixels in grey.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from components.training import forecast
from tests.benchmarks.measure import Row, at_least
from tests.components.training.planted import Images, Plant, digits, grow

SETUPS = 40
TOLD = 0.01  # gains below it are noise: their sign says nothing
SIZE = 16
MOST = 400  # images of a class of a folder


def measure(seeds: int) -> list[Row]:
    """How often the sign is right, and how often the interval holds the gain."""
    folder = os.environ.get("RETORT_FORECAST_IMAGES", "")
    images = _read(Path(folder)) if folder else digits()
    rng = np.random.default_rng(12345)
    right, told, held = 0, 0, 0
    for number in range(SETUPS):
        grown = grow(images, _drawn(rng), seed=number, seeds=seeds)
        found = forecast.forecast(grown.said, grown.setting)
        held += found.low <= grown.gain <= found.high
        if abs(grown.gain) >= TOLD:
            told += 1
            right += (found.value > 0) == (grown.gain > 0)
    what = f"{folder or 'digits'}, {SETUPS} set-ups"
    return [
        at_least(f"sign right of {told} gains above {TOLD:.0%} ({what})", right / max(1, told), 0.9, "share"),
        at_least(f"gains inside the 95 % interval ({what})", held / SETUPS, 0.9, "share"),
    ]


def _drawn(rng: np.random.Generator) -> Plant:
    return Plant(
        "drawn",
        per_class=int(rng.choice([5, 10, 20, 40])),
        pool=int(rng.choice([0, 0, 300, 600])),
        teacher=int(rng.choice([4, 64, 256])),
        teacher_steps=int(rng.choice([20, 100, 400])),
        teacher_noise=float(rng.choice([0, 0, 0.3, 0.6])),
        teacher_part=float(rng.choice([1, 1, 0.4])),
        teacher_more=int(rng.choice([0, 0, 200])),
        noise=float(rng.choice([0, 0, 0.2])),
        share=float(rng.choice([0, 0.2, 0.5])),
    )


def _read(folder: Path) -> Images:
    pixels, labels = [], []
    for label, of_class in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        for path in sorted(of_class.rglob("*.*"))[:MOST]:
            with Image.open(path) as image:
                grey = image.convert("L").resize((SIZE, SIZE), Image.Resampling.BOX)
            pixels.append(np.asarray(grey, np.float32).ravel())
            labels.append(label)
    return Images(np.stack(pixels), np.array(labels, np.int64))

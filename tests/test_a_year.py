"""A year of weeks: what ``retort retrain`` makes of each, and that the champion never gets worse.

Real images (Fashion-MNIST, where RETORT_FASHION_MNIST names its folder) come, go, are mislabelled, copied and
darkened; the tracker is away, and a training dies. After each week the champion is asked about images that no
project ever saw.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from components.common.errors import RetortError
from components.common.params import Registry
from components.common.storage import read_json
from components.dataset import inspection
from components.export import exported
from components.registry import versions
from components.registry.versions import CHAMPION, opened
from components.step import StepContext
from components.training import budget, cluster, driver, paired, preflight
from components.training.params import Ray
from components.training.spec import TrainSpec
from components.training.state import TrainResult
from pipelines import cli
from tests.components.training import local
from tests.conftest import findings

log = logging.getLogger(__name__)

BICUBIC = Image.Resampling.BICUBIC
ARCH = "test_efficientnet"  # timm's own network for tests: a third of a million parameters
SIZE = 32
HELD_OUT = 200  # images a class that no project sees
CLASSES = ("trouser", "pullover", "dress", "sandal", "bag", "boot")
LABELS = {"trouser": 1, "pullover": 2, "dress": 3, "sandal": 5, "bag": 8, "boot": 9}  # in Fashion-MNIST
FIRST = 5  # classes that the project begins with
WORSE = 0.01  # chance below which the champion is called worse than the one before
NET = {
    "arch": {"name": ARCH},
    "weights": "none",
    "optimizer": {"name": "adamw"},
    "lr": {"initial": 0.002},
    "train": {"epochs": 8, "batch_size": 32, "augment": "light"},
}
PARAMS = {
    "global": {"image_size": SIZE},
    "data": {"source": "images", "root": "images"},
    "teacher": NET,
    "student": NET,
    "distill": {"crops": 2, "control": False, "reference_lr": None, "method": "kd"},
    "expand": {"control": False},
    "export": {"min_accuracy": 0.3},
    "benchmark": {"engines": ["onnxruntime"], "threads": [1], "batch_sizes": [1], "time_budget_s": 1.0},
    # only the first training, which has no champion to start from, begins with start weights
    "retrain": {"budget_minutes": 0.001},
    "registry": {"name": "year", "tolerance": 0.03},
    "ray": {"workers": 1},
    "checks": {"waive": ["distill.student_weights", "distill.teacher_weights"]},
}


class Pictures:
    """Real images by class, each given out once; the last of each class are never given out."""

    def __init__(self) -> None:
        images, labels = _read()
        self._left = {name: list(images[labels == label][:3000]) for name, label in LABELS.items()}
        self.held_out = {name: [some.pop() for _ in range(HELD_OUT)] for name, some in self._left.items()}

    def take(self, name: str, count: int) -> list[np.ndarray]:
        taken, self._left[name] = self._left[name][:count], self._left[name][count:]
        assert len(taken) == count
        return taken


def _read() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, h, w] and labels."""
    folder = os.environ.get("RETORT_FASHION_MNIST")
    if not folder:
        pytest.skip("RETORT_FASHION_MNIST names no folder with Fashion-MNIST's files")
    with gzip.open(Path(folder) / "train-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(Path(folder) / "train-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return images, labels


@dataclass
class Year:
    """The project, its images, and what has been said so far."""

    folder: Path
    pictures: Pictures
    registry: Registry
    lines: list[str] = field(default_factory=list)
    number: int = 0
    before: tuple[int, np.ndarray] = (0, np.zeros(0))

    def add(self, name: str, count: int, change: Callable[[np.ndarray], np.ndarray] | None = None,
            into: str = "") -> None:  # fmt: skip
        """Put new images of a class into the project."""
        for image in self.pictures.take(name, count):
            self.number += 1
            place = self.folder / "images" / (into or name) / f"{self.number:05d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image if change is None else change(image)).save(place)

    def champion(self) -> tuple[int, np.ndarray]:
        """Its version, and on which held-out images of the first classes it is right, bool [n]."""
        with opened(self.registry, "a test") as versions:
            holder = versions.holder(CHAMPION)
            assert holder is not None
            model = versions.download(holder, "model.onnx", self.folder)
        assert model is not None
        session = exported.session(model, threads=1)
        about = exported.describe(session, model)
        right = []
        for name in CLASSES[:FIRST]:
            pixels = np.stack([
                np.asarray(Image.fromarray(image).convert("RGB").resize((SIZE, SIZE), BICUBIC))
                for image in self.pictures.held_out[name]
            ])  # fmt: skip
            said = exported.run(session, about.feed(pixels)).argmax(1)
            right += [about.class_names[one] == name for one in said.tolist()]
        return int(holder.version), np.array(right)

    @property
    def images(self) -> Path:
        return self.folder / "images"

    def week(
        self, kind: str, capsys: pytest.CaptureFixture[str], status: int, said: str, *, same: bool = False,
        down: bool = False,
    ) -> None:  # fmt: skip
        """Run the command, and look at its verdict and at the champion.

        Args:
            status: its exit status; ``said``: a piece of what it says.
            same: whether the champion must be the one before.
            down: whether the registry does not answer meanwhile.
        """
        with pytest.MonkeyPatch.context() as patch:
            if down:
                patch.setattr(versions, "reach", away)
            found = cli.run(["retrain"])
        spoken = capsys.readouterr()
        last = [
            line
            for line in (spoken.out + spoken.err).splitlines()
            if "retrain: " in line or "retort: " in line
        ]
        version, right = self.champion()
        line = f"{kind:<24} exit {found}  v{version}  {right.mean():6.2%} of {len(right)}  {last[-1]}"
        self.lines.append(line)
        with capsys.disabled():
            print(f"\n{line}", end="", flush=True)
        assert found == status, spoken.err
        assert said in spoken.out + spoken.err
        assert (self.folder / "outputs/retrain/report.html").is_file()
        if len(self.before[1]):
            old = self.before[1]
            assert not same or version == self.before[0]
            # both as predictions of a thing that is always 1: how often only one of them is right
            p = paired.worse(np.ones(len(old), np.int64), right.astype(np.int64), old.astype(np.int64))
            assert p >= WORSE, f"{kind}: {right.mean():.2%} of held-out images, {old.mean():.2%} before"
        self.before = (version, right)


@contextmanager
def moved(*places: Path) -> Iterator[None]:
    """Folders that are away for a week."""
    away = [(place, place.parent.parent / f"away-{place.name}") for place in places]
    for place, elsewhere in away:
        place.rename(elsewhere)
    try:
        yield
    finally:
        for place, elsewhere in away:
            elsewhere.rename(place)


def away(*_: object) -> None:
    raise ConnectionError("connection refused")


@pytest.fixture
def year(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Year:
    """A project with five classes; its trainings run in this process, without Ray."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RETORT_RUN", raising=False)

    def train(run: StepContext, spec: TrainSpec, ray: Ray, folder: Path, *_: object) -> TrainResult:
        return local.run(spec).result

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(driver, "fit", train)
    monkeypatch.setattr(cluster, "running", lambda *_: nullcontext())
    monkeypatch.setattr(preflight, "preflight", lambda *_: None)
    monkeypatch.setattr(budget, "expected", lambda *_: None)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    made = Year(tmp_path, Pictures(), Registry(name="year"))
    for name in CLASSES[:FIRST]:
        made.add(name, 100)
    return made


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_year(year: Year, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    old, images = CLASSES[:FIRST], year.images
    out = year.folder / "outputs/retrain"

    year.week("the first", capsys, 0, "year v1, champion")

    with monkeypatch.context() as patch:  # no image is opened
        patch.setattr(inspection, "inspect", lambda content: pytest.fail("an image was read"))
        year.week("quiet", capsys, 0, "nothing to do: nothing has changed", same=True)
        year.week("quiet, no tracker", capsys, 0, "nothing to do: nothing has changed", same=True, down=True)

    for name in old:
        year.add(name, 120)
    year.week("new images, no tracker", capsys, 1, "retrain.registry", same=True, down=True)
    with monkeypatch.context() as patch:
        patch.setattr(driver, "train", dies)
        year.week("training dies", capsys, 1, "a worker died", same=True)
    year.week("new images", capsys, 0, "learns on")
    assert read_json(out / "decide/decision.json")["way"] == "update"
    year.week("quiet", capsys, 0, "nothing to do: nothing has changed", same=True)

    for name in old:  # copies, and what is judged among what is learnt
        for number, file in enumerate(sorted((images / name).iterdir())[:6]):
            shutil.copyfile(file, images / name / f"copy-{number}.png")
    year.week("duplicates and leakage", capsys, 0, "validation leaves exactly", same=True)
    year.week("quiet", capsys, 0, "nothing to do: nothing has changed", same=True)

    for name, wrong in zip(old, (*old[1:], old[0]), strict=True):
        year.add(name, 40, into=wrong)
    poisoned = [file for name in old for file in sorted((images / name).glob("[0-9]*"))[-40:]]
    year.week("labels flipped", capsys, 1, "retrain.labels", same=True)
    for file in poisoned:
        file.unlink()
    year.week("put right: quiet", capsys, 0, "nothing to do", same=True)

    year.add(CLASSES[FIRST], 150)
    year.week("a new class", capsys, 0, "its head grows by 1 class ('boot')")
    assert {"expand.old_accuracy", "expand.new_accuracy"} <= set(findings(out / "updated"))

    with moved(images / "bag"):
        year.week("a class vanished", capsys, 1, "retrain.classes", same=True)
    with moved(*(images / name for name in CLASSES[1:])):
        year.week("one class only", capsys, 1, "stopped", same=True)
    with moved(images):
        year.week("no image", capsys, 1, "stopped", same=True)
    year.week("all back: quiet", capsys, 0, "nothing to do: nothing has changed", same=True)

    for name in CLASSES:
        year.add(name, 40, change=lambda image: (image * 0.35).astype(np.uint8))
    year.week("a darker camera", capsys, 0, "learns on")
    (drift,) = findings(out / "decide")["retrain.drift"]
    assert drift.level == "warning", drift.message
    year.week("quiet", capsys, 0, "nothing to do: nothing has changed", same=True)
    with capsys.disabled():
        print()


def dies(*_: object) -> TrainResult:
    raise RetortError("a worker died, and nothing is left to go on with")

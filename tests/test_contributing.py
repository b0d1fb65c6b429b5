"""CONTRIBUTING.md, followed: one thing of each kind, added in the places it names alone, and used."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import test_docs

REPO_ROOT = Path(__file__).resolve().parents[1]
TEXT = (REPO_ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PATH = re.compile(r"`((?:components|pipelines|tests|docs|infra)/[\w./-]*)`")
NAMED = re.compile(r"`(\w+)`\s+of\s+`((?:components|pipelines)/[\w./-]+\.py)`")


def sections() -> dict[str, str]:
    """What stands under each heading such as **A loss**."""
    parts = re.split(r"^\*\*(A[n]? .+?)\*\*", TEXT.partition("## Rules")[0], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@dataclass(frozen=True)
class Thing:
    """What is added for one kind: new files, and text after an anchor in files that are there."""

    heading: str
    files: dict[str, str] = field(default_factory=dict)
    edits: list[tuple[str, str, str]] = field(default_factory=list)  # file, anchor, what follows it

    def places(self) -> set[str]:
        """The places that the heading's section names; those of any check, where it says so."""
        section = sections()[self.heading]
        if "as for any check" in section:
            section += sections()["A check"]
        return set(PATH.findall(section))


def listed(rule: str, after: str) -> list[tuple[str, str, str]]:
    """A rule's name and its line."""
    return [
        ("components/common/rules.py", "RULES = (\n", f'    "{rule}",\n'),
        ("docs/rules.md", f"`{after}`, ", f"`{rule}`, "),
    ]


THINGS = {
    "check": Thing(
        "A check",
        edits=[
            (
                "components/audit/imbalance.py",
                "    measured = ratio(total)\n",
                '    run.add_finding("imbalance.dummy", "error", "classes", "Planted.", measured=measured)\n',
            ),
            *listed("imbalance.dummy", "imbalance.ratio"),
        ],
    ),
    "rule_of_rows": Thing(
        "A rule of rows",
        edits=[
            (
                "components/dataset/rules.py",
                "CASES = {\n",
                '    "manifest.dummy": Rule(one="path is long", several="long paths", advice="It stays.", '
                'keep=True, condition="length(path) > 20", detail="the path is long", total="long_paths"),\n',
            ),
            *listed("manifest.dummy", "manifest.path"),
        ],
    ),
    "quality_check": Thing(
        "A quality check",
        files={
            "components/dataset/quality/dummy.py": '''"""The darkest level."""

from components.dataset.quality.check import Check, View


def darkest(view: View) -> float:
    """The grey level, 0..255, of the darkest pixel."""
    return float(view.pixels.min())


CHECK = Check(
    rule="quality.dummy", measure=darkest, bad="high", never=100.0, sure=200.0, floor=10.0,
    what="images have no black", number="grey level of the darkest pixel, 0..255",
)
'''
        },
        edits=[
            (
                "components/dataset/quality/__init__.py",
                "from PIL.Image import Resampling\n",
                "from components.dataset.quality import dummy\n",
            ),
            (
                "components/dataset/quality/__init__.py",
                "CHECKS: tuple[Check, ...] = (",
                "dummy.CHECK, ",
            ),
            ("components/dataset/inspection.py", "\nVERSION = ", "9"),
            *listed("quality.dummy", "quality.dark"),
        ],
    ),
    "source_of_images": Thing(
        "A source of images",
        files={
            "components/dataset/sources/dummy.py": '''"""A file of paths, whose first folder is the class."""

from pathlib import Path

from components.dataset.params import IngestParams
from components.dataset.sources.found import Found, Reader, Row


def read(params: IngestParams) -> Found:
    """Rows of the lines."""
    lines = Path(str(params.data.source)).read_text().split()
    return Found(rows=[Row(line, line, class_name=line.split("/")[0]) for line in lines])


READER = Reader(lambda source: str(source).endswith(".names"), read)
'''
        },
        edits=[
            (
                "components/dataset/sources/__init__.py",
                "from components.dataset.params import IngestParams\n",
                "from components.dataset.sources import dummy\n",
            ),
            (
                "components/dataset/sources/__init__.py",
                "READERS: dict[str, Reader] = {\n",
                '    "dummy": dummy.READER,\n',
            ),
        ],
    ),
    "loss": Thing(
        "A loss",
        files={
            "components/training/losses/dummy.py": '''"""One minus the label's probability, times a factor."""

from torch import Tensor

from components.training.losses.base import Loss


class Dummy(Loss):
    """Mean of ``times (1 - p[label])``."""

    def __init__(self, times: float = 1.0, smoothing: float = 0.0) -> None:
        super().__init__(smoothing)
        self.times = times

    def of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.times * (1 - logits.softmax(1).gather(1, labels[:, None]).squeeze(1))


LOSS = Dummy
'''
        },
        edits=[
            (
                "components/audit/plan_schema.py",
                "LOSSES: dict[str, dict[str, Any]] = {\n",
                '    "dummy": {"times": 2.0},\n',
            )
        ],
    ),
    "method_of_distillation": Thing(
        "A method of distillation",
        files={
            "components/training/tasks/dummy.py": '''"""The distance of two answers."""

from torch import Tensor

from components.training.tasks.distillation import Distillation


class Dummy(Distillation):
    """Sum of ``|p - q|``."""

    @staticmethod
    def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return (logits.softmax(1) - teacher).abs().sum(1)
'''
        },
        edits=[
            (
                "components/training/tasks/__init__.py",
                "METHODS = {\n",
                '    "dummy": "components.training.tasks.dummy:Dummy",\n',
            )
        ],
    ),
    "augmentation": Thing(
        "An augmentation",
        edits=[
            ("components/models/recipes.py", "    EQUALIZE = 15\n", "    DARKEN = 16\n"),
            (
                "components/models/recipes.py",
                "RECIPES: dict[str, Recipe] = {\n",
                '    "dummy": Recipe(policy=Policy(ops=(Op.DARKEN,), count=1, probability=1.0, level=1.0, '
                'deviation=0.0, spans=((Op.DARKEN, 0, 100, False),), whole_bits="up")),\n',
            ),
            (
                "components/training/operations.py",
                "OPERATIONS: dict[Op, Callable[[Tensor, Tensor], Tensor]] = {\n",
                "    Op.DARKEN: lambda values, amount: values - amount,\n",
            ),
        ],
    ),
    "precision": Thing(
        "A precision",
        edits=[
            (
                "components/export/precisions.py",
                "PRECISIONS: dict[str, Precision] = {\n",
                '    "dummy": Precision(convert=_same, tolerance=0.01, drop=0.02, fill="top"),\n',
            )
        ],
    ),
    "format_of_files": Thing(
        "A format of exported files",
        files={
            "components/export/formats/dummy.py": '''"""ONNX by another name."""

from components.export.formats.base import Format
from components.export.formats.onnx import open_file, write

FORMAT = Format(suffix=".dummy", write=write, open=open_file)
'''
        },
        edits=[
            (
                "components/export/formats/__init__.py",
                "from __future__ import annotations\n",
                "\nfrom components.export.formats import dummy\n",
            ),
            (
                "components/export/formats/__init__.py",
                "FORMATS: dict[str, Format] = {",
                '"dummy": dummy.FORMAT, ',
            ),
        ],
    ),
    "engine": Thing(
        "An engine",
        files={
            "components/benchmark/engines/dummy.py": '''"""ONNX Runtime by another name."""

from components.benchmark.engines.base import Engine
from components.benchmark.engines.onnxruntime import open_model

ENGINE = Engine(lambda precision: "", open_model)
'''
        },
        edits=[
            (
                "components/benchmark/engines/__init__.py",
                "from __future__ import annotations\n",
                "\nfrom components.benchmark.engines import dummy\n",
            ),
            (
                "components/benchmark/engines/__init__.py",
                '"openvino": openvino.ENGINE',
                ', "dummy": dummy.ENGINE',
            ),
        ],
    ),
    "format_of_weights": Thing(
        "A format of weights",
        files={
            "components/weights/readers/dummy.py": '''"""Four letters, then one tensor of float32."""

from pathlib import Path

import numpy as np

from components.weights.readers.stored import Stored


def read(path: Path) -> Stored:
    """The tensor ``w``."""
    return Stored({"w": np.frombuffer(path.read_bytes()[4:], "<f4")}, "a dummy")
'''
        },
        edits=[
            (
                "components/weights/readers/__init__.py",
                "from components.common.errors import RetortError\n",
                "from components.weights.readers import dummy\n",
            ),
            (
                "components/weights/readers/__init__.py",
                "READERS: dict[str, Reader] = {\n",
                '    "dummy": Reader(lambda path, head: head.startswith(b"RTRT"), dummy.read),\n',
            ),
        ],
    ),
    "source_of_start_weights": Thing(
        "A source of start weights",
        edits=[
            (
                "components/weights/source.py",
                "KINDS = {\n",
                '    "dummy": Kind("dummy:NAME", lambda spec, expected, s3: '
                'Source(spec, Path("net.pth"), "0" * 64, "made by a dummy")),\n',
            )
        ],
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree with everything added."""
    root = tmp_path_factory.mktemp("house")
    for folder in ("components", "pipelines", "docs"):
        shutil.copytree(REPO_ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(REPO_ROOT / "tests/contributing.py", root / "contributing.py")
    for thing in THINGS.values():
        for name, content in thing.files.items():
            assert not (root / name).exists()
            (root / name).write_text(content, encoding="utf-8")
        for name, anchor, added in thing.edits:
            text = (root / name).read_text(encoding="utf-8")
            assert anchor in text, f"{name} has no {anchor!r}"
            (root / name).write_text(text.replace(anchor, anchor + added, 1), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def used(copy: Path) -> dict[str, str]:
    """By kind, what went wrong when it was used; empty when nothing did."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "contributing.py"],
        cwd=copy, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", THINGS)
def test_only_the_places_of_its_section_are_touched(kind: str) -> None:
    thing = THINGS[kind]
    places = thing.places()
    for name in thing.files:
        assert f"{Path(name).parent}/" in places, f"'{thing.heading}' does not name the folder of {name}"
    for name, _, _ in thing.edits:
        assert name in places, f"'{thing.heading}' does not name {name}"


@pytest.mark.parametrize("kind", THINGS)
def test_what_is_added_there_is_used(kind: str, used: dict[str, str]) -> None:
    assert used[kind] == ""


def test_a_rule_that_is_added_is_found_by_the_test_of_the_documents(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_docs, "REPO_ROOT", copy)
    for rule in ("imbalance.dummy", "manifest.dummy", "quality.dummy"):
        assert rule in test_docs.rules_in_code()
        assert rule in test_docs.rules_in_docs()


@pytest.mark.parametrize("path", sorted(set(PATH.findall(TEXT))))
def test_every_place_that_is_named_is_there(path: str) -> None:
    assert (REPO_ROOT / path).exists(), f"CONTRIBUTING.md names {path}"
    assert path.endswith("/") == (REPO_ROOT / path).is_dir()


@pytest.mark.parametrize(("name", "path"), sorted(set(NAMED.findall(TEXT))))
def test_every_name_of_a_place_is_there(name: str, path: str) -> None:
    found = re.search(rf"^(?:class )?{name}\b", (REPO_ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"CONTRIBUTING.md names {name} of {path}"

"""The four failures that users of such toolkits reported, on real small images: each is stopped in time.

A rate of 1.298 with top-1 0 for ten epochs; a student far too low because nothing had loaded; NaN for a
hundred epochs; an extracted student that scores 0.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits

from components.audit.plan_schema import Plan
from components.common.errors import FindingsError, RetortError
from components.common.findings import read_report
from components.common.storage import sha256_file
from components.dataset import manifest as manifests
from components.export.export import export
from components.export.params import ExportParams
from components.models import checkpoint
from components.models.card import read_card
from components.models.params import Arch, LearningRate, Optimizer
from components.training import driver, trainer
from components.training.params import DistillParams
from components.training.spec import Phase, TrainSpec
from components.weights.params import WeightsParams
from components.weights.weights import weights as prepare_weights
from tests.components.training import local

EPOCHS = 10


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred classes: two of scikit-learn's digits side by side, 1,400 of them to train on."""
    folder, digits = tmp_path_factory.mktemp("pairs"), load_digits()
    rng = np.random.default_rng(0)
    rows = []
    for i, (left, right) in enumerate(rng.integers(0, len(digits.target), (1800, 2))):
        split = "val" if i % 5 == 0 else "test" if i % 50 == 1 else "train"
        target = folder / "images" / split / f"{i:04}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        both = np.concatenate([digits.images[left], digits.images[right]], axis=1) * 255 / 16
        Image.fromarray(both.astype(np.uint8)).resize((32, 32)).save(target)
        label = int(digits.target[left] * 10 + digits.target[right])
        rows.append(
            {"path": f"{split}/{target.name}", "label": label, "class_name": f"{label:02}", "split": split,
             "source": "real", "sha256": sha256_file(target)}
        )  # fmt: skip
    manifests.write(pa.Table.from_pylist(rows, schema=manifests.SCHEMA), folder / "clean.parquet")
    return folder


Make = Callable[..., TrainSpec]


@pytest.fixture
def hundred(pairs: Path, params: DistillParams) -> Make:
    """A training of ten epochs, from random values."""

    def make(arch: str, optimizer: str, rate: float) -> TrainSpec:
        train = params.teacher.train.model_copy(update={"batch_size": 32, "epochs": EPOCHS})
        lr = LearningRate(initial=rate)
        net = params.teacher.model_copy(
            update={"arch": Arch(name=arch), "optimizer": Optimizer(name=optimizer), "train": train, "lr": lr}
        )
        data = params.data.model_copy(update={"root": str(pairs / "images")})
        return driver.make_spec(
            params, net, params.ray, data, pairs / "clean.parquet", Plan(), None,
            (Phase("finetune", "net", EPOCHS, lr),),
        )  # fmt: skip

    return make


# --- a rate of 1.298, top-1 0 for ten epochs ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "rate"), [("sgd", 1.298), ("sgd", 0.8), ("sgd", 3.0), ("sgd", 20.0), ("adamw", 0.1)]
)
def test_a_rate_far_too_high_is_stopped_within_the_first_epoch(
    hundred: Make, optimizer: str, rate: float
) -> None:
    outcome = local.run(hundred("test_vit", optimizer, rate))
    (told,) = outcome.said("stopped")
    assert told["rule"] in ("train.learns", "train.finite")
    assert "epoch 1" in told["message"]
    assert not outcome.said("epoch"), "before the second"
    assert told["advice"].startswith(f"Likely causes, in order: (1) the rate: {rate:g} is ")
    assert "set teacher.lr.initial: " in told["advice"]


@pytest.mark.parametrize(
    ("arch", "optimizer", "rate"),
    [("test_vit", "sgd", 0.02), ("test_vit", "adamw", 0.001), ("test_efficientnet", "adamw", 0.001)],
)
def test_a_slow_start_at_a_usual_rate_is_not(hundred: Make, arch: str, optimizer: str, rate: float) -> None:
    """Of a hundred classes a network knows next to none after 88 steps."""
    spec = hundred(arch, optimizer, rate)
    outcome = local.run(replace(spec, phases=(replace(spec.phases[0], epochs=2),)))
    assert not outcome.said("stopped")
    assert outcome.result.history[0]["val_top1"] < 0.1


def test_it_goes_on_where_a_person_asked_for_that(hundred: Make) -> None:
    spec = hundred("test_vit", "adamw", 0.1)
    outcome = local.run(replace(spec, phases=(replace(spec.phases[0], epochs=2),), waived=True))
    assert outcome.said("stopped")
    assert len(outcome.result.history) == 2


# --- nothing had loaded -------------------------------------------------------------------------------------


def prepared(student: Path, out: Path) -> None:
    net = {"arch": {"name": "test_efficientnet"}, "weights": str(student)}
    sections = {"global": {"image_size": 32}, "teacher": net, "student": net}
    prepare_weights(WeightsParams.model_validate(sections), out=out)


@pytest.mark.parametrize("prefix", ["student.", "module.", "module.student.backbone."])
def test_weights_behind_a_prefix_are_loaded_all_the_same(weights: Path, prefix: str, tmp_path: Path) -> None:
    tensors = load_file(str(weights / "student.safetensors"))
    save_file(
        {prefix + name: tensor for name, tensor in tensors.items()}, str(tmp_path / "named.safetensors")
    )
    prepared(tmp_path / "named.safetensors", tmp_path / "new")
    again = load_file(str(tmp_path / "new/student.safetensors"))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_weights_under_other_names_stop_before_anything_is_trained(
    data: SimpleNamespace, params: DistillParams, weights: Path, tmp_path: Path
) -> None:
    tensors = load_file(str(weights / "student.safetensors"))
    other = {f"layer{i}": tensor for i, tensor in enumerate(tensors.values())}
    save_file(other, str(tmp_path / "other.safetensors"))
    with pytest.raises((FindingsError, RetortError), match=r"weights.coverage|other.safetensors"):
        prepared(tmp_path / "other.safetensors", tmp_path / "new")
    assert not (tmp_path / "new/student.safetensors").exists()
    # ... and where the step is gone around: by training itself
    with pytest.raises(RetortError, match=r"other.safetensors: fills 0.0% of the backbone"):
        trainer.create_network(params.student.arch, 4, tmp_path / "other.safetensors", 1)


# --- NaN for a hundred epochs -------------------------------------------------------------------------------


@pytest.fixture
def spec(data: SimpleNamespace, params: DistillParams, weights: Path) -> TrainSpec:
    return driver.make_spec(
        params, params.teacher, params.ray, params.data, data.manifest, Plan(),
        weights / "teacher.safetensors", (Phase("finetune", "net", 100, params.teacher.lr),),
    )  # fmt: skip


def stopped(spec: TrainSpec) -> dict[str, Any]:
    outcome = local.run(spec)
    (told,) = outcome.said("stopped")
    assert told["rule"] == "train.finite"
    assert not told["waivable"]
    assert not outcome.said("epoch"), "within the first epoch"
    return told


def test_a_corrupt_tensor_of_the_start_weights_is_named(spec: TrainSpec, tmp_path: Path) -> None:
    tensors = load_file(str(spec.start))
    tensors["blocks.1.0.conv_exp.weight"].view(-1)[7] = float("nan")
    save_file(tensors, str(tmp_path / "corrupt.safetensors"))
    told = stopped(replace(spec, start=tmp_path / "corrupt.safetensors"))
    assert "epoch 1, step 1: blocks.1.0.conv_exp.weight holds values that are no numbers" in told["message"]


def test_one_image_that_makes_a_nan_is_named(
    data: SimpleNamespace, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each image is stretched from 0 to 1, as some toolkits do it; one of them is of one colour."""
    black = "train/003.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(Path(data.root) / black)
    table = manifests.read(data.manifest)
    digests = table["sha256"].to_pylist()
    digests[data.paths.index(black)] = sha256_file(Path(data.root) / black)
    place = table.schema.get_field_index("sha256")
    manifests.write(table.set_column(place, table.schema.field(place), pa.array(digests)), data.manifest)
    create = trainer.create_network

    def standardising(*arguments: Any) -> torch.nn.Module:
        module = create(*arguments)

        def alike(_: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            (images,) = inputs
            low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
            return (images - low) / (high - low)

        module.register_forward_pre_hook(alike)
        return module

    monkeypatch.setattr(trainer, "create_network", standardising)
    spec: TrainSpec = request.getfixturevalue("spec")  # images are decoded there
    plain = replace(spec, train=spec.train.model_copy(update={"augment": "none"}), start=None)
    told = stopped(plain)
    assert f"what is said of {black}, alone, is no number" in told["message"]


def test_scores_that_overflow_are_stopped(spec: TrainSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """As half precision does it, whose largest number is 65,504."""
    create = trainer.create_network

    def narrow(*arguments: Any) -> torch.nn.Module:
        module = create(*arguments)
        module.register_forward_hook(lambda _, __, logits: (logits * 1e6).half().float())
        return module

    monkeypatch.setattr(trainer, "create_network", narrow)
    assert "Likely causes, in order: " in stopped(spec)["advice"]


# --- an extracted student that scores 0 ---------------------------------------------------------------------


@pytest.fixture
def both(teacher: Path, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of teacher and student in one file, under prefixes; and the student's own tensors."""
    tensors = load_file(str(teacher / "model.safetensors"))
    save_file(
        {
            f"{who}.{name}": tensor.clone()
            for who in ("teacher", "student")
            for name, tensor in tensors.items()
        },
        str(tmp_path / "both.safetensors"),
    )
    return tmp_path / "both.safetensors", tensors


def cut_out(folder: Path, teacher: Path, tensors: dict[str, torch.Tensor], proved: bool) -> Path:
    """A student's folder that somebody made by hand; ``proved``: its card was made to fit."""
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / "model.safetensors")
    )
    card = read_card(teacher / "model.json")
    if proved:
        card = card.model_copy(update={"sha256": sha256_file(folder / "model.safetensors")})
    card.write(folder / "model.json")
    return folder


def exports(data: SimpleNamespace, model: Path, tmp_path: Path) -> dict[str, str]:
    """Errors of the step export, by rule."""
    asked = ExportParams.model_validate({"data": {"root": data.root}, "global": {"image_size": 32}})
    out = tmp_path / "exported"
    with pytest.raises(FindingsError):
        export(asked, manifest=data.manifest, model=model, out=out)
    return {finding.rule: finding.message for finding in read_report(out / "report.json").errors()}


def test_a_student_cut_out_under_other_names_is_refused(
    both: tuple[Path, dict[str, torch.Tensor]], teacher: Path, data: SimpleNamespace, params: DistillParams,
    tmp_path: Path,
) -> None:  # fmt: skip
    path, _ = both
    kept = {name: t for name, t in load_file(str(path)).items() if name.startswith("student.")}
    folder = cut_out(tmp_path / "cut", teacher, kept, proved=True)
    with pytest.raises(RetortError, match="does not fill the network"):
        checkpoint.load(folder)
    assert "does not fill the network" in exports(data, folder, tmp_path)["export.checkpoint"]


@pytest.mark.parametrize("random", ["classifier", "blocks", "conv_stem"])
def test_a_student_with_random_parts_is_refused_before_it_is_shipped(
    both: tuple[Path, dict[str, torch.Tensor]], teacher: Path, data: SimpleNamespace, params: DistillParams,
    tmp_path: Path, random: str,
) -> None:  # fmt: skip
    """As ``strict=False`` leaves it: what was named otherwise is what a new network begins with."""
    _, tensors = both
    fresh = trainer.create_network(params.student.arch, 4, None, 5).state_dict()
    mixed = {name: fresh[name] if name.startswith(random) else tensor for name, tensor in tensors.items()}
    unproved = cut_out(tmp_path / "unproved", teacher, mixed, proved=False)
    with pytest.raises(RetortError, match="its card names"):
        checkpoint.load(unproved)
    proved = cut_out(tmp_path / "proved", teacher, mixed, proved=True)
    (proved / "metrics.json").write_text(json.dumps({"val": {"top1": 0.95}}))  # as training left it
    assert "Training wrote 95.00%" in exports(data, proved, tmp_path)["export.accuracy"]

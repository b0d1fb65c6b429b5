"""A checkpoint is whole, and the one that its card names, or it is refused with the tensors at fault."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from components.common.errors import RetortError
from components.common.storage import sha256_file
from components.models import build, checkpoint
from components.models.card import ModelCard, read_card
from components.models.params import Arch, Head


def card(arch: Arch) -> ModelCard:
    mean, std = build.preprocessing(arch)
    return ModelCard(
        arch=arch, class_names=["cat", "dog", "eel"], input_size=[3, 32, 32], mean=list(mean),
        std=list(std), data_fingerprint="data", lineage=[], sha256="",
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    arch = Arch(name="test_efficientnet")
    checkpoint.save(
        tmp_path / "model.safetensors", tmp_path / "model.json", build.create(arch, 3), card(arch)
    )
    return tmp_path


@pytest.mark.parametrize(
    "arch",
    [
        Arch(name="test_efficientnet"),
        Arch(name="test_efficientnet", blocks="acb"),
        Arch(name="test_vit", head=Head(bottleneck=2)),
    ],
    ids=["plain", "acb", "bottleneck"],
)
def test_what_is_saved_is_what_is_loaded(arch: Arch, tmp_path: Path) -> None:
    module = build.create(arch, 3).eval()
    checkpoint.save(tmp_path / "model.safetensors", tmp_path / "model.json", module, card(arch))
    again, read = checkpoint.load(tmp_path)
    assert read.sha256 == sha256_file(tmp_path / "model.safetensors")
    assert not any(part.training for part in again.modules())
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(module(images), again(images))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """A file of other content, which its card vouches for."""
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    change(tensors)
    save_file(tensors, str(path))
    read = read_card(folder / "model.json")
    read.model_copy(update={"sha256": sha256_file(path)}).write(folder / "model.json")


def wrong_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["classifier.weight"] = torch.zeros(1000, 256)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("conv_stem.weight"), "missing: conv_stem.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "not in the network: extra"),
        (wrong_shape, "other shape: classifier.weight"),
        (lambda tensors: tensors.clear(), "the file has 0"),
    ],
)
def test_a_file_that_does_not_fill_the_network_is_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    rewrite(folder, change)
    with pytest.raises(RetortError, match=said):
        checkpoint.load(folder)


def test_half_a_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RetortError, match="damaged, or another one"):
        checkpoint.load(folder)


def test_a_missing_file_names_the_step_that_makes_it(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(RetortError, match=r"model\.safetensors: no such file"):
        checkpoint.load(folder)


def test_values_that_are_not_finite_are_never_saved(folder: Path) -> None:
    module, read = checkpoint.load(folder)
    module.conv_stem.weight.data[0] = float("nan")
    before = sha256_file(folder / "model.safetensors")
    with pytest.raises(RetortError, match=r"conv_stem\.weight hold values that are not finite"):
        checkpoint.save(folder / "model.safetensors", folder / "model.json", module, read)
    assert sha256_file(folder / "model.safetensors") == before


def test_a_network_of_another_architecture_than_its_card_is_never_saved(folder: Path) -> None:
    module = build.create(Arch(name="test_resnet"), 3)
    with pytest.raises(RetortError, match="does not fill the network"):
        checkpoint.save(
            folder / "other.safetensors", folder / "other.json", module, read_card(folder / "model.json")
        )
    assert not (folder / "other.safetensors").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_checkpoint_that_holds_no_numbers_is_named_with_its_tensors(folder: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["classifier.weight"][1] = value
        tensors["conv_stem.weight"][0, 0, 0, 0] = value

    rewrite(folder, spoil)
    with pytest.raises(RetortError) as caught:
        checkpoint.load(folder, "distill")
    said = str(caught.value)
    assert f"{folder / 'model.safetensors'}: the checkpoint itself holds NaN or infinite values" in said
    assert "conv_stem.weight (1 of " in said
    assert "classifier.weight (256 of 768)" in said
    assert "run 'retort distill' again" in said

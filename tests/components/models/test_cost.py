"""``retort cost``: counts worked out by hand, agreement with torch's own counter, and what it says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from components.common.errors import ConfigError, RetortError
from components.common.findings import read_report
from components.models import build, checkpoint, cost
from components.models.card import ModelCard
from components.models.params import Arch, Head
from components.tools.cost import report

FLOAT = 4  # bytes


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def measured(module: nn.Module, *size: int) -> cost.Cost:
    return cost.measure(module.to("meta").eval(), size)


def test_a_convolution_costs_what_the_faq_says() -> None:
    """Cout * Mout^2 * (2 * Cin * K^2 - 1), for 3 -> 8 channels, K = 3, 16 x 16 pixels."""
    found = measured(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False)), 3, 16, 16)
    layer = found.layers[0]
    assert layer.flops == 8 * 16**2 * (2 * 3 * 3**2 - 1)
    assert layer.macs == 8 * 16**2 * 3 * 3**2
    assert layer.parameters == 8 * 3 * 3**2
    assert layer.access_bytes == FLOAT * (3 * 16**2 + 8 * 3 * 3**2 + 8 * 16**2)
    assert layer.output == (8, 16, 16)
    assert layer.intensity == layer.flops / layer.access_bytes


@pytest.mark.parametrize(
    ("conv", "flops"),
    [
        (nn.Conv2d(4, 8, 3, padding=1), 8 * 12 * 20 * 2 * 4 * 9),  # a bias: one addition more
        (nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), 8 * 12 * 20 * (2 * 1 * 9 - 1)),
        (nn.Conv2d(4, 8, 3, padding=1, stride=2, bias=False), 8 * 6 * 10 * (2 * 4 * 9 - 1)),
        (nn.Conv2d(4, 8, (1, 5), bias=False), 8 * 12 * 16 * (2 * 4 * 5 - 1)),
        # each of 4 * 12 * 20 inputs is spread over 8 * 2 * 2 outputs, of 24 x 40; each sums 4 products
        (nn.ConvTranspose2d(4, 8, 2, stride=2, bias=False), 8 * 24 * 40 * (2 * 4 - 1)),
    ],
    ids=["bias", "groups", "stride", "not square", "transposed"],
)
def test_bias_groups_stride_and_shape_change_the_formula(conv: nn.Module, flops: int) -> None:
    assert measured(nn.Sequential(conv), 4, 12, 20).layers[0].flops == flops


class Attention(nn.Module):
    """Two heads of width 8 over the pixels of a map; ``fused``: by torch's one operator, or in steps."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).transpose(1, 2)
        heads = tokens.reshape(1, -1, 2, 8).transpose(1, 2)
        if self.fused:
            return functional.scaled_dot_product_attention(heads, heads, heads)
        scores = (heads * 8**-0.5) @ heads.transpose(-2, -1)
        return scores.softmax(dim=-1) @ heads


def test_attention_is_counted_fused_or_not() -> None:
    tokens, width, heads = 6 * 6, 8, 2
    fused, steps = (measured(nn.Sequential(Attention(kind)), 16, 6, 6).layers[0] for kind in (True, False))
    query_key = heads * tokens * tokens * (2 * width - 1)
    times_values = heads * tokens * width * (2 * tokens - 1)
    assert fused.flops == steps.flops == query_key + times_values
    assert fused.macs == 2 * heads * tokens * tokens * width
    softmax = heads * (5 * tokens - 2) * tokens
    assert fused.other == softmax + heads * tokens * tokens
    assert steps.other == softmax + heads * tokens * width, "here the queries are scaled, not the scores"
    assert fused.access_bytes < steps.access_bytes, "the fused operator never writes the scores"


@pytest.mark.parametrize(
    "name",
    [
        "resnet50d",
        "tf_efficientnet_lite0",
        "mobilenetv3_small_100",
        "repvgg_a0",
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "convnext_tiny",
        "swin_tiny_patch4_window7_224",
    ],
)
def test_multiply_accumulates_are_half_of_what_torch_counts(name: str) -> None:
    """torch's counter takes two operations for each term of a product, and looks at products only."""
    module = cost.on_meta(lambda: build.create(Arch(name=name), 1000))
    found = cost.measure(module, (3, 224, 224))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(torch.empty(1, 3, 224, 224, device="meta"))
    assert 2 * found.total("macs") == counter.get_total_flops()
    assert found.total("macs") < found.total("flops") < 2.05 * found.total("macs")
    assert found.total("parameters") == sum(tensor.numel() for tensor in module.parameters())
    assert not any(tensor.device.type != "meta" for tensor in module.state_dict().values())


class Residual(nn.Module):
    def __init__(self, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.shortcut = shortcut

    def forward(self, images: Tensor) -> Tensor:
        result = self.second(self.first(images))
        return result + images if self.shortcut else result


def test_a_residual_branch_doubles_what_waits() -> None:
    """Row 3.5: the plain block passes one map on, the residual block keeps its input beside it."""
    unit = FLOAT * 8 * 10 * 10
    plain = measured(nn.Sequential(*(Residual(False) for _ in range(3))), 8, 10, 10)
    residual = measured(nn.Sequential(*(Residual(True) for _ in range(3))), 8, 10, 10)
    assert plain.carried_bytes == unit
    assert residual.carried_bytes == 2 * unit
    assert plain.peak.activation_bytes == 2 * unit, "a layer's input and its output"
    assert plain.peak.held_bytes == 0
    assert residual.peak.activation_bytes == 3 * unit
    assert residual.peak.held_bytes == unit, "the input, which waits for the sum"
    assert residual.total("flops") == plain.total("flops")


def test_an_operator_in_place_takes_no_memory_of_its_own() -> None:
    unit = FLOAT * 4 * 5 * 5
    conv = nn.Conv2d(4, 4, 1, bias=False)
    kept = measured(nn.Sequential(conv, nn.ReLU(), nn.ReLU()), 4, 5, 5)
    in_place = measured(nn.Sequential(conv, nn.ReLU(inplace=True), nn.ReLU(inplace=True)), 4, 5, 5)
    assert kept.layers[1].activation_bytes == 2 * unit
    assert in_place.layers[1].activation_bytes == unit
    assert in_place.total("access_bytes") == kept.total("access_bytes"), "it reads and writes as much"


class Branches(nn.Module):
    """A 3 x 3 and a 1 x 1 convolution of the same map, then their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 4, 1, bias=False)
        self.wide = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        stem = self.stem(images)
        return self.wide(stem) + self.narrow(stem)


def test_what_could_run_in_parallel() -> None:
    found = measured(Branches(), 4, 6, 6)
    beside = {layer.name: layer.parallel for layer in found.layers}
    assert beside == {"stem": False, "wide": True, "narrow": True, "(network)": False}
    pixels = 4 * 6 * 6
    narrow, wide = pixels * (2 * 4 - 1), pixels * (2 * 36 - 1)
    assert found.parallel_share == pytest.approx(narrow / (2 * narrow + wide + pixels))
    chain = measured(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)), 4, 6, 6)
    assert chain.parallel_share == 0
    assert not any(layer.parallel for layer in chain.layers)


def test_branches_for_training_cost_more_than_the_convolution_they_fold_into() -> None:
    plain, wide = (
        cost.measure(
            cost.on_meta(lambda blocks=blocks: build.create(Arch(name="resnet18", blocks=blocks), 10)),
            (3, 64, 64),
        )
        for blocks in ("plain", "acb")
    )
    assert plain.parallel_share < wide.parallel_share
    assert 1.5 < wide.total("macs") / plain.total("macs") < 1.8, "3 x 3 + 1 x 3 + 3 x 1 in place of 3 x 3"


def test_a_hundred_thousand_classes_cost_no_memory_to_count() -> None:
    """Row 2.2: C x w + w x classes in place of C x classes."""
    plain, narrow = (
        cost.measure(
            cost.on_meta(
                lambda width=width: build.create(Arch(name="resnet50d", head=Head(bottleneck=width)), 100_000)
            ),
            (3, 64, 64),
        )
        for width in (None, 256)
    )
    saved = plain.total("parameters") - narrow.total("parameters")
    assert saved == 2048 * 100_000 - 256 * (2048 + 100_000)


def test_the_command_writes_a_table_of_every_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report("test_efficientnet", classes=5, size=64, out=tmp_path)
    content = json.loads((tmp_path / "test_efficientnet.json").read_text())
    assert content["input_size"] == [3, 64, 64]
    assert content["classes"] == 5
    assert content["total"]["flops"] == found.total("flops")
    assert len(content["layers"]) == len(found.layers)
    with (tmp_path / "test_efficientnet.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["parameters"]) for row in rows) == found.total("parameters")
    verdict = read_report(tmp_path / "report.json")
    assert verdict.passed
    assert {finding.rule: finding.row for finding in verdict.findings} == {
        **dict.fromkeys(
            (
                "cost.parameters", "cost.flops", "cost.memory_access", "cost.peak_activation",
                "cost.intensity", "cost.parallel",
            ),
            "3.5",
        ),
        "head.fc_share": "2.2",
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "the 20 with the most FLOPs" in said
    assert "MACs" in said
    assert "total" in said

    before = (tmp_path / "test_efficientnet.json").read_bytes()
    report("test_vit", everything=True, out=tmp_path)
    said = capsys.readouterr().out
    assert "blocks.5.mlp.fc2" in said
    report("test_efficientnet", classes=5, size=64, out=tmp_path)
    assert (tmp_path / "test_efficientnet.json").read_bytes() == before
    assert (tmp_path / "test_vit.csv").exists(), "one network's table beside another's"


@pytest.fixture
def student(tmp_path: Path) -> Path:
    arch = Arch(name="test_efficientnet", blocks="acb")
    folder = tmp_path / "student"
    card = ModelCard(
        arch=arch, class_names=["cat", "dog", "eel"], input_size=[3, 48, 48], mean=[0.5] * 3, std=[0.5] * 3,
        data_fingerprint="data", lineage=[], sha256="",
    )  # fmt: skip
    checkpoint.save(folder / "model.safetensors", folder / "model.json", build.create(arch, 3), card)
    return folder


def test_a_trained_network_is_known_by_its_card(student: Path, tmp_path: Path) -> None:
    found = report(str(student), out=tmp_path / "cost")
    assert found.input_size == (3, 48, 48)
    assert any(layer.name.endswith("horizontal") for layer in found.layers)
    content = json.loads((tmp_path / "cost" / "student.json").read_text())
    assert content["classes"] == 3
    assert list(read_report(tmp_path / "cost" / "report.json").inputs) == [str(student / "model.json")]
    with pytest.raises(ConfigError, match=r"--classes: .*model\.json says it already"):
        report(str(student), classes=5, out=tmp_path / "cost")


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("resnet5O", None, r"arch\.name: 'resnet5O'.*resnet50"),
        ("nowhere/student", None, r"nowhere/student/model\.json: no such file"),
        ("vit_tiny_patch16_224", 30, r"cannot run on an image of 30 x 30 pixels: .*patch size"),
    ],
)
def test_what_cannot_be_counted_is_named(name: str, size: int | None, said: str, tmp_path: Path) -> None:
    with pytest.raises(RetortError, match=said):
        report(name, size=size, out=tmp_path)
    assert not list(tmp_path.iterdir())

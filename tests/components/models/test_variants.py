"""What our variants do differently from timm's networks of nearly the same name."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from components.models import build, variants
from components.models.params import Arch

NAMES = sorted(variants.default_cfgs)


@pytest.mark.parametrize("name", NAMES)
def test_timm_creates_them_by_name(name: str) -> None:
    module = timm.create_model(name, num_classes=3).eval()
    with torch.inference_mode():
        assert module(torch.rand(1, 3, 32, 32)).shape == (1, 3)
    assert build.preprocessing(Arch(name=name))[0] == pytest.approx((0.485, 0.456, 0.406))
    features = build.create(Arch(name=name), 0)
    assert set(module.state_dict()) - set(features.state_dict()) == {
        f"{module.pretrained_cfg['classifier']}.{role}" for role in ("weight", "bias")
    }


def names_and_shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.shape) for key, t in timm.create_model(name).state_dict().items()}


@pytest.mark.parametrize(
    ("ours", "timms", "projection"),
    [
        ("resnet18_vd", "resnet18d", "layer1.0.downsample.1.weight"),
        ("resnet34_vd", "resnet34d", "layer1.0.downsample.1.weight"),
        ("resnet18_paddle", "resnet18", "layer1.0.downsample.0.weight"),
        ("resnet34_paddle", "resnet34", "layer1.0.downsample.0.weight"),
    ],
)
def test_resnets_only_add_a_projection_to_the_first_shortcut(ours: str, timms: str, projection: str) -> None:
    found, known = names_and_shapes(ours), names_and_shapes(timms)
    assert known.items() <= found.items()
    added = {name for name in found if name not in known}
    assert {name.rpartition(".downsample")[0] for name in added} == {"layer1.0"}
    assert found[projection] == (64, 64, 1, 1)


def test_mobilenet_v1_has_timms_tensors_but_no_ceiling_on_activations() -> None:
    assert names_and_shapes("mobilenetv1_100_paddle") == names_and_shapes("mobilenetv1_100")
    module = timm.create_model("mobilenetv1_100_paddle")
    assert not any(isinstance(layer, nn.ReLU6) for layer in module.modules())


def test_squeeze_and_excitation_as_paddle_has_it() -> None:
    gate = variants.HardSigmoid()
    values = torch.tensor([-3.0, -2.5, -1.0, 0.0, 1.0, 2.5, 3.0])
    torch.testing.assert_close(gate(values), torch.tensor([0.0, 0.0, 0.3, 0.5, 0.7, 1.0, 1.0]))
    shapes = names_and_shapes("mobilenetv3_small_100_paddle")
    assert shapes["blocks.2.1.se.conv_reduce.weight"] == (60, 240, 1, 1), "a quarter, not rounded to eights"
    assert "conv_head.bias" not in shapes


def test_dropout_scales_when_predicting_and_not_while_training() -> None:
    torch.manual_seed(0)
    module = timm.create_model("mobilenetv3_small_100_paddle", num_classes=0, drop_rate=0.2)
    maps = torch.rand(1, 576, 2, 2)
    kept = module.train().forward_head(maps)
    scaled = module.eval().forward_head(maps)
    whole = module.act2(module.conv_head(module.global_pool(maps))).flatten(1)
    torch.testing.assert_close(scaled, 0.8 * whole)
    some = kept != 0
    assert 0.7 < some.float().mean() < 0.9
    torch.testing.assert_close(kept[some], whole[some])

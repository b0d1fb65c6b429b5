"""Architectures that differ from timm's in a detail, registered with timm under names of their own.

They are PaddleClas's networks, as far as no network of timm computes the same: ``resnet18_vd`` and
``resnet34_vd``, ``resnet18_paddle`` and ``resnet34_paddle`` (a projection in the first block's shortcut,
which timm leaves out where sizes agree), ``resnet200_vd`` (3, 12, 48, 3 blocks, where timm's has 3, 24, 36,
3), ``mobilenetv1_100_paddle`` (ReLU, where timm's has ReLU6), ``mobilenetv2_100_paddle`` (an expansion in the
first block too), ``mobilenetv3_small_100_paddle`` and ``mobilenetv3_large_100_paddle``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models._builder import build_model_with_cfg
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_avg, downsample_conv
from torch import Tensor, nn
from torch.nn import functional

KEPT = 0.8  # PaddleClas's MobileNetV3 drops 0.2 in training and scales by the rest when it predicts


def _config(first_conv: str, classifier: str) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": classifier,
    }


default_cfgs = generate_default_cfgs(
    {
        "resnet18_vd": _config("conv1.0", "fc"),
        "resnet34_vd": _config("conv1.0", "fc"),
        "resnet200_vd": _config("conv1.0", "fc"),
        "resnet18_paddle": _config("conv1", "fc"),
        "resnet34_paddle": _config("conv1", "fc"),
        "mobilenetv1_100_paddle": _config("conv_stem", "classifier"),
        "mobilenetv2_100_paddle": _config("conv_stem", "classifier"),
        "mobilenetv3_small_100_paddle": _config("conv_stem", "classifier"),
        "mobilenetv3_large_100_paddle": _config("conv_stem", "classifier"),
    }
)


# --- ResNet -----------------------------------------------------------------------------------------------


class ProjectedResNet(ResNet):
    """A ResNet of basic blocks whose very first shortcut is a convolution with a batch norm too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        first = cast("BasicBlock", cast("nn.Sequential", self.layer1)[0])
        channels = first.conv1.in_channels, first.conv2.out_channels
        down = downsample_avg if kwargs.get("avg_down") else downsample_conv
        first.downsample = down(*channels, kernel_size=1)
        for layer in first.downsample.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


VD = {"stem_width": 32, "stem_type": "deep", "avg_down": True}


def _projected(name: str, pretrained: bool, layers: tuple[int, ...], **options: Any) -> nn.Module:
    options = {"block": BasicBlock, "layers": layers, **options}
    return build_model_with_cfg(ProjectedResNet, name, pretrained, **options)


@register_model
def resnet18_vd(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PaddleClas's ResNet18_vd."""
    return _projected("resnet18_vd", pretrained, (2, 2, 2, 2), **VD, **kwargs)


@register_model
def resnet34_vd(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PaddleClas's ResNet34_vd."""
    return _projected("resnet34_vd", pretrained, (3, 4, 6, 3), **VD, **kwargs)


@register_model
def resnet18_paddle(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PaddleClas's ResNet18."""
    return _projected("resnet18_paddle", pretrained, (2, 2, 2, 2), **kwargs)


@register_model
def resnet34_paddle(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PaddleClas's ResNet34."""
    return _projected("resnet34_paddle", pretrained, (3, 4, 6, 3), **kwargs)


@register_model
def resnet200_vd(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PaddleClas's ResNet200_vd."""
    options = {"block": Bottleneck, "layers": (3, 12, 48, 3), **VD, **kwargs}
    return build_model_with_cfg(ResNet, "resnet200_vd", pretrained, **options)


# --- MobileNet --------------------------------------------------------------------------------------------


def _mobile(name: str, pretrained: bool, blocks: list[list[str]], **options: Any) -> nn.Module:
    options = {"block_args": decode_arch_def(blocks), "stem_size": 32, **options}
    return build_model_with_cfg(EfficientNet, name, pretrained, **options)


@register_model
def mobilenetv1_100_paddle(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PaddleClas's MobileNetV1."""
    blocks = [
        ["dsa_r1_k3_s1_c64"],
        ["dsa_r2_k3_s2_c128"],
        ["dsa_r2_k3_s2_c256"],
        ["dsa_r6_k3_s2_c512"],
        ["dsa_r2_k3_s2_c1024"],
    ]
    options = {"num_features": 0, "act_layer": nn.ReLU, **kwargs}
    return _mobile("mobilenetv1_100_paddle", pretrained, blocks, **options)


@register_model
def mobilenetv2_100_paddle(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PaddleClas's MobileNetV2."""
    blocks = [
        ["ir_r1_k3_s1_e1_c16"],
        ["ir_r2_k3_s2_e6_c24"],
        ["ir_r3_k3_s2_e6_c32"],
        ["ir_r4_k3_s2_e6_c64"],
        ["ir_r3_k3_s1_e6_c96"],
        ["ir_r3_k3_s2_e6_c160"],
        ["ir_r1_k3_s1_e6_c320"],
    ]
    options = {"num_features": 1280, "act_layer": nn.ReLU6, **kwargs}
    return _mobile("mobilenetv2_100_paddle", pretrained, blocks, **options)


class HardSigmoid(nn.Module):
    """``clip(0.2 x + 0.5, 0, 1)``: Paddle's default slope; PyTorch's hard-sigmoid has 1/6."""

    def forward(self, values: Tensor) -> Tensor:
        return (values * 0.2 + 0.5).clamp(0.0, 1.0)


class PaddleMobileNetV3(MobileNetV3):
    """MobileNetV3 as PaddleClas has it.

    An expansion in the first block too; squeeze-and-excitation of exactly a quarter of the channels, with
    ``HardSigmoid``; no bias before the head; and features scaled by what dropout keeps, since it does not
    scale up while training (``downscale_in_infer``). ``drop_rate`` should be 0.2, or 0 for none.
    """

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Float [N, C, H, W] -> logits float [N, classes], or what the classifier sees."""
        x = self.flatten(self.act2(self.norm_head(self.conv_head(self.global_pool(x)))))
        if self.drop_rate > 0.0:
            x = functional.dropout(x, self.drop_rate, self.training)
        x = x * KEPT
        return x if pre_logits else self.classifier(x)


def _mobile_v3(name: str, pretrained: bool, blocks: list[list[str]], **options: Any) -> nn.Module:
    options = {
        "block_args": decode_arch_def(blocks),
        "num_features": 1280,
        "head_bias": False,
        "act_layer": nn.Hardswish,
        "se_layer": partial(SqueezeExcite, gate_layer=HardSigmoid, force_act_layer=nn.ReLU, rd_round_fn=int),
        **options,
    }
    return build_model_with_cfg(PaddleMobileNetV3, name, pretrained, **options)


@register_model
def mobilenetv3_small_100_paddle(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PaddleClas's MobileNetV3_small_x1_0."""
    blocks = [
        ["ir_r1_k3_s2_e1_c16_se0.25_nre"],
        ["ir_r1_k3_s2_e4.5_c24_nre", "ir_r1_k3_s1_e3.67_c24_nre"],
        ["ir_r1_k5_s2_e4_c40_se0.25", "ir_r2_k5_s1_e6_c40_se0.25"],
        ["ir_r2_k5_s1_e3_c48_se0.25"],
        ["ir_r3_k5_s2_e6_c96_se0.25"],
        ["cn_r1_k1_s1_c576"],
    ]
    return _mobile_v3("mobilenetv3_small_100_paddle", pretrained, blocks, **kwargs)


@register_model
def mobilenetv3_large_100_paddle(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PaddleClas's MobileNetV3_large_x1_0."""
    blocks = [
        ["ir_r1_k3_s1_e1_c16_nre"],
        ["ir_r1_k3_s2_e4_c24_nre", "ir_r1_k3_s1_e3_c24_nre"],
        ["ir_r3_k5_s2_e3_c40_se0.25_nre"],
        ["ir_r1_k3_s2_e6_c80", "ir_r1_k3_s1_e2.5_c80", "ir_r2_k3_s1_e2.3_c80"],
        ["ir_r2_k3_s1_e6_c112_se0.25"],
        ["ir_r3_k5_s2_e6_c160_se0.25"],
        ["cn_r1_k1_s1_c960"],
    ]
    return _mobile_v3("mobilenetv3_large_100_paddle", pretrained, blocks, **kwargs)

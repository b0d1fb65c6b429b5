"""Graphs: folding, tracing and the preprocessing in front, against torch and Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import TensorProto, helper
from PIL import Image

from components.dataset.images import central_square
from components.export import exported, graph
from components.models import tracing


def settled(arch: str, **settings: object) -> torch.nn.Module:
    """A network whose batch norms have seen something: fresh ones would hide mistakes in folding them."""
    torch.manual_seed(1)
    module = timm.create_model(arch, num_classes=5, **settings)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, 0, 0.2)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, 0, 0.2)
    return module.eval()


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("tf_efficientnet_lite0", {}),  # works out its padding from the input's size
        ("mobilenetv3_small_050", {}),
        ("test_vit", {"img_size": 64}),
        ("test_convnext", {}),
    ],
)
def test_any_timm_network_gives_the_same_scores_in_batches_of_1_and_n(
    arch: str, settings: dict[str, object], tmp_path: Path
) -> None:
    module = settled(arch, **settings)
    graph.save(graph.to_onnx(module, 64), tmp_path / "model.onnx", {})
    session = exported.session(tmp_path / "model.onnx")
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 64, 64)
        with torch.inference_mode():
            expected = torch.softmax(module(images), dim=1).numpy()
        np.testing.assert_allclose(exported.run(session, images.numpy()), expected, atol=1e-5)


def test_paddings_and_batch_norms_leave_only_convolutions() -> None:
    kinds = [node.op_type for node in graph.to_onnx(settled("tf_efficientnet_lite0"), 64).graph.node]
    assert set(kinds) == {"Conv", "Clip", "Add", "GlobalAveragePool", "Flatten", "Gemm", "Softmax"}


def test_the_newer_exporter_takes_over_where_tracing_lacks_an_operator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.onnx

    honest = torch.onnx.export

    def without_tracing(*arguments: object, **settings: object) -> object:
        if not settings["dynamo"]:
            raise torch.onnx.errors.UnsupportedOperatorError("aten::new", 1, None)
        return honest(*arguments, **settings)

    monkeypatch.setattr(torch.onnx, "export", without_tracing)
    module = settled("test_efficientnet")
    graph.save(graph.to_onnx(module, 32), tmp_path / "model.onnx", {})
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        expected = torch.softmax(module(images), dim=1).numpy()
    scores = exported.run(exported.session(tmp_path / "model.onnx"), images.numpy())
    np.testing.assert_allclose(scores, expected, atol=1e-5)


@pytest.mark.parametrize("arch", ["repvgg_a0", "mobileone_s0"])
def test_folding_multi_branch_blocks_keeps_the_output(arch: str) -> None:
    module = settled(arch)
    folded, blocks = graph.fold(module)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before, after = module(images), folded(images)
    assert blocks > 0
    assert float((before - after).abs().max() / before.abs().max()) < 1e-5
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in module.parameters())


def test_a_plain_network_has_nothing_to_fold() -> None:
    module = settled("test_resnet")
    folded, blocks = graph.fold(module)
    images = torch.randn(2, 3, 64, 64)
    assert blocks == 0
    torch.testing.assert_close(folded(images), module(images))


class Doubled(torch.nn.Module):
    """A block of our own with two branches, as re-parameterised blocks offer themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (torch.nn.Conv2d(3, 4, 3) for _ in range(2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.left(images) + self.right(images)

    def fold(self) -> torch.nn.Conv2d:
        plain = torch.nn.Conv2d(3, 4, 3, dtype=self.left.weight.dtype)
        plain.weight.data = self.left.weight + self.right.weight
        plain.bias.data = self.left.bias + self.right.bias
        return plain


def test_a_block_that_can_fold_itself_is_folded() -> None:
    module = torch.nn.Sequential(Doubled(), torch.nn.ReLU())
    folded, blocks = graph.fold(module)
    images = torch.randn(2, 3, 8, 8)
    assert blocks == 1
    assert isinstance(folded[0], torch.nn.Conv2d)
    torch.testing.assert_close(folded(images), module(images), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def preprocessing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph that is nothing but the preprocessing, to 64 pixels: it gives levels 0..255."""
    shape = ["N", 3, 64, 64]
    identity = helper.make_graph(
        [helper.make_node("Identity", ["images"], ["scores"])],
        "network",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(identity, opset_imports=[helper.make_opsetid("", tracing.OPSET)], ir_version=10)
    path = tmp_path_factory.mktemp("preprocessing") / "model.onnx"
    graph.save(graph.with_preprocessing(model, 64, [0, 0, 0], [1 / 255] * 3), path, {})
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return path


@pytest.mark.parametrize("shape", [(427, 640), (64, 64), (8, 8), (63, 40), (300, 211), (65, 129), (480, 639)])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_graph_resizes_photographs_as_pillow_does(
    preprocessing: Path, shape: tuple[int, int], engine: str
) -> None:
    from sklearn.datasets import load_sample_images

    photo = Image.fromarray(load_sample_images().images[0]).resize((shape[1], shape[0]))
    expected = central_square(photo, 64).astype(int)
    images = np.asarray(photo)[None]
    if engine == "onnxruntime":
        got = exported.run(exported.session(preprocessing), images)
    else:
        import openvino

        compiled = openvino.Core().compile_model(
            str(preprocessing), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        got = compiled([images])[0]
    difference = np.abs(got[0].transpose(1, 2, 0) - expected)
    assert difference.max() < 1.5  # one level of 255: sums that end at a half
    assert (difference > 0.5).mean() < 0.001

"""features.onnx computes what the backbone does, from plain pixels, in any batch."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from components.common.errors import RetortError
from components.common.storage import sha256_file
from components.models import build, features
from components.models.params import Arch
from components.tools.backbone import Backbone


@pytest.mark.parametrize("name", ["test_efficientnet", "tf_efficientnet_lite0", "test_vit"])
def test_features_are_the_backbones(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    arch = Arch(name=name)
    module = build.plain(arch, 0).eval()
    mean, std = build.preprocessing(arch)
    features.write_onnx(module, 64, mean, std, tmp_path / "features.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "features.onnx"))
    assert session.get_modelmeta().custom_metadata_map["size"] == "64"
    for batch in (1, 5):
        pixels = np.random.default_rng(1).integers(0, 256, (batch, 64, 64, 3), dtype=np.uint8)
        given = session.run(["features"], {"images": pixels})[0]
        values = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        normal = (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.inference_mode():
            expected = module(normal).numpy()
        np.testing.assert_allclose(given, expected, atol=1e-4 * np.abs(expected).max())
    features.write_onnx(module, 64, mean, std, tmp_path / "again.onnx")
    assert sha256_file(tmp_path / "again.onnx") == sha256_file(tmp_path / "features.onnx")


def test_a_network_whose_features_are_no_single_map_is_refused_by_name() -> None:
    network = build.plain(Arch(name="crossvit_tiny_240"), 5)
    with pytest.raises(RetortError, match="--from last: CrossVit has several maps at once; use pooled"):
        Backbone(network, "last", 240)

"""Features of images, known by the content that the manifest names."""

import shutil
from pathlib import Path

import pytest

from components.audit import features
from components.common.errors import ImageError
from components.dataset import manifest as manifests


def test_an_image_that_was_replaced_gets_no_features(digits: Path, tmp_path: Path) -> None:
    rows = manifests.read(digits / "data/clean.parquet", ["path", "sha256"]).slice(0, 40)
    paths, hashes = rows["path"].to_pylist(), rows["sha256"].to_pylist()
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(digits / "data/digits" / path, tmp_path / path)
    backbone = features.Extractor(digits / "features.onnx")
    (tmp_path / paths[9]).write_bytes((tmp_path / paths[8]).read_bytes())
    with pytest.raises(ImageError, match=rf"image\.changed: {paths[9]} "):
        features.extract(backbone, str(tmp_path), paths, hashes)
    (tmp_path / paths[9]).unlink()
    assert features.extract(backbone, str(tmp_path), paths, hashes).readable.sum() == 39, "one is lost"

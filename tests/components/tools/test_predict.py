"""``predict``: an exported model on files and folders, some of them bad."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from components.common.errors import RetortError
from components.export import exported
from components.tools.predict import predict
from pipelines import cli
from tests.components.export.conftest import NAMES, Digits


def test_a_folder_is_classified_as_export_measured(
    digits: Digits, exported_folder: Path, tmp_path: Path
) -> None:
    found = predict(exported_folder / "model.onnx", [digits.root / "val"], out=tmp_path)
    right = sum(f"digit {Path(item.path).parent.name}" == item.class_name for item in found)
    assert len(found) == 200
    assert right / len(found) > 0.8
    table = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert [row["class"] for row in table] == [item.class_name for item in found]
    with (tmp_path / "predictions.csv").open(encoding="utf-8") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [item.path for item in found]


def test_the_rows_of_a_manifest_are_classified(digits: Digits, exported_folder: Path, tmp_path: Path) -> None:
    found = predict(exported_folder, [digits.manifest], root=str(digits.root), out=tmp_path)
    assert [item.path for item in found] == pq.read_table(digits.manifest)["path"].to_pylist()
    assert all(item.class_name in NAMES for item in found)


def test_unreadable_files_are_named_and_the_rest_goes_on(
    digits: Digits, exported_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = sorted((digits.root / "val" / "3").iterdir())[0]
    shutil.copy(good, folder / "100% sure.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.png").write_bytes(good.read_bytes()[:60])
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "notes.txt").write_text("no image, and not looked at")
    found = predict(exported_folder, [folder], out=tmp_path / "out")
    assert {Path(item.path).name: bool(item.error) for item in found} == {
        "100% sure.png": False,
        "empty.png": True,
        "half.png": True,
        "page.jpg": True,
    }
    assert next(item for item in found if not item.error).class_name in NAMES
    said = capsys.readouterr().err
    assert "3 of 4 files cannot be read" in said
    assert "half.png" in said


def test_names_that_are_no_utf8_or_a_formula_are_written_as_such(
    digits: Digits, exported_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good = sorted((digits.root / "val" / "3").iterdir())[0]
    names = [b"=cmd|calc.png", b"caf\xe9.png", b"caf\xe9 empty.png"]
    for name in names:
        Path(os.fsdecode(name)).write_bytes(b"" if b"empty" in name else good.read_bytes())
    found = predict(exported_folder, [Path(os.fsdecode(name)) for name in names], out=tmp_path / "out")
    assert [item.path for item in found] == ["=cmd|calc.png", "caf%E9.png", "caf%E9 empty.png"]
    assert [bool(item.error) for item in found] == [False, False, True]
    assert pq.read_table("out/predictions.parquet")["path"].to_pylist() == [item.path for item in found]
    with Path("out/predictions.csv").open(encoding="utf-8") as file:
        assert [row["path"][:5] for row in csv.DictReader(file)] == ["'=cmd", "caf%E", "caf%E"]


def test_only_when_no_image_can_be_read_the_command_fails(
    digits: Digits,
    exported_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.png").write_bytes(b"")
    good = sorted((digits.root / "val" / "3").iterdir())[0]
    model = ["--model", str(exported_folder)]
    assert cli.run(["predict", "empty.png", str(good), *model]) == 0
    assert cli.run(["predict", "empty.png", *model]) == 1
    said = capsys.readouterr().err
    assert "retort: 1 image, and none can be read; outputs/predict/predictions.csv says why" in said
    assert "the file is empty" in Path("outputs/predict/predictions.csv").read_text()


def test_preprocessing_inside_or_outside_gives_the_same_classes(
    digits: Digits, trained: Path, exported_folder: Path, tmp_path: Path
) -> None:
    from components.export.export import export

    export(
        digits.params(preprocess_in_graph=True),
        manifest=digits.manifest,
        model=trained,
        out=tmp_path / "export",
    )
    inside = predict(tmp_path / "export", [digits.root / "val"], out=tmp_path / "inside")
    outside = predict(exported_folder, [digits.root / "val"], out=tmp_path / "outside")
    assert [item.class_name for item in inside] == [item.class_name for item in outside]


@pytest.mark.parametrize(("value", "said"), [(np.nan, "holds NaN: .* of "), (np.inf, "are not finite")])
def test_a_model_that_holds_no_numbers_does_not_predict(
    value: float, said: str, digits: Digits, exported_folder: Path, tmp_path: Path
) -> None:
    model = onnx.load(exported_folder / "model.onnx")
    head = next(node for node in model.graph.node if node.op_type == "Gemm")
    tensor = next(each for each in model.graph.initializer if each.name == head.input[1])
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[0] = value
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(RetortError, match=f"{tmp_path / 'model.onnx'}: .*{said}.*retort export"):
        predict(tmp_path / "model.onnx", [digits.root / "val"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_names_fewer_classes_than_it_has_does_not_predict(
    digits: Digits, exported_folder: Path, tmp_path: Path
) -> None:
    model = onnx.load(exported_folder / "model.onnx")
    next(prop for prop in model.metadata_props if prop.key == "class_names").value = '["a", "b"]'
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(RetortError, match="gives 10 scores, its metadata names 2 classes"):
        predict(tmp_path / "model.onnx", [digits.root / "val"], out=tmp_path / "out")


def test_a_backbone_without_a_head_cannot_predict(
    digits: Digits, exported_folder: Path, tmp_path: Path
) -> None:
    model = onnx.load(exported_folder / "model.onnx")
    head = next(node for node in model.graph.node if node.op_type == "Gemm")
    features = onnx.helper.make_tensor_value_info(head.input[0], onnx.TensorProto.FLOAT, None)
    del model.graph.output[:]
    model.graph.output.append(features)
    onnx.save(model, tmp_path / "features.onnx")
    with pytest.raises(RetortError, match="a backbone without a head cannot predict"):
        predict(tmp_path / "features.onnx", [digits.root / "val"], out=tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("conv1.weight",), r"weights \(\.safetensors\), without a head, so they cannot predict: finetune"),
        (
            ("conv1.weight", "fc.weight"),
            r"weights .*, not an exported model, so they cannot predict: finetune",
        ),
    ],
)
def test_weights_cannot_predict(digits: Digits, tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    path = tmp_path / "teacher.safetensors"
    save_file({name: np.zeros((2, 2), np.float32) for name in names}, path)
    with pytest.raises(RetortError, match=said):
        predict(path, [digits.root], out=tmp_path)
    (tmp_path / "features.onnx").touch()
    with pytest.raises(RetortError, match="start weights, without a head, so they cannot predict"):
        predict(tmp_path, [digits.root], out=tmp_path)


@pytest.mark.parametrize(
    ("model", "images", "said"),
    [
        ("nowhere.onnx", "val", "nowhere.onnx: no such file"),
        ("text.onnx", "val", "text.onnx: ONNX Runtime cannot open it"),
        ("model.onnx", "nowhere", "nowhere: no such file or folder"),
        ("model.onnx", "empty", "no image in there"),
    ],
)
def test_what_is_missing_is_named(
    model: str, images: str, said: str, digits: Digits, exported_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(exported_folder / "model.onnx", tmp_path)
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "empty").mkdir()
    place = digits.root / "val" if images == "val" else tmp_path / images
    with pytest.raises(RetortError, match=said):
        predict(tmp_path / model, [place], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_without_our_metadata_is_refused(exported_folder: Path, tmp_path: Path) -> None:
    model = onnx.load(exported_folder / "model.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(RetortError, match="its metadata lacks class_names"):
        exported.read(tmp_path / "foreign.onnx")

"""The step ``export``: what it writes, and whom it stops."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pyarrow as pa
import pytest
import timm
import torch

from components.common.errors import FindingsError, ImageError, RetortError
from components.common.findings import Finding, read_report
from components.common.storage import sha256_file
from components.dataset import manifest as manifests
from components.export import exported, graph
from components.export.export import export
from components.models.card import read_card
from tests.components.export.conftest import ARCH, NAMES, Digits, write_checkpoint


def findings(out: Path) -> dict[str, Finding]:
    """The most serious finding of each rule."""
    report = read_report(out / "report.json")
    return {finding.rule: finding for finding in reversed([*report.loud(), *report.notes()])}


def test_the_exported_file_says_what_it_is(trained: Path, exported_folder: Path) -> None:
    card, about = read_card(trained / "model.json"), exported.read(exported_folder / "model.onnx")
    assert about.class_names == card.class_names == NAMES
    assert (about.mean, about.std, about.size, about.sha256) == (card.mean, card.std, 32, card.sha256)
    assert not about.in_graph
    assert (exported_folder / "labels.txt").read_text().splitlines() == NAMES
    assert read_card(exported_folder / "model.json") == card


def test_class_ids_and_scores_equal_the_networks_on_every_validation_image(exported_folder: Path) -> None:
    parity = json.loads((exported_folder / "parity.json").read_text())
    for way in ("batches", "single images"):
        compared = parity["compared"][f"model.onnx, {way}"]
        assert compared["images"] == 200
        assert compared["holds"]
        assert compared["max_difference"] < 1e-4
    assert parity["compared"]["model.onnx, batches"]["top1"] == parity["checkpoint"]["top1"] > 0.8
    found = findings(exported_folder)
    assert {
        "export.checkpoint",
        "export.class_num",
        "export.parity",
        "export.accuracy",
        "export.int8",
    } <= set(found)
    assert found["export.class_num"].measured == 10


def test_a_replaced_image_is_named(digits: Digits, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(digits.root, tmp_path / "images")
    rows = exported.rows(digits.manifest, "val")
    table = manifests.read(digits.manifest)
    hashes = [sha256_file(digits.root / path) for path in table["path"].to_pylist()]
    place = table.schema.get_field_index("sha256")
    manifests.write(table.set_column(place, "sha256", pa.array(hashes)), tmp_path / "clean.parquet")
    shutil.copyfile(tmp_path / "images" / rows.paths[7], tmp_path / "images" / rows.paths[5])

    moved = Digits(tmp_path / "images", tmp_path / "clean.parquet")
    with pytest.raises(ImageError, match=rf"image\.changed: {rows.paths[5]} "):
        export(moved.params(), manifest=moved.manifest, model=trained, out=tmp_path / "export")


def test_the_scores_are_probabilities_for_any_batch(exported_folder: Path) -> None:
    session = exported.session(exported_folder / "model.onnx")
    for batch in (1, 3, 70):
        scores = exported.run(session, np.zeros((batch, 3, 32, 32), np.float32))
        assert scores.shape == (batch, 10)
        np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)


def test_the_same_checkpoint_gives_the_same_bytes(
    digits: Digits, trained: Path, exported_folder: Path, tmp_path: Path
) -> None:
    export(digits.params(int8=True), manifest=digits.manifest, model=trained, out=tmp_path / "again")
    for name in ("model.onnx", "model.int8.onnx", "labels.txt", "model.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported_folder / name).read_bytes(), name


def test_the_teachers_export_survives_the_students(digits: Digits, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "export"
    export(digits.params(), manifest=digits.manifest, model=trained, out=out / "teacher", of="teacher")
    export(digits.params(), manifest=digits.manifest, model=trained, out=out)
    assert (out / "teacher" / "model.onnx").exists()
    assert (out / "model.onnx").exists()
    assert str(trained / "model.safetensors") in read_report(out / "teacher" / "report.json").inputs


# What a bad exporter could do. Each is a real graph, changed; the step must stop before anything appears.


def permuted_classes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The last layer's rows in another order: right features, wrong names."""
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    for tensor in model.graph.initializer:
        if tensor.name in gemm.input[1:]:
            values = onnx.numpy_helper.to_array(tensor)
            axis = values.shape.index(10)
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1, axis=axis), tensor.name))
    return model


def fixed_batch(model: onnx.ModelProto) -> onnx.ModelProto:
    """The batch as a constant 1, as exporters have been seen to write it."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        value.type.tensor_type.shape.dim[0].dim_value = 1
    return model


def no_softmax(model: onnx.ModelProto) -> onnx.ModelProto:
    """Logits instead of scores: the same classes, other numbers."""
    last = next(node for node in model.graph.node if node.op_type == "Softmax")
    last.op_type = "Identity"
    del last.attribute[:]
    return model


@pytest.mark.parametrize("spoil", [permuted_classes, fixed_batch, no_softmax])
def test_a_spoiled_graph_is_called_a_bad_export(
    spoil: object, digits: Digits, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = graph.to_onnx
    monkeypatch.setattr(graph, "to_onnx", lambda module, size: spoil(honest(module, size)))
    with pytest.raises(FindingsError, match=r"export\.parity"):
        export(digits.params(), manifest=digits.manifest, model=trained, out=tmp_path / "export")
    found = findings(tmp_path / "export")
    assert found["export.parity"].level == "error"
    assert "The export is bad" in found["export.accuracy"].message
    assert not (tmp_path / "export" / "model.onnx").exists()


def test_wrong_normalisation_in_the_metadata_is_caught(
    digits: Digits, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = exported.metadata
    wrong = {"mean": "[0.485, 0.456, 0.406]", "std": "[0.229, 0.224, 0.225]"}
    monkeypatch.setattr(exported, "metadata", lambda card, in_graph: honest(card, in_graph) | wrong)
    with pytest.raises(FindingsError, match=r"export\.parity"):
        export(digits.params(), manifest=digits.manifest, model=trained, out=tmp_path / "export")


def test_a_weak_checkpoint_is_not_called_a_bad_export(digits: Digits, trained: Path, tmp_path: Path) -> None:
    export(
        digits.params(min_accuracy=0.999), manifest=digits.manifest, model=trained, out=tmp_path / "export"
    )
    weak = findings(tmp_path / "export")["export.accuracy"]
    assert weak.level == "warning"
    assert "the checkpoint itself is weak" in weak.message


def test_an_untrained_checkpoint_is_stopped(digits: Digits, tmp_path: Path) -> None:
    torch.manual_seed(3)
    module = timm.create_model(ARCH, num_classes=10).eval()
    torch.nn.init.zeros_(module.get_classifier().weight)
    model = write_checkpoint(tmp_path / "student", module, NAMES, ARCH)
    with pytest.raises(FindingsError, match="learned nothing"):
        export(digits.params(), manifest=digits.manifest, model=model, out=tmp_path / "export")


def test_training_and_export_that_disagree_are_named(digits: Digits, trained: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained, tmp_path / "student")
    (model / "metrics.json").write_text(json.dumps({"val": {"top1": 0.5}}))
    export(digits.params(), manifest=digits.manifest, model=model, out=tmp_path / "export")
    found = findings(tmp_path / "export")["export.accuracy"]
    assert found.level == "warning"
    assert "Training wrote 50.00%" in found.message


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "other tensors", "card only"])
def test_a_damaged_checkpoint_is_refused(damage: str, digits: Digits, trained: Path, tmp_path: Path) -> None:
    model = tmp_path / "student"
    if damage != "missing":
        shutil.copytree(trained, model)
    weights = model / "model.safetensors"
    if damage == "empty":
        weights.write_bytes(b"")
    elif damage == "half":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "card only":
        weights.unlink()
    elif damage == "other tensors":
        card = read_card(model / "model.json")
        write_checkpoint(model, timm.create_model("test_resnet", num_classes=10), card.class_names, ARCH)
    with pytest.raises(RetortError) as caught:
        export(digits.params(), manifest=digits.manifest, model=model, out=tmp_path / "export")
    assert str(model) in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert findings(tmp_path / "export")["export.checkpoint"].level == "error"
    assert not (tmp_path / "export" / "model.onnx").exists()


def test_a_class_count_of_1000_never_slips_in(digits: Digits, tmp_path: Path) -> None:
    """A network with ImageNet's 1000 outputs under a card of ten classes."""
    model = write_checkpoint(tmp_path / "student", timm.create_model(ARCH, num_classes=1000), NAMES, ARCH)
    with pytest.raises(RetortError):
        export(digits.params(), manifest=digits.manifest, model=model, out=tmp_path / "export")
    found = findings(tmp_path / "export")
    assert "1000" in found.get("export.class_num", found.get("export.checkpoint")).message


@pytest.mark.parametrize("asked", [1000, 3])
def test_a_class_count_in_the_parameters_changes_no_export(
    asked: int, digits: Digits, trained: Path, exported_folder: Path, tmp_path: Path
) -> None:
    params = digits.params()
    general = params.general.model_copy(update={"class_num": asked})
    params = params.model_copy(update={"general": general})
    export(params, manifest=digits.manifest, model=trained, out=tmp_path / "export")
    found = findings(tmp_path / "export")["export.class_num"]
    assert (found.level, found.measured, found.limit) == ("warning", 10, asked)
    assert f"global.class_num asks for {asked} classes, the checkpoint has 10" in found.message
    assert (tmp_path / "export/model.onnx").read_bytes() == (exported_folder / "model.onnx").read_bytes()


def test_labels_beyond_the_checkpoints_classes_are_refused(digits: Digits, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "s", timm.create_model(ARCH, num_classes=7), NAMES[:7], ARCH)
    with pytest.raises(FindingsError, match="label 9"):
        export(digits.params(), manifest=digits.manifest, model=model, out=tmp_path / "export")
    assert findings(tmp_path / "export")["export.class_num"].limit == 10


def rename(trained: Path, folder: Path, names: list[str], by_hand: bool) -> Path:
    """The trained network with other class names: edited by hand, or as if training had written them."""
    model = Path(shutil.copytree(trained, folder))
    card = read_card(model / "model.json").model_copy(update={"class_names": names})
    if by_hand:
        content = json.loads((model / "model.json").read_text())
        (model / "model.json").write_text(json.dumps({**content, "class_names": names}))
    else:
        card.write(model / "model.json")
    return model


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            NAMES[::-1],
            "calls label 0 'digit 9', the data call it 'digit 0' (10 of 10 labels differ, the same",
        ),
        ([*NAMES[:3], "three", *NAMES[4:]], "calls label 3 'three', the data call it 'digit 3' (1 of 10"),
        ([*NAMES[:8], NAMES[9], NAMES[8]], "calls label 8 'digit 9'"),
        ([*NAMES[:9], NAMES[0]], "calls label 9 'digit 0'"),
        ([*NAMES[::-1], "more"], "calls label 0 'digit 9'"),
        (NAMES[1:], "calls label 0 'digit 1'"),
    ],
    ids=["reversed", "renamed", "permuted", "twice", "more", "fewer"],
)
def test_class_names_that_are_not_the_datas_are_refused(
    by_hand: bool, names: list[str], said: str, digits: Digits, trained: Path, tmp_path: Path
) -> None:
    """Row 1.1: the right outputs under wrong names."""
    model = rename(trained, tmp_path / "student", names, by_hand)
    with pytest.raises(FindingsError, match=r"model\.class_names"):
        export(digits.params(), manifest=digits.manifest, model=model, out=tmp_path / "export")
    found = findings(tmp_path / "export")["model.class_names"]
    assert (found.level, found.row) == ("error", "1.1")
    assert said in found.message
    assert "train on these" in found.advice
    assert not (tmp_path / "export" / "labels.txt").exists()


def test_a_renamed_class_folder_is_called_that(digits: Digits, trained: Path, tmp_path: Path) -> None:
    """'digit 0' became 'nought', so that every other class moved one label down."""
    names = [*NAMES[1:], "nought"]
    table = manifests.read(digits.manifest)
    moved = {f"digit {old}": (old - 1) % 10 for old in range(10)}
    old = table["class_name"].to_pylist()
    labels = pa.array([moved[name] for name in old], pa.int32())
    for name, column in (("label", labels), ("class_name", pa.array([names[i] for i in labels.to_pylist()]))):
        table = table.set_column(table.schema.get_field_index(name), name, column)
    manifests.write(table, tmp_path / "clean.parquet")
    said = rf"model\.class_names: Class names differ: {re.escape(str(trained / 'model.json'))} calls label 0"
    with pytest.raises(FindingsError, match=said):
        export(digits.params(), manifest=tmp_path / "clean.parquet", model=trained, out=tmp_path / "export")
    assert "export.accuracy" not in findings(tmp_path / "export")


def test_outputs_beyond_the_datas_classes_are_named_by_number(digits: Digits, tmp_path: Path) -> None:
    """global.class_num above the data's classes is no difference."""
    torch.manual_seed(0)
    module = timm.create_model(ARCH, num_classes=12).eval()
    model = write_checkpoint(tmp_path / "student", module, [*NAMES, "10", "11"], ARCH)
    params = digits.params()
    waived = params.model_copy(update={"checks": type(params.checks)(waive=["export.accuracy"])})
    export(waived, manifest=digits.manifest, model=model, out=tmp_path / "export")
    assert findings(tmp_path / "export")["model.class_names"].level == "info"


def test_a_card_whose_preprocessing_was_changed_is_refused(
    digits: Digits, trained: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(trained, tmp_path / "student"))
    content = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps({**content, "mean": [0.0, 0.0, 0.0]}))
    with pytest.raises(
        FindingsError, match=r"export\.checkpoint: .*model\.json: changed since it was written"
    ):
        export(digits.params(), manifest=digits.manifest, model=model, out=tmp_path / "export")


def test_a_checkpoint_that_holds_nan_is_not_called_a_bad_export(
    digits: Digits, trained: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    module = timm.create_model(ARCH, num_classes=10)
    module.load_state_dict(load_file(str(trained / "model.safetensors")))
    with torch.no_grad():
        module.get_classifier().weight[3] = torch.nan
    model = write_checkpoint(tmp_path / "student", module, NAMES, ARCH)
    with pytest.raises(FindingsError, match=r"export\.checkpoint: .*holds NaN .*classifier\.weight \(256 of"):
        export(digits.params(), manifest=digits.manifest, model=model, out=tmp_path / "export")
    assert "export.parity" not in findings(tmp_path / "export")


def test_with_preprocessing_in_the_graph_whole_images_give_the_same_answers(
    digits: Digits, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "export"
    export(digits.params(preprocess_in_graph=True), manifest=digits.manifest, model=trained, out=out)
    assert exported.read(out / "model.onnx").in_graph
    parity = json.loads((out / "parity.json").read_text())["compared"]
    assert parity["model.onnx, batches"]["holds"]
    whole = parity["model.onnx, whole images"]
    assert whole["images"] == 200
    assert whole["top1"] == parity["model.onnx, batches"]["top1"]
    assert findings(out)["export.preprocess"].level == "info"


def test_int8_is_measured_and_smaller(exported_folder: Path) -> None:
    parity = json.loads((exported_folder / "parity.json").read_text())
    sizes = {name: entry["bytes"] for name, entry in parity["files"].items()}
    assert sizes["model.int8.onnx"] < 0.6 * sizes["model.onnx"]
    assert parity["compared"]["model.int8.onnx, batches"]["top1"] > parity["checkpoint"]["top1"] - 0.05
    kinds = {node.op_type for node in onnx.load(exported_folder / "model.int8.onnx").graph.node}
    assert "QuantizeLinear" in kinds


def test_the_network_is_left_as_it_was(trained: Path) -> None:
    module = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    before = copy.deepcopy(module.state_dict())
    graph.to_onnx(module, 32)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert type(module.conv_stem).__name__ == "Conv2dSame"

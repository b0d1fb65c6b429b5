"""``retort features``: what a backbone gives is what timm's network computes, in Parquet and as ONNX."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from components.common.errors import ConfigError, RetortError
from components.common.storage import sha256_file
from components.dataset import manifest, named
from components.dataset.images import central_square, decode
from components.models import build, checkpoint
from components.models.card import ModelCard
from components.models.params import Arch, Head
from components.tools import features
from components.tools.backbone import Backbone
from pipelines import cli

SIZE = 64
CNN, VIT = Arch(name="test_efficientnet"), Arch(name="test_vit")
DEIT = Arch(name="deit_tiny_distilled_patch16_224")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def network(arch: Arch) -> torch.nn.Module:
    torch.manual_seed(0)
    return build.create(arch, 5).eval()


def random_images(count: int = 2, size: int = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("arch", "head"),
    [
        (CNN, lambda module, pooled: module.classifier(pooled)),
        (Arch(name="resnet18d"), lambda module, pooled: module.fc(pooled)),
        (Arch(name="mobilenetv3_small_050"), lambda module, pooled: module.classifier(pooled)),
        (Arch(name="test_efficientnet", head=Head(bottleneck=3)), lambda m, pooled: m.classifier(pooled)),
        (VIT, lambda module, pooled: module.head(pooled)),
    ],
    ids=["efficientnet", "resnet", "mobilenet", "bottleneck", "vit"],
)
@torch.inference_mode()
def test_the_pooled_vector_is_what_the_last_layer_read(
    arch: Arch, head: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
) -> None:
    images, whole = random_images(), network(arch)
    (pooled,) = Backbone(network(arch), "pooled", SIZE)(images)
    torch.testing.assert_close(head(whole, pooled), whole(images))


@torch.inference_mode()
def test_the_last_map_averages_to_the_pooled_vector() -> None:
    images = random_images()
    for arch in (CNN, Arch(name="resnet18d")):
        (pooled,) = Backbone(network(arch), "pooled", SIZE)(images)
        (last,) = Backbone(network(arch), "last", SIZE)(images)
        assert last.shape[2:] == (2, 2)
        torch.testing.assert_close(last.mean(dim=(2, 3)), pooled)
    (pooled,) = Backbone(network(Arch(name="swin_tiny_patch4_window7_224")), "pooled", 224)(
        random_images(1, 224)
    )
    (last,) = Backbone(network(Arch(name="swin_tiny_patch4_window7_224")), "last", 224)(random_images(1, 224))
    assert last.shape == (1, 768, 7, 7), "channels first, whatever the network's own order"
    torch.testing.assert_close(last.mean(dim=(2, 3)), pooled)


@torch.inference_mode()
def test_stages_are_the_maps_before_each_down_sampling() -> None:
    images, module = random_images(), network(Arch(name="resnet18d"))
    backbone = Backbone(network(Arch(name="resnet18d")), "stages", SIZE)
    assert backbone.shapes == {
        "stride_2": (64, 32, 32),
        "stride_4": (64, 16, 16),
        "stride_8": (128, 8, 8),
        "stride_16": (256, 4, 4),
        "stride_32": (512, 2, 2),
    }
    maps = dict(zip(backbone.shapes, backbone(images), strict=True))
    stem = module.act1(module.bn1(module.conv1(images)))
    torch.testing.assert_close(maps["stride_2"], stem)
    first = module.layer1(module.maxpool(stem))
    torch.testing.assert_close(maps["stride_4"], first)
    torch.testing.assert_close(maps["stride_8"], module.layer2(first))


@torch.inference_mode()
def test_a_transformer_gives_its_class_token_and_its_patches() -> None:
    images = random_images()
    for arch, prefix in ((VIT, 1), (DEIT, 2)):
        tokens = network(arch).forward_features(images)
        (cls,) = Backbone(network(arch), "cls", SIZE)(images)
        (patches,) = Backbone(network(arch), "patches", SIZE)(images)
        (last,) = Backbone(network(arch), "last", SIZE)(images)
        assert tokens.shape[1] == prefix + 16, "4 x 4 patches of 16 pixels"
        torch.testing.assert_close(cls, tokens[:, 0])
        torch.testing.assert_close(patches, tokens[:, prefix:])
        torch.testing.assert_close(last[:, :, 1, 2], patches[:, 1 * 4 + 2])
        assert list(Backbone(network(arch), "stages", SIZE).shapes) == ["stride_16"]


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("test_efficientnet", "cls", "--from cls: EfficientNet has maps, not tokens"),
        ("test_efficientnet", "patches", "--from patches: EfficientNet has maps"),
        ("mixer_s32_224", "cls", r"--from cls: MlpMixer has no \[CLS\] token; use pooled or patches"),
    ],
)
def test_what_a_network_does_not_have_is_said(name: str, kind: str, said: str) -> None:
    size = 224 if name.startswith("mixer") else SIZE
    with pytest.raises(RetortError, match=said):
        Backbone(network(Arch(name=name)), kind, size)


def save(arch: Arch, folder: Path) -> Path:
    mean, std = build.preprocessing(arch)
    card = ModelCard(
        arch=arch, class_names=list("abcde"), input_size=[3, SIZE, SIZE], mean=list(mean), std=list(std),
        data_fingerprint="data", lineage=[], sha256="",
    )  # fmt: skip
    checkpoint.save(folder / "model.safetensors", folder / "model.json", network(arch), card)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(CNN, tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty images of several sizes, and three files that only look like images."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(40):
        pixels = rng.integers(0, 256, (50 + index, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    (folder / "03 half.png").write_bytes((folder / "03.png").read_bytes()[:200])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "notes.txt").write_text("no image, and not looked at")
    return folder


def seen(photos: Path, numbers: list[int], card: ModelCard) -> torch.Tensor:
    """Those images as a network sees them."""
    pixels = np.stack([central_square(decode((photos / f"{i:02}.png").read_bytes()), SIZE) for i in numbers])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (card.mean, card.std))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std


def extract(model: Path, places: list[Path], out: Path, root: str = "", **options: str) -> features.Extracted:
    found = named.find(places, root)
    return features.extract(model, found.read, found.count, out=out, **options)


def test_a_folder_becomes_parquet_and_bad_images_are_listed(
    student: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = extract(student, [photos], tmp_path)
    assert (made.rows, len(made.unreadable)) == (40, 3)
    table = pq.read_table(tmp_path / "pooled.parquet")
    assert table["path"].to_pylist() == [str(photos / f"{index:02}.png") for index in range(40)]
    field = table.schema.field("pooled")
    assert field.type == pa.list_(pa.float32(), 256)
    assert json.loads(field.metadata[b"shape"]) == [256]
    assert table.schema.metadata[b"sha256"].decode() == sha256_file(student / "model.safetensors")

    module, card = checkpoint.load(student)
    with torch.inference_mode():
        scores = module(seen(photos, [37], card))[0]
        again = module.classifier(torch.tensor(table["pooled"][37].as_py()))
    torch.testing.assert_close(again, scores)

    said = capsys.readouterr().err
    assert "3 of 43 images cannot be read" in said
    assert "empty.jpg: the file is empty" in said
    with (tmp_path / "pooled.unreadable.csv").open(encoding="utf-8") as file:
        listed = [Path(row["path"]).name for row in csv.DictReader(file)]
    assert listed == ["03 half.png", "empty.jpg", "page.jpg"]


def test_a_name_that_is_no_utf8_is_written_as_a_manifest_writes_it(
    student: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "names"
    folder.mkdir()
    for name in (b"caf\xe9.png", b"caf\xe9.jpg"):
        content = (photos / "01.png").read_bytes() if name.endswith(b"png") else b""
        (folder / os.fsdecode(name)).write_bytes(content)
    made = extract(student, [folder], tmp_path)
    assert pq.read_table(tmp_path / "pooled.parquet")["path"].to_pylist() == [f"{folder}/caf%E9.png"]
    assert [path for path, _ in made.unreadable] == [f"{folder}/caf%E9.jpg"]
    assert "caf%E9.jpg" in (tmp_path / "pooled.unreadable.csv").read_text(encoding="utf-8")


def test_maps_keep_their_shape_and_the_same_images_give_the_same_bytes(
    student: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "GROUP_BYTES", 1)  # a row group as often as it can be
    extract(student, [photos / "01.png", photos], tmp_path, kind="stages")
    file = pq.ParquetFile(tmp_path / "stages.parquet")
    assert [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)] == [32, 8]
    schema = file.schema_arrow
    assert schema.names == ["path", "stride_2", "stride_4", "stride_8", "stride_16", "stride_32"]
    shape = json.loads(schema.field("stride_8").metadata[b"shape"])
    first = file.read_row_group(0)
    assert first["path"][0].as_py() == str(photos / "01.png")
    maps = np.stack(first["stride_8"].to_numpy()).reshape(-1, *shape)
    module, card = checkpoint.load(student)
    with torch.inference_mode():
        expected = module.forward_intermediates(seen(photos, [1, 0], card), intermediates_only=True)[
            2
        ].numpy()
    np.testing.assert_allclose(maps[:2], expected, atol=1e-4 * np.abs(expected).max())
    before = sha256_file(tmp_path / "stages.parquet")
    extract(student, [photos / "01.png", photos], tmp_path, kind="stages")
    assert sha256_file(tmp_path / "stages.parquet") == before


def test_a_manifest_is_read_below_its_root(student: Path, photos: Path, tmp_path: Path) -> None:
    rows = [
        {"path": path, "label": 0, "split": "train", "source": "real"}
        for path in ("02.png", "gone.png", "../02.png", "01.png")
    ]
    manifest.write(pa.Table.from_pylist(rows, schema=manifest.SCHEMA), tmp_path / "clean.parquet")
    made = extract(student, [tmp_path / "clean.parquet"], tmp_path / "out", root=str(photos))
    assert pq.read_table(made.file)["path"].to_pylist() == ["02.png", "01.png"]
    assert dict(made.unreadable) == {
        "gone.png": "gone.png: No such file or directory",
        "../02.png": "../02.png: lies outside data.root",
    }


@pytest.mark.parametrize(
    ("arch", "kind"),
    [(CNN, "stages"), (CNN, "pooled"), (VIT, "cls"), (VIT, "patches")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_backbone_as_onnx_computes_what_torch_does(
    arch: Arch, kind: str, photos: Path, tmp_path: Path
) -> None:
    model = save(arch, tmp_path / "model")
    made = extract(model, [photos], tmp_path / "out", kind=kind, form="onnx")
    assert made.rows == 32, "the images that it was proved on"
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / f"{kind}.onnx"))
    assert {each.name: tuple(each.shape[1:]) for each in session.get_outputs()} == made.shapes
    about = session.get_modelmeta().custom_metadata_map
    assert (about["size"], about["from"], about["arch"]) == (str(SIZE), kind, arch.name)

    extract(model, [photos], tmp_path / "out", kind=kind)
    table = pq.read_table(tmp_path / "out" / f"{kind}.parquet")
    pixels = central_square(decode((photos / "05.png").read_bytes()), SIZE)[None]
    for name, given in zip(made.shapes, session.run(list(made.shapes), {"images": pixels}), strict=True):
        own = np.reshape(table[name][5].as_py(), given.shape)
        np.testing.assert_allclose(given, own, atol=1e-3 * np.abs(own).max())

    before = sha256_file(made.file)
    features.extract(model, lambda size: [], 0, kind=kind, form="onnx", out=tmp_path / "out")
    assert sha256_file(made.file) == before, "needs no images, and does not depend on them"


def test_the_words_of_the_command_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RETORT_STATE", ".retort")
    Path("params.yaml").write_text("global: {seed: 1}\n")
    save(VIT, Path("outputs/student"))
    assert cli.run(["features", str(photos), "--from", "cls"]) == 0
    assert capsys.readouterr().out == "outputs/features/cls.parquet: 40 rows of cls 64\n"
    assert cli.run(["features", "--from", "cls", "--format", "onnx"]) == 0
    assert capsys.readouterr().out == "outputs/features/cls.onnx: images -> cls 64\n"
    assert cli.run(["features"]) == 2
    assert "IMAGES: name files, folders or a manifest.parquet" in capsys.readouterr().err
    assert cli.run(["cost", "outputs/student"]) == 0
    assert "5 classes, 64 x 64 pixels" in capsys.readouterr().out
    assert cli.run(["cost", "resnet18", "-o", "data.sorce=x"]) == 2
    assert "did you mean 'data.source'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "fc"}, "--from fc: expected one of pooled, last"),
        ({"form": "csv"}, "--format csv: expected one of parquet, onnx"),
    ],
)
def test_unknown_words_are_refused_before_any_work(
    options: dict[str, str], said: str, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        extract(tmp_path / "nowhere", [photos], tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere", "nowhere: no such file or folder"),
        ("empty", "empty: no image in there"),
        ("other.parquet", r"other\.parquet: column 'path' is missing"),
        ("page.jpg", "none of 1 images can be read; the first is .*page.jpg: not an image"),
    ],
)
def test_without_images_nothing_is_written(student: Path, place: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    (tmp_path / "page.jpg").write_text("<html>")
    with pytest.raises(RetortError, match=said):
        extract(student, [tmp_path / place], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))

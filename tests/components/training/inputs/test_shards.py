"""Shards: the images' own bytes in a kept format, written once, read by row; in a folder and in S3."""

import pickle
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import webdataset

from components.audit.plan_schema import read_plan
from components.common import object_store
from components.common.errors import ChangedError, RetortError
from components.dataset.params import S3
from components.training import driver, remote
from components.training.augmentation import Augment
from components.training.inputs import shards
from components.training.inputs.feed import open_feed
from components.training.inputs.index import Index, open_index
from components.training.inputs.pictures import open_store
from components.training.inputs.shards import Shards
from components.training.params import DistillParams, ShardParams
from components.training.sampling import Draw
from components.training.spec import Phase, TrainSpec
from tests.components.conftest import Store, no_other_keys
from tests.components.training import local

SIZE = 4000  # bytes of images in a shard: some ten digits


@pytest.fixture(params=["folder", "s3"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: SimpleNamespace
) -> object_store.Storage:
    monkeypatch.setenv("RETORT_NODE_CACHE", str(tmp_path / "node"))
    if request.param == "folder":
        return remote.open_storage(str(tmp_path / "shared"))
    no_other_keys(monkeypatch, tmp_path)
    monkeypatch.setattr(object_store, "_clients", {})
    server: Store = request.getfixturevalue("store")
    return remote.open_storage(f"s3://photos/{tmp_path.name}", S3(endpoint_url=server.url))


@pytest.fixture
def index(data: SimpleNamespace) -> Index:
    return open_index(data.manifest)


def contents(data: SimpleNamespace) -> list[bytes]:
    return [(Path(data.root) / path).read_bytes() for path in data.paths]


def test_shards_hold_the_images_themselves(
    storage: object_store.Storage, index: Index, data: SimpleNamespace
) -> None:
    written = shards.write(storage, index, index.files(data.root).content, SIZE)
    assert written.count == written.new > 3
    reader = Shards(storage, index)
    expected = contents(data)
    order = np.random.default_rng(0).permutation(len(expected)).tolist()
    assert [reader(row) for row in order] == [expected[row] for row in order]
    again: Shards = pickle.loads(pickle.dumps(reader))
    assert again(7) == expected[7]


def test_the_format_is_webdatasets_own(
    storage: object_store.Storage, index: Index, data: SimpleNamespace
) -> None:
    written = shards.write(storage, index, index.files(data.root).content, SIZE)
    names = [name for name in storage.list("shards") if name.endswith(".tar")]
    for name in names:
        storage.get(name, Path("copies") / Path(name).name)
    files = sorted(map(str, Path("copies").iterdir()))
    assert sum(Path(file).stat().st_size for file in files) == written.bytes
    found = [
        (sample["__key__"], sample["png"]) for sample in webdataset.WebDataset(files, shardshuffle=False)
    ]
    assert found == [(f"{row:09}", content) for row, content in enumerate(contents(data))]


def test_an_interrupted_call_goes_on_and_a_finished_one_does_nothing(
    storage: object_store.Storage, index: Index, data: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, put = type(storage), type(storage).put
    sent: list[str] = []

    def failing(self: object_store.Storage, path: Path, name: str) -> None:
        if len(sent) == 5:
            raise RetortError("the connection dropped")
        sent.append(name)
        put(self, path, name)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "put", failing)
    with pytest.raises(RetortError, match="dropped"):
        shards.write(storage, index, index.files(data.root).content, SIZE)
    assert not shards.there(storage, index.fingerprint)
    monkeypatch.setattr(kind, "put", put)
    read: list[int] = []
    files = index.files(data.root).content

    def counting(row: int) -> bytes:
        read.append(row)
        return files(row)

    written = shards.write(storage, index, counting, SIZE)
    assert written.new == written.count - 2, "two were whole"
    assert min(read) > 10
    assert shards.there(storage, index.fingerprint)
    reader, expected = Shards(storage, index), contents(data)
    assert [reader(row) for row in range(len(index))] == expected
    assert shards.write(storage, index, files, SIZE).new == 0
    assert not [name for name in storage.list("shards") if "/parts/" in name]


def test_training_reads_them_where_there_are_no_image_files(
    storage: object_store.Storage, index: Index, data: SimpleNamespace
) -> None:
    shards.write(storage, index, index.files(data.root).content, SIZE)
    draws = [Draw(index.rows("train")[at : at + 5].astype(np.int64), np.full(5, 2), 5) for at in (0, 20, 60)]

    def made(num_workers: int, source: Shards | None, limit: int | None = 0) -> list[torch.Tensor]:
        part = open_store(index, data.root, 32, limit=limit, contents=source).learn
        with open_feed(part, Augment("flip", 7, 32), torch.device("cpu"), num_workers) as feed:
            return [batch.pixels for batch in feed(draws)]

    expected = made(0, None)
    Path(data.root).rename("elsewhere")
    for num_workers in (0, 2):
        found = made(num_workers, Shards(storage, index))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    decoded = made(0, Shards(storage, index), limit=None)
    assert all(torch.equal(a, b) for a, b in zip(decoded, expected, strict=True))


def test_a_network_trained_from_shards_is_the_same(
    data: SimpleNamespace,
    params: DistillParams,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RETORT_NODE_CACHE", str(tmp_path / "node"))
    storage = tmp_path / "shared"
    shared = params.model_copy(update={"ray": params.ray.model_copy(update={"storage": str(storage)})})

    def spec(of: DistillParams) -> TrainSpec:
        return driver.make_spec(
            of, of.teacher, of.ray, of.data, data.manifest, read_plan(data.plan),
            weights / "teacher.safetensors", (Phase("finetune", "net", 1, of.teacher.lr),),
        )  # fmt: skip

    assert spec(shared).shards is None, "there are none yet"
    expected = local.run(spec(params)).result.nets["net"]
    values = {"data": {"root": data.root}, "ray": {"storage": str(storage)}}
    shards.shard(ShardParams.model_validate(values), manifest=data.manifest)
    Path(data.root).rename("elsewhere")
    shutil.rmtree(".retort/cache/decoded")
    found = local.run(spec(shared)).result.nets["net"]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_node_keeps_the_shards_of_a_store(
    store: Store, index: Index, data: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETORT_NODE_CACHE", str(tmp_path / "node"))
    no_other_keys(monkeypatch, tmp_path)
    monkeypatch.setattr(object_store, "_clients", {})
    storage = remote.open_storage(f"s3://photos/{tmp_path.name}", S3(endpoint_url=store.url))
    shards.write(storage, index, index.files(data.root).content, SIZE)
    reader = Shards(storage, index)
    reader(0)
    for thread in threading.enumerate():
        if thread.name == "shards":
            thread.join(30)
    kept = {path.name for path in (tmp_path / "node").rglob("*.tar")}
    assert kept == {Path(name).name for name in storage.list("shards") if name.endswith(".tar")}
    storage.remove("shards")
    assert [Shards(storage, index)(row) for row in range(len(index))] == contents(data), "from the node alone"


def test_an_exchanged_image_is_named(
    storage: object_store.Storage, index: Index, data: SimpleNamespace
) -> None:
    path = Path(data.root) / data.paths[4]
    before = path.read_bytes()
    path.write_bytes(before[:-20] + bytes(20))
    with pytest.raises(ChangedError, match=data.paths[4]):
        shards.write(storage, index, index.files(data.root).content, SIZE)
    unchecked = [before if row == 4 else content for row, content in enumerate(contents(data))]
    unchecked[9] = unchecked[9][:-4] + b"\0\0\0\0"
    shards.write(storage, index, unchecked.__getitem__, SIZE)
    with pytest.raises(ChangedError, match=data.paths[9]):
        Shards(storage, index)(9)


def test_the_command_says_what_it_wrote(
    data: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"data": {"root": data.root}, "ray": {"storage": str(tmp_path / "shared")}}
    for again in ("", " (there already)"):
        shards.shard(ShardParams.model_validate(values), manifest=data.manifest)
        said = capsys.readouterr().out
        assert said.startswith("160 images, 1 shard, ")
        assert said.endswith(f"{again}\n")
    with pytest.raises(RetortError, match=r"ray\.storage is empty"):
        shards.shard(ShardParams.model_validate({}), manifest=data.manifest)


def test_names_of_files_become_webdatasets_extensions() -> None:
    assert [shards._extension(path) for path in ("a/b.JPG", "c", "d.tar.gz", "e.%20x", "s3://b/k.webp")] == [
        "jpg", "img", "gz", "img", "webp",
    ]  # fmt: skip

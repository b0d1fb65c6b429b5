"""``shadow``: what it says of two models is what their own answers say; bad requests, interruptions, skew."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.common.errors import ConfigError, RetortError
from components.common.storage import read_json
from components.dataset.params import Data
from components.export import exported, graph
from components.models.card import read_card
from components.tools.params import ShadowParams
from components.tools.shadow import requests as recorded
from components.tools.shadow import shadow as module
from components.tools.shadow.shadow import shadow
from pipelines import cli
from tests.components.conftest import Store, no_other_keys

MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


@pytest.fixture
def models(registered: Any) -> Callable[..., Path]:
    """Exports a linear student of the project, trained as asked for, with its card beside it."""

    def export(name: str, **how: Any) -> Path:
        registered.train(**how)
        folder = registered.folder / name
        shutil.copytree(registered.folder / "export", folder)
        shutil.copy(registered.folder / "student/model.json", folder)
        return folder

    return export


@pytest.fixture
def replay(registered: Any) -> Callable[..., dict[str, Any]]:
    """Runs the command on files of the project; returns ``metrics.json``."""

    def run(*places: Any, thumbnails: bool = True, **more: Any) -> dict[str, Any]:
        params = ShadowParams.model_validate(
            {"registry": {"name": "digits"}, "report": {"thumbnails": thumbnails}, "data": {"root": "images"}}
        )
        given = {key: str(value) for key, value in more.items()}
        out = registered.folder / "outputs/shadow"
        found = shadow(params, [str(place) for place in places], out=out, **given)
        assert found == read_json(out / "metrics.json")
        return found

    return run


@pytest.fixture
def bucket(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The store, with its keys in the environment."""
    no_other_keys(monkeypatch, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", store.url)
    return store


def answers() -> list[dict[str, Any]]:
    return pq.read_table("outputs/shadow/answers.parquet").to_pylist()


def findings(rule: str) -> list[dict[str, Any]]:
    return [
        found for found in read_json(Path("outputs/shadow/report.json"))["findings"] if found["rule"] == rule
    ]


def said(folder: Path, images: np.ndarray) -> list[str]:
    """The classes that the file itself gives these images, uint8 [N, S, S, 3]."""
    session = exported.session(folder / "model.onnx")
    about = exported.describe(session, folder)
    scores = exported.run(session, exported.normalise(images, about.mean, about.std))
    return [about.class_names[best] for best in scores.argmax(axis=1)]


def pixels(places: list[str]) -> np.ndarray:
    from PIL import Image

    return np.stack([np.asarray(Image.open(place).convert("RGB")) for place in places])


def test_every_changed_answer_is_listed(models: Any, replay: Any) -> None:
    """Compared with what both files say when they are asked without any of the command's code."""
    one, other = models("one"), models("other", blind_to=4)
    Path("images/broken.png").write_bytes(b"no image")
    Path("images/cut").write_bytes(next(Path("images/3").iterdir()).read_bytes()[:60])
    Path("images/.hidden").write_text("no request")
    found = replay("images", champion=one, challenger=other)
    rows = answers()
    assert (found["requests"], found["malformed"], len(rows)) == (902, 2, 902)
    bad = {Path(row["request"]).name: row["error"] for row in rows if row["error"]}
    assert set(bad) == {"broken.png", "cut"}
    good = [row for row in rows if not row["error"]]
    shown = pixels([row["request"] for row in good])
    before, now = said(one, shown), said(other, shown)
    assert [row["champion_class"] for row in good] == before
    assert [row["challenger_class"] for row in good] == now
    wanted = {row["request"] for row, a, b in zip(good, before, now, strict=True) if a != b}
    assert len(wanted) > 50
    with Path("outputs/shadow/changed.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert {row["request"] for row in listed} == wanted
    surest = [min(float(row["champion_score"]), float(row["challenger_score"])) for row in listed]
    assert surest == sorted(surest, reverse=True)
    assert found["agreement"] == pytest.approx(1 - len(wanted) / 900)
    assert found["champion_skew_max"] < 0.001
    page = Path("outputs/shadow/report.html").read_text()
    assert page.count("data:image/png") == 48
    assert findings("shadow.requests")[0]["measured"] == 2
    replay("images", champion=one, challenger=other, thumbnails=False)
    assert "data:image" not in Path("outputs/shadow/report.html").read_text()


def test_parquet_gives_the_same_answers_as_the_files_it_holds(models: Any, replay: Any) -> None:
    one, other = models("one"), models("other", blind_to=4)
    files = sorted(Path("images").rglob("*.png"))
    contents = [file.read_bytes() for file in files]
    replay("images", champion=one, challenger=other)
    wanted = [(row["champion_class"], row["challenger_class"]) for row in answers()]
    plain = pa.table({"bytes": contents, "name": [file.name for file in files], "thumb": [b""] * len(files)})
    pq.write_table(plain, "plain.parquet", row_group_size=700)
    replay("plain.parquet", champion=one, challenger=other)
    assert [(row["champion_class"], row["challenger_class"]) for row in answers()] == wanted
    assert [row["request"] for row in answers()] == [file.name for file in files]
    # as Hugging Face keeps images, one of them without any
    structs = [{"bytes": content, "path": None} for content in contents[:-1]] + [{"bytes": None, "path": "x"}]
    pq.write_table(pa.table({"image": structs}), "structs.parquet")
    found = replay("structs.parquet", champion=one, challenger=other)
    assert found["malformed"] == 1
    assert answers()[-1]["error"] == "the request has no content"
    assert answers()[-1]["request"] == "structs.parquet#899"
    replay("clean.parquet", champion=one, challenger=other)  # a manifest: paths below data.root
    assert len(answers()) == 900


def test_which_column_is_meant_is_asked_where_it_is_not_clear(models: Any, replay: Any) -> None:
    one = models("one")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"], "c": ["text"]}), "two.parquet")
    with pytest.raises(ConfigError, match="--column names one of a, b"):
        replay("two.parquet", champion=one, challenger=one)
    with pytest.raises(ConfigError, match=r"no such column of bytes; it has a, b"):
        replay("two.parquet", champion=one, challenger=one, column="c")
    with pytest.raises(RetortError, match=r"1 request, and none can be read, such as two\.parquet#0: not an"):
        replay("two.parquet", champion=one, challenger=one, column="b")
    Path("broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(RetortError, match=r"broken\.parquet: not a Parquet file"):
        replay("broken.parquet", champion=one, challenger=one)
    Path("empty").mkdir()
    with pytest.raises(RetortError, match="empty: no request in there"):
        replay("empty", champion=one, challenger=one)


def test_an_interrupted_replay_goes_on_where_it_was(
    models: Any, replay: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = models("one"), models("other", blind_to=4)
    monkeypatch.setattr(recorded, "CHUNK", 100)
    replay("images", champion=one, challenger=other)
    wanted = answers()
    compared = module._compared
    asked: list[int] = []

    def until_the_fifth(batch: Any, both: Any) -> Any:
        if len(asked) >= 500:
            raise OSError(28, "No space left on device")
        asked.extend(item.request.number for item in batch)
        return compared(batch, both)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(module, "_compared", until_the_fifth)
        replay("images", champion=one, challenger=other)
    assert not Path("outputs/shadow/answers.parquet").exists()

    def counted(batch: Any, both: Any) -> Any:
        asked.extend(item.request.number for item in batch)
        return compared(batch, both)

    monkeypatch.setattr(module, "_compared", counted)
    replay("images", champion=one, challenger=other)
    assert sorted(asked) == list(range(900)), "none twice"
    assert answers() == wanted
    assert not list(Path(".retort/shadow").iterdir())


def test_other_classes_and_sizes_are_compared_by_class_name(models: Any, replay: Any) -> None:
    one = models("one")
    other = models("other")
    model = onnx.load(other / "model.onnx")
    card = read_card(other / "model.json")
    names = ["digit 0", *(f"new {number}" for number in range(1, 10))]
    changed = card.model_copy(update={"class_names": names})
    onnx.helper.set_model_props(model, exported.metadata(changed, in_graph=False))
    onnx.save(model, other / "model.onnx")
    changed.write(other / "model.json")
    found = replay("images", champion=one, challenger=other)
    rows = answers()
    assert all(row["changed"] == (row["champion_class"] != "digit 0") for row in rows)
    assert found["mean_difference"] == pytest.approx(0.0, abs=1e-6), (
        "the class that both know scores the same"
    )
    assert [found["measured"] for found in findings("shadow.classes")] == [9, 9]


def test_an_input_of_another_size_gets_its_own_pixels(models: Any, replay: Any, registered: Any) -> None:
    """A network of 8 pixels that is the same as one of 16 on the mean of four."""
    from onnx import helper, numpy_helper
    from PIL import Image

    one = models("one")
    other = registered.folder / "other"
    shutil.copytree(one, other)
    model = onnx.load(other / "model.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
    smaller = numpy_helper.to_array(weight).reshape(10, 3, 8, 2, 8, 2).sum(axis=(3, 5)).reshape(10, -1)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(smaller), "weight"))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("images", 1, ["N", 3, 8, 8]))
    card = read_card(other / "model.json").model_copy(update={"input_size": [3, 8, 8]})
    onnx.helper.set_model_props(model, exported.metadata(card, in_graph=False))
    onnx.save(model, other / "model.onnx")
    card.write(other / "model.json")
    replay("images", champion=one, challenger=other)
    assert findings("shadow.size")[0]["measured"] == 8
    rows = answers()
    small = np.stack([
        np.asarray(Image.open(row["request"]).convert("RGB").resize((8, 8), Image.Resampling.BICUBIC))
        for row in rows
    ])  # fmt: skip
    assert [row["challenger_class"] for row in rows] == said(other, small)


def test_serving_that_differs_from_training_is_found(models: Any, replay: Any) -> None:
    """The file's metadata was changed by hand: mean 0.4 instead of 0.5 is 0.1 x 255 grey levels."""
    one, other = models("one"), models("other", scale=2.0)
    model = onnx.load(other / "model.onnx")
    card = read_card(other / "model.json").model_copy(update={"mean": [0.4, 0.5, 0.5]})
    onnx.helper.set_model_props(model, exported.metadata(card, in_graph=False))
    onnx.save(model, other / "model.onnx")
    found = replay("images", champion=one, challenger=other)
    assert found["challenger_skew_max"] == pytest.approx(25.5, rel=1e-4)
    assert (found["champion_skewed"], found["challenger_skewed"]) == (0, 900)
    levels = {finding["subject"].split(",")[0]: finding["level"] for finding in findings("shadow.skew")}
    assert levels == {"champion": "info", "challenger": "warning"}


def test_preprocessing_in_the_graph_is_looked_into(models: Any, replay: Any) -> None:
    one, other = models("one"), models("other")
    card = read_card(other / "model.json")
    inside = graph.with_preprocessing(onnx.load(other / "model.onnx"), 16, MEAN, STD)
    onnx.helper.set_model_props(inside, exported.metadata(card, in_graph=True))
    onnx.save(inside, other / "model.onnx")
    found = replay("images", champion=one, challenger=other)
    assert found["agreement"] == 1.0
    assert found["challenger_skew_max"] < 0.01, "these images have the network's own size"
    # another mean in the graph than the card's
    inside = graph.with_preprocessing(onnx.load(one / "model.onnx"), 16, [0.5, 0.4, 0.5], STD)
    onnx.helper.set_model_props(inside, exported.metadata(card, in_graph=True))
    onnx.save(inside, other / "model.onnx")
    assert replay("images", champion=one, challenger=other)["challenger_skew_max"] == pytest.approx(
        25.5, rel=1e-4
    )


def test_the_registered_models_are_asked_for_by_alias_or_number(registered: Any, replay: Any) -> None:
    registered.register()
    with pytest.raises(
        RetortError, match="--challenger challenger: no version of 'digits' is its challenger"
    ):
        replay("images")
    registered.train(blind_to=4)
    registered.register()
    found = replay("images")
    assert (found["champion"], found["challenger"]) == ("version 1", "version 2")
    assert found["changed"] > 50
    assert replay("images", champion="2", challenger="1")["changed"] == found["changed"]
    with pytest.raises(RetortError, match="version 7: 'digits' has no such version"):
        replay("images", challenger="7")


def test_requests_in_a_bucket(models: Any, replay: Any, bucket: Any) -> None:
    one, other = models("one"), models("other", blind_to=4)
    files = sorted(Path("images").rglob("*.png"))[:12]
    for file in files:
        bucket.put(f"requests/{file.name}", file.read_bytes())
    bucket.put("requests/broken", b"no image")
    found = replay("s3://photos/requests", champion=one, challenger=other)
    assert (found["requests"], found["malformed"]) == (13, 1)
    by_name = {Path(row["request"]).name: row["champion_class"] for row in answers()}
    assert [by_name[file.name] for file in files] == said(one, pixels([str(file) for file in files]))
    pq.write_table(pa.table({"bytes": [file.read_bytes() for file in files]}), "rows.parquet")
    bucket.put("table/rows.parquet", Path("rows.parquet").read_bytes())
    assert replay("s3://photos/table/rows.parquet", champion=one, challenger=other)["requests"] == 12


def test_the_command(models: Any, registered: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = models("one"), models("other", blind_to=4)
    Path("params.yaml").write_text("registry: {name: digits}\n")
    words = ["shadow", "images", "--champion", str(one), "--challenger", str(other)]
    assert cli.run(words) == 0
    assert "900 requests: " in capsys.readouterr().out
    assert cli.run(["shadow", "nowhere", *words[2:]]) == 1


def test_a_place_names_every_file_below_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("in/b", "a.jpg", ".git"):
        (tmp_path / name).write_text("x")
    found = recorded.find([str(tmp_path)], Data())
    assert [Path(request.name).name for _, part in found.read({0}) for request in part] == ["a.jpg", "b"]
    assert found.some([1])[1].content() == b"x"

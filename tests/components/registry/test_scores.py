"""Which images champion and challenger are judged by, and what is said of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.dataset import manifest as manifests
from components.export import exported as exports
from components.registry import scores
from components.registry.decision import Limits, decide


def rows(*given: tuple[str, str, str]) -> pa.Table:
    """A manifest of (content, class, split)."""
    made = [
        {"path": f"{name}/{sha}.png", "label": 0, "class_name": name, "split": split, "source": "real",
         "sha256": sha}
        for sha, name, split in given
    ]  # fmt: skip
    return pa.Table.from_pylist(made, schema=manifests.SCHEMA)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    path = tmp_path / "samples.parquet"
    listed = {"rule": ["labels.suspect", "labels.suspect", "hard"], "path": ["b/s.png", "a/1.png", "a/n.png"]}
    pq.write_table(pa.table(listed), path)
    return path


def test_the_champions_split_and_new_rows_that_nothing_speaks_against(tmp_path: Path, samples: Path) -> None:
    manifests.write(
        rows(("1", "a", "val"), ("2", "a", "val"), ("3", "b", "val"), ("4", "b", "val"), ("t", "a", "train")),
        tmp_path / "then.parquet",
    )
    now = rows(
        ("1", "a", "val"),  # frozen, though suspect: it judged the champion, too
        ("2", "b", "val"),  # has another class now
        ("3", "b", "train"),  # the challenger has trained on it; the fourth is gone
        ("t", "a", "val"),  # the champion has trained on it
        ("n", "a", "val"), ("s", "b", "val"), ("u", "a", "test"),
    )  # fmt: skip
    manifests.write(now, tmp_path / "now.parquet")
    chosen = scores.choose(tmp_path / "now.parquet", samples, tmp_path / "then.parquet")
    assert chosen.table["sha256"].to_pylist() == ["1", "n"]
    assert chosen.frozen is not None
    assert chosen.frozen.tolist() == [True, False]
    counts = (chosen.gone, chosen.moved, chosen.relabelled, chosen.trained, chosen.suspects)
    assert counts == (1, 1, 1, 1, 1)
    alone = scores.choose(tmp_path / "now.parquet", samples, None)
    assert alone.table["sha256"].to_pylist() == ["2", "t", "n"]
    assert (alone.frozen, alone.suspects) == (None, 2)


def test_an_audit_that_lists_nothing_says_nothing(tmp_path: Path) -> None:
    manifests.write(rows(("1", "a", "val")), tmp_path / "now.parquet")
    pq.write_table(pa.table({"rule": [], "path": []}), tmp_path / "samples.parquet")
    assert len(scores.choose(tmp_path / "now.parquet", tmp_path / "samples.parquet", None).table) == 1


def test_answers_are_those_of_the_files_and_columns_tell_images_apart(project: Any) -> None:
    path = project.folder / "export/model.onnx"
    champion = project.folder / "champion.onnx"
    champion.write_bytes(path.read_bytes())
    project.train(blind_to=3)
    chosen = scores.choose(project.folder / "clean.parquet", project.folder / "samples.parquet", None)
    camera = pa.array(["left", "right"] * (chosen.table.num_rows // 2))
    chosen = scores.Chosen(chosen.table.append_column("camera", camera), None)
    compared = scores.compare(champion, path, chosen, str(project.folder / "images"))
    images, labels = project._pixels("val")
    for name, file in (("champion", champion), ("challenger", path)):
        said = exports.run(exports.session(file), images).argmax(axis=1)
        np.testing.assert_array_equal(getattr(compared.outcomes, name), said == labels)
    assert compared.outcomes.columns["camera"].tolist() == camera.to_pylist()
    assert {"brightness", "contrast", "short side", "aspect", "source"} <= set(compared.outcomes.columns)
    assert compared.table["champion"].to_pylist()[0].startswith("digit ")
    assert compared.facts.lost == compared.facts.gained == []
    assert compared.facts.latency is not None


def test_models_of_other_classes_and_sizes_are_compared_by_names_and_their_own_pixels(project: Any) -> None:
    """The champion knows nine digits and another thing; the challenger all ten."""
    path = project.folder / "export/model.onnx"
    model = onnx.load(path)
    props = {prop.key: prop.value for prop in model.metadata_props}
    names = [f"digit {label}" for label in range(9)] + ["a letter"]
    onnx.helper.set_model_props(model, props | {"class_names": str(names).replace("'", '"')})
    onnx.save(model, project.folder / "champion.onnx")
    chosen = scores.choose(project.folder / "clean.parquet", project.folder / "samples.parquet", None)
    root = str(project.folder / "images")
    compared = scores.compare(project.folder / "champion.onnx", path, chosen, root)
    assert (compared.facts.lost, compared.facts.gained) == (["a letter"], ["digit 9"])
    assert "digit 9" not in set(compared.outcomes.classes.tolist())
    assert compared.new["digit 9"][0] == sum(
        name == "digit 9" for name in chosen.table["class_name"].to_pylist()
    )


def test_where_no_image_may_judge_nothing_is_decided(project: Any) -> None:
    """All new ones are suspect, and the champion's own are gone; a class has no name but its number."""
    project.suspect(exports.rows(project.folder / "clean.parquet", "val").paths)
    manifests.write(rows(("1", "", "val")), project.folder / "then.parquet")
    chosen = scores.choose(
        project.folder / "clean.parquet", project.folder / "samples.parquet", project.folder / "then.parquet"
    )
    assert (chosen.table.num_rows, chosen.gone) == (0, 1)
    path = project.folder / "export/model.onnx"
    compared = scores.compare(path, path, chosen, str(project.folder / "images"))
    assert len(compared.outcomes) == 0
    assert "not comparable" in decide(compared.outcomes, Limits(), compared.facts).reason


def test_a_class_without_a_name_is_called_by_its_number(tmp_path: Path, samples: Path) -> None:
    manifests.write(rows(("1", "", "val")), tmp_path / "now.parquet")
    chosen = scores.choose(tmp_path / "now.parquet", samples, tmp_path / "now.parquet")
    assert chosen.table["class_name"].to_pylist() == ["0"]
    assert chosen.relabelled == 0

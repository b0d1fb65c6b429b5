"""Which label a line of data.class_names names: one reading, said in a finding, or a stop; never a shift."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.common.errors import FindingsError, RetortError
from components.dataset.names import name_classes, numbers
from components.dataset.params import IngestParams
from components.step import StepContext
from components.tracking.tracker import Tracker
from tests.components.dataset.conftest import Steps, put


def run_of(remap: bool = False) -> StepContext:
    params = IngestParams.model_validate({"data": {"class_names": "names.txt", "remap_labels": remap}})
    return StepContext("ingest", params, Path("outputs/ingest"), Tracker("ingest", params.registry))


def named(labels: list[int], content: str | bytes, run: StepContext | None = None) -> dict[int, str]:
    """The name of each of these labels of a list file."""
    put(Path("names.txt"), content if isinstance(content, bytes) else content.encode())
    run = run or run_of()
    assert isinstance(run.params, IngestParams)
    names = name_classes(run, run.params.data, dict.fromkeys(labels), set())
    return {label: names[label] for label in labels}


CLOTHES = {1: "dress", 2: "shoes", 3: "bag"}


@pytest.mark.parametrize("remap", [False, True])
@pytest.mark.parametrize(
    ("labels", "content", "names"),
    [
        ([0, 1, 2], "dress\nshoes\nbag\n", {0: "dress", 1: "shoes", 2: "bag"}),
        ([1, 2, 3], "dress\nshoes\nbag\n", CLOTHES),
        ([5, 6], "dress\nshoes", {5: "dress", 6: "shoes"}),
        ([1, 2, 3], "1 dress\n2 shoes\n3 bag\n", CLOTHES),
        ([1, 2, 3], "3\tbag\n1\tdress\n2\tshoes\n", CLOTHES),
        ([1, 2, 3], b"\xef\xbb\xbf1 dress\r\n2 shoes\r\n\r\n3 bag\r\n\r\n", CLOTHES),
        ([1, 2, 3], "background\ndress\nshoes\nbag\n", CLOTHES),
        ([0, 5], "0 T-shirt/top, white\n5 ankle boot\n", {0: "T-shirt/top, white", 5: "ankle boot"}),
        ([0, 2], "dress\nshoes\nbag\n", {0: "dress", 2: "bag"}),
        ([0, 2], "0 dress\n1 shoes\n2 bag\n", {0: "dress", 2: "bag"}),
        ([1, 4], "1 连衣裙\n4 Schuhe & Ständer\n", {1: "连衣裙", 4: "Schuhe & Ständer"}),
        ([0, 1, 2], "7 up\n5 gum\n3 musketeers\n", {0: "7 up", 1: "5 gum", 2: "3 musketeers"}),
        ([1, 2, 3], "7 up\n5 gum\n3 musketeers\n", {1: "7 up", 2: "5 gum", 3: "3 musketeers"}),
        ([1, 2], "1 euro\n2 euro\n", {1: "1 euro", 2: "2 euro"}),
        ([0, 1], "1 euro\n2 euro\n", {0: "1 euro", 1: "2 euro"}),
        ([3, 4, 5], "3 crane\n4 heron\n5 crane\n", {3: "crane", 4: "heron", 5: "crane"}),
        ([0, 1, 7], "dress\nshoes\n", {0: "dress", 1: "shoes", 7: "7"}),
    ],
)  # fmt: skip
def test_names_stand_at_their_labels(
    labels: list[int], content: str | bytes, names: dict[int, str], remap: bool
) -> None:
    assert named(labels, content, run_of(remap)) == names


def test_remapped_labels_with_gaps_take_names_in_order_and_the_finding_says_so() -> None:
    run = run_of(remap=True)
    assert named([1, 5, 9], "dress\nshoes\nbag\n", run) == {1: "dress", 5: "shoes", 9: "bag"}
    (found,) = run.report.findings
    assert (found.rule, found.level, found.row) == ("labels.names", "info", "2.1")
    assert "label 1 is 'dress', label 5 is 'shoes', label 9 is 'bag'" in found.message


def test_ids_may_be_those_of_the_remapped_labels() -> None:
    assert named([1, 2, 3], "0 dress\n1 shoes\n2 bag\n", run_of(remap=True)) == CLOTHES


def test_labels_from_one_with_names_in_order_are_said() -> None:
    run = run_of()
    assert named([1, 2, 3], "dress\nshoes\nbag\n", run) == CLOTHES
    (found,) = run.report.findings
    assert (found.rule, found.level, found.measured) == ("labels.start", "warning", 1)
    assert "label 1 is 'dress'" in found.message
    assert "data.remap_labels" in found.advice


def test_ids_are_said() -> None:
    run = run_of()
    named([1, 2, 3], "1 dress\n2 shoes\n3 bag\n", run)
    (found,) = run.report.findings
    assert (found.rule, found.level) == ("labels.names", "info")
    assert found.message.startswith("Each line is 'id name': label 1 is 'dress'")


@pytest.mark.parametrize(
    ("labels", "content", "remap", "message"),
    [
        # as many names as labels, with gaps: in order, or by number?
        ([1, 5, 9], "dress\nshoes\nbag\n", False, "leaves 5, 9 without a name.*data.remap_labels: true"),
        # from 0 with one that is not in the data, or from 1 with one more?
        ([1, 2, 3], "dress\nshoes\nbag\nhat\n", False, "'shoes' or 'dress'.*'1 dress'.*data.remap_labels"),
        ([1, 2, 3], "dress\nshoes\nbag\nhat\n", True, "'shoes' or 'dress'"),
        ([1, 2, 3], "dress\nshoes\n", False, "2 names, one a line, and 3 labels .*counts do not match"),
        ([1, 5, 9], "dress\nshoes\n", True, "counts do not match.*data.class_names"),
        ([0, 2, 4, 6], "dress\nshoes\nbag\n", False, "counts do not match"),
        ([0, 1, 2], "1 dress\n2 shoes\n3 bag\n", False, "numbers 1, 2, 3, but the data has label 0 too"),
        ([1, 2, 3], "0 dress\n1 shoes\n2 bag\n", False, "numbers 0, 1, 2, but the data has label 3 too"),
        ([1, 2, 3], "1 dress\n1 shoes\n2 bag\n", False, r"1 stands there twice \(lines 1 and 2\)"),
        ([0, 1], "id name\n0 dress\n1 shoes\n", False, r"Line 1 \('id name'\) is not 'id name'"),
        ([0, 1, 2], "dress\n\nshoes\nbag\n", False, "Line 2 is empty"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_two_ways_stops_with_the_way_out(
    labels: list[int], content: str, remap: bool, message: str
) -> None:
    with pytest.raises(FindingsError, match=f"(?s)labels.names: names.txt: .*{message}") as raised:
        named(labels, content, run_of(remap))
    assert "checks.waive" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "no name in this file"), ("dress\nböse".encode("latin-1"), "not UTF-8 text; save")],
)
def test_a_file_that_gives_no_names_is_named(content: bytes, message: str) -> None:
    with pytest.raises(RetortError, match=f"names.txt: {message}"):
        named([0, 1], content)


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ("7 up\ndress\n", {"7 up": 0, "dress": 1}),
        ("1 dress\n0 7 up\n", {"7 up": 0, "dress": 1}),
        ("2\tdress\n1\t7 up\n", {"7 up": 1, "dress": 2}),
    ],
)
def test_class_folders_are_numbered_as_the_file_says(content: str, labels: dict[str, int]) -> None:
    put(Path("names.txt"), content.encode())
    run = run_of()
    assert isinstance(run.params, IngestParams)
    assert numbers(name_classes(run, run.params.data, {}, {"7 up", "dress"})) == labels


def test_the_datas_own_names_stay_and_the_difference_is_said() -> None:
    put(Path("names.txt"), b"dress\nbag\n")
    run = run_of()
    assert isinstance(run.params, IngestParams)
    own: dict[int, str | None] = {0: "dress", 1: "shoes"}
    assert name_classes(run, run.params.data, own, set()) == own
    assert "'shoes' there, 'bag' in this file" in run.report.findings[0].message


@pytest.mark.parametrize("content", [b"dress\nshoes\nbag\n", b"\xef\xbb\xbf1 dress\r\n2 shoes\r\n3 bag\r\n"])
def test_a_list_from_one_is_renumbered_with_its_names(photos: Path, steps: Steps, content: bytes) -> None:
    paths = sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    lines = [f"{path} {'abc'.index(str(path)[0]) + 1}\r\n" for path in paths]
    put(Path("list.txt"), "".join(lines).encode())
    put(Path("names.txt"), content)
    rows = steps.ingest("list.txt", photos, class_names="names.txt", remap_labels=True)
    assert {(row["path"][0], row["label"], row["class_name"]) for row in rows} == {
        ("a", 0, "dress"),
        ("b", 1, "shoes"),
        ("c", 2, "bag"),
    }


@pytest.mark.parametrize("name", ["a\nb", "a\r", "a\u2028b"])
def test_a_name_that_breaks_a_line_stops(name: str) -> None:
    """labels.txt has one name a line: every later class would get its neighbour's name."""
    data = IngestParams.model_validate({}).data
    with pytest.raises(FindingsError, match=r"1 class name with a line break.*Rename the folder"):
        name_classes(run_of(), data, {}, {name, "z"})

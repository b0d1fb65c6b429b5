"""A wrong data.root is found before anything is read, and the right one is named where it is near."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.common.errors import FindingsError
from tests.components.dataset.conftest import Steps, put


def listed(photos: Path, name: str, before: str = "", only: str = "abc") -> str:
    """A list of the photos, with ``before`` in front of each path."""
    paths = sorted(path.relative_to(photos) for path in photos.rglob("*.png"))
    lines = [f"{before}{path} {'abc'.index(str(path)[0])}" for path in paths if str(path)[0] in only]
    put(Path(name), "\n".join(lines).encode())
    return name


@pytest.mark.parametrize(
    ("before", "root", "name", "way_out"),
    [
        ("photos/", "photos", "list.txt", r"They are below \.: set data\.root to \.\."),
        ("", ".", "list.txt", r"They are below photos: set data\.root to photos\."),
        ("", "elsewhere", "photos/list.txt", r"They are below photos: set data\.root to photos\."),
        ("", "elsewhere", "list.txt", r"They are below photos: set data\.root to photos\."),
        ("set/", "photos", "list.txt", r"They are below data\.root \(photos\) without 'set/'"),
        ("gone/", "photos/a", "list.txt", r"Set data\.root \(now photos/a\) to .* list\.txt begin"),
    ],
)  # fmt: skip
def test_ingest_names_data_root_a_path_in_full_and_the_right_folder(
    photos: Path, steps: Steps, before: str, root: str, name: str, way_out: str
) -> None:
    Path("elsewhere").mkdir()
    source = listed(photos, name, before)
    first = f"{root}/{before}a/".removeprefix("./")
    with pytest.raises(FindingsError, match=f"(?s)60 of 60 images .* such as .*{first}.*{way_out}"):
        steps.ingest(source, root)
    found = steps.findings("ingest")["ingest.images"]
    assert (found.level, found.subject, found.measured) == ("error", "data.root", 60)
    assert not steps.manifest.exists()


def test_a_list_beside_a_good_one_is_tried_too(photos: Path, steps: Steps) -> None:
    source = {"train": listed(photos, "train.txt"), "val": listed(photos, "val.txt", "val/", "a")}
    with pytest.raises(FindingsError, match=r"20 of 20 images .* such as photos/val/a/"):
        steps.ingest(source, "photos")


def test_where_all_are_there_nothing_is_said(photos: Path, steps: Steps) -> None:
    assert len(steps.ingest(listed(photos, "list.txt"), "photos")) == 60
    assert "ingest.images" not in steps.findings("ingest")


def test_a_few_that_are_missing_are_a_warning_and_validate_puts_them_aside(
    photos: Path, steps: Steps
) -> None:
    source = listed(photos, "list.txt")
    for path in sorted(photos.rglob("*.png"))[:2]:
        path.unlink()
    assert len(steps.ingest(source, "photos")) == 60
    found = steps.findings("ingest")["ingest.images"]
    assert (found.level, found.measured) == ("warning", 2)
    assert "2 images cannot be opened: a/" in found.message


def test_validate_names_data_root_where_nearly_all_are_missing(photos: Path, steps: Steps) -> None:
    steps.ingest(str(photos), photos)
    photos.rename("moved")
    with pytest.raises(FindingsError, match=r"not there at all, such as .*photos/a/.*check data\.root \("):
        steps.validate(photos)

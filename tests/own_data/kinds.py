"""Ten kinds of own data, and more: what lies on the disk, what the person says, and how it must end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from components.dataset.params import Splits
from components.dataset.splits import split_of
from tests.own_data.pictures import encoded, picture, put

SPLITS = {"train": range(10), "val": range(10, 14), "test": range(14, 18)}
WHOLE = range(18)  # pictures of a class where the source has no splits


@dataclass(frozen=True)
class Data:
    """One kind of data, made below the working directory.

    ``names``: class name -> subject of its pictures ("": it has none), in the order of labels.txt.
    ``images``: what follows ``retort init DIR --images``; None: nothing does.
    ``bucket``: a folder whose files stand in s3://photos/.
    ``changes``: what the person writes into params.yaml.
    ``warns``: (step, rule) that must be among the warnings; ``silent``: steps that must not warn.
    ``stops``: the step that must fail, the one rule that says why (None: the command line itself does), and a
    piece of what is said.
    """

    names: dict[str, str]
    images: Path | None = None
    bucket: Path | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    warns: tuple[tuple[str, str], ...] = ()
    silent: tuple[str, ...] = ()
    stops: tuple[str, str | None, str] | None = None


Build = Callable[[Path], Data]
KINDS: dict[str, Build] = {}  # go through the whole pipeline
STOPPED: dict[str, Build] = {}  # end at a step that says why


def kind(build: Build) -> Build:
    KINDS[build.__name__.replace("_", " ")] = build
    return build


def stopped(build: Build) -> Build:
    STOPPED[build.__name__.replace("_", " ")] = build
    return build


def pictures(names: dict[str, str], numbers: range = WHOLE) -> Iterator[tuple[str, int, Image.Image]]:
    """Class name, number and picture, for every class and number."""
    for name, subject in names.items():
        for number in numbers:
            yield name, number, picture(subject, number)


def folder(root: Path, names: dict[str, str], numbers: range = WHOLE) -> Path:
    """``root/<class>/<number>.png``"""
    for name, number, image in pictures(names, numbers):
        put(root / name / f"{number:02}.png", encoded(image))
    return root


# --- folders --------------------------------------------------------------------------------------------


@kind
def a_folder(place: Path) -> Data:
    names = {"dahlia": "dahlia", "pagoda": "pagoda", "zero": "digit"}
    return Data(names, folder(place / "photos", names))


@kind
def a_folder_with_splits(place: Path) -> Data:
    names = {"dahlia": "dahlia", "pagoda": "pagoda", "zero": "digit"}
    for split, numbers in SPLITS.items():
        folder(place / "photos" / split, names, numbers)
    return Data(names, place / "photos")


@kind
def unicode_and_spaces(place: Path) -> Data:
    """Names sort by their code points: capitals, small letters, umlauts, Chinese. Files have them too."""
    names = {"Null & eins": "digit", "große Blüte": "dahlia", "塔 №1 (100%)": "pagoda"}
    for name, number, image in pictures(names):
        put(place / "meine Bilder ü" / name / f"Bild {number:02} — Ä+b%20.png", encoded(image))
    return Data(names, place / "meine Bilder ü")


@kind
def two_classes(place: Path) -> Data:
    names = {"dahlia": "dahlia", "pagoda": "pagoda"}
    return Data(names, folder(place / "photos", names))


@kind
def a_class_of_three(place: Path) -> Data:
    names = {"dahlia": "dahlia", "pagoda": "pagoda", "zero": "digit"}
    for split, numbers in SPLITS.items():
        folder(place / "photos" / split, {"dahlia": "dahlia", "pagoda": "pagoda"}, numbers)
        folder(place / "photos" / split, {"zero": "digit"}, numbers[:1])
    return Data(names, place / "photos", warns=(("audit/imbalance", "imbalance.few_samples"),))


@kind
def mixed_formats(place: Path) -> Data:
    """Formats and modes that cameras, scanners and browsers leave; each class has each of them."""
    names = {"dahlia": "dahlia", "pagoda": "pagoda", "zero": "digit"}
    forms = ("jpg", "png", "webp", "bmp", "tif", "JPEG", "heic", "avif", "grey", "rgba", "sixteen", "palette")
    for name, number, image in pictures(names, range(24)):
        form = forms[number % len(forms)]
        extension = {"grey": "png", "rgba": "webp", "sixteen": "png", "palette": "png"}.get(form, form)
        if form == "grey":
            image = image.convert("L")
        elif form == "rgba":
            image = image.copy()
            image.putalpha(
                Image.linear_gradient("L").resize(image.size).point(lambda level: 128 + level // 2)
            )
        elif form == "sixteen":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif form == "palette":
            image = image.quantize(64)
        kinds = {"JPEG": "jpg"}
        content = encoded(image, kinds.get(extension, extension))
        put(place / "photos" / name / f"{number:02}.{extension}", content)
    return Data(names, place / "photos", silent=("ingest", "validate"))


@kind
def panoramas(place: Path) -> Data:
    """Five times as wide as high; the thing is in the middle, where the networks look."""
    names = {"dahlia": "dahlia", "pagoda": "pagoda"}
    for name, number, image in pictures(names):
        # a horizon on both sides: the edges' columns, drawn out
        wide = np.asarray(image)
        left, right = np.repeat(wide[:, :1], 128, axis=1), np.repeat(wide[:, -1:], 128, axis=1)
        sheet = Image.fromarray(np.concatenate([left, wide, right], axis=1))
        put(place / "photos" / name / f"{number:02}.jpg", encoded(sheet, "jpg", quality=92))
    return Data(names, place / "photos", silent=("ingest", "validate"))


@kind
def unlabelled_beside(place: Path) -> Data:
    names = {"dahlia": "dahlia", "pagoda": "pagoda", "zero": "digit"}
    folder(place / "photos", names)
    for name, number, image in pictures(names, range(20, 26)):
        put(place / "photos" / "unlabeled" / f"{name}{number}.png", encoded(image))
    return Data(names, place / "photos")


@kind
def synthetic_beside(place: Path) -> Data:
    """A folder synthetic/ in each class: pictures turned and tinted, as a generator's would be."""
    names = {"dahlia": "dahlia", "pagoda": "pagoda", "zero": "digit"}
    folder(place / "photos", names)
    for name, number, image in pictures(names, range(20, 28)):
        made = image.rotate(15, Image.Resampling.BICUBIC).point([*range(256), *range(256), *[0] * 256])
        put(place / "photos" / name / "synthetic" / f"{number}.png", encoded(made))
    return Data(names, place / "photos")


# --- list files -----------------------------------------------------------------------------------------


def lists(place: Path, labels: dict[int, str]) -> dict[str, Any]:
    """``train.txt``, ``val.txt``, ``test.txt`` with ``path label`` a line; what params.yaml says of them."""
    for split, numbers in SPLITS.items():
        lines = []
        for label, subject in labels.items():
            for number in numbers:
                path = f"{split}/{subject}_{number:02}.png"
                put(place / "photos" / path, encoded(picture(subject, number)))
                lines.append(f"{path} {label}\n")
        (place / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    source = {split: str(place / f"{split}.txt") for split in SPLITS}
    return {"source": source, "root": str(place / "photos")}


def names_file(place: Path, text: str) -> str:
    (place / "labels.txt").write_text(text, encoding="utf-8")
    return str(place / "labels.txt")


@kind
def lists_from_0(place: Path) -> Data:
    data = lists(place, {0: "pagoda", 1: "digit", 2: "dahlia"})
    data["class_names"] = names_file(place, "tower\nzero\nflower\n")
    names = {"tower": "pagoda", "zero": "digit", "flower": "dahlia"}
    return Data(names, changes={"data": data}, silent=("ingest", "validate"))


@kind
def lists_without_names(place: Path) -> Data:
    data = lists(place, {0: "pagoda", 1: "digit", 2: "dahlia"})
    return Data({"0": "pagoda", "1": "digit", "2": "dahlia"}, changes={"data": data})


@kind
def lists_from_1(place: Path) -> Data:
    """The FAQ's row 2.1, remapped as the finding advises; the names are in the order of the labels."""
    data = lists(place, {1: "pagoda", 2: "digit", 3: "dahlia"})
    data["class_names"] = names_file(place, "tower\nzero\nflower\n")
    data["remap_labels"] = True
    return Data({"tower": "pagoda", "zero": "digit", "flower": "dahlia"}, changes={"data": data})


@kind
def lists_from_1_as_they_are(place: Path) -> Data:
    """Not remapped: label 0 is an output that nothing belongs to, which is said; no name moves."""
    data = lists(place, {1: "pagoda", 2: "digit", 3: "dahlia"})
    data["class_names"] = names_file(place, "tower\nzero\nflower\n")
    names = {"0": "", "tower": "pagoda", "zero": "digit", "flower": "dahlia"}
    return Data(names, changes={"data": data}, warns=(("validate", "labels.start"),))


@kind
def lists_with_gaps(place: Path) -> Data:
    data = lists(place, {0: "pagoda", 2: "digit", 5: "dahlia"})
    data["remap_labels"] = True
    return Data({"0": "pagoda", "2": "digit", "5": "dahlia"}, changes={"data": data})


@kind
def lists_with_paddle_labels(place: Path) -> Data:
    """PaddleClas's label file: 'id name' a line; names may hold spaces."""
    data = lists(place, {1: "pagoda", 2: "digit", 3: "dahlia"})
    data["class_names"] = names_file(place, "1 old tower\n2 zero\n3 flower\n")
    data["remap_labels"] = True
    return Data({"old tower": "pagoda", "zero": "digit", "flower": "dahlia"}, changes={"data": data})


# --- a manifest -----------------------------------------------------------------------------------------


@kind
def a_parquet_manifest(place: Path) -> Data:
    """Labels in an order that is not that of the names, so that neither can stand for the other."""
    labels = {"tower": 0, "flower": 1, "zero": 2}
    names = {"tower": "pagoda", "flower": "dahlia", "zero": "digit"}
    rows = []
    for split, numbers in SPLITS.items():
        for name, _, image in pictures(names, numbers):
            path = f"all/{len(rows):03}.png"
            put(place / "photos" / path, encoded(image))
            rows.append({"path": path, "label": labels[name], "class_name": name, "split": split})
    pq.write_table(pa.Table.from_pylist(rows), place / "rows.parquet")
    return Data(
        names, changes={"data": {"source": str(place / "rows.parquet"), "root": str(place / "photos")}}
    )


# --- a bucket -------------------------------------------------------------------------------------------


@kind
def a_bucket(place: Path) -> Data:
    names = {"dahlia": "dahlia", "pagoda": "pagoda", "zero & one": "digit"}
    folder(place / "bucket" / "things", names)
    data = {"source": "s3://photos/things", "root": "images"}
    return Data(names, bucket=place / "bucket", changes={"data": data})


# --- what cannot be trained on --------------------------------------------------------------------------


@stopped
def lists_with_gaps_and_unclear_names(place: Path) -> Data:
    """Two readings: names in the order of the labels, or line n for label n."""
    data = lists(place, {0: "pagoda", 2: "digit", 5: "dahlia"})
    data["class_names"] = names_file(place, "tower\nzero\nflower\n")
    return Data({}, changes={"data": data}, stops=("ingest", "labels.names", "labels.txt"))


@stopped
def a_name_of_two_lines(place: Path) -> Data:
    """labels.txt has one name a line."""
    photos = folder(place / "photos", {"dahl\nia": "dahlia", "pagoda": "pagoda"})
    return Data({}, photos, stops=("ingest", "labels.names", "line break"))


@stopped
def lists_below_another_folder(place: Path) -> Data:
    data = lists(place, {0: "pagoda", 1: "digit", 2: "dahlia"})
    data["root"] = str(place)
    return Data({}, changes={"data": data}, stops=("ingest", "ingest.images", "data.root"))


@stopped
def too_few_classes_said(place: Path) -> Data:
    photos = folder(place / "photos", {"dahlia": "dahlia", "pagoda": "pagoda", "zero": "digit"})
    return Data(
        {},
        photos,
        changes={"global": {"class_num": 2}},
        stops=("validate", "labels.class_num", "Set global.class_num to auto or 3"),
    )


@stopped
def only_unlabelled(place: Path) -> Data:
    photos = place / "photos"
    folder(photos, {"unlabeled": "dahlia"})
    return Data({}, photos, stops=("ingest", None, "at least two classes"))


@stopped
def one_folder_of_loose_pictures(place: Path) -> Data:
    for _, number, image in pictures({"": "dahlia"}):
        put(place / "photos" / f"{number}.png", encoded(image))
    data = {"source": str(place / "photos"), "root": str(place / "photos")}
    return Data({}, changes={"data": data}, stops=("ingest", None, "class"))


@stopped
def cut_off_by_a_bad_copy(place: Path) -> Data:
    """A third of the files end in the middle."""
    for name, number, image in pictures({"dahlia": "dahlia", "pagoda": "pagoda"}):
        content = encoded(image)
        put(
            place / "photos" / name / f"{number}.png",
            content[: len(content) // 2] if number % 3 == 0 else content,
        )
    return Data({}, place / "photos", stops=("validate", "validate.max_bad_share", "max_bad_share"))


@stopped
def nothing_to_judge_on(place: Path) -> Data:
    """So few that none falls into validation: where an image goes is decided by its content."""
    splits = Splits(val=0.3, test=0.2)
    for name, number, image in pictures({"dahlia": "dahlia", "pagoda": "pagoda"}, range(4)):
        content = encoded(image)
        if split_of(hashlib.sha256(content).hexdigest(), splits) == "train":
            put(place / "photos" / name / f"{number}.png", content)
    return Data({}, place / "photos", stops=("ingest", "ingest.splits", "data.splits.val"))

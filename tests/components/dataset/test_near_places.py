"""A difference in one place is another picture; what is bad already, or the data itself, is no measure."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from components.common.errors import RetortError
from components.dataset.inspection import inspect
from components.dataset.near import near_duplicates, same_everywhere
from tests.components.dataset.conftest import Steps, digit, encoded, put, row, write_manifest


def frame(number: int, side: int) -> Image.Image:
    """What one camera sees: a background of 224 pixels and noise, before it the ``number``-th digit."""
    random = np.random.default_rng(3)
    scene = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8)).resize((224, 224))
    scene.paste(Image.eval(digit(number, side), lambda value: 255 - value).convert("RGB"), (100, 100))
    noise = np.random.default_rng(number).normal(0, 6, (224, 224, 3))
    return Image.fromarray(np.clip(np.asarray(scene) + noise, 0, 255).astype(np.uint8))


def saved_again(image: Image.Image, side: int, quality: int) -> bytes:
    return encoded(image.resize((side, side), Image.Resampling.BICUBIC), "JPEG", quality=quality)


def partners(contents: list[bytes]) -> set[tuple[int, int]]:
    seen = [inspect(content) for content in contents]
    looks = np.frombuffer(b"".join(one.look for one in seen), np.uint8).reshape(-1, 256)
    hashes = np.array([one.phash for one in seen], np.uint64)
    pairs = near_duplicates(hashes, looks, np.zeros(len(hashes), np.int64), 6)
    return set(zip(pairs.one.tolist(), pairs.other.tolist(), strict=True))


@pytest.mark.parametrize("side", [40, 56])
def test_frames_of_one_camera_are_no_copies_and_copies_of_them_are(side: int) -> None:
    frames = [frame(number, side) for number in range(60)]
    originals = [encoded(image, "JPEG", quality=90) for image in frames]
    alike = partners(originals)  # two ones may well look the same at 3 of 16 pixels
    targets = load_digits().target
    assert len(alike) <= 2
    assert all(targets[one] == targets[other] for one, other in alike)
    copies = [saved_again(image, (112, 160, 336)[k % 3], 60 + k % 36) for k, image in enumerate(frames)]
    found = partners(originals + copies)
    assert sum((number, number + 60) in found for number in range(60)) >= 57
    assert all(targets[one % 60] == targets[other % 60] for one, other in found)


def test_what_saving_does_to_a_whole_picture_is_no_other_picture() -> None:
    random = np.random.default_rng(0)
    wide = Image.fromarray(random.integers(40, 200, (6, 6), np.uint8)).resize((72, 72))

    def look(box: tuple[float, float, float, float] = (4, 4, 68, 68)) -> np.ndarray:
        pixels = wide.resize((16, 16), Image.Resampling.LANCZOS, box=box)
        return np.asarray(pixels, np.float64)

    plain = look()
    patch = np.zeros((16, 16))
    patch[5:8, 9:12] = [[30, -30, 30], [30, 30, -30], [-30, 30, 30]]
    same = [plain, plain * 0.95 + 10, look((5, 4, 69, 68)), plain + random.normal(0, 4, (16, 16))]
    looks = np.stack([*same, plain + patch, same[1] + patch]).round().astype(np.uint8).reshape(6, 256)
    verdicts = same_everywhere(looks, np.zeros(6, np.int64), np.arange(6))
    assert verdicts.tolist() == [True, True, True, True, False, False]


def test_plain_stripes_and_no_pairs_are_compared_too() -> None:
    stripes = np.tile(np.arange(0, 256, 16), (2, 16)).astype(np.uint8)
    none = np.zeros(0, np.int64)
    assert same_everywhere(stripes, np.array([0]), np.array([1])).tolist() == [True]
    assert len(same_everywhere(stripes, none, none)) == 0


def test_a_doubtful_pair_of_two_labels_is_said_and_takes_nothing_away(steps: Steps) -> None:
    """Things of 28 pixels in 224 are 2 of the 16 that are compared: too few to call them one."""
    targets = load_digits().target
    for number in range(160):
        split = "val" if number % 4 == 0 else "train"
        content = encoded(frame(number, 28), "JPEG", quality=90)
        put(Path("photos") / split / str(targets[number]) / f"{number}.jpg", content)
    copied = Image.open(io.BytesIO(Path("photos/val/0/0.jpg").read_bytes()))
    put(Path("photos/train/7/copy.png"), encoded(copied))
    steps.ingest("photos", "photos")
    aside = {row["path"] for row in steps.validate("photos", validate={"max_bad_share": 1.0})}
    cases = steps.cases().to_pylist()
    leaks = {(case["path"], case["other"]) for case in cases if case["rule"] == "leakage.near"}
    torn = {case["path"] for case in cases if case["rule"] == "duplicates.labels"}
    assert ("train/7/copy.png", "val/0/0.jpg") in leaks, "a copy beyond doubt leaks whatever its label"
    others = {path for path, other in leaks if path.split("/")[1] != other.split("/")[1]}
    assert others == {"train/7/copy.png"}
    assert {path for path in torn if path.startswith("train")} - aside


def test_a_bad_validation_row_does_not_take_its_good_twin_along(steps: Steps) -> None:
    good = [row(f"{split}{number}", number % 2, split) for number in range(10) for split in ("train", "val")]
    bad = [
        row("drawn", 0, "val", source="synthetic", sha256="train0"),
        row("nameless", None, "test", sha256="train1"),
        row("", 0, "val", sha256="train2"),
        row("sourceless", 1, "test", source="web", sha256="train3"),
        row("drawn too", 0, "val", source="synthetic", sha256="val4"),
    ]
    leak = row("leak", 0, "train", sha256="val4")  # of a good row as well
    write_manifest([*good, *bad, leak])
    aside = steps.validate(".", validate={"images": "none", "max_bad_share": 1.0})
    assert {one["path"]: one["reason"].split(":")[0] for one in aside} == {
        "drawn": "leakage.synthetic",
        "nameless": "labels.missing",
        "": "manifest.path",
        "sourceless": "leakage.synthetic",
        "drawn too": "leakage.synthetic",
        "leak": "leakage.exact",
    }


def test_a_changed_validation_file_does_not_take_training_images_along(steps: Steps) -> None:
    for number in range(40):
        split = "val" if number % 4 == 0 else "train"
        put(Path("photos") / split / "ab"[number % 2] / f"{number}.png", encoded(digit(number)))
    put(Path("photos/val/b/twin.png"), encoded(digit(1)))
    steps.ingest("photos", "photos")
    # neither what was there nor what lies there now judges anything
    put(Path("photos/val/b/twin.png"), saved_again(digit(3, 64), 48, 90))
    aside = steps.validate("photos")
    assert {one["path"] for one in aside} == {"val/b/twin.png"}


def test_the_manifest_itself_is_no_baseline(steps: Steps) -> None:
    write_manifest(
        [row(f"{split}{number}", number % 2, split) for number in range(9) for split in ("train", "val")]
    )
    os.link(steps.manifest, "linked.parquet")
    Path("symbolic.parquet").symlink_to(steps.manifest)
    for name in (str(steps.manifest), "data/../data/manifest.parquet", "linked.parquet", "symbolic.parquet"):
        with pytest.raises(RetortError, match=r"validate\.baseline: .* is the manifest that is validated"):
            steps.validate(".", validate={"images": "none", "baseline": name})
    Path("earlier.parquet").write_bytes(steps.manifest.read_bytes())
    steps.validate(".", validate={"images": "none", "baseline": "earlier.parquet"})

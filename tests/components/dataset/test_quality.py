"""The quality audit: numbers worked out by hand, planted damage named, and silence without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images

from components.dataset.inspection import inspect
from components.dataset.quality import CHECKS, blurry, dark, flat, information, light, measure
from components.dataset.quality.check import View
from components.dataset.quality.judge import judge
from tests.components.dataset.conftest import Steps, encoded, put


def view(pixels: Any) -> View:
    return View(Image.fromarray(np.asarray(pixels, np.uint8)))


# the measures, by hand


def test_the_width_of_edges() -> None:
    edge = np.repeat([[0, 0, 0, 0, 100, 100, 100, 100]], 8, axis=0)
    # each of 8 rows has one rise of 100 in 7 differences, and two bends in 6; the columns none
    slope, curve = 8 * 1e4 / (2 * 8 * 7), 8 * 2e4 / (2 * 8 * 6)
    wanted = ((slope - 1 / 6) / (2 * (curve - 1 / 2))) ** 0.5
    assert blurry.blur_width(view(edge)) == pytest.approx(wanted, abs=1e-6)
    assert blurry.blur_width(view(edge)) == pytest.approx(blurry.blur_width(view(edge * 0.4)), abs=0.01)


@pytest.mark.parametrize("sigma", [3, 4, 6])
def test_a_blurred_edge_has_the_width_of_the_blur(sigma: int) -> None:
    board = np.kron(np.indices((2, 2)).sum(axis=0) % 2, np.full((64, 64), 200))
    sharp = Image.fromarray(board.astype(np.uint8))
    assert blurry.blur_width(View(sharp)) == pytest.approx(0.5, abs=0.05)
    soft = np.asarray(sharp.filter(ImageFilter.GaussianBlur(sigma)), np.float64)
    # a step is 2 pixels of these 128
    assert blurry.blur_width(view(soft)) == pytest.approx(sigma / 2, rel=0.15)


def test_white_noise_is_sharp() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 120))
    assert blurry.blur_width(view(noise)) == pytest.approx(6**-0.5, abs=0.01)


def test_the_levels() -> None:
    pixels = np.zeros((10, 10))
    pixels[0, 0] = 200
    assert dark.highlights(view(pixels)) == 0
    pixels[0, 1] = 200
    assert dark.highlights(view(pixels)) == 200
    halves = np.repeat([20, 70], 50).reshape(10, 10)
    assert flat.contrast(view(halves)) == 51
    assert flat.contrast(view(np.full((10, 10), 33))) == 1
    # 10 white of 50 that are not black
    assert light.clipped(view(np.repeat([0, 255, 100], [50, 10, 40]).reshape(10, 10))) == pytest.approx(0.2)
    assert light.clipped(view(np.zeros((10, 10)))) == 0
    assert information.entropy(view(np.repeat([1, 5, 6, 200], 25).reshape(10, 10))) == pytest.approx(2)
    assert information.entropy(view(np.full((10, 10), 33))) == 0


def test_a_large_image_is_measured_as_a_smaller_one() -> None:
    """At 1/8 of a photograph's side its sharpness is that of the whole, and its blur is as visible."""
    whole = Image.fromarray(load_sample_images().images[0]).convert("L").crop((0, 0, 420, 420))
    large = whole.resize((1680, 1680), Image.Resampling.NEAREST)
    numbers = [np.frombuffer(measure(image), np.float32) for image in (whole, large)]
    assert numbers[1] == pytest.approx(numbers[0], rel=0.25, abs=0.02)
    soft = large.filter(ImageFilter.GaussianBlur(0.03 * 1680))
    assert np.frombuffer(measure(soft), np.float32)[0] > 3 * numbers[1][0]


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.new("RGB", (1, 1), "red")),
        encoded(Image.new("L", (2, 1), 7)),
        encoded(Image.new("L", (1, 300), 7)),
        encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))),
        encoded(Image.fromarray(np.arange(0, 65536, 1024, np.uint16).reshape(8, 8))),
        encoded(Image.new("L", (9000, 700), 7), "JPEG"),
        encoded(Image.new("CMYK", (50, 40)), "JPEG"),
    ],
)
def test_images_of_any_shape_and_mode_have_numbers(content: bytes) -> None:
    numbers = np.frombuffer(inspect(content).quality, np.float32)
    assert numbers.shape == (len(CHECKS),)
    assert np.isfinite(numbers).all()
    for check, number in zip(CHECKS, numbers, strict=True):
        assert np.isfinite(check.badness(float(number)))
        assert check.value(float(check.badness(float(number)))) == pytest.approx(float(number), abs=1e-4)


def test_what_cannot_be_read_has_none() -> None:
    assert inspect(b"no image").quality == b""


# the judgement

DARK = dark.CHECK


def highlights(count: int = 1000, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(200, 15, count), 0, 255)


def judged(values: np.ndarray, labels: np.ndarray | None = None, sources: np.ndarray | None = None) -> Any:
    none = np.zeros(len(values), np.int64)
    return judge(DARK, values, none if labels is None else labels, none if sources is None else sources)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.19])
def test_exceptions_are_named_however_many(share: float) -> None:
    values, damaged = highlights(), int(1000 * share)
    values[:damaged] *= 0.3
    verdict = judged(values)
    assert verdict.named[:damaged].all()
    assert not verdict.named[damaged:].any()
    assert not verdict.common.any()
    assert verdict.limits == pytest.approx(100), "the bound of the check: dark images are no lighter"


def test_a_third_that_is_dark_is_named_and_is_no_exception() -> None:
    values = highlights()
    values[:333] *= 0.3
    verdict = judged(values)
    assert verdict.named.tolist() == [True] * 333 + [False] * 667
    assert verdict.common.tolist() == verdict.named.tolist()


def test_a_dark_class_is_said_as_a_class_and_its_exceptions_elsewhere_remain() -> None:
    values, labels = highlights(), np.arange(1000) // 250
    values[labels == 2] *= 0.3
    values[0] = 30
    verdict = judged(values, labels)
    assert np.flatnonzero(verdict.named & ~verdict.common).tolist() == [0]
    assert (np.flatnonzero(verdict.common) // 250 == 2).all()
    assert verdict.common.sum() == 250


def test_a_class_that_tends_to_be_dark_has_a_milder_limit() -> None:
    values, labels = highlights(), np.arange(1000) // 250
    values[labels == 2] -= np.linspace(0, 110, 250)  # 1 in 10 beyond the limit of all
    strict, mild = judged(values), judged(values, labels)
    assert 10 < strict.named.sum() < 50
    assert not mild.named.any()
    values[510] = 10
    assert judged(values, labels).named.nonzero()[0].tolist() == [510], "worse than 'sure'"


def test_all_images_alike_are_never_exceptions() -> None:
    assert not judged(np.full(500, 150.0)).named.any()
    black = judged(np.full(500, 20.0))
    assert black.common.all(), "nothing can be seen, whatever the others look like"


def test_synthetic_images_are_no_measure_of_real_ones() -> None:
    values, sources = highlights(2000), np.arange(2000) // 1500
    values[sources == 0] = 70  # drawn in grey, most of the rows
    values[1999] = 45
    assert judged(values, sources=sources).named.nonzero()[0].tolist() == [1999]


# the step


def photographs(count: int) -> list[Image.Image]:
    """Parts of two real photographs, with nothing that is blurred or out of range."""
    random = np.random.default_rng(0)
    scenes = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    found = []
    for number in range(count):
        left, top = (int(random.integers(0, side)) for side in (340, 127))
        part = scenes[number % 2].crop((left, top, left + 300, top + 300))
        found.append(part.resize((96, 96), Image.Resampling.LANCZOS))
    return found


DAMAGE = {
    "blurry": lambda image: image.filter(ImageFilter.GaussianBlur(4)),
    "dark": lambda image: image.point(lambda value: value * 0.12),
    "light": lambda image: image.point(lambda value: min(255, 80 + value * 5)),
    "information": lambda image: image.convert("L").point(lambda value: 40 + 120 * (value > 90)),
    "flat": lambda image: Image.new("RGB", image.size, (90, 120, 60)),
}


def make(root: Path, damaged: int = 2) -> None:
    for number, image in enumerate(photographs(160)):
        split = "train" if number < 120 else "val"
        name = list(DAMAGE)[number // 8 % 5] if number % 8 == 0 and number < 40 * damaged else ""
        content = encoded(DAMAGE[name](image) if name else image)
        put(root / split / "ab"[number % 2] / f"{number:03d}{name}.png", content)


def test_planted_damage_is_named_and_stays(tmp_path: Path, steps: Steps) -> None:
    root = tmp_path / "photos"
    make(root)
    put(root / "train" / "a" / "broken.png", b"no image")
    rows = steps.ingest("photos", "photos")
    aside = steps.validate("photos", validate={"near_duplicate_bits": 0})
    assert not [row for row in aside if "quality" in row["reason"]]
    cases = {(case["rule"], case["path"]) for case in steps.cases().to_pylist()}
    found = steps.findings("validate")
    for name in DAMAGE:
        planted = {row["path"] for row in rows if name in row["path"]}
        assert len(planted) == 2
        assert {path for rule, path in cases if rule == f"quality.{name}"} >= planted
        assert (found[f"quality.{name}"].level, found[f"quality.{name}"].limit) == ("warning", 0)
    assert not [path for rule, path in cases if rule.startswith("quality") and path[-5].isdigit()]
    table = pq.read_table("outputs/validate/quality.parquet").to_pylist()
    assert {row["path"] for row in table} == {row["path"] for row in steps.rows(steps.clean)}
    assert all(row["is_blurry"] == ("blurry" in row["path"]) for row in table)
    page = Path("outputs/validate/report.html").read_text()
    assert "The worst of 2: images are blurry" in page
    steps.validate("photos", report={"thumbnails": False})
    assert "The worst of" not in Path("outputs/validate/report.html").read_text()
    steps.validate("photos", validate={"quality": False})
    assert not any(rule.startswith("quality") for rule in steps.findings("validate"))
    assert not Path("outputs/validate/quality.parquet").exists()


def test_clean_photographs_pass_in_silence(tmp_path: Path, steps: Steps) -> None:
    make(tmp_path / "photos", damaged=0)
    steps.ingest("photos", "photos")
    steps.validate("photos")
    assert not any(rule.startswith("quality") for rule in steps.findings("validate"))


def test_a_darker_validation_split_is_said(tmp_path: Path, steps: Steps) -> None:
    for number, image in enumerate(photographs(160)):
        split = "train" if number < 100 else "val"
        content = encoded(image.point(lambda value: value * 0.7) if split == "val" else image)
        put(tmp_path / "photos" / split / "ab"[number % 2] / f"{number:03d}.png", content)
    steps.ingest("photos", "photos")
    steps.validate("photos")
    finding = steps.findings("validate")["quality.splits"]
    assert (finding.level, finding.subject) == ("info", "split 'val'")
    assert "brightest hundredth" in finding.message

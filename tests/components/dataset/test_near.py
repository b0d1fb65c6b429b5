"""Near-duplicates: the search finds every close pair; pixels tell copies from look-alikes."""

from __future__ import annotations

import io

import imagehash
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from components.dataset import near
from components.dataset.inspection import inspect, perceptual_hash
from components.dataset.near import close_pairs, concordance, near_duplicates
from tests.components.dataset.conftest import digit, encoded


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), bits=st.integers(0, 9))
def test_close_pairs_are_those_of_brute_force_each_once(seed: int, bits: int) -> None:
    random = np.random.default_rng(seed)
    hashes = random.integers(0, 2**64, 300, dtype=np.uint64)
    flips = np.bitwise_or.reduce(np.uint64(1) << random.integers(0, 64, (8, 200)).astype(np.uint64), axis=0)
    hashes = np.concatenate([hashes, hashes[:200] ^ flips, hashes[:50]])
    found = [pair for one, other in close_pairs(hashes, bits) for pair in zip(one, other, strict=True)]
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= bits
    assert len(found) == len(set(found))
    assert set(found) == set(zip(*np.nonzero(np.triu(near, 1)), strict=True))


def test_the_perceptual_hash_is_the_one_everybody_uses() -> None:
    for number in range(200):
        grey = digit(number).convert("L")
        assert perceptual_hash(grey) == int(str(imagehash.phash(grey)), 16)


def looks_of(contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    seen = [inspect(content) for content in contents]
    looks = np.frombuffer(b"".join(one.look for one in seen), np.uint8).reshape(-1, 256)
    return np.array([one.phash for one in seen], np.uint64), looks


def test_no_two_different_digits_are_called_near_duplicates() -> None:
    """Of the 1,797 digits, many have another within 6 bits; none is a copy of another."""
    hashes, looks = looks_of([encoded(digit(number)) for number in range(len(load_digits().target))])
    proposed = sum(len(one) for one, _ in close_pairs(hashes, 6))
    assert proposed > 100
    assert len(near_duplicates(hashes, looks, np.zeros(len(hashes), np.int64), 6).one) == 0


def test_concordance_worked_out_by_hand() -> None:
    looks = np.array([[0, 2] * 128, [2, 4] * 128, [2, 0] * 128, [0, 4] * 128], np.uint8)
    first, others = np.zeros(4, np.int64), np.arange(4)
    # variances 1, 1, 1, 4; means 1, 3, 1, 2; covariances with the first 1, 1, -1, 2
    assert concordance(looks, first, others).tolist() == pytest.approx([1, 2 / 6, -1, 4 / 6])


@pytest.mark.parametrize(("side", "quality"), [(64, 90), (48, 70), (24, 90)])
def test_copies_at_other_sizes_and_qualities_are_found(side: int, quality: int) -> None:
    originals = [encoded(digit(number)) for number in range(100)]
    copies = []
    for content in originals:
        image = Image.open(io.BytesIO(content)).resize((side, side), Image.Resampling.BICUBIC)
        copies.append(encoded(image, "JPEG", quality=quality))
    hashes, looks = looks_of(originals + copies)
    pairs = near_duplicates(hashes, looks, np.zeros(200, np.int64), 6)
    matched = {int(one) for one, other in zip(pairs.one, pairs.other, strict=True) if other == one + 100}
    assert len(matched) >= 95


@pytest.mark.parametrize(("width", "quality"), [(200, 60), (320, 90), (640, 40), (900, 80)])
def test_photographs_at_other_sizes_keep_their_hash_and_look(width: int, quality: int) -> None:
    """Above 256 pixels an image is thinned out before it is hashed; below it is not."""
    for pixels in load_sample_images().images:
        photo = Image.fromarray(pixels)
        copy = photo.resize((width, width * photo.height // photo.width), Image.Resampling.BICUBIC)
        hashes, looks = looks_of([encoded(photo), encoded(copy, "JPEG", quality=quality)])
        assert np.bitwise_count(hashes[0] ^ hashes[1]) <= 4
        assert len(near_duplicates(hashes, looks, np.zeros(2, np.int64), 6).one) == 2


def test_a_crowd_of_one_hash_costs_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 frames of one scene among others: all are named, after some hundred comparisons each."""
    random = np.random.default_rng(0)
    count, scenes = 30_000, random.integers(20, 235, (2, 256))
    looks = np.clip(scenes[0] + random.normal(0, 2, (count + 3, 256)), 0, 255).astype(np.uint8)
    looks[count] = scenes[1]  # another scene, whose hash happens to be the same
    hashes = np.full(count + 3, 0xC3A50F961E2D784B, np.uint64)
    hashes[-2:] ^= np.uint64(0b111)  # two more frames of the scene, three bits away
    kinds = np.zeros(count + 3, np.int64)
    kinds[-1] = 1  # one of these two is for validation
    compared = 0

    def counted(looks: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        nonlocal compared
        compared += len(one)
        return concordance(looks, one, other)

    monkeypatch.setattr(near, "concordance", counted)
    pairs = near_duplicates(hashes, looks, kinds, 6)
    assert compared < 150 * count
    partners: dict[int, set[int]] = {}
    for one, other in zip(pairs.one.tolist(), pairs.other.tolist(), strict=True):
        partners.setdefault(one, set()).add(other)
    frames = [*range(count), count + 1]
    assert all(0 in partners[frame] for frame in frames[1:]), "the first frame stands before every other"
    assert all(count + 2 in partners[frame] for frame in frames), "no frame leaks into validation unseen"
    assert count not in partners


def test_small_crowds_find_what_the_whole_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    scenes = random.integers(0, 256, (12, 256))
    scene = random.integers(0, 12, 600)
    looks = np.clip(scenes[scene] + random.integers(-2, 3, (600, 256)), 0, 255).astype(np.uint8)
    hashes = random.integers(0, 2**64, 3, dtype=np.uint64)[scene % 3]  # four scenes share a hash
    kinds = random.integers(0, 2, 600)
    whole = near_duplicates(hashes, looks, kinds, 6)
    monkeypatch.setattr(near, "CROWD", 40)
    crowded = near_duplicates(hashes, looks, kinds, 6)

    def matched(pairs: near.Pairs) -> set[tuple[int, int]]:
        return set(zip(pairs.one.tolist(), kinds[pairs.other].tolist(), strict=True))

    assert matched(whole) == matched(crowded) == {(one, kind) for one in range(600) for kind in (0, 1)}
    assert (scene[crowded.one] == scene[crowded.other]).all()

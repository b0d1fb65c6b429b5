"""Augmentation: pictures that depend on (seed, view, row) alone, drawn as the recipes say; mixing by hand."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import TrivialAugmentWide
from torchvision.transforms.v2 import functional as reference

from components.common.errors import ConfigError
from components.dataset import images
from components.training import augmentation
from components.training.augmentation import NO_AUGMENT, RECIPES, Augment, Mix, Recipe
from components.training.operations import Op, grid, sample
from tests.components.training.pictures import differs, pictures

SIZE = 24
CPU = torch.device("cpu")


def numbers(count: int, view: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(count), np.full(count, view)


def draws(name: str, count: int = 20_000, aspect: float = 1.0, size: int = 224) -> augmentation.Draws:
    return augmentation.draw(RECIPES[name], 1, *numbers(count), np.full(count, aspect), size)


# ---- random numbers


def test_the_generator_is_splitmix64() -> None:
    """Published outputs for the states 0 and 1234567 (Vigna's splitmix64.c)."""
    first = augmentation.bits(np.array([0, 1234567], dtype=np.uint64), 5)
    assert [hex(value) for value in first[0, :3]] == [
        "0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f",
    ]  # fmt: skip
    assert first[1].tolist() == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431,
        16408922859458223821,
    ]  # fmt: skip


def test_numbers_are_uniform_and_neighbours_have_nothing_in_common() -> None:
    rows, views = np.repeat(np.arange(200), 50), np.tile(np.arange(-1, 49), 200)
    u = augmentation.uniforms(7, views, rows, 4)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    expected = u.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * np.sqrt(2 * 63), "chi squared, 63 degrees"
    grid = u[:, 0].reshape(200, 50)
    for one, other in ((grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(one.size)
    assert abs(np.corrcoef(u.T) - np.eye(4)).max() < 5 / np.sqrt(len(u)), "nor have the draws of one image"
    assert len(np.unique(u)) == u.size, "row 3 of view 5 is not row 5 of view 3"
    assert not np.isin(augmentation.uniforms(8, views, rows, 4), u).any(), "another seed, other numbers"


# ---- a picture depends on (seed, view, row) alone


@pytest.mark.parametrize("name", list(RECIPES))
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_a_picture_is_the_same_in_every_batch(name: str, data: st.DataObject) -> None:
    source = pictures(60, 20)
    count = data.draw(st.integers(1, 50))
    rows = data.draw(st.lists(st.integers(0, 59), min_size=count, max_size=count).map(np.array))
    views = data.draw(st.lists(st.integers(-1, 5), min_size=count, max_size=count).map(np.array))
    aspects = 0.5 + rows / 30
    make = Augment(name, data.draw(st.integers(0, 2**70)), SIZE)
    together = make(source[rows], rows, views, aspects)
    assert together.shape == (count, 3, SIZE, SIZE)
    assert together.dtype == torch.uint8
    one = data.draw(st.integers(0, count - 1))
    alone = make(
        source[rows[one : one + 1]], rows[one : one + 1], views[one : one + 1], aspects[one : one + 1]
    )
    assert torch.equal(alone[0], together[one])


@pytest.mark.parametrize("name", ["light", "standard", "strong", "deit"])
def test_no_way_of_computing_changes_a_byte(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, (rows, views) = pictures(48, 40), numbers(48)
    make = Augment(name, 7, SIZE)
    expected = make(source, rows, views)
    last = source.to(memory_format=torch.channels_last)
    assert torch.equal(make(last, rows, views), expected), "the layout"
    again = pickle.loads(pickle.dumps(make))
    assert torch.equal(again(source, rows, views), expected), "another process"
    monkeypatch.setattr(augmentation, "CHUNK_BYTES", 1)
    assert torch.equal(make(source, rows, views), expected), "the chunk"
    monkeypatch.setattr(augmentation, "CHUNK_BYTES", 1 << 30)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(make(source, rows, views), expected), "the threads"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["light", "flip", "standard", "strong", "deit"])
def test_another_seed_view_or_row_is_another_picture(name: str) -> None:
    source = pictures(1).expand(64, -1, -1, -1)
    rows, views = numbers(64)
    made = Augment(name, 7, SIZE)(source, rows, views)
    assert len({picture.numpy().tobytes() for picture in made}) == 64, "each row has its own"
    for other in (
        Augment(name, 8, SIZE)(source, rows, views),
        Augment(name, 7, SIZE)(source, rows, views + 1),
    ):
        assert not (made == other).all((1, 2, 3)).any()


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_plain_view_of_a_square_is_the_square(name: str) -> None:
    source, (rows, views) = pictures(8), numbers(8)
    views[::2] = NO_AUGMENT
    make = Augment(name, 7, SIZE)
    assert torch.equal(make(source, rows, views)[::2], source[::2])
    assert torch.equal(make(source, rows, np.full(8, NO_AUGMENT)), source)


def test_a_batch_of_none_is_no_error() -> None:
    empty = np.empty(0, dtype=np.int64)
    assert Augment("deit", 1, SIZE)(pictures(3)[:0], empty, empty).shape == (0, 3, SIZE, SIZE)


def test_what_decides_a_picture_is_in_the_key() -> None:
    keys = [
        Augment(name, seed, size).key(torch.device(device))
        for name, seed, size, device in (
            ("deit", 1, 24, "cpu"), ("strong", 1, 24, "cpu"), ("deit", 2, 24, "cpu"),
            ("deit", 1, 32, "cpu"), ("deit", 1, 24, "cuda"),
        )
    ]  # fmt: skip
    assert len({str(key) for key in keys}) == len(keys)
    mixed = Augment(augmentation.recipe_of("deit", mixup=0.1, repeats=1), 1, 24)
    assert mixed.key(CPU) == keys[0], "what is mixed afterwards leaves a view as it is"
    assert "0x" not in str(keys), "no address of this process"


# ---- the geometry


def geometry(pixels: Tensor, *moves: tuple[Op, float], size: int | None = None) -> Tensor:
    """One picture after operations, as a recipe would do them."""
    theta = np.eye(3)[None]
    for op, argument in moves:
        theta = theta @ augmentation._moves(np.array([op]), np.array([argument]))
    return through(pixels, theta, size)


def through(pixels: Tensor, theta: np.ndarray, size: int | None = None) -> Tensor:
    places = grid(torch.from_numpy(theta[:, :2]).float(), size or pixels.shape[-1])
    return sample(pixels[None], places)[0].round().to(torch.uint8)


def rim_off(difference: Tensor, rim: int = 1) -> Tensor:
    return difference[..., rim:-rim, rim:-rim]


@pytest.mark.parametrize(
    ("op", "argument", "affine"),
    [
        (Op.ROTATE, 20.0, {"angle": 20.0}),
        (Op.SHEAR_X, 0.2, {"shear": [np.rad2deg(np.arctan(0.2)), 0.0]}),
        (Op.TRANSLATE_X, 0.25, {"translate": [12, 0]}),
        (Op.TRANSLATE_Y, -0.125, {"translate": [0, -6]}),
    ],
)
def test_geometric_operations_are_those_of_torchvision(op: Op, argument: float, affine: dict) -> None:
    picture = pictures(1, 48)[0]
    given_all = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0], **affine}
    bilinear = reference.InterpolationMode.BILINEAR
    expected = reference.affine(picture, **given_all, interpolation=bilinear)
    inside = reference.affine(torch.full_like(picture, 255), **given_all, interpolation=bilinear) == 255
    away = (
        functional.max_pool2d((~inside).float(), 3, 1, 1) == 0
    )  # its zeros outside are blended in at the rim
    assert away.float().mean() > 0.5
    assert differs(geometry(picture, (op, argument)), expected)[away].max() <= 1


def test_shear_along_the_height_is_about_the_centre() -> None:
    picture = pictures(1, 48)[0]
    turned = geometry(picture.mT, (Op.SHEAR_X, 0.2)).mT
    assert differs(geometry(picture, (Op.SHEAR_Y, 0.2)), turned).max() <= 1


def test_operations_come_one_after_the_other() -> None:
    picture = pictures(1, 64)[0]
    both = geometry(picture, (Op.ROTATE, 30.0), (Op.TRANSLATE_X, 0.125))
    first = geometry(picture, (Op.ROTATE, 30.0))
    expected = first.roll(8, 2)
    assert differs(both, expected)[:, 16:48, 24:48].max() <= 2
    other = geometry(picture, (Op.TRANSLATE_X, 0.125), (Op.ROTATE, 30.0))
    assert differs(other, both)[:, 16:48, 24:48].max() > 20, "and in that order"


def test_a_crop_is_torchvisions_resized_crop() -> None:
    picture = pictures(1, 48)[0]
    top, left, height, width = 6, 10, 20, 30
    theta = augmentation._maps(
        np.array([width / 48]), np.array([height / 48]), np.array([(2 * left + width) / 48 - 1]),
        np.array([(2 * top + height) / 48 - 1]),
    )  # fmt: skip
    expected = reference.resized_crop(picture, top, left, height, width, [64, 64])
    assert rim_off(differs(through(picture, theta, 64), expected), 3).max() <= 1


def test_a_mirrored_picture_is_the_mirror_image() -> None:
    source = pictures(200)
    recipe = Recipe(flip=True)
    made = Augment(recipe, 3, SIZE)(source, *numbers(200))
    mirrored = (made == source.flip(3)).all((1, 2, 3))
    assert (mirrored | (made == source).all((1, 2, 3))).all()
    assert 70 < int(mirrored.sum()) < 130


@pytest.mark.parametrize(
    ("name", "fewest", "most"), [("light", 0, 0), ("flip", 16, 48), ("standard", 16, 48)]
)
def test_mirroring_only_where_it_is_asked_for(name: str, fewest: int, most: int) -> None:
    left = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    left[..., :5] = 200
    result = Augment(name, 1, 16)(left, *numbers(64)).float()
    mirrored = int((result[..., 10:].mean((1, 2, 3)) > result[..., :6].mean((1, 2, 3))).sum())
    assert fewest <= mirrored <= most, "a mirrored digit is no digit"


def test_beyond_the_picture_there_is_the_mean_colour() -> None:
    recipe = Recipe(
        policy=augmentation.Policy((Op.ROTATE,), 1, 1.0, 1.0, 0.0, ((Op.ROTATE, 0, 45, True),), "up")
    )
    made = Augment(recipe, 1, 32)(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), *numbers(4))
    assert made[:, :, 0, 0].tolist() == [[124, 116, 104]] * 4
    assert made[:, :, 16, 16].max() == 0


# ---- canvases


def photograph(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 400), (300, 300), (900, 300)])
def test_the_plain_view_of_a_canvas_is_the_central_square(width: int, height: int) -> None:
    image, side = photograph(width, height), augmentation.canvas_size(64)
    canvas = torch.from_numpy(images.canvas(image, side).transpose(2, 0, 1).copy())[None]
    made = Augment("standard", 1, 64)(
        canvas, np.array([3]), np.array([NO_AUGMENT]), np.array([width / height])
    )
    square = torch.from_numpy(images.central_square(image, 64).transpose(2, 0, 1).copy())
    assert differs(made[0], square).float().mean() < 2.5


@pytest.mark.parametrize(("width", "height"), [(400, 300), (300, 450)])
def test_crops_of_a_canvas_are_crops_of_the_photograph(width: int, height: int) -> None:
    recipe, size = Recipe(source="canvas", crop=(0.3, 1.0)), 64
    image = photograph(width, height)
    canvas = torch.from_numpy(images.canvas(image, augmentation.canvas_size(size)).transpose(2, 0, 1).copy())
    rows, views = numbers(20)
    aspects = np.full(20, width / height)
    made = Augment(recipe, 5, size)(canvas.expand(20, -1, -1, -1), rows, views, aspects)
    theta = augmentation.draw(recipe, 5, rows, views, aspects, size).theta
    for picture, ((wide, _, x), (_, high, y)) in zip(made, theta, strict=True):
        box = [width * (1 + x - wide) / 2, height * (1 + y - high) / 2]
        box += [box[0] + width * wide, box[1] + height * high]
        expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=tuple(box)))
        assert differs(picture, torch.from_numpy(expected.transpose(2, 0, 1).copy())).float().mean() < 2.5


def test_a_canvas_has_pixels_enough() -> None:
    for size in (56, 96, 128, 224):
        side = augmentation.canvas_size(size)
        assert side % 4 == 0
        assert 1.41 * size <= side <= 1.5 * size


# ---- what is drawn, and how often


@pytest.mark.parametrize("aspect", [1.0, 4 / 3, 0.8])
def test_crops_have_the_area_and_aspect_of_inceptions(aspect: float) -> None:
    drawn = draws("standard", aspect=aspect)
    width, height = drawn.theta[:, 0, 0], drawn.theta[:, 1, 1]
    area, shape = abs(width * height), abs(width / height) * aspect
    assert 0.7 <= area.min() < 0.71
    assert shape.min() >= 0.7499
    assert shape.max() <= 1.3334
    assert (abs(width) + abs(drawn.theta[:, 0, 2]) <= 1 + 1e-6).all(), "within the photograph"
    assert (height + abs(drawn.theta[:, 1, 2]) <= 1 + 1e-6).all()
    if aspect == 1.0:
        small = area < 0.75  # all of these fit, so none was drawn again
        assert abs(area[small].mean() - (0.7 + 0.75) / 2) < 0.001, "uniform in the area"
        assert abs(np.log(shape[small]).mean()) < 0.01
    assert abs(drawn.theta[:, 0, 2].mean()) < 0.01, "left as often as right"


def test_a_panorama_is_seen_from_end_to_end() -> None:
    drawn = draws("standard", 500, aspect=8.0)
    assert np.allclose(abs(drawn.theta[:, 0, 0]), 4 / 3 / 8), (
        "no crop of the area fits: 4 to 3 as large as can be"
    )
    assert np.allclose(drawn.theta[:, 1, 1], 1)
    assert np.allclose(drawn.theta[:, 1, 2], 0)
    edge = 1 - 4 / 3 / 8
    assert np.histogram(drawn.theta[:, 0, 2], 4, (-edge, edge))[0].min() > 90


def test_the_shares_are_those_of_the_recipes() -> None:
    for name, flipped, erased in (
        ("light", 0.0, 0.0),
        ("standard", 0.5, 0.0),
        ("strong", 0.5, 0.1),
        ("deit", 0.5, 0.25),
    ):
        drawn = draws(name)
        theta = drawn.theta[~drawn.moved]
        assert abs((theta[:, 0, 0] < 0).mean() - flipped) < 0.015
        assert abs(drawn.boxes.any(1).mean() - erased) < 0.012
    top, left, bottom, right = drawn.boxes[drawn.boxes.any(1)].T
    area = (bottom - top) * (right - left) / 224**2
    assert top.min() >= 0
    assert max(bottom.max(), right.max()) <= 224
    assert 0.019 < area.min() < 0.03
    assert 0.31 < area.max() < 0.336
    assert 0.27 < ((bottom - top) / (right - left)).min() < 0.35
    assert (area.max() + area.min()) / 2 == pytest.approx(area.mean(), abs=0.01), "uniform in the area"


def test_randaugment_draws_as_timms_rand_m9_mstd_inc1() -> None:
    drawn = draws("deit")
    shares = np.bincount(drawn.ops.ravel(), minlength=len(Op)) / drawn.ops.size
    assert shares[Op.IDENTITY] == pytest.approx(0.5, abs=0.01)
    assert shares[1:] == pytest.approx(0.5 / 15, abs=0.004)
    by_op = {op: drawn.arguments[drawn.ops == op] for op in Op}
    assert abs(by_op[Op.ROTATE]).mean() == pytest.approx(27, abs=0.2)
    assert abs(by_op[Op.ROTATE]).std() == pytest.approx(1.5, abs=0.2)
    assert abs(by_op[Op.ROTATE]).max() <= 30
    assert by_op[Op.ROTATE].mean() == pytest.approx(0, abs=3), "either way"
    factors = by_op[Op.CONTRAST]
    assert 0.1 - 1e-9 <= factors.min() < 0.3
    assert 1.7 < factors.max() <= 1.9
    assert (factors > 1).mean() == pytest.approx(0.5, abs=0.05)
    assert np.median(by_op[Op.POSTERIZE]) == 1
    assert np.median(by_op[Op.SOLARIZE]) == pytest.approx(256 * 0.1, abs=1)
    assert np.median(by_op[Op.SOLARIZE_ADD]) == pytest.approx(99, abs=1)


def test_trivial_augment_draws_as_torchvisions() -> None:
    drawn = draws("strong", 60_000)
    assert drawn.ops.shape[1] == 1
    ours = {op: set(np.round(abs(drawn.arguments[drawn.ops == op]), 4)) for op in Op}
    names = {
        "ShearX": Op.SHEAR_X, "Rotate": Op.ROTATE, "Posterize": Op.POSTERIZE, "Color": Op.COLOUR,
        "TranslateY": Op.TRANSLATE_Y, "Solarize": Op.SOLARIZE,
    }  # fmt: skip
    for name, op in names.items():
        values, signed = TrivialAugmentWide._AUGMENTATION_SPACE[name]
        theirs = values(31, 224, 224).double().numpy()
        if op == Op.COLOUR:
            theirs = np.concatenate([1 + theirs, 1 - theirs])
        theirs = theirs / 224 if op == Op.TRANSLATE_Y else theirs * 255 if op == Op.SOLARIZE else theirs
        assert np.allclose(sorted(ours[op]), sorted(set(np.round(theirs, 4))), atol=2e-4), name
        assert (drawn.arguments[drawn.ops == op] < 0).any() == (signed and op != Op.COLOUR)
    shares = np.bincount(drawn.ops.ravel(), minlength=len(Op)) / len(drawn.ops)
    there = [op for op in Op if op not in (Op.INVERT, Op.SOLARIZE_ADD)]
    assert len(there) == len(TrivialAugmentWide._AUGMENTATION_SPACE)
    assert shares[there] == pytest.approx(1 / 14, abs=0.005)


def test_light_is_what_it_was() -> None:
    drawn = draws("light")
    zoom = 1 / drawn.theta[:, 0, 0]
    assert (round(zoom.min(), 2), round(zoom.max(), 2)) == (0.9, 1.1)
    assert np.allclose(drawn.theta[:, 0, 0], drawn.theta[:, 1, 1]), "the aspect stays"
    assert abs(drawn.theta[:, :, 2]).max() == pytest.approx(0.16, abs=0.001), "8 % of the width, 2 in all"
    assert (round(float(drawn.colour[:, 0].min()), 2), round(float(drawn.colour[:, 0].max()), 2)) == (
        0.8,
        1.2,
    )
    added = drawn.colour[:, 3] - 128 * (1 - drawn.colour[:, 0])
    assert abs(added).max() == pytest.approx(25.6, abs=0.1)


def test_an_erased_box_is_noise_about_the_mean_and_nothing_else_changes() -> None:
    source = torch.full((400, 3, 64, 64), 7, dtype=torch.uint8)
    recipe = Recipe(erase=1.0)
    rows, views = numbers(400)
    made = Augment(recipe, 1, 64)(source, rows, views)
    boxes = augmentation.draw(recipe, 1, rows, views, np.ones(400), 64).boxes
    assert (boxes.any(1)).mean() > 0.98
    inside = torch.zeros(400, 1, 64, 64, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(inside, boxes.tolist(), strict=True):
        mask[:, top:bottom, left:right] = True
    assert (made == 7)[~inside.expand(-1, 3, -1, -1)].all()
    noise = made.float().movedim(1, 3)[inside[:, 0]]
    assert noise.mean(0).tolist() == pytest.approx([124, 116, 104], abs=3)
    assert noise.std(0).tolist() == pytest.approx([57, 56, 55], abs=4)


def test_a_recipe_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"train\.augment: 'heavy' is none of none, light, flip, standard"):
        Augment("heavy", 1, SIZE)


def test_values_of_ones_own_take_the_place_of_a_recipes() -> None:
    recipe = augmentation.recipe_of("deit", mixup=0.0, cutmix=None, label_smoothing=0.2, repeats=1)
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing, recipe.repeats) == (0.0, 1.0, 0.2, 1)
    assert recipe.crop == RECIPES["deit"].crop


# ---- mixing


def test_a_mixed_box_and_its_share_by_hand() -> None:
    pixels = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 8, 8) * 10
    mix = augmentation.cut_mix(1, (2, 0, 6, 4), 8)
    assert mix.share == 1 - 16 / 64
    mixed = mix.pixels(pixels)
    assert mixed[0, 0].tolist() == [[10 if 2 <= y < 6 and x < 4 else 0 for x in range(8)] for y in range(8)]
    assert mixed[2, 0, 2, 0] == 0, "the last one's partner is the first"
    assert (pixels[0] == 0).all(), "the images themselves stay"
    labels = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    assert mix.targets(labels).tolist() == [[0.75, 0.25, 0], [0, 0.75, 0.25], [0.25, 0, 0.75]]


def test_blended_images_by_hand() -> None:
    pixels = torch.tensor([0, 100, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    mix = Mix(2, 0.75)
    assert mix.pixels(pixels)[:, 0, 0, 0].tolist() == [64, 75, 216]  # 63.75, 75, 216.25
    exact = mix.pixels(pixels.float() / 255)[:, 0, 0, 0]
    assert exact.tolist() == pytest.approx([0.25, 75 / 255, (0.75 * 255 + 25) / 255])


@given(share=st.floats(0, 1), shift=st.integers(1, 7))
def test_two_hard_labels_cost_what_the_mixed_soft_label_does(share: float, shift: int) -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    mix = Mix(shift, share)
    soft = mix.targets(functional.one_hot(labels, 5).float())
    expected = functional.cross_entropy(logits, soft)
    assert float(mix.loss(functional.cross_entropy, logits, labels)) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_mixing_depends_on_the_step_and_the_worker_and_has_betas_distribution() -> None:
    recipe = RECIPES["deit"]
    made = [augmentation.mix(recipe, 1, 0, step, 0, 16, 64) for step in range(4000)]
    assert augmentation.mix(recipe, 1, 0, 5, 0, 16, 64) == made[5]
    others = [(1, 0, 5, 1), (1, 1, 5, 0), (2, 0, 5, 0)]
    assert all(augmentation.mix(recipe, *key, 16, 64) != made[5] for key in others)
    blends = np.array([mix.share for mix in made if mix is not None and mix.box is None])
    boxes = [mix for mix in made if mix is not None and mix.box is not None]
    assert len(blends) == pytest.approx(2000, abs=150), "each half the time"
    assert blends.mean() == pytest.approx(0.5, abs=0.03)
    assert blends.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01), "of Beta(0.8, 0.8)"
    for mix in boxes:
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= 64
        assert 0 <= left <= right <= 64
        assert mix.share == 1 - (bottom - top) * (right - left) / 64**2
    assert {mix.shift for mix in boxes} == set(range(1, 16)), "never with itself"


def test_recipes_that_do_not_mix_and_batches_of_one() -> None:
    assert augmentation.mix(RECIPES["standard"], 1, 0, 0, 0, 16, 64) is None
    assert augmentation.mix(RECIPES["deit"], 1, 0, 0, 0, 1, 64) is None
    only = [augmentation.mix(Recipe(mixup=1.0), 1, 0, step, 0, 4, 64) for step in range(20)]
    assert all(mix is not None and mix.box is None for mix in only)
    only = [augmentation.mix(Recipe(cutmix=1.0), 1, 0, step, 0, 4, 64) for step in range(20)]
    assert all(mix is not None and mix.box is not None for mix in only)

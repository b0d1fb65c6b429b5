"""Images as training sees them: decoded once, augmented reproducibly, every row exactly once in metrics."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from components.common.errors import RetortError
from components.dataset import images
from components.dataset.images import ImageError
from components.training import loader

SIZE = 32


def test_decoding_once_gives_the_same_pixels_as_the_shared_preprocessing(data: SimpleNamespace) -> None:
    decoded = loader.decode_all(data.manifest, data.root, SIZE)
    assert decoded is not None
    array = np.load(decoded, mmap_mode="r")
    assert array.dtype == np.uint8
    for row in (0, 5, len(array) - 1):
        assert np.array_equal(array[row], images.load_rgb(data.root, data.paths[row], SIZE))
    assert loader.decode_all(data.manifest, data.root, SIZE) == decoded, "found again"
    assert loader.decode_all(data.manifest, data.root, SIZE * 2) != decoded, "another size is another file"


def test_a_damaged_cache_of_pixels_is_made_again(
    data: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    decoded = loader.decode_all(data.manifest, data.root, SIZE)
    assert decoded is not None
    whole = decoded.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-5000] + bytes(5000), b""):
        decoded.write_bytes(damaged)
        assert loader.decode_all(data.manifest, data.root, SIZE) == decoded
        assert decoded.read_bytes() == whole
        said = capsys.readouterr().err
        assert decoded.name in said
        assert "decoded again" in said
    decoded.with_suffix(".json").unlink()
    loader.decode_all(data.manifest, data.root, SIZE)
    assert "No such file" in capsys.readouterr().err, "what nothing vouches for is not used"
    loader.decode_all(data.manifest, data.root, SIZE)
    assert capsys.readouterr().err == "", "and a whole one is"


def test_pixels_of_another_decoder_are_not_used(
    data: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = loader.decode_all(data.manifest, data.root, SIZE)
    monkeypatch.setattr(images, "VERSION", images.VERSION + 1)
    assert loader.decode_all(data.manifest, data.root, SIZE) != decoded


def test_a_missing_image_leaves_no_half_written_cache(data: SimpleNamespace) -> None:
    (Path(data.root) / data.paths[3]).unlink()
    with pytest.raises(RetortError, match=data.paths[3]):
        loader.decode_all(data.manifest, data.root, SIZE)
    assert not list(Path(".retort/cache/decoded").iterdir())


def replace_images(data: SimpleNamespace, *rows: int) -> None:
    for row in rows:
        path = Path(data.root) / data.paths[row]
        content = path.read_bytes()
        path.write_bytes((Path(data.root) / data.paths[row + 10]).read_bytes())
        assert path.read_bytes() != content


def test_images_that_were_replaced_are_named_when_they_are_decoded(data: SimpleNamespace) -> None:
    decoded = loader.decode_all(data.manifest, data.root, SIZE)
    assert decoded is not None
    replace_images(data, 4, 9)
    assert loader.decode_all(data.manifest, data.root, SIZE) == decoded, "pixels of the right ones are there"
    decoded.unlink()
    with pytest.raises(ImageError, match=rf"image\.changed: {data.paths[4]} .*; {data.paths[9]} ") as told:
        loader.decode_all(data.manifest, data.root, SIZE)
    assert told.value.rule == "image.changed"


@pytest.mark.parametrize("processes", [0, 1])
def test_replaced_images_are_named_where_pixels_are_not_cached(data: SimpleNamespace, processes: int) -> None:
    replace_images(data, 4)
    views = loader.Views(loader.open_samples(data.manifest, data.root, SIZE), "light", 7)
    batches = [loader.pairs(np.array(rows), 0) for rows in ([1, 2], [3, 4])]
    made = loader.load(views, batches, processes)
    assert next(made).shape == (2, 3, SIZE, SIZE)
    with pytest.raises(ImageError, match=rf"image\.changed: {data.paths[4]} ") as told:
        next(made)
    assert told.value.rule == "image.changed"


def test_a_folder_that_is_gone_is_named_in_place_of_its_images(data: SimpleNamespace) -> None:
    Path(data.root).rename("elsewhere")
    with pytest.raises(RetortError, match=r"^\S+: no such folder; check data\.root, and run 'retort ingest'"):
        loader.decode_all(data.manifest, data.root, SIZE)


def test_too_large_for_the_cache_means_decoding_in_the_loader(data: SimpleNamespace) -> None:
    assert loader.decode_all(data.manifest, data.root, SIZE, limit=1000) is None
    decoded = loader.decode_all(data.manifest, data.root, SIZE)
    items = loader.pairs(np.array([4, 1, 9]), 2)
    views = [
        loader.Views(loader.open_samples(data.manifest, data.root, SIZE, cache), "light", 7)
        for cache in (decoded, None)
    ]
    assert torch.equal(views[0].__getitems__(items), views[1].__getitems__(items))


@pytest.mark.parametrize("kind", ["light", "flip", "deit"])
def test_augmentation_depends_on_seed_view_and_row_alone(data: SimpleNamespace, kind: str) -> None:
    decoded = loader.decode_all(data.manifest, data.root, SIZE)
    samples = loader.open_samples(data.manifest, data.root, SIZE, decoded)
    views = loader.Views(samples, kind, 7)
    alone = views.__getitems__([(4, 1)])[0]
    in_company = views.__getitems__([(2, 1), (4, 1), (4, 2)])
    assert torch.equal(alone, in_company[1])
    assert not torch.equal(in_company[1], in_company[2]), "another epoch, another view"
    assert not torch.equal(alone, loader.Views(samples, kind, 8).__getitems__([(4, 1)])[0])
    assert alone.dtype == torch.uint8
    assert alone.shape == (3, SIZE, SIZE)


def test_the_plain_view_is_the_image_itself(data: SimpleNamespace) -> None:
    samples = loader.open_samples(data.manifest, data.root, SIZE)
    plain = loader.Views(samples, "deit", 7).__getitems__([(4, loader.PLAIN), (4, 0)])[0]
    expected = images.load_rgb(data.root, data.paths[4], SIZE).transpose(2, 0, 1)
    assert np.array_equal(plain.numpy(), expected)


def test_mirroring_only_where_it_is_asked_for() -> None:
    left = torch.zeros(64, 3, 16, 16, dtype=torch.uint8)
    left[..., :6] = 200
    rows, views = np.arange(64), np.zeros(64, dtype=np.int64)

    def mirrored(kind: str) -> int:
        result = loader.augment(left, rows, views, kind, 1).float()
        return int((result[..., 8:].mean((1, 2, 3)) > result[..., :8].mean((1, 2, 3))).sum())

    assert mirrored("light") == 0, "a mirrored digit is no digit"
    assert 16 < mirrored("flip") < 48


def test_loader_processes_give_the_same_batches_as_none(data: SimpleNamespace) -> None:
    samples = loader.open_samples(data.manifest, data.root, SIZE)
    views = loader.Views(samples, "light", 7)
    batches = [loader.pairs(np.arange(start, start + 5), 3) for start in (0, 5, 10)]
    here = list(loader.load(views, batches, 0))
    there = list(loader.load(views, batches, 2))
    assert len(here) == len(there) == 3
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_each_network_gets_its_own_normalisation() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2).expand(1, 3, 1, 2)
    half = loader.Normalise([0.5] * 3, [0.5] * 3, torch.device("cpu"))(pixels)
    assert half[0, 0, 0].tolist() == pytest.approx([-1, 1])
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    other = loader.Normalise(mean, std, torch.device("cpu"))(pixels)
    assert other[0, :, 0, 1].tolist() == pytest.approx([(1 - m) / s for m, s in zip(mean, std, strict=True)])


def test_shared_memory_that_loader_processes_need() -> None:
    # 2 workers x 4 processes x 4 batches (2 ready, one in work, one in use), each of 64 images
    assert loader.shm_needed(224, 64, 4, 2) == 2 * 4 * 4 * 64 * 3 * 224 * 224
    assert loader.shm_needed(224, 64, 0, 2) == 0
    assert (loader.shm_size("/") or 0) > 0
    assert loader.shm_size("/no/such/folder") is None

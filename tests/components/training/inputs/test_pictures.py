"""Pictures of rows: those of the shared preprocessing, decoded once or when asked for; and bad input."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from components.common.errors import ImageError, RetortError
from components.dataset import images
from components.training import augmentation
from components.training.inputs import pictures
from components.training.inputs.index import open_index
from components.training.inputs.pictures import Part, Store, open_store

SIZE = 32


@pytest.fixture
def stored(data: SimpleNamespace) -> Store:
    return open_store(open_index(data.manifest), data.root, SIZE)


def opened(
    data: SimpleNamespace, size: int = SIZE, limit: int | None = None, source: str = "square"
) -> Store:
    return open_store(open_index(data.manifest), data.root, size, source, limit=limit)  # type: ignore[arg-type]


def decoded_files(store: Store) -> list[Path]:
    files = [part.decoded for part in (store.learn, store.judge)]
    assert None not in files
    return [file for file in files if file is not None]


@pytest.mark.parametrize("limit", [None, 0])
def test_pictures_are_those_of_the_shared_preprocessing(data: SimpleNamespace, limit: int | None) -> None:
    store = opened(data, limit=limit)
    for split in ("train", "val", "test", "unlabeled"):
        part, rows = store.part(split), store.index.rows(split).astype(np.int64)[[3, 0, 5]]
        with ThreadPoolExecutor(2) as pool:
            for found, aspects in (part.take(rows), part.take(rows, pool)):
                assert found.dtype == np.uint8
                assert aspects is None, "squares need none"
                for picture, row in zip(found, rows, strict=True):
                    expected = images.load_rgb(data.root, data.paths[row], SIZE)
                    assert np.array_equal(picture, expected)
    assert (store.learn.decoded is None) == (limit == 0)
    assert len(store.said) == (2 if limit == 0 else 0), "why nothing is decoded is said of each part"


def test_canvases_show_all_of_an_image_and_keep_its_shape(data: SimpleNamespace) -> None:
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3)).astype(np.uint8))
    path = Path(data.root) / data.paths[0]
    side = augmentation.canvas_size(SIZE)
    for limit in (None, 0):
        unpin(data)
        wide.save(path)
        store = opened(data, limit=limit, source="canvas")
        made, aspects = store.learn.take(np.array([1, 0]))
        assert made.shape == (2, side, side, 3)
        assert aspects is not None
        assert aspects.tolist() == [1.0, 2.0]
        assert np.array_equal(made[1], np.asarray(wide.resize((side, side), Image.Resampling.BICUBIC)))
    val = store.index.rows("val").astype(np.int64)[:2]
    assert store.judge.take(val)[0].shape == (2, SIZE, SIZE, 3), "what is judged is always the square"


def unpin(data: SimpleNamespace) -> None:
    """Take the hashes out of the manifest: images may be exchanged."""
    import pyarrow as pa

    from components.dataset import manifest

    table = manifest.read(data.manifest)
    place = table.schema.get_field_index("sha256")
    field = manifest.SCHEMA.field("sha256")
    manifest.write(table.set_column(place, field, pa.nulls(table.num_rows, pa.string())), data.manifest)


def test_decoded_pictures_are_found_again(data: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    first = decoded_files(opened(data))
    assert decoded_files(opened(data)) == first
    assert not set(decoded_files(opened(data, SIZE * 2))) & set(first), "another size is another file"
    canvas = decoded_files(opened(data, source="canvas"))
    assert canvas[0] != first[0]
    assert canvas[1] == first[1], "what is judged is the same for all recipes"
    monkeypatch.setattr(images, "VERSION", images.VERSION + 1)
    assert not set(decoded_files(opened(data))) & set(first), "of another decoder"


def test_images_without_a_hash_are_known_by_their_size_and_time(data: SimpleNamespace) -> None:
    unpin(data)
    first = decoded_files(opened(data))
    exchange(data, 4)
    second = decoded_files(opened(data))
    assert first[0] != second[0]
    assert first[1] == second[1], "none of val and test was touched"


def test_images_out_of_shards_need_no_files(data: SimpleNamespace) -> None:
    unpin(data)
    index = open_index(data.manifest)
    held = [(Path(data.root) / path).read_bytes() for path in data.paths]
    Path(data.root).rename("elsewhere")
    store = open_store(index, data.root, SIZE, contents=held.__getitem__)
    expected = images.central_square(images.decode(held[0]), SIZE)
    assert np.array_equal(store.learn.take(np.array([0]))[0][0], expected)


def test_only_the_splits_asked_for_are_decoded(data: SimpleNamespace) -> None:
    store = open_store(open_index(data.manifest), data.root, SIZE, splits=["val"])
    assert store.learn.decoded is None
    assert store.judge.decoded is not None


def test_processes_decode_the_same_as_threads(data: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "CHUNK", 16)
    store = opened(data, source="canvas")
    assert store.learn.decoded is not None
    by_threads, rows = store.learn.decoded.read_bytes(), store.learn.rows.astype(np.int64)
    aspects = store.learn.take(rows)[1]
    store.learn.decoded.unlink()
    signs: list[tuple[int, int]] = []
    file = pictures.decode(
        store.learn, None, pytest.fail, processes=2, alive=lambda done, of: signs.append((done, of))
    )
    assert file == store.learn.decoded
    assert [done for done, _ in signs] == [*range(16, len(rows), 16), len(rows)], "a sign of life each chunk"
    assert {of for _, of in signs} == {len(rows)}
    assert file.read_bytes() == by_threads
    again = opened(data, source="canvas").learn.take(rows)[1]
    assert np.array_equal(again, aspects)


@pytest.mark.parametrize("processes", [0, 2])
def test_exchanged_images_are_named_when_they_are_decoded(data: SimpleNamespace, processes: int) -> None:
    whole = opened(data)
    exchange(data, 4, 3)
    again = opened(data)
    assert again.learn.decoded == whole.learn.decoded, "pixels of the right ones are there"
    decoded_files(whole)[0].unlink()
    named = rf"image\.changed: {data.paths[3]} .*; {data.paths[4]} "
    with pytest.raises(ImageError, match=named) as told:
        pictures.decode(whole.learn, None, pytest.fail, processes=processes)
    assert told.value.rule == "image.changed"
    assert not list(Path(".retort/cache/decoded").glob("*partial*")), "nothing half-written is left"


def exchange(data: SimpleNamespace, *rows: int) -> None:
    for row in rows:
        path = Path(data.root) / data.paths[row]
        path.write_bytes((Path(data.root) / data.paths[row + 10]).read_bytes())


@pytest.mark.parametrize("processes", [0, 2])
def test_a_missing_image_is_named_and_leaves_nothing_behind(data: SimpleNamespace, processes: int) -> None:
    part = opened(data, limit=0).learn
    (Path(data.root) / data.paths[3]).unlink()
    with pytest.raises(RetortError, match=rf"^{data.paths[3]}: .*run 'retort validate' again"):
        pictures.decode(part, None, pytest.fail, processes=processes)
    assert not list(Path(".retort/cache/decoded").glob("*.npy*"))
    with pytest.raises(RetortError, match=data.paths[3]):
        part.take(np.array([2, 3]))


def test_a_folder_that_is_gone_is_named_in_place_of_its_images(data: SimpleNamespace) -> None:
    Path(data.root).rename("elsewhere")
    with pytest.raises(RetortError, match=r"^\S+: no such folder; check data\.root, and run 'retort ingest'"):
        opened(data)


def test_a_damaged_file_of_pictures_is_made_again(
    data: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    decoded = decoded_files(opened(data))[0]
    whole = decoded.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-5000] + bytes(5000), b""):
        decoded.write_bytes(damaged)
        assert decoded_files(opened(data))[0] == decoded
        assert decoded.read_bytes() == whole
        assert "decoded again" in capsys.readouterr().err
    decoded.with_suffix(".json").unlink()
    opened(data)
    assert "No such file" in capsys.readouterr().err, "what nothing vouches for is not used"
    opened(data)
    assert capsys.readouterr().err == "", "and a whole one is"


def test_a_part_of_pictures_is_handed_to_processes_whole(stored: Store) -> None:
    part: Part = pickle.loads(pickle.dumps(stored.learn))
    rows = stored.learn.rows[:4].astype(np.int64)
    assert np.array_equal(part.take(rows)[0], stored.learn.take(rows)[0])


def test_rows_of_another_part_are_refused(stored: Store) -> None:
    with pytest.raises(AssertionError, match="another part"):
        stored.learn.take(stored.judge.rows[:1].astype(np.int64))

"""``retort features``: what a backbone sees in images, as Parquet; or the backbone itself, as ONNX."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.common.errors import ConfigError, RetortError
from components.common.progress import task
from components.common.sheet import write_csv
from components.common.storage import atomic_path, human_bytes, need_disk, remove
from components.models import checkpoint, features
from components.models.card import ModelCard
from components.tools.backbone import KINDS, Backbone

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

    # path, and pixels uint8 [size, size, 3]; or the reason why there are none
    Image = tuple[str, NDArray[np.uint8] | str]

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
FORMATS = ("parquet", "onnx")
BATCH = 32
GROUP_BYTES, GROUP_ROWS = 32 << 20, 8192  # of a row group; whichever is reached first
NAMED = 10  # unreadable images that are named on the terminal


@dataclass
class Extracted:
    """What was written. ``unreadable``: (path, reason) of images that have no features."""

    file: Path
    shapes: dict[str, tuple[int, ...]]
    rows: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)


def extract(
    model: Path,
    images: Callable[[int], Iterable[Image]],
    count: int,
    *,
    out: Path,
    kind: str = "pooled",
    form: str = "parquet",
) -> Extracted:
    """Write ``<kind>.parquet``, one row an image, or ``<kind>.onnx`` into ``out``.

    In Parquet a tensor is a list of fixed length, its elements in C order; the field's metadata holds its
    ``shape``. Images that cannot be read are named, counted, and listed in ``<kind>.unreadable.csv``; the
    rest goes on. The same images and model give the same bytes.

    Args:
        model: folder of a trained network.
        images: gives, for a size in pixels, each image's path, and its pixels or why there are none.
        count: how many ``images`` will give.
        kind: what of the backbone; see ``components.tools.backbone.Backbone``.
        form: parquet; or onnx: from pixels to these features, proved equal to torch on the first images,
            or on random ones where there are none.

    Raises:
        ConfigError: when ``kind`` or ``form`` is unknown, or there are no images.
        RetortError: when the model cannot be loaded, has no such features, or no image can be read.
    """
    for option, value, known in (("--from", kind, KINDS), ("--format", form, FORMATS)):
        if value not in known:
            raise ConfigError(f"{option} {value}: expected one of {', '.join(known)}")
    if form == "parquet" and not count:
        raise ConfigError("IMAGES: name files, folders or a manifest.parquet to take features of")
    network, card = checkpoint.load(model)
    size = card.input_size[-1]
    backbone = Backbone(network, kind, size)
    result = Extracted(out / f"{kind}.{form}", backbone.shapes)
    about = {
        "schema_version": str(SCHEMA_VERSION),
        "arch": card.arch.name,
        "sha256": card.sha256,
        "from": kind,
        "shapes": json.dumps(backbone.shapes),
    }
    readable = _readable(images(size), result.unreadable)
    if form == "onnx":
        _write_onnx(result, backbone, card, readable, about)
    else:
        _write_parquet(result, backbone, card, readable, count, about)
    _list_unreadable(result, count)
    return result


def _readable(
    images: Iterable[Image], unreadable: list[tuple[str, str]]
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    for path, pixels in images:
        if not isinstance(pixels, str):
            yield path, pixels
            continue
        unreadable.append((path, pixels))
        if len(unreadable) <= NAMED:
            log.warning(f"{path}: {pixels}")


def _write_onnx(
    result: Extracted,
    backbone: Backbone,
    card: ModelCard,
    images: Iterator[tuple[str, NDArray[np.uint8]]],
    about: dict[str, str],
) -> None:
    pixels = [each for _, each in itertools.islice(images, BATCH)]
    result.rows = len(pixels)
    with atomic_path(result.file) as partial:
        features.write_onnx(
            backbone, card.input_size[-1], card.mean, card.std, partial,
            outputs=list(backbone.shapes), metadata=about, pixels=np.stack(pixels) if pixels else None,
        )  # fmt: skip


def _write_parquet(
    result: Extracted,
    backbone: Backbone,
    card: ModelCard,
    images: Iterator[tuple[str, NDArray[np.uint8]]],
    count: int,
    about: dict[str, str],
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = sum(int(np.prod(shape)) for shape in backbone.shapes.values())
    need_disk(result.file.parent, 4 * width * count, f"{count:,} rows of {human_bytes(4 * width)}")
    fields = [
        pa.field(
            name, pa.list_(pa.float32(), int(np.prod(shape))), metadata={"shape": json.dumps(list(shape))}
        )
        for name, shape in backbone.shapes.items()
    ]
    schema = pa.schema([pa.field("path", pa.string()), *fields], metadata=about)
    rows = min(GROUP_ROWS, max(BATCH, GROUP_BYTES // (4 * width)))
    with (
        atomic_path(result.file) as partial,
        pq.ParquetWriter(partial, schema, compression="zstd", use_dictionary=["path"]) as writer,
        task("features", count) as shown,
    ):
        group: list[pa.Table] = []
        while batch := list(itertools.islice(images, BATCH)):
            group.append(_table(backbone, card, batch, schema))
            result.rows += len(batch)
            shown.update(result.rows + len(result.unreadable))
            if sum(len(table) for table in group) + BATCH > rows:
                _flush(writer, group)
        _flush(writer, group)
        if not result.rows:
            path, reason = result.unreadable[0]
            raise RetortError(f"none of {count:,} images can be read; the first is {path}: {reason}")


def _flush(writer: Any, group: list[pa.Table]) -> None:
    """Write what was collected as one row group."""
    import pyarrow as pa

    if group:
        whole = pa.concat_tables(group)
        writer.write_table(whole, row_group_size=len(whole))
        group.clear()


def _table(
    backbone: Backbone, card: ModelCard, batch: Sequence[tuple[str, NDArray[np.uint8]]], schema: pa.Schema
) -> pa.Table:
    import pyarrow as pa
    import torch

    pixels = torch.from_numpy(np.stack([each for _, each in batch]))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (card.mean, card.std))
    with torch.inference_mode():
        found = backbone((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    columns = [pa.array([path for path, _ in batch], pa.string())]
    for tensor in found:
        flat = tensor.reshape(len(batch), -1).contiguous().numpy()
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1]))
    return pa.Table.from_arrays(columns, schema=schema)


def _list_unreadable(result: Extracted, count: int) -> None:
    path = result.file.with_name(f"{result.file.stem}.unreadable.csv")
    if not result.unreadable:
        remove(path)  # an earlier run's
        return
    write_csv(path, [("path", "reason"), *result.unreadable])
    log.warning(f"{len(result.unreadable)} of {count:,} images cannot be read; {path} lists them")

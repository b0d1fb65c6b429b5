"""``retort predict``: run an exported model on files, folders or the rows of a manifest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.common.errors import RetortError
from components.common.progress import track
from components.common.sheet import write_csv
from components.common.storage import atomic_path
from components.dataset import named
from components.dataset.images import central_square
from components.export import exported
from components.tools.unfit import why_no_model

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

BATCH = 32
COLUMNS = ("path", "class", "score", "error")


@dataclass(frozen=True)
class Prediction:
    """``score`` is the class's softmax, 0..1. An image that cannot be read has an ``error`` and no class."""

    path: str
    class_name: str | None
    score: float | None
    error: str = ""


def predict(
    model: Path,
    images: Sequence[Path],
    *,
    out: Path,
    root: str = "",
    threads: int = 0,
) -> list[Prediction]:
    """Classify images; write ``predictions.parquet`` and ``predictions.csv`` into ``out``.

    Args:
        model: an exported ``model.onnx`` (or the folder it lies in).
        images: files, folders that are searched for images, and manifests.
        root: the folder that a manifest's paths are relative to.
        threads: of ONNX Runtime; 0: one for each processor that is ours.

    Files that cannot be read are named, counted, and listed with their reason; the rest goes on.

    Raises:
        RetortError: see ``open_classifier``; when no image is found.
    """
    session, about = open_classifier(model, threads)
    found = named.find(images, root)
    decoded = found.decoded()
    predictions: list[Prediction] = []
    for _ in track(range(0, found.count, BATCH), "predicting", -(-found.count // BATCH)):
        predictions += _classify(session, about, list(islice(decoded, BATCH)))
    bad = [prediction for prediction in predictions if prediction.error]
    for prediction in bad[:10]:
        log.warning(f"{prediction.path}: {prediction.error}")
    if bad:
        log.warning(
            f"{len(bad)} of {len(predictions)} files cannot be read; {out / 'predictions.csv'} lists them"
        )
    _write(predictions, out)
    return predictions


def open_classifier(model: Path, threads: int = 0) -> tuple[Any, exported.Exported]:
    """ONNX Runtime's session for an exported model, and what the model says of itself.

    Args:
        model: an exported ``model.onnx`` (or the folder it lies in).
        threads: of ONNX Runtime; 0: one for each processor that is ours.

    Raises:
        RetortError: when the model is missing, has no classes (a backbone), or is damaged.
    """
    file = model / "model.onnx" if model.is_dir() else model
    if model.exists() and (file.suffix != ".onnx" or not file.exists()):
        unfit = why_no_model(model)
        if unfit is not None:
            raise RetortError(f"{model}: {unfit}")
    model = file
    session = exported.session(model, threads)
    outputs = session.get_outputs()
    if [output.name for output in outputs] != [exported.OUTPUT]:
        names = ", ".join(output.name for output in outputs)
        raise RetortError(
            f"{model}: gives {names}, no scores of classes: a backbone without a head cannot predict; "
            "finetune it ('retort finetune'), export that, and predict with the result"
        )
    about = exported.describe(session, model)
    count = outputs[0].shape[-1]
    if isinstance(count, int) and count != len(about.class_names):
        raise RetortError(
            f"{model}: gives {count} scores, its metadata names {len(about.class_names)} classes: changed "
            "since it was exported; run 'retort export' again"
        )
    exported.need_numbers(model)
    return session, about


def _classify(
    session: Any, about: exported.Exported, images: Sequence[tuple[str, Image | str]]
) -> list[Prediction]:
    """One batch; with preprocessing in the graph image by image, since their sizes differ."""
    results = {
        place: Prediction(name, None, None, said)
        for place, (name, said) in enumerate(images)
        if isinstance(said, str)
    }
    pixels = {
        place: np.asarray(image) if about.in_graph else central_square(image, about.size)
        for place, (_, image) in enumerate(images)
        if not isinstance(image, str)
    }
    groups = [[place] for place in pixels] if about.in_graph else [list(pixels)] if pixels else []
    for group in groups:
        scores = exported.run(session, about.feed(np.stack([pixels[place] for place in group])))
        if not np.isfinite(scores).all():
            raise RetortError(
                f"{about.path}: its scores are not finite numbers, so the model is damaged: run 'retort "
                "export' again"
            )
        for place, row in zip(group, scores, strict=True):
            best = int(row.argmax())
            results[place] = Prediction(images[place][0], about.class_names[best], float(row[best]))
    return [results[place] for place in range(len(images))]


def _write(predictions: Sequence[Prediction], out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(item.path, item.class_name, item.score, item.error) for item in predictions]
    kinds = (pa.string(), pa.string(), pa.float32(), pa.string())
    arrays = [pa.array([row[index] for row in rows], kind) for index, kind in enumerate(kinds)]
    with atomic_path(out / "predictions.parquet") as partial:
        pq.write_table(pa.table(dict(zip(COLUMNS, arrays, strict=True))), partial)
    lines = [
        (item.path, item.class_name or "", "" if item.score is None else f"{item.score:.6f}", item.error)
        for item in predictions
    ]
    write_csv(out / "predictions.csv", [COLUMNS, *lines])

"""``retort predict``: run an exported model on files or folders."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from components.common.errors import RetortError
from components.common.progress import say, track
from components.common.storage import atomic_path
from components.dataset import images as reader
from components.dataset.images import EXTENSIONS, ImageError
from components.export import exported

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
    model: Path, images: Sequence[Path], *, out: Path = Path("outputs/predict"), threads: int = 0
) -> list[Prediction]:
    """Classify images; write ``predictions.parquet`` and ``predictions.csv`` into ``out``.

    Args:
        model: an exported ``model.onnx`` (or the folder it lies in).
        images: files, and folders that are searched for images.
        threads: of ONNX Runtime; 0: as many as it thinks right.

    Files that cannot be read are named, counted, and listed with their reason; the rest goes on.

    Raises:
        RetortError: when the model is missing or has no classes (a backbone), or no image is found.
    """
    if model.is_dir():
        model = model / exported.FILES["fp32"]
    session = exported.session(model, threads)
    outputs = session.get_outputs()
    if [output.name for output in outputs] != [exported.OUTPUT]:
        names = ", ".join(output.name for output in outputs)
        raise RetortError(
            f"{model}: gives {names}, no scores of classes: a backbone without a head cannot predict; "
            "finetune it ('retort finetune'), export that, and predict with the result"
        )
    about = exported.describe(session, model)
    paths = _find(images)
    predictions: list[Prediction] = []
    for start in track(range(0, len(paths), BATCH), "predicting", -(-len(paths) // BATCH)):
        predictions += _classify(session, about, paths[start : start + BATCH])
    bad = [prediction for prediction in predictions if prediction.error]
    for prediction in bad[:10]:
        say(f"{prediction.path}: {prediction.error}")
    if bad:
        say(f"{len(bad)} of {len(predictions)} files cannot be read; {out / 'predictions.csv'} lists them")
    _write(predictions, out)
    return predictions


def _find(images: Sequence[Path]) -> list[Path]:
    """The files given, and the images in the folders given, sorted within each."""
    found: list[Path] = []
    for path in images:
        if path.is_dir():
            inside = [
                file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file()
            ]
            found += sorted(inside)
        elif path.exists():
            found.append(path)
        else:
            raise RetortError(f"{path}: no such file or folder")
    if not found:
        named = ", ".join(str(path) for path in images) or "nothing"
        raise RetortError(f"{named}: no image in there ({', '.join(EXTENSIONS)})")
    return list(dict.fromkeys(found))


def _classify(session: Any, about: exported.Exported, paths: Sequence[Path]) -> Iterator[Prediction]:
    """One batch; with preprocessing in the graph image by image, since their sizes differ."""
    results: dict[Path, Prediction] = {}
    pixels: dict[Path, np.ndarray] = {}
    for path in paths:
        try:
            image = reader.decode(path.read_bytes())
            pixels[path] = np.asarray(image) if about.in_graph else reader.central_square(image, about.size)
        except (ImageError, OSError) as error:
            results[path] = Prediction(str(path), None, None, str(error).splitlines()[0])
    groups = [[path] for path in pixels] if about.in_graph else [list(pixels)] if pixels else []
    for group in groups:
        scores = exported.run(session, about.feed(np.stack([pixels[path] for path in group])))
        for path, row in zip(group, scores, strict=True):
            best = int(row.argmax())
            results[path] = Prediction(str(path), about.class_names[best], float(row[best]))
    return (results[path] for path in paths)


def _write(predictions: Sequence[Prediction], out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(item.path, item.class_name, item.score, item.error) for item in predictions]
    kinds = (pa.string(), pa.string(), pa.float32(), pa.string())
    arrays = [pa.array([row[index] for row in rows], kind) for index, kind in enumerate(kinds)]
    with atomic_path(out / "predictions.parquet") as partial:
        pq.write_table(pa.table(dict(zip(COLUMNS, arrays, strict=True))), partial)
    with (
        atomic_path(out / "predictions.csv") as partial,
        partial.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(
            (path, name or "", "" if score is None else f"{score:.6f}", error)
            for path, name, score, error in rows
        )

"""An exported model: an ONNX file with its class names and preprocessing in its metadata. Needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from components.common.environment import cores
from components.common.errors import RetortError
from components.models.card import ModelCard

if TYPE_CHECKING:
    import onnxruntime

    from components.dataset.images import Images, Pin

INPUT = "images"
OUTPUT = "scores"


def metadata(card: ModelCard, in_graph: bool) -> dict[str, str]:
    """The ``metadata_props`` of the exported file: values are text, lists are JSON."""
    return {
        "class_names": json.dumps(card.class_names, ensure_ascii=False),
        "mean": json.dumps(card.mean),
        "std": json.dumps(card.std),
        "size": str(card.input_size[-1]),
        "preprocess": "in_graph" if in_graph else "outside",
        "arch": card.arch.name,
        "sha256": card.sha256,
    }


@dataclass(frozen=True)
class Exported:
    """What the file says about itself. ``sha256`` is that of the checkpoint it was made from.

    ``in_graph``: the graph takes uint8 [N, H, W, 3] of any size, else normalised float32 [N, 3, size, size].
    """

    path: Path
    class_names: list[str]
    mean: list[float]
    std: list[float]
    size: int
    in_graph: bool
    arch: str
    sha256: str

    def feed(self, pixels: np.ndarray) -> np.ndarray:
        """The graph's input for ``pixels``, uint8 [N, size, size, 3] as ``load_rgb`` gives them."""
        return pixels if self.in_graph else normalise(pixels, self.mean, self.std)


def read(path: Path) -> Exported:
    """What an exported file says about itself.

    Raises:
        RetortError: when there is no such file, it is no ONNX model, or not written by ``retort export``.
    """
    return describe(session(path), path)


def describe(opened: onnxruntime.InferenceSession, path: Path) -> Exported:
    """The same for a session that is open already."""
    props = opened.get_modelmeta().custom_metadata_map
    absent = [key for key in ("class_names", "mean", "std", "size", "sha256") if key not in props]
    if absent:
        raise RetortError(
            f"{path}: its metadata lacks {', '.join(absent)}, so classes and preprocessing are unknown; "
            "use a model.onnx that 'retort export' wrote"
        )
    try:
        return Exported(
            path=path, class_names=json.loads(props["class_names"]), mean=json.loads(props["mean"]),
            std=json.loads(props["std"]), size=int(props["size"]),
            in_graph=props.get("preprocess") == "in_graph",
            arch=props.get("arch", ""), sha256=props["sha256"],
        )  # fmt: skip
    except ValueError as error:
        raise RetortError(
            f"{path}: its metadata cannot be read ({error}); use a model.onnx that 'retort export' wrote"
        ) from None


def need_numbers(path: Path) -> None:
    """Raises RetortError when weights of an exported file are NaN: kernels may hide that in wrong answers.

    Infinity is let through here, since graphs mask with it; it shows in the scores, if at all.
    """
    import onnx
    from onnx import numpy_helper

    bad = {}
    for tensor in onnx.load(path).graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
            values = numpy_helper.to_array(tensor)
            if count := int(np.isnan(values).sum()):
                bad[tensor.name] = f"{tensor.name} ({count:,} of {values.size:,})"
    if bad:
        more = f" and {len(bad) - 3} more tensors" if len(bad) > 3 else ""
        raise RetortError(
            f"{path}: the model itself holds NaN: {', '.join(list(bad.values())[:3])}{more}; it was damaged "
            "after it was exported: run 'retort export' again"
        )


def session(path: Path, threads: int = 0, **free_dimensions: int) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU. ``threads`` 0: one for each processor that is ours.

    ``free_dimensions`` fixes symbolic sizes of the input (``N=16``), which lets the runtime plan ahead.

    Raises:
        RetortError: naming the file, when it is missing or not a model that ONNX Runtime can run.
    """
    import onnxruntime

    if not path.is_file():
        raise RetortError(f"{path}: no such file; run 'retort export' first")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or cores()
    options.inter_op_num_threads = 1
    # threads that spin after a run would take the cores from whatever is measured next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, value in free_dimensions.items():
        options.add_free_dimension_override_by_name(name, value)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its exceptions share no base class but Exception
        raise RetortError(f"{path}: ONNX Runtime cannot open it ({str(error).splitlines()[0]})") from None


def run(opened: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    """Scores float32 [N, classes] of ``images`` as the graph takes them."""
    return opened.run([OUTPUT], {INPUT: images})[0]


def normalise(pixels: np.ndarray, mean: list[float], std: list[float]) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W]: pixels / 255, minus mean, over std."""
    unit = pixels.astype(np.float32) / np.float32(255)
    scaled = (unit - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


@dataclass(frozen=True)
class Rows:
    """Paths and labels of some rows of a manifest, in its order, and what it says of their content."""

    paths: list[str]
    labels: np.ndarray
    pins: list[Pin]

    def __len__(self) -> int:
        return len(self.paths)

    def images(self, root: str) -> Images:
        """Their images, which lie below ``root``."""
        from components.dataset.images import Images

        return Images(root, self.paths, self.pins)

    def spread(self, count: int) -> Rows:
        """At most ``count`` of them, evenly over the whole: the same ones each time."""
        if len(self) <= count:
            return self
        chosen = np.linspace(0, len(self) - 1, count).astype(int)
        paths, pins = ([part[index] for index in chosen] for part in (self.paths, self.pins))
        return Rows(paths, self.labels[chosen], pins)


def class_names(manifest: Path) -> dict[int, str]:
    """The data's class names, by label."""
    from components.dataset import manifest as manifests

    return manifests.names_by_label(manifests.read(manifest, ["label", "class_name"]))


def way_out(card: ModelCard, manifest: Path, role: str) -> str:
    """What to do when a network's class names are not the data's."""
    from components.dataset import manifest as manifests

    again = (
        "'retort finetune'" if role == "teacher" else "'retort finetune', 'retort check', 'retort distill'"
    )
    if card.data_fingerprint == manifests.fingerprint(manifest):
        return (
            "Images and labels are those it was trained on, so names were changed since, in the card or in "
            f"the data (data.class_names): restore them, or train again ({again})."
        )
    return (
        f"The data are not those it was trained on: train on these ({again}), or read the old ones again "
        "('retort ingest', 'retort validate')."
    )


def rows(manifest: Path, split: str) -> Rows:
    """The rows of one split; only those are held in memory.

    Raises:
        RetortError: when the manifest has none, is missing, or is no manifest.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from components.dataset.images import pins

    columns = ["path", "label", "bytes", "sha256"]
    try:
        table = pq.read_table(manifest, columns=columns, filters=[("split", "=", split)])
    except FileNotFoundError:
        raise RetortError(f"{manifest}: no such file; run 'retort validate' first") from None
    except (pa.ArrowException, OSError) as error:
        raise RetortError(f"{manifest}: not a manifest ({str(error).splitlines()[0]})") from None
    if not table.num_rows:
        raise RetortError(f"{manifest}: no row of the split '{split}'; export and benchmark measure on it")
    return Rows(table["path"].to_pylist(), table["label"].to_numpy(), pins(table))


@lru_cache(maxsize=1)
def has_vnni() -> bool:
    """Whether the processor multiplies int8 without saturating: without it int8 gains little."""
    try:
        flags: Any = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"))

"""A model that answers recorded requests: its answers, its own preprocessing, and that of its training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from components.common.errors import ImageError, RetortError
from components.common.storage import sha256_file
from components.dataset.images import central_square, decode
from components.export import exported
from components.models.card import read_card
from components.tools.predict import open_classifier
from components.tools.shadow.requests import Request
from components.training.inputs.pictures import Form

Pixels = NDArray[np.uint8]
SAME = 0.01  # grey levels: what float32 rounds is a thousandth of it
INSIDE = "preprocess/"  # how the nodes of preprocessing in the graph are called


@dataclass(frozen=True)
class Prepared:
    """A request, decoded once for all: ``whole`` uint8 [H, W, 3], squares uint8 [size, size, 3] by size.

    ``trained``: the squares as the training's own reader makes them of the same bytes.
    """

    request: Request
    error: str
    whole: Pixels | None
    squares: dict[int, Pixels]
    trained: dict[int, Pixels]


class Contender:
    """One exported model.

    Args:
        label: what people call it: its version, or its file.
        card: ``model.json`` of the network that it was exported from: what training fed it. None: nobody
            knows, and the file's own word is taken.
    """

    def __init__(self, role: str, label: str, file: Path, card: Path | None, threads: int) -> None:
        self.role, self.label, self.file = role, label, file
        self.sha256 = sha256_file(file)
        self.session, self.about = open_classifier(file, threads)
        self.names = self.about.class_names
        self.known = card is not None
        if card is not None:
            said = read_card(card, changed=True)
            self.mean, self.std, self.size = said.mean, said.std, said.input_size[-1]
        else:
            self.mean, self.std, self.size = self.about.mean, self.about.std, self.about.size
        self._inside = _preprocessing(file, threads) if self.about.in_graph else None
        self.seconds = 0.0  # of answering, all requests together

    def scores(self, prepared: Sequence[Prepared]) -> NDArray[np.float32]:
        """float32 [N, classes]."""
        started = time.perf_counter()
        if self.about.in_graph:  # sizes differ
            rows = [exported.run(self.session, one.whole[None]) for one in prepared if one.whole is not None]
            scores = np.concatenate(rows)
        else:
            pixels = np.stack([one.squares[self.about.size] for one in prepared])
            scores = exported.run(self.session, self.about.feed(pixels))
        self.seconds += time.perf_counter() - started
        if not np.isfinite(scores).all():
            raise RetortError(
                f"{self.label}: its scores are not finite numbers, so the model is damaged: run "
                "'retort export' again"
            )
        return scores

    def skew(self, prepared: Sequence[Prepared]) -> NDArray[np.float32]:
        """How far what is served lies from what was trained on, of the same bytes; float32 [N].

        The largest difference between two values of both tensors, in grey levels of 0..255. NaN where the
        sizes differ, so that nothing can be compared.
        """
        import torch

        from components.training.normalise import Normalise

        if self.size != self.about.size:
            return np.full(len(prepared), np.nan, np.float32)
        trained = np.stack([one.trained[self.size] for one in prepared])
        normalise = Normalise(self.mean, self.std, torch.device("cpu"))
        wanted = normalise(torch.from_numpy(trained.transpose(0, 3, 1, 2))).numpy()
        served = self.tensors(prepared)
        levels = np.abs(served - wanted) * (np.asarray(self.std, np.float32) * 255)[:, None, None]
        return levels.reshape(len(prepared), -1).max(axis=1)

    def tensors(self, prepared: Sequence[Prepared]) -> NDArray[np.float32]:
        """What the network is fed when the file is served, float32 [N, 3, size, size]."""
        if self._inside is not None:
            rows = [
                self._inside.run(None, {exported.INPUT: one.whole[None]})[0]
                for one in prepared
                if one.whole is not None
            ]
            return np.concatenate(rows)
        pixels = np.stack([one.squares[self.about.size] for one in prepared])
        return exported.normalise(pixels, self.about.mean, self.about.std)

    def answer(self, content: bytes) -> float:
        """Seconds from a request's bytes to its answer, alone."""
        started = time.perf_counter()
        image = decode(content)
        pixels = np.asarray(image) if self.about.in_graph else central_square(image, self.about.size)
        exported.run(self.session, self.about.feed(pixels[None]))
        return time.perf_counter() - started


def prepare(request: Request, contenders: Sequence[Contender]) -> Prepared:
    """Read and decode a request once for all; a malformed one has an ``error``."""
    try:
        content = request.content()
        image = decode(content)
        sizes = {one.about.size for one in contenders if not one.about.in_graph}
        whole = np.asarray(image) if any(one.about.in_graph for one in contenders) else None
        trained = {size: Form("square", size).made(content)[0] for size in {one.size for one in contenders}}
        return Prepared(request, "", whole, {size: central_square(image, size) for size in sizes}, trained)
    except ImageError as error:
        return Prepared(request, str(error).splitlines()[0], None, {}, {})


def _preprocessing(file: Path, threads: int) -> Any:
    """A session of that part of a graph which prepares its input."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    model = onnx.load(str(file))
    graph = model.graph
    inside = [node for node in graph.node if node.name.startswith(INSIDE)]
    last = inside[-1].output[0]
    del graph.node[:], graph.output[:]
    graph.node.extend(inside)
    graph.output.append(helper.make_tensor_value_info(last, TensorProto.FLOAT, None))
    needed = {name for node in inside for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

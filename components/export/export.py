"""The step ``export``: a checkpoint becomes an ONNX file that is proved to give the same answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from components.common.errors import RetortError
from components.common.progress import at, track
from components.common.storage import write_text
from components.dataset import manifest as manifests
from components.export import exported, report, verdicts
from components.export.params import ExportParams
from components.export.parity import BATCH, ROUNDING, Comparison, Proof, Written, prove, rounding, run_into
from components.export.precisions import CALIBRATION_IMAGES, LOOSE, PRECISIONS, Batches
from components.models.card import ModelCard
from components.step import StepContext, step

if TYPE_CHECKING:
    import onnx
    from torch import nn


def export(
    params: ExportParams,
    *,
    manifest: Path,
    model: Path,
    out: Path,
    of: Literal["student", "teacher"] | None = None,
) -> None:
    """Write ``model.onnx`` (and what else is asked for), ``parity.json``, ``labels.txt`` and ``model.json``.

    Args:
        model: the folder of a trained network (``model.safetensors``, ``model.json``).
        of: which network it is, for names in the report; None: what ``out`` or ``model`` is called.

    The graph takes ``images`` and gives ``scores``, softmax float32 [N, classes]; how ``images`` must look
    stands in the file's metadata (``components.export.exported``).

    Raises:
        FindingsError: when the checkpoint, the class count or the parity is wrong.
    """
    role = of or ("teacher" if "teacher" in (out.name, model.name) else "student")
    inputs = [manifest, model / "model.safetensors", model / "model.json"]
    with step("export", params, out, inputs, keep=("teacher",)) as run:
        rows = exported.rows(manifest, "val")
        manifests.record_use(run.tracker, "clean", manifest, "val")
        verdicts.names(run, model, manifest, role)
        at(f"loading the {role}")
        module, card = _load(run, model, role)
        verdicts.classes(run, module, card, rows, role)
        folded = _fold(run, params, module, card, rows, role)
        at(f"exporting {card.arch.name} to ONNX")
        files = _write(run, params, folded, card, manifest, out)
        at("comparing scores")
        proof, as_files = _prove(params, module, card, rows, files)
        broken = verdicts.parity(run, proof, files, role)
        verdicts.accuracy(run, params, proof, "model.onnx" in broken, card, rows, model, role)
        verdicts.whole_images(run, proof, as_files, role)
        verdicts.reduced(run, proof, files)
        report.write(run, proof, as_files, files, out)
        run.stop_on_errors()


def _load(run: StepContext, model: Path, role: str) -> tuple[nn.Module, ModelCard]:
    from components.models import checkpoint

    made_by = "finetune" if role == "teacher" else "distill"
    try:
        module, card = checkpoint.load(model, made_by)
    except RetortError as error:
        run.add_finding(
            "export.checkpoint",
            "error",
            f"{role} in {model}",
            str(error),
            advice=f"Point to a folder that 'retort {made_by}' wrote, or run it again.",
            row="1.1",
            waivable=False,  # without a network there is nothing to export
        )
        run.stop_on_errors()
        raise
    run.add_finding(
        "export.checkpoint",
        "info",
        f"{role} {card.arch.name}",
        f"Every tensor of the network was loaded, from the file that its card names ({card.sha256[:12]}).",
        row="1.1",
    )
    return module, card


def _fold(
    run: StepContext, params: ExportParams, module: nn.Module, card: ModelCard, rows: exported.Rows, role: str
) -> nn.Module:
    """Fold multi-branch blocks and prove on real images that the logits stay the same."""
    import torch

    from components.export import graph

    folded, blocks = graph.fold(module)
    if not blocks:
        return module
    some = rows.spread(BATCH)
    _, pixels = next(some.images(params.data.root).squares(card.input_size[-1], BATCH))
    images = torch.from_numpy(exported.normalise(pixels, card.mean, card.std))
    with torch.inference_mode():
        before, after = module(images), folded(images)
    difference = float((before - after).abs().max() / before.abs().max())
    saved = _parameters(module) - _parameters(folded)
    run.add_finding(
        "export.reparam",
        "info" if difference <= ROUNDING else "error",
        f"{role} {card.arch.name}",
        f"{blocks} multi-branch blocks were folded into single convolutions ({saved:,} parameters fewer); "
        f"on {len(some)} images the logits differ by {difference:.1e} of their largest.",
        measured=difference,
        limit=ROUNDING,
        row="3.4",
        advice="" if difference <= ROUNDING else "Export cannot prove that the folded network is the same.",
    )
    return folded


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _write(
    run: StepContext, params: ExportParams, module: nn.Module, card: ModelCard, manifest: Path, out: Path
) -> dict[str, Written]:
    """Write the files, staged: by name, where each lies until the step passes."""
    from components.export import graph

    settings, size = params.export, card.input_size[-1]
    core = graph.to_onnx(module, size)

    def batches() -> Iterator[np.ndarray]:
        train = exported.rows(manifest, "train").spread(CALIBRATION_IMAGES)
        for _, pixels in train.images(params.data.root).squares(size, BATCH):
            yield exported.normalise(pixels, card.mean, card.std)

    asked = list(settings.files())
    graphs = {precision: _in_precision(core, precision, batches) for precision, _, _ in asked}
    metadata = exported.metadata(card, settings.preprocess_in_graph)
    files = {}
    for precision, form, name in asked:
        made, tolerance = graphs[precision], PRECISIONS[precision].tolerance
        if settings.preprocess_in_graph:
            made = graph.with_preprocessing(made, size, card.mean, card.std)
        files[name] = Written(
            run.product(out / name), precision, form, settings.tolerance if tolerance is None else tolerance
        )
        form.write(made, files[name].path, metadata)
    write_text(run.product(out / "labels.txt"), "".join(f"{name}\n" for name in card.class_names))
    card.write(run.product(out / "model.json"))
    return files


def _in_precision(model: onnx.ModelProto, name: str, batches: Batches) -> onnx.ModelProto:
    convert = PRECISIONS[name].convert
    assert convert is not None, "refused with the parameters"
    return convert(model, batches)


def _prove(
    params: ExportParams,
    module: nn.Module,
    card: ModelCard,
    rows: exported.Rows,
    files: Mapping[str, Written],
) -> tuple[Proof, Comparison | None]:
    """Compare on the whole validation split; and on whole images, if the graph resizes by itself."""
    import torch

    settings, root, size = params.export, params.data.root, card.input_size[-1]
    images = rows.images(root)

    def network(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(exported.normalise(pixels, card.mean, card.std))).numpy()

    as_files = Comparison(LOOSE) if settings.preprocess_in_graph else None
    run_file = files["model.onnx"].open() if as_files else None

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        count = -(-len(rows) // BATCH)
        for place, pixels in track(images.squares(size, BATCH), "comparing scores", count):
            yield pixels, rows.labels[place]
            if as_files is None or run_file is None:
                continue
            logits = network(pixels)
            for index in range(len(pixels)):
                image = np.asarray(images.whole(place.start + index))[None]
                one = slice(index, index + 1)
                run_into(as_files, run_file, image, logits[one], rows.labels[place][one])

    _, some = next(rows.spread(BATCH).images(root).squares(size, BATCH))
    with torch.inference_mode():
        exact = copy.deepcopy(module).double()(
            torch.from_numpy(exported.normalise(some, card.mean, card.std)).double()
        )
    proof = prove(network, files, batches(), rounding(network(some), exact.numpy()))
    return proof, as_files

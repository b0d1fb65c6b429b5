"""The step ``export``: a checkpoint becomes an ONNX file that is proved to give the same answers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from components.common.errors import RetortError
from components.common.progress import at, track
from components.common.storage import human_bytes, read_json, sha256_file, write_json, write_text
from components.export import exported
from components.export.params import ExportParams
from components.export.parity import ROUNDING, Comparison, Proof, prove, rounding, run_into
from components.models.card import ModelCard, first_difference, names_finding, read_card
from components.step import Run, step

if TYPE_CHECKING:
    from torch import nn

BATCH = 64
CALIBRATION_IMAGES = 128
INT8_DROP = 0.01  # top-1 that int8 may cost before it is advised against
LOOSE = 0.05  # scores from int8, or from resizing in the graph, move; a lead below this is a tie
DRIFT = 0.005  # top-1 by which training's own measurement may differ (other batch sizes round differently)
ANOTHER = 0.1  # top-1 below training's own from which on it is another network, or other images


def export(
    params: ExportParams,
    *,
    manifest: Path,
    model: Path,
    out: Path,
    of: Literal["student", "teacher"] | None = None,
) -> None:
    """Write ``model.onnx`` (and ``model.int8.onnx``), ``parity.json``, ``labels.txt`` and ``model.json``.

    Args:
        model: the folder of a trained network (``model.safetensors``, ``model.json``).
        of: which network it is, for names in the report; None: what ``out`` or ``model`` is called.

    The graph takes ``images`` and gives ``scores``, softmax float32 [N, classes]; how ``images`` must look
    stands in the file's metadata (``components.export.exported``).

    Raises:
        FindingsError: when the checkpoint, the class count or the parity is wrong.
    """
    role = of or ("teacher" if "teacher" in (out.name, model.name) else "student")
    inputs = {
        "data/clean.parquet": manifest,
        f"outputs/{role}/model.safetensors": model / "model.safetensors",
        f"outputs/{role}/model.json": model / "model.json",
    }
    with step("export", params, out, inputs=inputs, keep=("teacher",)) as run:
        rows = exported.rows(manifest, "val")
        _check_names(run, model, manifest, role)
        at(f"loading the {role}")
        module, card = _load(run, model, role)
        _check_classes(run, module, card, rows, role)
        folded = _fold(run, params, module, card, rows, role)
        at(f"exporting {card.arch.name} to ONNX")
        files = _write(run, params, folded, card, manifest, out)
        at("comparing scores")
        proof, as_files = _prove(params, module, card, rows, files)
        _judge(run, params, proof, card, rows, model, role)
        _judge_files(run, proof, as_files, role)
        _judge_int8(run, proof, files)
        _show(run, proof, as_files, files, out)
        run.stop_on_errors()


def _check_names(run: Run, model: Path, manifest: Path, role: str) -> None:
    """The names that the file will carry are the data's, label by label.

    Before the network is loaded, and of a changed card too: it is the names that a person must hear of.
    """
    try:
        card = read_card(model / "model.json", changed=True)
    except RetortError:
        return  # loading says why
    data, names = exported.class_names(manifest), card.class_names
    label = first_difference(names, data)
    if not names or (label is not None and label >= len(names)):
        return  # no classifier, or too few classes: the class count says so
    where = f"outputs/{role}/model.json"
    run.find(**names_finding(names, data, role, where, exported.way_out(card, manifest, role)))


def _load(run: Run, model: Path, role: str) -> tuple[nn.Module, ModelCard]:
    from components.models import checkpoint

    made_by = "finetune" if role == "teacher" else "distill"
    try:
        module, card = checkpoint.load(model, made_by)
    except RetortError as error:
        run.find(
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
    run.find(
        "export.checkpoint",
        "info",
        f"{role} {card.arch.name}",
        f"Every tensor of the network was loaded, from the file that its card names ({card.sha256[:12]}).",
        row="1.1",
    )
    return module, card


def _check_classes(run: Run, module: nn.Module, card: ModelCard, rows: exported.Rows, role: str) -> None:
    """The class count comes from the checkpoint, and fits the labels that parity is measured on."""
    import torch

    size = card.input_size[-1]
    with torch.inference_mode():
        outputs = list(module(torch.zeros(1, 3, size, size)).shape)
    named, highest = len(card.class_names), int(rows.labels.max())
    asked = run.params.general.class_num
    retrain = "Train it on this data, or export with the data it was trained on."
    if not named or len(outputs) != 2:
        run.find(
            "export.class_num",
            "error",
            role,
            f"It has no classifier: the output is features of shape {outputs}.",
            advice="A backbone cannot predict; finetune it first.",
            row="1.1",
        )
    elif outputs[1] != named:
        run.find(
            "export.class_num",
            "error",
            role,
            f"The network has {outputs[1]} outputs, its card names {named} classes.",
            measured=outputs[1],
            limit=named,
            advice=retrain,
            row="1.1",
        )
    elif highest >= named:
        run.find(
            "export.class_num",
            "error",
            role,
            f"The validation split has the label {highest}, the network {named} classes, 0 to {named - 1}.",
            measured=named,
            limit=highest + 1,
            advice=retrain,
            row="1.1",
        )
    elif asked not in ("auto", named):
        run.find(
            "export.class_num",
            "warning",
            role,
            f"global.class_num asks for {asked} classes, the checkpoint has {named}: the file gives {named} "
            "scores, whatever the parameter says.",
            measured=named,
            limit=asked,
            advice="Set global.class_num to auto, or train with it.",
            row="1.1",
        )
    else:
        run.find(
            "export.class_num",
            "info",
            role,
            f"{named} classes, as the checkpoint has them.",
            measured=named,
            row="1.1",
        )
    run.stop_on_errors()


def _fold(
    run: Run, params: ExportParams, module: nn.Module, card: ModelCard, rows: exported.Rows, role: str
) -> nn.Module:
    """Fold multi-branch blocks and prove on real images that the logits stay the same."""
    import torch

    from components.export import graph

    folded, blocks = graph.fold(module)
    if not blocks:
        return module
    some = rows.spread(BATCH)
    _, pixels = next(exported.pixel_batches(params.data.root, some, card.input_size[-1], BATCH))
    images = torch.from_numpy(exported.normalise(pixels, card.mean, card.std))
    with torch.inference_mode():
        before, after = module(images), folded(images)
    difference = float((before - after).abs().max() / before.abs().max())
    saved = _parameters(module) - _parameters(folded)
    run.find(
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
    run: Run, params: ExportParams, module: nn.Module, card: ModelCard, manifest: Path, out: Path
) -> dict[str, Path]:
    """Write the files, staged: by precision, where each lies until the step passes."""
    from components.export import graph

    settings, size = params.export, card.input_size[-1]
    core = graph.to_onnx(module, size)
    graphs = {"fp32": core}
    if settings.int8:
        train = exported.rows(manifest, "train").spread(CALIBRATION_IMAGES)
        batches = (
            exported.normalise(pixels, card.mean, card.std)
            for _, pixels in exported.pixel_batches(params.data.root, train, size, BATCH)
        )
        at("calibrating int8")
        graphs["int8"] = graph.quantise(copy.deepcopy(core), batches, reduce_range=not exported.has_vnni())
    metadata = exported.metadata(card, settings.preprocess_in_graph)
    files = {}
    for precision, model in graphs.items():
        if settings.preprocess_in_graph:
            model = graph.with_preprocessing(model, size, card.mean, card.std)
        files[precision] = run.product(out / exported.FILES[precision])
        graph.save(model, files[precision], metadata)
    write_text(run.product(out / "labels.txt"), "".join(f"{name}\n" for name in card.class_names))
    card.write(run.product(out / "model.json"))
    return files


def _prove(
    params: ExportParams, module: nn.Module, card: ModelCard, rows: exported.Rows, files: dict[str, Path]
) -> tuple[Proof, Comparison | None]:
    """Compare on the whole validation split; and on whole images, if the graph resizes by itself."""
    import torch

    from components.dataset import images as reader

    settings, root, size = params.export, params.data.root, card.input_size[-1]

    def network(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(exported.normalise(pixels, card.mean, card.std))).numpy()

    as_files = Comparison(LOOSE) if settings.preprocess_in_graph else None
    session = exported.session(files["fp32"], threads=1) if as_files else None

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        count = -(-len(rows) // BATCH)
        prepared = exported.pixel_batches(root, rows, size, BATCH)
        for place, pixels in track(prepared, "comparing scores", count):
            yield pixels, rows.labels[place]
            if as_files is None:
                continue
            logits = network(pixels)
            named = zip(rows.paths[place], rows.pins[place], strict=True)
            for index, (path, pin) in enumerate(named):
                image = np.asarray(reader.decode(reader.read_bytes(root, path, pin)))[None]
                one = slice(index, index + 1)
                run_into(as_files, session, image, logits[one], rows.labels[place][one])

    _, some = next(exported.pixel_batches(root, rows.spread(BATCH), size, BATCH))
    with torch.inference_mode():
        exact = copy.deepcopy(module).double()(
            torch.from_numpy(exported.normalise(some, card.mean, card.std)).double()
        )
    tolerances = {"fp32": settings.tolerance, "int8": LOOSE}
    proof = prove(
        network,
        {key: (path, tolerances[key]) for key, path in files.items()},
        batches(),
        rounding(network(some), exact.numpy()),
    )
    return proof, as_files


def _judge(
    run: Run, params: ExportParams, proof: Proof, card: ModelCard, rows: exported.Rows, model: Path, role: str
) -> None:
    """Row 1.1: is the export bad, or is the checkpoint itself weak?"""
    settings = params.export
    ways = proof.compared["fp32"]
    broken = [(way, comparison) for way, comparison in ways.items() if not comparison.holds]
    for way, comparison in broken:
        said = comparison.failure or (
            f"{comparison.different_ids} of {comparison.images} images get another class, "
            f"scores differ by up to {comparison.max_difference:.1e} (allowed: {comparison.limit:.1e})"
        )
        run.find(
            "export.parity",
            "error",
            f"{role}, {way}",
            f"The exported file is not the network: {said}.",
            measured=comparison.max_difference,
            limit=comparison.limit,
            advice="Do not deploy it: the exporter is at fault, report the architecture. If such differences "
            "do not matter to you, raise export.tolerance.",
            row="1.1",
        )
    whole = ways["batches"]
    if not broken:
        run.find(
            "export.parity",
            "info",
            role,
            f"Class ids are equal on all {whole.images} validation images, in batches of {BATCH} and "
            f"one by one; scores differ by at most {max(way.max_difference for way in ways.values()):.1e}.",
            measured=whole.max_difference,
            limit=whole.limit,
            row="1.1",
        )
    both = f"On {proof.images} validation images the network has {proof.top1:.2%} top-1, the exported file "
    both += f"{whole.top1:.2%}" if not whole.failure else "none"
    commonest = float(np.bincount(rows.labels).max()) / len(rows)
    trained = _trained_top1(model)
    if broken:
        run.find(
            "export.accuracy",
            "error",
            role,
            f"{both}. The export is bad, whatever the checkpoint is worth.",
            measured=whole.top1,
            limit=proof.top1,
            advice="See export.parity.",
            row="1.1",
        )
    elif proof.top1 <= commonest and len(card.class_names) > 1:
        run.find(
            "export.accuracy",
            "error",
            role,
            f"{both}: the export is right, the checkpoint itself has learned nothing. Always naming "
            f"the commonest class gives {commonest:.2%}.",
            measured=proof.top1,
            limit=commonest,
            advice="Look at its training curve and at the weights it started from.",
            row="1.1",
        )
    elif proof.top1 < settings.min_accuracy:
        run.find(
            "export.accuracy",
            "warning",
            role,
            f"{both}: the export is right, the checkpoint itself is weak.",
            measured=proof.top1,
            limit=settings.min_accuracy,
            advice="Train longer, or look at the audit; the export is not at fault.",
            row="1.1",
        )
    else:
        run.find(
            "export.accuracy",
            "info",
            role,
            f"{both}.",
            measured=whole.top1,
            limit=settings.min_accuracy,
            row="1.1",
        )
    if trained is not None and abs(trained - proof.top1) > DRIFT:
        far = trained - proof.top1 > ANOTHER
        run.find(
            "export.accuracy",
            "error" if far else "warning",
            f"{role}, training against export",
            f"Training wrote {trained:.2%} for this checkpoint, export measures {proof.top1:.2%}.",
            measured=proof.top1,
            limit=trained,
            advice="It is not the network that was trained (parts of it may be random: never fill one with "
            "strict=False), or the data or the preprocessing changed since; train again."
            if far
            else "The data or the preprocessing changed since training; train again.",
            row="1.1",
        )


def _trained_top1(model: Path) -> float | None:
    path = model / "metrics.json"
    if not path.is_file():
        return None
    value = read_json(path).get("val", {}).get("top1")
    return None if value is None else float(value)


def _judge_files(run: Run, proof: Proof, as_files: Comparison | None, role: str) -> None:
    """With preprocessing in the graph: does it see what training saw, starting from the files themselves?"""
    if as_files is None:
        return
    lost = proof.top1 - as_files.top1
    right = not as_files.failure and lost <= DRIFT
    run.find(
        "export.preprocess",
        "info" if right else "error",
        role,
        as_files.failure
        or f"Given whole images, the graph resizes by itself: top-1 {as_files.top1:.2%} against "
        f"{proof.top1:.2%}, {as_files.different_ids + as_files.ties} of {as_files.images} images get another "
        f"class, scores differ by up to {as_files.max_difference:.1e}.",
        measured=lost,
        limit=DRIFT,
        row="1.5",
        advice="" if right else "Export with export.preprocess_in_graph: false and resize outside.",
    )


def _judge_int8(run: Run, proof: Proof, files: dict[str, Path]) -> None:
    if "int8" not in files:
        return
    whole = proof.compared["int8"]["batches"]
    failed = next((way.failure for way in proof.compared["int8"].values() if way.failure), "")
    lost = proof.top1 - whole.top1
    good = not failed and lost <= INT8_DROP
    size = files["int8"].stat().st_size / files["fp32"].stat().st_size
    reduced = "" if exported.has_vnni() else ", with 7-bit weights because this processor has no VNNI"
    run.find(
        "export.int8",
        "info" if good else "warning",
        "model.int8.onnx",
        failed
        or f"Top-1 {whole.top1:.2%} against {proof.top1:.2%} in float32, {size:.2f} x the size; calibrated "
        f"on {CALIBRATION_IMAGES} training images at most{reduced}.",
        measured=lost,
        limit=INT8_DROP,
        row="1.5",
        advice="" if good else "Keep to model.onnx: int8 costs too much accuracy here.",
    )


def _show(run: Run, proof: Proof, as_files: Comparison | None, files: dict[str, Path], out: Path) -> None:
    """``parity.json``, the tracked numbers and the page."""
    compared = {
        f"{exported.FILES[precision]}, {way}": comparison
        for precision, ways in proof.compared.items()
        for way, comparison in ways.items()
    }
    if as_files is not None:
        compared["model.onnx, whole images"] = as_files
    write_json(
        run.product(out / "parity.json"),
        {
            "schema_version": 1,
            "checkpoint": {"images": proof.images, "top1": proof.top1},
            "files": {
                exported.FILES[key]: {"sha256": sha256_file(path), "bytes": path.stat().st_size}
                for key, path in files.items()
            },
            "compared": {name: comparison.summary() for name, comparison in compared.items()},
        },
    )
    whole = proof.compared["fp32"]["batches"]
    numbers = {"top1": whole.top1, "max_difference": whole.max_difference}
    sizes = {f"bytes_{key}": float(path.stat().st_size) for key, path in files.items()}
    run.tracker.metrics({"checkpoint_top1": proof.top1, **numbers, **sizes})
    run.tracker.summary({**numbers, **sizes})
    rows: list[list[Any]] = [["checkpoint", proof.images, f"{proof.top1:.2%}", "", "", ""]]
    rows += [
        [
            name,
            way.images,
            f"{way.top1:.2%}",
            way.different_ids,
            f"{way.max_difference:.1e}",
            way.failure or _verdict(name, way),
        ]
        for name, way in compared.items()
    ]
    sizes_said = ", ".join(
        f"{exported.FILES[key]} {human_bytes(size)}" for key, size in zip(files, sizes.values(), strict=True)
    )
    run.page.table(
        "The same answers before and after export",
        ["graph", "images", "top-1", "other class", "largest difference", "verdict"],
        rows,
        note=f"Validation split; scores are 0 to 1. {sizes_said}.",
    )
    if whole.differences:
        run.page.figure(
            "How far scores move in export",
            _histogram(proof),
            alt="Histogram of score differences per image",
            note="The largest difference of a score in each image; model.onnx must stay left of the line: "
            f"export.tolerance, or half of {whole.rounding:.0e} of the largest logit, {whole.max_logit:.0f}",
        )


def _verdict(name: str, way: Comparison) -> str:
    """Only the float32 graph must be equal; the others are judged by what they lose of top-1."""
    if name in ("model.onnx, batches", "model.onnx, single images"):
        return "equal" if way.holds else "differs"
    return "see top-1"


def _histogram(proof: Proof) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 2.6))
    smallest, styles = 1e-9, {"fp32": ("#0072B2", ""), "int8": ("#E69F00", "//")}
    for precision, ways in proof.compared.items():
        values = np.maximum(ways["batches"].differences, smallest)
        colour, hatch = styles[precision]
        axes.hist(
            values,
            bins=np.logspace(-9, 0, 46).tolist(),
            color=colour,
            hatch=hatch,
            alpha=0.8,
            label=exported.FILES[precision],
        )
    limit = proof.compared["fp32"]["batches"].limit
    axes.axvline(limit, color="#444", linestyle="--")
    axes.annotate(
        "limit", (limit, 1), xycoords=("data", "axes fraction"), xytext=(5, 0), va="top",
        color="#444", textcoords="offset points",
    )  # fmt: skip
    axes.set(xscale="log", xlabel="largest difference of a score", ylabel="images", xlim=(smallest / 2, 1))
    axes.spines[["top", "right"]].set_visible(False)
    if len(proof.compared) > 1:
        axes.legend(frameon=False)
    return figure

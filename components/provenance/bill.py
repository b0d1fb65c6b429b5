"""The bill of materials of a model: CycloneDX 1.6, a component of type machine-learning-model with its card.

The library of CycloneDX for Python knows no model card, so the document is built here, and a test has that
library validate it against the official schema.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

from components.common.links import Link
from components.common.storage import sha256_file
from components.provenance.page import About, Measured

SPEC = "1.6"
NAMESPACE = uuid.UUID("6f1c0a0e-9d5b-5e43-8f0c-2f6f4b0f1d17")  # of serial numbers made from a model's hash
PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)")


def bill(folder: Path, about: About) -> dict[str, Any]:
    """The bill of the bundle in ``folder``: the model, its data, what it started from, and its packages."""
    digest = sha256_file(folder / "model.onnx")
    packages = _packages(folder)
    data, start = _data(folder, about), _start(about)
    parts = [*data, *start, *packages]
    model = f"model:{digest[:16]}"
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, digest)}",
        "version": 1,
        "metadata": {
            "timestamp": _when(about.links),
            "component": {
                "type": "machine-learning-model",
                "bom-ref": model,
                "name": about.name,
                "version": digest[:12],
                "hashes": [{"alg": "SHA-256", "content": digest}],
                "modelCard": _card(about, [one["bom-ref"] for one in data]),
            },
        },
        "components": parts,
        "dependencies": [
            {"ref": model, "dependsOn": [one["bom-ref"] for one in parts]},
            *({"ref": one["bom-ref"]} for one in parts),
        ],
    }


def _when(links: Any) -> str:
    last: Link = links[-1]
    return last.finished


def _card(about: About, datasets: list[str]) -> dict[str, Any]:
    arch = str((about.card.get("arch") or {}).get("name", "unknown"))
    size = (about.card.get("input_size") or ["?"])[-1]
    classes = [str(name) for name in about.card.get("class_names") or []]
    limits = [
        "It knows its classes and no others: an image of anything else gets one of these names, too.",
        "It was judged on images like those that it was trained on.",
    ]
    if about.few:
        limits.append(f"Fewer than 30 validation images judge: {', '.join(about.few)}.")
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "image classification",
            "architectureFamily": "convolutional or transformer network, distilled",
            "modelArchitecture": arch,
            "datasets": [{"ref": ref} for ref in datasets],
            "inputs": [{"format": f"images, RGB, {size} x {size} pixels"}],
            "outputs": [{"format": f"scores of {len(classes)} classes: {', '.join(classes)}"[:5000]}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                *(_metric("top-1", one) for one in about.top1),
                *(_metric("recall", one) for one in about.classes),
                *_latency(about.choice),
            ]
        },
        "considerations": {"technicalLimitations": limits},
    }


def _metric(kind: str, one: Measured) -> dict[str, Any]:
    return {
        "type": kind,
        "value": f"{one.value:.6f}",
        "slice": f"{one.split}: {one.name}",
        "confidenceInterval": {"lowerBound": f"{one.low:.6f}", "upperBound": f"{one.high:.6f}"},
    }


def _latency(choice: dict[str, Any]) -> list[dict[str, Any]]:
    if not choice:
        return []
    kept = ("engine", "precision", "threads", "batch")
    where = ", ".join(f"{key} {choice[key]}" for key in kept if key in choice)
    return [
        {"type": f"latency {key.removesuffix('_ms')} (ms)", "value": str(choice[key]), "slice": where}
        for key in ("p50_ms", "p95_ms")
        if key in choice
    ]


def _data(folder: Path, about: About) -> list[dict[str, Any]]:
    manifest = folder / "extra_files" / "manifest.parquet"
    if not manifest.is_file():
        return []
    source = about.parameters.get("data", {}).get("source", "unknown")
    counts = ", ".join(f"{split} {images}" for split, images in sorted(about.data.items()))
    return [
        {
            "type": "data",
            "bom-ref": "data:manifest",
            "name": "clean manifest of the images",
            "hashes": [{"alg": "SHA-256", "content": sha256_file(manifest)}],
            "data": [
                {
                    "type": "dataset",
                    "name": str(source),
                    "description": f"Images by split: {counts}. Each by path and sha256 in "
                    "extra_files/manifest.parquet.",
                }
            ],
        }
    ]


def _start(about: About) -> list[dict[str, Any]]:
    found = {}
    for place, entry in enumerate(about.card.get("lineage") or []):
        if not entry.get("sha256"):
            continue
        found[entry["sha256"]] = {
            "type": "machine-learning-model",
            "bom-ref": f"start:{place}:{entry['sha256'][:16]}",
            "name": str(entry.get("source")),
            "description": "weights that the model, or its teacher, comes from",
            "hashes": [{"alg": "SHA-256", "content": entry["sha256"]}],
        }
    return list(found.values())


def _packages(folder: Path) -> list[dict[str, Any]]:
    """Those of the lock; of what is installed, where there is no lock beside the code."""
    places = (folder / "provenance" / name for name in ("requirements.lock", "packages.txt"))
    text = next((path.read_text(encoding="utf-8") for path in places if path.is_file()), "")
    pins = dict.fromkeys(match.groups() for line in text.splitlines() if (match := PIN.match(line)))
    return [
        {
            "type": "library",
            "bom-ref": f"pkg:pypi/{_plain(name)}@{version}",
            "name": name,
            "version": version,
            "purl": f"pkg:pypi/{_plain(name)}@{version}",
        }
        for name, version in pins
    ]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()

"""``retort rebuild``: from a registered version alone back to the same student, in a folder of its own."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common import links
from components.common.environment import environment
from components.common.errors import ImageError, RetortError
from components.common.links import Link
from components.common.progress import at, counted
from components.common.storage import remove, sha256_file, state_dir
from components.provenance import bundle
from components.provenance.chain import short
from components.tools.verify import fetched

if TYPE_CHECKING:
    from components.common.params import Registry

log = logging.getLogger(__name__)

MANIFEST, PLAN = "extra_files/manifest.parquet", "extra_files/plan.json"
# what decides the bits of a network: another version of these computes another one
DECISIVE = ("torch", "torchvision", "timm", "numpy", "ray", "pillow", "onnx", "onnxscript")
STEPS = ("weights", "finetune", "check", "distill", "export")
LOG = "rebuild.log"
NAMED = 3
READERS = 8
DIGITS = "digits"


@dataclass
class Rebuilt:
    """What came out: every file that was compared, and whether it is the same."""

    folder: Path
    same: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def rebuild(
    what: str, registry: Registry, out: Path | None, *, root: str = "", anyway: bool = False
) -> Rebuilt:
    """Train a version again, by its own code, from its own parameters, plan and manifest, and compare.

    Args:
        what: a version's number, or an alias.
        out: where to work; None: below the state folder. What is there is removed.
        root: where the images lie now; empty: where they lay.
        anyway: go on although other versions of what computes are installed.

    Raises:
        RetortError: naming what is not as it was: an image, a package, start weights, or what came out.
    """
    place = out or state_dir("rebuild") / what
    remove(place)
    place.mkdir(parents=True)
    with fetched(what, registry, f"rebuild {what}") as (folder, about, _):
        at("verifying the version")
        found = bundle.verify(folder)
        kept = place / "version"
        shutil.copytree(folder, kept)
    result = Rebuilt(place)
    made = {link.step: link for link in found.chain.links if link.folder != "outputs/export/teacher"}
    missing = [step for step in STEPS if step not in made and step != "check"]
    if missing:
        raise RetortError(
            f"version {about['version']}: its chain has no step {missing[0]}: it was trained by another "
            "pipeline than the main one, such as retraining, and only that can be run again"
        )
    _packages(kept, result, anyway)
    parameters = found.statement["predicate"]["buildDefinition"]["externalParameters"]
    code = place / "code"
    with tarfile.open(kept / bundle.ARCHIVE) as tar:
        tar.extractall(code, filter="data")
    _same_code(code, made, result)
    digits = parameters["data"]["source"] == DIGITS
    images = "data/images" if digits else os.path.abspath(root or parameters["data"]["root"])  # noqa: PTH100
    _write_params(place / "params.yaml", parameters, images, result)
    run = _Runner(place, code)
    if digits:
        run("ingest")
    (place / "data").mkdir(exist_ok=True)
    shutil.copyfile(kept / MANIFEST, place / "data/clean.parquet")
    with environment({"RETORT_STATE": str(place / ".retort")}):
        _images(place / "data/clean.parquet", place / images if digits else Path(images), parameters)
    (place / "outputs/audit").mkdir(parents=True)
    shutil.copyfile(kept / PLAN, place / "outputs/audit/plan.json")
    for step in STEPS:
        run(step)
        _compare(place, made.get(step), step, result)
    return result


def _packages(kept: Path, result: Rebuilt, anyway: bool) -> None:
    """Raise RetortError where what computes is installed in another version than it was."""
    then = dict(line.split("==") for line in (kept / bundle.PACKAGES).read_text(encoding="utf-8").split())
    now = dict(one.split("==") for one in links.packages())
    other = [
        f"{name} {then[name]} (here {now.get(name, 'none')})"
        for name in sorted(then)
        if now.get(name) != then[name]
    ]
    decisive = [said for said in other if said.split()[0] in DECISIVE]
    if decisive and not anyway:
        raise RetortError(
            f"{bundle.PACKAGES}: the version was made with {', '.join(decisive[:NAMED])}: another student "
            f"would come of it. Install the version's {bundle.LOCK} (pip install --require-hashes -r), or "
            "give --anyway"
        )
    if other:
        result.notes.append(
            f"{counted(len(other), 'package')} of another version: {', '.join(other[:NAMED])}"
        )


def _same_code(code: Path, made: Mapping[str, Link], result: Rebuilt) -> None:
    """Note which steps were run by another code than the one that was kept with the version."""
    digest = links.code_hash(code / "components")
    other = [step for step in STEPS if step in made and made[step].code != digest]
    if other:
        result.notes.append(
            f"{', '.join(other)}: run by other code (sha256 {short(made[other[0]].code)}) than the version "
            f"keeps, which is that of 'register' (sha256 {short(digest)})"
        )


def _write_params(path: Path, parameters: dict[str, Any], root: str, result: Rebuilt) -> None:
    """What the steps were told, with a tracker, a cluster and images of this folder's own."""
    from ruamel.yaml import YAML

    values = {name: dict(section) for name, section in parameters.items()}
    values["registry"] = {"name": values["registry"]["name"]}
    values["data"] = {**values["data"], "root": root}
    values["ray"] = {**values.get("ray", {}), "address": "", "storage": ""}
    if values["ray"].get("workers", 1) > 1:
        result.notes.append(f"ray.workers was {values['ray']['workers']}: the same bits take as many here")
    if values["ray"].get("gpus_per_worker"):
        result.notes.append("it was trained on GPUs: not all of their operations give the same bits twice")
    for net in ("teacher", "student"):
        weights = str(values.get(net, {}).get("weights", ""))
        if weights and "://" not in weights and Path(weights).exists():  # a file of the working directory's
            values[net] = {**values[net], "weights": os.path.abspath(weights)}  # noqa: PTH100
        train = values.get(net, {}).get("train") or {}
        if train.get("time_budget_minutes"):
            result.notes.append(
                f"{net}.train.time_budget_minutes is set: a slower machine trains fewer epochs"
            )
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(values, file)


def _images(manifest: Path, root: Path, parameters: Mapping[str, Any]) -> None:
    """Read every image of the manifest again; raises RetortError naming those that are not what they were."""
    import pyarrow.parquet as pq

    from components.dataset import images, s3
    from components.dataset.params import S3

    at("reading the images again, by their sha256")
    table = pq.read_table(manifest)
    paths = table["path"].to_pylist()
    settings = S3.model_validate(parameters["data"].get("s3") or {})
    for bucket in {path.split("/")[2] for path in paths if path.startswith("s3://")}:
        s3.remember_store(bucket, settings)
    pins = images.pins(table)

    def wrong(number: int) -> str:
        try:
            images.read_bytes(root, paths[number], pins[number])
        except ImageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(READERS) as pool:
        lost = [said for said in pool.map(wrong, range(len(paths))) if said]
    if lost:
        raise RetortError(
            f"{counted(len(lost), 'image')} of {len(paths):,} cannot be had as they were: "
            f"{'; '.join(lost[:NAMED])}{'; ...' if len(lost) > NAMED else ''}. "
            f"Put them back below {root} (or name that with --root)"
        )


@dataclass(frozen=True)
class _Runner:
    """Runs a command of the version's own code in the folder; its output goes to ``rebuild.log``."""

    place: Path
    code: Path

    def __call__(self, step: str) -> None:
        at(f"running '{step}' of the version's own code")
        kept = {key: value for key, value in os.environ.items() if key not in ("RETORT_RUN", "RETORT_SHARED")}
        kept |= {"PYTHONPATH": str(self.code.absolute()), "RETORT_STATE": ".retort"}
        with (self.place / LOG).open("a", encoding="utf-8") as output:
            done = subprocess.run(
                [sys.executable, "-m", "pipelines.cli", step],
                cwd=self.place,
                env=kept,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        if done.returncode:
            last = (self.place / LOG).read_text(encoding="utf-8", errors="replace").splitlines()[-2:]
            raise RetortError(
                f"{self.place / LOG}: 'retort {step}' ended with exit status {done.returncode}: "
                f"{' '.join(last)}"
            )


COMPARED: Mapping[str, Sequence[str]] = {
    "weights": (".safetensors",),
    "finetune": ("/model.safetensors",),
    "distill": ("/model.safetensors",),
    "export": ("/model.onnx",),
}


def _compare(place: Path, link: Link | None, step: str, result: Rebuilt) -> None:
    """Compare what a step left with what its link says; raise RetortError at the first difference."""
    if link is None:
        return
    for name, digest in link.left.items():
        if not name.endswith(tuple(COMPARED.get(step, ()))) or step not in COMPARED:
            continue
        own = sha256_file(place / name) if (place / name).is_file() else ""
        if own != digest:
            raise RetortError(
                f"{place / name}: sha256 {short(own)}, not {short(digest)}: 'retort {step}' does not come "
                "to the same again; other processors, threads or packages may round otherwise"
            )
        result.same.append(f"{name} {short(digest)}")

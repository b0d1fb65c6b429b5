"""What stands beside a registered model so that it can be checked without us, and the check itself.

A bundle is the folder of a version as MLflow keeps it. Beside the model it holds the links of all steps
(``provenance/links.json``), what a second build takes (the code, the lock), a bill of materials, a page for
people, an in-toto statement with SLSA provenance about all of these, ``SHA256SUMS`` as
sha256sum writes it, and, where there is a key, a signature of the whole.
"""

from __future__ import annotations

import gzip
import io
import re
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common import links as surroundings
from components.common.errors import RetortError
from components.common.links import CODE, Link
from components.common.storage import read_json, sha256_file, write_json, write_text
from components.provenance import signing
from components.provenance.chain import Chain, Fault, check, hashes, short

if TYPE_CHECKING:
    from components.common.params import Registry
    from components.step import StepContext

FOLDER = "provenance"
STATEMENT, LINKS, BILL = f"{FOLDER}/statement.json", f"{FOLDER}/links.json", f"{FOLDER}/bom.cdx.json"
ARCHIVE, LOCK = f"{FOLDER}/code.tar.gz", f"{FOLDER}/{surroundings.LOCK}"
PACKAGES = f"{FOLDER}/packages.txt"
SUMS, PAGE = "SHA256SUMS", "README.md"
UNSAID = (STATEMENT, SUMS, signing.SIGNATURE)  # what the statement cannot be about
ADDED = "registered_model_meta"  # what MLflow writes into a version that it downloads: its name and number
ADDED_LINE = re.compile(r"^(model_name: [^\n]*|model_version: '?\d+'?)$")

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:retort:pipeline:v1"
PACKAGED = ("components", "pipelines")
SUFFIXES = (".py", ".json", ".typed")
TEMPLATES = "templates"

DEPENDED = {"ingest": "manifest.parquet", "validate": "clean.parquet", "weights": ".safetensors"}


@dataclass(frozen=True)
class Sealed:
    """``sha256`` is that of ``SHA256SUMS``, and so of the whole; ``signed``: by whom, or empty."""

    sha256: str
    signed: str

    def tags(self) -> dict[str, str]:
        """What a version's tags say of it."""
        return {"bundle.sha256": self.sha256, "bundle.signed": self.signed or "no"}


def seal(folder: Path, run: StepContext, files: Mapping[str, Path]) -> Sealed:
    """Put into ``folder``, which is about to become a version, all that proves it, and sign it.

    Args:
        run: the step that registers it.
        files: where the files of other steps came from, by their names in ``folder``.

    Raises:
        RetortError: when a signature is asked for, and cannot be made or is not by a known key.
    """
    from components.provenance import bill, page
    from components.step import name_of

    registry = run.params.registry
    key = signing.private_key(registry.sign_key)
    if registry.require_signature and key is None:
        raise RetortError(
            "registry.require_signature: there is nothing to sign with; give registry.sign_key, or "
            f"{signing.KEY} in the environment"
        )
    (folder / FOLDER).mkdir()
    write_text(folder / PACKAGES, "".join(f"{one}\n" for one in surroundings.packages()))
    lock = surroundings.lock_file()
    if lock is not None:
        shutil.copyfile(lock, folder / LOCK)
    pack(folder / ARCHIVE)

    own = run.link({})
    links = {**run.before, own.folder: own}
    where = {name: name_of(path) for name, path in files.items()}
    there = hashes(folder, where)
    chain = check(links, {where[name]: digest for name, digest in there.items()}, everything=False)
    for fault in chain.faults[:1]:
        more = f" (and {len(chain.faults) - 1} more)" if len(chain.faults) > 1 else ""
        run.add_finding(
            "registry.lineage", "warning", fault.subject,
            f"the chain of proofs is broken: {fault.message}{more}",
            measured=len(chain.faults), limit=0, advice=fault.advice,
        )  # fmt: skip
    write_json(folder / LINKS, {name: link.model_dump(mode="json") for name, link in links.items()})
    about = page.about(folder, links, run)
    write_text(folder / PAGE, page.render(about))
    write_json(folder / BILL, bill.bill(folder, about))
    names = _names(folder)
    digests = hashes(folder, names)
    write_json(folder / STATEMENT, _statement(links, where, digests, run))
    digests |= hashes(folder, [STATEMENT])
    write_text(folder / SUMS, _sums(digests))
    signed = ""
    if key is not None:
        certificate = Path(registry.sign_certificate) if registry.sign_certificate else None
        signing.sign(folder, key, certificate, ignored=[ADDED])
        trusted = signing.places(registry.trusted_keys)
        if registry.require_signature or trusted:
            signed = signing.verify(folder, trusted)
        else:
            signed = "yes, by a key that nobody here is told to trust"
    return Sealed(sha256_file(folder / SUMS), signed)


def need_signed(what: str, tags: Mapping[str, str], registry: Registry) -> None:
    """Raise RetortError where a version that is there already must be signed, and is not."""
    if registry.require_signature and tags.get("bundle.signed", "no") == "no":
        raise RetortError(
            f"{what}: is not signed, and registry.require_signature asks for that; it was registered before: "
            "train again, or delete the version and register the model anew"
        )


def pack(path: Path) -> None:
    """Write our own code, as it lies here, as a .tar.gz: the same code gives the same bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for package in PACKAGED:
            root = CODE.parent / package
            for file in sorted(root.rglob("*")):
                if not file.is_file() or not (file.suffix in SUFFIXES or file.parent.name == TEMPLATES):
                    continue
                entry = tarfile.TarInfo(file.relative_to(CODE.parent).as_posix())
                entry.size, entry.mode = file.stat().st_size, 0o644
                with file.open("rb") as content:
                    tar.addfile(entry, content)
    path.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))


def _names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _sums(digests: Mapping[str, str]) -> str:
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def _statement(
    links: Mapping[str, Link], where: Mapping[str, str], digests: Mapping[str, str], run: StepContext
) -> dict[str, Any]:
    """The in-toto statement v1 with a predicate of SLSA's provenance v1."""
    own = list(links.values())[-1]
    identity = run.tracker.identity()
    parameters: dict[str, Any] = {}
    for link in links.values():
        parameters |= link.parameters
    steps = [link.model_dump(mode="json", exclude={"read", "left", "parameters"}) for link in links.values()]
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digests[name]}} for name in sorted(digests)],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": parameters,
                "internalParameters": {"steps": steps, "files": dict(where)},
                "resolvedDependencies": _dependencies(links, digests, own),
            },
            "runDetails": {
                "builder": {"id": f"urn:retort:image:{own.image}" if own.image else "urn:retort:local"},
                "metadata": {
                    "invocationId": identity["parent_run_id"] or identity["id"],
                    "startedOn": min(link.started for link in links.values()),
                    "finishedOn": own.finished,
                },
            },
        },
    }


def _dependencies(links: Mapping[str, Link], digests: Mapping[str, str], own: Link) -> list[dict[str, Any]]:
    """What the model was made of: data, start weights, code, lock, images."""
    found: list[dict[str, Any]] = []
    for link in links.values():
        wanted = DEPENDED.get(link.step, "no file")
        found += [
            {"name": name, "digest": {"sha256": digest}, "annotations": {"step": link.step}}
            for name, digest in link.left.items()
            if name.endswith(wanted)
        ]
    code: dict[str, Any] = {"name": ARCHIVE, "digest": {"sha256": digests[ARCHIVE]}}
    if own.code_commit:
        code["digest"]["gitCommit"] = own.code_commit
    found.append(code)
    found += [
        {"name": name, "digest": {"sha256": digests[name]}} for name in (LOCK, PACKAGES) if name in digests
    ]
    images = {link.image for link in links.values() if "@sha256:" in link.image}
    found += [
        {"uri": f"oci://{image}", "digest": {"sha256": image.partition("@sha256:")[2]}}
        for image in sorted(images)
    ]
    return found


# --- the check ---


@dataclass
class Verified:
    """What was found: ``signed`` says by whom; ``unchecked``: there is a signature, and no key was named."""

    folder: Path
    chain: Chain
    statement: dict[str, Any] = field(default_factory=dict)
    signed: str = ""
    unchecked: bool = False
    files: int = 0

    def digest(self) -> str:
        """That of ``SHA256SUMS``, and so of the whole."""
        return sha256_file(self.folder / SUMS)


def is_bundle(folder: Path) -> bool:
    """Whether a folder is, or was, a bundle: one file of it may be gone."""
    return (folder / SUMS).is_file() or (folder / STATEMENT).is_file() or (folder / LINKS).is_file()


def verify(folder: Path, trusted: Sequence[Path] = (), *, required: bool = False) -> Verified:
    """Check a bundle: every byte, each link against the next, and the signature.

    Args:
        trusted: PEM files of keys, and of certificates that may vouch for one.
        required: whether it must be signed by one of them.

    Raises:
        RetortError: naming the first file or link at fault; nothing is written, nobody is asked.
    """
    names = [name for name in _names(folder) if name != ADDED or not _harmless(folder / ADDED)]
    there = hashes(folder, names)
    if len(there) != len(names):
        strange = next(name for name in names if name not in there)
        raise RetortError(f"{folder / strange}: no plain file: a bundle holds nothing else; {signing.ADVICE}")
    signature = folder / signing.SIGNATURE
    # first: where it holds, it is the one witness that nobody else can have written
    signed = signing.verify(folder, trusted) if trusted or required else ""
    statement = _read(folder / STATEMENT, dict)
    subjects = _subjects(folder / STATEMENT, statement)
    said = signing.signed(signature) if signature.exists() else {}
    _agree(folder, there, subjects, said)
    links = _links(folder / LINKS)
    where = statement["predicate"]["buildDefinition"]["internalParameters"]["files"]
    lost = next((name for name in where if name not in there), None)
    if lost is not None:
        raise RetortError(f"{folder / lost}: is missing, and belongs to it; {signing.ADVICE}")
    chain = check(links, {where[name]: there[name] for name in where}, everything=False)
    unknown = next(
        (name for name in where.values() if all(name not in link.left for link in links.values())), None
    )
    faults = list(chain.faults)
    if unknown is not None:
        faults.append(Fault(unknown, "no link says which step left it"))
    if faults:
        raise RetortError(f"{folder / LINKS}: {faults[0]}")
    found = Verified(folder, chain, statement, files=len(names))
    found.signed, found.unchecked = signed, signature.exists() and not signed
    return found


def _harmless(path: Path) -> bool:
    """Whether this is what MLflow notes in a version that it downloads, and nothing else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return len(lines) == 2 and all(ADDED_LINE.match(line) for line in lines)


def _read(path: Path, kind: type) -> Any:
    """A JSON file of ours, in the very form in which it was written."""
    if not path.is_file():
        raise RetortError(f"{path}: no such file: this is no bundle, or a part of one; {signing.ADVICE}")
    content = read_json(path)
    if not isinstance(content, kind):
        raise RetortError(f"{path}: not what was written there; {signing.ADVICE}")
    return content


def _subjects(path: Path, statement: dict[str, Any]) -> dict[str, str]:
    try:
        if statement["_type"] != STATEMENT_TYPE or statement["predicateType"] != PREDICATE_TYPE:
            raise RetortError(
                f"{path}: not an in-toto statement v1 with SLSA's provenance v1; {signing.ADVICE}"
            )
        definition = statement["predicate"]["buildDefinition"]
        if definition["buildType"] != BUILD_TYPE:
            raise RetortError(f"{path}: a build of another kind, {definition['buildType']}; {signing.ADVICE}")
        if not isinstance(definition["internalParameters"]["files"], dict):
            raise KeyError("files")
        return {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    except (KeyError, TypeError) as error:
        raise RetortError(f"{path}: its key {error} is missing or changed; {signing.ADVICE}") from None


def _agree(
    folder: Path, there: Mapping[str, str], subjects: Mapping[str, str], said: Mapping[str, str]
) -> None:
    """Raise RetortError unless files, ``SHA256SUMS``, the statement and the signature say the same.

    They bear witness against each other: where the others agree with a file, it is the witness that changed.
    """
    witnesses = {  # what each says, and what it cannot speak of; the one that is hardest to forge comes first
        signing.SIGNATURE: (said, (signing.SIGNATURE,)),
        SUMS: (_read_sums(folder / SUMS), (SUMS, signing.SIGNATURE)),
        STATEMENT: (subjects, UNSAID),
    }
    if not said:
        del witnesses[signing.SIGNATURE]
    for witness, (claims, silent) in witnesses.items():
        actual = {name: digest for name, digest in there.items() if name not in silent}
        differs = signing.difference(claims, actual)
        if differs is None:
            continue
        name, how = differs
        others = [one for key, (one, unsaid) in witnesses.items() if key != witness and name not in unsaid]
        if any(one.get(name) == there.get(name) for one in others):
            raise RetortError(
                f"{folder / witness}: changed: what it says of {name} is wrong; {signing.ADVICE}"
            )
        or_else = f", or its line in {SUMS} was" if name == STATEMENT and not said else ""
        raise RetortError(f"{folder / name}: {how}{or_else}; {signing.ADVICE}")


def _read_sums(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise RetortError(f"{path}: no such file: this is no bundle, or a part of one; {signing.ADVICE}")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        raise RetortError(f"{path}: changed: not text; {signing.ADVICE}") from None
    sums = {}
    for number, line in enumerate(text.split("\n")[:-1], 1):
        match = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if match is None:
            raise RetortError(f"{path}: line {number}: changed: not as sha256sum writes it; {signing.ADVICE}")
        sums[match[2]] = match[1]
    if _sums(sums) != text:
        raise RetortError(f"{path}: changed: its lines are not those that were written; {signing.ADVICE}")
    return sums


def _links(path: Path) -> dict[str, Link]:
    from pydantic import ValidationError

    try:
        return {name: Link.model_validate(one) for name, one in _read(path, dict).items()}
    except ValidationError as error:
        raise RetortError(
            f"{path}: not links of steps: {error.errors()[0]['msg']}; {signing.ADVICE}"
        ) from None


def describe(links: Sequence[Link]) -> list[str]:
    """A line for each link: the step, its code, and the main thing that it left."""
    lines = []
    for link in links:
        main = _main(link)
        left = f"{main} {short(link.left[main])}" if main else ""
        code = link.code_commit[:7] or f"code {link.code[:7]}"
        read = f"read {len(link.read):>2}, left {len(link.left):>2}"
        lines.append(f"{link.step:<16} {code:<12} {read}  {left}".rstrip())
    return lines


MAIN = {
    "ingest": "manifest.parquet", "validate": "clean.parquet", "weights": "student.safetensors",
    "audit-imbalance": "part.json", "audit-synthetic": "part.json", "plan": "plan.json", "check": "gate.json",
    "finetune": "/model.safetensors", "distill": "/model.safetensors", "export": "model.onnx",
    "benchmark": "choice.json", "register": "registered.json",
}  # fmt: skip


def _main(link: Link) -> str:
    """The main thing that a step left; empty: it left nothing of the kind."""
    wanted = MAIN.get(link.step, "no file")
    return next((name for name in link.left if name.endswith(wanted) and "/control/" not in name), "")

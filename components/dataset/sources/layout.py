"""Classes and splits from the folders that files lie in."""

from __future__ import annotations

import os
from collections import Counter
from urllib.parse import unquote_to_bytes

from components.dataset.params import Data
from components.dataset.sources.found import ALIASES, Found, Row, matcher

Others = Counter[tuple[str, str]]  # files that are no images by their name: see kind


def kind(below: str) -> tuple[str, str]:
    """Of a file that is no image: the folders that may name a split and a class, and its extension."""
    return "/".join(below.split("/")[:-1][:2]), os.path.splitext(below)[1].lower()  # noqa: PTH122


def lay_out(data: Data, found: Found, files: list[tuple[str, str]], no_images: Others) -> None:
    """Rows from (path, path below the source): ``split/class/**`` or ``class/**``."""
    unlabeled = matcher(data.unlabeled)
    tops = {below.split("/", 1)[0] for _, below in files if "/" in below}
    splits = {ALIASES[top.lower()] for top in tops if top.lower() in ALIASES} - {"unlabeled"}
    # a class may be called 'train': it takes a second split, or no other folder, to be a split
    others = {top for top in tops if top.lower() not in ALIASES}
    by_split = "train" in splits and (len(splits) > 1 or not others)
    for path, below in files:
        parts = below.split("/")
        top = ALIASES.get(parts[0].lower()) if len(parts) > 1 else None
        if top == "unlabeled" or (unlabeled and unlabeled.fullmatch(below)):
            found.rows.append(Row(path, below, split="unlabeled"))
        elif by_split and top is None:
            found.rejected.append((path, "it lies in no split's folder"))
        elif len(parts) < (3 if by_split else 2):
            found.rejected.append((path, "it lies in no class's folder"))
        elif by_split:
            found.rows.append(Row(path, below, class_name=_class_name(parts[1]), split=top))
        else:
            found.rows.append(Row(path, below, class_name=_class_name(parts[0])))
    _count_others(found, no_images, by_split)


def _count_others(found: Found, no_images: Others, by_split: bool) -> None:
    """Count the files that are no images, and those of class folders that gave no row."""

    def class_folder(below: str) -> str | None:
        parts = below.split("/", 2)
        top = ALIASES.get(parts[0].lower())
        if not by_split or top == "unlabeled":
            return parts[0]
        return "/".join(parts[:2]) if top and len(parts) > 1 else None

    filled = {class_folder(row.below) for row in found.rows} if no_images else set()
    for (folders, extension), count in no_images.items():
        found.other_files[extension] += count
        folder = class_folder(folders)
        if folder and folder not in filled:
            found.imageless.setdefault(folder, Counter())[extension] += count


def _class_name(folder: str) -> str:
    """A class's name: its folder's, with what is not UTF-8 shown as such."""
    return unquote_to_bytes(folder).decode("utf-8", "backslashreplace") if "%" in folder else folder

"""Slices: parts of the validation images in which a challenger may be worse though it is better in all.

Named ones are the values of each column; those of few images are pooled, so that no image is in none. Others
are searched for on one half of the images, by a tree and by pairs of named ones, and judged on the other
half, so that the search does not fool itself (after Chung et al., "Slice Finder: automated data slicing for
model validation", 2019, and Sagadeeva & Boehm, "SliceLine", 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_IMAGES = 30  # images below which a slice says nothing
EDGES = (0, 0.05, 0.2, 0.4, 0.6, 0.8, 0.95, 1)  # quantiles that cut numbers; what fails is often at an end
FEW_VALUES = 10  # numbers of so few values are names
CLASS = "class"
FOUND = 3  # slices that a search may name in each half
DEPTH = 3  # of its tree
PAIRED = 40  # named slices of which all pairs are tried: those with the most losses
MOST_NAMES = 30  # values of a column of names that the tree is shown


@dataclass(frozen=True)
class Slice:
    """A part of the images.

    Attributes:
        column: 'class', another column's name, or 'found'.
        name: what a person calls it, such as ``brightness 12 to 60``.
        rows: bool [n], the images that it is judged by.
    """

    column: str
    name: str
    rows: NDArray[np.bool_]


def named(columns: Mapping[str, NDArray[Any]]) -> list[Slice]:
    """The slices of each column, of ``MIN_IMAGES`` images or more; what is the same twice is there once.

    Args:
        columns: by name, [n] each; names of classes are the column 'class'. Numbers are cut at the
            quantiles ``EDGES``; missing ones (NaN, None) are in no slice.
    """
    found: list[Slice] = []
    seen: set[bytes] = set()
    for column, values in columns.items():
        for name, rows in _parts(column, values):
            key = np.packbits(rows).tobytes()
            if rows.sum() < MIN_IMAGES or rows.all() or key in seen:
                continue
            seen.add(key)
            found.append(Slice(column, name, rows))
    return found


def _parts(column: str, values: NDArray[Any]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    if values.dtype.kind in "fiu":
        known = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(len(values), bool)
        distinct = np.unique(values[known])
        if len(distinct) > FEW_VALUES:
            edges = np.unique(np.quantile(values[known], EDGES))
            for low, high in pairwise(edges):
                upper = values <= high if high == edges[-1] else values < high
                rows = known & (values >= low) & upper
                yield f"{column} {_number(low)} to {_number(high)}", rows
            return
        values = np.array([_number(value) if value == value else None for value in values], object)
    names, place = np.unique(np.array([_text(value) for value in values]), return_inverse=True)
    counts = np.bincount(place, minlength=len(names))
    for index, name in enumerate(names.tolist()):
        if name and counts[index] >= MIN_IMAGES:
            yield f"{column} '{name}'", place == index
    rare = (counts < MIN_IMAGES) & (names != "")
    if rare.any():
        # together they can be judged: a model must not buy the many with all of the few
        yield f"{column}: {int(rare.sum()):,} values of fewer than {MIN_IMAGES} images", rare[place]


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)


def _number(value: float) -> str:
    return f"{value:.4g}"


def searched(
    columns: Mapping[str, NDArray[Any]],
    value: NDArray[np.float64],
    named_ones: Sequence[Slice],
    groups: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> list[Slice]:
    """Slices in which the challenger seems worse in one half of the images, each with its rows of the other.

    Args:
        columns: as in ``named``.
        value: float [n]: 1 where the challenger alone is right, -1 where the champion alone is, else 0.
        named_ones: pairs of these are tried.
        groups: int64 [n]: a group is in one half.
        seed: of the halves.
    """
    if not (value < 0).any():
        return []
    first = _half(len(value), groups, seed)
    features, names, codes = _features(columns)
    known = {np.packbits(one.rows).tobytes() for one in named_ones}
    found: list[Slice] = []
    for half in (first, ~first):
        candidates = [*_leaves(features, names, codes, value, half), *_pairs(named_ones, value, half)]
        ranked = sorted(candidates, key=lambda one: (-_losses(value, one[1] & half), one[0]))
        best: list[tuple[str, NDArray[np.bool_]]] = []
        for name, rows in ranked:
            enough = rows.sum() >= MIN_IMAGES and (rows & ~half).sum() >= MIN_IMAGES // 2
            key = np.packbits(rows).tobytes()
            if enough and _losses(value, rows & half) > 0 and key not in known:
                known.add(key)
                best.append((name, rows))
            if len(best) == FOUND:
                break
        found += [Slice("found", name, rows & ~half) for name, rows in best]
    return found


def _half(count: int, groups: NDArray[np.int64] | None, seed: int) -> NDArray[np.bool_]:
    units = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    number = int(units.max()) + 1
    order = np.random.default_rng(seed).permutation(number)
    return (order < number / 2)[units]


def _losses(value: NDArray[np.float64], rows: NDArray[np.bool_]) -> float:
    """How far losses exceed gains in a slice, in standard deviations of McNemar's test."""
    lost, won = int((value[rows] < 0).sum()), int((value[rows] > 0).sum())
    return (lost - won) / (lost + won) ** 0.5 if lost + won else 0.0


def _features(columns: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.float64], list[str], list[bool]]:
    """What the tree is shown, float64 [n, F]: numbers as they are, a yes or no for each common name."""
    parts, names, codes = [], [], []
    for column, values in columns.items():
        if values.dtype.kind in "fiu" and len(np.unique(values)) > FEW_VALUES:
            number = values.astype(np.float64)
            parts.append(np.where(np.isnan(number), np.nanmean(number), number))
            names.append(column)
            codes.append(False)
            continue
        texts = np.array([_text(value) for value in values])
        distinct, counts = np.unique(texts, return_counts=True)
        for text in distinct[np.argsort(-counts, kind="stable")][:MOST_NAMES].tolist():
            if text:
                parts.append((texts == text).astype(np.float64))
                names.append(f"{column} '{text}'")
                codes.append(True)
    features = np.stack(parts, axis=1) if parts else np.zeros((len(next(iter(columns.values()))), 0))
    return features, names, codes


def _leaves(
    features: NDArray[np.float64],
    names: list[str],
    codes: list[bool],
    value: NDArray[np.float64],
    half: NDArray[np.bool_],
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """The leaves of a shallow tree that is fitted to one half, over all images."""
    from sklearn.tree import DecisionTreeRegressor

    if not features.shape[1] or half.sum() < 2 * MIN_IMAGES:
        return
    tree = DecisionTreeRegressor(max_depth=DEPTH, min_samples_leaf=MIN_IMAGES // 2, random_state=0)
    fitted = tree.fit(features[half], value[half]).tree_

    def walk(node: int, said: list[str], rows: NDArray[np.bool_]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
        if fitted.children_left[node] == fitted.children_right[node]:
            if said:
                yield ", ".join(said), rows
            return
        feature, limit = int(fitted.feature[node]), float(fitted.threshold[node])
        name, code = names[feature], codes[feature]
        low = features[:, feature] <= limit
        below = f"not {name}" if code else f"{name} up to {_number(limit)}"
        above = name if code else f"{name} above {_number(limit)}"
        yield from walk(fitted.children_left[node], [*said, below], rows & low)
        yield from walk(fitted.children_right[node], [*said, above], rows & ~low)

    yield from walk(0, [], np.ones(len(value), bool))


def _pairs(
    named_ones: Sequence[Slice], value: NDArray[np.float64], half: NDArray[np.bool_]
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """What two named slices of different columns have in common."""
    worst = sorted(named_ones, key=lambda one: (-_losses(value, one.rows & half), one.name))[:PAIRED]
    for one, other in combinations(worst, 2):
        if one.column != other.column:
            yield f"{one.name}, {other.name}", one.rows & other.rows

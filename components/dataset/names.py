"""The names of classes: what stands in ``data.class_names``, and which label each of its lines names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from components.common.errors import FindingsError, RetortError
from components.common.progress import counted
from components.dataset.params import Data
from components.step import StepContext, summary

NUMBERED = re.compile(r"(\d{1,9})(?:\s*[,:;]\s*|\s+)(\S.*)")  # '1 dress', as PaddleClas's label files have it
NO_CLASS = ("background", "ignore", "void")  # what line 1 says where label 0 is no class
SHOWN = 3  # names that a finding repeats


def name_classes(
    run: StepContext, data: Data, given: Mapping[int, str | None], unnumbered: set[str]
) -> dict[int, str]:
    """The names of classes by label; settles the labels of those that come without.

    Class folders are numbered in the order of ``data.class_names``, else in the order of their names.

    Args:
        given: the labels that the source gives, and the name that it gives with each (None: without).
        unnumbered: classes that come without a label.

    Raises:
        FindingsError: labels.names, when it cannot be told which label a line names.
        RetortError: when the file cannot be read, or lacks a class.
    """
    file = Path(data.class_names) if data.class_names else None
    lines = _read(file) if file else []
    if file is None:
        names = dict(enumerate(sorted(unnumbered)))
    elif unnumbered:
        names = _of_folders(run, file, lines, unnumbered)
    elif None in given.values():
        names = _of_labels(run, file, lines, sorted(given), data.remap_labels)
    else:  # the source names every class itself
        names = dict(enumerate(lines))
    if file:
        _say_differences(run, file, names, given)
    for label, name in given.items():
        names[label] = name or names.get(label) or str(label)
    _need_one_line(run, names)
    return names


def numbers(names: Mapping[int, str]) -> dict[str, int]:
    """Labels by name: the lowest, where two are called the same."""
    return {names[label]: label for label in sorted(names, reverse=True)}


def _need_one_line(run: StepContext, names: Mapping[int, str]) -> None:
    """No name breaks a line: labels.txt has one a line, so that all later classes would move down by one."""
    broken = [
        name for name in names.values() if len(name.splitlines()) > 1 or name.splitlines()[:1] != [name]
    ]
    if broken:
        raise _stopped(
            run, "class names",
            f"{counted(len(broken), 'class name')} with a line break, such as {broken[0]!r}: labels.txt has "
            "one name a line, and later classes would get their neighbours' names",
            "Rename the folder, or the class in the list or manifest.",
        )  # fmt: skip


def _read(file: Path) -> list[str]:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RetortError(f"{file}: cannot be read ({error.strerror}); check data.class_names") from None
    except UnicodeDecodeError:
        raise RetortError(f"{file}: not UTF-8 text; save data.class_names as UTF-8") from None
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text)]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise RetortError(f"{file}: no name in this file; data.class_names has one class name a line")
    return lines


def _of_folders(run: StepContext, file: Path, lines: list[str], folders: set[str]) -> dict[int, str]:
    names = dict(enumerate(_plain(run, file, lines)))
    numbered = _numbered(lines)
    ids = [number for number, _ in numbered]
    if len(set(ids)) == len(lines) and not folders <= set(lines):
        names = dict(numbered)
        _say(run, file, "Each line is 'id name'", names, sorted(names))
    if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
        first, second = [place for place, name in enumerate(names.values(), start=1) if name == twice[0]][:2]
        raise RetortError(
            f"{file}: class '{twice[0]}' stands there twice (lines {first} and {second}), so its folder has "
            "no number of its own; give each line another name"
        )
    if unknown := sorted(folders - set(names.values())):
        raise RetortError(f"{file}: class '{unknown[0]}' of the data is not in this file; add it as a line")
    return names


def _of_labels(
    run: StepContext, file: Path, lines: list[str], labels: list[int], remap: bool
) -> dict[int, str]:
    """Which label each line names: there is one reading that fits the data's labels, or the step stops.

    1. ``id name`` in all lines, where the ids are distinct and cover the labels.
    2. Line n names label n, beginning with 0, where that is the same as names in the order of the labels,
       or where there are lines enough and label 0 is in use.
    3. As many names as labels: in the order of the labels, where they are renumbered or have no gaps.
    """
    if (by_id := _by_id(run, file, lines, labels, remap)) is not None:
        return by_id
    names = _plain(run, file, lines)
    by_number = dict(enumerate(names))
    covered = [label for label in labels if label < len(names)]
    beyond = labels[len(covered) :]
    if covered == list(range(min(len(names), len(labels)))):
        if beyond:
            lie = f"{counted(len(beyond), 'label')} {'lies' if len(beyond) == 1 else 'lie'}"
            run.add_finding(
                "labels.names", "warning", str(file),
                f"{counted(len(names), 'class name')}, but {lie} beyond them: {_listed(beyond)}. "
                "Numbers name those.",
                measured=labels[-1] + 1, limit=len(names),
                advice="Check data.class_names: line n names label n, beginning with 0.", row="2.1",
            )  # fmt: skip
        return by_number
    in_order = dict(zip(labels, names, strict=False))
    if len(names) == len(labels):
        if remap:
            _say(run, file, "Names in the order of the labels", in_order, labels)
            return in_order
        if labels[-1] - labels[0] + 1 == len(labels):
            run.add_finding(
                "labels.start", "warning", str(file),
                f"Labels start at {labels[0]}, and there are as many names, so line 1 names label "
                f"{labels[0]}: {_assigned(in_order, labels)}.",
                measured=labels[0], limit=0,
                advice="Look whether that is so; data.remap_labels: true numbers them from 0, without waste.",
                row="2.1",
            )  # fmt: skip
            return in_order
    elif not beyond and (labels[0] == 0 or names[0].strip("_ ").lower() in NO_CLASS):
        return by_number
    raise _unclear(run, file, names, labels, beyond)


def _by_id(
    run: StepContext, file: Path, lines: list[str], labels: list[int], remap: bool
) -> dict[int, str] | None:
    """Names by the ids that the lines begin with; None where the numbers are part of the names."""
    filled = [(place, line) for place, line in enumerate(lines, start=1) if line]
    numbered = _numbered(lines)
    ids = [number for number, _ in numbered]
    names = dict(reversed(numbered))  # the first of two
    if len(numbered) < len(filled) - 1 or (len(numbered) > 1 and len(set(names.values())) == 1):
        return None  # '1 euro', '2 euro': without the number they would all be called the same
    distinct, known = len(names) == len(numbered), len(names.keys() & set(labels))
    if len(numbered) < len(filled):  # a heading, perhaps: no class's name in an otherwise numbered list
        if distinct and known == len(labels):
            place, odd = next((place, line) for place, line in filled if not NUMBERED.fullmatch(line))
            raise _stopped(
                run, file, f"Line {place} ('{_short(odd)}') is not 'id name', as all the others are",
                "Give it an id, or take it out of data.class_names.",
            )  # fmt: skip
        return None
    if distinct and known == len(labels):
        _say(run, file, "Each line is 'id name'", names, labels)
        return names
    if distinct and remap and sorted(ids) == list(range(len(labels))):
        by_new = {label: names[new] for new, label in enumerate(labels)}
        _say(run, file, "Each line is 'id name', with ids as data.remap_labels makes them", by_new, labels)
        return by_new
    # most labels are among the numbers, so these are ids, and not part of names such as '7 up'
    if distinct and 2 * known >= len(labels):
        lost = [label for label in labels if label not in names]
        raise _stopped(
            run, file,
            f"Its lines begin with the numbers {_listed(sorted(ids))}, but the data has "
            f"{'label' if len(lost) == 1 else 'labels'} {_listed(lost)} too",
            "Begin each line of data.class_names with the label that it names, or take the numbers out.",
        )  # fmt: skip
    if not distinct and 2 * known > len(labels):
        twice = next(number for number, count in Counter(ids).items() if count > 1)
        places = [place for place, (number, _) in enumerate(numbered, start=1) if number == twice][:2]
        raise _stopped(
            run, file,
            f"Its lines begin with numbers, and {twice} stands there twice (lines {places[0]} and "
            f"{places[1]})",
            "Give each label one line in data.class_names.",
        )  # fmt: skip
    return None


def _numbered(lines: Sequence[str]) -> list[tuple[int, str]]:
    found = (NUMBERED.fullmatch(line) for line in lines)
    return [(int(match[1]), match[2]) for match in found if match]


def _plain(run: StepContext, file: Path, lines: list[str]) -> list[str]:
    if "" in lines:
        raise _stopped(
            run, file,
            f"Line {lines.index('') + 1} is empty, so it is not clear which label the next ones name",
            "Take it out of data.class_names, or name the class.",
        )  # fmt: skip
    return lines


def _unclear(
    run: StepContext, file: Path, names: list[str], labels: list[int], beyond: list[int]
) -> FindingsError:
    some = (
        f"{counted(len(names), 'name')}, one a line, and {counted(len(labels), 'label')} ({_listed(labels)})"
    )
    ways = "Write each line of data.class_names as 'label name', such as "
    ways += f"'{labels[0]} {_short(names[0])}'"
    if len(names) == len(labels):
        return _stopped(
            run, file,
            f"{some}: line n names label n, beginning with 0, which leaves {_listed(beyond)} without a name; "
            "or do they stand in the order of the labels?",
            f"For that, set data.remap_labels: true. Else: {ways[0].lower()}{ways[1:]}.",
        )  # fmt: skip
    if beyond:
        return _stopped(
            run, file, f"{some}: the counts do not match, and names would go to wrong labels",
            f"{ways}; or name exactly these labels in their order, with data.remap_labels: true.",
        )  # fmt: skip
    return _stopped(
        run, file,
        f"{some}: does line 1 name label 0, which is not in the data, or label 1? Label {labels[0]} would be "
        f"'{_short(names[labels[0]])}' or '{_short(names[labels[0] - 1])}'",
        f"{ways}; or name exactly these labels in their order, with data.remap_labels: true.",
    )  # fmt: skip


def _stopped(run: StepContext, file: Path | str, what: str, advice: str) -> FindingsError:
    """Names that stand at the wrong labels look like any others: no way around it."""
    run.add_finding(
        "labels.names", "error", str(file), f"{file}: {what}{'' if what.endswith('?') else '.'}",
        advice=advice, row="2.1", waivable=False,
    )  # fmt: skip
    return FindingsError(summary(run.report, run.out))


def _say(run: StepContext, file: Path, reading: str, names: Mapping[int, str], labels: Sequence[int]) -> None:
    run.add_finding(
        "labels.names", "info", str(file), f"{reading}: {_assigned(names, labels)}.",
        measured=len(names), row="2.1",
    )  # fmt: skip


def _say_differences(
    run: StepContext, file: Path, names: Mapping[int, str], given: Mapping[int, str | None]
) -> None:
    other = [label for label, name in given.items() if name and names.get(label, name) != name]
    if other:
        run.add_finding(
            "labels.names", "warning", str(file),
            f"{counted(len(other), 'label')} go by another name in the data, such as {other[0]}: "
            f"'{given[other[0]]}' there, '{names[other[0]]}' in this file. The data's own names stay.",
            measured=len(other), limit=0, advice="Check data.class_names, or leave it out.", row="2.1",
        )  # fmt: skip


def _assigned(names: Mapping[int, str], labels: Sequence[int]) -> str:
    shown = ", ".join(f"label {label} is '{_short(names[label])}'" for label in labels[:SHOWN])
    return shown + (", ..." if len(labels) > SHOWN else "")


def _listed(labels: Sequence[int]) -> str:
    return f"{', '.join(map(str, labels[:5]))}{', ...' if len(labels) > 5 else ''}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"

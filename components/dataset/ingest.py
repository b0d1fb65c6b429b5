"""The step ``ingest``: whatever ``data.source`` is becomes one manifest, the same bytes each time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from components.common.errors import RetortError
from components.common.progress import counted
from components.common.sheet import write_csv
from components.common.storage import write_json
from components.dataset import manifest as manifests
from components.dataset import places, report, sources
from components.dataset.images import NOT_READ
from components.dataset.names import name_classes, numbers
from components.dataset.params import Data, IngestParams
from components.dataset.rows import correct, finished, in_order
from components.dataset.sources.found import Found
from components.dataset.survey import RowRules, Survey, real_groups, surveyed
from components.dataset.tally import Tally
from components.step import StepContext, step


def ingest(params: IngestParams, *, manifest: Path, out: Path) -> None:
    """Read ``data.source`` and write ``manifest``.

    The rows pass twice, a portion at a time, so that memory does not grow with them: once to learn what
    the data as a whole says (classes, splits), once to be written.

    Raises:
        RetortError: when there is nothing to read, or fewer than two classes.
    """
    data = params.data
    inputs = [Path(path) for path in _files_read(data)]
    with step("ingest", params, out, inputs, products=[manifest]) as run:
        found = sources.read(params)
        rules = RowRules(data)
        survey = surveyed(found, rules)
        if found.listed:
            places.check_lists(run, data, found)
        names = name_classes(run, data, survey.named, survey.unnumbered)
        order = numbers(names)
        survey.labels |= {order[name] for name in survey.classes}
        correct(run, survey, rules, names)
        _report_rejected(run, found, out)
        _need_classes(run, survey, names, found)
        if data.remap_labels:
            old = sorted(label for label in survey.labels if label >= 0)
            rules.remapped = {label: new for new, label in enumerate(old)}
            mapping = {str(old): new for old, new in rules.remapped.items()}
            write_json(run.product(out / "label_map.json"), mapping)
        tally = Tally(real_groups=real_groups(found, rules, survey))
        staged = run.product(manifest)
        rows = finished(found, rules, survey, names, tally)
        manifests.write_all(rows if survey.in_order else in_order(rows), staged)
        _report_splits(run, tally, out)
        _say(run, tally, len(survey.labels), staged)


def _files_read(data: Data) -> list[str]:
    listed = list(data.source.values()) if isinstance(data.source, dict) else [data.source]
    return [*listed, *filter(None, [data.class_names, data.corrections])]


def _report_splits(run: StepContext, tally: Tally, out: Path) -> None:
    moved, counts = tally.moved, tally.by_split()
    if held := tally.held_out:
        write_csv(out / "held_out.csv", ([path] for path in held))
        run.add_finding(
            "ingest.synthetic", "warning", "; ".join(held[:3]),
            f"{counted(len(held), 'synthetic image is no row', 'synthetic images are no rows')} of "
            "the manifest: real images of their groups are in validation or test. All of them: held_out.csv.",
            measured=len(held), limit=0,
            advice="They would be of use if their originals trained; data.group says what belongs together.",
            row="4.1",
        )  # fmt: skip
    if moved:
        run.add_finding(
            "ingest.synthetic", "warning", "validation and test",
            f"{counted(moved, 'synthetic image')} stood in validation or test, and "
            f"{'is' if moved == 1 else 'are'} for training now.",
            measured=moved, limit=0, advice="Only real images can say how good a classifier is.", row="4.1",
        )  # fmt: skip
    if anew := tally.hashed_anew:
        run.add_finding(
            "ingest.sha256", "warning", "; ".join(anew[:3]),
            f"{counted(len(anew), 'row')} came with something in column sha256 that is none in "
            "hexadecimal; it was worked out from the images.",
            measured=len(anew), limit=0, advice="Leave the column out, or see what wrote it.",
        )  # fmt: skip
    if lost := tally.missing:
        run.add_finding(
            "ingest.images", "warning", "; ".join(path for path, _ in lost[:3]),
            f"{counted(len(lost), 'image')} cannot be opened: "
            f"{lost[0][1]}{'; and others' if len(lost) > 1 else ''}.",
            measured=len(lost), limit=0,
            advice="validate puts them aside, and lists them; check the list and data.root.",
        )  # fmt: skip
    if not counts["val"]:
        run.add_finding(
            "ingest.splits", "error", "split 'val'", "No image is for validation.", measured=0, limit=1,
            advice="Add images, name a split 'val', or raise data.splits.val.",
        )  # fmt: skip
    if not counts["train"]:
        run.add_finding(
            "ingest.splits", "error", "split 'train'", "No image is for training.", measured=0, limit=1,
            advice="Add images, or lower data.splits.val and data.splits.test.",
        )  # fmt: skip
    if not counts["test"]:
        run.add_finding(
            "ingest.splits", "info", "split 'test'",
            "The source has no test split: accuracy is known on validation alone, which decisions look at.",
        )  # fmt: skip


def _report_rejected(run: StepContext, found: Found, out: Path) -> None:
    unread = Counter({kind: count for kind, count in found.other_files.items() if kind in NOT_READ})
    if unread:
        run.add_finding(
            "ingest.other_files", "warning", ", ".join(unread),
            f"{counted(unread.total(), 'image is', 'images are')} left out, "
            f"in formats that are not read: {_kinds(unread)}.",
            measured=unread.total(), limit=0,
            advice="Convert them to JPEG or PNG, and ingest again.",
        )  # fmt: skip
    if others := found.other_files - unread:
        run.add_finding(
            "ingest.other_files", "info", "files",
            f"{counted(others.total(), 'file is no image by its', 'files are no images by their')} name: "
            f"{_kinds(others)}.",
            measured=others.total(),
        )  # fmt: skip
    if found.imageless:
        run.add_finding(
            "ingest.other_files", "warning", "; ".join(list(found.imageless)[:3]),
            counted(
                len(found.imageless), "folder that should name a class holds files, but gives no image: ",
                "folders that should name a class hold files, but give no image: ",
            )
            + "; ".join(f"'{name}': {_kinds(kinds)}" for name, kinds in list(found.imageless.items())[:3])
            + ".",
            measured=len(found.imageless), limit=0,
            advice="Convert their images to JPEG or PNG, or move the folders out of the source.",
        )  # fmt: skip
    if not found.rejected:
        return
    reasons = Counter(why for _, why in found.rejected).most_common()
    write_csv(out / "rejected.csv", found.rejected)
    run.add_finding(
        "ingest.rejected", "warning", "; ".join(where for where, _ in found.rejected[:3]),
        counted(
            len(found.rejected), "entry of the source is no row of the manifest: ",
            "entries of the source are no rows of the manifest: ",
        )
        + "; ".join(f"{why} ({count:,})" for why, count in reasons[:5])
        + ". All of them: rejected.csv.",
        measured=len(found.rejected), limit=0, advice="Mend these entries, or leave them out.", row="2.1",
    )  # fmt: skip
    report.show_rejected(run.page, found.rejected)


def _kinds(extensions: Counter[str]) -> str:
    """The commonest five."""
    return ", ".join(f"{name or 'without one'} ({count:,})" for name, count in extensions.most_common(5))


def _need_classes(run: StepContext, survey: Survey, names: dict[int, str], found: Found) -> None:
    if len(survey.labels) >= 2:
        return
    source = run.params.model_dump()["data"]["source"]
    if not survey.rows:
        where, why = found.rejected[0]
        raise RetortError(
            f"{source}: none of {counted(len(found.rejected), 'entry', 'entries')} can be used: "
            f"{where}: {why}"
        )
    only = next((f"'{names[label]}'" for label in survey.labels), "none")
    raise RetortError(
        f"{source}: a classifier needs at least two classes, found {len(survey.labels)} ({only}); "
        "expected class/image.jpg or split/class/image.jpg"
    )


def _say(run: StepContext, tally: Tally, classes: int, file: Path) -> None:
    """Headline numbers: rows by split and source, and the data fingerprint."""
    fingerprint = manifests.fingerprint(file)
    rows, by_split = tally.rows.total(), tally.by_split()
    run.add_finding(
        "ingest.rows", "info", "manifest",
        f"{counted(rows, 'image')} of {counted(classes, 'class', 'classes')}; "
        f"data fingerprint {fingerprint[:12]}.",
        measured=rows,
    )  # fmt: skip
    report.show_splits(run.page, tally)
    run.tracker.summary({"rows": rows, "classes": classes})
    run.tracker.dataset("manifest", fingerprint, file, dict(by_split))

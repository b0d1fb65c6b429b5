"""The step ``audit synthetic``: do synthetic images flood, help or harm, and which labels are suspect."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.audit import show
from components.audit.counts import SOURCES, Counts, count
from components.audit.features import Backbone, Features, extract, gradients, shaken
from components.audit.params import AuditParams
from components.audit.part import FILE, LeftOut, SyntheticPart
from components.audit.probe import Calibration, Discriminant, Folded, Moments, standardised
from components.common.findings import Level
from components.common.step import Run, step
from components.common.storage import need, write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORST = 10  # classes or files that a report names one by one
MOST_CLASSES = 2_000  # beyond it a probe has too few images a class to say anything
COPIES = 4  # shaken copies of each real image
DROP = 0.03  # of recall: a smaller loss is no degradation, however sure
SURE = 0.01  # chance of naming any class that did not degrade
SURELY = 2.326  # standard deviations: 99 in 100, one-sided
TOLD_APART = 0.8  # AUC from which a domain gap is named
FEW = 0.005  # share of suspect labels up to which they are a note, not a warning
LEAST = 0.1  # weight of synthetic images that nobody recognises
HARM = 0.5  # weight of synthetic images in a class that degrades by them
PAIRS = 10  # images of each kind that a domain gap needs


@dataclass(frozen=True)
class Rows:
    """The images that the probe looks at; ``place`` is the position of a row's class in ``Counts``."""

    path: list[str]
    place: NDArray[np.int64]
    split: NDArray[np.object_]
    source: NDArray[np.object_]
    vectors: NDArray[np.float32]  # standardised
    small: NDArray[np.uint8]

    @property
    def real(self) -> NDArray[np.bool_]:
        return self.source == "real"


@dataclass(frozen=True)
class Sample:
    """One file that a person should look at; ``suggested`` is the label that the probe would give it."""

    rule: str  # labels.suspect, synthetic.recognisable or hard
    path: str
    label: int
    class_name: str
    split: str
    source: str
    suggested: str
    probability: float  # of the given label, 0..1


@dataclass
class Class:
    """What was measured of a class with synthetic or semi-synthetic images; shares 0..1, None: not known."""

    place: int
    made: int
    to_median: float
    blown_up: bool
    looked_at: int = 0
    recognised: float | None = None
    unrecognisable: bool = False
    weight: float = 1.0  # of its synthetic images in the plan
    real_recall: float | None = None  # without synthetic images, out of fold
    with_made: float | None = None  # with them
    degraded: bool = False
    auc: float | None = None


def audit_synthetic(params: AuditParams, *, manifest: Path, features: Path, out: Path) -> None:
    """Apply the three rules for synthetic images, and look for suspect labels among the real ones.

    Beside the report: ``part.json`` (for the plan), ``classes.parquet`` (each class with synthetic images),
    ``samples.parquet`` (suspect labels, unrecognised and hard images by file) and, when labels are suspect,
    ``proposed_corrections.csv``, which a person may edit and give to ``data.corrections``.

    Args:
        features: the backbone ``features.onnx``.

    Raises:
        RetortError: a file is missing or damaged, or a store cannot be reached.
    """
    need(manifest, "validate")
    need(features, "weights")
    inputs = {"data/clean.parquet": manifest, "outputs/weights/features.onnx": features}
    with step("audit-synthetic", params, out, inputs) as run:
        counts = count(manifest)
        classes = _blow_up(run, counts, params.audit.blow_up)
        rows = _look(run, params, manifest, features, counts)
        samples: list[Sample] = []
        if rows is not None:
            samples = _probe(run, params, counts, rows, classes)
        _same_order(run, counts, classes)
        _write(run, params, out, counts, classes, samples)


def _blow_up(run: Run, counts: Counts, limit: float) -> list[Class]:
    """Rule 1. Every class with synthetic images; ``synthetic.blow_up`` for those that they blow up."""
    total, made = counts.total, counts.made
    ordered = np.sort(total[total > 0])
    classes = []
    for c in np.flatnonzero(made).tolist():
        to_median = made[c] / max(_median_without(ordered, int(total[c])), 1.0)
        classes.append(Class(c, int(made[c]), float(to_median), bool(to_median > limit)))
    blown = sorted((one for one in classes if one.blown_up), key=lambda one: (-one.to_median, one.place))
    for one in blown[:WORST]:
        run.find(
            "synthetic.blow_up", "warning", f"class '{counts.names[one.place]}'",
            f"{one.made:,} synthetic images beside {counts.train[one.place, 0]:,} real ones are "
            f"{one.to_median:.1f} x the median size of the other classes.",
            measured=one.to_median, limit=limit,
            advice="The plan gives its synthetic images less weight (sampling.by_source).", row="4.1",
        )  # fmt: skip
    _rest(run, "synthetic.blow_up", "warning", len(blown), "classes are blown up by synthesis")
    return classes


def _median_without(ordered: NDArray[np.int64], size: int) -> float:
    """The median of ascending sizes, one entry of value ``size`` left out; 0 when nothing else is there."""
    place = int(np.searchsorted(ordered, size))
    n = len(ordered) - 1
    if n < 1:
        return 0.0
    low, high = ((n - 1) // 2, n // 2)
    return float(ordered[low + (low >= place)] + ordered[high + (high >= place)]) / 2


def _rest(run: Run, rule: str, level: Level, count: int, what: str) -> None:
    """Beyond WORST subjects: how many there are, and where all of them stand."""
    if count > WORST:
        run.find(
            rule, level, f"{count:,} classes",
            f"{count:,} {what}: {WORST} are named, all of them stand in classes.parquet.",
            measured=count, row="4.1",
        )  # fmt: skip


def _look(run: Run, params: AuditParams, manifest: Path, features: Path, counts: Counts) -> Rows | None:
    """The images that the probe looks at; None, and an info that says why, when it cannot."""
    if len(counts.labels) > MOST_CLASSES:
        return _skipped(
            run, f"there are {len(counts.labels):,} classes, and it tells at most {MOST_CLASSES:,} apart"
        )
    table = select(manifest, params.audit.probe_images)
    total = counts.train.sum() + counts.val.sum() + counts.test.sum()
    paths, hashes = table["path"].to_pylist(), table["sha256"].to_pylist()
    if any("://" in path and digest is None for path, digest in zip(paths, hashes, strict=True)):
        return _skipped(run, "remote images have no hashes, so each run would fetch them anew")
    found: Features = extract(Backbone(features), params.data.root, paths, hashes)
    if not found.readable.any():
        return _skipped(
            run, f"none of {len(paths):,} images below data.root ({params.data.root}) can be read"
        )
    keep = found.readable
    unread = int((~keep).sum())
    if len(paths) < total or unread:
        run.find(
            "synthetic.probe", "info", "images",
            f"The probe looked at {len(paths) - unread:,} of {total:,} labelled images"
            + (f" (audit.probe_images: {params.audit.probe_images:,}), evenly over the classes"
               if len(paths) < total else "") + (f"; {unread:,} could not be read" if unread else "") + ".",
            measured=len(paths) - unread, limit=int(total), row="4.1",
        )  # fmt: skip
    table = table.filter(pa.array(keep))
    split, source = (table[name].to_numpy(zero_copy_only=False) for name in ("split", "source"))
    by = (source == "real") & (split == "train")
    if not by.any():
        return _skipped(run, "no real training image can be read")
    vectors = np.hstack([standardised(block[keep], by) for block in (found.deep, gradients(found.small))])
    place = np.searchsorted(counts.labels, table["label"].to_numpy())
    return Rows(table["path"].to_pylist(), place, split, source, vectors, found.small[keep])


def _skipped(run: Run, why: str) -> None:
    run.find(
        "synthetic.probe", "info", "probe",
        f"The probe was skipped: {why}. Recognisability, degradation, domain gap and suspect labels are not known.",
        row="4.1",
    )  # fmt: skip


def select(manifest: Path, limit: int) -> pa.Table:
    """Labelled rows (path, label, split, source, sha256), in the manifest's order: all, or about ``limit``.

    Of every class, split and source the same number is taken, as far as it has so many; which ones follows
    from the paths alone.
    """
    import duckdb

    with duckdb.connect() as db:
        db.execute("set enable_progress_bar = false")
        source = str(manifest).replace("'", "''")
        db.execute(
            "create view m as select file_row_number as row, path, label, split, source, sha256 "  # noqa: S608
            f"from read_parquet('{source}', file_row_number = true) where split <> 'unlabeled' and label >= 0"
        )
        sizes = np.array(db.execute("select count(*) from m group by label, split, source").fetchall())[:, 0]
        share = "true"
        if sizes.sum() > limit:
            low, high = 1, int(sizes.max())
            while low < high:  # the largest share of a group that keeps to the limit
                middle = (low + high + 1) // 2
                low, high = (middle, high) if np.minimum(sizes, middle).sum() <= limit else (low, middle - 1)
            share = f"row_number() over (partition by label, split, source order by md5(path), row) <= {low}"
        return db.sql(
            f"select path, label, split, source, sha256 from m qualify {share} order by row"  # noqa: S608
            if share != "true"
            else "select path, label, split, source, sha256 from m order by row"
        ).to_arrow_table()


def _probe(run: Run, params: AuditParams, counts: Counts, rows: Rows, classes: list[Class]) -> list[Sample]:
    """Everything that takes features; fills ``classes``, and returns the files to look at."""
    real = np.flatnonzero(rows.real)
    judged = Folded(rows.vectors[real], rows.place[real], len(counts.labels), params.general.seed)
    shrinkage, scores, calibration = judged.best()
    samples = _suspects(run, counts, rows, real, scores, calibration)
    run.tracker.summary({"probe_top1": float((scores.argmax(axis=1) == rows.place[real]).mean())})
    if classes:
        samples += _recognisable(run, params, counts, rows, classes, shrinkage)
        _weigh(counts, classes)
        _degradation(run, params.general.seed, counts, rows, classes, shrinkage)
        _domain_gap(run, counts, rows, classes, shrinkage)
    else:
        run.find(
            "synthetic.none", "info", "images",
            "There are no synthetic images: only suspect labels were looked for.", measured=0, row="4.1",
        )  # fmt: skip
    return samples


def _suspects(
    run: Run, counts: Counts, rows: Rows, real: NDArray[np.int64], scores: NDArray[np.float64],
    calibration: Calibration,
) -> list[Sample]:  # fmt: skip
    """``labels.suspect``: real images whose given label is rather wrong than right; hard ones beside them.

    Ranked by cleanlab's self-confidence on calibrated out-of-fold probabilities; the limit follows from
    how many wrong labels make all labels most likely, so that clean data have none.
    """
    from cleanlab.rank import get_label_quality_scores

    probabilities = calibration.probabilities(scores)
    given = rows.place[real]
    there, given_there = np.unique(given, return_inverse=True)
    quality = get_label_quality_scores(
        given_there, _normalised(probabilities[:, there]), method="self_confidence", adjust_pred_probs=False
    )
    best = probabilities.argmax(axis=1)
    wrong = best != given
    suspect = wrong & (quality < calibration.suspect_below)
    order = np.argsort(quality, kind="stable")
    samples = [
        _sample(
            "labels.suspect" if suspect[i] else "hard", counts, rows, int(real[i]), int(best[i]), quality[i]
        )
        for i in order[wrong[order]]
    ]
    found = [sample for sample in samples if sample.rule == "labels.suspect"]
    if not found:
        run.find(
            "labels.suspect", "info", "labels",
            f"No label of {len(real):,} real images is suspect (the probe recognises {1 - wrong.mean():.1%} of "
            f"them); the {int(wrong.sum()):,} it takes for another class are in samples.parquet.",
            measured=0, limit=0, row="4.1",
        )  # fmt: skip
        return samples
    share = len(found) / len(real)
    shown = "; ".join(f"{one.path} ({one.class_name}, rather {one.suggested})" for one in found[:3])
    run.find(
        "labels.suspect", "warning" if share > FEW else "info", ", ".join(one.path for one in found[:WORST]),
        f"{len(found):,} of {len(real):,} real images ({share:.1%}) are rather of another class than their label "
        f"says: {shown}{'; ...' if len(found) > 3 else ''}. All of them: samples.parquet.",
        measured=len(found), limit=0,
        advice="Look at them; proposed_corrections.csv, edited, is what data.corrections reads. "
        "audit.drop_suspects: true leaves them out of training.",
        row="4.1",
    )  # fmt: skip
    return samples


def _normalised(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    return probabilities / probabilities.sum(axis=1, keepdims=True)


def _sample(rule: str, counts: Counts, rows: Rows, row: int, suggested: int, probability: float) -> Sample:
    place = int(rows.place[row])
    return Sample(
        rule, rows.path[row], int(counts.labels[place]), counts.names[place], rows.split[row],
        rows.source[row], counts.names[suggested], round(float(probability), 6),
    )  # fmt: skip


def _recognisable(
    run: Run, params: AuditParams, counts: Counts, rows: Rows, classes: list[Class], shrinkage: float
) -> list[Sample]:
    """Rule 2: does anything that knows only real images recognise a class's synthetic ones?

    Two discriminants look: one at backbone and gradients, one at the gradients of shaken copies of the real
    images (few real images of a class show few of its shapes). An image that either recognises counts.
    """
    number, limit = len(counts.labels), params.audit.recognisable_recall
    learnt = rows.real & (rows.split == "train")
    made = np.flatnonzero(~rows.real)
    plain = Discriminant(Moments.of(rows.vectors[learnt], rows.place[learnt], number), shrinkage)
    scores = plain(rows.vectors[made])
    told = [scores.argmax(axis=1)]
    copies = np.concatenate([rows.small[learnt], shaken(rows.small[learnt], COPIES, params.general.seed)])
    places = np.concatenate([rows.place[learnt], np.repeat(rows.place[learnt], COPIES)])
    lines = gradients(copies)
    both = standardised(
        np.concatenate([lines, gradients(rows.small[made])]), np.arange(len(lines) + len(made)) < len(lines)
    )
    told.append(
        Discriminant(Moments.of(both[: len(lines)], places, number), shrinkage)(both[len(lines) :]).argmax(
            axis=1
        )
    )
    right = (told[0] == rows.place[made]) | (told[1] == rows.place[made])
    known = np.bincount(rows.place[learnt], minlength=number) > 0
    samples = []
    for one in classes:
        mine = np.flatnonzero(rows.place[made] == one.place)
        one.looked_at = len(mine)
        if not len(mine) or not known[one.place]:
            continue
        hits = int(right[mine].sum())
        one.recognised = hits / len(mine)
        one.unrecognisable = _upper(hits, len(mine)) < limit
        if one.unrecognisable:
            samples += [
                _sample("synthetic.recognisable", counts, rows, int(made[i]), int(told[0][i]), 0.0)
                for i in mine[~right[mine]]
            ]
    named = sorted(
        (one for one in classes if one.unrecognisable), key=lambda one: (one.recognised, one.place)
    )
    for one in named[:WORST]:
        assert one.recognised is not None
        taken = np.bincount(told[0][(rows.place[made] == one.place) & ~right], minlength=number)
        run.find(
            "synthetic.recognisable", "warning", f"class '{counts.names[one.place]}'",
            f"A classifier of real images recognises {one.recognised:.0%} of {one.looked_at:,} synthetic images "
            f"(of the others it takes most for '{counts.names[int(taken.argmax())]}').",
            measured=one.recognised, limit=limit,
            advice="Look at them (contact sheet, samples.parquet) and make better ones. The plan gives them less "
            "weight; audit.drop_suspects: true leaves the unrecognised ones out.",
            row="4.1",
        )  # fmt: skip
    _rest(
        run,
        "synthetic.recognisable",
        "warning",
        len(named),
        "classes have synthetic images that are not recognised",
    )
    return samples


def _upper(hits: int, count: int) -> float:
    """Upper limit of a share, one-sided 99 % (Wilson, 1927)."""
    share, z = hits / count, SURELY
    middle = share + z * z / (2 * count)
    return float(
        (middle + z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))) / (1 + z * z / count)
    )


def _weigh(counts: Counts, classes: list[Class]) -> None:
    """The weight of each class's synthetic images beside its real ones.

    Blown up: together as much as fills the class up to the median of the others, or as its real images
    weigh, whichever is more. Not recognised: by the share that is.
    """
    total = counts.total
    ordered = np.sort(total[total > 0])
    for one in classes:
        if one.blown_up:
            median = _median_without(ordered, int(total[one.place]))
            real = float(counts.train[one.place, 0])
            one.weight = min(max(median - real, min(real, median), 1.0) / one.made, 1.0)
        if one.unrecognisable:
            one.weight *= max(one.recognised or 0.0, LEAST)


def _degradation(
    run: Run, seed: int, counts: Counts, rows: Rows, classes: list[Class], shrinkage: float
) -> None:
    """Rule 3: classes whose real held-out images are recognised less often with synthetic images than without.

    The same folds of real images (training and validation), judged once by what learnt from real images
    alone and once by what learnt from the synthetic ones too, as the plan would weigh them. Named when an
    exact McNemar test is sure of it among all classes (Holm), and more than DROP of recall is lost.
    """
    from scipy.stats import binomtest

    number = len(counts.labels)
    real = np.flatnonzero(rows.real & (rows.split != "test"))
    place = rows.place[real]
    judged = Folded(rows.vectors[real], place, number, seed)
    before = judged.scores(shrinkage).argmax(axis=1) == place
    made = np.flatnonzero(~rows.real)
    added: Moments | None = None
    for one in classes:
        mine = made[rows.place[made] == one.place]
        if len(mine):
            learnt = int((rows.real & (rows.split == "train") & (rows.place == one.place)).sum())
            sampled = counts.train[one.place, 0] / max(learnt, 1) if learnt else 1.0
            weight = one.weight * one.made / len(mine) / max(sampled, 1.0)
            moments = Moments.of(rows.vectors[mine], rows.place[mine], number) * weight
            added = moments if added is None else added + moments
    if added is None:
        return
    told = judged.scores(shrinkage, added).argmax(axis=1)
    after = told == place
    by_place = {one.place: one for one in classes}
    tests = []
    for c in np.unique(place).tolist():
        mine = place == c
        lost, won = int((before & ~after)[mine].sum()), int((~before & after)[mine].sum())
        if c in by_place:
            by_place[c].real_recall, by_place[c].with_made = (
                float(before[mine].mean()),
                float(after[mine].mean()),
            )
        chance = binomtest(lost, lost + won, alternative="greater").pvalue if lost > won else 1.0
        tests.append((chance, c, float(before[mine].mean()), float(after[mine].mean())))
    named = []
    for rank, (chance, c, recall, with_made) in enumerate(sorted(tests)):
        if chance * (len(tests) - rank) > SURE:  # Holm's step-down: from here on nothing is sure
            break
        if recall - with_made > DROP:
            named.append((recall - with_made, c, recall, with_made, chance))
    named.sort(key=lambda one: (-one[0], one[1]))
    for _, c, recall, with_made, chance in named[:WORST]:
        taken = np.bincount(told[(place == c) & before & ~after], minlength=number)
        culprit = int(taken.argmax())
        if c in by_place:
            by_place[c].degraded = True
            by_place[c].weight *= HARM
        run.find(
            "synthetic.degradation", "warning", f"class '{counts.names[c]}'",
            f"Recall of its real held-out images falls from {recall:.1%} to {with_made:.1%} when synthetic images "
            f"are added (McNemar, p = {chance:.1g}); most of the lost ones are taken for '{counts.names[culprit]}'.",
            measured=with_made, limit=recall,
            advice="Look for noise and hard samples in the synthetic images of both classes (samples.parquet), or "
            "raise this class's weight (audit.distribution).",
            row="4.1",
        )  # fmt: skip
    _rest(
        run, "synthetic.degradation", "warning", len(named), "classes degrade when synthetic images are added"
    )


def _domain_gap(run: Run, counts: Counts, rows: Rows, classes: list[Class], shrinkage: float) -> None:
    """``synthetic.domain_gap``: how well real and synthetic images of a class are told apart, out of fold."""
    from sklearn.metrics import roc_auc_score

    trained = rows.split == "train"
    named = []
    for one in classes:
        mine = np.flatnonzero(trained & (rows.place == one.place))
        is_made = (~rows.real[mine]).astype(np.int64)
        if min(is_made.sum(), (1 - is_made).sum()) < PAIRS:
            continue
        scores = Folded(rows.vectors[mine], is_made, 2, 0).scores(shrinkage)
        one.auc = float(roc_auc_score(is_made, scores[:, 1] - scores[:, 0]))
        if one.auc >= TOLD_APART:
            named.append(one)
    named.sort(key=lambda one: (-(one.auc or 0), one.place))
    for one in named[:WORST]:
        run.find(
            "synthetic.domain_gap", "info", f"class '{counts.names[one.place]}'",
            f"A probe tells its synthetic images from its real ones: AUC {one.auc:.2f} (0.5 is chance).",
            measured=one.auc, limit=TOLD_APART,
            advice="The closer synthetic images come to real ones, the more they teach.", row="4.1",
        )  # fmt: skip
    _rest(
        run,
        "synthetic.domain_gap",
        "info",
        len(named),
        "classes have synthetic images that can be told apart",
    )


def _same_order(run: Run, counts: Counts, classes: list[Class]) -> None:
    """Rule 2's first half: synthetic images of the same order as the other classes need no balancing."""
    named = [one for one in classes if not (one.blown_up or one.unrecognisable or one.degraded)]
    for one in named[:WORST]:
        if one.recognised is None:
            tried = "Whether they are recognisable was not tried."
        else:
            tried = f"A classifier of real images recognises {one.recognised:.0%} of them."
        run.find(
            "synthetic.same_order", "info", f"class '{counts.names[one.place]}'",
            f"{one.made:,} synthetic images are {one.to_median:.1f} x the median size of the other classes: "
            f"of the same order, so they need no balancing. {tried}",
            measured=one.to_median, row="4.1",
        )  # fmt: skip
    _rest(run, "synthetic.same_order", "info", len(named), "classes have synthetic images of the same order")


def _write(
    run: Run, params: AuditParams, out: Path, counts: Counts, classes: list[Class], samples: list[Sample]
) -> None:
    """The part of the plan, the tables, the proposed corrections and the page."""
    by_source = {}
    for one in classes:
        if one.weight < 1.0:
            kinds = [SOURCES[k] for k in (1, 2) if counts.train[one.place, k]]
            by_source[int(counts.labels[one.place])] = dict.fromkeys(kinds, float(f"{one.weight:.6g}"))
    leave_out = [
        LeftOut(path=one.path, finding=one.rule, label=one.label, source=one.source)
        for one in samples
        if params.audit.drop_suspects and one.split == "train" and one.rule != "hard"
    ]
    part = SyntheticPart(by_source=by_source, leave_out=leave_out, findings=run.report.findings)
    part.write(run.product(out / FILE))
    names = [counts.names[one.place] for one in classes]
    columns = {field.name: [getattr(one, field.name) for one in classes] for field in fields(Class)}
    columns["label"] = [int(counts.labels[place]) for place in columns.pop("place")]
    pq.write_table(
        pa.table({"class_name": pa.array(names, pa.string()), **columns}),
        run.product(out / "classes.parquet"),
    )
    listed = {field.name: [getattr(one, field.name) for one in samples] for field in fields(Sample)}
    pq.write_table(pa.table(listed), run.product(out / "samples.parquet"), compression="zstd")
    suspects = [one for one in samples if one.rule == "labels.suspect"]
    if suspects:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [("path", "label"), *((one.path, one.suggested) for one in suspects)]
        )
        write_text(run.product(out / "proposed_corrections.csv"), text.getvalue())
    run.tracker.summary({"suspect_labels": len(suspects), "classes_with_synthetic": len(classes)})
    show.synthetic(run.page, counts, classes, samples, params)

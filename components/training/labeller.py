"""What distillation needs of the teacher before its first step: unlabelled images, and answers by view."""

from __future__ import annotations

from time import monotonic

import numpy as np

from components.training import soft_labels
from components.training.augmentation import NO_AUGMENT, Augment
from components.training.context import Exchange
from components.training.group import Group
from components.training.inputs.feed import Feed
from components.training.inputs.index import Index
from components.training.label_form import LabelForm
from components.training.mixing import Mixer
from components.training.pace import TIMED_SECONDS
from components.training.pool import (
    FeatureForm,
    Limits,
    SureForm,
    bank_rows,
    by_class,
    choose,
    finding,
)
from components.training.precision import Precision
from components.training.replay import Replay
from components.training.reporter import Reporter
from components.training.spec import TrainSpec
from components.training.tasks import task_of
from components.training.teacher import open_teacher


def ask_teacher(
    spec: TrainSpec,
    index: Index,
    labelled: np.ndarray,
    augment: Augment,
    feed: Feed,
    precision: Precision,
    group: Group,
    exchange: Exchange | None,
    reporter: Reporter,
    judged: Feed | None = None,
) -> tuple[soft_labels.Answers, np.ndarray]:
    """Load the teacher; choose unlabelled images; compute the soft labels of every view.

    Args:
        labelled: row numbers that are trained on.
        judged: has the validation images, as large as those of ``feed``; None: unlabelled images are not
            held to be like them.

    Returns:
        Its answers, and the row numbers, int64, of the unlabelled images that were chosen.

    Raises:
        RetortError: the teacher was trained for other classes, or another size.
        Stop: soft labels of an earlier run are not what the teacher says (``distill.labels_drift``).
    """
    distill, cache = spec.distill, spec.soft_labels
    assert spec.teacher is not None
    assert distill is not None
    assert cache is not None
    teacher = open_teacher(spec.teacher, spec.teachers, list(spec.class_names), spec.size, precision)
    form = LabelForm.of(len(spec.class_names), distill.top_k_labels, distill.temperature or 1.0)
    pool = index.rows("unlabeled")
    # if nothing learns from them, only their number is asked for
    learns = any(task_of(phase.task).unlabelled for phase in spec.phases)
    cached = distill.teacher_labels == "cached" and learns
    bank, held = bank_rows(labelled, len(spec.class_names)), index.rows("val")
    wanted = 0
    if len(pool) and distill.unlabeled_per_class:
        wanted = len(pool) + len(bank) + len(held) * (judged is not None)
    wanted += distill.crops * len(labelled) if cached else 0
    reporter.begin("soft labels", wanted, "images")
    done, started, first = 0, monotonic(), 0

    def advance(count: int) -> None:
        nonlocal done, started, first
        done += count * group.world
        reporter.progress(done)
        reporter.at(f"soft labels, {done:,} of {wanted:,} images")
        now = monotonic()
        if not first:  # it warms up
            started, first = now, done
        elif first < done < wanted and now - started >= TIMED_SECONDS:
            left = (now - started) / (done - first) * (wanted - done)
            reporter.promise(left, f"soft labels of {wanted:,} images")

    replay = Replay(index, group, precision)

    def ask(
        rows: np.ndarray, view: int, kept: soft_labels.Form, mixer: Mixer | None = None, feed: Feed = feed
    ) -> soft_labels.SoftLabels:
        seen = [augment.size, augment.recipe.source] if view == NO_AUGMENT else augment.key(precision.device)
        shown = {"number": view, "pictures": seen, "mixed": None if mixer is None else mixer.key()}
        what = soft_labels.about(teacher.cards, index.fingerprint, rows, shown, kept, precision)
        asker = soft_labels.Asker(teacher, feed, view, kept, spec.valid.batch_size, advance, mixer)
        labels = soft_labels.make(
            cache / soft_labels.name_of(what), what, asker, rows, group, reporter.note, exchange
        )
        replay.add(labels, asker)
        return labels

    unlabelled = np.empty(0, dtype=np.int64)
    if len(pool) and distill.unlabeled_per_class:
        features = FeatureForm(teacher.feature_width)
        read = ask(bank, NO_AUGMENT, features)
        directions = features.read(read.take(bank)).to(precision.device)
        sure = SureForm(directions, read.folder.name)
        limits = None
        if judged is not None and len(held):
            limits = Limits.of(ask(np.asarray(held, np.int64), NO_AUGMENT, sure, feed=judged))
        found = ask(pool, NO_AUGMENT, sure)
        if group.rank == 0:
            counts = by_class(index.labels, labelled, len(spec.class_names))
            chosen = choose(found, distill.unlabeled_per_class, counts, limits)
            reporter.send("finding", **finding(chosen, distill.unlabeled_per_class))
            unlabelled = chosen.rows
        unlabelled = group.agree(unlabelled)
    elif distill.unlabeled_per_class:
        reporter.note("there are no unlabelled images (none was given, or validate left none)")
    crops, mixer = [], None
    if cached:
        everything = np.sort(np.concatenate([labelled, unlabelled]))
        if len(unlabelled):  # how many, was not known before
            wanted += distill.crops * len(unlabelled)
            reporter.begin("soft labels", wanted, "images", done=done)
        if augment.recipe.mixup or augment.recipe.cutmix:
            mixer = Mixer(augment.recipe, spec.seed, augment.size, everything, index.labels)
        crops = [ask(everything, crop, form, mixer) for crop in range(distill.crops)]
    replay.check()
    return soft_labels.Answers(teacher, crops, form, mixer, replay.again if cached else None), unlabelled

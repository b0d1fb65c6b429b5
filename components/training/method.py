"""``distill.method: auto``: what to learn of a teacher, by what is known of it, its classes and the data."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from components.common.errors import ConfigError
from components.models import build
from components.models.params import Arch
from components.training.params import Distill

# From here on softened KL agrees with the teacher sooner. Three digits in a row, 1,000 classes, 4,000 images,
# SGD at 0.1 fitted to each loss, five epochs, one seed: kd at temperature 2 92.8 %, ssld 84.8, kd at 1 72.8;
# of 100 classes all are within two points.
MANY_CLASSES = 200
LARGE_POOL = (
    1.0  # unlabelled images for each labelled one, above which they are the better part of the lesson
)
LEVEL = 0.5  # standard errors of the difference by which a teacher may be below the student alone

# the labels' share of the loss
BESIDE_POOL = 0.0  # labelled images are few, and the teacher has learnt theirs by heart
BESIDE_LEVEL = 0.2  # as good without, by three seeds on photographs; but a label that is known costs nothing
BESIDE_WORSE = 0.5  # what the teacher gets wrong is put right by the labels
PUBLISHED_SHARE = {
    "dkd": 0.5,  # cross-entropy beside it, as large
    "dist": 1 / 3,  # 1 to 2, as both relations of the teacher weigh
    "deit": 0.5,  # half for each token
    "deit_soft": 0.9,  # lambda = 0.1
}
TEMPERATURES = {"kd": 2.0, "deit_soft": 3.0}  # as measured above, and as published; others: 1, as published


@dataclass(frozen=True)
class Known:
    """What is known before a student is distilled.

    Attributes:
        labelled: images with labels that it learns from.
        pool: images without labels that it will learn from, too.
        optimizer: its name, the student's.
        teacher_score, alone_score: top-1 of the teacher, and of the student without one, 0..1; None: unknown.
        images: validation images that both were judged on.
    """

    classes: int
    labelled: int
    pool: int
    student: Arch
    teacher: Arch
    optimizer: str
    teacher_score: float | None
    alone_score: float | None
    images: int


@dataclass(frozen=True)
class Chosen:
    """``why``: a sentence for the report."""

    method: str
    label_share: float
    temperature: float
    why: str


def choose(settings: Distill, known: Known) -> Chosen:
    """Method, label share and temperature: those that are set, and the fitting ones where none are.

    Raises:
        ConfigError: the student cannot learn by the method that is set.
    """
    if settings.method in ("deit", "deit_soft") and not build.has_distillation_head(known.student):
        raise ConfigError(
            f"distill.method: {settings.method}: {known.student.name} has no head that learns from a "
            "teacher; set student.arch.name to a network that has one (timm's deit_*_distilled, levit, "
            "efficientformer), or distill.method to auto"
        )
    method, why = str(settings.method), "distill.method is set"
    if method == "auto":
        method, why = _method(settings, known)
    share, therefore = settings.label_share, "distill.label_share is set"
    if share is None:
        share, therefore = _share(method, known)
    temperature = settings.temperature
    if temperature is None:
        temperature = TEMPERATURES.get(method, 1.0)
    said = f"{method}: {why}. Labels have a share of {share:.2g} of the loss: {therefore}."
    return Chosen(method, share, temperature, said)


def resolved(settings: Distill, chosen: Chosen) -> Distill:
    """The settings with nothing left open of what is learnt."""
    return settings.model_copy(
        update={
            "method": chosen.method,
            "label_share": chosen.label_share,
            "temperature": chosen.temperature,
        }
    )


def _method(settings: Distill, known: Known) -> tuple[str, str]:
    both = settings.label_share not in (0.0, 1.0)  # each of a DeiT's heads needs something to learn
    if both and build.has_distillation_head(known.student):
        return "deit", f"{known.student.name} has a head of its own for what the teacher says"
    if known.classes >= MANY_CLASSES:
        return "kd", f"with {known.classes:,} classes softened KL learns sooner than the published loss"
    return "ssld", f"the published loss, for {known.classes:,} classes"


def _share(method: str, known: Known) -> tuple[float, str]:
    if method in PUBLISHED_SHARE:
        return PUBLISHED_SHARE[method], "as published for it"
    if known.pool > LARGE_POOL * known.labelled:
        return BESIDE_POOL, (
            f"{known.pool:,} unlabelled images beside {known.labelled:,} labelled ones are most of the lesson"
        )
    if known.teacher_score is None or known.alone_score is None:
        return BESIDE_LEVEL, "nothing is known of the teacher against the student alone"
    compared = (
        f"the teacher recognises {known.teacher_score:.1%} of {known.images:,} validation images, the "
        f"student alone {known.alone_score:.1%}"
    )
    if below(known.teacher_score, known.alone_score, known.images):
        return BESIDE_WORSE, f"{compared}: labels put right what the teacher gets wrong"
    return BESIDE_LEVEL, f"{compared}: most is learnt from the teacher"


def below(teacher: float, alone: float, images: int) -> bool:
    """Whether the teacher is less often right than the student alone, by more than a part of the noise.

    Both count as drawn apart, which is more careful than they are: they share their images.
    """
    error = sqrt((teacher * (1 - teacher) + alone * (1 - alone)) / max(1, images))
    return alone - teacher > LEVEL * error

"""What ``distill.method: auto`` takes, and that nothing which is set is changed."""

from dataclasses import replace

import pytest
import timm
import torch
from pydantic import ValidationError

from components.common.errors import ConfigError
from components.models import build
from components.models.params import Arch
from components.training import method
from components.training.method import Known, choose
from components.training.params import Distill

LITE = Arch()
DEIT = Arch(name="deit_tiny_distilled_patch16_224")
KNOWN = Known(
    classes=10, labelled=1000, pool=0, student=LITE, teacher=LITE, optimizer="sgd",
    teacher_score=0.858, alone_score=0.876, images=372,
)  # fmt: skip


def test_a_teacher_that_is_worse_needs_the_labels() -> None:
    chosen = choose(Distill(), KNOWN)
    assert (chosen.method, chosen.label_share, chosen.temperature) == ("ssld", method.BESIDE_WORSE, 1.0)
    assert "85.8%" in chosen.why
    assert "87.6%" in chosen.why


def test_a_teacher_that_is_not_worse_needs_them_less() -> None:
    better = replace(KNOWN, teacher_score=0.95)
    assert choose(Distill(), better).label_share == method.BESIDE_LEVEL
    few = replace(KNOWN, images=30)  # 1.8 points: half a standard error is 4
    assert choose(Distill(), few).label_share == method.BESIDE_LEVEL
    assert choose(Distill(), replace(KNOWN, alone_score=None)).label_share == method.BESIDE_LEVEL


def test_a_pool_larger_than_the_labelled_images_teaches_alone() -> None:
    assert choose(Distill(), replace(KNOWN, pool=1001)).label_share == method.BESIDE_POOL
    assert choose(Distill(), replace(KNOWN, pool=999)).label_share == method.BESIDE_WORSE


def test_many_classes_take_kl() -> None:
    chosen = choose(Distill(), replace(KNOWN, classes=1000))
    assert (chosen.method, chosen.temperature) == ("kd", 2.0)
    assert "1,000 classes" in chosen.why


def test_a_student_with_a_head_for_the_teacher_uses_it() -> None:
    chosen = choose(Distill(), replace(KNOWN, student=DEIT, classes=1000, pool=10**6))
    assert (chosen.method, chosen.label_share) == ("deit", 0.5)
    alone = choose(Distill(label_share=0), replace(KNOWN, student=DEIT))
    assert (alone.method, alone.label_share) == ("ssld", 0.0), "one of the heads would learn nothing"


def test_what_is_set_stays() -> None:
    settings = Distill(method="kd", label_share=0.1, temperature=4.0, crops=3)
    chosen = choose(settings, replace(KNOWN, student=DEIT))
    assert method.resolved(settings, chosen) == settings
    left = choose(Distill(method="deit_soft"), replace(KNOWN, student=DEIT))
    assert (left.label_share, left.temperature) == (0.9, 3.0), "as published"
    whole = method.resolved(Distill(), choose(Distill(), KNOWN))
    assert Distill.model_validate(whole.model_dump()) == whole
    assert whole.method == "ssld"


@pytest.mark.parametrize("name", ["labels", "ssdl"])
def test_a_word_that_is_no_method_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=rf"'{name}' is none of auto, ssld, js") as raised:
        Distill(method=name)
    assert ("did you mean 'ssld'?" in str(raised.value)) == (name == "ssdl")


def test_a_method_that_the_student_cannot_learn_by_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"deit: tf_efficientnet_lite0 has no head.*student\.arch\.name"):
        choose(Distill(method="deit"), KNOWN)
    with pytest.raises(ValidationError, match=r"teacher_labels\n +method feature compares .* online"):
        Distill(method="feature")
    assert Distill(method="feature", teacher_labels="online").method == "feature"
    with pytest.raises(ValidationError, match=r"label_share\n +method deit_soft has a head for labels"):
        Distill(method="deit_soft", label_share=0)


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "levit_128s", "efficientformerv2_s0", "pit_ti_distilled_224"]
)
def test_networks_that_have_such_a_head_train_both(name: str) -> None:
    assert build.has_distillation_head(Arch(name=name))
    with torch.device("meta"):
        module = timm.create_model(name, num_classes=5)
        module.set_distilled_training(True)
        assert len(module.train()(torch.zeros(2, 3, 224, 224))) == 2


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "deit_tiny_patch16_224", "crossvit_9_240", "volo_d1_224"]
)
def test_networks_that_have_none(name: str) -> None:
    assert not build.has_distillation_head(Arch(name=name))

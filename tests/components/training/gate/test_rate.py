"""The rule on the learning rate: figures are compared within a kind of optimizer, and scaled as it scales."""

from __future__ import annotations

from typing import Any

import pytest

from components.common.errors import RetortError
from components.step import StepContext
from components.tracking.tracker import Tracker
from components.training.gate import rate
from components.training.params import CheckParams


def params(arch: str, optimizer: str, lr: float, batch: int, **distill: Any) -> CheckParams:
    return CheckParams.model_validate(
        {
            "student": {
                "arch": {"name": arch},
                "optimizer": {"name": optimizer},
                "lr": {"initial": lr},
                "train": {"batch_size": batch},
            },
            "ray": {"workers": 1},
            "distill": distill,
        }
    )


def judged(asked: CheckParams, tmp_path: Any) -> Any:
    run = StepContext("check", asked, tmp_path, Tracker("check", asked.registry))
    rate.judge(run, asked)
    return run.report.findings[0]


def test_sgds_figure_says_nothing_of_adamw(tmp_path: Any) -> None:
    """ResNet50_vd was trained with SGD at 0.1 for 256 images: 0.025 for 64. AdamW at that rate diverges."""
    assert judged(params("resnet50d", "sgd", 0.025, 64), tmp_path).level == "info"
    assert judged(params("resnet50d", "sgd", 0.026, 64), tmp_path).level == "error"
    found = judged(params("resnet50d", "adamw", 0.025, 64), tmp_path)
    assert found.level == "error"
    assert "says nothing of adamw" in found.message
    assert found.limit == pytest.approx(0.003), "three times fastai's 0.001 for 64 images"
    assert judged(params("resnet50d", "adamw", 0.002, 64), tmp_path).level == "info"


@pytest.mark.parametrize(
    ("arch", "optimizer", "batch"),
    [
        ("mobilenetv3_small_100", "sgd", 256),
        ("mobilenetv3_small_100", "adamw", 256),
        ("a_network_of_ones_own", "sgd", 256),
        ("a_network_of_ones_own", "adamw", 2048),
        ("tf_efficientnet_lite0", "rmsproptf", 512),
        ("resnet50", "lamb", 2048),
    ],
)
@pytest.mark.parametrize("lr", [0.9, 1.298, 3.0])
def test_the_reported_rate_of_1_298_is_stopped_whatever_trains(
    arch: str, optimizer: str, batch: int, lr: float, tmp_path: Any
) -> None:
    found = judged(params(arch, optimizer, lr, batch), tmp_path)
    assert found.level == "error"
    assert found.limit < lr
    assert "Set student.lr.initial to" in found.advice


def test_a_recipe_of_the_same_optimizer_is_the_limit() -> None:
    allowed = rate.limit(params("deit_tiny_patch16_224", "adamw", 0.001, 256), 256)
    assert (allowed.own, allowed.rate) == (True, pytest.approx(0.002 * 256 / 2048))
    allowed = rate.limit(params("efficientnet_b0", "rmsproptf", 0.001, 128), 128)
    assert (allowed.own, allowed.rate) == (True, pytest.approx(0.032 * 128 / 512))


def test_adaptive_optimizers_scale_by_the_root_of_the_batch() -> None:
    small = rate.limit(params("resnet50d", "lamb", 0.001, 512), 512)
    large = rate.limit(params("resnet50d", "lamb", 0.001, 2048), 2048)
    assert large.rate == pytest.approx(3 * 0.008)
    assert large.rate / small.rate == pytest.approx(2)


def test_nothing_known_of_a_network_is_a_warning_below_what_anybody_used(tmp_path: Any) -> None:
    found = judged(params("a_network_of_ones_own", "sgd", 0.01, 64), tmp_path)
    assert found.level == "warning"
    assert "reference_optimizer" in found.advice


def test_what_a_person_knows_goes_before_all(tmp_path: Any) -> None:
    known = {"reference_lr": 0.004, "reference_batch": 4096}
    assert rate.limit(params("convnext_atto", "adamw", 0.1, 64, **known), 64).rate == 0.004 / 64
    other = params("convnext_atto", "adamw", 0.1, 64, **known, reference_optimizer="sgd")
    assert not rate.limit(other, 64).own
    with pytest.raises(RetortError, match="go together"):
        rate.limit(params("convnext_atto", "adamw", 0.1, 64, reference_lr=0.1), 64)


def test_every_optimizer_has_a_published_figure_and_a_law() -> None:
    from typing import get_args

    from components.models.params import Optimizer

    names = get_args(Optimizer.model_fields["name"].annotation)
    content = rate.recipes()
    assert set(names) == set(content["kinds"])
    assert set(names) == {figure["kind"] for figure in content["published"]}
    assert all(rate.kind_of(recipe["optimizer"]) for recipe in content["recipes"])


def test_every_figure_names_where_it_was_read() -> None:
    content = rate.recipes()
    assert all(recipe["source"].endswith(".yaml") for recipe in content["recipes"])
    assert all(figure["source"] and "checked" in figure for figure in content["published"])


def test_one_network_has_one_rate_per_image_whoever_published_it() -> None:
    """DeiT's paper and PaddleClas's file say the same, once the cards are counted right."""
    paper = next(figure for figure in rate.recipes()["published"] if figure["network"] == "DeiT")
    allowed = rate.limit(params("deit_tiny_patch16_224", "adamw", 0.001, paper["batch"]), paper["batch"])
    assert allowed.rate == pytest.approx(paper["lr"])

"""Each loss against values worked out by hand."""

import pkgutil
from math import log

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from components.audit.plan_schema import LOSSES, Loss, Plan, Sampling
from components.common.errors import RetortError
from components.training import losses
from components.training.losses.class_balanced import ClassBalanced, effective_number_weights
from components.training.losses.focal import Focal
from components.training.losses.ohem import Ohem

# two classes: logits [0, ln 3] give p = [1/4, 3/4]; [0, 0] give [1/2, 1/2]
LOGITS = torch.tensor([[0.0, log(3)], [0.0, 0.0]])
LABELS = torch.tensor([1, 0])


def plan(name: str, **arguments: object) -> Plan:
    return Plan(loss=Loss.model_validate({"name": name, "arguments": arguments}))


def test_cross_entropy() -> None:
    assert losses.CrossEntropy()(LOGITS, LABELS).item() == pytest.approx((log(4 / 3) + log(2)) / 2)


def test_focal_lets_easy_images_count_less() -> None:
    expected = (0.25**2 * log(4 / 3) + 0.5**2 * log(2)) / 2
    assert Focal(2.0)(LOGITS, LABELS).item() == pytest.approx(expected)
    assert Focal(0.0)(LOGITS, LABELS).item() == pytest.approx((log(4 / 3) + log(2)) / 2)


def test_focal_has_a_gradient_where_the_network_is_certain() -> None:
    logits = torch.tensor([[60.0, -60.0]], requires_grad=True)
    Focal(0.5)(logits, torch.tensor([0])).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_ohem_keeps_the_hardest() -> None:
    assert Ohem(0.5)(LOGITS, LABELS).item() == pytest.approx(log(2))
    assert Ohem(0.01)(LOGITS, LABELS).item() == pytest.approx(log(2)), "at least one image counts"
    assert Ohem(1.0)(LOGITS, LABELS).item() == pytest.approx((log(4 / 3) + log(2)) / 2)


def test_class_balanced_weighs_by_class_and_divides_by_the_batch() -> None:
    loss = ClassBalanced(torch.tensor([1.5, 0.5]))
    assert loss(LOGITS, LABELS).item() == pytest.approx((0.5 * log(4 / 3) + 1.5 * log(2)) / 2)


def test_smoothing_is_torchs_where_the_loss_is_cross_entropy() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    expected = functional.cross_entropy(logits, labels, label_smoothing=0.1).item()
    assert losses.CrossEntropy(0.1)(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    # p = [1/4, 3/4]: uniform cross-entropy (ln 4 + ln 4/3) / 2; focal at gamma 2: (1/4)^2 ln 4/3
    uniform = (log(4) + log(4 / 3)) / 2
    focal = Focal(2.0, smoothing=0.2).per_image(LOGITS[:1], LABELS[:1]).item()
    assert focal == pytest.approx(0.8 * 0.25**2 * log(4 / 3) + 0.2 * uniform)
    with pytest.raises(ValueError, match="smoothing"):
        losses.CrossEntropy(1.0)


def test_effective_number_of_samples() -> None:
    # beta = 0.5: (1 - 0.5^1) / 0.5 = 1 and (1 - 0.5^2) / 0.5 = 1.5, so weights 1 and 2/3, scaled to mean 1
    weights = effective_number_weights({0: 1, 1: 2}, 0.5, 3)
    assert weights.tolist() == pytest.approx([1.2, 0.8, 0.0])


def test_the_plan_names_the_loss() -> None:
    assert isinstance(losses.from_plan(plan("cross_entropy"), 2), losses.CrossEntropy)
    focal = losses.from_plan(plan("focal", gamma=1.5), 2)
    assert isinstance(focal, Focal)
    assert focal.gamma == 1.5
    balanced = losses.from_plan(plan("class_balanced", beta=0.9, weights={"1": 2.0}), 3)
    assert isinstance(balanced, ClassBalanced)
    assert balanced.weights.tolist() == [1.0, 2.0, 1.0]


def test_class_balanced_without_weights_follows_the_counts() -> None:
    asked = plan("class_balanced", beta=0.5).model_copy(update={"sampling": Sampling(counts={0: 1, 1: 2})})
    loss = losses.from_plan(asked, 2)
    assert isinstance(loss, ClassBalanced)
    assert loss.weights.tolist() == pytest.approx([1.2, 0.8])


@pytest.mark.parametrize(
    ("name", "arguments"), [("focal", {"gama": 2}), ("ohem", {"keep": 0}), ("class_balanced", {"beta": 1.0})]
)
def test_a_wrong_argument_is_named(name: str, arguments: dict[str, float]) -> None:
    with pytest.raises(RetortError, match=r"loss\.arguments.*" + next(iter(arguments))):
        losses.from_plan(plan(name, **arguments), 2)


def test_every_name_that_a_plan_may_give_is_a_module_and_every_module_such_a_name() -> None:
    there = {module.name for module in pkgutil.iter_modules(losses.__path__)} - {"base"}
    assert there == set(LOSSES)
    counted = {"sampling": Sampling(counts={0: 3, 1: 1})}
    for name, arguments in LOSSES.items():
        asked = plan(name, **arguments).model_copy(update=counted)
        assert losses.from_plan(asked, 2)(LOGITS, LABELS).isfinite()


def test_a_loss_that_nobody_knows_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValidationError, match=r"'focl' is none of cross_entropy, .*; did you mean 'focal'"):
        plan("focl")

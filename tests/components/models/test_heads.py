"""``head.fc_share``: when the last layer is most of the model, a bottleneck is advised with its saving."""

import pytest

from components.models import build, cost, heads
from components.models.params import Arch, Head


def share(name: str, classes: int, bottleneck: int | None = None) -> heads.FCShare:
    arch = Arch(name=name, head=Head(bottleneck=bottleneck))
    found = heads.fc_share(cost.on_meta(lambda: build.create(arch, classes)))
    assert found is not None
    return found


def test_a_hundred_thousand_classes_are_most_of_a_resnet50() -> None:
    found = share("resnet50d", 100_000)
    assert found.fc == 2048 * 100_000 + 100_000
    assert found.share == pytest.approx(0.897, abs=0.001)
    told = heads.fc_finding(found, "teacher")
    assert (told["rule"], told["level"], told["row"]) == ("head.fc_share", "warning", "2.2")
    assert "teacher.arch.head.bottleneck=128" in told["advice"]
    saved = 2048 * 100_000 - 128 * (2048 + 100_000)
    assert f"{saved:,} parameters less" in told["advice"]
    assert "767.0 MB" in told["advice"]


def test_who_follows_the_advice_is_not_advised_again() -> None:
    width = share("resnet50d", 100_000).width
    followed = share("resnet50d", 100_000, width)
    assert followed.fc == share("resnet50d", 100_000).narrowed(width or 0)
    assert heads.fc_finding(followed, "teacher")["level"] == "info"
    wider = share("resnet50d", 100_000, 2 * (width or 0))
    assert wider.share > heads.LIMIT, "the widest that keeps the limit was advised"
    assert wider.width == width


def test_few_classes_need_no_bottleneck() -> None:
    told = heads.fc_finding(share("test_efficientnet", 10), "student")
    assert told["level"] == "info"
    assert told["advice"] == ""


def test_a_bottleneck_is_never_narrower_than_sixteen() -> None:
    found = share("test_efficientnet", 50_000)
    assert found.width == heads.NARROWEST
    assert found.narrowed(heads.NARROWEST) > heads.LIMIT * (found.whole - found.fc)


def test_both_heads_of_a_distilled_transformer_count() -> None:
    found = share("deit_tiny_distilled_patch16_224", 50_000)
    assert found.heads == 2
    assert found.fc == 2 * (192 * 50_000 + 50_000)
    assert found.width is not None
    assert share("deit_tiny_distilled_patch16_224", 50_000, found.width).fc == found.narrowed(found.width)


def test_a_network_without_a_head_has_no_share() -> None:
    assert heads.fc_share(build.create(Arch(name="test_efficientnet"), 0)) is None

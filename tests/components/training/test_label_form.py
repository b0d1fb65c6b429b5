"""Soft labels as bytes: what comes back, beside values worked out by hand and numpy's own float16."""

import numpy as np
import pytest
import torch

from components.training.label_form import LABEL_BYTES, LabelForm


def back(form: LabelForm, prob: list[list[float]]) -> torch.Tensor:
    return form.logits(form.encode(torch.tensor(prob).log())).exp()


def test_a_label_fits_into_its_bytes() -> None:
    assert [(c, LabelForm.of(c, None).kept, LabelForm.of(c, None).bytes) for c in (2, 10, 128, 1000)] == [
        (2, 2, 4), (10, 10, 20), (128, 128, 256), (1000, 20, 62),
    ]  # fmt: skip
    for classes in (129, 1024, 1025, 4096, 4097, 65_536, 65_537, 100_000):
        assert LABEL_BYTES - 4 <= LabelForm.of(classes, None).bytes <= LABEL_BYTES


def test_the_bytes_of_a_label_by_hand() -> None:
    """Class 3 with 1/2, class 1 with 1/4: 10 bits of class, 14 of steps of 32 / 16,383; then log(1/4)."""
    form = LabelForm(1000, 2)
    prob = torch.full((1, 1000), 0.25 / 998)
    prob[0, 3], prob[0, 1] = 0.5, 0.25
    expected = b""
    for label, value in ((3, 0.5), (1, 0.25)):
        expected += (label + (round(-np.log(value) / 32 * 16_383) << 10)).to_bytes(3, "little")
    expected += np.float16(np.log(0.25)).tobytes()
    assert form.encode(prob.log()).numpy().tobytes() == expected


def test_what_the_kept_classes_leave_is_spread_over_the_others() -> None:
    assert back(LabelForm(6, 2), [[1 / 16, 1 / 4, 1 / 16, 1 / 2, 1 / 16, 1 / 16]])[
        0
    ].tolist() == pytest.approx([1 / 16, 1 / 4, 1 / 16, 1 / 2, 1 / 16, 1 / 16], rel=5e-3)
    assert back(LabelForm(4, 1), [[0.7, 0.2, 0.06, 0.04]])[0].tolist() == pytest.approx(
        [0.7, 0.1, 0.1, 0.1], rel=5e-3
    )


@pytest.mark.parametrize("classes", [129, 1000, 5000, 70_000])
def test_a_kept_class_comes_back_to_half_a_percent(classes: int) -> None:
    logits = 6 * torch.randn(8, classes, generator=torch.Generator().manual_seed(1))
    form = LabelForm.of(classes, None)
    prob, found = logits.softmax(1), form.logits(form.encode(logits)).exp()
    top = prob.topk(form.kept, dim=1).indices
    assert torch.allclose(found.gather(1, top), prob.gather(1, top), rtol=8e-3)
    assert found.double().sum(1).tolist() == pytest.approx([1] * 8, abs=1e-3)


def test_whole_labels_keep_what_a_temperature_brings_to_light() -> None:
    logits = torch.tensor([[20.0, 0.0, -4.0, 3.0]])
    form = LabelForm.of(4, None)
    softened = (form.logits(form.encode(logits)) / 4).softmax(1)
    assert torch.allclose(softened, (logits / 4).softmax(1), rtol=1e-2)


def test_a_sure_label_keeps_its_rest_to_the_last_digit() -> None:
    """As 1 less the rounded others it would be wrong a hundredfold: 1e-6 beside a step of 1e-3."""
    prob = [[1 - 1e-6, 4e-7, 3e-7, 1e-7, 1e-7, 1e-7]]
    rest = back(LabelForm(6, 2), prob)[0, 2:].double()
    assert rest.sum().item() == pytest.approx(6e-7, rel=0.02)


def test_at_its_temperature_the_share_of_the_other_classes_is_right() -> None:
    logits = 3 * torch.randn(16, 500, generator=torch.Generator().manual_seed(2))
    wanted = (logits / 4).softmax(1)
    top = wanted.topk(20, dim=1).indices

    def others(temperature: float) -> torch.Tensor:
        form = LabelForm.of(500, None, temperature)
        found = (form.logits(form.encode(logits)) / 4).softmax(1)
        return 1 - found.gather(1, top).sum(1)

    expected = 1 - wanted.gather(1, top).sum(1)
    assert torch.allclose(others(4.0), expected, rtol=5e-3)
    assert not torch.allclose(others(1.0), expected, rtol=5e-2), "a plain label knows it only at 1"


def test_labels_are_the_same_whatever_the_batch() -> None:
    logits = torch.randn(9, 1000)
    form = LabelForm.of(1000, None)
    assert torch.equal(form.encode(logits)[4:6], form.encode(logits[4:6]))

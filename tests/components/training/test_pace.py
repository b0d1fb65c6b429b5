"""What is left of a job: the sums, and when they are said again. No clock runs here."""

import pytest

from components.training.pace import FORWARD, Pace, Part, Promise


def run(pace: Pace, part: Part, seconds: float, after: float, epochs: int = 1) -> float:
    """Some epochs; returns what they take."""
    for _ in range(epochs):
        for _ in range(part.steps):
            pace.step(seconds)
        pace.epoch(after)
    return epochs * (part.steps * seconds + after)


def test_the_first_estimate_counts_validation_and_the_phases_to_come() -> None:
    parts = [Part(3, 10, 32), Part(1, 5, 32)]
    pace = Pace(parts, validation=64, at_the_end=128)
    pace.phase(0, 0)
    assert not pace.known
    for seconds in (9.0, 0.5, 0.5, 0.5, 0.5):  # the first one warms up
        pace.step(seconds)
    assert pace.known
    image = 0.5 / 32
    training = (3 * 10 - 5 + 5) * 0.5
    assert pace.left() == pytest.approx(training + (4 * 64 + 128) * FORWARD * image)


def test_measured_epochs_correct_it() -> None:
    parts = [Part(4, 10, 32), Part(2, 20, 32)]
    pace = Pace(parts, validation=50, at_the_end=100)
    pace.phase(0, 0)
    run(pace, parts[0], 1.0, 5.0)
    assert pace.left() == pytest.approx((3 * 10 + 2 * 20) * 1.0 + 5 * 5.0 + 100 * 5.0 / 50)
    run(pace, parts[0], 1.0, 5.0, epochs=3)
    pace.phase(1, 0)
    whole = pace.left()
    for _ in range(5):
        pace.step(2.0)  # a slower phase
    assert pace.left() == pytest.approx((2 * 20 - 5) * 2.0 + 2 * 5.0 + 10.0)
    assert pace.left() > whole


def test_a_run_that_goes_on_counts_only_what_is_left() -> None:
    pace = Pace([Part(4, 10, 32), Part(1, 10, 32)], validation=0, at_the_end=0)
    pace.phase(1, 0)
    for _ in range(6):
        pace.step(1.0)
    assert pace.left() == pytest.approx(4.0)


def test_an_estimate_is_said_again_only_when_it_was_wrong() -> None:
    promise = Promise()
    assert promise.renew(0, 100)
    assert not promise.renew(50, 50)
    assert not promise.renew(50, 60), "within a third"
    assert promise.renew(50, 90)
    assert not promise.renew(90, 50)
    assert promise.renew(100, 10), "sooner than was said"
    assert not promise.renew(109, 4), "what is left is not worth a word"


def test_larger_images_count_by_their_pixels() -> None:
    """Two epochs of 10 steps at 1 s, judged in 2 s; then one at twice the side: 4 s a step, judged in 8 s."""
    pace = Pace([Part(2, 10, 8), Part(1, 10, 32, judging=4.0)], validation=8, at_the_end=4 * 8)
    pace.phase(0, 0)
    for _ in range(10):
        pace.step(1.0)
    pace.epoch(2.0)
    assert pace.left() == pytest.approx((10 + 2) + (40 + 8) + 8)
    pace.phase(1, 0)
    for _ in range(10):
        pace.step(4.0)
    pace.epoch(8.0)
    assert pace.left() == pytest.approx(8)

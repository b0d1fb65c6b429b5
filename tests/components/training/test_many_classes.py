"""A student learns many classes from a teacher by SGD, as ``bench_many_classes`` measures it."""

import pytest
import torch

from tests.benchmarks import bench_many_classes as bench

IMAGES, JUDGED, EPOCHS = 2_500, 600, 3
RATE = 0.05


@pytest.fixture(scope="module")
def lessons() -> tuple[bench.Lesson, bench.Lesson]:
    """Two digits in a row: 100 classes."""
    torch.set_num_threads(1)
    return bench.lessons(3, 2, IMAGES, JUDGED)


@pytest.mark.parametrize("method", bench.HELD_TO)
def test_sgd_learns_a_hundred_classes_as_well_as_with_soft_cross_entropy(
    lessons: tuple[bench.Lesson, bench.Lesson], method: str
) -> None:
    """At equal steps, and at the rate that suits cross-entropy, fitted to each loss."""
    soft = bench.agreement(bench.SOFT, "sgd", RATE, *lessons, seed=3, epochs=EPOCHS)
    found = bench.agreement(method, "sgd", RATE, *lessons, seed=3, epochs=EPOCHS)
    assert soft > 0.5, "it is a task that can be learnt"
    assert found > bench.SHARE * soft


def test_the_teacher_says_what_its_parts_say(lessons: tuple[bench.Lesson, bench.Lesson]) -> None:
    lesson, exam = lessons
    assert lesson.pixels.shape == (IMAGES, 1, 8, 16)
    assert lesson.classes == 100
    torch.testing.assert_close(lesson.answers.sum(1), torch.ones(IMAGES))
    assert len(set(exam.answers.argmax(1).tolist())) > 90
    seen = {row.numpy().tobytes() for row in lesson.pixels[:, 0, :, :8]}
    assert not any(row.numpy().tobytes() in seen for row in exam.pixels[:, 0, :, :8]), "digits are held back"

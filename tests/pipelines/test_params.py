"""params.yaml: every key typed and explained; a mistake is named with the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.common.errors import ConfigError
from components.common.rules import RULES
from components.training.params import FinetuneParams
from pipelines.init import commented
from pipelines.params import Params, keys, load, parse

HOUSE = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text("student:\n  train: {epochs: 3}\nteacher:\n")
    return path


def test_the_embedded_default_is_valid() -> None:
    assert load(HOUSE / "params.yaml").data.source == "digits"


def test_an_override_wins_and_is_yaml(file: Path) -> None:
    params = load(file, ["student.train.epochs=9", "data.synthetic=['*/fake/**']", "data.group=null"])
    assert params.student.train.epochs == 9
    assert params.data.synthetic == ["*/fake/**"]
    assert load(file).student.train.epochs == 3


def test_a_power_of_ten_is_a_number(file: Path) -> None:
    file.write_text("teacher: {lr: {initial: 1e-3}, weights: 1e-3.pth}\n")
    params = load(file, ["student.lr.initial=5E-4"])
    assert (params.teacher.lr.initial, params.student.lr.initial) == (0.001, 0.0005)
    assert params.teacher.weights == "1e-3.pth"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("student.train.epoch=9", "unknown key 'student.train.epoch'; did you mean 'student.train.epochs'?"),
        ("student.train.epochs=ten", "student.train.epochs: input should be a valid integer, got 'ten'"),
        ("student.train.epochs=2.5", "student.train.epochs"),
        ("student.train.epochs='3'", "student.train.epochs: input should be a valid integer, got '3'"),
        ("global.class_num=many", "global.class_num"),
        ("student=3", "student"),
        ("student.train.epochs.x=3", "'epochs' is a value, not a section"),
        ("student.train.epochs", "expected KEY=VALUE"),
        ("kubeflow.shm=lots", "kubeflow.shm: string should match pattern"),
        ("student.weights=[", "not YAML"),
        ("student.lr.initial=.inf", "student.lr.initial: input should be a finite number, got inf"),
        ("student.lr.initial=.nan", "student.lr.initial: input should be a finite number, got nan"),
        ("audit.distribution=[.inf, 1]", "audit.distribution"),
        ("audit.distribution=[-1, 1]", "audit.distribution"),
        ("global.class_num=-1", "global.class_num"),
        ("data.splits.val=0.8", "data.splits: val and test together leave nothing for training"),
        ("registry.tolerance=1.5", "registry.tolerance"),
        ("checks.waive=[distill.teacher_acuracy]", "did you mean 'distill.teacher_accuracy'?"),
        ("checks.waive=[teacher_accuracy]", "did you mean 'distill.teacher_accuracy'?"),
        ("checks.waive=[everything]", "unknown rule 'everything'; docs/rules.md lists them"),
    ],
)
def test_a_wrong_override_is_named_with_the_way_out(file: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(file, [override])
    assert said in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 2
    assert raised.value.status == 2


def test_every_number_with_a_fraction_is_finite(file: Path) -> None:
    fractions = [key for key, field in keys() if field.annotation in (float, float | None)]
    assert len(fractions) > 20
    for key in fractions:
        with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
            load(file, [f"{key}=.inf"])


def test_a_rule_of_any_room_can_be_waived(file: Path) -> None:
    params = load(file, [f"checks.waive=[{', '.join(RULES)}]"])
    assert params.of(FinetuneParams).checks.waive == list(RULES)


def test_a_wrong_key_in_the_file_names_the_file(file: Path) -> None:
    file.write_text("data:\n  sorce: photos\n")
    with pytest.raises(
        ConfigError, match=r"params\.yaml: unknown key 'data\.sorce'; did you mean 'data\.source'"
    ):
        load(file)


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "just words"])
def test_a_file_that_is_no_params_file_is_refused(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"params\.yaml"):
        load(file)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="retort init"):
        load(tmp_path / "none.yaml")


def test_every_key_has_an_explanation() -> None:
    without = [key for key, field in keys() if "." in key and not field.description]
    assert without == []


def test_the_commented_file_of_init_reads_back_as_the_same_values() -> None:
    params = Params.model_validate({"data": {"root": "a: b", "class_names": "yes", "group": "1e5"}})
    text = commented(params)
    assert Params.model_validate(parse(text), strict=True) == params
    assert all("#" in line for line in text.splitlines() if line.startswith("  ") and not line.endswith(":"))


def test_a_step_gets_its_own_sections_and_no_others() -> None:
    own = Params().of(FinetuneParams).model_dump(by_alias=True)
    assert set(own) == {"global", "checks", "report", "registry", "data", "teacher", "ray"}


def test_numbers_that_a_server_made_floats_become_integers_again() -> None:
    # Kubeflow hands numbers inside structures on as floats
    assert FinetuneParams.model_validate({"teacher": {"train": {"epochs": 3.0}}}).teacher.train.epochs == 3

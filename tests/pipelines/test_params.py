"""params.yaml: every key typed and explained; a mistake is named with the way out."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from components.common.errors import ConfigError
from components.common.rules import RULES
from components.training.params import FinetuneParams
from pipelines.init import commented
from pipelines.params import Params, keys, load, parse

REPO_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text("student:\n  train: {epochs: 3}\nteacher:\n")
    return path


def test_the_embedded_default_is_valid() -> None:
    assert load(REPO_ROOT / "params.yaml").data.source == "digits"


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
        ("student.weights=[", "-o student.weights=[: not valid YAML: line 1, column 2"),
        ("student.lr={initial: 1, initial: 2}", "key 'initial' stands twice, on line 1; keep one"),
        ("teachr.lr=3", "-o teachr.lr=3: unknown key 'teachr'; did you mean 'teacher'?"),
        ("teacher.lrr.x=3", "-o teacher.lrr.x=3: unknown key 'teacher.lrr'; did you mean 'teacher.lr'?"),
        ("teacher.lr.inital=3", "-o teacher.lr.inital=3: unknown key 'teacher.lr.inital'; did you mean"),
        (
            "teacher.lr={inital: 3}",
            "-o teacher.lr={inital: 3}: unknown key 'teacher.lr.inital'; did you mean",
        ),
        ("student.lr.initial=.inf", "student.lr.initial: input should be a finite number, got inf"),
        ("student.lr.initial=.nan", "student.lr.initial: input should be a finite number, got nan"),
        ("audit.distribution=[.inf, 1]", "audit.distribution"),
        ("audit.distribution=[-1, 1]", "audit.distribution"),
        ("global.class_num=-1", "global.class_num"),
        ("data.splits.val=0.8", "data.splits: val and test together leave nothing for training"),
        ("registry.tolerance=1.5", "registry.tolerance"),
        ("registry.notify=mail me", "registry.notify: a command is taken from"),
        ("registry={notify: mail me}", "registry.notify: a command is taken from"),
        ("registry.notify=ftp://host/x", "registry.notify: value error, a URL begins with http"),
        ('registry.notify="mail \'me"', "registry.notify: value error, no command"),
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


def test_what_stands_in_the_file_is_not_blamed_on_an_override(file: Path) -> None:
    file.write_text("teachr: {lr: 1}\nstudent: {lr: {initial: -1}}\n")
    with pytest.raises(ConfigError) as raised:
        load(file, ["teachr.seed=3", "student.lr.schedule=cosine"])
    assert all(line.startswith(f"{file}: ") for line in str(raised.value).splitlines())


def test_an_override_changes_one_section_though_an_alias_made_it_two(file: Path) -> None:
    file.write_text("teacher: &net\n  train: {epochs: 3}\nstudent: *net\n")
    params = load(file, ["student.train.epochs=9"])
    assert (params.teacher.train.epochs, params.student.train.epochs) == (3, 9)


def test_a_section_whose_keys_are_all_commented_out_can_be_overridden(file: Path) -> None:
    file.write_text("student:\n  lr:\n    # initial: 0.1\n")
    assert load(file, ["student.lr.initial=0.2"]).student.lr.initial == 0.2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data: {}\nstudent: {}\n\ndata:\n  root: x\n", "key 'data' stands twice, on line 1 and on line 4;"),
        (
            "student:\n  lr:\n    initial: 1\n    # no\n    initial: 2\n",
            "'initial' stands twice, on line 3 and on",
        ),
        ("benchmark:\n  x: [1, {b: 1}, {b: 1, c: {d: 1, d: 2}}]\n", "key 'd' stands twice, on line 2;"),
        ("x: &x {a: [*x], a: 1}\n", "key 'a' stands twice, on line 1;"),
    ],
)
def test_a_key_that_stands_twice_is_refused_as_dvc_refuses_it(file: Path, content: str, said: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert f"{file}: " in str(raised.value)
    assert said in str(raised.value)


def test_anchors_and_merge_keys_are_no_second_keys(file: Path) -> None:
    file.write_text("teacher: &net\n  weights: a.pth\n  coverage: 1\nstudent: {<<: *net, weights: b.pth}\n")
    params = load(file)
    assert (params.teacher.weights, params.student.weights, params.student.coverage) == ("a.pth", "b.pth", 1)


def test_values_are_what_dvc_takes_them_for(file: Path) -> None:
    from dvc.utils.serialize import load_yaml

    file.write_text(
        "data: {class_names: no, group: 1:30}\nglobal: {seed: 010}\nstudent: {lr: {initial: 1e-3}}\n"
    )
    params, read = load(file), load_yaml(str(file))
    assert (params.data.class_names, params.data.group) == (
        read["data"]["class_names"],
        read["data"]["group"],
    )
    assert params.data.class_names == "no"
    assert params.general.seed == read["global"]["seed"] == 10
    assert params.student.lr.initial == read["student"]["lr"]["initial"] == 0.001


def test_a_file_in_another_encoding_is_to_be_saved_as_utf8(file: Path) -> None:
    text = "data: {root: caf\xe9}\n"
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1"):
        file.write_bytes(text.encode(encoding))
        with pytest.raises(ConfigError, match="save it as UTF-8"):
            load(file)
    file.write_bytes(text.encode("utf-8-sig"))
    assert load(file).data.root == "caf\xe9"


def test_aliases_that_stand_for_millions_of_values_are_not_written_out(file: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in itertools.pairwise("abcdefghij"):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    file.write_text("\n".join(["data:", *(f"  {line}" for line in lines), "  root: *j", "  source: *j"]))
    file.write_text(file.read_text() + "\nchecks: {waive: *j}\n")
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert len(str(raised.value)) < 2000


@pytest.mark.parametrize("content", ["[" * 5000, "a: [", "- 1\n- 2\n", "just words"])
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

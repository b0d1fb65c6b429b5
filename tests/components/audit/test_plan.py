"""Merging the parts: the wanted distribution comes out, whatever the sources weigh."""

import json

import pyarrow.parquet as pq
import pytest

from components.audit.part import LeftOut, SyntheticPart
from components.audit.plan_schema import read_plan
from components.common.errors import RetortError
from components.common.storage import sha256_file
from components.training import sampling
from components.training.inputs.index import Index
from tests.components.audit.conftest import Audits, rows_of

FLOODED = {"a": {"real": 100, "val": 20}, "b": {"real": 20, "synthetic": 480, "val": 20}}


def part(audits: Audits, **content: object) -> None:
    folder = audits.out / "synthetic"
    folder.mkdir(parents=True, exist_ok=True)
    SyntheticPart.model_validate(content).write(folder / "part.json")


@pytest.mark.parametrize("distribution", ["uniform", "natural", "square_root"])
def test_training_draws_what_the_plan_expects(audits: Audits, distribution: str) -> None:
    audits.write(rows_of(FLOODED))
    audits.imbalance()
    part(audits, by_source={1: {"synthetic": 0.25}})
    plan = audits.plan(audit={"distribution": distribution})
    table = pq.read_table(audits.manifest)
    index = Index.from_table(table)
    rows = sampling.training_rows(index, plan)
    weights = sampling.Weights(index, rows, plan)(rows)
    labels = table["label"].to_numpy()[rows]
    for label, expected in plan.sampling.expected.items():
        share = weights[labels == label].sum() / weights.sum()
        assert share * len(rows) == pytest.approx(expected)
    synthetic = weights[(table["source"].to_numpy()[rows] == "synthetic")]
    assert synthetic.sum() / weights[labels == 1].sum() == pytest.approx(120 / 140), "480 / 4 beside 20"


def test_a_blown_up_class_is_not_made_smaller_twice(audits: Audits) -> None:
    audits.write(rows_of(FLOODED))
    audits.imbalance()
    part(audits, by_source={1: {"synthetic": 0.25}})
    plan = audits.plan(audit={"distribution": "uniform"})
    assert plan.sampling.expected == {0: 300, 1: 300}
    assert plan.sampling.by_class == {0: 3.0, 1: pytest.approx(300 / 140)}
    assert plan.sampling.counts == {0: 100, 1: 500}


def test_weights_by_source_alone_are_asked_for_by_the_synthetic_audit(audits: Audits) -> None:
    audits.write(rows_of(FLOODED))
    audits.imbalance()
    blown = {"rule": "synthetic.blow_up", "level": "warning", "subject": "class 'b'", "message": ""}
    part(audits, by_source={1: {"synthetic": 0.25}}, findings=[blown])
    plan = audits.plan()
    assert plan.sampling.distribution == "natural", "the weights of sources are enough"
    assert plan.sampling.finding == "synthetic.blow_up"


def test_rows_left_out_count_no_more(audits: Audits) -> None:
    audits.write(rows_of({"a": {"real": 100, "val": 20}, "b": {"real": 90, "val": 20}}))
    audits.imbalance()
    bad = [
        LeftOut(path=f"a/real/{i}.png", finding="labels.suspect", label=0, source="real") for i in range(10)
    ]
    part(audits, leave_out=[row.model_dump() for row in bad])
    plan = audits.plan()
    assert plan.sampling.expected == {0: 90, 1: 90}
    assert [row.path for row in plan.leave_out] == [row.path for row in bad]


def test_the_report_holds_the_findings_of_both_audits(done: Audits) -> None:
    found = done.findings(".")
    assert {"imbalance.ratio", "synthetic.blow_up", "plan.sampling", "plan.loss"} <= set(found)
    assert read_plan(done.out / "plan.json").sampling.finding == "imbalance.ratio"
    assert (done.out / "imbalance/part.json").exists(), "the audits' own folders stay"
    assert "Class histogram before and after" in (done.out / "report.html").read_text(encoding="utf-8")


def test_no_part_no_plan(audits: Audits) -> None:
    audits.write(rows_of(FLOODED))
    audits.imbalance()
    with pytest.raises(RetortError, match="run 'retort audit synthetic' first"):
        audits.plan()
    part(audits)
    path = audits.out / "imbalance/part.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "labels": "none"}), encoding="utf-8")
    with pytest.raises(RetortError, match=r"labels: .*run 'retort audit imbalance' again"):
        audits.plan()
    assert not (audits.out / "plan.json").exists()


def test_parts_of_different_data_are_refused(audits: Audits) -> None:
    audits.write(rows_of(FLOODED))
    audits.imbalance()
    part(audits, by_source={7: {"synthetic": 0.5}})
    with pytest.raises(RetortError, match=r"label 7 .* run 'retort audit' again"):
        audits.plan()


def test_a_plan_belongs_to_the_manifest_that_was_audited(audits: Audits) -> None:
    audits.write(rows_of(FLOODED))
    audits.imbalance()
    part(audits)
    audits.plan()
    path = audits.out / "plan.json"
    read_plan(path, sha256_file(audits.manifest))

    audits.write(rows_of({"0": {"real": 50}, **FLOODED}))  # each label is another class's now
    with pytest.raises(RetortError, match=r"another clean manifest.* run 'retort audit' again"):
        read_plan(path, sha256_file(audits.manifest))
    audits.imbalance()
    part(audits, manifest="of the data as they were")
    with pytest.raises(RetortError, match=r"different clean manifests; run 'retort audit' again"):
        audits.plan()

"""The expectations that a data set has to meet, in Great Expectations. Those of rules.py are among them.

The expectations look at two small tables that are exact at any size of the data: ``groups``, one row for
each label, split and source, and ``totals``, one row of counts (see ``validate.groups`` and
``validate.totals``). What fails becomes a finding of the rule in ``meta``.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.page import render
from components.common.storage import atomic_path
from components.dataset.manifest import SOURCES, SPLITS, UNLABELED
from components.dataset.rules import CASES

if TYPE_CHECKING:
    import pandas as pd

TEMPLATES = Path(__file__).with_name("templates")


SEVERITIES = {"error": "critical", "warning": "warning", "info": "info"}  # Great Expectations' words by ours


@dataclass(frozen=True)
class Failure:
    """An expectation that was not met: the rule it belongs to, its level, and what was seen."""

    rule: str
    level: str
    subject: str
    message: str


def expectations(gx: Any, max_bad_share: float, class_num: int) -> dict[str, list[Any]]:
    """The suite, by table. ``severity`` decides the finding's level: critical, warning, or info."""
    e = gx.expectations
    labelled = gx.expectations.row_conditions.Column("split") != "unlabeled"
    unlabelled = gx.expectations.row_conditions.Column("split") == "unlabeled"
    held_out = gx.expectations.row_conditions.Column("split").is_in(["val", "test"])

    def rule(name: str, severity: str = "critical") -> dict[str, Any]:
        return {"meta": {"rule": name}, "severity": severity}

    def case(name: str) -> dict[str, Any]:
        return rule(name, SEVERITIES[CASES[name].level])

    def between(column: str, low: float | None = None, high: float | None = None, **more: Any) -> Any:
        return e.ExpectColumnValuesToBeBetween(column=column, min_value=low, max_value=high, **more)

    def total(column: str, low: float | None = None, high: float | None = None, **more: Any) -> Any:
        return e.ExpectColumnMaxToBeBetween(column=column, min_value=low, max_value=high, **more)

    return {
        "groups": [
            e.ExpectColumnValuesToBeInSet(column="split", value_set=list(SPLITS), **case("manifest.split")),
            e.ExpectColumnValuesToBeInSet(
                column="source", value_set=list(SOURCES), **case("manifest.source")
            ),
            between("label", low=0, row_condition=labelled, **case("labels.missing")),
            between("label", high=class_num - 1, row_condition=labelled, **rule("labels.class_num")),
            e.ExpectColumnValuesToBeInSet(
                column="label",
                value_set=[UNLABELED],
                row_condition=unlabelled,
                **case("labels.unlabeled"),
            ),
            e.ExpectColumnValuesToBeInSet(
                column="source",
                value_set=["real"],
                row_condition=held_out,
                **case("leakage.synthetic"),
            ),
            between("names", high=1, row_condition=labelled, **rule("labels.names", "warning")),
            between("without_path", high=0, **case("manifest.path")),
        ],
        "totals": [
            total("train", low=1, **rule("splits.empty")),
            total("val", low=1, **rule("splits.empty")),
            total("classes", low=2, **rule("labels.classes")),
            total("lowest_label", high=0, **rule("labels.start", "warning")),
            total("gaps", high=0, **rule("labels.contiguous", "warning")),
            *(total(one.total, high=0, **case(name)) for name, one in CASES.items() if one.total),
            total("quarantined_share", high=max_bad_share, **rule("validate.max_bad_share")),
        ],
    }


def run(
    tables: dict[str, pd.DataFrame], *, max_bad_share: float, class_num: int, docs: Path
) -> list[Failure]:
    """Check the tables and write Data Docs (HTML that needs no network) into the folder ``docs``."""
    with _quiet(), atomic_path(docs.absolute()) as staged:
        import great_expectations as gx
        from great_expectations.checkpoint import UpdateDataDocsAction
        from great_expectations.data_context.types.base import ProgressBarsConfig

        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        site: Any = {
            "class_name": "SiteBuilder",
            "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(staged)},
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        }
        for old in list(context.list_data_docs_sites()):
            context.delete_data_docs_site(old)
        context.add_data_docs_site("docs", site)
        source = context.data_sources.add_pandas("data set")
        definitions = []
        for name, expected in expectations(gx, max_bad_share, class_num).items():
            suite = context.suites.add(gx.ExpectationSuite(name=name, expectations=expected))
            batch = source.add_dataframe_asset(name).add_batch_definition_whole_dataframe("all rows")
            definitions.append(
                context.validation_definitions.add(
                    gx.ValidationDefinition(name=name, data=batch, suite=suite)
                )
            )
        failures = []
        results = {}
        for definition in definitions:
            checkpoint = gx.Checkpoint(
                name=definition.name,
                validation_definitions=[definition],
                actions=[UpdateDataDocsAction(name="docs")],
            )
            context.checkpoints.add(checkpoint)
            outcome = checkpoint.run(batch_parameters={"dataframe": tables[definition.name]})
            results.update(outcome.run_results)
        for result in results.values():
            failures += [_failure(item) for item in result.results if not item.success]
        _without_network(staged)
        _write_index(staged, list(results.values()))
    return failures


def _failure(item: Any) -> Failure:
    config = item.expectation_config
    severity = str(getattr(config.severity, "value", config.severity))
    level = next((ours for ours, theirs in SEVERITIES.items() if theirs == severity), "info")
    seen = item.result.get("partial_unexpected_list") or item.result.get("observed_value")
    raised = (item.exception_info or {}).get("exception_message")
    column = config.kwargs.get("column", "")
    return Failure(
        rule=config.meta.get("rule", config.type),
        level=level,
        subject=f"column '{column}'",
        message=f"{config.type} is not met: {raised or f'found {seen}'}.",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No telemetry, no progress bars, none of the library's warnings about its own parts."""
    import logging

    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    level = logging.getLogger("great_expectations").level
    logging.getLogger("great_expectations").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("great_expectations").setLevel(level)


def _without_network(site: Path) -> None:
    """Take out of each page what would be loaded from elsewhere, and give it a style sheet of its own.

    Without its scripts the site needs another way to show what they fold away: it is simply shown.
    """
    (site / "static" / "retort.css").write_text(STYLE, encoding="utf-8")
    for picture in (site / "static" / "images").glob("*.gif"):
        picture.unlink()  # of a walk-through that only the scripts open
    for page in site.rglob("*.html"):
        top = "../" * (len(page.relative_to(site).parts) - 1)
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"<script\b.*?</script>", "", text, flags=re.DOTALL)
        text = re.sub(r"<link\b[^>]*>", "", text)
        text = re.sub(r"<footer\b.*?</footer>", "", text, flags=re.DOTALL)
        text = re.sub(r"<source\b[^>]*>", "", text)
        text = re.sub(r'src="https://[^"]*"', f'src="{top}static/images/logo-long.png"', text)
        text = text.replace("</head>", f'<link rel="stylesheet" href="{top}static/retort.css"></head>', 1)
        page.write_text(text, encoding="utf-8")


def _write_index(site: Path, results: list[Any]) -> None:
    """The library's own index is drawn by scripts from elsewhere; this one is plain."""
    suites = []
    for result in sorted(results, key=lambda one: one.suite_name):
        name, counts = result.suite_name, result.statistics
        suites.append(
            {
                "name": name,
                "page": str(next(site.glob(f"validations/{name}/**/*.html")).relative_to(site)),
                "verdict": "met" if result.success else "not met",
                "met": counts["successful_expectations"],
                "asked": counts["evaluated_expectations"],
            }
        )
    page = render("data_docs.html", TEMPLATES, title="Data Docs", suites=suites)
    (site / "index.html").write_text(page, encoding="utf-8")


STYLE = """
*{box-sizing:border-box}
body{margin:0;background:#f5f7f9;color:#1c2430;font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
a{color:#2457a6}
nav.navbar{height:auto!important;padding:6px 16px;background:#fff;border-bottom:1px solid #dfe4ea}
nav.navbar nav{display:flex;align-items:center;flex-wrap:wrap;gap:16px}
nav.navbar img{height:34px!important}
ol.breadcrumb{display:flex;flex-wrap:wrap;gap:10px;list-style:none;padding:0;margin:0}
.container,.container-fluid{max-width:1200px;margin:0 auto;padding:12px 16px}
.ge-section,.card{background:#fff;border:1px solid #dfe4ea;border-radius:8px;margin:0 0 16px;padding:12px}
.sticky .card,.modal,.btn,.btn-group,#ge-cta-footer,.cooltip .top,.fixed-bottom{display:none}
table{border-collapse:collapse;margin:8px 0;font-size:14px}
td,th{padding:4px 12px;border-bottom:1px solid #dfe4ea;text-align:left;vertical-align:top}
.table-responsive{overflow-x:auto}
h4,h5,h6{margin:8px 0;font-size:16px}
.badge{display:inline-block;padding:0 6px;border-radius:4px;background:#e8ecf0}
.fa-check-circle::before,.fa-check::before{content:"\\2714";color:#1a7f4b;font-style:normal}
.fa-times::before,.fa-exclamation-triangle::before{content:"\\2718";color:#b42318;font-style:normal}
.text-danger{color:#b42318}.text-success{color:#1a7f4b}
"""

"""A step's page: what asks for attention first, then what was measured and drawn, then what is only told."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from components.common.findings import Finding, Report
from components.common.page import Page, figure_svg, render


def test_the_loud_stands_first_and_notes_last(tmp_path: Path) -> None:
    report = Report(step="weights")
    for level, said in (("info", "a note"), ("warning", "a warning"), ("error", "an <error>")):
        report.add(Finding(rule="weights.source", level=level, subject="teacher", message=said))  # type: ignore[arg-type]
    page = Page()
    page.table("Coverage", ["tensors", "count"], [["matched", 1200]])
    page.write(tmp_path, report)
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    order = ["failed", "an &lt;error&gt;", "a warning", "Coverage", "1,200", "a note"]
    places = [content.index(text, content.index("<body>")) for text in order]
    assert places == sorted(places)
    assert "<error>" not in content


def test_a_step_without_anything_loud_begins_with_what_it_shows(tmp_path: Path) -> None:
    report = Report(step="weights")
    report.add(Finding(rule="weights.source", level="info", subject="teacher", message="a note"))
    Page().write(tmp_path, report)
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "passed" in content
    assert "<h2>Findings</h2>" not in content
    assert "a note" in content


HOSTILE = "<script>alert('\"')</script>"


def test_no_text_becomes_markup(tmp_path: Path) -> None:
    """Names of classes and files come from whoever made the data, and stand in every part of a page."""
    report = Report(step="weights")
    for level in ("error", "info"):
        report.add(
            Finding(rule="weights.source", level=level, subject=HOSTILE, message=HOSTILE, advice=HOSTILE)  # type: ignore[arg-type]
        )
    page = Page()
    page.text(HOSTILE, HOSTILE)
    page.table(HOSTILE, [HOSTILE], [[HOSTILE], [None], [0.123456]], note=HOSTILE)
    page.images(HOSTILE, [(b"\x89PNG", HOSTILE)], note=HOSTILE)
    page.write(tmp_path, report)
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in content
    assert content.count("&lt;script&gt;") == 16
    assert f'alt="{HOSTILE[:1]}' not in content
    assert '<td class="number">0.1235</td>' in content


def test_a_template_that_asks_for_what_it_was_not_given_fails() -> None:
    with pytest.raises(UndefinedError, match="'title' is undefined"):
        render("sections.html", sections=[])


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_left_to_the_browsers_fonts() -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    axes.set_xticks([0, 1], ["猫", "犬\t"])
    assert "猫" in figure_svg(figure)

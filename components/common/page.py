"""Sections of a page a person reads: findings, tables, figures, images, in one self-contained HTML file."""

from __future__ import annotations

import base64
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.storage import read_json, write_json, write_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

    from components.common.findings import Report


TEMPLATES = Path(__file__).with_name("templates")
# of lines in a chart: Okabe and Ito's palette, told apart by colour-blind readers, and shapes beside it
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


class Page:
    """What a step wants to show. Sections are HTML fragments; the templates escape all text.

    They are written twice: inside the step's own ``report.html``, and as ``page.json`` from which
    ``retort report`` composes the page of the whole run.
    """

    def __init__(self) -> None:
        self.sections: list[dict[str, str]] = []

    def _add(self, title: str, kind: str, *values: Any) -> None:
        fragments: Any = environment().get_template("fragments.html").module
        self.sections.append({"title": title, "html": str(getattr(fragments, kind)(*values)).strip()})

    def text(self, title: str, text: str) -> None:
        self._add(title, "paragraph", text)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = ""
    ) -> None:
        """A table; numbers are aligned to the right. Floats are shown with four significant digits."""
        self._add(title, "table", columns, [[_cell(value) for value in row] for row in rows], note)

    def figure(self, title: str, figure: Figure, note: str = "", alt: str = "") -> None:
        """A matplotlib figure, as inline SVG (scales on a phone, needs no network); closes the figure."""
        self._add(title, "figure", figure_svg(figure), alt or title, note)

    def images(self, title: str, images: Sequence[tuple[bytes, str]], note: str = "", size: int = 72) -> None:
        """A contact sheet: (PNG or JPEG bytes, caption) each. The caller asks ``report.thumbnails`` first."""
        shown = []
        for content, caption in images:
            kind = "png" if content[:4] == b"\x89PNG" else "jpeg"
            shown.append((f"data:image/{kind};base64,{base64.b64encode(content).decode()}", caption))
        self._add(title, "sheet", shown, size, note)

    def write(self, folder: Path, report: Report) -> None:
        """Write ``report.html`` and ``page.json`` into ``folder``."""
        verdict = "passed" if report.passed else "failed"
        title = f"retort {report.step}"
        page = render("step.html", title=title, report=report, verdict=verdict, sections=self.sections)
        write_text(folder / "report.html", page)
        write_json(folder / "page.json", self.sections)


def render(template: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """A page by a template of ``folder``, which may extend ``base.html``: all text is escaped."""
    return environment(folder).get_template(template).render(values).lstrip()


@functools.cache
def environment(folder: Path = TEMPLATES) -> Environment:
    """jinja2's, for the templates of ``folder`` and the common ones: escaping, and no name may be missing."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def read_sections(folder: Path) -> list[dict[str, str]]:
    """The sections that a step wrote into its folder; none if it wrote no page."""
    path = folder / "page.json"
    return read_json(path) if path.exists() else []


def figure_svg(figure: Figure) -> str:
    """SVG markup of a figure, the same bytes each time; closes the figure."""
    import io

    import matplotlib
    from matplotlib import pyplot

    buffer = io.StringIO()
    settings: dict[Any, Any] = {"svg.hashsalt": "retort", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # text stays text: the browser has the fonts for names that matplotlib's own cannot write
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    markup = buffer.getvalue()
    return markup[markup.index("<svg") :]


def _cell(value: Any) -> tuple[bool, str]:
    """Whether a value is a number, and how a table shows it."""
    if isinstance(value, bool) or value is None:
        return False, "" if value is None else ("yes" if value else "no")
    if isinstance(value, float):
        return True, f"{value:.4g}"
    if isinstance(value, int):
        return True, f"{value:,}"
    return False, str(value)

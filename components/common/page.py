"""Sections of a page a person reads: findings, tables, figures, images, in one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.storage import read_json, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from components.common.findings import Finding, Report


class Page:
    """What a step wants to show. Sections are HTML fragments; all text is escaped here.

    They are written twice: inside the step's own ``report.html``, and as ``page.json`` from which
    ``retort report`` composes the page of the whole run.
    """

    def __init__(self) -> None:
        self.sections: list[dict[str, str]] = []

    def _add(self, title: str, body: str, note: str) -> None:
        note_html = f'<p class="note">{html.escape(note)}</p>' if note else ""
        self.sections.append({"title": title, "html": note_html + body})

    def text(self, title: str, text: str) -> None:
        self._add(title, f"<p>{html.escape(text)}</p>", "")

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = ""
    ) -> None:
        """A table; numbers are aligned to the right. Floats are shown with four significant digits."""
        head = "".join(f"<th>{html.escape(str(column))}</th>" for column in columns)
        body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
        self._add(
            title,
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
            note,
        )

    def figure(self, title: str, figure: Figure, note: str = "", alt: str = "") -> None:
        """A matplotlib figure, as inline SVG (scales on a phone, needs no network); closes the figure."""
        svg = figure_svg(figure)
        label = html.escape(alt or title, quote=True)
        self._add(title, f'<div class="figure" role="img" aria-label="{label}">{svg}</div>', note)

    def images(self, title: str, images: Sequence[tuple[bytes, str]], note: str = "", size: int = 72) -> None:
        """A contact sheet: (PNG or JPEG bytes, caption) each. The caller asks ``report.thumbnails`` first."""
        cells = []
        for content, caption in images:
            kind = "png" if content[:4] == b"\x89PNG" else "jpeg"
            source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
            text = html.escape(caption, quote=True)
            cells.append(
                f'<figure><img loading="lazy" width="{size}" height="{size}" src="{source}" alt="{text}">'
                f"<figcaption>{text}</figcaption></figure>"
            )
        self._add(title, f'<div class="sheet">{"".join(cells)}</div>', note)

    def write(self, folder: Path, report: Report) -> None:
        """Write ``report.html`` and ``page.json`` into ``folder``."""
        write_text(folder / "report.html", render(f"retort {report.step}", step_html(report, self.sections)))
        write_json(folder / "page.json", self.sections)


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


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return f"<td>{'' if value is None else ('yes' if value else 'no')}</td>"
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    if isinstance(value, int):
        return f'<td class="number">{value:,}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def findings_html(findings: Sequence[Finding]) -> str:
    """Findings as a list: level, rule, subject, message, advice."""
    items = []
    for finding in findings:
        level = "waived" if finding.waived else finding.level
        advice = f'<div class="advice">{html.escape(finding.advice)}</div>' if finding.advice else ""
        row = f' <span class="row">FAQ {html.escape(finding.row)}</span>' if finding.row else ""
        items.append(
            f'<li class="{finding.level}"><span class="badge {finding.level}">{level}</span> '
            f"<code>{html.escape(finding.rule)}</code> {html.escape(finding.subject)}{row}"
            f"<div>{html.escape(finding.message)}</div>{advice}</li>"
        )
    return f'<ul class="findings">{"".join(items)}</ul>'


def step_html(report: Report, sections: Sequence[dict[str, str]]) -> str:
    """One step: its verdict, what asks for attention, the sections, and what is only told."""
    verdict = "passed" if report.passed else "failed"
    parts = [f'<h1>{html.escape(report.step)} <span class="badge {verdict}">{verdict}</span></h1>']
    if loud := report.loud():
        parts += ["<h2>Findings</h2>", findings_html(loud)]
    for section in sections:
        parts.append(f"<section><h2>{html.escape(section['title'])}</h2>{section['html']}</section>")
    if notes := report.notes():
        parts += ["<h2>Notes</h2>", findings_html(notes)]
    return "\n".join(parts)


def render(title: str, body: str) -> str:
    """A whole page around ``body``: one file, no script, no network, readable on a phone."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--paper:#fff;--wash:#f5f7f9;--good:#1a7f4b;--warn:#9a6700;
--bad:#b42318;--info:#2457a6}
*{box-sizing:border-box}
body{margin:0;background:var(--wash);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1040px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.6rem;line-height:1.25;margin:.4em 0}h2{font-size:1.15rem;margin:1.6em 0 .5em}
h3{font-size:1rem;margin:1.2em 0 .4em}
section,.card{background:var(--paper);border:1px solid var(--line);border-radius:10px;
padding:4px 16px 14px;margin:14px 0}
section h2{margin-top:.7em}
.note{color:var(--soft);margin:.3em 0 .8em;font-size:.93rem}
.badge{display:inline-block;border-radius:99px;padding:1px 9px;font-size:.78rem;font-weight:600;color:#fff;
background:var(--soft);vertical-align:middle}
.badge.passed{background:var(--good)}.badge.failed,.badge.error{background:var(--bad)}
.badge.warning{background:var(--warn)}.badge.info{background:var(--info)}
.findings{list-style:none;padding:0;margin:0}
.findings li{background:var(--paper);border:1px solid var(--line);border-left:4px solid var(--info);
border-radius:8px;padding:8px 12px;margin:8px 0;overflow-wrap:anywhere}
.findings li.warning{border-left-color:var(--warn)}.findings li.error{border-left-color:var(--bad)}
.advice{color:var(--soft)}.row{color:var(--soft);font-size:.8rem}
code{font:.88em ui-monospace,Menlo,Consolas,monospace;background:var(--wash);padding:1px 4px;
border-radius:4px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;min-width:50%}
th,td{padding:4px 10px;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
th{color:var(--soft);font-weight:600}td.number{text-align:right;font-variant-numeric:tabular-nums}
.figure svg{max-width:100%;height:auto;display:block}
.sheet{display:flex;flex-wrap:wrap;gap:10px}
.sheet figure{margin:0;width:96px;font-size:.72rem;color:var(--soft);overflow-wrap:anywhere}
.sheet img{display:block;object-fit:contain;background:#e8ecf0;border-radius:6px}
"""

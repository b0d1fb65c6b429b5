"""docs/own-data.md as what it says to do: its commands, and the Python in it."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own-data.md"


def commands() -> list[str]:
    """What stands behind a prompt in the page's consoles, with what a backslash continues; '&&' parts two."""
    text = PAGE.read_text(encoding="utf-8")
    consoles = "\n".join(re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    lines = re.findall(r"^\$ (.*)$", consoles.replace("\\\n", " "), re.MULTILINE)
    return [" ".join(part.split()) for line in lines for part in line.split("&&")]


def python() -> str:
    """The page's one piece of Python."""
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return code

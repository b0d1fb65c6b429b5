"""Formats in which export writes a network. One file a format, registered here."""

from __future__ import annotations

from components.export.formats import onnx
from components.export.formats.base import Format

FORMATS: dict[str, Format] = {"onnx": onnx.FORMAT}

__all__ = ["FORMATS", "Format"]

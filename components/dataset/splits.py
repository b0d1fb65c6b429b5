"""Which split an image belongs to: by a threshold on a hash, so that it never changes when others arrive."""

from __future__ import annotations

from components.dataset.params import Splits


def split_of(sha256: str, splits: Splits) -> str:
    """``val``, ``test`` or ``train`` by the first 32 bits of a hex sha256 (of a content, or of a group)."""
    share = int(sha256[:8], 16) / 2**32
    if share < splits.val:
        return "val"
    return "test" if share < splits.val + splits.test else "train"

"""Which split an image belongs to: by a threshold on a hash, so that it never changes when others arrive."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.dataset.params import Splits

DIGITS = 8  # hexadecimal digits that decide: 32 bits
_NIBBLE = np.full(256, np.nan)
for _digit in "0123456789abcdefABCDEF":
    _NIBBLE[ord(_digit)] = int(_digit, 16)


def split_of(sha256: str, splits: Splits) -> str:
    """``val``, ``test`` or ``train`` of one hex sha256 (of a content, or of a group)."""
    return str(splits_of(pa.array([sha256]), splits)[0])


def splits_of(digests: pa.StringArray, splits: Splits) -> pa.StringArray:
    """``val``, ``test`` or ``train`` by the first 32 bits of each sha256, in hexadecimal, none null."""
    characters = pc.cast(pc.binary_slice(pc.cast(digests, pa.binary()), 0, DIGITS), pa.binary(DIGITS))
    _, data = characters.buffers()
    values = np.frombuffer(data, np.uint8)[characters.offset * DIGITS :][: len(digests) * DIGITS]
    share = _NIBBLE[values].reshape(-1, DIGITS) @ 16.0 ** -np.arange(1, DIGITS + 1)  # exact: 32 bits
    names = pa.array(["val", "test", "train"])
    return names.take(pa.array(np.digitize(share, [splits.val, splits.val + splits.test])))

"""Which split an image belongs to: by a threshold on a hash, so that it never changes when others arrive."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.common.errors import RetortError
from components.dataset.params import Splits

DIGITS = 8  # hexadecimal digits that decide: 32 bits
_NIBBLE = np.full(256, np.nan)
for _digit in "0123456789abcdefABCDEF":
    _NIBBLE[ord(_digit)] = int(_digit, 16)


def split_of(sha256: str, splits: Splits) -> str:
    """``val``, ``test`` or ``train`` of one hex sha256 (of a content, or of a group)."""
    return str(splits_of(pa.array([sha256]), splits)[0])


def splits_of(digests: pa.StringArray, splits: Splits) -> pa.StringArray:
    """``val``, ``test`` or ``train`` by the first 32 bits of each hex sha256, none of them null.

    Raises:
        RetortError: naming a digest that is none.
    """
    first = pc.cast(digests, pa.binary())
    short = pc.less(pc.binary_length(first), DIGITS)
    if pc.any(short).as_py():
        raise _no_digest(digests.filter(short)[0])
    characters = pc.cast(pc.binary_slice(first, 0, DIGITS), pa.binary(DIGITS))
    _, data = characters.buffers()
    values = np.frombuffer(data, np.uint8)[characters.offset * DIGITS :][: len(digests) * DIGITS]
    share = _NIBBLE[values].reshape(-1, DIGITS) @ 16.0 ** -np.arange(1, DIGITS + 1)  # exact: 32 bits
    if np.isnan(share).any():
        raise _no_digest(digests[int(np.flatnonzero(np.isnan(share))[0])])
    names = pa.array(["val", "test", "train"])
    return names.take(pa.array(np.digitize(share, [splits.val, splits.val + splits.test])))


def _no_digest(value: pa.Scalar) -> RetortError:
    return RetortError(
        f"column 'sha256': '{value}' is no sha256 in hexadecimal; leave the column out to have it worked out"
    )

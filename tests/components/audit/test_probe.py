"""The probe's numbers: the same whichever processor's kernels compute them, and no more than there is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from components.audit.probe import COMPONENTS, compressed, standardised

SCORES = """
import sys
import numpy as np
from components.audit.probe import Folded, compressed, standardised
random = np.random.default_rng(0)
places = np.arange(900) % 5
mixed = random.normal(size=(300, 800)) * np.exp(-0.02 * np.arange(300))[:, None]
vectors = ((random.normal(size=(900, 300)) + np.eye(5, 300)[places]) @ mixed).astype(np.float32)
learnt = np.arange(900) < 600
np.save(sys.argv[1], Folded(compressed(standardised(vectors, learnt), learnt), places, 5, 0).scores(0.1))
"""


def test_scores_do_not_hang_on_the_processor(tmp_path: Path) -> None:
    """OpenBLAS computes with other kernels for each kind; what differs is the order of sums."""
    found = []
    for kind in ("Haswell", "Nehalem"):
        file = tmp_path / f"{kind}.npy"
        subprocess.run(
            [sys.executable, "-c", SCORES, str(file)],
            env={**os.environ, "OPENBLAS_CORETYPE": kind},
            check=True,
        )
        found.append(np.load(file))
    assert np.abs(found[0] - found[1]).max() < 1e-9 * np.abs(found[0]).max()


def test_directions_without_variance_are_no_components() -> None:
    """Of two rows there is one direction; what other rows do in others would be blown up from nothing."""
    vectors = np.random.default_rng(0).normal(size=(40, COMPONENTS + 50)).astype(np.float32)
    for known, components in ((30, 29), (2, 1), (1, 1)):
        by = np.arange(len(vectors)) < known
        assert compressed(standardised(vectors, by), by).shape == (40, components)
    assert np.isfinite(compressed(standardised(vectors * 0, by), by)).all()

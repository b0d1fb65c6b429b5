"""Times of calls in rounds, and how two of them compare that took turns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Timing:
    """Seconds of each call, a list per round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def medians(self) -> np.ndarray:
        """Median of each round, in seconds."""
        return np.array([np.median(calls) for calls in self.rounds])

    @property
    def p50_ms(self) -> float:
        return 1e3 * float(np.median(self.medians))

    @property
    def p95_ms(self) -> float:
        return 1e3 * float(np.quantile(np.concatenate([np.asarray(calls) for calls in self.rounds]), 0.95))

    @property
    def noise(self) -> float:
        """Spread of identical rounds: (90th - 10th percentile of their medians) over the median."""
        low, middle, high = np.quantile(self.medians, (0.1, 0.5, 0.9))
        return float((high - low) / middle)


def ratio(first: Timing, second: Timing) -> tuple[float, float, float]:
    """Latency of ``first`` over ``second``, round by round: median, and 10th and 90th percentile."""
    count = min(len(first.rounds), len(second.rounds))
    low, middle, high = np.quantile(first.medians[:count] / second.medians[:count], (0.1, 0.5, 0.9))
    return float(middle), float(low), float(high)

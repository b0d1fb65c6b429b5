"""A worker that stalls: found by the driver from what each worker says it is doing, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic

from components.common.errors import RetortError
from components.training.context import Event

TIMES = 20.0  # the usual time of a step: more is no slow step
LONG = 6.0  # times as long for what nobody knows the time of: decoding, compiling, a first batch
HEARD_SECONDS = 15.0  # without a word from any worker they are gone, or being replaced: not stalled


@dataclass(frozen=True)
class _Beat:
    """What one worker said last; ``since``: when it began with that, by the driver's clock."""

    what: str
    node: str
    count: int
    since: float
    heard: float
    usual: float | None


class Stall:
    """Hears the workers' beats, and says when one of them has been at the same thing for too long.

    Workers take each step together: where one stalls, the others wait for it within the same step. The one
    that is to blame is the one that has got least far.

    Where nobody knows how long it takes, as while images are decoded, one may wait for as long as another
    gets on: for that one's pictures, or for a node that has more of them.

    Args:
        minutes: without a step; longer where steps take long, or where nobody knows how long it takes.
    """

    def __init__(self, minutes: float, clock: Callable[[], float] = monotonic) -> None:
        self._seconds, self._clock = 60 * minutes, clock
        self._beats: dict[int, _Beat] = {}

    def hear(self, event: Event) -> None:
        """A beat.

        Args:
            event: ``rank``, ``node``, ``what`` it does, for how many seconds (``age``), how many that takes
                as a rule (``usual``), and the ``count`` of things that it has done.
        """
        rank, now = event["rank"], self._clock()
        last = self._beats.get(rank)
        if last is not None and event["count"] < last.count:  # another process: all of them were replaced
            self._beats.clear()
        self._beats[rank] = _Beat(
            event["what"], event["node"], event["count"], now - event["age"], now, event["usual"]
        )

    def need_moving(self) -> None:
        """Raise RetortError, with the rule ``train.stalled``, where one has stalled."""
        now = self._clock()
        if all(now - beat.heard > HEARD_SECONDS for beat in self._beats.values()):
            return
        moved = max(beat.since for beat in self._beats.values())  # when any of them did
        late = [
            rank
            for rank, beat in self._beats.items()
            if now - (moved if beat.usual is None else beat.since) > self._patience(beat)
        ]
        if not late:
            return
        behind = min(self._beats[rank].count for rank in late)
        blamed = [rank for rank in sorted(late) if self._beats[rank].count == behind]
        rank, beat = blamed[0], self._beats[blamed[0]]
        who = (
            f"worker {rank} on {beat.node}"
            if len(blamed) < len(self._beats)
            else f"all {len(blamed)} workers"
        )
        who = who if len(self._beats) > 1 else f"the worker on {beat.node}"
        silent = now - beat.heard > HEARD_SECONDS
        others = len(self._beats) - len(blamed)
        waits = f", and {others} other{'s wait' if others > 1 else ' waits'} for it" if others else ""
        error = RetortError(
            f"{who} stalled: at '{beat.what}' for {(now - beat.since) / 60:.0f} min"
            f"{' and not answering' if silent else ''}{waits} (ray.stall_minutes: {self._seconds / 60:g})\n"
            "Likely causes, in order: (1) its storage or network does not answer; (2) its loader processes "
            "wait for memory (train.num_workers: 0); (3) the node is overloaded or lost. The last checkpoint "
            "is kept: the same command goes on from there"
        )
        error.rule = "train.stalled"
        raise error

    def _patience(self, beat: _Beat) -> float:
        return self._seconds * LONG if beat.usual is None else max(self._seconds, TIMES * beat.usual)

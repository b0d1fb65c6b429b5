"""What a trainer is given by whatever runs it: who it is among the workers, and where it reports to."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

Event = dict[str, Any]  # "kind", and what belongs to it


class Exchange(Protocol):
    """Files of this node's state folder that nodes without a shared disk give one another."""

    def publish(self, path: Path) -> None:
        """Let the others have a file, by its place below the state folder."""

    def fetch(self, path: Path) -> bool:
        """Bring a file that a node has published; whether there is one."""


class Context(Protocol):
    """One worker's place."""

    rank: int
    world: int
    local_rank: int  # among the workers of this node
    device: torch.device
    exchange: Exchange | None  # None: all workers see one disk

    def group(self) -> AbstractContextManager[None]:
        """torch's default process group of all workers, where ``world`` is above 1.

        It is entered when all of them are ready, and left at the end: its collectives have time limits, which
        a node that still decodes its images would exceed.
        """

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The state that an interrupted run of the same job saved last; None: there is none."""

    def save_checkpoint(self, state: dict[str, Any] | None) -> None:
        """Keep a state; returns when it is safe. Every worker calls it, all but rank 0 with None."""

    def send(self, kind: str, **values: Any) -> None:
        """Tell the driver something; does not wait."""

    def at(self, what: str, usual: float | None = None) -> None:
        """What this worker does from now on, so that one that stalls is found, and named; does not wait.

        Args:
            usual: seconds that it takes; None: nobody knows, it may take long.
        """

    def stop_requested(self) -> bool:
        """Whether the state is to be saved now and the loop to end, within seconds; asked between two steps.

        Each worker learns it at a moment of its own: before they act on it, they have to agree on the step.
        """

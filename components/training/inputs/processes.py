"""Loader processes that live as long as their feed: torch's DataLoader, handed new draws in every epoch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from components.common.errors import RetortError
from components.training.inputs.pictures import Aspects, Part
from components.training.sampling import Draw

if TYPE_CHECKING:
    from components.training.augmentation import Augment

PREFETCH = 2  # batches that each process keeps ready
Made = tuple[Tensor, Aspects]  # pictures uint8 [B, H, W, 3], or their views uint8 [B, 3, S, S]


class Processes:
    """Some processes that make pictures or, given an augmentation, their views."""

    def __init__(self, part: Part, augment: Augment | None, count: int, device: torch.device) -> None:
        self._draws, self._device = _Draws(), device
        self._loader: DataLoader[Any] | None = DataLoader(
            _Told(part, augment),
            batch_sampler=self._draws,  # type: ignore[arg-type]
            num_workers=count,
            collate_fn=identity_collate,
            persistent_workers=True,
            prefetch_factor=PREFETCH,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # its own: torch's default one belongs to dropout
        )

    def start(self, draws: Iterable[Draw]) -> Iterator[tuple[Draw, Made]]:
        """Begin with an epoch's draws at once; what is left of the one before is dropped.

        Raises:
            RetortError: what a process met; or one was killed.
        """
        assert self._loader is not None, "a closed feed"
        sent = self._draws.begin(draws)
        # not in the main thread: there torch would take SIGCHLD, and raise in the midst of whatever is being
        # done when a process is killed; so the next batch tells
        with ThreadPoolExecutor(1) as aside:
            batches = aside.submit(self._begun).result()
        return self._made(batches, sent)

    def _begun(self) -> Iterator[Any]:
        on_device(self._device)  # for torch's thread that pins
        assert self._loader is not None
        return iter(self._loader)

    def _made(self, batches: Iterator[Any], sent: deque[Draw]) -> Iterator[tuple[Draw, Made]]:
        while True:
            try:
                made = next(batches, None)
            except (RuntimeError, ConnectionError, EOFError) as error:
                # killed while a batch was fetched from it, a process breaks the connection before torch looks
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise RetortError(
                    f"a loader process ended ({reason}); as a rule for want of memory or of shared memory: "
                    "lower num_workers or batch_size"
                ) from None
            if made is None:
                return
            if isinstance(made, RetortError):
                raise made
            yield sent.popleft(), made

    def close(self) -> None:
        """End the processes."""
        loader, self._loader = self._loader, None
        iterator = getattr(loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()


def on_device(device: torch.device) -> None:
    """Let what this thread does with GPUs be done with this one: a thread begins with the first."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class _Draws:
    """A batch sampler: the draws of the present epoch, each a batch."""

    def __init__(self) -> None:
        self._sent: deque[Draw] = deque()
        self._draws: Iterable[Draw] = ()

    def begin(self, draws: Iterable[Draw]) -> deque[Draw]:
        """Take an epoch's draws; returns where those that were sent will stand, in order."""
        self._sent, self._draws = deque(), draws
        return self._sent

    def __iter__(self) -> Iterator[Draw]:
        for draw in self._draws:
            self._sent.append(draw)
            yield draw


def views(augment: Augment, pixels: Tensor, draw: Draw, aspects: Aspects) -> Tensor:
    """Pictures uint8 [B, H, W, 3] -> their views uint8 [B, 3, S, S]; partners' are among them."""
    return augment(pixels.permute(0, 3, 1, 2), *draw.pictures(), aspects)


class _Told(Dataset[Any]):
    """Pictures; errors come as values: what a loader process raises reaches us as a traceback's text."""

    def __init__(self, part: Part, augment: Augment | None) -> None:
        self._part, self._augment = part, augment

    def __getitems__(self, draw: Draw) -> Made | RetortError:
        try:
            pixels, aspects = self._part.take(draw.pictures()[0])
        except RetortError as error:
            return error
        made = torch.from_numpy(pixels)
        return (made if self._augment is None else views(self._augment, made, draw, aspects)), aspects

    def __getitem__(self, item: int) -> Any:
        raise NotImplementedError("a batch at a time")


def identity_collate(batch: Any) -> Any:
    """The batch as it is: what reads it has put it together already."""
    return batch

"""Batches for a training loop: pictures by row, fed the way that suits their size and the device.

==========  ====================================================  =============================
way         where pictures are                                    who makes a batch of them
==========  ====================================================  =============================
card        all of them on the device                             the device, by index
memory      decoded, in a memory map (page cache, or local disk)  a thread; CPU: the step itself
processes   decoded or in image files                             processes that stay
threads     in image files                                        threads; CPU: the step waits
==========  ====================================================  =============================

Whatever the way, a batch's bytes are the same on the same kind of device.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt
import torch
from torch import Tensor

from components.common.progress import counted
from components.common.storage import human_bytes
from components.training.inputs.pictures import Aspects, Part
from components.training.inputs.processes import PREFETCH, Processes, on_device, views
from components.training.mixing import mixed
from components.training.sampling import Draw

if TYPE_CHECKING:
    from components.training.augmentation import Augment

CARD_BYTES = 30_000_000_000  # pictures on the card take at most so much,
CARD_SHARE = 0.4  # and at most this share of what is free: the network needs the rest
READY = 2  # batches that a feeding thread keeps ready
LOAD = 1024  # pictures copied to the card at once

Way = Literal["card", "memory", "processes", "threads"]
Extra = Callable[[Draw], dict[str, npt.NDArray[Any]]]


@dataclass
class Batch:
    """What a step trains on: ``pixels`` uint8 [B, 3, S, S] and ``extra``, on the device.

    ``waited``: seconds that the loop stood still for it.
    """

    draw: Draw
    pixels: Tensor
    extra: dict[str, Tensor]
    waited: float


@dataclass
class _Item:
    """A batch on its way: ``pixels`` as the feed's ``_view`` takes them."""

    draw: Draw
    pixels: Any
    aspects: Aspects
    extra: dict[str, Tensor]
    sent: Any = None  # the event after which the card has all of it


class Feed:
    """Feeds one part's pictures to one worker, epoch after epoch; ``close`` at the end.

    ``said``: how, in a line. ``remedy``: what would help where the loop waits for it.
    """

    def __init__(self, augment: Augment, device: torch.device, said: str, remedy: str) -> None:
        self.said, self.remedy = said, f"{remedy[0].upper()}{remedy[1:]}."
        self._augment, self._device = augment, device
        self._running: _Ahead | None = None
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, draws: Iterable[Draw], extra: Extra | None = None) -> Iterator[Batch]:
        """The batches of some draws, in their order. What works ahead begins at once, not at the first.

        A call ends the one before, finished or not. All rows of a draw are of the feed's part.

        Args:
            extra: what else a draw needs, such as soft labels, as arrays with B rows; asked in the feeding
                thread where there is one.

        Raises:
            ChangedError: an image is not the manifest's any more.
            RetortError: an image cannot be read, or a loader process was killed.
        """
        self._stop()
        items: Iterator[_Item] = self._items(draws, extra)
        if self._ahead:
            items = self._running = _Ahead(items, READY, self._device)
        return self._batches(items)

    _ahead = True  # whether a thread makes items ahead of the loop

    def close(self) -> None:
        """End the threads and processes."""
        self._stop()

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
            self._running = None

    def _batches(self, items: Iterator[_Item]) -> Iterator[Batch]:
        while True:
            started = perf_counter()
            item = next(items, None)
            if item is None:
                return
            if item.sent is not None:  # the card waits for the copy, this thread does not
                stream = torch.cuda.current_stream(self._device)
                stream.wait_event(item.sent)
                for tensor in (item.pixels, *item.extra.values()):
                    if isinstance(tensor, Tensor):
                        tensor.record_stream(stream)
            pixels = self._view(item)
            if item.draw.mixture is not None:
                pixels = mixed(pixels, item.draw.mixture)
            now = perf_counter()
            yield Batch(item.draw, pixels, item.extra, now - started)

    def _items(self, draws: Iterable[Draw], extra: Extra | None) -> Iterator[_Item]:
        raise NotImplementedError

    def _view(self, item: _Item) -> Tensor:
        """Views uint8 [B, 3, S, S] of the pictures."""
        return views(self._augment, item.pixels, item.draw, item.aspects)

    def _sent(self, draw: Draw, pixels: Tensor | None, aspects: Aspects, extra: Extra | None) -> _Item:
        """An item whose tensors are on the device, or on their way there."""
        found = {} if extra is None else {k: torch.from_numpy(v) for k, v in extra(draw).items()}
        if self._side is None:
            return _Item(draw, pixels, aspects, found)
        with torch.cuda.stream(self._side):
            sent = None if pixels is None else pixels.to(self._device, non_blocking=True)
            # pinned blocks are torch's own: it gives one out again only once the copy is done
            found = {k: v.pin_memory().to(self._device, non_blocking=True) for k, v in found.items()}
            event = torch.cuda.Event()
            event.record(self._side)
        return _Item(draw, sent, aspects, found, event)


class _CardFeed(Feed):
    """All pictures lie on the device; a batch of them is taken there by index."""

    def __init__(self, part: Part, augment: Augment, device: torch.device, said: str, remedy: str) -> None:
        super().__init__(augment, device, said, remedy)
        self._part = part
        self._all = torch.empty(part.pixels.shape, dtype=torch.uint8, device=device)
        for start in range(0, len(part), LOAD):
            self._all[start : start + LOAD] = torch.from_numpy(part.pixels[start : start + LOAD].copy())

    def _items(self, draws: Iterable[Draw], extra: Extra | None) -> Iterator[_Item]:
        for draw in draws:
            slots = self._part.slots(draw.pictures()[0])
            places = torch.from_numpy(slots)
            if self._side is not None:
                places = places.pin_memory()
            yield self._sent(draw, places, self._part.aspects(slots), extra)

    def _view(self, item: _Item) -> Tensor:
        item.pixels = self._all.index_select(0, item.pixels)
        return super()._view(item)


class _MemoryFeed(Feed):
    """Decoded pictures are gathered from a memory map: ahead, into pinned memory; on a CPU in the step."""

    def __init__(self, part: Part, augment: Augment, device: torch.device, said: str, remedy: str) -> None:
        super().__init__(augment, device, said, remedy)
        self._part, self._ahead = part, device.type == "cuda"

    def _items(self, draws: Iterable[Draw], extra: Extra | None) -> Iterator[_Item]:
        for draw in draws:
            yield self._sent(draw, *_taken(self._part, draw, None, self._side is not None), extra)


class _ThreadsFeed(Feed):
    """Threads decode image files: ahead of a GPU; on a CPU the step waits for them.

    There, decoding beside the step would take its cores: its threads wait for one another after each
    operation, and one that is held up holds up all. In turns, both use every core.
    """

    def __init__(
        self, part: Part, augment: Augment, device: torch.device, threads: int, said: str, remedy: str
    ) -> None:
        super().__init__(augment, device, said, remedy)
        self._part, self._pool = part, ThreadPoolExecutor(threads)
        self._ahead = device.type == "cuda"

    def _items(self, draws: Iterable[Draw], extra: Extra | None) -> Iterator[_Item]:
        for draw in draws:
            yield self._sent(draw, *_taken(self._part, draw, self._pool, self._side is not None), extra)

    def close(self) -> None:
        super().close()
        self._pool.shutdown(cancel_futures=True)


class _ProcessesFeed(Feed):
    """Processes make pictures, and on a CPU their views."""

    def __init__(
        self, part: Part, augment: Augment, device: torch.device, count: int, said: str, remedy: str
    ) -> None:
        super().__init__(augment, device, said, remedy)
        here = self._side is None
        self._made_there = here
        self._processes = Processes(part, augment if here else None, count, device)

    def _items(self, draws: Iterable[Draw], extra: Extra | None) -> Iterator[_Item]:
        started = self._processes.start(draws)

        def items() -> Iterator[_Item]:
            for draw, (pixels, aspects) in started:
                yield self._sent(draw, pixels, aspects, extra)

        return items()

    def _view(self, item: _Item) -> Tensor:
        return item.pixels if self._made_there else super()._view(item)

    def close(self) -> None:
        super().close()
        self._processes.close()


def _taken(part: Part, draw: Draw, pool: Executor | None, pin: bool) -> tuple[Tensor, Aspects]:
    """Pictures of a draw, in pinned memory where they go to a card."""
    rows, side = draw.pictures()[0], part.form.side
    if not pin:
        pixels, aspects = part.take(rows, pool)
        return torch.from_numpy(pixels), aspects
    host = torch.empty((len(rows), side, side, 3), dtype=torch.uint8, pin_memory=True)
    return host, part.take(rows, pool, host.numpy())[1]


@dataclass
class _End:
    """The last thing that a thread hands over: all is done, or this went wrong."""

    error: BaseException | None = None


@dataclass
class _Ahead(Iterator[_Item]):
    """An iterator worked off by a thread, some items ahead of whoever takes them."""

    items: Iterator[_Item]
    ready: int
    device: torch.device
    _over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._queue: queue.Queue[_Item | _End] = queue.Queue(self.ready)
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        end = _End()
        try:
            on_device(self.device)
            for item in self.items:
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            end = _End(error)
        self._put(end)

    def _put(self, item: _Item | _End) -> bool:
        while not self._over.is_set():
            try:
                self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False

    def __next__(self) -> _Item:
        if self._over.is_set():
            raise StopIteration
        found = self._queue.get()
        if not isinstance(found, _End):
            return found
        self._over.set()
        if found.error is not None:
            raise found.error
        raise StopIteration

    def stop(self) -> None:
        """Let the thread end after what it is at."""
        self._over.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.05)


def open_feed(
    part: Part,
    augment: Augment,
    device: torch.device,
    num_workers: int = 0,
    *,
    threads: int = 1,
    way: Way | None = None,
    say: Callable[[str], None] | None = None,
    name: str = "train.num_workers",
) -> Feed:
    """A feed of a part's pictures, the way that suits their size and the device.

    Args:
        num_workers: processes; 0: none.
        threads: that may decode image files where there are no processes: this worker's share of the cores.
        way: instead of the one that suits.
        say: told the way, in one line.
        name: of the parameter that ``num_workers`` comes from.
    """
    cuda = device.type == "cuda"
    room = 0
    if cuda:
        room = int(min(CARD_BYTES, CARD_SHARE * torch.cuda.mem_get_info(device)[0]))
    way = way or _way(part, room, cuda, num_workers)
    size = f"{counted(len(part), 'image')} of {part.form.side} px"
    whole = f"{size}, {human_bytes(part.bytes)} decoded"
    more = f"raise {name}" if num_workers else f"set {name} to some of the cores"
    if part.decoded is None:
        far = part.contents is None and len(part) and "://" in part.index.path(0)
        more += f"{', run retort shard' if far else ''}, or free disk so that images can be kept decoded"
    if way == "card":
        said = f"{whole}, all on the GPU"
        feed: Feed = _CardFeed(part, augment, device, said, "choose a simpler train.augment")
    elif way == "memory":
        where = "copied from a memory map ahead of the step" if cuda else "from a memory map, in the step"
        remedy = "give memory to keep them in, or a faster disk" if cuda else more
        feed = _MemoryFeed(part, augment, device, f"{whole}, {where}", remedy)
    elif way == "processes":
        what = "decoded" if part.decoded is None else "from a memory map"
        said = f"{size}, {what} by {counted(num_workers, 'loader process', 'loader processes')}"
        feed = _ProcessesFeed(part, augment, device, num_workers, said, more)
    else:
        when = "ahead of the step" if cuda else "in the step"
        said = f"{size}, decoded by {counted(threads, 'thread')} {when}"
        feed = _ThreadsFeed(part, augment, device, threads, said, more)
    if say is not None:
        say(feed.said)
    return feed


def _way(part: Part, room: int, cuda: bool, num_workers: int) -> Way:
    if part.decoded is None:
        return "processes" if num_workers else "threads"
    if cuda:
        return "card" if part.bytes <= room else "memory"
    return "processes" if num_workers else "memory"


def shm_needed(part_side: int, batch_size: int, num_workers: int, ray_workers: int) -> int:
    """Bytes of /dev/shm that loader processes may hold: ready batches, one in work, one in use; uint8."""
    return ray_workers * num_workers * (PREFETCH + 2) * batch_size * 3 * part_side * part_side

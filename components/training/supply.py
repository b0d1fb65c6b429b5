"""What each phase's images are: their size, their views, and the feeds that bring them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from components.training.augmentation import Augment, Recipe
from components.training.inputs.feed import Feed, open_feed
from components.training.inputs.index import Index
from components.training.inputs.pictures import Store, open_store
from components.training.inputs.shards import Shards
from components.training.spec import Phase, TrainSpec


class Supply:
    """Opens what the phases of a job read: pictures at once, feeds when a phase asks for them.

    Pictures of every size are decoded here, before workers wait for one another. Feeds of another size or
    augmentation than those asked for are closed: their processes, and what lies on a card, are freed.

    Args:
        device: where batches go.
        say: told how images are fed, once for each way.
        alive: told now and then how many of how many pictures are decoded.
    """

    def __init__(
        self,
        spec: TrainSpec,
        index: Index,
        device: torch.device,
        say: Callable[[str], None],
        alive: Callable[[int, int], None],
    ) -> None:
        self._spec, self._device, self._say = spec, device, say
        contents = None if spec.shards is None else Shards(spec.shards, index)
        self._stores: dict[tuple[int, str], Store] = {}
        self._views: dict[tuple[Recipe, int], Augment] = {}
        for phase in spec.phases:
            size, recipe = spec.size_of(phase), spec.recipe(phase)
            if (size, recipe.source) not in self._stores:
                self._stores[size, recipe.source] = open_store(
                    index, spec.root, size, recipe.source, contents=contents, alive=alive
                )
        self._feeds: dict[tuple[object, ...], Feed] = {}
        self._said: set[str] = set()

    def augment(self, phase: Phase) -> Augment:
        """What makes the views that a phase learns from."""
        key = self._spec.recipe(phase), self._spec.learn_size(phase)
        if key not in self._views:
            self._views[key] = Augment(key[0], self._spec.seed, key[1])
        return self._views[key]

    def learn(self, phase: Phase) -> Feed:
        """Batches of the images that are learnt from, as the phase sees them."""
        size, augment = self._spec.size_of(phase), self.augment(phase)
        store = self._stores[size, augment.recipe.source]
        key = ("train", size, augment.recipe, augment.size)
        return self._feed(key, store, augment)

    def judge(self, size: int) -> Feed:
        """Batches of the images of validation and test, plain, at a size of one of the phases."""
        return self._feed(("valid", size), *self._plain(size))

    def learnt(self, size: int) -> Feed:
        """Batches of the images that are learnt from, plain, at a size of one of the phases."""
        return self._feed(("train", size, "plain"), *self._plain(size))

    def close(self) -> None:
        """End all feeds."""
        for feed in self._feeds.values():
            feed.close()
        self._feeds.clear()

    def __enter__(self) -> Supply:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plain(self, size: int) -> tuple[Store, Augment]:
        store = next(store for (side, _), store in self._stores.items() if side == size)
        return store, Augment("none", self._spec.seed, size)

    def _feed(self, key: tuple[object, ...], store: Store, augment: Augment) -> Feed:
        if key not in self._feeds:
            name = str(key[0])
            for other in [other for other in self._feeds if other[0] == name]:
                self._feeds.pop(other).close()
            settings, part = (
                (self._spec.train, store.learn) if name == "train" else (self._spec.valid, store.judge)
            )
            self._feeds[key] = open_feed(
                part, augment, self._device, settings.num_workers, threads=self._spec.threads,
                name=f"{name}.num_workers", say=lambda said: self._tell(f"{name}: {said}"),
            )  # fmt: skip
        return self._feeds[key]

    def _tell(self, said: str) -> None:
        if said not in self._said:
            self._said.add(said)
            self._say(said)

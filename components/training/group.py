"""The workers of one job, together: torch's default process group, or one worker that needs none."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

Value = TypeVar("Value")


class Group:
    """What all workers do at the same place of the same code.

    Args:
        leads: whether it does what is done once for each state folder.
    """

    def __init__(self, rank: int, world: int, leads: bool) -> None:
        self.rank, self.world, self.leads = rank, world, leads

    def barrier(self) -> None:
        """Wait for all others."""
        if self.world > 1:
            dist.barrier()

    def agree(self, value: Value) -> Value:
        """What rank 0 has, on all."""
        if self.world == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held)
        return held[0]

    def gather(self, value: Value) -> list[Value]:
        """What each has, in the order of ranks, on all."""
        if self.world == 1:
            return [value]
        held: list[Any] = [None] * self.world
        dist.all_gather_object(held, value)
        return held

    def start_sum(self, tensor: Tensor) -> dist.Work | None:
        """Begin to sum a tensor over all, in place; wait for what is returned before it is read."""
        return dist.all_reduce(tensor, async_op=True) if self.world > 1 else None

    def average(self, tensors: list[Tensor]) -> None:
        """Set each floating-point tensor to its mean over all workers."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

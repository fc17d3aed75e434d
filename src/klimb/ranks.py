"""Several processes that train one policy: who I am among them, and the few things that they say to each other.

Every rank runs the same program on the same numbers and takes its share of the work: some prompts to draw, score and learn
from. What it finds is given to all, so that replay, order of the prompts and metrics are the same everywhere, and one rank
can write them down. Alone, each of these functions does the work and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
AT_ONCE = 1 << 24
"""numbers of a gradient that are summed over the ranks in one message"""


@dataclass(frozen=True)
class Ranks:
    """Who I am among the processes of a run.

    Attributes:
        rank: my number, from 0.
        world: how many there are.
        talk: the group in which Python values go round, on the CPU; None alone.
    """

    rank: int = 0
    world: int = 1
    talk: Any = None

    @property
    def first(self) -> bool:
        """Whether I am the one who writes."""
        return self.rank == 0

    def share(self, num: int) -> range:
        """My run of `num` things; the shares of all ranks, one after the other, are all of them.

        Example:
            >>> [list(Ranks(rank, 3).share(5)) for rank in range(3)]
            [[0], [1, 2], [3, 4]]
        """
        return range(self.rank * num // self.world, (self.rank + 1) * num // self.world)

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Every rank does its work; what each of them found, in their order.

        Raises:
            ValueError: the work of one of them did; all of them raise it.
            ConnectionError: one of them is gone.
        """
        if self.world == 1:
            return [work()]
        mine, wrong = _tried(work)
        found: list[Any] = [None] * self.world
        with _connected():
            torch.distributed.all_gather_object(found, (mine, wrong), group=self.talk)
        _raise_first(said for _, said in found)
        return [value for value, _ in found]

    def together(self, work: Callable[[], T]) -> T:
        """Every rank does its work and keeps what it found. Errors as `gather`."""
        if self.world == 1:
            return work()
        mine, wrong = _tried(work)
        self.gather(lambda: _raise_first([wrong]))
        return mine

    def from_first(self, work: Callable[[], T]) -> T:
        """The first rank does the work, the others wait; what it found, for all. Errors as `gather`."""
        if self.world == 1:
            return work()
        said: list[Any] = [_tried(work) if self.first else None]
        with _connected():
            torch.distributed.broadcast_object_list(said, group_src=0, group=self.talk)
        value, wrong = said[0]
        _raise_first([wrong])
        return value

    @torch.no_grad()
    def add(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, in float32 or wider; they have one dtype and one device."""
        if self.world == 1:
            return
        for some in _bucketed(tensors):
            wide = torch.cat([t.flatten() for t in some])
            wide = wide if wide.dtype == torch.float64 else wide.float()
            with _connected():
                torch.distributed.all_reduce(wide, group=self.talk if wide.device.type == "cpu" else None)
            for tensor, total in zip(some, wide.split([t.numel() for t in some]), strict=True):
                tensor.copy_(total.view_as(tensor))


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun, or who speaks like it, started this process among others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys()


@contextmanager
def joined() -> Generator[Ranks]:
    """Within this context this process is one of those that torchrun started, or alone where nobody did."""
    if not launched():
        yield ALONE
        return
    from torch import distributed

    ours = not distributed.is_initialized()  # Ray has done it, and chosen the device
    if ours and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if ours:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        talk = distributed.new_group(backend="gloo")
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), talk)
    finally:
        if ours:
            distributed.destroy_process_group()


def _tried(work: Callable[[], T]) -> tuple[Any, str | None]:
    """What the work gave, and what a person has to be told where it gave nothing."""
    try:
        return work(), None
    except ValueError as error:
        return None, str(error)


def _raise_first(said: Iterable[str | None]) -> None:
    for wrong in said:
        if wrong is not None:
            raise ValueError(wrong)


@contextmanager
def _connected() -> Generator[None]:
    """Say in our words that another rank is gone; torch's name sockets."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"another process of this run is gone ({str(error).splitlines()[0][:200]})"
        ) from error


def _bucketed(tensors: Sequence[Tensor]) -> Generator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > AT_ONCE:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket

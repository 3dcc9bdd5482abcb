"""The processes of a run: one, or those that ``accelerate launch`` (or torchrun) has started, one a card."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qwen_longctx.errors import InvalidValue

_FSDP = "ACCELERATE_USE_FSDP"  # what `accelerate launch --use_fsdp` tells its processes


class Ranks:
    """This process among those of the run.

    Attributes
    ----------
    rank, count : int
        Number of this process, and how many there are.
    sharded : bool
        Whether the weights are divided among them (FSDP), instead of a copy each.
    """

    def __init__(self, rank: int = 0, count: int = 1, sharded: bool = False) -> None:
        self.rank, self.count, self.sharded = rank, count, sharded

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def share(self, sequences: int) -> range:
        """Which of the sequences of a step this process takes."""
        return range(self.rank, sequences, self.count)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Add up tensors of all processes, in place."""
        if self.count > 1:
            for x in tensors:
                torch.distributed.all_reduce(x)

    def total(self, number: float, device: torch.device) -> float:
        """The sum of a number of each process."""
        if self.count == 1:
            return number
        x = torch.tensor(number, dtype=torch.float64, device=device)
        self.add([x])
        return float(x)

    def check(self, sequences: int, name: str) -> None:
        """Refuse a step that cannot be divided.

        Raises
        ------
        InvalidValue
        """
        if sequences % self.count:
            raise InvalidValue(
                f"sequences_per_step of stage {name!r} is {sequences}, and {self.count} processes take one each at "
                f"least: make it a multiple of {self.count}"
            )

    def divide(self, whole: nn.Module, layers: Iterable[nn.Module]) -> None:
        """Divide the weights of a model among all processes, those of each layer by themselves (FSDP2)."""
        if not self.sharded:
            return
        from torch.distributed.fsdp import fully_shard

        for module in (*layers, whole):
            fully_shard(module)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes of this run, joined within the block; one where nothing has launched more."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    try:
        yield Ranks(state.process_index, state.num_processes, os.environ.get(_FSDP, "").lower() in ("1", "true"))
    finally:
        state.destroy_process_group()

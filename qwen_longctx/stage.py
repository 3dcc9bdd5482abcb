"""Which layers of a model this process runs, where a pipeline over processes divides them among its ranks.

The one entry a divided model has anywhere is in `_STAGES`, a part of the registry of patches: `pipeline_parallel` makes
it and `unpatch_qwen` takes it out. Nothing is kept on modules, and layers of other ranks are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary


@dataclass(frozen=True, eq=False)
class Stage:
    """The part of one rank.

    Attributes
    ----------
    rank, ranks : int
        Number of this process in the group, and how many there are.
    first, stop : int
        Its layers are those from `first` on, and before `stop`.
    link : prefill.link.Link
        To the other ranks.
    """

    rank: int
    ranks: int
    first: int
    stop: int
    link: Any

    @property
    def is_first(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the final norm and the head."""
        return self.rank == self.ranks - 1


_STAGES: WeakKeyDictionary[Any, Stage] = WeakKeyDictionary()


def stage_of(base: Any) -> Stage | None:
    """The part of a base model that this process runs; None if that is all of it."""
    return _STAGES.get(base) if _STAGES else None


def set_stage(base: Any, stage: Stage | None) -> Stage | None:
    """Note the part of a base model that this process runs; returns what was noted before."""
    before = _STAGES.pop(base, None)
    if stage is not None:
        _STAGES[base] = stage
    return before


def even_shares(layers: int, ranks: int) -> list[int]:
    """Layers of every rank, in order; the first ranks have one more where they cannot be divided evenly."""
    return [layers // ranks + (rank < layers % ranks) for rank in range(ranks)]


def layer_count(base: Any) -> int:
    """How many layers of a base model this process runs."""
    stage = stage_of(base)
    return base.config.num_hidden_layers if stage is None else stage.stop - stage.first


def own_layers(base: Any) -> Sequence[Any]:
    """The layers of a base model that this process runs."""
    stage = stage_of(base)
    return base.layers if stage is None else base.layers[stage.first : stage.stop]

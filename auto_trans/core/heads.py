"""What the heads of the files of a source tell: which rank holds which parameter.

Pure: the files themselves are read in `auto_trans.storage`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional, Protocol

from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import Extent, Shape, SourceFile
from auto_trans.errors import MissingSliceError

__all__ = ["Heads", "Stored", "find_holders", "first_there"]


class Stored(Protocol):
    """What the head of a file tells of a tensor in it."""

    @property
    def dtype(self) -> str:
        """MindSpore's name of the type."""

    @property
    def dims(self) -> Shape:
        """The dims as stored."""

    @property
    def shape(self) -> Shape:
        """The shape; () for scalars and for what cannot be sliced."""

    @property
    def nbytes(self) -> int:
        """Bytes of the contents."""

    @property
    def segments(self) -> tuple[Extent, ...]:
        """Where the contents lie."""


class Heads(Protocol):
    """The heads of the files of a source, by rank."""

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks whose files are there, in ascending order."""

    def tensors(self, rank: int) -> Mapping[str, Stored]:
        """What a rank holds, by name, in file order."""

    def file(self, rank: int, name: str) -> SourceFile:
        """The file in which a rank holds a parameter."""

    def describe(self, rank: int) -> str:
        """The files of a rank, for messages."""


def find_holders(strategy: Strategy, heads: Heads) -> dict[str, int]:
    """Every parameter that the source holds -> a rank that holds it, in file order.

    Raises:
        MissingSliceError: All ranks of a stage are missing, or a parameter lies only where its stage is not.
    """
    holders: dict[str, int] = {}
    strays: dict[str, int] = {}
    for stage in range(strategy.stages):
        members = _members(strategy, heads, stage)
        for name in heads.tensors(members[0]):
            stages = strategy.stages_of(name)
            (holders if not stages or stage in stages else strays).setdefault(name, members[0])
        if _find_spread(strategy, heads, stage, holders):
            for rank in members[1:]:
                for name in heads.tensors(rank):
                    if not strategy.lists(name):
                        holders.setdefault(name, rank)
    for name in strays.keys() - holders.keys():
        raise MissingSliceError(
            f"parameter {name} is in {heads.describe(strays[name])}, but the strategy {strategy.origin} lists it for stage "
            f"{', '.join(map(str, strategy.stages_of(name)))}, of which no file holds it; copy the missing rank folders to "
            f"the source"
        )
    return holders


def _members(strategy: Strategy, heads: Heads, stage: int) -> list[int]:
    """The ranks of a stage whose files are there."""
    devices = strategy.stage_devices
    members = [rank for rank in heads.ranks if rank // devices == stage]
    if not members:
        raise MissingSliceError(
            f"no rank folder of pipeline stage {stage} (rank {stage * devices} to {(stage + 1) * devices - 1}) is there, "
            f"which the strategy {strategy.origin} describes; copy the missing rank folders to the source"
        )
    return members


def _find_spread(strategy: Strategy, heads: Heads, stage: int, holders: dict[str, int]) -> bool:
    """Adds what the first file of a stage lacks: with redundancy removed other ranks have it.

    What the strategy lists and the file lacks is looked for in the files that own its first and its last slice; where
    both are missing, it was not saved at all.

    Returns:
        Whether something was found. Then what no strategy lists may lie with any rank, too.
    """
    there, first, spread = frozenset(heads.ranks), stage * strategy.stage_devices, False
    for name in strategy.names(stage):
        if name in holders or name in strategy.refused:
            continue
        layout = strategy.layouts[name][stage]
        for cell in _corners(layout):
            owner = first_there(heads, there, name, first, layout.owners(cell))
            if owner is not None:
                holders[name] = owner
                spread = True
                break
    return spread


def first_there(heads: Heads, there: frozenset[int], name: str, first: int, locals_: Sequence[int]) -> Optional[int]:
    """The lowest of some ranks of a stage, which begins at ``first``, whose file is there and holds a parameter."""
    for local in locals_:
        if first + local in there and name in heads.tensors(first + local):
            return first + local
    return None


def _corners(layout: Layout) -> tuple[Shape, ...]:
    """The first and the last slice of a layout."""
    grid = layout.grid(max(len(layout.tensor_map), 1) if not layout.ndims else layout.ndims[-1])
    return tuple(0 for _ in grid), tuple(n - 1 for n in grid)

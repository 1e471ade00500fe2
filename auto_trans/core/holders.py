"""Which source ranks hold what: the source strategy, compared with what is really in the files.

Pure: the files are seen through `SourceIndex`, which the caller fills from file heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Optional, Protocol

from auto_trans.core.layout import Layout, Shape
from auto_trans.core.strategy import Strategy
from auto_trans.errors import MissingSliceError, PlanError

__all__ = ["Holders", "SourceIndex", "TensorMeta"]


class TensorMeta(Protocol):
    """What a plan needs to know of a stored tensor."""

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


class SourceIndex(Protocol):
    """What the source files hold, by rank."""

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks whose files are there, in ascending order."""

    def tensors(self, rank: int) -> Mapping[str, TensorMeta]:
        """The tensors of a rank's file by name, in file order."""

    def describe(self, rank: int) -> str:
        """The rank's file, for messages."""


class Holders:
    """The parameters of a source and the ranks that hold their slices.

    Args:
        source: Strategy of the source.
        index: What its files hold.

    Attributes:
        names: Every parameter that the source holds -> a rank that holds it, in file order.

    Raises:
        MissingSliceError: All ranks of a stage, or all that hold a parameter, are missing.
        PlanError: The strategy is not that of the files.
    """

    def __init__(self, source: Strategy, index: SourceIndex) -> None:
        self._source, self._index = source, index
        self._there = frozenset(index.ranks)
        self._check_ranks()
        self.names = self._find_names()

    def _check_ranks(self) -> None:
        ranks, world = self._index.ranks, self._source.world_size
        if self._source.is_complete and len(ranks) > 1:
            raise PlanError(
                f"the source is distributed over {len(ranks)} rank folders; give the strategy that it was saved under "
                f"(src_strategy_path_or_dir)"
            )
        beyond = [rank for rank in ranks if rank >= world]
        if beyond:
            raise PlanError(
                f"the source has {len(ranks)} rank folders (up to rank_{ranks[-1]}), but its strategy "
                f"{self._source.origin} describes {world} ranks: it is one stage's file of a pipeline job, for which the "
                f"strategy folder or the merged file must be given, or the strategy of another job"
            )

    def _find_names(self) -> dict[str, int]:
        """The parameters in file order.

        The ranks of a stage hold the same parameters, so one file of a stage tells them. With redundancy removed it
        does not: what the strategy lists and this file lacks is looked for in the files that own its first slice, and
        where that finds something, what no strategy lists may lie with any rank.
        """
        names: dict[str, int] = {}
        elsewhere: dict[str, int] = {}
        devices = self._source.stage_devices
        for stage in range(self._source.stages):
            members = [rank for rank in self._index.ranks if rank // devices == stage]
            if not members:
                first = stage * devices
                raise MissingSliceError(
                    f"no rank folder of pipeline stage {stage} (rank {first} to {first + devices - 1}) is there, which the "
                    f"strategy {self._source.origin} describes; copy the missing rank folders to the source"
                )
            for name in self._index.tensors(members[0]):
                stages = self._source.stages_of(name)
                (names if not stages or stage in stages else elsewhere).setdefault(name, members[0])
            spread = False
            for name in self._source.names(stage):
                layout = None if name in names or name in self._source.refused else self._source.layout(name, stage)
                if layout is not None:
                    for cell in _corners(layout):
                        owner = self._holder(name, stage * devices, layout, cell)
                        if owner is not None:
                            names[name] = owner
                            spread = True
                            break
            for rank in members[1:] if spread else ():
                for name in self._index.tensors(rank):
                    if not self._source.lists(name):
                        names.setdefault(name, rank)
        for name in elsewhere.keys() - names.keys():
            raise MissingSliceError(
                f"parameter {name} is in {self._index.describe(elsewhere[name])}, but the strategy "
                f"{self._source.origin} lists it for stage {', '.join(map(str, self._source.stages_of(name)))}, of which "
                f"no file holds it; copy the missing rank folders to the source"
            )
        return names

    def meta(self, name: str, rank: Optional[int] = None) -> TensorMeta:
        """What a rank's file, by default that of the rank in `names`, holds of a parameter."""
        return self._index.tensors(self.names[name] if rank is None else rank)[name]

    def stage(self, name: str) -> int:
        """The stage whose slices of a parameter are read: that of the rank which was found to hold it."""
        return 0 if self._source.is_complete else self.names[name] // self._source.stage_devices

    def file(self, name: str) -> str:
        """A file that holds a parameter, for messages."""
        return self._index.describe(self.names[name])

    def owner(self, name: str, layout: Layout, cell: Shape) -> int:
        """The rank that a slice of a parameter is read from.

        Raises:
            MissingSliceError: No file holds it.
            PlanError: The file holds something else under that name.
        """
        first = self.stage(name) * self._source.stage_devices
        rank = self._holder(name, first, layout, cell)
        if rank is None:
            owners = [first + local for local in layout.owners(cell)]
            raise MissingSliceError(
                f"slice {list(cell)} of parameter {name} is held by source rank {', '.join(map(str, owners))} only, of "
                f"which no file is there that holds it; copy the missing rank folders to the source"
            )
        meta, expected = self.meta(name, rank), self.meta(name)
        if meta is not expected and (meta.shape, meta.dtype) != (expected.shape, expected.dtype):
            raise PlanError(
                f"parameter {name} is {list(meta.shape)} {meta.dtype} in {self._index.describe(rank)} but "
                f"{list(expected.shape)} {expected.dtype} in {self.file(name)}: the files are of different jobs or steps, "
                f"or the source strategy {self._source.origin} is not theirs"
            )
        return rank

    def carried_from(self, name: str, local: int) -> int:
        """The rank that a parameter without layout is taken from: the one at the same place, as in MindSpore."""
        if self._source.is_complete:
            return self.names[name]
        devices = self._source.stage_devices
        same_place = self.names[name] // devices * devices + local % devices
        there = same_place in self._there and name in self._index.tensors(same_place)
        return same_place if there else self.names[name]

    def ends(self, name: str) -> tuple[int, int]:
        """The first and the last rank of the stage that holds a parameter which have it."""
        first, devices = self.names[name], self._source.stage_devices
        members = (rank for rank in reversed(self._index.ranks) if rank // devices == first // devices)
        return first, next(rank for rank in members if name in self._index.tensors(rank))

    def _holder(self, name: str, first: int, layout: Layout, cell: Shape) -> Optional[int]:
        """The lowest rank of a stage, which begins at ``first``, that holds a slice; replicas are alike."""
        for local in layout.owners(cell):
            rank = first + local
            if rank in self._there and name in self._index.tensors(rank):
                return rank
        return None


def _corners(layout: Layout) -> tuple[Shape, ...]:
    """The first and the last slice of a layout: where both are missing, the parameter was not saved at all."""
    grid = layout.grid(max(len(layout.tensor_map), 1) if not layout.ndims else layout.ndims[-1])
    return tuple(0 for _ in grid), tuple(n - 1 for n in grid)

"""The source of a plan: which shards of which tensors there are.

A plan asks a `Source` for shards and knows nothing of rank folders or formats. `SlicedSource` is the source that a strategy
describes: rank folders, and complete checkpoints, whose strategy has every parameter whole. Pure: the heads of the files are
seen through `Heads`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Optional, Protocol

from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import Box, Extent, Shape, Shard, SourceFile, Tensor
from auto_trans.errors import LayoutError, MissingSliceError, PlanError

__all__ = ["Heads", "SlicedSource", "Source", "Stored"]


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


class Source(Protocol):
    """Tensors and their shards; what a plan needs to know of the weights that it converts."""

    @property
    def strategy(self) -> Strategy:
        """How the tensors are sliced."""

    @property
    def names(self) -> Sequence[str]:
        """Every parameter that is held, in file order."""

    def tensor(self, name: str) -> Tensor:
        """A full tensor. What the strategy does not tell about is taken to be whole.

        Raises:
            PlanError: Its layout does not fit what the files hold.
        """

    def held_shape(self, name: str) -> Shape:
        """The shape of what a rank holds of a tensor."""

    def shards(self, name: str, box: Box) -> Sequence[Shard]:
        """Shards that together hold a box of a tensor, each part of it once, in row-major order.

        Raises:
            MissingSliceError: A part of it is nowhere.
            PlanError: A file holds something else under that name.
        """

    def at(self, name: str, place: int) -> Shard:
        """A parameter that no strategy lists, as the rank at a place holds it.

        Args:
            name: The parameter.
            place: A rank within a stage of the target. MindSpore gives a rank what the source rank at the same place
                holds; where there is none, any other serves.
        """

    def where(self, name: str) -> str:
        """A file that holds a parameter, for messages."""

    def may_differ(self, name: str) -> Sequence[tuple[Shard, Shard]]:
        """Pairs of what ranks hold of a parameter that no strategy lists; if they differ, it is sliced after all."""


class _Part(NamedTuple):
    """A slice of a grid that overlaps a box, and the ranks (counted within the stage) that hold it."""

    cell: Shape
    box: Box
    owners: tuple[int, ...]


class _Grid:
    """The slices of the tensors that have one layout and one shape; the layers of a model share it."""

    def __init__(self, layout: Layout, slice_shape: Shape) -> None:
        self.slice_shape, self.full_shape = slice_shape, layout.full_shape(slice_shape)
        self._layout = layout
        self._slices: dict[Shape, _Part] = {}
        self._parts: dict[Box, tuple[_Part, ...]] = {}

    def overlapping(self, box: Box) -> tuple[_Part, ...]:
        """The slices that overlap a box."""
        parts = self._parts.get(box)
        if parts is None:
            cells = self._layout.overlapping(self.full_shape, box)
            parts = self._parts[box] = tuple(self._slice(cell) for cell, _ in cells)
        return parts

    def _slice(self, cell: Shape) -> _Part:
        if cell not in self._slices:
            box = Box(tuple(c * n for c, n in zip(cell, self.slice_shape)), self.slice_shape)
            self._slices[cell] = _Part(cell, box, self._layout.owners(cell))
        return self._slices[cell]


class SlicedSource:
    """A checkpoint whose slices lie where a strategy says.

    Args:
        strategy: The strategy that it was saved under; `Strategy.complete` for complete weights.
        heads: The heads of its files.
        holders: Every parameter that is held -> a rank that holds it, in file order, as another rank has found them; by
            default they are looked for.

    Attributes:
        holders: The same.

    Raises:
        MissingSliceError: All ranks of a stage, or all that hold a parameter, are missing.
        PlanError: The strategy is not that of the files.
    """

    def __init__(self, strategy: Strategy, heads: Heads, holders: Optional[Mapping[str, int]] = None) -> None:
        self.strategy, self._heads = strategy, heads
        self._there = frozenset(heads.ranks)
        self._check_ranks()
        self.holders: Mapping[str, int] = _find_holders(strategy, heads) if holders is None else holders
        self.names: Sequence[str] = tuple(self.holders)
        self._tensors: dict[str, Tensor] = {}
        self._grids: dict[tuple[Layout, Shape], _Grid] = {}
        self._grid_of: dict[str, _Grid] = {}

    def tensor(self, name: str) -> Tensor:
        """A full tensor, see `Source`."""
        if name not in self._tensors:
            self._tensors[name] = _as_tensor(name, self._stored(name), self._grid(name).full_shape)
        return self._tensors[name]

    def held_shape(self, name: str) -> Shape:
        """The shape of a slice, see `Source`."""
        return self._stored(name).shape

    def shards(self, name: str, box: Box) -> Sequence[Shard]:
        """Shards that together hold a box, see `Source`."""
        tensor, parts = self.tensor(name), self._grid_of[name].overlapping(box)
        return [self._shard(tensor, part) for part in parts]

    def at(self, name: str, place: int) -> Shard:
        """A parameter that no strategy lists, see `Source`."""
        devices, holder = self.strategy.stage_devices, self.holders[name]
        same_place = holder // devices * devices + place % devices
        return self._whole(name, same_place if self._holds(same_place, name) else holder)

    def where(self, name: str) -> str:
        """A file that holds a parameter, see `Source`."""
        return self._heads.file(self.holders[name], name).path

    def may_differ(self, name: str) -> Sequence[tuple[Shard, Shard]]:
        """Pairs of what ranks hold, see `Source`.

        The first and the last rank of a stage differ in every axis of the device matrix, so their slices of a tensor
        that is sliced at all are different ones. Where one of them is not there, all that are there are compared.
        """
        holder, devices = self.holders[name], self.strategy.stage_devices
        stage = range(holder // devices * devices, (holder // devices + 1) * devices)
        ends = [rank for rank in dict.fromkeys((stage[0], stage[-1])) if self._holds(rank, name)]
        # the heads of many files are not read for nothing
        is_told = len(ends) == min(devices, 2)
        first, *others = ends if is_told else [rank for rank in stage if self._holds(rank, name)]
        return [(self._whole(name, first), self._whole(name, other)) for other in others]

    def copies(self) -> Iterator[tuple[Shard, Shard]]:
        """Every slice that several ranks hold: the lowest of them with each of the others."""
        for name in self.names:
            if not self.strategy.lists(name):
                continue
            tensor, first = self.tensor(name), dict[tuple[int, Shape], Shard]()
            for rank in self._heads.ranks:
                stage = self.strategy.stage_of(rank)
                layout = self.strategy.layout(name, stage)
                if layout is None or name not in self._heads.tensors(rank):
                    continue
                box = layout.box(rank % self.strategy.stage_devices, tensor.shape)
                shard = Shard(tensor, box, self._heads.file(rank, name), self._stored(name, rank).segments)
                lowest = first.setdefault((stage, box.offset), shard)
                if lowest is not shard:
                    yield lowest, shard

    def _holds(self, rank: int, name: str) -> bool:
        return rank in self._there and name in self._heads.tensors(rank)

    def _whole(self, name: str, rank: int) -> Shard:
        stored = self._stored(name, rank)
        tensor = _as_tensor(name, stored, stored.shape)
        return Shard(tensor, Box.whole(tensor.shape), self._heads.file(rank, name), stored.segments)

    def _grid(self, name: str) -> _Grid:
        """The slices of a parameter; one where the strategy does not tell."""
        stored = self._stored(name)
        try:
            layout = self.strategy.layout(name, self._stage(name))
            key = layout or Layout.whole(self.strategy.stage_devices), stored.shape
            if key not in self._grids:
                self._grids[key] = _Grid(*key)
        except LayoutError as e:
            raise PlanError(
                f"parameter {name} of {self.where(name)} has shape {list(stored.shape)}, which does not fit "
                f"{self.strategy.origin}: {e}"
            ) from e
        self._grid_of[name] = self._grids[key]
        return self._grids[key]

    def _stored(self, name: str, rank: Optional[int] = None) -> Stored:
        """What a rank's file, by default that of the holder, tells of a parameter."""
        return self._heads.tensors(self.holders[name] if rank is None else rank)[name]

    def _stage(self, name: str) -> int:
        """The stage whose slices of a parameter are read: that of its holder."""
        return self.holders[name] // self.strategy.stage_devices

    def _shard(self, tensor: Tensor, part: _Part) -> Shard:
        """A slice as the lowest rank that holds it has it; replicas are alike."""
        name, holder = tensor.name, self.holders[tensor.name]
        first = holder - holder % self.strategy.stage_devices
        rank = _first_there(self._heads, self._there, name, first, part.owners)
        if rank is None:
            owners = ", ".join(str(first + local) for local in part.owners)
            raise MissingSliceError(
                f"slice {list(part.cell)} of parameter {name} is held by source rank {owners} only, of which no file is "
                f"there that holds it; copy the missing rank folders to the source"
            )
        stored, expected = self._heads.tensors(rank)[name], self._heads.tensors(holder)[name]
        if stored is not expected and (stored.shape, stored.dtype) != (expected.shape, expected.dtype):
            raise PlanError(
                f"parameter {name} is {list(stored.shape)} {stored.dtype} in {self._heads.describe(rank)} but "
                f"{list(expected.shape)} {expected.dtype} in {self.where(name)}: the files are of different jobs or steps, "
                f"or the source strategy {self.strategy.origin} is not theirs"
            )
        return Shard(tensor, part.box, self._heads.file(rank, name), stored.segments)

    def _check_ranks(self) -> None:
        ranks, world = self._heads.ranks, self.strategy.world_size
        if self.strategy.is_complete and len(ranks) > 1:
            raise PlanError(
                f"the source is distributed over {len(ranks)} rank folders; give the strategy that it was saved under "
                f"(«src_strategy»)"
            )
        if ranks[-1] >= world:
            raise PlanError(
                f"the source has {len(ranks)} rank folders (up to rank_{ranks[-1]}), but its strategy "
                f"{self.strategy.origin} describes {world} ranks: it is the strategy of another job, or one stage's file "
                f"of a pipeline job, for which the strategy folder or the merged file must be given («src_strategy»)"
            )


def _find_holders(strategy: Strategy, heads: Heads) -> dict[str, int]:
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
            owner = _first_there(heads, there, name, first, layout.owners(cell))
            if owner is not None:
                holders[name] = owner
                spread = True
                break
    return spread


def _first_there(heads: Heads, there: frozenset[int], name: str, first: int, locals_: Sequence[int]) -> Optional[int]:
    """The lowest of some ranks of a stage, which begins at ``first``, whose file is there and holds a parameter."""
    for local in locals_:
        if first + local in there and name in heads.tensors(first + local):
            return first + local
    return None


def _corners(layout: Layout) -> tuple[Shape, ...]:
    """The first and the last slice of a layout."""
    grid = layout.grid(max(len(layout.tensor_map), 1) if not layout.ndims else layout.ndims[-1])
    return tuple(0 for _ in grid), tuple(n - 1 for n in grid)


def _as_tensor(name: str, stored: Stored, shape: Shape) -> Tensor:
    elements = math.prod(stored.shape)
    whole_dims = stored.dims if stored.dims != stored.shape and shape == stored.shape else None
    return Tensor(name, stored.dtype, shape, stored.nbytes // max(elements, 1), whole_dims)

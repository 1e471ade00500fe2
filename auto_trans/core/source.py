"""The source of a plan: which shards of which tensors there are.

A plan asks a `Source` for shards and knows nothing of rank folders or formats. `SlicedSource` is the source that a strategy
describes: rank folders, and complete checkpoints, whose strategy has every parameter whole. Pure: the heads of the files are
seen through `Heads`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Optional, Protocol

from auto_trans.core.heads import Heads, Stored, find_holders, first_there
from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import Box, Shape, Shard, Tensor
from auto_trans.errors import LayoutError, MissingSliceError, PlanError

__all__ = ["SlicedSource", "Source"]


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
        self.holders: Mapping[str, int] = find_holders(strategy, heads) if holders is None else holders
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
        rank = first_there(self._heads, self._there, name, first, part.owners)
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


def _as_tensor(name: str, stored: Stored, shape: Shape) -> Tensor:
    elements = math.prod(stored.shape)
    whole_dims = stored.dims if stored.dims != stored.shape and shape == stored.shape else None
    return Tensor(name, stored.dtype, shape, stored.nbytes // max(elements, 1), whole_dims)

"""How one parameter lies on the ranks of one pipeline stage: layouts, slices and boxes.

Pure arithmetic: no files, no MindSpore. The rules are MindSpore's
(`Layout <https://www.mindspore.cn/docs/en/master/api_python/parallel/mindspore.parallel.Layout.html>`_):

* ranks of a stage are laid out row-major in ``dev_matrix``;
* ``tensor_map`` names for every tensor dimension the mesh axes that slice it, counted from the right of ``dev_matrix``;
  of several axes on one dimension the first listed is the major one;
* optimizer weight shard splits dimension 0 of a rank's slice among the ranks that hold the same slice, in ascending
  rank order, in groups of ``opt_shard_size`` ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from auto_trans.core.tensor import Box, Shape
from auto_trans.errors import LayoutError

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How a tensor is sliced over the ranks of one stage.

    Attributes:
        dev_matrix: The device matrix; its product is the number of ranks of the stage.
        tensor_map: For every tensor dimension the mesh axes that slice it, major axis first, counted from the right of
            ``dev_matrix``; empty = not sliced. Dimensions beyond its length are not sliced.
        opt_shard_size: Among how many ranks a slice is split by optimizer weight shard; 0 = not sharded, -1 = among
            all ranks that hold it.
        opt_shard_step: (last - first) // (count - 1) of all ranks that hold the same slice, as MindSpore writes it: the
            distance of neighbours only where these ranks are evenly spaced; 0 = not sharded.
        ndims: The numbers of tensor dimensions that the layout fits; empty = any.
    """

    dev_matrix: Shape
    tensor_map: tuple[tuple[int, ...], ...] = ()
    opt_shard_size: int = 0
    opt_shard_step: int = 0
    ndims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        axes = [axis for entry in self.tensor_map for axis in entry]
        if not self.dev_matrix or min(self.dev_matrix) < 1:
            raise LayoutError(f"dev_matrix {list(self.dev_matrix)} must hold numbers of at least 1")
        if any(not 0 <= axis < len(self.dev_matrix) for axis in axes) or len(set(axes)) != len(axes):
            raise LayoutError(
                f"tensor_map {self.tensor_map} does not fit dev_matrix {list(self.dev_matrix)}: every axis must be "
                f"from 0 to {len(self.dev_matrix) - 1} and be used once"
            )
        if self.opt_shard_size < -1 or self.opt_shard_step < 0:
            raise LayoutError(f"optimizer shard size {self.opt_shard_size} and step {self.opt_shard_step} are invalid")
        if self.opt_shards > 1:
            if self.replicas % self.opt_shards:
                raise LayoutError(
                    f"{self.replicas} ranks hold the same slice and cannot be split into optimizer shard groups of "
                    f"{self.opt_shards} (dev_matrix {list(self.dev_matrix)}, tensor_map {self.tensor_map})"
                )
            step = (self._rank_at(self.replicas - 1) - self._rank_at(0)) // (self.replicas - 1)
            if step != self.opt_shard_step:
                raise LayoutError(
                    f"opt_weight_shard_step is {self.opt_shard_step}, but the ranks that hold the same slice are {step} "
                    f"apart on average (dev_matrix {list(self.dev_matrix)}, tensor_map {self.tensor_map})"
                )

    @classmethod
    def whole(cls, devices: int = 1) -> Layout:
        """Every one of ``devices`` ranks holds the whole tensor, whatever its shape."""
        return cls((devices,))

    @classmethod
    def from_json(cls, content: Sequence[Any]) -> Layout:
        """The layout of which another rank has told the fields, in their order."""
        dev_matrix, tensor_map, opt_shard_size, opt_shard_step, ndims = content
        return cls(tuple(dev_matrix), tuple(map(tuple, tensor_map)), opt_shard_size, opt_shard_step, tuple(ndims))

    @property
    def devices(self) -> int:
        """Number of ranks of the stage."""
        return math.prod(self.dev_matrix)

    @property
    def replicas(self) -> int:
        """How many ranks hold the same slice, before optimizer weight shard."""
        return self.devices // math.prod(self.split(len(self.tensor_map)))

    @property
    def opt_shards(self) -> int:
        """Into how many parts optimizer weight shard splits a slice; 1 = none.

        As in MindSpore a size or a step of 0 means that the parameter is not sharded.
        """
        if not self.opt_shard_size or not self.opt_shard_step:
            return 1
        return self.replicas if self.opt_shard_size == -1 else self.opt_shard_size

    def split(self, ndim: int) -> Shape:
        """Into how many slices each of ``ndim`` dimensions is cut, before optimizer weight shard."""
        counts = [math.prod(self._axis_size(axis) for axis in entry) for entry in self.tensor_map[:ndim]]
        return tuple(counts) + (1,) * (ndim - len(counts))

    def grid(self, ndim: int) -> Shape:
        """Into how many slices each of ``ndim`` dimensions is cut.

        Raises:
            LayoutError: A tensor of that many dimensions cannot have this layout.
        """
        sliced = max((i + 1 for i, entry in enumerate(self.tensor_map) if entry), default=0)
        if ndim < sliced or (self.ndims and ndim and ndim not in self.ndims) or (not ndim and self.opt_shards > 1):
            raise LayoutError(
                f"a layout for {' or '.join(map(str, self.ndims)) or f'at least {sliced}'} dimensions (tensor_map "
                f"{self.tensor_map}) cannot be that of a tensor with {ndim}"
            )
        counts = self.split(ndim)
        return (counts[0] * self.opt_shards, *counts[1:]) if ndim else ()

    def full_shape(self, slice_shape: Shape) -> Shape:
        """Shape of the full tensor of which a rank holds ``slice_shape``."""
        return tuple(n * count for n, count in zip(slice_shape, self.grid(len(slice_shape))))

    def slice_shape(self, full_shape: Shape) -> Shape:
        """Shape of a rank's slice of a tensor of ``full_shape``.

        Raises:
            LayoutError: A dimension does not divide evenly.
        """
        grid = self.grid(len(full_shape))
        if any(n % count for n, count in zip(full_shape, grid)):
            raise LayoutError(f"shape {list(full_shape)} does not divide evenly into {list(grid)} slices")
        return tuple(n // count for n, count in zip(full_shape, grid))

    def cell(self, rank: int, ndim: int) -> Shape:
        """Which slice of the grid ``rank`` (counted within the stage) holds, per dimension."""
        coordinate = _unravel(rank % self.devices, self.dev_matrix)
        cell = []
        for entry in self.tensor_map[:ndim]:
            index = 0
            for axis in entry:
                index = index * self._axis_size(axis) + coordinate[-1 - axis]
            cell.append(index)
        cell += [0] * (ndim - len(cell))
        if ndim and self.opt_shards > 1:
            position = 0
            for axis in self._free_axes:
                position = position * self._axis_size(axis) + coordinate[-1 - axis]
            cell[0] = cell[0] * self.opt_shards + position % self.opt_shards
        return tuple(cell)

    def box(self, rank: int, full_shape: Shape) -> Box:
        """The part of a tensor of ``full_shape`` that ``rank`` (counted within the stage) holds."""
        size = self.slice_shape(full_shape)
        return Box(tuple(c * n for c, n in zip(self.cell(rank, len(size)), size)), size)

    def owners(self, cell: Shape) -> tuple[int, ...]:
        """The ranks (counted within the stage) that hold a slice of the grid, in ascending order."""
        ndim = len(cell)
        fixed = {}
        index = list(cell)
        part = 0
        if ndim:
            index[0], part = divmod(cell[0], self.opt_shards)
        for dim, entry in enumerate(self.tensor_map[:ndim]):
            for axis in reversed(entry):
                index[dim], fixed[axis] = divmod(index[dim], self._axis_size(axis))
        return tuple(self._rank_at(position, fixed) for position in range(part, self.replicas, self.opt_shards))

    def overlapping(self, full_shape: Shape, box: Box) -> Iterator[tuple[Shape, Box]]:
        """The slices of the grid that overlap ``box`` and the common part of each, in row-major order."""
        size = self.slice_shape(full_shape)
        ranges = [range(o // n, (o + s - 1) // n + 1) if s else range(0) for o, s, n in zip(box.offset, box.size, size)]
        for cell in itertools.product(*ranges):
            common = box.intersect(Box(tuple(c * n for c, n in zip(cell, size)), size))
            if common is not None:
                yield cell, common

    def _axis_size(self, axis: int) -> int:
        return self.dev_matrix[-1 - axis]

    @property
    def _free_axes(self) -> list[int]:
        """Axes that slice no dimension, from the left of the device matrix: their ranks hold the same slice."""
        used = {axis for entry in self.tensor_map for axis in entry}
        return [axis for axis in reversed(range(len(self.dev_matrix))) if axis not in used]

    def _rank_at(self, position: int, fixed: dict[int, int] | None = None) -> int:
        """The ``position``-th of the ranks that hold the slice given by the coordinates ``fixed``."""
        coordinate = dict(fixed or {})
        for axis in reversed(self._free_axes):
            position, coordinate[axis] = divmod(position, self._axis_size(axis))
        rank = 0
        for axis in reversed(range(len(self.dev_matrix))):
            rank = rank * self._axis_size(axis) + coordinate.get(axis, 0)
        return rank


def _unravel(index: int, shape: Sequence[int]) -> list[int]:
    coordinate = []
    for n in reversed(shape):
        index, c = divmod(index, n)
        coordinate.append(c)
    return coordinate[::-1]

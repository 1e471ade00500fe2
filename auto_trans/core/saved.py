"""What a Checkpoint 2.0 of MindFormers tells of its parameters, as slices, a strategy, and who holds what.

Pure arithmetic; metadata.json itself is read in `auto_trans.storage.checkpoint2`. MindFormers numbers the slices of a
parameter row-major over its grid, and has no optimizer weight shard: that is further axes of the first dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Optional

from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import Shape
from auto_trans.errors import CorruptCheckpointError, LayoutError, MissingSliceError

__all__ = ["Place", "Saved", "SavedTensor", "arrange_saved", "slice_numbers", "with_axes"]


class Place(NamedTuple):
    """A file that holds a slice, and the rank that wrote it."""

    file: str
    rank: int


class SavedTensor(NamedTuple):
    """A parameter as metadata.json tells of it.

    Attributes:
        name: The parameter.
        dtype: MindSpore's name of its type.
        shape: Full shape.
        layout: How it is sliced, without optimizer weight shard; None: every rank that wrote it holds it whole.
        ranks: The ranks of its stage, in the order of the device matrix; empty where there is no layout.
        places: Per number of a slice the files that hold it.
    """

    name: str
    dtype: str
    shape: Shape
    layout: Optional[Layout]
    ranks: tuple[int, ...]
    places: Sequence[Sequence[Place]]

    @property
    def slice_shape(self) -> Shape:
        """The shape of a slice."""
        return self.layout.slice_shape(self.shape) if self.layout else self.shape


@dataclass(frozen=True)
class Saved:
    """All that metadata.json tells.

    Attributes:
        tensors: The parameters by name.
        strategy: How they are sliced.
        held: Rank -> parameter -> the file that holds the rank's slice of it.
        writers: File -> the rank that wrote it.
    """

    tensors: Mapping[str, SavedTensor] = field(repr=False)
    strategy: Strategy
    held: Mapping[int, Mapping[str, str]] = field(repr=False)
    writers: Mapping[str, int] = field(repr=False)


def slice_numbers(layout: Layout, ndim: int) -> list[int]:
    """The number of the slice that every rank of a stage holds."""
    grid = layout.grid(ndim)
    numbers = []
    for rank in range(layout.devices):
        number = 0
        for index, count in zip(layout.cell(rank, ndim), grid):
            number = number * count + index
        numbers.append(number)
    return numbers


def with_axes(layout: Layout) -> Layout:
    """The same slices without optimizer weight shard: by further axes of the first dimension, of a finer device matrix.

    Raises:
        LayoutError: No axes do the same, as where 4 of 2 x 6 ranks share a slice.
    """
    if layout.opt_shards == 1:
        return layout
    used = {axis for entry in layout.tensor_map for axis in entry}
    left = layout.opt_shards
    matrix: list[int] = []  # from the right
    axes: dict[int, int] = {}  # that of the given layout -> that of the new one
    added: list[int] = []
    for axis, size in enumerate(reversed(layout.dev_matrix)):
        if axis in used or left == 1:
            axes[axis] = len(matrix)
            matrix.append(size)
            continue
        part = math.gcd(left, size)
        if part not in (left, size):
            raise LayoutError(
                f"optimizer weight shard in groups of {layout.opt_shards} ranks (dev_matrix {list(layout.dev_matrix)}, "
                f"tensor_map {layout.tensor_map}) cannot be written as axes of a device matrix, which Checkpoint 2.0 needs"
            )
        if part > 1:
            added.append(len(matrix))
        matrix += [part, size // part] if part < size else [part]
        left //= part
    entries = [tuple(axes[axis] for axis in entry) for entry in layout.tensor_map] or [()]
    entries[0] += tuple(reversed(added))
    return Layout(tuple(reversed(matrix)), tuple(entries), ndims=layout.ndims)


def arrange_saved(tensors: Iterable[SavedTensor], origin: str) -> Saved:
    """The strategy that parameters were saved under, and which rank holds what of them where.

    A slice that ranks of another stage alone have written counts as held by the first rank whose slice it is.

    Args:
        tensors: The parameters.
        origin: The file that tells of them, for messages.

    Raises:
        CorruptCheckpointError: What is told contradicts itself.
        LayoutError: The parameters do not lie on stages of equally many ranks.
        MissingSliceError: A slice is in no file.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    devices, stages = _stages(by_name.values(), origin)
    layouts: dict[str, dict[int, Layout]] = {}
    held: dict[int, dict[str, str]] = {}
    writers: dict[str, int] = {}
    tables: dict[tuple[Layout, int], list[int]] = {}
    for tensor in by_name.values():
        for number, places in enumerate(tensor.places):
            if not places:
                raise MissingSliceError(
                    f"{origin}: parameter {tensor.name}: slice {number} is in no file: the save was not finished, or "
                    f"metadata.json is damaged; copy it again, or take another iteration («src»)"
                )
        for place in (place for places in tensor.places for place in places):
            if writers.setdefault(place.file, place.rank) != place.rank:
                raise CorruptCheckpointError(
                    f"{origin}: parameter {tensor.name}: {place.file} is a file of rank {place.rank}, and of rank "
                    f"{writers[place.file]} by another parameter; copy metadata.json of the same iteration again"
                )
        if tensor.layout is None:
            layouts[tensor.name] = {}
            for place in tensor.places[0]:
                layouts[tensor.name][place.rank // devices] = Layout.whole(devices)
                _hold(held, place.rank, tensor.name, place.file, origin)
            continue
        layouts[tensor.name] = {tensor.ranks[0] // devices: tensor.layout}
        key = tensor.layout, len(tensor.shape)
        if key not in tables:
            tables[key] = slice_numbers(*key)
        _hold_slices(held, tensor, tables[key], origin)
    return Saved(by_name, Strategy(stages, devices, layouts, origin=origin), held, writers)


def _stages(tensors: Iterable[SavedTensor], origin: str) -> tuple[int, int]:
    """Ranks of a stage, and number of stages."""
    devices, last = 0, 0
    first = ""
    for tensor in tensors:
        last = max(last, *tensor.ranks, *(place.rank for places in tensor.places for place in places), 0)
        if tensor.layout is None:
            continue
        devices, first = devices or len(tensor.ranks), first or tensor.name
        begin = tensor.ranks[0]
        if begin % devices or tensor.ranks != tuple(range(begin, begin + devices)):
            raise LayoutError(
                f"{origin}: parameter {tensor.name} lies on rank {', '.join(map(str, tensor.ranks))}, which is no pipeline "
                f"stage of {devices} consecutive ranks, as parameter {first} has it; such a checkpoint cannot be converted"
            )
    devices = devices or last + 1
    return devices, last // devices + 1


def _hold_slices(held: dict[int, dict[str, str]], tensor: SavedTensor, numbers: Sequence[int], origin: str) -> None:
    first = tensor.ranks[0]
    for number, places in enumerate(tensor.places):
        own = [place for place in places if 0 <= place.rank - first < len(numbers)]
        for place in own:
            if numbers[place.rank - first] != number:
                raise CorruptCheckpointError(
                    f"{origin}: parameter {tensor.name}: {place.file} of rank {place.rank} should hold slice {number}, but "
                    f"by the layout that rank has slice {numbers[place.rank - first]}; copy metadata.json again"
                )
            _hold(held, place.rank, tensor.name, place.file, origin)
        if not own:
            _hold(held, first + numbers.index(number), tensor.name, places[0].file, origin)


def _hold(held: dict[int, dict[str, str]], rank: int, name: str, file: str, origin: str) -> None:
    if held.setdefault(rank, {}).setdefault(name, file) != file:
        raise CorruptCheckpointError(
            f"{origin}: parameter {name}: rank {rank} has it in {held[rank][name]} and in {file}; copy metadata.json again"
        )

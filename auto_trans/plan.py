"""What has to be copied where: source strategy + target strategy + what the source files hold -> a plan.

Pure: nothing is read or written here. The source is seen through `SourceIndex`, which the caller fills from file heads.

A plan follows MindSpore's conversion where that is right: parameters that both strategies list are re-sliced, those that
no strategy lists (global_step, loss scale, ...) are carried over as they are. Where MindSpore is silently wrong a plan is
refused, naming the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional, Protocol

from auto_trans.errors import ConfigError, LayoutError, MissingSliceError, PlanError
from auto_trans.layout import Box, Layout, Shape
from auto_trans.strategy import Strategy, is_optimizer_state

__all__ = ["ConversionPlan", "Copy", "FilePlan", "SourceIndex", "TensorMeta", "TensorPlan", "plan_conversion"]


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


@dataclass(frozen=True)
class Copy:
    """A box of a source tensor that goes to a box of a target tensor.

    Attributes:
        rank: The source rank whose file holds it.
        source: Where it begins in the source rank's slice, in elements per dimension.
        target: The box in the target rank's slice.
    """

    rank: int
    source: Shape
    target: Box


@dataclass(frozen=True)
class TensorPlan:
    """A target tensor and the copies that make it up; they cover it exactly once.

    Attributes:
        name: The parameter.
        dtype: MindSpore's name of its type.
        dims: Its dims as they are stored.
        shape: Shape of the target slice.
        nbytes: Bytes of the target slice.
        copies: What it is copied from.
        offset: Where the slice begins in the full tensor, in elements per dimension.
    """

    name: str
    dtype: str
    dims: Shape
    shape: Shape
    nbytes: int
    copies: tuple[Copy, ...]
    offset: Shape = ()


@dataclass(frozen=True)
class FilePlan:
    """The contents of a target file; the ranks of a plan (replicas) share it."""

    ranks: tuple[int, ...]
    tensors: tuple[TensorPlan, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class ConversionPlan:
    """A whole conversion.

    Attributes:
        files: The distinct target files.
        carried: Parameters that no strategy lists; they are copied as they are.
        absent: Parameters that the target lists and the source does not hold.
        dropped: Optimizer state that the target, which has no optimizer, does not take.
        replicated: Parameters that must be the same on all source ranks -> two ranks whose files show whether they are.
    """

    files: tuple[FilePlan, ...]
    carried: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    replicated: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of tensors to be written, replicas counted once."""
        return sum(file.nbytes for file in self.files)

    @property
    def source_ranks(self) -> tuple[int, ...]:
        """The source ranks whose files are read, in ascending order."""
        return tuple(sorted({copy.rank for file in self.files for t in file.tensors for copy in t.copies}))


def plan_conversion(
    source: Strategy, target: Strategy, index: SourceIndex, ranks: Optional[Iterable[int]] = None
) -> ConversionPlan:
    """Plans the files of the target ranks.

    Args:
        source: Strategy of the source; `Strategy.complete` for complete weights.
        target: Strategy of the target.
        index: What the source files hold.
        ranks: The target ranks to plan; all by default. A rank's file does not depend on which others are planned.

    Raises:
        ConfigError: A rank is not in the target.
        PlanError: The source and the strategies do not make up the target.
        LayoutError: A layout does not fit a tensor.
    """
    wanted = sorted(set(range(target.world_size) if ranks is None else ranks))
    outside = [rank for rank in wanted if not 0 <= rank < target.world_size]
    if outside or not wanted:
        raise ConfigError(
            f"rank {outside or 'list'} is not in the target, which has ranks 0 to {target.world_size - 1}"
        )
    return _Planner(source, target, index).plan(wanted)


class _Planner:
    def __init__(self, source: Strategy, target: Strategy, index: SourceIndex) -> None:
        self._source, self._target, self._index = source, target, index
        self._tensors: dict[tuple[str, Layout, Shape], TensorPlan] = {}
        self._there = frozenset(index.ranks)
        self._check_ranks()
        self._names = self._source_names()
        self._sliced, self._carried, self._dropped = self._sort_names()

    def plan(self, ranks: Sequence[int]) -> ConversionPlan:
        wanted = set(ranks)
        files = []
        for stage in sorted({self._target.stage_of(rank) for rank in ranks}):
            for group in self._replica_groups(stage):
                members = tuple(rank for rank in group if rank in wanted)
                if members:
                    files.append(FilePlan(members, tuple(self._file(stage, group[0]))))
        absent = () if self._source.is_complete and self._target.is_complete else self._absent()
        return ConversionPlan(tuple(files), self._carried, absent, self._dropped, self._must_be_replicated())

    # what is there

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

    def _source_names(self) -> dict[str, int]:
        """Every parameter that the source holds -> a rank that holds it, in file order.

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
                        owner = self._holder(name, stage, layout, cell)
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

    def _sort_names(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Which parameters are re-sliced, carried over, and dropped."""
        sliced, carried, lost, unlisted = [], [], [], []
        for name in self._names:
            in_source = self._source.lists(name) and not self._source.is_complete
            in_target = self._target.lists(name) and not self._target.is_complete
            if not in_source and not in_target:
                carried.append(name)
            elif (in_source or self._source.is_complete) and (in_target or self._target.is_complete):
                sliced.append(name)
            elif in_source:
                lost.append(name)
            else:
                unlisted.append(name)
        whole = self._source.is_complete and self._target.is_complete
        if not sliced and not whole:
            raise PlanError(
                f"none of the {len(self._names)} parameters of the source ({_some(self._names)}) is both in the source "
                f"strategy ({self._source.origin}) and in the target strategy ({self._target.origin}); they are of "
                f"another model"
            )
        if unlisted:
            raise PlanError(
                f"parameter {_some(unlisted)} is in the source and in the target strategy {self._target.origin}, but not "
                f"in the source strategy {self._source.origin}; give the strategy that the weights were saved under, of "
                f"all pipeline stages"
            )
        # A target without any optimizer state is a job that does not train it further: dropping is what it asks for.
        has_optimizer = any(is_optimizer_state(name) for name in self._target.names())
        dropped = [name for name in lost if is_optimizer_state(name) and not has_optimizer]
        if len(dropped) < len(lost):
            missing = [name for name in lost if name not in set(dropped)]
            raise PlanError(
                f"parameter {_some(missing)} is in the source, but not in the target strategy {self._target.origin}; give "
                f"the strategy of the same model, of all pipeline stages"
            )
        if self._source.is_complete and not whole:
            strange = [n for n in carried if math.prod(self._meta(self._names[n], n).shape) > 1]
            weights = [n for n in strange if not is_optimizer_state(n)]
            wanted = [n for n in self._target.names() if n not in self._names and not is_optimizer_state(n)]
            if weights and wanted:
                raise PlanError(
                    f"the source holds {_some(weights)}, which the target strategy {self._target.origin} does not list, "
                    f"and lacks {_some(wanted)}, which it lists; they are of another model"
                )
            if not has_optimizer:
                dropped = [n for n in strange if is_optimizer_state(n)]
                carried = [n for n in carried if n not in set(dropped)]
        return tuple(sliced), tuple(carried), tuple(dropped)

    def _absent(self) -> tuple[str, ...]:
        # accumulated gradients are in the strategies of pipeline jobs, but never in a checkpoint
        names = (n for n in self._target.names() if n not in self._names and not n.startswith("accu_grads."))
        return tuple(sorted(names))

    def _must_be_replicated(self) -> dict[str, tuple[int, int]]:
        """Carried tensors of a distributed source, which are right only if no rank holds a slice of them.

        The first and the last rank of a stage differ in every axis of the device matrix, so their slices of a tensor
        that is sliced at all are different ones. Single numbers cannot be sliced.
        """
        pairs = {}
        if not self._source.is_complete:
            devices = self._source.stage_devices
            for name in self._carried:
                first = self._names[name]
                if math.prod(self._meta(first, name).shape) > 1:
                    members = (rank for rank in reversed(self._index.ranks) if rank // devices == first // devices)
                    last = next(rank for rank in members if name in self._index.tensors(rank))
                    if last != first:
                        pairs[name] = (first, last)
        return pairs

    # target files

    def _replica_groups(self, stage: int) -> Iterable[tuple[int, ...]]:
        """The ranks of a target stage by equal contents."""
        devices = self._target.stage_devices
        layouts = {layout for n in self._sliced if (layout := self._target.layout(n, stage)) is not None}
        groups: dict[tuple[Shape, ...], list[int]] = {}
        for local in range(devices):
            cells = tuple(layout.cell(local, max(len(layout.tensor_map), 1)) for layout in layouts)
            groups.setdefault(cells, []).append(stage * devices + local)
        return [tuple(group) for group in groups.values()]

    def _file(self, stage: int, rank: int) -> Iterable[TensorPlan]:
        """The tensors of a target rank; ``rank`` is the lowest of its replicas."""
        local = rank % self._target.stage_devices
        for name in self._sliced:
            layout = self._target.layout(name, stage)
            if layout is not None:
                yield self._sliced_tensor(name, layout, local)
        for name in self._carried:
            owner = self._carried_from(name, local)
            meta = self._meta(owner, name)
            start = (0,) * len(meta.shape)
            whole = Copy(owner, start, Box.whole(meta.shape))
            yield TensorPlan(name, meta.dtype, meta.dims, meta.shape, meta.nbytes, (whole,), start)

    def _carried_from(self, name: str, local: int) -> int:
        """The source rank that a parameter without layout is taken from: the one at the same place, as in MindSpore."""
        if self._source.is_complete:
            return self._names[name]
        same_place = self._names[name] // self._source.stage_devices * self._source.stage_devices
        same_place += local % self._source.stage_devices
        there = same_place in self._there and name in self._index.tensors(same_place)
        return same_place if there else self._names[name]

    def _sliced_tensor(self, name: str, layout: Layout, local: int) -> TensorPlan:
        stage = self._source_stage(name)
        source = self._source.layout(name, stage)
        assert source is not None, name
        meta = self._meta(self._names[name], name)
        try:
            full = source.full_shape(meta.shape)
            box = layout.box(local, full)
            key = (name, layout, box.offset)
            if key not in self._tensors:
                copies = tuple(
                    Copy(
                        self._owner(name, stage, source, cell, meta),
                        tuple(o - c * n for o, c, n in zip(part.offset, cell, meta.shape)),
                        part.relative_to(box.offset),
                    )
                    for cell, part in source.overlapping(full, box)
                )
                nbytes = meta.nbytes // max(math.prod(meta.shape), 1) * box.volume
                dims = meta.dims if box.size == meta.shape else box.size
                self._tensors[key] = TensorPlan(name, meta.dtype, dims, box.size, nbytes, copies, box.offset)
            return self._tensors[key]
        except LayoutError as e:
            raise PlanError(
                f"parameter {name} of {self._index.describe(self._names[name])} has shape {list(meta.shape)}, which does "
                f"not fit {self._source.origin} or {self._target.origin}: {e}"
            ) from e

    # source slices

    def _source_stage(self, name: str) -> int:
        """The stage whose slices are read: that of the rank which was found to hold the parameter."""
        return 0 if self._source.is_complete else self._names[name] // self._source.stage_devices

    def _meta(self, rank: int, name: str) -> TensorMeta:
        return self._index.tensors(rank)[name]

    def _holder(self, name: str, stage: int, layout: Layout, cell: Shape) -> Optional[int]:
        """The lowest rank that is there and holds a slice, as replicas are alike."""
        first = stage * self._source.stage_devices
        for local in layout.owners(cell):
            rank = first + local
            if rank in self._there and name in self._index.tensors(rank):
                return rank
        return None

    def _owner(self, name: str, stage: int, layout: Layout, cell: Shape, expected: TensorMeta) -> int:
        rank = self._holder(name, stage, layout, cell)
        if rank is None:
            first = stage * self._source.stage_devices
            owners = [first + local for local in layout.owners(cell)]
            raise MissingSliceError(
                f"slice {list(cell)} of parameter {name} is held by source rank {', '.join(map(str, owners))} only, of "
                f"which no file is there that holds it; copy the missing rank folders to the source"
            )
        meta = self._meta(rank, name)
        if (meta.shape, meta.dtype) != (expected.shape, expected.dtype):
            raise PlanError(
                f"parameter {name} is {list(meta.shape)} {meta.dtype} in {self._index.describe(rank)} but "
                f"{list(expected.shape)} {expected.dtype} in {self._index.describe(self._names[name])}: the files are of "
                f"different jobs or steps, or the source strategy {self._source.origin} is not theirs"
            )
        return rank


def _corners(layout: Layout) -> tuple[Shape, ...]:
    """The first and the last slice of a layout: where both are missing, the parameter was not saved at all."""
    grid = layout.grid(max(len(layout.tensor_map), 1) if not layout.ndims else layout.ndims[-1])
    return tuple(0 for _ in grid), tuple(n - 1 for n in grid)


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")

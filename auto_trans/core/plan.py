"""What has to be copied where: source strategy + target strategy + what the source files hold -> a plan.

Pure: nothing is read or written here.

A plan follows MindSpore's conversion where that is right: parameters that both strategies list are re-sliced, those that
no strategy lists (global_step, loss scale, ...) are carried over as they are. Where MindSpore is silently wrong a plan is
refused, naming the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Optional

from auto_trans.core.holders import Holders, SourceIndex
from auto_trans.core.layout import Box, Layout, Shape
from auto_trans.core.strategy import Strategy, is_optimizer_state
from auto_trans.errors import ConfigError, LayoutError, PlanError

__all__ = ["ConversionPlan", "Copy", "FilePlan", "TensorPlan", "plan_conversion"]


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
        replicas: All ranks of the target, planned or not, by equal contents.
    """

    files: tuple[FilePlan, ...]
    carried: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    replicated: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    replicas: tuple[tuple[int, ...], ...] = ()

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


# the box of a target slice; per part the cell of a source slice, where it begins in that, its box in the target slice
_Cut = tuple[Box, tuple[tuple[Shape, Shape, Box], ...]]


class _Planner:
    def __init__(self, source: Strategy, target: Strategy, index: SourceIndex) -> None:
        self._source, self._target = source, target
        self._holders = Holders(source, index)
        self._names = self._holders.names
        self._tensors: dict[tuple[str, Box], TensorPlan] = {}
        self._cuts: dict[tuple[Layout, Layout, Shape, Shape], _Cut] = {}
        self._sliced, self._carried, self._dropped = self._sort_names()

    def plan(self, ranks: Sequence[int]) -> ConversionPlan:
        wanted = set(ranks)
        files, replicas = [], []
        for stage in range(self._target.stages):
            layouts = self._layouts(stage)
            for group in self._replica_groups(layouts.values(), stage):
                replicas.append(group)
                members = tuple(rank for rank in group if rank in wanted)
                if members:
                    files.append(FilePlan(members, tuple(self._file(layouts, group[0]))))
        absent = () if self._source.is_complete and self._target.is_complete else self._absent()
        different = self._must_be_replicated()
        return ConversionPlan(tuple(files), self._carried, absent, self._dropped, different, tuple(replicas))

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
            strange = [n for n in carried if math.prod(self._holders.meta(n).shape) > 1]
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
        if self._source.is_complete:
            return {}
        arrays = [name for name in self._carried if math.prod(self._holders.meta(name).shape) > 1]
        ends = ((name, self._holders.ends(name)) for name in arrays)
        return {name: (first, last) for name, (first, last) in ends if first != last}

    # target files

    def _layouts(self, stage: int) -> dict[str, Layout]:
        """The parameters that a target stage has, and how they are sliced there."""
        found = ((name, self._target.layout(name, stage)) for name in self._sliced)
        return {name: layout for name, layout in found if layout is not None}

    def _replica_groups(self, layouts: Iterable[Layout], stage: int) -> Iterable[tuple[int, ...]]:
        """The ranks of a target stage by equal contents."""
        devices = self._target.stage_devices
        groups: dict[tuple[Shape, ...], list[int]] = {}
        distinct = set(layouts)
        for local in range(devices):
            cells = tuple(layout.cell(local, max(len(layout.tensor_map), 1)) for layout in distinct)
            groups.setdefault(cells, []).append(stage * devices + local)
        return [tuple(group) for group in groups.values()]

    def _file(self, layouts: Mapping[str, Layout], rank: int) -> Iterable[TensorPlan]:
        """The tensors of a target rank, which is the lowest of its replicas."""
        local = rank % self._target.stage_devices
        for name, layout in layouts.items():
            yield self._sliced_tensor(name, layout, local)
        for name in self._carried:
            owner = self._holders.carried_from(name, local)
            meta = self._holders.meta(name, owner)
            start = (0,) * len(meta.shape)
            whole = Copy(owner, start, Box.whole(meta.shape))
            yield TensorPlan(name, meta.dtype, meta.dims, meta.shape, meta.nbytes, (whole,), start)

    def _sliced_tensor(self, name: str, layout: Layout, local: int) -> TensorPlan:
        meta = self._holders.meta(name)
        try:
            source = self._source.layout(name, self._holders.stage(name))
            assert source is not None, name
            box, parts = self._cut(source, layout, meta.shape, local)
        except LayoutError as e:
            raise PlanError(
                f"parameter {name} of {self._holders.file(name)} has shape {list(meta.shape)}, which does not fit "
                f"{self._source.origin} or {self._target.origin}: {e}"
            ) from e
        key = (name, box)
        if key not in self._tensors:
            copies = tuple(Copy(self._holders.owner(name, source, cell), start, part) for cell, start, part in parts)
            nbytes = meta.nbytes // max(math.prod(meta.shape), 1) * box.volume
            dims = meta.dims if box.size == meta.shape else box.size
            self._tensors[key] = TensorPlan(name, meta.dtype, dims, box.size, nbytes, copies, box.offset)
        return self._tensors[key]

    def _cut(self, source: Layout, target: Layout, slice_shape: Shape, local: int) -> _Cut:
        """Which slices of the source make up the slice of a target rank.

        The layers of a model are sliced alike: what is found for one serves all.

        Returns:
            The target slice's box in the full tensor; per part the cell of the source slice that holds it, where it
            begins in that, and its box in the target slice.
        """
        key = (source, target, slice_shape, target.cell(local, len(slice_shape)))
        if key not in self._cuts:
            full = source.full_shape(slice_shape)
            box = target.box(local, full)
            parts = tuple(
                (
                    cell,
                    tuple(o - c * n for o, c, n in zip(part.offset, cell, slice_shape)),
                    part.relative_to(box.offset),
                )
                for cell, part in source.overlapping(full, box)
            )
            self._cuts[key] = box, parts
        return self._cuts[key]


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")

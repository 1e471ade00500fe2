"""A source + the strategy of the target -> a plan.

Pure: nothing is read or written here. A plan follows MindSpore's conversion where that is right: parameters that both
strategies list are sliced anew, those that no strategy lists (global_step, loss scale, ...) are carried as they are. Where
MindSpore is silently wrong a plan is refused, see `auto_trans.core.rules`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Optional

from auto_trans.core.edits import Edit, Product, apply_edits
from auto_trans.core.layout import Layout
from auto_trans.core.plan import Addition, Copy, FilePlan, Plan, TensorPlan
from auto_trans.core.rules import NOTHING, Allowed, sort_parameters
from auto_trans.core.source import Source
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import FLOAT_TYPES, Box, Shape, Shard, Tensor
from auto_trans.errors import ConfigError, LayoutError, PlanError

__all__ = ["make_plan"]


def make_plan(
    source: Source,
    target: Strategy,
    ranks: Optional[Iterable[int]] = None,
    *,
    edits: Sequence[Edit] = (),
    allowed: Allowed = NOTHING,
) -> Plan:
    """Plans the files of the target ranks.

    Args:
        source: What there is.
        target: Strategy of the target.
        ranks: The target ranks to plan; all by default. A rank's file does not depend on which others are planned.
        edits: Changes on the way, in order.
        allowed: What is allowed although it looks wrong.

    Raises:
        ConfigError: A rank is not in the target.
        PlanError: The source and the strategies do not make up the target.
        LayoutError: A layout does not fit a tensor.
    """
    wanted = sorted(set(range(target.world_size) if ranks is None else ranks))
    outside = [rank for rank in wanted if not 0 <= rank < target.world_size]
    if outside or not wanted:
        raise ConfigError(
            f"{_ranks(outside)} not in the target, which has ranks 0 to {target.world_size - 1} («ranks»)"
        )
    with _collector_paused():
        return _Planner(source, target, edits, allowed).plan(wanted)


class _Lying(NamedTuple):
    """How a parameter lies in a target stage: which parameter, and which of the stage's distinct slicings."""

    name: str
    slicing: int


class _Slicing(NamedTuple):
    """A layout of a target stage and the shape of what it slices; the layers of a model share it."""

    layout: Layout
    shape: Shape
    first_name: str


class _Place:
    """A box that target slices of a stage take, and what is planned of it so far.

    Args:
        box: The box.
        overlaps: Per box that a shard holds, where their common part begins in that, and its box in the target slice. The
            layers of a model are sliced alike: what is found for one serves all.
    """

    def __init__(self, box: Box, overlaps: dict[Box, tuple[Shape, Box]]) -> None:
        self.box, self.made = box, dict[str, TensorPlan]()
        self._overlaps = overlaps

    def copy(self, shard: Shard) -> Copy:
        """What of a shard goes to the slice."""
        overlap = self._overlaps.get(shard.box)
        if overlap is None:
            common = shard.box.intersect(self.box)
            assert common is not None, (shard.box, self.box)
            overlap = common.relative_to(shard.box.offset).offset, common.relative_to(self.box.offset)
            self._overlaps[shard.box] = overlap
        return Copy(shard, *overlap)


class _Planner:
    def __init__(self, source: Source, target: Strategy, edits: Sequence[Edit], allowed: Allowed) -> None:
        self._source, self._target = source, target
        self._recipes = apply_edits(edits, source.names)
        self._sorting = sort_parameters(source, target, self._recipes, allowed)
        self._additions: dict[str, Optional[Addition]] = {}
        self._untold_factors: list[str] = []  # matrices of products that the source strategy does not list
        self._cells: dict[Layout, list[Shape]] = {}
        self._overlaps: dict[Box, dict[Box, tuple[Shape, Box]]] = {}

    def plan(self, ranks: Sequence[int]) -> Plan:
        wanted = set(ranks)
        files, replicas = [], []
        for stage in range(self._target.stages):
            lying, slicings = self._lying(stage)
            places: dict[tuple[int, Box], _Place] = {}
            for group in self._replica_groups(slicings, stage):
                replicas.append(group)
                members = tuple(rank for rank in group if rank in wanted)
                if members:
                    files.append(FilePlan(members, tuple(self._tensors(lying, slicings, group[0], places))))
        sorting = self._sorting
        untold = [
            *(self._recipes[name].source for name in (*sorting.carried, *sorting.taken_whole)),
            *self._untold_factors,
        ]
        arrays = (name for name in dict.fromkeys(untold) if math.prod(self._source.tensor(name).shape) > 1)
        replicated = tuple(pair for name in arrays for pair in self._source.may_differ(name))
        return Plan(
            tuple(files),
            sorting.carried,
            sorting.absent,
            sorting.dropped,
            sorting.warnings,
            replicated,
            tuple(replicas),
        )

    def _lying(self, stage: int) -> tuple[list[_Lying], list[_Slicing]]:
        """The parameters that a target stage has, in file order, and their distinct slicings."""
        whole = Layout.whole(self._target.stage_devices)
        lying, numbers = [], {}
        slicings: list[_Slicing] = []
        for name in self._sorting.sliced:
            # what the user allowed although the target does not list it, every rank holds whole
            layout = self._target.layout(name, stage) if self._target.lists(name) else self._target.otherwise or whole
            if layout is not None:
                key = layout, self._source.tensor(self._recipes[name].source).shape
                if key not in numbers:
                    numbers[key] = len(slicings)
                    slicings.append(_Slicing(*key, name))
                lying.append(_Lying(name, numbers[key]))
        return lying, slicings

    def _replica_groups(self, slicings: Iterable[_Slicing], stage: int) -> Iterable[tuple[int, ...]]:
        """The ranks of a target stage by equal contents."""
        devices = self._target.stage_devices
        groups: dict[tuple[Shape, ...], list[int]] = {}
        tables = [self._cells_of(layout) for layout in dict.fromkeys(slicing.layout for slicing in slicings)]
        for local in range(devices):
            cells = tuple([table[local] for table in tables])
            groups.setdefault(cells, []).append(stage * devices + local)
        return [tuple(group) for group in groups.values()]

    def _cells_of(self, layout: Layout) -> list[Shape]:
        """Which slice every rank of a stage holds; the stages share their layouts."""
        if layout not in self._cells:
            ndim = max(len(layout.tensor_map), 1)
            self._cells[layout] = [layout.cell(local, ndim) for local in range(self._target.stage_devices)]
        return self._cells[layout]

    def _tensors(
        self,
        lying: Iterable[_Lying],
        slicings: Iterable[_Slicing],
        rank: int,
        places: dict[tuple[int, Box], _Place],
    ) -> Iterator[TensorPlan]:
        """What a target rank, which is the lowest of its replicas, holds; slices of it may be made already."""
        local = rank % self._target.stage_devices
        own = []
        for number, slicing in enumerate(slicings):
            key = number, self._box(slicing, local)
            if key not in places:
                places[key] = self._place(key[1])
            own.append(places[key])
        for name, number in lying:
            place = own[number]
            tensor = place.made.get(name)
            if tensor is None:
                tensor = place.made[name] = self._slice(name, place)
            yield tensor
        for name in self._sorting.carried:
            shard = self._source.at(self._recipes[name].source, local)
            box = Box.whole(shard.tensor.shape)
            yield TensorPlan(_renamed(shard.tensor, name), box, (Copy(shard, box.offset, box),))

    def _box(self, slicing: _Slicing, local: int) -> Box:
        try:
            return slicing.layout.box(local, slicing.shape)
        except LayoutError as e:
            raise PlanError(
                f"parameter {slicing.first_name} has full shape {list(slicing.shape)} by {self._source.strategy.origin} "
                f"({self._source.where(self._recipes[slicing.first_name].source)}), which does not fit "
                f"{self._target.origin}: {e}"
            ) from e

    def _place(self, box: Box) -> _Place:
        return _Place(box, self._overlaps.setdefault(box, {}))

    def _slice(self, name: str, place: _Place) -> TensorPlan:
        recipe = self._recipes[name]
        copies = tuple([place.copy(shard) for shard in self._source.shards(recipe.source, place.box)])
        tensor = _renamed(self._source.tensor(recipe.source), name)
        if recipe.added is None:
            return TensorPlan(tensor, place.box, copies)
        if name not in self._additions:
            self._additions[name] = self._addition(tensor, recipe.added)
        return TensorPlan(tensor, place.box, copies, self._additions[name])

    def _addition(self, tensor: Tensor, product: Product) -> Addition:
        a, b = (self._whole(name) for name in (product.a, product.b))
        fits = len(tensor.shape) == len(a.shape) == len(b.shape) == 2
        if not fits or tensor.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise PlanError(
                f"{b.name} {list(b.shape)} times {a.name} {list(a.shape)} does not give {tensor.name} {list(tensor.shape)}"
            )
        for part in (tensor, a, b):
            if part.dtype not in FLOAT_TYPES:
                raise PlanError(f"parameter {part.name} is of type {part.dtype}, to which no product can be added")
        return Addition(a, b, product.scaling)

    def _whole(self, name: str) -> TensorPlan:
        """How the whole of a source tensor is put together."""
        if not self._source.strategy.tells(name):
            self._untold_factors.append(name)
        tensor = self._source.tensor(name)
        box = Box.whole(tensor.shape)
        place = self._place(box)
        return TensorPlan(tensor, box, tuple(place.copy(shard) for shard in self._source.shards(name, box)))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pauses the collector of cycles.

    A plan of thousands of ranks is millions of tuples and no cycle; to look through all of them again and again as they
    become more would take longer than to make them.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _ranks(outside: Sequence[int]) -> str:
    if not outside:
        return "no rank is asked for: an empty list is"
    return f"rank {', '.join(map(str, outside))} {'is' if len(outside) == 1 else 'are'}"


def _renamed(tensor: Tensor, name: str) -> Tensor:
    return tensor if tensor.name == name else replace(tensor, name=name)

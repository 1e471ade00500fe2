"""A checkpoint and the plan of what becomes of it: written (`auto_trans.conversion`) or loaded (`auto_trans.loading`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Optional

from auto_trans.core.consistency import (
    Network,
    check_heads,
    check_names,
    check_network,
    check_shapes,
    shapes_of_slice,
)
from auto_trans.core.edits import Edit
from auto_trans.core.plan import Plan
from auto_trans.core.planning import make_plan
from auto_trans.core.rules import NOTHING, Allowed, some
from auto_trans.core.source import SlicedSource
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import Box, Shape
from auto_trans.errors import PlanError
from auto_trans.log import logger
from auto_trans.storage.checkpoint import Checkpoint
from auto_trans.storage.readers import same_contents
from auto_trans.storage.scanned import FileState, ScannedFiles

__all__ = ["Planned"]


class Planned:
    """A checkpoint and a plan of what target ranks get of it.

    Args:
        checkpoint: The chosen source.
        from_strategy: Its strategy; that which a checkpoint tells of itself goes before it.
        to_strategy: Strategy of the target.
        ranks: The target ranks; all by default.
        edits: Changes on the way, in order.
        allowed: What is allowed although it looks wrong.
        states: How the files were when they were chosen, by path; by default as they are now.
        holders: Which rank holds what, see `SlicedSource`; by default that is looked for.

    Attributes:
        source: What there is.
        plan: What goes where.

    Raises:
        AutoTransError: The source and the strategies do not make up the target.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        from_strategy: Strategy,
        to_strategy: Strategy,
        ranks: Optional[Iterable[int]] = None,
        *,
        edits: Sequence[Edit] = (),
        allowed: Allowed = NOTHING,
        states: Optional[Mapping[Path, FileState]] = None,
        holders: Optional[Mapping[str, int]] = None,
    ) -> None:
        self.checkpoint, self.to_strategy = checkpoint, to_strategy
        self.from_strategy = checkpoint.strategy(from_strategy)
        self.heads = ScannedFiles(checkpoint, states)
        self.source = SlicedSource(self.from_strategy, self.heads, holders)
        check_shapes(self.source, allowed)
        self.plan: Plan = make_plan(self.source, to_strategy, ranks, edits=edits, allowed=allowed)

    @property
    def names(self) -> Iterator[str]:
        """What is made, by the names of the target."""
        return (tensor.name for file in self.plan.files for tensor in file.tensors)

    def check_heads(self) -> None:
        """Compares the heads of all source files; one of several ranks is enough.

        Raises:
            PlanError: A file holds something else than the strategy says.
        """
        check_heads(self.from_strategy, self.heads)
        check_names(self.source, self.heads)

    def check_whole(self) -> None:
        """Looks whether every slice of what is planned is there, also those that only other ranks need.

        Raises:
            MissingSliceError: One is nowhere.
            PlanError: A file holds something else under that name.
        """
        if self._holds_all():
            return
        for name in dict.fromkeys(shard.tensor.name for file in self.plan.files for shard in file.shards):
            self.source.shards(name, Box.whole(self.source.tensor(name).shape))

    def check_network(self, network: Network) -> None:
        """Compares what is made with what a network expects.

        Raises:
            PlanError: The network expects something else.
        """
        check_network(network, self._slices(), self.from_strategy.origin)

    def check_carried(self) -> None:
        """Compares what ranks hold of arrays that no strategy lists: those are right only if no rank holds a slice of them.

        Raises:
            PlanError: The ranks hold different ones.
        """
        for one, other in self.plan.replicated:
            if not same_contents(one, other):
                raise PlanError(
                    f"parameter {one.tensor.name} is in no strategy, but differs between source rank {one.file.rank} and "
                    f"{other.file.rank}: it is sliced in a way that {self.from_strategy.origin} does not tell; give "
                    f"the strategy that the weights were saved under («src_strategy»)"
                )

    def check_replicas(self) -> None:
        """Compares all copies of every slice; reads every file whole.

        Raises:
            PlanError: Two of them differ.
        """
        for one, other in self.source.copies():
            if not same_contents(one, other):
                raise PlanError(
                    f"rank {one.file.rank} and rank {other.file.rank} should hold the same slice of parameter "
                    f"{one.tensor.name}, but their files differ; find out which of them is right"
                )

    def log(self) -> None:
        """Logs what the plan leaves out or adds, which a user should know."""
        plan, checkpoint = self.plan, self.checkpoint
        missing = self.from_strategy.world_size - len(checkpoint.files)
        if checkpoint.distributed and not checkpoint.iteration and missing:
            logger.warning(
                "%s holds %d of the %d ranks that %s describes; the others are replicas if it is the right strategy",
                checkpoint.path, len(checkpoint.files), self.from_strategy.world_size, self.from_strategy.origin,
            )  # fmt: skip
        told = " ".join(plan.warnings)
        carried = [name for name in plan.carried if name not in told]
        if carried:
            logger.info("carried over as they are, in no strategy: %s", some(carried, 5))
        if plan.absent:
            logger.warning("not in the source, the model keeps its initial values: %s", some(plan.absent, 5))
        if plan.dropped:
            logger.warning("optimizer state dropped, the target has no optimizer: %s", some(plan.dropped, 5))
        for warning in plan.warnings:
            logger.warning("%s", warning)

    def _holds_all(self) -> bool:
        """Whether every rank of the source is there, and holds all that it could: then no slice is missing."""
        strategy, held = self.from_strategy, frozenset(self.source.names)
        if strategy.is_complete or len(self.heads.ranks) < strategy.world_size:
            return False
        needed = [held.intersection(strategy.names(stage)) for stage in range(strategy.stages)]
        return all(needed[strategy.stage_of(rank)] <= self.heads.tensors(rank).keys() for rank in self.heads.ranks)

    def _slices(self) -> Iterator[tuple[str, Shape, list[Shape]]]:
        """Name, full shape and shapes of a slice, after and before optimizer shard, of every parameter."""
        tensors = {tensor.name: tensor for file in self.plan.files for tensor in file.tensors}
        return ((n, t.tensor.shape, shapes_of_slice(self.to_strategy, n, t.tensor.shape)) for n, t in tensors.items())

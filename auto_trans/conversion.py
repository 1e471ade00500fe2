"""The one use case: request -> find -> plan -> check -> run -> report.

`plan_conversions` finds the sources of a request and plans each; a `Conversion` is checked and run. Whoever must know the
plan before it runs, or share it with others, takes these steps one by one; `auto_trans.offline.convert` takes all.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Callable, Optional

from auto_trans.config import DEFAULT_MEMORY
from auto_trans.core.consistency import check_shapes
from auto_trans.core.edits import KeepFor
from auto_trans.core.heads import Heads
from auto_trans.core.plan import FilePlan, Plan
from auto_trans.core.planning import make_plan
from auto_trans.core.rules import NOTHING, Allowed, some
from auto_trans.core.source import SlicedSource
from auto_trans.core.strategy import Strategy
from auto_trans.engine.base import ConversionTask, Engine
from auto_trans.engine.native import NativeEngine
from auto_trans.engine.workers import WorkerEngine
from auto_trans.errors import ConfigError
from auto_trans.planned import Planned
from auto_trans.progress import Meter
from auto_trans.report import ConversionReport
from auto_trans.request import CHECKPOINT2, DEFAULT_PREFIX, Request
from auto_trans.storage.capacity import check_disk, check_memory
from auto_trans.storage.checkpoint import Checkpoint
from auto_trans.storage.checkpoint2.common import common_of
from auto_trans.storage.checkpoint2.target import Iteration
from auto_trans.storage.formats import FORMATS
from auto_trans.storage.manifest import FileRecord
from auto_trans.storage.sources import find_source, find_sources
from auto_trans.storage.targets import RankFolders, SafetensorsSet, Target

__all__ = ["Conversion", "check_source", "plan_conversion", "plan_conversions"]


class Conversion:
    """A planned conversion of one checkpoint.

    Args:
        request: What is to be done.
        checkpoint: The chosen source.
        share: Which of how many shares of the files, e.g. (0, 2), if several processes write a complete set.

    Attributes:
        plan: What goes where.
        files: The target files of the plan, or of its share.
        target: Where they go.
    """

    def __init__(self, request: Request, checkpoint: Checkpoint, share: tuple[int, int] = (0, 1)) -> None:
        # a Checkpoint 2.0 tells of itself how it is sliced
        request = replace(request, from_strategy=checkpoint.strategy(request.from_strategy))
        self.request, self.checkpoint = request, checkpoint
        self._planned = Planned(
            checkpoint, request.from_strategy, request.to_strategy, request.ranks, edits=request.edits,
            allowed=request.allowed,
        )  # fmt: skip
        self.source, self.plan = self._planned.source, self._planned.plan
        self.target = _target(request, checkpoint, self.plan)
        self.files = self.target.arrange(self.plan)[share[0] :: share[1]]
        self._replicas = {rank: group for group in self.plan.replicas for rank in group}

    def todo(self, files: Optional[Iterable[FilePlan]] = None) -> list[FilePlan]:
        """The files, by default all, that are not there yet for any rank with the same contents."""
        return [file for file in (self.files if files is None else files) if not any(self._there(file))]

    def replicas(self, file: FilePlan) -> tuple[int, ...]:
        """All target ranks with the contents of a file, also those that are not converted here."""
        return self._replicas[file.ranks[0]]

    def check(
        self,
        neighbours: int = 1,
        part: float = 1.0,
        files: Optional[Sequence[FilePlan]] = None,
        *,
        heads: bool = True,
    ) -> None:
        """Checks all that can be checked before any work.

        Args:
            neighbours: How many processes like this one share the machine's memory.
            part: The part of all that is written to this disk by converters beside this one which the files are.
            files: The files that will be written; all by default.
            heads: Compare the heads of all source files; one of several converters is enough.

        Raises:
            OutputExistsError: The target holds files of something else.
            InsufficientDiskError: The output does not fit.
            InsufficientMemoryError: The memory is not there.
            PlanError: Replicas, or what the network expects, contradict the plan.
        """
        self.target.check(self.files)
        todo = self.todo(files)
        # beyond its default the limit allows more, but nothing takes it
        processes = neighbours * max(min(self.request.processes, len(todo)), 1)
        check_memory(min(self.request.memory_limit, DEFAULT_MEMORY), processes)
        check_disk(self.request.dst, int(sum(self.target.size(file) for file in todo) / part))
        if heads:
            self._planned.check_heads()
        if self.request.network is not None:
            self._planned.check_network(self.request.network)
        self._planned.check_carried()
        if self.request.check_replicas:
            self._planned.check_replicas()

    def run(
        self,
        *,
        quiet: bool = False,
        listener: Optional[Callable[[int, int], None]] = None,
        files: Optional[Sequence[FilePlan]] = None,
    ) -> ConversionReport:
        """Converts, publishes every file as it is complete, and finishes the target once all ranks are there.

        A file that is there already for a rank with the same contents, converted by whomever, is linked.

        Args:
            quiet: Show no progress.
            listener: Told (bytes done, bytes in all).
            files: The files of the plan to take on; all by default.
        """
        begin = time.monotonic()
        files = self.files if files is None else files
        self.target.begin(files)
        reused, linked, todo = self._sort(files)
        meter = Meter(
            sum(file.nbytes for file in todo), f"converting {self.checkpoint.name}", quiet=quiet, listener=listener
        )
        try:
            written = self._engine().write(self._task(todo), meter)
        except BaseException:
            self.target.give_up()
            raise
        finally:
            meter.close()
        self.target.finish()
        first = {self.target.name(file.ranks[0], file.part) for file in todo}
        converted = [record for record in written if record.file in first]
        linked += [record for record in written if record.file not in first]
        return ConversionReport(
            source=self.checkpoint.path,
            target=self.request.dst,
            files=tuple(sorted((*reused, *linked, *converted), key=lambda record: (record.rank, record.file))),
            converted=_ranks(converted),
            linked=_ranks(linked),
            reused=_ranks(reused),
            bytes_written=sum(record.size for record in converted),
            seconds=time.monotonic() - begin,
            carried=self.plan.carried,
            absent=self.plan.absent,
            dropped=self.plan.dropped,
        )

    def carry_out(self, *, part: float = 1.0, quiet: bool = False) -> ConversionReport:
        """Checks, tells what the plan leaves out or adds, and runs."""
        self.check(part=part)
        self.log_plan()
        return self.run(quiet=quiet)

    def log_plan(self) -> None:
        """Logs what the plan leaves out or adds, which a user should know."""
        self._planned.log()

    def _sort(self, files: Iterable[FilePlan]) -> tuple[list[FileRecord], list[FileRecord], list[FilePlan]]:
        """What is there already, what is linked to that, and what has to be written, with the ranks that lack it."""
        reused: list[FileRecord] = []
        linked: list[FileRecord] = []
        todo = []
        for file in files:
            there = {record.rank: record for record in self._there(file)}
            reused += [record for rank, record in there.items() if rank in file.ranks]
            missing = replace(file, ranks=tuple(rank for rank in file.ranks if rank not in there))
            if not there:
                todo.append(missing)
            elif missing.ranks:
                linked += self.target.replicate(next(iter(there.values())), missing)
        return reused, linked, todo

    def _task(self, files: Iterable[FilePlan]) -> ConversionTask:
        request = self.request
        return ConversionTask(
            tuple(files), self.target, self.checkpoint, request.from_strategy, request.to_strategy, request.prefix,
            request.memory_limit, request.by_rank,
        )  # fmt: skip

    def _engine(self) -> Engine:
        if self.request.engine == "mindspore":
            if self.checkpoint.iteration:
                raise ConfigError(
                    f"{self.checkpoint.path} is a Checkpoint 2.0, which the mindspore engine does not know; use «engine» "
                    f"native"
                )
            if self.plan.dropped or self.request.edits:
                raise ConfigError(
                    f"the mindspore engine leaves nothing out ({some(self.plan.dropped or self.plan.carried)}) and changes "
                    f"nothing on the way; use «engine» native"
                )
            from auto_trans.engine.mindspore import MindSporeEngine

            return MindSporeEngine()
        return WorkerEngine(NativeEngine(), self.request.processes)

    def _there(self, file: FilePlan) -> Iterator[FileRecord]:
        """What is there already with the contents of a file, of its own ranks and of others."""
        return (record for rank in self.replicas(file) if (record := self.target.done(rank, file.part)))


def check_source(strategy: Strategy, heads: Heads, allowed: Allowed = NOTHING) -> Plan:
    """Checks all that a source and its strategy tell without a target, or the contents of the files.

    Args:
        strategy: Strategy of the source.
        heads: The heads of its files.
        allowed: What is allowed although it looks wrong.

    Returns:
        The plan of one complete checkpoint, which needs every slice of every parameter.

    Raises:
        AutoTransError: The source cannot be converted.
    """
    source = SlicedSource(strategy, heads)
    check_shapes(source, allowed)
    # a layout or an optimizer state that the target may not need is no matter yet
    edits = [KeepFor(strategy)]
    return make_plan(source, Strategy.complete(), edits=edits, allowed=allowed)


def plan_conversions(request: Request) -> list[Conversion]:
    """Finds the sources of a request and plans the conversion of each.

    Returns:
        The conversions; several only for a folder of several complete checkpoints, each to a folder of its name.

    Raises:
        AutoTransError: There is no source, or the source and the strategies do not make up the target.
    """
    found = find_sources(request.src, request.from_strategy, request.resume_file, request.step, request.file_suffix)
    if len(found) == 1:
        return [Conversion(request, found[0])]
    return [Conversion(replace(request, dst=request.dst / one.name), one) for one in found]


def plan_conversion(request: Request) -> Conversion:
    """Finds the one source of a request and plans its conversion.

    Raises:
        ConfigError: The source is a folder of several complete checkpoints.
    """
    return Conversion(
        request,
        find_source(request.src, request.from_strategy, request.resume_file, request.step, request.file_suffix),
    )


def _target(request: Request, checkpoint: Checkpoint, plan: Plan) -> Target:
    digest, reuse, durable = request.digest(checkpoint), request.reuse, request.durable
    if request.shard_size is not None:
        return SafetensorsSet(request.dst, digest, shard_size=request.shard_size, reuse=reuse, durable=durable)
    if request.format == CHECKPOINT2:
        common = common_of(plan)
        number = next((n for n in (common.step, checkpoint.step) if n is not None), 0)
        prefix = "" if request.prefix == DEFAULT_PREFIX else request.prefix.rstrip("-_")
        return Iteration(
            request.dst, digest, request.to_strategy, number, common, prefix=prefix, reuse=reuse, durable=durable
        )  # fmt: skip
    format = FORMATS[request.format] if request.format else checkpoint.format
    world_size = request.to_strategy.world_size
    return RankFolders(request.dst, format, digest, world_size, prefix=request.prefix, reuse=reuse, durable=durable)


def _ranks(records: Iterable[FileRecord]) -> tuple[int, ...]:
    return tuple(sorted(record.rank for record in records))

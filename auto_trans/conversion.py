"""The use case: find the source, plan, check, execute, publish, report.

`convert` is the library call; `Conversion` is the same in two steps for those who must know the plan before they run it.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Union

import xxhash

from auto_trans.config import DEFAULT_MEMORY, parse_engine, parse_memory
from auto_trans.core.plan import ConversionPlan, FilePlan, plan_conversion
from auto_trans.core.strategy import Strategy
from auto_trans.engine.native import DEFAULT_BUFFER_BYTES, Adapt, Executor
from auto_trans.errors import ConfigError, PlanError
from auto_trans.log import logger
from auto_trans.progress import Meter
from auto_trans.report import ConversionReport
from auto_trans.storage.capacity import check_disk, check_memory
from auto_trans.storage.files import Publisher
from auto_trans.storage.formats import encoded_size, parse_format
from auto_trans.storage.formats.index import content_digest
from auto_trans.storage.manifest import FileRecord
from auto_trans.storage.scanned import PathLike, ScannedSource, StrategyLike, as_strategy, find_source
from auto_trans.storage.sources import SourceCheckpoint
from auto_trans.storage.targets import TargetFolder

__all__ = ["Conversion", "convert", "prepare", "run_conversion"]


class Conversion:
    """A planned conversion of one checkpoint.

    Args:
        checkpoint: The source.
        dst: The target folder; gets ``rank_N/{prefix}N.ckpt``.
        source: Strategy of the source.
        target: Strategy of the target.
        prefix: Beginning of the target files' names.
        ranks: The target ranks to convert; all by default.
        memory_limit: Bytes of memory that the conversion may use.
        format: ``ckpt`` or ``safetensors``; that of the source by default.
        reuse: Keep files that are there already and were made from the same inputs.
        exclude: Source parameters that are left out.
        variant: What else the target depends on, as text.

    Attributes:
        plan: What will be done.
    """

    def __init__(
        self,
        checkpoint: SourceCheckpoint,
        dst: Path,
        source: Strategy,
        target: Strategy,
        *,
        prefix: str = "checkpoint_",
        ranks: Optional[Iterable[int]] = None,
        memory_limit: Optional[int] = None,
        format: Optional[str] = None,
        reuse: bool = True,
        exclude: Callable[[str], bool] = lambda name: False,
        variant: str = "",
    ) -> None:
        if not isinstance(prefix, str) or not prefix or "/" in prefix:
            raise ConfigError(f"prefix must be the beginning of a file name, not {prefix!r}")
        self.checkpoint, self.dst, self.source, self.target, self.prefix = checkpoint, dst, source, target, prefix
        self.memory_limit = memory_limit or DEFAULT_MEMORY
        self.format = parse_format(format) if format else checkpoint.format
        self.reuse = reuse
        self._index = ScannedSource(checkpoint, exclude)
        self._variant = variant
        self.plan: ConversionPlan = plan_conversion(source, target, self._index, ranks)
        self._replicas = {rank: group for group in self.plan.replicas for rank in group}
        self.folder = TargetFolder(dst, prefix, self.format, self._inputs_digest(), target.world_size, reuse=reuse)

    @property
    def ranks(self) -> list[int]:
        """The target ranks that are converted, in ascending order."""
        return sorted(rank for file in self.plan.files for rank in file.ranks)

    def file_size(self, file: FilePlan) -> int:
        """Bytes of a target file."""
        return encoded_size(self.format, file.tensors)

    def replicas(self, file: FilePlan) -> tuple[int, ...]:
        """All target ranks with the contents of a file, also those that are not converted here."""
        return self._replicas[file.ranks[0]]

    def todo(self, files: Optional[Iterable[FilePlan]] = None) -> list[FilePlan]:
        """The files, by default all, that are not there yet for any rank with the same contents."""
        return [f for f in (self.plan.files if files is None else files) if not any(self._there(f))]

    def check(self, neighbours: int = 1, part: float = 1.0, files: Optional[Sequence[FilePlan]] = None) -> None:
        """Checks all that can be checked before any work.

        Args:
            neighbours: How many converters like this one share the machine's memory.
            part: The part of all that is written to this disk by converters beside this one which the files are.
            files: The files that will be written; all by default.

        Raises:
            OutputExistsError: The target holds files of something else.
            InsufficientDiskError: The output does not fit.
            InsufficientMemoryError: The memory is not there.
            PlanError: A parameter without layout differs between source ranks.
        """
        for rank in self.ranks:
            self.folder.check_not_foreign(rank)
        check_memory(self.memory_limit, neighbours)
        check_disk(self.dst, int(sum(self.file_size(file) for file in self.todo(files)) / part))
        for name, ranks in self.plan.replicated.items():
            ends = [self._index.file(rank) for rank in ranks]
            digests = {content_digest(end, name) if name in end.tensors else None for end in ends}
            if len(digests) > 1:
                raise PlanError(
                    f"parameter {name} is in no strategy, but differs between source rank {ranks[0]} and {ranks[1]}: it is "
                    f"sliced in a way that {self.source.origin} does not tell; give the strategy that the weights were "
                    f"saved under"
                )

    def run(
        self,
        *,
        quiet: bool = False,
        listener: Optional[Callable[[int, int], None]] = None,
        adapt: Optional[Adapt] = None,
        files: Optional[Sequence[FilePlan]] = None,
    ) -> ConversionReport:
        """Converts, publishes every file as it is complete, and writes the manifest once all ranks are there.

        A file that is there already for a rank with the same contents, converted by whomever, is linked.

        Args:
            quiet: Show no progress.
            listener: Told (bytes done, bytes in all).
            adapt: Changes parts of tensors on their way.
            files: The files of the plan to take on; all by default.
        """
        begin = time.monotonic()
        self.folder.manifest.refresh()
        files = self.plan.files if files is None else files
        nbytes = sum(file.nbytes for file in self.todo(files))
        meter = Meter(nbytes, f"converting {self.checkpoint.name}", quiet=quiet, listener=listener)
        converted: list[int] = []
        linked: list[int] = []
        reused: list[FileRecord] = []
        sources = {rank: self._index.file(rank) for rank in self.plan.source_ranks}
        buffer_bytes = min(DEFAULT_BUFFER_BYTES, self.memory_limit // 2)
        try:
            with (
                Executor(sources, buffer_bytes, meter, adapt) as executor,
                Publisher[list[FileRecord]]() as publisher,
            ):
                for file in files:
                    there = {record.rank: record for record in self._there(file)}
                    reused += [record for rank, record in there.items() if rank in file.ranks]
                    missing = tuple(rank for rank in file.ranks if rank not in there)
                    if not there:
                        out = executor.write(file, self.folder.file(missing[0]), self.format)
                        publisher.submit(partial(self.folder.publish, out, missing))
                        converted.append(missing[0])
                        linked += missing[1:]
                    elif missing:
                        publisher.submit(partial(self.folder.replicate, next(iter(there.values())), missing))
                        linked += missing
        finally:
            meter.close()
        self.folder.manifest.finish()
        records = {record.rank: record for record in itertools.chain(reused, *publisher.results)}
        return ConversionReport(
            source=self.checkpoint.path,
            target=self.dst,
            files=tuple(records[rank] for rank in sorted(records)),
            converted=tuple(converted),
            linked=tuple(sorted(linked)),
            reused=tuple(sorted(record.rank for record in reused)),
            bytes_written=sum(records[rank].size for rank in converted),
            seconds=time.monotonic() - begin,
            carried=self.plan.carried,
            absent=self.plan.absent,
            dropped=self.plan.dropped,
        )

    def log_plan(self) -> None:
        """Logs what the plan leaves out or adds, which a user should know."""
        plan = self.plan
        if plan.carried and not (self.source.is_complete and self.target.is_complete):
            logger.info("carried over as they are, in no strategy: %s", _names(plan.carried))
        if plan.absent:
            logger.warning("not in the source, the model keeps its initial values: %s", _names(plan.absent))
        if plan.dropped:
            logger.warning("optimizer state dropped, the target has no optimizer: %s", _names(plan.dropped))

    def _there(self, file: FilePlan) -> Iterator[FileRecord]:
        """What is there already with the contents of a file, of its own ranks and of others."""
        return (record for rank in self.replicas(file) if (record := self.folder.done(rank)))

    def _inputs_digest(self) -> str:
        sources = []
        for rank, file in self.checkpoint.files.items():
            stat = file.stat()
            sources.append([rank, str(file.resolve()), stat.st_size, stat.st_mtime_ns])
        inputs = [sources, self.source.digest, self.target.digest, self.prefix, self.format.name, self._variant]
        return xxhash.xxh3_128_hexdigest(json.dumps(inputs).encode())


def convert(
    src: PathLike,
    dst: PathLike,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    *,
    prefix: str = "checkpoint_",
    ranks: Optional[Iterable[int]] = None,
    engine: str = "native",
    memory_limit: Union[int, str, None] = None,
    format: Optional[str] = None,
    step: Optional[str] = None,
    reuse: bool = True,
    quiet: bool = True,
) -> ConversionReport:
    """Converts a checkpoint from one parallel strategy to another.

    Args:
        src: A complete file, or a folder of ``rank_N/`` folders with a file each; of several the latest step that all
            ranks have is taken. The files are ``.ckpt`` or ``.safetensors``.
        dst: Folder that gets ``rank_N/{prefix}N.ckpt``. Files that are there already and were made from the same inputs
            are kept; others are not overwritten.
        src_strategy: Strategy file, merged file or folder of the source; None if it is complete.
        dst_strategy: The same of the target; None for one complete file, ``rank_0/{prefix}0.ckpt``.
        prefix: Beginning of the target files' names.
        ranks: The target ranks to convert; all by default.
        engine: ``native``, or ``mindspore`` to delegate to MindSpore's own API.
        memory_limit: Memory that the conversion may use, in bytes or e.g. ``"512MiB"``; 64 MiB by default.
        format: Format of the target, ``ckpt`` or ``safetensors``; that of the source by default.
        step: The step to take from the rank folders, as ``{epoch}_{step}``; the latest by default.
        reuse: Keep files that are there already and were made from the same inputs.
        quiet: Show no progress.

    Returns:
        What was done.

    Raises:
        AutoTransError: Anything that is wrong with the input or the output, see `auto_trans.errors`. The source is never
            touched, and no incomplete file bears its final name.
    """
    conversion = prepare(
        src, dst, src_strategy, dst_strategy, prefix=prefix, ranks=ranks, memory_limit=memory_limit, format=format,
        step=step, reuse=reuse,
    )  # fmt: skip
    return run_conversion(conversion, parse_engine(engine), quiet=quiet)


def prepare(
    src: PathLike,
    dst: PathLike,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    *,
    step: Optional[str] = None,
    memory_limit: Union[int, str, None] = None,
    **options: Any,
) -> Conversion:
    """Plans a conversion without doing anything; takes what `convert` takes.

    Raises:
        ConfigError: The source is a folder of several complete checkpoints.
    """
    source, target = as_strategy(src_strategy), as_strategy(dst_strategy)
    found = find_source(src, source, step=step)
    if len(found) > 1:
        raise ConfigError(
            f"source {src} holds {len(found)} complete checkpoints ({', '.join(c.path.name for c in found[:3])}, ...); give "
            f"one of the files"
        )
    return Conversion(found[0], Path(dst), source, target, memory_limit=parse_memory(memory_limit), **options)


def run_conversion(
    conversion: Conversion,
    engine: str,
    *,
    by_rank: bool = False,
    neighbours: int = 1,
    part: float = 1.0,
    quiet: bool = False,
    listener: Optional[Callable[[int, int], None]] = None,
    files: Optional[Sequence[FilePlan]] = None,
) -> ConversionReport:
    """Checks and runs a planned conversion with one of the engines.

    Args:
        conversion: What to do.
        engine: ``native`` or ``mindspore``.
        by_rank: Have the mindspore engine use ``transform_checkpoint_by_rank``; the native one has no such difference.
        neighbours: How many converters like this one share the machine's memory.
        part: The part of all that converters beside each other write which is written here.
        quiet: Show no progress.
        listener: Told (bytes done, bytes in all).
        files: The files of the plan to take on; all by default, and always with the mindspore engine.
    """
    conversion.check(neighbours, part, files)
    conversion.log_plan()
    if engine == "mindspore":
        from auto_trans.engine.mindspore import run_mindspore

        return run_mindspore(conversion, by_rank=by_rank)
    return conversion.run(quiet=quiet, listener=listener, files=files)


def _names(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")

"""The replacement of MindFormers' ``TransformCkpt``: many ranks convert one checkpoint together."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Optional

from auto_trans.config import AutoTransConfig
from auto_trans.conversion import Conversion, run_conversion
from auto_trans.coordination.barrier import Heartbeat, wait_until
from auto_trans.coordination.election import Assignment, elect
from auto_trans.coordination.session import LEADER, Session
from auto_trans.core.strategy import Strategy, describe_difference, same_slices
from auto_trans.core.work import assign_writers
from auto_trans.errors import CoordinationError, OutputError, StrategyError, StrategyNotFoundError
from auto_trans.hooks.job import Job
from auto_trans.log import logger
from auto_trans.report import ConversionReport
from auto_trans.sizes import format_bytes
from auto_trans.storage.files import write_json
from auto_trans.storage.scanned import as_strategy, find_source
from auto_trans.storage.sources import SourceCheckpoint, rank_file
from auto_trans.storage.strategies import merge_strategies, read_strategy

__all__ = ["REPORT_NAME", "TransformCkpt", "convert_together"]

REPORT_NAME = "auto_trans_report.json"


class TransformCkpt:
    """Converts the checkpoint of a job; has the signature of the class that it replaces.

    Args:
        auto_trans_ckpt: Whether this is an automatic conversion; otherwise MindFormers' own class does it.
        rank_id: This rank; by default MindSpore knows it.
        world_size: Number of ranks; by default MindSpore knows it.
        transform_process_num: Number of converter ranks.
        transform_by_rank: Has the mindspore engine convert rank by rank.
        npu_num_per_node: Devices of a node.
    """

    stock: Any = None

    def __new__(cls, auto_trans_ckpt: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Makes MindFormers' own object where the conversion is not an automatic one."""
        if cls.stock is not None and (not auto_trans_ckpt or Job.in_modelarts()):
            return cls.stock(auto_trans_ckpt, *args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        auto_trans_ckpt: bool = False,
        rank_id: Optional[int] = None,
        world_size: Optional[int] = None,
        transform_process_num: int = 1,
        transform_by_rank: bool = False,
        npu_num_per_node: Optional[int] = None,
    ) -> None:
        self._job = Job.current(rank_id, world_size)
        self._given = {
            "transform_process_num": transform_process_num,
            "transform_by_rank": transform_by_rank,
            "npu_num_per_node": npu_num_per_node,
        }
        self.assignments = elect(self._job.world_size, transform_process_num)
        self.transform_rank_id_list = [assignment.rank for assignment in self.assignments]

    def __call__(
        self,
        src_checkpoint: str,
        dst_checkpoint_dir: Optional[str] = None,
        src_strategy: Optional[str] = None,
        dst_strategy: Optional[str] = None,
        prefix: str = "checkpoint_",
    ) -> str:
        """Converts a checkpoint to the strategy that this job compiled.

        All ranks call this; all return once everything is there, or raise once anything has failed.

        Args:
            src_checkpoint: Complete file, folder of complete files, or folder of ``rank_N`` folders.
            dst_checkpoint_dir: Not used: the target is ``transformed_checkpoint/`` in the output directory.
            src_strategy: Strategy of the source; none for complete weights.
            dst_strategy: Not used: the target strategy is that in ``strategy/`` in the output directory.
            prefix: Beginning of the target files' names.

        Returns:
            The folder that holds ``<name>/rank_N/{prefix}N.ckpt``.

        Raises:
            AutoTransError: The conversion failed here or on another rank.
        """
        for name, value in (("dst_checkpoint_dir", dst_checkpoint_dir), ("dst_strategy", dst_strategy)):
            if value:
                logger.warning("%s is not used with auto_trans_ckpt: True", name)
        settings = Job.settings()
        if settings is None or settings.load_checkpoint != src_checkpoint:
            settings = AutoTransConfig.from_settings(
                {**self._given, "src_strategy_path_or_dir": src_strategy}, src_checkpoint
            )
        convert_together(self._job, settings, self.assignments, prefix)
        return str(self._job.transformed_dir)


def convert_together(job: Job, settings: AutoTransConfig, assignments: tuple[Assignment, ...], prefix: str) -> None:
    """Converts the checkpoint of a job by all its ranks, which all call this.

    Args:
        job: The job.
        settings: Its settings.
        assignments: The elected converter ranks.
        prefix: Beginning of the target files' names.

    Raises:
        AutoTransError: The conversion failed here or on another rank.
    """
    ranks = [assignment.rank for assignment in assignments]
    common = json.dumps([Path(settings.load_checkpoint).name, ranks, settings.engine, prefix])
    with job.session("convert", common, settings.timing) as session:
        _Together(job, session, settings, assignments, prefix).run()


class _Together:
    """One conversion by the ranks of a session."""

    def __init__(
        self, job: Job, session: Session, settings: AutoTransConfig, assignments: tuple[Assignment, ...], prefix: str
    ) -> None:
        self._job, self._session, self._settings = job, session, settings
        self._assignments, self._prefix = assignments, prefix
        self._own = next((a for a in assignments if a.rank == job.rank), None)

    def run(self) -> None:
        if self._own is None:  # a waiting rank
            self._await_complete()
        else:
            with self._session.heartbeat() as heartbeat:
                if self._session.is_leader:
                    self._lead(heartbeat)
                else:
                    self._follow(heartbeat)
        self._await_visible(self._own_files)

    def _lead(self, heartbeat: Heartbeat) -> None:
        begin = time.monotonic()
        source = as_strategy(self._settings.src_strategy)
        checkpoints = find_source(self._settings.load_checkpoint, source, self._settings.resume_file)
        target = self._target(merge=True)
        matches = all(_matches(checkpoint, source, target) for checkpoint in checkpoints)
        if matches:
            self._link(checkpoints, target)
        self._session.publish("prepared", {"matches": matches})
        reports: dict[str, dict[str, Any]] = {}
        if not matches:
            logger.info(
                "the weights in %s do not match the strategy of this job (%s): converting with rank %s",
                self._settings.load_checkpoint, describe_difference(source, target),
                ", ".join(str(a.rank) for a in self._assignments),
            )  # fmt: skip
            self._convert(checkpoints, source, target, heartbeat)
            with heartbeat.idle():
                reports = self._session.await_published(self._converted(), "convert")
            for checkpoint in checkpoints:
                self._check_all_there(checkpoint, target)
        report = {
            "source": self._settings.load_checkpoint,
            "target": str(self._job.transformed_dir),
            "matches": matches,
            "engine": self._settings.engine,
            "seconds": time.monotonic() - begin,
            "bytes_written": sum(r["bytes_written"] for r in reports.values()),
            "converters": list(reports.values()),
        }
        write_json(self._job.output / REPORT_NAME, report)
        if reports:
            logger.info(
                "converted %s with rank %s: %s written in %.1f s to %s",
                self._settings.load_checkpoint, ", ".join(str(r["rank"]) for r in reports.values()),
                format_bytes(report["bytes_written"]), report["seconds"], self._job.transformed_dir,
            )  # fmt: skip
        self._session.publish("complete", report)

    def _follow(self, heartbeat: Heartbeat) -> None:
        with heartbeat.idle():
            prepared = self._session.await_published({"prepared": LEADER}, "prepare the conversion")["prepared"]
        if not prepared["matches"]:
            source = as_strategy(self._settings.src_strategy)
            checkpoints = find_source(self._settings.load_checkpoint, source, self._settings.resume_file)
            self._convert(checkpoints, source, self._target(), heartbeat)
        with heartbeat.idle():
            self._await_complete()

    def _await_complete(self) -> None:
        prepared = self._session.await_published({"prepared": LEADER}, "prepare the conversion")["prepared"]
        owed = {} if prepared["matches"] else self._converted()
        self._session.await_published({**owed, "complete": LEADER}, "convert")

    def _converted(self) -> dict[str, int]:
        return {f"converted_rank_{a.rank}": a.rank for a in self._assignments}

    def _convert(
        self, checkpoints: list[SourceCheckpoint], source: Strategy, target: Strategy, heartbeat: Heartbeat
    ) -> None:
        """Converts this rank's share of the slices."""
        assert self._own is not None
        neighbours = self._session.neighbours(a.rank for a in self._assignments)
        by_rank = self._settings.transform_by_rank or len(self._assignments) > 1
        begin, written = time.monotonic(), 0
        for checkpoint in checkpoints:
            conversion = Conversion(
                checkpoint, self._job.transformed_dir / checkpoint.name, source, target, prefix=self._prefix,
                ranks=self._own.slices, memory_limit=self._settings.memory_limit, format="ckpt",
            )  # fmt: skip
            # MindSpore's API does not tell how far it is, and knows no replicas
            native = self._settings.engine == "native"
            writers = self._writers(conversion) if native else {}
            own = [f for f in conversion.plan.files if writers.get(f.ranks[0], self._job.rank) == self._job.rank]
            part = len(own) / len(conversion.plan.replicas) if native and own else 1 / len(self._assignments)
            with contextlib.nullcontext() if native else heartbeat.idle():
                report = run_conversion(
                    conversion, self._settings.engine, by_rank=by_rank and self._job.world_size > 1,
                    neighbours=neighbours, part=part, listener=heartbeat.progress, files=own,
                )  # fmt: skip
            if native:
                report = self._link_others(conversion, report, writers, heartbeat)
            written += report.bytes_written
            logger.info("rank %d: %s", self._job.rank, report)
        self._session.publish(
            f"converted_rank_{self._job.rank}",
            {
                "rank": self._job.rank,
                "slices": [self._own.slices[0], self._own.slices[-1]],
                "bytes_written": written,
                "seconds": time.monotonic() - begin,
            },
        )

    def _writers(self, conversion: Conversion) -> dict[int, int]:
        """Target rank -> the converter rank that writes its file, of which the others with such a rank make links."""
        shares = assign_writers(conversion.plan.replicas, [assignment.slices for assignment in self._assignments])
        return {rank: self._assignments[share].rank for rank, share in shares.items()}

    def _link_others(
        self, conversion: Conversion, report: ConversionReport, writers: Mapping[int, int], heartbeat: Heartbeat
    ) -> ConversionReport:
        """Links what other converters have written for replicas of this one's slices; tells them what is there for them."""
        name = f"{conversion.checkpoint.name}_written_rank_"
        self._session.publish(f"{name}{self._job.rank}", {"ranks": [record.rank for record in report.files]})
        rest = [file for file in conversion.plan.files if writers[file.ranks[0]] != self._job.rank]
        if not rest:
            return report
        needed = {writers[file.ranks[0]] for file in rest}
        with heartbeat.idle():
            done = self._session.await_published({f"{name}{rank}": rank for rank in needed}, "write what others link")
            there = {rank for content in done.values() for rank in content["ranks"]}
            originals = [rank for file in rest for rank in conversion.replicas(file) if rank in there]
            self._await_visible(lambda: [conversion.folder.file(rank) for rank in originals])
        return ConversionReport.merged([report, conversion.run(listener=heartbeat.progress, files=rest)])

    def _target(self, *, merge: bool = False) -> Strategy:
        """The strategy that this job compiled, of all stages."""
        world_size, folder = self._job.world_size, self._job.strategy_dir
        if world_size == 1:
            return Strategy.complete()
        if not folder.is_dir() or not any(folder.iterdir()):
            if _compiles_no_strategy():
                return Strategy.complete(world_size)
            raise StrategyNotFoundError(
                f"{folder} holds no strategy files of this job; check that output_dir is shared by all ranks and that "
                f"parallel.strategy_ckpt_save_file is not set to another place"
            )
        target = read_strategy(folder)
        if target.world_size != world_size:
            raise StrategyError(
                f"the strategy files in {folder} describe {target.world_size} ranks, but the job has {world_size}; check "
                f"that output_dir is shared by all ranks and used by this job alone"
            )
        if merge and target.stages > 1:
            logger.info("the strategies of %d stages are merged into %s", target.stages, merge_strategies(folder))
        return target

    def _link(self, checkpoints: list[SourceCheckpoint], target: Strategy) -> None:
        """Has the loader find the source as it is."""
        for checkpoint in checkpoints:
            for rank in range(target.world_size):
                link = rank_file(self._job.transformed_dir / checkpoint.name, self._prefix, rank)
                original = checkpoint.files[rank if checkpoint.distributed and len(checkpoint.files) > 1 else 0]
                try:
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.unlink(missing_ok=True)
                    link.symlink_to(original.resolve())
                except OSError as e:
                    raise OutputError(f"{link} cannot be made: {e}; set an output_dir that is writable") from e
        logger.info(
            "the weights in %s already match the strategy of this job: nothing is converted",
            self._settings.load_checkpoint,
        )

    def _check_all_there(self, checkpoint: SourceCheckpoint, target: Strategy) -> None:
        folder = self._job.transformed_dir / checkpoint.name
        missing = [r for r in range(target.world_size) if not rank_file(folder, self._prefix, r).is_file()]
        if missing:
            raise OutputError(
                f"all converters are done, but {rank_file(folder, self._prefix, missing[0])} is not there; check that "
                f"output_dir is shared by all ranks and that nothing else deletes files there"
            )

    def _own_files(self) -> list[Path]:
        """The file of this rank in every converted checkpoint."""
        folder = self._job.transformed_dir
        names = [child for child in folder.iterdir() if child.is_dir()] if folder.is_dir() else []
        return [rank_file(name, self._prefix, self._job.rank) for name in names]

    def _await_visible(self, files: Callable[[], list[Path]]) -> None:
        """Waits for network file systems that show other machines' files late."""
        timeout = self._settings.timing.heartbeat_timeout

        def look() -> Optional[bool]:
            found = files()
            return True if found and all(file.is_file() for file in found) else None

        def invisible(seconds: float) -> Exception:
            missing = next((file for file in files() if not file.is_file()), self._job.transformed_dir)
            return CoordinationError(
                f"{missing} is complete, but rank {self._job.rank} does not see it after {seconds:.0f} s; check that "
                f"output_dir is shared by all nodes"
            )

        wait_until(
            look, self._settings.timing, waiting_for=lambda: f"files to become visible to rank {self._job.rank}",
            deadline=timeout, on_timeout=invisible,
        )  # fmt: skip


def _matches(checkpoint: SourceCheckpoint, source: Strategy, target: Strategy) -> bool:
    """Whether every rank can load a source file as it is."""
    if checkpoint.format.name != "ckpt" or not same_slices(source, target):
        return False
    return source.is_complete or all(rank in checkpoint.files for rank in range(target.world_size))


def _compiles_no_strategy() -> bool:
    """Whether every rank of the job holds all weights, so that MindSpore saves no strategy."""
    from mindspore import context

    return context.get_auto_parallel_context("parallel_mode") in ("stand_alone", "data_parallel")

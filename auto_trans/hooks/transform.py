"""The replacement of MindFormers' ``TransformCkpt``: many ranks convert one checkpoint together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

from auto_trans.config import AutoTransConfig, parse_boolean, parse_npu_num
from auto_trans.coordination.election import Assignment, elect
from auto_trans.core.consistency import Network
from auto_trans.core.edits import Drop
from auto_trans.core.rules import Allowed
from auto_trans.core.strategy import Strategy
from auto_trans.errors import StrategyError, StrategyNotFoundError
from auto_trans.hooks.job import Job, in_yaml_words
from auto_trans.log import logger
from auto_trans.request import Request
from auto_trans.storage.sources import as_strategy
from auto_trans.storage.strategies import read_strategy
from auto_trans.together import REPORT_NAME, SharedConversion, convert_together

__all__ = ["TransformCkpt", "convert_for_job", "read_compiled_strategy", "unify_for_job"]

# parallel modes in which every rank holds all weights whole
_WHOLE_MODES = ("stand_alone", "data_parallel")
_UNIFIED_FILE_BYTES = 2**30  # small enough that all converters have some


class TransformCkpt:
    """Converts the checkpoint of a job; has the signature of the class that it replaces.

    Args:
        auto_trans_ckpt: Whether this is an automatic conversion; otherwise MindFormers' own class does it.
        rank_id: This rank; by default MindSpore knows it.
        world_size: Number of ranks; by default MindSpore knows it.
        transform_process_num: Number of converter ranks.
        transform_by_rank: Has the mindspore engine convert rank by rank.
        npu_num_per_node: Devices of a node.

    Attributes:
        transform_rank_id_list: The converter ranks.

    Raises:
        ConfigError: A setting has a value that it cannot have.
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
        with in_yaml_words():
            self._given = {
                "transform_process_num": transform_process_num,
                "transform_by_rank": parse_boolean("transform_by_rank", transform_by_rank),
                "npu_num_per_node": parse_npu_num(npu_num_per_node),
            }
            self._job = Job.current(rank_id, world_size)
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
        running = Job.running()
        load = running.load if running is not None else None
        if load is not None and load.is_direct and Path(load.config.load_checkpoint) == Path(src_checkpoint):
            return str(self._job.transformed_dir)  # what MindFormers calls next loads: `auto_trans.hooks.direct`
        known = {**running.settings} if running is not None else {}
        with in_yaml_words():
            settings = AutoTransConfig.from_settings(
                {**known, **self._given, "src_strategy_path_or_dir": src_strategy}, src_checkpoint
            )
        network = running.network if running is not None else None
        convert_for_job(self._job, settings, self.assignments, prefix, network)
        return str(self._job.transformed_dir)


def convert_for_job(
    job: Job,
    settings: AutoTransConfig,
    assignments: tuple[Assignment, ...],
    prefix: str,
    network: Optional[Network],
    format: str = "ckpt",
) -> None:
    """Converts the checkpoint of a job by all its ranks, which all call this.

    Args:
        job: The job.
        settings: Its settings.
        assignments: The converter ranks and their slices.
        prefix: Beginning of the target files' names.
        network: The network that the weights are loaded into, where it is known.
        format: Format of the target files.

    Raises:
        AutoTransError: The conversion failed here or on another rank.
    """
    ranks = [assignment.rank for assignment in assignments]
    common = json.dumps([Path(settings.load_checkpoint).name, ranks, settings.engine, prefix])
    with job.session("convert", common, settings.timing) as session:
        by_rank = settings.transform_by_rank or len(ranks) > 1
        request = Request(
            Path(settings.load_checkpoint),
            job.transformed_dir,
            as_strategy(settings.src_strategy),
            Strategy.complete(),
            allowed=Allowed(settings.allow_extra, settings.allow_missing),
            prefix=prefix,
            format=format,
            resume_file=settings.resume_file,
            engine=settings.engine,
            by_rank=by_rank and job.world_size > 1,
            memory_limit=settings.memory_limit,
            durable=not job.is_emptied,  # what is emptied before it is used again need not outlive a power loss
            network=network,
        )
        shared = SharedConversion(
            request,
            job.strategy_dir,
            lambda: read_compiled_strategy(job),
            job.output / REPORT_NAME,
            assignments,
            settings.timing,
        )
        convert_together(session, shared)


def unify_for_job(job: Job, settings: AutoTransConfig, assignments: tuple[Assignment, ...]) -> None:
    """Merges the checkpoint of a job by all its ranks, which all call this, for MindFormers to slice.

    Args:
        job: The job.
        settings: Its settings.
        assignments: The converter ranks.

    Raises:
        AutoTransError: The merge failed here or on another rank.
    """
    ranks = [assignment.rank for assignment in assignments]
    with job.session("unify", json.dumps([Path(settings.load_checkpoint).name, ranks]), settings.timing) as session:
        request = Request(
            Path(settings.load_checkpoint),
            job.unified_dir,
            as_strategy(settings.src_strategy),
            Strategy.complete(),
            edits=(Drop(("accu_grads.",)),),
            allowed=Allowed(settings.allow_extra, settings.allow_missing),
            format="safetensors",
            shard_size=_UNIFIED_FILE_BYTES,
            resume_file=settings.resume_file,
            memory_limit=settings.memory_limit,
            durable=not job.is_emptied,  # what is emptied before it is used again need not outlive a power loss
        )
        shared = SharedConversion(
            request, job.strategy_dir, Strategy.complete, job.output / REPORT_NAME, assignments, settings.timing
        )
        convert_together(session, shared)


def read_compiled_strategy(job: Job) -> Strategy:
    """The strategy that a job compiled, of all stages.

    Raises:
        StrategyError: It is not there, or not that of this job.
    """
    world_size, folder = job.world_size, job.strategy_dir
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
    return target


def _compiles_no_strategy() -> bool:
    """Whether every rank of the job holds all weights, so that MindSpore saves no strategy."""
    from mindspore import context

    return context.get_auto_parallel_context("parallel_mode") in _WHOLE_MODES

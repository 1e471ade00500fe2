"""The replacement of MindFormers' ``clear_auto_trans_output``: checks the source first, and never deletes it."""

from __future__ import annotations

from typing import Any, Callable, Optional

from auto_trans.config import AutoTransConfig
from auto_trans.hooks.job import Job
from auto_trans.log import logger
from auto_trans.storage.clean import check_cleanable, clean_folders
from auto_trans.storage.formats import scan
from auto_trans.storage.scanned import as_strategy, find_source

__all__ = ["clear_auto_trans_output"]


def clear_auto_trans_output(
    original: Callable[..., None],
    load_checkpoint: Optional[str] = None,
    src_strategy_path_or_dir: Optional[str] = None,
    load_ckpt_format: str = "ckpt",
) -> None:
    """Empties ``strategy/`` and ``transformed_checkpoint/`` (``unified_checkpoint/``) in the output directory.

    The Trainer calls this on all ranks, with the source, before it builds anything: so the source is looked at here, and
    what is wrong with it is known within seconds, on every rank. Rank 0 cleans; no rank goes on before it has.
    MindFormers also calls it in the middle of a load, without arguments and not on all ranks; then it is not a barrier.

    Args:
        original: MindFormers' own function; used on ModelArts, where the output is not a file system.
        load_checkpoint: The weights to load.
        src_strategy_path_or_dir: Their strategy.
        load_ckpt_format: ``ckpt`` or ``safetensors``.

    Raises:
        AutoTransError: The source cannot be read, or lies where it would be deleted.
    """
    if Job.in_modelarts():
        source: list[Any] = [load_checkpoint, src_strategy_path_or_dir]
        original(*source, *([] if load_ckpt_format == "ckpt" else [load_ckpt_format]))
        return
    job = Job.current()
    target = job.transformed_dir if load_ckpt_format == "ckpt" else job.output / "unified_checkpoint"
    folders = [job.strategy_dir, target]
    settings = Job.settings()
    if not load_checkpoint:
        protected = [settings.load_checkpoint, settings.src_strategy] if settings else []
        if job.rank == 0:
            clean_folders(folders, [path for path in protected if path])
        return
    config = AutoTransConfig.from_settings({"src_strategy_path_or_dir": src_strategy_path_or_dir}, load_checkpoint)
    protected = [config.load_checkpoint, config.src_strategy]
    with job.session("clear", f"{load_ckpt_format}", config.timing) as session, session.heartbeat():
        check_cleanable(folders, [path for path in protected if path])
        if load_ckpt_format == "ckpt":
            _check_source(job, config)
        session.publish(f"checked_rank_{job.rank}", {})
        session.await_published({f"checked_rank_{r}": r for r in range(job.world_size)}, "check the source")
        if session.is_leader:
            clean_folders(folders, [path for path in protected if path])
            logger.info("%s are emptied", " and ".join(str(folder) for folder in folders))
            session.publish("cleared", {})
        session.await_published({"cleared": 0}, "empty the output directory")


def _check_source(job: Job, config: AutoTransConfig) -> None:
    """Reads the heads of the source files, each rank those of its share."""
    strategy = as_strategy(config.src_strategy)
    for checkpoint in find_source(config.load_checkpoint, strategy):
        for file in list(checkpoint.files.values())[job.rank :: job.world_size]:
            scan(file)

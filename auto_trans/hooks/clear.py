"""The replacement of MindFormers' ``clear_auto_trans_output``: checks the source first, and never deletes it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Optional

from auto_trans.config import AutoTransConfig
from auto_trans.coordination.election import LEADER, elect
from auto_trans.coordination.session import Session
from auto_trans.core.consistency import check_heads
from auto_trans.core.strategy import Strategy
from auto_trans.hooks.job import Job, in_yaml_words
from auto_trans.jobs import Load, load_path
from auto_trans.log import logger
from auto_trans.storage.clean import check_cleanable, clean_folders
from auto_trans.storage.sources import Checkpoint, ScannedFiles

__all__ = ["check_and_empty", "clear_auto_trans_output"]


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
        AutoTransError: The source cannot be converted, or lies where it would be deleted.
    """
    if Job.in_modelarts():
        source: list[Any] = [load_checkpoint, src_strategy_path_or_dir]
        original(*source, *([] if load_ckpt_format == "ckpt" else [load_ckpt_format]))
        return
    job, running = Job.current(), Job.running()
    known = dict(running.settings) if running is not None else {}
    if not load_checkpoint or (running is not None and running.reshards):
        protected = [load_checkpoint, load_path(known), known.get("src_strategy_path_or_dir")]
        if job.rank == LEADER:
            clean_folders(_folders(job, load_ckpt_format), [path for path in protected if path])
        return
    if load_ckpt_format == "safetensors":  # `auto_trans.hooks.load.check_settings` does it, in every version
        return
    with in_yaml_words():
        config = AutoTransConfig.from_settings(
            {**known, "src_strategy_path_or_dir": src_strategy_path_or_dir}, load_checkpoint
        )
    check_and_empty(job, Load(config, load_ckpt_format))


def check_and_empty(job: Job, load: Load) -> None:
    """Checks the source, unless MindFormers loads it as it is, and empties what will be made anew.

    All ranks of the job call this, and see the same: else it tells so.

    Raises:
        AutoTransError: The source cannot be converted, or lies where it would be deleted.
    """
    config, folders = load.config, _folders(job, load.format)
    protected = [path for path in (config.load_checkpoint, config.src_strategy) if path]
    if not load.left:
        with in_yaml_words():
            elect(job.world_size, config.transform_process_num)
    seen = json.dumps([load.format, load.left, config.load, config.loader, config.unify, *protected])
    with job.session("clear", seen, config.timing) as session, session.heartbeat():
        check_cleanable(folders, protected)
        if load.checked:
            _check_source(session, load)
        session.post(f"checked_rank_{job.rank}", {})
        if session.is_leader:
            session.await_posts({f"checked_rank_{r}": r for r in range(job.world_size)}, "check the source")
            clean_folders(folders, protected)
            logger.info("%s are emptied", " and ".join(str(folder) for folder in folders))
            session.post("cleared", {})
        session.await_posts({"cleared": LEADER}, "empty the output directory")
    job.emptied()
    if load.left:  # nobody tells when such a load ends, and nothing of ours is written
        job.release()


def _folders(job: Job, format: str) -> list[Path]:
    unified = [job.unified_dir] if format == "safetensors" else []
    return [job.strategy_dir, job.transformed_dir, *unified]


def _check_source(session: Session, load: Load) -> None:
    """Checks all that the source and its strategy tell, before the target's is compiled.

    Each rank reads the heads of its share of the files and compares them with those of the first file of every stage. Rank
    0 plans the merge to one complete checkpoint, which needs every slice of every parameter.
    """
    given = load.source_strategy()
    for checkpoint in load.find(given):
        strategy = checkpoint.strategy(given)
        if not load.left:
            check_heads(strategy, ScannedFiles(_share(checkpoint, strategy, session.rank, session.world_size)))
        if session.is_leader:
            load.check(ScannedFiles(checkpoint), strategy)


def _share(checkpoint: Checkpoint, strategy: Strategy, rank: int, world_size: int) -> Checkpoint:
    """The part of the files that a rank looks at."""
    ranks = list(checkpoint.files)
    firsts = {strategy.stage_of(r): r for r in reversed(ranks)}.values()
    mine = sorted({*firsts, *ranks[rank::world_size]})
    files = {r: checkpoint.files[r] for r in mine}
    return replace(checkpoint, files=files)

"""The ``mindspore`` engine: delegates a planned conversion to MindSpore's own API.

It exists to compare against and as a way out. The plan is made and checked as for the native engine, so what MindSpore
would silently do wrong is refused here too; then ``mindspore.transform_checkpoints`` or, by the documentation's
``transform_by_rank`` rules, ``mindspore.transform_checkpoint_by_rank`` moves the tensors.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Optional

from auto_trans.core.strategy import Strategy
from auto_trans.engine.base import ConversionTask, Progress
from auto_trans.errors import ConfigError
from auto_trans.storage.manifest import FileRecord
from auto_trans.storage.names import rank_file
from auto_trans.storage.strategies import single_file

__all__ = ["MindSporeEngine"]

_COPY_BYTES = 4 * 1024 * 1024


class MindSporeEngine:
    """Has MindSpore convert."""

    name = "mindspore"
    tells_progress = False

    def write(self, task: ConversionTask, progress: Progress) -> list[FileRecord]:
        """Writes the files of a task, see `auto_trans.engine.base.Engine`.

        Raises:
            ConfigError: Neither side has a strategy, or the task is one that MindSpore's API cannot do right.
        """
        _check(task)
        if not task.files:
            return []
        if importlib.util.find_spec("mindspore") is None:
            raise ConfigError("the mindspore engine needs mindspore, which is not installed here; use «engine» native")
        target, records = task.target, []
        target.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".auto_trans_mindspore_", dir=target.folder) as scratch:
            ranks = sorted(rank for file in task.files for rank in file.ranks)
            made = _transform(task, ranks, Path(scratch))
            for file in task.files:
                with open(made[file.ranks[0]], "rb") as source, target.open(file) as out:
                    while part := source.read(_COPY_BYTES):
                        out.write(part)
                records += target.publish(out, file)
                progress(file.nbytes)
        return records


def _check(task: ConversionTask) -> None:
    if {task.checkpoint.format.name, task.target.format.name} != {"ckpt"}:
        raise ConfigError("the mindspore engine converts .ckpt to .ckpt only; use «engine» native for safetensors")
    if any(tensor.added is not None for file in task.files for tensor in file.tensors):
        raise ConfigError("the mindspore engine changes nothing on the way; use «engine» native")
    if task.from_strategy.is_complete and task.to_strategy.is_complete:
        raise ConfigError("source and target have no strategy; the mindspore engine has nothing to convert")


def _transform(task: ConversionTask, ranks: list[int], scratch: Path) -> dict[int, Path]:
    """Has MindSpore write the files of ``ranks`` into ``scratch``."""
    import mindspore

    source_dir, target_dir = scratch / "source", scratch / "target"
    # MindSpore picks the last file of a rank folder by name; links show it only the chosen one
    files = {rank: paths[0] for rank, paths in task.checkpoint.files.items()}
    for rank, file in files.items():
        (source_dir / f"rank_{rank}").mkdir(parents=True)
        (source_dir / f"rank_{rank}" / file.name).symlink_to(file.resolve())
    source = _strategy_file(task.from_strategy, scratch / "source_strategy.ckpt")
    target = _strategy_file(task.to_strategy, scratch / "target_strategy.ckpt")
    if not task.by_rank and len(ranks) == task.to_strategy.world_size:
        mindspore.transform_checkpoints(str(source_dir), str(target_dir), task.prefix, source, target)
    else:
        for rank in ranks:
            needed = mindspore.rank_list_for_transform(rank, source, target)
            held = {r: str(files[r]) for r in needed if r in files}
            path = rank_file(target_dir, task.prefix, rank)
            path.parent.mkdir(parents=True)
            mindspore.transform_checkpoint_by_rank(rank, held, str(path), source, target)
    return {rank: rank_file(target_dir, task.prefix, rank) for rank in ranks}


def _strategy_file(strategy: Strategy, scratch: Path) -> Optional[str]:
    """One file that describes the whole job, as MindSpore's API wants it."""
    if strategy.is_complete:
        return None
    return str(single_file(strategy.origin, scratch))

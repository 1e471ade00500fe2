"""The ``mindspore`` engine: delegates a planned conversion to MindSpore's own API.

It exists to compare against and as a way out. The plan is made and checked as for the native engine, so what MindSpore
would silently do wrong is refused here too; then ``mindspore.transform_checkpoints`` or, by the documentation's
``transform_by_rank`` rules, ``mindspore.transform_checkpoint_by_rank`` moves the tensors.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from auto_trans.core.strategy import Strategy
from auto_trans.errors import ConfigError
from auto_trans.report import ConversionReport
from auto_trans.storage.files import NewFile
from auto_trans.storage.manifest import FileRecord
from auto_trans.storage.sources import rank_file
from auto_trans.storage.strategies import single_file

if TYPE_CHECKING:
    from auto_trans.conversion import Conversion

__all__ = ["run_mindspore"]

_COPY_BYTES = 4 * 1024 * 1024


def run_mindspore(conversion: Conversion, *, by_rank: bool) -> ConversionReport:
    """Runs a planned conversion with MindSpore's API.

    Args:
        conversion: What to do.
        by_rank: Use ``transform_checkpoint_by_rank``, which also serves where not all ranks are asked for.

    Raises:
        ConfigError: Neither side has a strategy, or the files are safetensors, with which MindSpore's API is not right.
    """
    formats = {conversion.checkpoint.format.name, conversion.format.name}
    if formats != {"ckpt"}:
        raise ConfigError("the mindspore engine converts .ckpt to .ckpt only; use engine native for safetensors")
    begin = time.monotonic()
    conversion.dst.mkdir(parents=True, exist_ok=True)
    folder = conversion.folder
    written: list[FileRecord] = []
    with tempfile.TemporaryDirectory(prefix=".auto_trans_mindspore_", dir=conversion.dst) as scratch:
        reused = [record for rank in conversion.ranks if (record := folder.done(rank))]
        todo = [rank for rank in conversion.ranks if rank not in {record.rank for record in reused}]
        made = _transform(conversion, todo, Path(scratch), by_rank) if todo else {}
        for rank in todo:
            with open(made[rank], "rb") as source, NewFile(folder.file(rank)) as out:
                while part := source.read(_COPY_BYTES):
                    out.write(part)
            written += folder.publish(out, [rank])
    folder.manifest.finish()
    return ConversionReport(
        source=conversion.checkpoint.path,
        target=conversion.dst,
        files=tuple(sorted(reused + written, key=lambda record: record.rank)),
        converted=tuple(record.rank for record in written),
        reused=tuple(record.rank for record in reused),
        bytes_written=sum(record.size for record in written),
        seconds=time.monotonic() - begin,
        carried=conversion.plan.carried,
        absent=conversion.plan.absent,
        dropped=conversion.plan.dropped,
    )


def _transform(conversion: Conversion, ranks: list[int], scratch: Path, by_rank: bool) -> dict[int, Path]:
    """Has MindSpore write the files of ``ranks`` into ``scratch``."""
    import mindspore

    source_dir, target_dir = scratch / "source", scratch / "target"
    # MindSpore picks the last file of a rank folder by name; links show it only the chosen one.
    for rank, file in conversion.checkpoint.files.items():
        (source_dir / f"rank_{rank}").mkdir(parents=True)
        (source_dir / f"rank_{rank}" / file.name).symlink_to(file.resolve())
    source = _strategy_file(conversion.source, scratch / "source_strategy.ckpt")
    target = _strategy_file(conversion.target, scratch / "target_strategy.ckpt")
    if source is None and target is None:
        raise ConfigError("source and target have no strategy; the mindspore engine has nothing to convert")
    if not by_rank and len(ranks) == conversion.target.world_size:
        mindspore.transform_checkpoints(str(source_dir), str(target_dir), conversion.prefix, source, target)
    else:
        for rank in ranks:
            needed = mindspore.rank_list_for_transform(rank, source, target)
            files = {r: str(conversion.checkpoint.files[r]) for r in needed if r in conversion.checkpoint.files}
            path = rank_file(target_dir, conversion.prefix, rank)
            path.parent.mkdir(parents=True)
            mindspore.transform_checkpoint_by_rank(rank, files, str(path), source, target)
    return {rank: rank_file(target_dir, conversion.prefix, rank) for rank in ranks}


def _strategy_file(strategy: Strategy, scratch: Path) -> Optional[str]:
    """One file that describes the whole job, as MindSpore's API wants it."""
    if strategy.is_complete:
        return None
    return str(single_file(strategy.origin, scratch))

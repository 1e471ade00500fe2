"""The library call: one conversion, from paths to a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Optional, Union

from auto_trans.config import parse_memory
from auto_trans.conversion import plan_conversion
from auto_trans.core.rules import Allowed
from auto_trans.report import ConversionReport
from auto_trans.request import DEFAULT_PREFIX, Request, as_path, as_ranks
from auto_trans.storage.sources import PathLike, StrategyLike, as_strategy

__all__ = ["convert"]


def convert(
    src: PathLike,
    dst: PathLike,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    *,
    prefix: str = DEFAULT_PREFIX,
    ranks: Optional[Iterable[int]] = None,
    engine: str = "native",
    processes: int = 1,
    memory_limit: Union[int, str, None] = None,
    format: Optional[str] = None,
    step: Optional[str] = None,
    allow_extra: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    check_replicas: bool = False,
    reuse: bool = True,
    quiet: bool = True,
) -> ConversionReport:
    """Converts a checkpoint from one parallel strategy to another.

    Args:
        src: A complete file, a folder of shards with their index, or a folder of ``rank_N/`` folders with a file each; of
            several the latest step that all ranks have is taken. The files are ``.ckpt`` or ``.safetensors``. Or a
            Checkpoint 2.0 of MindFormers: its root, or the folder of one of its iterations.
        dst: Folder that gets ``rank_N/{prefix}N.ckpt``, or for a Checkpoint 2.0 ``iteration_NNNNNNNN/`` and the file that
            names it. Files that are there already and were made for the same request are kept; others are not overwritten.
        src_strategy: Strategy file, merged file or folder of the source; None if it is complete, or a Checkpoint 2.0.
        dst_strategy: The same of the target; None for one complete file, ``rank_0/{prefix}0.ckpt``.
        prefix: Beginning of the target files' names.
        ranks: The target ranks to convert; all by default.
        engine: ``native``, or ``mindspore`` to delegate to MindSpore's own API.
        processes: Worker processes on this machine.
        memory_limit: Memory that a process may use, in bytes or e.g. ``"512MiB"``; 64 MiB by default.
        format: Format of the target: ``ckpt`` or ``safetensors``, by default that of the source, or ``checkpoint2`` for a
            Checkpoint 2.0 of MindFormers.
        step: The step to take from the rank folders, as ``{epoch}_{step}``; the latest by default.
        allow_extra: Patterns (``*`` and ``?``) of parameters that every rank may hold whole although no strategy lists them.
        allow_missing: Patterns of weights that the target lists and the source may lack.
        check_replicas: Compare the bytes of all copies of every slice first (reads every file whole).
        reuse: Keep files that are there already and were made for the same request.
        quiet: Show no progress.

    Returns:
        What was done.

    Raises:
        AutoTransError: Anything that is wrong with the input or the output, see `auto_trans.errors`. The source is never
            touched, and no incomplete file bears its final name.
    """
    request = Request(
        as_path("«src»", src), as_path("«dst»", dst), as_strategy(src_strategy), as_strategy(dst_strategy),
        ranks=as_ranks(ranks), allowed=Allowed.of(allow_extra, allow_missing),
        prefix=prefix, format=format, step=step, engine=engine, processes=processes,
        memory_limit=parse_memory(memory_limit), check_replicas=check_replicas, reuse=reuse,
    )  # fmt: skip
    return plan_conversion(request).carry_out(quiet=quiet)

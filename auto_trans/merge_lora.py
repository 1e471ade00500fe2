"""Merges LoRA weights into the weights of the base model: W' = W + (B @ A) * scaling.

A thin front of the same conversion as every other: the product is an edit on the way, so complete and distributed sources,
and complete and distributed targets, are one pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Optional, Union

from auto_trans.config import parse_memory
from auto_trans.conversion import plan_conversion
from auto_trans.core.edits import AddLora
from auto_trans.core.rules import Allowed
from auto_trans.errors import ConfigError
from auto_trans.report import ConversionReport
from auto_trans.request import Request, as_path, as_ranks
from auto_trans.storage.sources import PathLike, StrategyLike, as_strategy

__all__ = ["merge_lora", "parse_scaling"]


def parse_scaling(value: Union[str, float]) -> float:
    """A scaling as a number, or as ``alpha/rank``, e.g. ``16/8``.

    Raises:
        ConfigError: It is neither, or 0, which would merge nothing.
    """
    match = re.fullmatch(r"\s*([-+.\deE]+)\s*(?:/\s*([-+.\deE]+)\s*)?", str(value))
    try:
        if match is None:
            raise ValueError
        scaling = float(match[1]) / float(match[2] or 1)
        if not math.isfinite(scaling):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"«scaling» must be a number or alpha/rank such as 16/8, not {value!r}") from None
    if not scaling:
        raise ConfigError("«scaling» must not be 0: nothing would be merged; give lora_alpha/lora_rank")
    return scaling


def merge_lora(
    src: PathLike,
    dst: PathLike,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    *,
    scaling: Union[str, float],
    prefix: str = "checkpoint_",
    ranks: Optional[Iterable[int]] = None,
    step: Optional[str] = None,
    format: Optional[str] = None,
    processes: int = 1,
    memory_limit: Union[int, str, None] = None,
    allow_extra: tuple[str, ...] = (),
    allow_missing: tuple[str, ...] = (),
    quiet: bool = True,
) -> ConversionReport:
    """Merges LoRA weights into the base weights beside them.

    Args:
        src: A complete checkpoint, or a folder of ``rank_N/`` folders, that holds base and LoRA weights.
        dst: Folder that gets ``rank_N/{prefix}N.ckpt``. Files that are there already and were made for the same merge are
            kept; others are not overwritten.
        src_strategy: Strategy of the source; None if it is complete.
        dst_strategy: Strategy of the target; None for one complete file.
        scaling: lora_alpha / lora_rank, as a number or as ``alpha/rank``.
        prefix: Beginning of the target files' names.
        ranks: The target ranks to convert; all by default.
        step: The step to take from the rank folders, as ``{epoch}_{step}``; the latest by default.
        format: ``ckpt`` or ``safetensors``; that of the source by default.
        processes: Worker processes on this machine.
        memory_limit: Memory for the parts that are merged, in bytes or e.g. ``"512MiB"``; 64 MiB by default.
        allow_extra: Patterns of parameters that every rank may hold whole although no strategy lists them.
        allow_missing: Patterns of weights that the target lists and the source may lack.
        quiet: Show no progress.

    Returns:
        What was done. The result holds the parameters of the base model: LoRA matrices and their moments are left out.

    Raises:
        OutputExistsError: The target folder holds files of something else.
        PlanError: A matrix has no partner or no base weight, or shapes do not multiply.
    """
    request = Request(
        as_path("«src»", src),
        as_path("«dst»", dst),
        as_strategy(src_strategy),
        as_strategy(dst_strategy),
        edits=(AddLora(parse_scaling(scaling)),),
        allowed=Allowed.of(allow_extra, allow_missing),
        ranks=as_ranks(ranks),
        step=step,
        prefix=prefix,
        format=format,
        processes=processes,
        memory_limit=parse_memory(memory_limit),
    )
    conversion = plan_conversion(request)
    merged = {tensor.name for file in conversion.files for tensor in file.tensors if tensor.added is not None}
    return replace(conversion.carry_out(quiet=quiet), with_lora=tuple(sorted(merged)))

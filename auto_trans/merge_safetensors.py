"""Merges distributed weights into one complete set of safetensors files, as HuggingFace and MindSpore lay it out.

A thin front of the same conversion as every other, to a target that is a set of files with indices:
``model-00001-of-0000K.safetensors``, ``model.safetensors.index.json`` (HuggingFace), ``param_name_map.json`` (the same map,
for ``mindspore.load_distributed_checkpoint(unified_safetensors_dir=...)``), and, for what no strategy lists,
``hyper_param.safetensors``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from auto_trans.config import parse_memory
from auto_trans.conversion import plan_conversion
from auto_trans.core.edits import Drop
from auto_trans.core.rules import Allowed
from auto_trans.core.strategy import Strategy
from auto_trans.errors import ConfigError
from auto_trans.log import logger
from auto_trans.request import Request, as_path
from auto_trans.storage.checkpoint2.find import is_checkpoint2
from auto_trans.storage.formats import scan
from auto_trans.storage.names import HYPER_PARAMETERS
from auto_trans.storage.sources import PathLike, StrategyLike, as_strategy
from auto_trans.storage.targets import SafetensorsSet

__all__ = ["MergeReport", "merge_safetensors", "parse_shard_size"]

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Attributes:
        target: The folder.
        files: The files with weights, in order.
        parameters: Number of parameters in them.
        total_size: Bytes of these parameters.
        reused: How many of these files were there already, made for the same merge.
    """

    target: Path
    files: tuple[str, ...]
    parameters: int
    total_size: int
    reused: int = 0


def parse_shard_size(text: Union[str, int]) -> int:
    """A size as HuggingFace writes it: ``5GB`` is 5 * 10**9, ``5GiB`` is 5 * 2**30.

    Raises:
        ConfigError: It is no size, or 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    unit = match[2].upper() if match else ""
    size = 0
    if match:
        size = int(float(match[1]) * (1024 ** " KMGT".index(unit or " ") if match[3] else _DECIMAL[unit]))
    if not size:
        raise ConfigError(f"«max_shard_size» must be a size such as 5GB, not {text!r}")
    return size


def merge_safetensors(
    src: PathLike,
    dst: PathLike,
    src_strategy: StrategyLike = None,
    *,
    file_suffix: Optional[str] = None,
    redundancy_removed: Optional[bool] = None,
    max_shard_size: Union[str, int] = "5GB",
    filter_out_param_prefix: Union[str, Sequence[str]] = (),
    check_replicas: bool = False,
    processes: int = 1,
    memory_limit: Union[int, str, None] = None,
    allow_extra: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    quiet: bool = True,
) -> MergeReport:
    """Merges the slices of a distributed checkpoint into complete safetensors files.

    Args:
        src: A folder of ``rank_N/`` folders. A slice may lie with only one of the ranks that share it, as after MindSpore's
            ``remove_redundancy``; it is found wherever it is. Or a Checkpoint 2.0 of MindFormers: its root, or the folder of
            one of its iterations.
        dst: Folder that gets the set. A merge that was interrupted goes on; anything else in the folder is refused.
        src_strategy: Strategy that the weights were saved under; None for a Checkpoint 2.0, which tells of it.
        file_suffix: Of several files in a rank folder the one whose name ends so, e.g. ``1_1``; the latest step by default.
        redundancy_removed: Whether redundancy was removed from the files. What their metadata say wins, with a warning.
        max_shard_size: Largest size of a file; a single larger parameter gets a file of its own.
        filter_out_param_prefix: Parameters that begin with this, or with one of these, are left out, e.g. ``adam_``.
        check_replicas: Compare all copies of every slice (reads every file whole).
        processes: Worker processes on this machine.
        memory_limit: Memory that a process may use; 64 MiB by default.
        allow_extra: Patterns of parameters that are taken as whole although the strategy does not list them.
        allow_missing: Patterns of weights that the strategy lists and the files may lack.
        quiet: Show no progress.

    Raises:
        MissingSliceError: A part of a parameter is nowhere.
        OutputExistsError: The target folder holds something else.
        PlanError: Copies of a slice differ.
    """
    source = as_strategy(src_strategy)
    prefixes = (filter_out_param_prefix,) if isinstance(filter_out_param_prefix, str) else (*filter_out_param_prefix,)
    if source.is_complete and not is_checkpoint2(as_path("«src»", src)):
        raise ConfigError("a merge needs the strategy that the weights were saved under («src_strategy»)")
    request = Request(
        as_path("«src»", src),
        as_path("«dst»", dst),
        source,
        Strategy.complete(),
        format="safetensors",
        file_suffix=file_suffix,
        edits=(Drop((*prefixes, "accu_grads.")),),
        shard_size=parse_shard_size(max_shard_size),
        allowed=Allowed.of(allow_extra, allow_missing),
        processes=processes,
        memory_limit=parse_memory(memory_limit),
        check_replicas=check_replicas,
    )
    conversion = plan_conversion(request)
    files = (Path(file.path) for file in conversion.plan.source_files if file.contents is None)
    _compare_with_metadata(files, redundancy_removed)
    _tell_unused(prefixes, conversion.source.names)
    target, todo = conversion.target, conversion.todo()
    assert isinstance(target, SafetensorsSet)
    there = {target.name(file.ranks[0], file.part) for file in conversion.files if file not in todo}
    report = conversion.carry_out(quiet=quiet)
    names = tuple(record.file for record in report.files if record.file != HYPER_PARAMETERS)
    return MergeReport(request.dst, names, len(target.weight_map), target.total_size, len(there & set(names)))


def _tell_unused(prefixes: Sequence[str], names: Sequence[str]) -> None:
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            logger.warning("no parameter of the source begins with %r; nothing is left out by it", prefix)


def _compare_with_metadata(files: Iterable[Path], claimed: Optional[bool]) -> None:
    if claimed is None:
        return
    said = {scan(file).redundancy_removed for file in files} - {None}
    if said and said != {claimed}:
        logger.warning(
            "has_redundancy says that redundancy was %sremoved from the weights, but their metadata say "
            "remove_redundancy: %s; the metadata are followed",
            "" if claimed else "not ", ", ".join(map(str, sorted(map(bool, said)))),
        )  # fmt: skip

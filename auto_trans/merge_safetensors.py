"""Merges distributed weights into one complete set of safetensors files, as HuggingFace and MindSpore lay it out.

The set holds ``model-00001-of-0000K.safetensors``, ``model.safetensors.index.json`` (HuggingFace), ``param_name_map.json``
(the same map, for ``mindspore.load_distributed_checkpoint(unified_safetensors_dir=...)``), and, for what no strategy lists,
``hyper_param.safetensors``. Every tensor streams through the engine; none is held as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

from auto_trans.config import parse_memory
from auto_trans.core.plan import FilePlan, TensorPlan, plan_conversion
from auto_trans.core.strategy import Strategy
from auto_trans.engine.native import DEFAULT_BUFFER_BYTES, Executor
from auto_trans.errors import ConfigError, OutputExistsError, PlanError
from auto_trans.log import logger
from auto_trans.progress import Meter
from auto_trans.storage.capacity import check_disk, check_memory
from auto_trans.storage.files import Publisher, write_json
from auto_trans.storage.formats import FORMATS, encoded_size
from auto_trans.storage.formats.index import content_digest
from auto_trans.storage.scanned import PathLike, ScannedSource, StrategyLike, as_strategy, find_source

__all__ = ["HYPER_PARAMETERS", "MergeReport", "merge_safetensors", "parse_shard_size"]

HYPER_PARAMETERS = "hyper_param.safetensors"
_INDICES = ("model.safetensors.index.json", "param_name_map.json")
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote.

    Attributes:
        target: The folder.
        files: The files with weights, in order.
        parameters: Number of parameters in them.
        total_size: Bytes of these parameters.
    """

    target: Path
    files: tuple[str, ...]
    parameters: int
    total_size: int


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
        raise ConfigError(f"max_shard_size must be a size such as 5GB, not {text!r}")
    return size


def merge_safetensors(
    src: PathLike,
    dst: PathLike,
    src_strategy: StrategyLike,
    *,
    file_suffix: Optional[str] = None,
    redundancy_removed: Optional[bool] = None,
    max_shard_size: Union[str, int] = "5GB",
    filter_out_param_prefix: Sequence[str] = (),
    check_replicas: bool = False,
    memory_limit: Union[int, str, None] = None,
    quiet: bool = True,
) -> MergeReport:
    """Merges the slices of a distributed checkpoint into complete safetensors files.

    Args:
        src: A folder of ``rank_N/`` folders. A slice may lie with only one of the ranks that share it, as after MindSpore's
            ``remove_redundancy``; it is found wherever it is.
        dst: An empty or new folder.
        src_strategy: Strategy that the weights were saved under.
        file_suffix: Of several files in a rank folder the one whose name ends so, e.g. ``1_1``; the latest step by default.
        redundancy_removed: Whether redundancy was removed from the files. What their metadata say wins, with a warning.
        max_shard_size: Largest size of a file; a single larger parameter gets a file of its own.
        filter_out_param_prefix: Parameters that begin so are left out, e.g. ``adam_``.
        check_replicas: Compare all copies of every slice (reads every file whole).
        memory_limit: Memory that the merge may use; 64 MiB by default.
        quiet: Show no progress.

    Raises:
        MissingSliceError: A part of a parameter is nowhere.
        OutputExistsError: The target folder is not empty.
        PlanError: Copies of a slice differ.
    """
    folder, limit, shard_size = Path(dst), parse_memory(memory_limit), parse_shard_size(max_shard_size)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(f"{folder} is not an empty folder; give a new or empty one")
    source = as_strategy(src_strategy)
    if source.is_complete:
        raise ConfigError("a merge needs the strategy that the weights were saved under")
    found = find_source(src, source, step=file_suffix)
    prefixes = (*filter_out_param_prefix, "accu_grads.")
    index = ScannedSource(found[0], lambda name: name.startswith(prefixes))
    plan = plan_conversion(source, Strategy.complete(), index)
    sources = {rank: index.file(rank) for rank in plan.source_ranks}
    _compare_with_metadata(sources.values(), redundancy_removed)
    tensors = plan.files[0].tensors
    carried = set(plan.carried)
    shards = _shards([t for t in tensors if t.name not in carried], shard_size)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = dict(zip(names, shards))
    hyper = [t for t in tensors if t.name in carried]
    if hyper:
        files[HYPER_PARAMETERS] = hyper
    check_memory(limit)
    check_disk(folder, sum(encoded_size(FORMATS["safetensors"], shard) for shard in files.values()))
    if check_replicas:
        _check_replicas(index, source, [t for t in tensors if t.name not in carried])
    meter = Meter(sum(t.nbytes for t in tensors), f"merging {found[0].name}", quiet=quiet)
    try:
        with (
            Executor(sources, min(DEFAULT_BUFFER_BYTES, limit // 2), meter) as executor,
            Publisher[None]() as publisher,
        ):
            for name, shard in files.items():
                out = executor.write(FilePlan((0,), tuple(shard)), folder / name, FORMATS["safetensors"])
                publisher.submit(out.publish)
    finally:
        meter.close()
    total = sum(t.nbytes for shard in shards for t in shard)
    weight_map = {t.name: name for name, shard in zip(names, shards) for t in shard}
    for name in _INDICES:  # last: they tell that the set is complete
        write_json(folder / name, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return MergeReport(folder, tuple(names), len(weight_map), total)


def _shards(tensors: Sequence[TensorPlan], size: int) -> list[list[TensorPlan]]:
    """The tensors by file, in their order."""
    shards: list[list[TensorPlan]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = size
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _compare_with_metadata(files: Iterable, claimed: Optional[bool]) -> None:
    said = {file.redundancy_removed for file in files} - {None}
    if claimed is not None and said and said != {claimed}:
        logger.warning(
            "has_redundancy says that redundancy was %sremoved from the weights, but their metadata say "
            "remove_redundancy: %s; the metadata are followed",
            "" if claimed else "not ", ", ".join(map(str, sorted(said))),
        )  # fmt: skip


def _check_replicas(index: ScannedSource, source: Strategy, tensors: Sequence[TensorPlan]) -> None:
    """Raises PlanError if two ranks that should hold the same slice hold different bytes."""
    for tensor in tensors:
        for stage in source.stages_of(tensor.name):
            layout = source.layouts[tensor.name][stage]
            first: dict[tuple[int, ...], tuple[int, str]] = {}
            for rank in index.ranks:
                if source.stage_of(rank) != stage or tensor.name not in index.tensors(rank):
                    continue
                cell = layout.cell(rank % source.stage_devices, len(tensor.shape))
                digest = content_digest(index.file(rank), tensor.name)
                other, expected = first.setdefault(cell, (rank, digest))
                if digest != expected:
                    raise PlanError(
                        f"rank {other} and rank {rank} should hold the same slice of parameter {tensor.name}, but their "
                        f"files differ; find out which of them is right"
                    )

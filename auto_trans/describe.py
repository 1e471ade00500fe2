"""Facts about plans, strategies and checkpoints for people: plain data that a table, JSON or a page can show."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Optional

from auto_trans.advice import advise
from auto_trans.config import DEFAULT_NPU_NUM
from auto_trans.conversion import Conversion
from auto_trans.core.consistency import check_shapes
from auto_trans.core.layout import Layout
from auto_trans.core.source import SlicedSource
from auto_trans.core.strategy import Strategy
from auto_trans.core.work import direct_reads, read_bytes
from auto_trans.errors import AutoTransError, CorruptCheckpointError, LayoutError, PlanError
from auto_trans.log import logger
from auto_trans.storage.capacity import available_memory, free_disk
from auto_trans.storage.checkpoint import Checkpoint
from auto_trans.storage.checkpoint2.find import is_checkpoint2
from auto_trans.storage.formats import scan
from auto_trans.storage.formats.ckpt import compute_crc
from auto_trans.storage.formats.head import FileHead
from auto_trans.storage.scanned import ScannedFiles
from auto_trans.storage.sources import find_checkpoints
from auto_trans.storage.strategies import read_strategy

__all__ = [
    "advise",
    "describe_checkpoint",
    "describe_plan",
    "describe_strategy",
    "differences",
    "read_path",
    "slice_shapes",
    "sliced_how",
]

_SAMPLE_BYTES = 32 * 1024 * 1024


def read_path(path: Path) -> Strategy | list[Checkpoint]:
    """What lies at a path: a strategy, or checkpoints.

    Raises:
        AutoTransError: It is neither.
    """
    if path.is_dir():
        if is_checkpoint2(path) or any(child.name.startswith("rank_") and child.is_dir() for child in path.iterdir()):
            return find_checkpoints(path)
        try:
            return read_strategy(path)
        except AutoTransError:
            if any("strategy" in child.name for child in path.iterdir()):
                raise
            return find_checkpoints(path)
    try:
        (found,) = find_checkpoints(path)
        scan(found.all_files[0])
        return [found]
    except CorruptCheckpointError:
        if path.suffix != ".ckpt":
            raise
        return read_strategy(path)  # its ending is the same
    except AutoTransError:
        if path.suffix != ".json":
            raise
        return read_strategy(path)


def describe_plan(
    conversion: Conversion,
    *,
    measure: bool = False,
    words: Optional[Mapping[str, str]] = None,
    node_devices: int = DEFAULT_NPU_NUM,
) -> dict[str, Any]:
    """What a conversion would do, and whether it could succeed.

    Args:
        conversion: The planned conversion.
        measure: Estimate the time by a short copy, which writes 32 MiB beside the target and removes them.
        words: What the user calls settings, by the library's names; for the problem.
        node_devices: Devices of a node of the job.
    """
    todo, plan, request, target = conversion.todo(), conversion.plan, conversion.request, conversion.target
    written = sum(target.size(file) for file in todo)
    missing = {(file.ranks[0], file.part) for file in todo}
    try:
        conversion.check()
        problem = ""
    except AutoTransError as e:
        e.told_by(words or {})
        problem = str(e)
    speed = _measured_speed(conversion) if measure and todo and not problem else None
    return {
        "source": str(conversion.checkpoint.path),
        "target": str(request.dst),
        "files": [
            {
                "ranks": list(file.ranks),
                "file": str(target.path(target.name(file.ranks[0], file.part))),
                "bytes": target.size(file),
                "source_ranks": sorted({shard.file.rank for shard in file.shards}),
                "reused": (file.ranks[0], file.part) not in missing,
            }
            for file in conversion.files
        ],
        "bytes_read": read_bytes(todo),
        "bytes_written": written,
        "memory": request.memory_limit,
        "memory_available": available_memory(),
        "disk_free": free_disk(request.dst),
        "seconds": written / speed if speed else None,
        "transform_process_num": advise(conversion),
        "direct": {"npu_num_per_node": node_devices, **asdict(direct_reads(plan, node_devices))},
        "carried": list(plan.carried),
        "absent": list(plan.absent),
        "dropped": list(plan.dropped),
        "warnings": list(plan.warnings),
        "problem": problem,
    }


def describe_strategy(strategy: Strategy, weights: Optional[Checkpoint] = None, pattern: str = "*") -> dict[str, Any]:
    """How the parameters of a job are sliced.

    Args:
        strategy: The strategy.
        weights: A checkpoint that was saved under it, or a complete one, which tells the shapes.
        pattern: Only parameters that match it.
    """
    shapes = slice_shapes(strategy, weights)
    parameters = []
    totals = [0] * strategy.world_size
    for name in sorted(strategy.layouts.keys() | strategy.refused.keys()):
        if not fnmatchcase(name, pattern):
            continue
        if name in strategy.refused:
            parameters.append({"name": name, "stages": [], "sliced": f"refused: {strategy.refused[name]}"})
            continue
        stages = strategy.stages_of(name)
        layout = strategy.layouts[name][stages[0]]
        entry: dict[str, Any] = {"name": name, "stages": list(stages), "sliced": sliced_how(layout)}
        if name in shapes:
            shape, item = shapes[name]
            entry.update(shape=list(shape), full_shape=list(layout.full_shape(shape)))
            for stage in stages:
                for rank in range(stage * strategy.stage_devices, (stage + 1) * strategy.stage_devices):
                    totals[rank] += item * math.prod(shape)
        parameters.append(entry)
    facts: dict[str, Any] = {
        "strategy": strategy.origin,
        "world_size": strategy.world_size,
        "stages": strategy.stages,
        "parameters": parameters,
    }
    if shapes:
        facts["bytes_per_rank"] = totals
    return facts


def sliced_how(layout: Layout) -> str:
    """A layout in words, e.g. ``dim 0 over axis 0 (4), optimizer shard 2``."""
    parts = []
    for dim, entry in enumerate(layout.tensor_map):
        if entry:
            axes = " and ".join(str(axis) for axis in entry)
            counts = " x ".join(str(layout.dev_matrix[-1 - axis]) for axis in entry)
            parts.append(f"dim {dim} over {'axis' if len(entry) == 1 else 'axes'} {axes} ({counts})")
    if layout.opt_shards > 1:
        parts.append(f"optimizer shard {layout.opt_shards}")
    return f"{', '.join(parts) or 'whole'} on {list(layout.dev_matrix)}"


def describe_checkpoint(checkpoint: Checkpoint, pattern: str = "*", *, check_crc: bool = False) -> dict[str, Any]:
    """What the files of a checkpoint hold: the parameters of the first file of every kind, and every file's size.

    Args:
        checkpoint: The checkpoint.
        pattern: Only parameters that match it.
        check_crc: Compute the crc of files that carry one.
    """
    scanned = ScannedFiles(checkpoint)
    heads = [(rank, head) for rank in scanned.ranks for head in scanned.heads(rank)]
    parameters: dict[tuple[Any, ...], dict[str, Any]] = {}
    for rank, head in heads:
        for name, tensor in head.tensors.items():
            if fnmatchcase(name, pattern):
                entry = parameters.setdefault(
                    (name, tensor.dtype, tensor.dims),
                    {
                        "name": name,
                        "dtype": tensor.dtype,
                        "shape": list(tensor.dims),
                        "bytes": tensor.nbytes,
                        "ranks": [],
                    },
                )
                entry["ranks"].append(rank)
    return {
        "checkpoint": str(checkpoint.path),
        "format": checkpoint.format.name,
        "kind": _kind(checkpoint),
        "files": [
            {
                "rank": rank,
                "file": str(head.path),
                "bytes": head.size,
                "parameters": len(head.tensors),
                "crc": _crc_state(head, check=check_crc),
            }
            for rank, head in heads
            if head.contents is None
        ],
        "parameters": list(parameters.values()),
    }


def _kind(checkpoint: Checkpoint) -> str:
    """What a checkpoint is, in words."""
    if checkpoint.iteration:
        sliced = "complete"
        if checkpoint.saved is not None:
            strategy, tensors = checkpoint.saved.strategy, checkpoint.saved.tensors.values()
            count = sum(tensor.slice_shape != tensor.shape for tensor in tensors)
            stages = f" in {strategy.stages} stages" if strategy.stages > 1 else ""
            sliced = f"{strategy.world_size} ranks{stages}, {count} of {len(tensors)} parameters sliced"
        step = "" if checkpoint.step is None else f", iteration {checkpoint.step}"
        return f"Checkpoint 2.0 of MindFormers{step}, {sliced}"
    if checkpoint.distributed:
        return f"rank folders of {len(checkpoint.files)} ranks"
    return "complete, in shards with an index" if checkpoint.is_sharded else "one file"


def _crc_state(head: FileHead, *, check: bool) -> str:
    """``none``, ``present``, or after computing it ``right`` or ``wrong``."""
    if head.crc is None:
        return "none"
    if not check or head.path.suffix != ".ckpt":
        return "present"
    return "right" if compute_crc(head) == head.crc else "wrong"


def differences(a: Strategy, b: Strategy, pattern: str = "*") -> list[dict[str, str]]:
    """The parameters that two strategies slice differently, or that only one of them lists."""
    found = []
    for name in sorted(set(a.names()) | set(b.names())):
        if fnmatchcase(name, pattern):
            before, after = _in_words(a, name), _in_words(b, name)
            if before != after:
                found.append({"name": name, "before": before, "after": after})
    return found


def _in_words(strategy: Strategy, name: str) -> str:
    stages = strategy.stages_of(name)
    if not stages:
        return strategy.refused.get(name, "not listed")
    stage = f", stage {' and '.join(map(str, stages))}" if strategy.stages > 1 else ""
    return sliced_how(strategy.layouts[name][stages[0]]) + stage


def slice_shapes(strategy: Strategy, weights: Optional[Checkpoint]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape of a rank's slice and bytes of an element of every parameter that a strategy lists and a checkpoint holds.

    Args:
        strategy: The strategy.
        weights: A checkpoint that was saved under it, or a complete one, whose parameters are sliced by it.

    Raises:
        PlanError: The checkpoint has not the ranks that the strategy describes, or not its shapes.
    """
    if weights is None:
        return {}
    if weights.distributed:
        if len(weights.files) < strategy.world_size and not weights.iteration:
            logger.warning(
                "%s holds only %d of the %d ranks that %s describes",
                weights.path, len(weights.files), strategy.world_size, strategy.origin,
            )  # fmt: skip
        source = SlicedSource(weights.strategy(strategy), ScannedFiles(weights))
        check_shapes(source)
    else:
        source = SlicedSource(Strategy.complete(), ScannedFiles(weights))
    shapes = {}
    for name in source.names:
        if strategy.lists(name) and name not in strategy.refused:
            tensor = source.tensor(name)
            layout = strategy.layouts[name][strategy.stages_of(name)[0]]
            try:
                shapes[name] = layout.slice_shape(tensor.shape), tensor.item_bytes
            except LayoutError as e:
                raise PlanError(
                    f"parameter {name} of {source.where(name)} does not fit the strategy {strategy.origin}: {e}"
                ) from e
    if not shapes:
        raise PlanError(
            f"{weights.path} holds no parameter that the strategy {strategy.origin} lists; it is of another model"
        )
    return shapes


def _measured_speed(conversion: Conversion) -> float:
    """Bytes per second of a short copy from the source to the file system of the target."""
    folder = conversion.request.dst.absolute()
    while not folder.exists():
        folder = folder.parent
    source = max(conversion.checkpoint.all_files, key=lambda file: file.stat().st_size)
    begin = time.perf_counter()
    copied = 0
    with open(source, "rb") as f, tempfile.TemporaryFile(dir=folder) as out:
        for part in _parts(f.read, min(_SAMPLE_BYTES, source.stat().st_size)):
            copied += out.write(part)
        out.flush()
        os.fsync(out.fileno())
    return copied / max(time.perf_counter() - begin, 1e-6)


def _parts(read: Any, total: int) -> Iterable[bytes]:
    while total > 0 and (part := read(min(total, 1 << 20))):
        total -= len(part)
        yield part

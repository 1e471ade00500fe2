"""Facts about plans, strategies and checkpoints for people: plain data that a table, JSON or a page can show."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Optional

from auto_trans.conversion import Conversion
from auto_trans.coordination.election import elect
from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.core.work import loads, process_nums, read_bytes
from auto_trans.errors import AutoTransError, CorruptCheckpointError
from auto_trans.storage.capacity import available_memory, free_disk
from auto_trans.storage.formats import scan
from auto_trans.storage.formats.ckpt import compute_crc
from auto_trans.storage.formats.index import CheckpointIndex
from auto_trans.storage.sources import SourceCheckpoint, find_checkpoints
from auto_trans.storage.strategies import read_strategy

__all__ = [
    "advise",
    "describe_checkpoint",
    "describe_plan",
    "describe_strategy",
    "differences",
    "read_path",
    "sliced_how",
]

_SAMPLE_BYTES = 32 * 1024 * 1024


def read_path(path: Path) -> Strategy | list[SourceCheckpoint]:
    """What lies at a path: a strategy, or checkpoints.

    Raises:
        AutoTransError: It is neither.
    """
    if path.is_dir():
        if any(child.name.startswith("rank_") and child.is_dir() for child in path.iterdir()):
            return find_checkpoints(path)
        try:
            return read_strategy(path)
        except AutoTransError:
            if any("strategy" in child.name for child in path.iterdir()):
                raise
            return find_checkpoints(path)
    try:
        (found,) = find_checkpoints(path)
        scan(found.files[0])
        return [found]
    except CorruptCheckpointError:
        if path.suffix != ".ckpt":
            raise
        return read_strategy(path)  # its ending is the same
    except AutoTransError:
        if path.suffix != ".json":
            raise
        return read_strategy(path)


def describe_plan(conversion: Conversion, *, measure: bool = True) -> dict[str, Any]:
    """What a conversion would do, and whether it could succeed.

    Args:
        conversion: The planned conversion.
        measure: Read and write a little to estimate the time.
    """
    todo, plan = conversion.todo(), conversion.plan
    written = sum(conversion.file_size(file) for file in todo)
    try:
        conversion.check()
        problem = ""
    except AutoTransError as e:
        problem = str(e)
    speed = _measured_speed(conversion) if measure and todo and not problem else None
    return {
        "source": str(conversion.checkpoint.path),
        "target": str(conversion.dst),
        "files": [
            {
                "ranks": list(file.ranks),
                "file": str(conversion.folder.file(file.ranks[0])),
                "bytes": conversion.file_size(file),
                "source_ranks": sorted({copy.rank for tensor in file.tensors for copy in tensor.copies}),
                "reused": file not in todo,
            }
            for file in plan.files
        ],
        "bytes_read": read_bytes(todo),
        "bytes_written": written,
        "memory": conversion.memory_limit,
        "memory_available": available_memory(),
        "disk_free": free_disk(conversion.dst),
        "seconds": written / speed if speed else None,
        "transform_process_num": advise(conversion),
        "carried": list(plan.carried),
        "absent": list(plan.absent),
        "dropped": list(plan.dropped),
        "problem": problem,
    }


def advise(conversion: Conversion) -> list[dict[str, Any]]:
    """What the converters of a job would read and write by ``transform_process_num``, of which one can be chosen.

    Returns:
        Per value the bytes that the busiest converter reads and writes, the bytes that all write, and how many of the
        converters write at all. Empty if the plan is not that of a whole job.
    """
    plan, world_size = conversion.plan, conversion.target.world_size
    if world_size == 1 or len(conversion.ranks) < world_size:
        return []
    advice = []
    for number in process_nums(world_size):
        found = loads(plan, [assignment.slices for assignment in elect(world_size, number)])
        advice.append(
            {
                "transform_process_num": number,
                "busiest_reads": max(load.read for load in found),
                "busiest_writes": max(load.written for load in found),
                "all_write": sum(load.written for load in found),
                "writing": sum(load.written > 0 for load in found),
            }
        )
    return advice


def describe_strategy(
    strategy: Strategy, weights: Optional[SourceCheckpoint] = None, pattern: str = "*"
) -> dict[str, Any]:
    """How the parameters of a job are sliced.

    Args:
        strategy: The strategy.
        weights: A checkpoint that was saved under it, which tells the shapes.
        pattern: Only parameters that match it.
    """
    shapes = parameter_shapes(weights)
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


def describe_checkpoint(checkpoint: SourceCheckpoint, pattern: str = "*", *, check_crc: bool = False) -> dict[str, Any]:
    """What the files of a checkpoint hold: the parameters of the first file of every kind, and every file's size.

    Args:
        checkpoint: The checkpoint.
        pattern: Only parameters that match it.
        check_crc: Compute the crc of files that carry one.
    """
    indices = {rank: scan(file) for rank, file in checkpoint.files.items()}
    parameters: dict[tuple[Any, ...], dict[str, Any]] = {}
    for rank, index in indices.items():
        for name, tensor in index.tensors.items():
            if fnmatchcase(name, pattern):
                key = (name, tensor.dtype, tensor.dims)
                entry = parameters.setdefault(
                    key,
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
        "files": [
            {
                "rank": rank,
                "file": str(index.path),
                "bytes": index.size,
                "parameters": len(index.tensors),
                "crc": _crc_state(index, check=check_crc),
            }
            for rank, index in indices.items()
        ],
        "parameters": list(parameters.values()),
    }


def _crc_state(index: CheckpointIndex, *, check: bool) -> str:
    """``none``, ``present``, or after computing it ``right`` or ``wrong``."""
    if index.crc is None:
        return "none"
    if not check or index.path.suffix != ".ckpt":
        return "present"
    return "right" if compute_crc(index) == index.crc else "wrong"


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


def parameter_shapes(weights: Optional[SourceCheckpoint]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes of an element of every parameter that the files hold."""
    shapes: dict[str, tuple[tuple[int, ...], int]] = {}
    for file in weights.files.values() if weights else ():
        for name, tensor in scan(file).tensors.items():
            shapes.setdefault(name, (tensor.shape, tensor.nbytes // max(math.prod(tensor.shape), 1)))
    return shapes


def _measured_speed(conversion: Conversion) -> float:
    """Bytes per second of a short copy from the source to the file system of the target."""
    folder = conversion.dst.absolute()
    while not folder.exists():
        folder = folder.parent
    source = max(conversion.checkpoint.files.values(), key=lambda file: file.stat().st_size)
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

"""Strategy files: read what MindSpore saved, and merge the files of all pipeline stages.

A strategy is given as a per-rank file (``ckpt_strategy_rank_N.ckpt`` or its ``.json`` form, which describes one pipeline
stage), as a folder of them, or as a merged file, whose parameter names carry the stage as ``<stage>-``. What the files
hide is restored here: which file belongs to which stage, and that all ranks of a stage agree.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Union

import xxhash

from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.errors import LayoutError, StrategyError, StrategyNotFoundError
from auto_trans.storage.files import new_file
from auto_trans.storage.strategy_pb import DecodeError, ParallelStrategyMap

__all__ = ["MERGED_NAME", "merge_strategies", "read_strategy", "remerge_strategies"]

MERGED_NAME = "merged_ckpt_strategy.ckpt"

PathLike = Union[str, "os.PathLike[str]"]

_RANK_FILE = re.compile(r"^(?!merged).*_rank_(\d+)\.(?:ckpt|json)$")
_STAGE_PREFIX = re.compile(r"^(\d+)-(.+)$")


class _StageFile(NamedTuple):
    """One stage's part of a strategy: parameter name -> layout, or why it is refused."""

    stage: int
    layouts: dict[str, Layout]
    refused: dict[str, str]


def read_strategy(path: PathLike) -> Strategy:
    """Reads a strategy file, a merged strategy file or a folder of strategy files.

    Args:
        path: A ``.ckpt`` or ``.json`` strategy file, or a folder that holds a job's per-rank files. A folder's per-rank
            files win over a merged file beside them, which may be stale.

    Returns:
        The strategy of the whole job.

    Raises:
        StrategyNotFoundError: There is nothing at the path.
        StrategyError: A file is no strategy file, the files are of different jobs, or stages are missing.
    """
    path = Path(path)
    if path.is_dir():
        stages, digest = _read_folder(path)
    elif path.is_file():
        stages, digest = _read_file(path)
    else:
        raise StrategyNotFoundError(f"strategy {path} is not found; set it to a strategy file or folder that exists")
    return _assemble(stages, str(path), digest)


def merge_strategies(folder: PathLike, output: PathLike | None = None) -> Path:
    """Merges a folder's per-stage strategy files into one file that MindSpore's own tools read, too.

    Args:
        folder: Holds ``*_rank_N.ckpt`` files of all stages (or their ``.json`` form).
        output: Where to write; ``merged_ckpt_strategy.ckpt`` in the folder by default. An earlier file is replaced only
            once the new one is complete.

    Raises:
        StrategyNotFoundError: The folder holds no strategy files.
        StrategyError: The files do not make up one job.
        OutputError: The merged file cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir() or not _rank_files(folder):
        raise StrategyNotFoundError(f"{folder} holds no *_rank_N.ckpt (or .json) strategy files to merge")
    read_strategy(folder)
    merged, seen = ParallelStrategyMap(current_stage=1), set()
    for file in _rank_files(folder).values():
        message = _message(file, _read_bytes(file))
        stage = _stage_of_items(message, file)
        if stage in seen:
            continue
        seen.add(stage)
        for item in message.parallel_layout_item:
            item.param_name = f"{stage}-{item.param_name}"
        merged.parallel_strategy_item.extend(message.parallel_strategy_item)
        merged.parallel_layout_item.extend(message.parallel_layout_item)
    output = Path(output) if output else folder / MERGED_NAME
    with new_file(output) as out:
        out.write(merged.SerializeToString())
    return output


def remerge_strategies(path: PathLike | None) -> None:
    """Writes the merged file of a strategy folder anew, as MindFormers' scripts do; an old one stays if that fails.

    Nothing is done for what is no folder, or where pipeline parallelism is not used.
    """
    if path and path != "None" and Path(path).is_dir() and read_strategy(path).stages > 1:
        merge_strategies(path)


def _rank_files(folder: Path) -> dict[int, Path]:
    """The per-rank files of a folder by rank, in ascending order."""
    found = [(int(m.group(1)), f) for f in sorted(folder.iterdir()) if (m := _RANK_FILE.match(f.name))]
    if len({f.suffix for _, f in found}) > 1:
        raise StrategyError(f"{folder} holds strategy files of both kinds, .ckpt and .json; keep one kind")
    by_rank: dict[int, Path] = {}
    for rank, file in sorted(found):
        if rank in by_rank:
            raise StrategyError(f"{folder} holds two strategy files of rank {rank}: {by_rank[rank].name}, {file.name}")
        by_rank[rank] = file
    return by_rank


def _read_folder(folder: Path) -> tuple[list[_StageFile], str]:
    files = _rank_files(folder)
    if not files:
        if (folder / MERGED_NAME).is_file():
            return _read_file(folder / MERGED_NAME)
        others = [f for f in sorted(folder.iterdir()) if f.suffix in (".ckpt", ".json")]
        if len(others) == 1:
            return _read_file(others[0])
        raise StrategyNotFoundError(
            f"strategy folder {folder} holds no *_rank_N.ckpt (or .json) file; set it to output/strategy of the job "
            f"that saved the weights"
        )
    # All ranks of a stage write the same bytes, so a large job has few distinct files to parse.
    by_digest: dict[str, _StageFile] = {}
    by_stage: dict[int, tuple[_StageFile, Path]] = {}
    for rank, file in files.items():
        content = _read_bytes(file)
        digest = xxhash.xxh3_128_hexdigest(content)
        if digest not in by_digest:
            stages = _parse(file, content)
            if len(stages) > 1:
                raise StrategyError(f"{file} is a merged strategy file under a per-rank name; rename or remove it")
            by_digest[digest] = stages[0]
        part = by_digest[digest]
        first, first_file = by_stage.setdefault(part.stage, (part, file))
        if first != part:
            raise StrategyError(
                f"{first_file} and {file} both describe stage {part.stage} but differ: they are of different jobs; "
                f"gather the strategy files of one job"
            )
        devices = _devices(part, file)
        if rank // devices != part.stage:
            raise StrategyError(
                f"{file} describes stage {part.stage} of {devices} ranks, to which rank {rank} does not belong: the "
                f"folder mixes files of different jobs"
            )
    digests = xxhash.xxh3_128_hexdigest("".join(sorted(by_digest)).encode())
    return [by_stage[stage][0] for stage in sorted(by_stage)], digests


def _read_file(file: Path) -> tuple[list[_StageFile], str]:
    content = _read_bytes(file)
    return _parse(file, content), xxhash.xxh3_128_hexdigest(content)


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise StrategyError(f"strategy file {file} cannot be read: {e}") from e


def _parse(file: Path, content: bytes) -> list[_StageFile]:
    """What a strategy file tells, by stage."""
    message = _message(file, content)
    layouts: dict[int, _StageFile] = {}
    merged = bool(message.parallel_layout_item) and all(
        _STAGE_PREFIX.match(item.param_name) for item in message.parallel_layout_item
    )
    own_stage = 0 if merged else _stage_of_items(message, file)
    for item in message.parallel_layout_item:
        stage, name = own_stage, item.param_name
        if merged:
            prefix, name = _STAGE_PREFIX.match(name).groups()  # type: ignore[union-attr]
            stage = int(prefix)
        part = layouts.setdefault(stage, _StageFile(stage, {}, {}))
        try:
            part.layouts[name] = _layout(item.parallel_layouts)
        except LayoutError as e:
            part.refused[name] = str(e)
    if not layouts:
        raise StrategyError(
            f"{file} holds no parameter layouts: it is no strategy file (is it a checkpoint?), or the job that wrote it "
            f"was not parallel"
        )
    return [layouts[stage] for stage in sorted(layouts)]


def _assemble(stages: list[_StageFile], origin: str, digest: str) -> Strategy:
    numbers = [part.stage for part in stages]
    if numbers != list(range(len(numbers))):
        raise StrategyError(
            f"strategy {origin} describes pipeline stage {', '.join(map(str, numbers))} only; give the folder with the "
            f"strategy files of all stages, or the merged file"
        )
    devices = {_devices(part, origin) for part in stages}
    if len(devices) > 1:
        raise StrategyError(f"strategy {origin}: its stages have different numbers of ranks: {sorted(devices)}")
    layouts: dict[str, dict[int, Layout]] = {}
    refused: dict[str, str] = {}
    for part in stages:
        refused.update(part.refused)
        for name, layout in part.layouts.items():
            layouts.setdefault(name, {})[part.stage] = layout
    return Strategy(len(stages), devices.pop(), layouts, refused, origin, digest)


def _devices(part: _StageFile, origin: Any) -> int:
    """Number of ranks of a stage; every layout must agree on it (their dev_matrix may differ)."""
    found = {layout.devices: name for name, layout in part.layouts.items()}
    if not found:
        raise StrategyError(f"{origin}: stage {part.stage}: {next(iter(part.refused.values()))}")
    if len(found) > 1:
        raise StrategyError(f"{origin}: stage {part.stage}: parameters disagree on the number of ranks: {found}")
    return next(iter(found))


def _layout(item: Any) -> Layout:
    """The layout of a ``ParallelLayouts`` message.

    A single ``tensor_map`` entry holds one axis per tensor dimension. Several entries are those of a mindspore Layout,
    one per dimension; one without numbers does not count as a dimension for certain, as MindSpore adds one to
    one-dimensional parameters.
    """
    if item.field or any(s.dim for s in item.param_split_shape) or any(o.dim for o in item.indices_offset):
        raise LayoutError(
            "it is sliced unevenly (param_split_shape, indices_offset or field is set), which is not supported; save the "
            "weights with an even slicing of this parameter"
        )
    if len(item.dev_matrix) != 1:
        raise LayoutError(f"it has {len(item.dev_matrix)} device matrices instead of one")
    entries = [tuple(entry.dim) for entry in item.tensor_map]
    extra = 0
    if len(entries) == 1:
        tensor_map = [() if axis == -1 else (axis,) for axis in entries[0]]
    else:
        tensor_map = [tuple(axis for axis in entry if axis != -1) for entry in entries]
        while extra < len(entries) and not entries[-1 - extra]:
            extra += 1
    return Layout(
        tuple(item.dev_matrix[0].dim),
        tuple(tensor_map),
        item.opt_weight_shard_size,
        item.opt_weight_shard_step,
        tuple(range(len(tensor_map) - extra, len(tensor_map) + 1)),
    )


def _stage_of_items(message: Any, file: Path) -> int:
    stages = {item.parallel_strategys.stage for item in message.parallel_strategy_item}
    if len(stages) > 1:
        raise StrategyError(f"{file} names several stages, {sorted(stages)}, but its parameters carry no stage prefix")
    return stages.pop() if stages else 0


def _message(file: Path, content: bytes) -> Any:
    try:
        if file.suffix == ".json":
            return _from_json(json.loads(content))
        message = ParallelStrategyMap()
        message.ParseFromString(content)
        return message
    except (DecodeError, ValueError, TypeError, KeyError, AttributeError) as e:
        raise StrategyError(f"{file} is not a strategy file that MindSpore wrote ({type(e).__name__}: {e})") from e


def _from_json(content: Any) -> Any:
    """The protobuf message of a strategy in MindSpore's JSON form."""
    message = ParallelStrategyMap(current_stage=int(content.get("current_stage", 0)))
    for node, item in (content.get("parallel_strategy_item") or {}).items():
        added = message.parallel_strategy_item.add(node_name=node)
        added.parallel_strategys.stage = int(item.get("stage", 0))
        for strategy in item.get("parallel_strategy") or ():
            added.parallel_strategys.parallel_strategy.add(dim=_numbers(strategy))
    for name, item in (content.get("parallel_layout_item") or {}).items():
        layouts = message.parallel_layout_item.add(param_name=name).parallel_layouts
        for key in ("dev_matrix", "tensor_map", "param_split_shape", "indices_offset"):
            value = item.get(key) or []
            nested = bool(value) and all(isinstance(entry, (list, tuple)) for entry in value)
            for entry in value if nested else [value]:
                getattr(layouts, key).add(dim=_numbers(entry))
        layouts.field = int(item.get("field") or 0)
        layouts.opt_weight_shard_step = int(item.get("opt_weight_shard_step") or 0)
        layouts.opt_weight_shard_size = int(item.get("opt_weight_shard_size") or 0)
    return message


def _numbers(value: Any) -> Iterable[int]:
    if isinstance(value, Mapping):  # {"dim": [...]}, protobuf's own JSON form
        value = value.get("dim", [])
    return [int(n) for n in value]

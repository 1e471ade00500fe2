"""Strategy files: how the parameters of a job are sliced, read from what MindSpore saved.

A strategy is given as a per-rank file (``ckpt_strategy_rank_N.ckpt`` or its ``.json`` form, which describes one pipeline
stage), as a folder of them, or as a merged file, whose parameter names carry the stage as ``<stage>-``. What the files
hide is restored here: which file belongs to which stage, and that all ranks of a stage agree.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Union

import xxhash

from auto_trans.errors import LayoutError, StrategyError, StrategyNotFoundError
from auto_trans.layout import Layout
from auto_trans.strategy_pb import DecodeError, ParallelStrategyMap

__all__ = [
    "MERGED_NAME",
    "Strategy",
    "is_optimizer_state",
    "describe_difference",
    "merge_strategies",
    "read_strategy",
    "same_slices",
]

MERGED_NAME = "merged_ckpt_strategy.ckpt"

PathLike = Union[str, "os.PathLike[str]"]

_RANK_FILE = re.compile(r"^(?!merged).*_rank_(\d+)\.(?:ckpt|json)$")
_STAGE_PREFIX = re.compile(r"^(\d+)-(.+)$")
# MindFormers' AdamW and nn.Adam name their moments so; accu_grads are the accumulated gradients of pipeline jobs.
_OPTIMIZER_STATE = re.compile(r"^(adam_m|adam_v|moment1|moment2|moments|accu_grads|accum|stat)\.")


def is_optimizer_state(name: str) -> bool:
    """Whether a parameter belongs to the optimizer and not to the model."""
    return bool(_OPTIMIZER_STATE.match(name))


@dataclass(frozen=True)
class Strategy:
    """How the parameters of a job are sliced over its ranks.

    Attributes:
        stages: Number of pipeline stages.
        stage_devices: Number of ranks of a stage; rank = stage * stage_devices + rank within the stage.
        layouts: Parameter name -> stage -> layout. A parameter that several stages hold is listed for each of them.
        refused: Parameter name -> why its layout cannot be converted; raised only where the parameter is needed.
        origin: Where it was read, for messages.
        digest: Digest of what was read.
        is_complete: Every rank holds every parameter unsliced; `layouts` is empty.
    """

    stages: int
    stage_devices: int
    layouts: Mapping[str, Mapping[int, Layout]] = field(repr=False)
    refused: Mapping[str, str] = field(default_factory=dict, repr=False)
    origin: str = "no strategy"
    digest: str = ""
    is_complete: bool = False

    @classmethod
    def complete(cls, world_size: int = 1) -> Strategy:
        """The strategy of unsliced weights, held by each of ``world_size`` ranks."""
        return cls(1, world_size, {}, origin="complete weights", digest=f"complete-{world_size}", is_complete=True)

    @property
    def world_size(self) -> int:
        """Number of ranks of the job."""
        return self.stages * self.stage_devices

    def stage_of(self, rank: int) -> int:
        """The pipeline stage of a rank."""
        return rank // self.stage_devices

    def layout(self, name: str, stage: int) -> Layout | None:
        """The layout of a parameter in a stage, or None where the strategy does not list it.

        Raises:
            LayoutError: The layout is of a kind that cannot be converted.
        """
        if self.is_complete:
            return Layout.complete(self.stage_devices)
        if name in self.refused:
            raise LayoutError(f"{self.origin}: parameter {name}: {self.refused[name]}")
        return self.layouts.get(name, {}).get(stage)

    def lists(self, name: str) -> bool:
        """Whether any stage lists the parameter."""
        return self.is_complete or name in self.layouts or name in self.refused

    def stages_of(self, name: str) -> tuple[int, ...]:
        """The stages that hold a parameter, in ascending order."""
        return (0,) if self.is_complete else tuple(sorted(self.layouts.get(name, ())))

    def names(self, stage: int | None = None) -> Iterator[str]:
        """The parameters that a stage, or any stage, lists."""
        return (name for name, stages in self.layouts.items() if stage is None or stage in stages)


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
    """
    folder = Path(folder)
    if not folder.is_dir() or not _rank_files(folder):
        raise StrategyNotFoundError(f"{folder} holds no *_rank_N.ckpt (or .json) strategy files to merge")
    read_strategy(folder)
    merged, seen = ParallelStrategyMap(current_stage=1), set()
    for file in _rank_files(folder).values():
        message = _parse(file)
        stage = _stage_of_items(message, file)
        if stage in seen:
            continue
        seen.add(stage)
        for item in message.parallel_layout_item:
            item.param_name = f"{stage}-{item.param_name}"
        merged.parallel_strategy_item.extend(message.parallel_strategy_item)
        merged.parallel_layout_item.extend(message.parallel_layout_item)
    output = Path(output) if output else folder / MERGED_NAME
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    temporary.write_bytes(merged.SerializeToString())
    os.replace(temporary, output)
    return output


def same_slices(source: Strategy, target: Strategy) -> bool:
    """Whether every rank already holds exactly the slices that the target strategy gives it.

    Parameters that only one side lists do not count, save that a weight which only the source lists means that the
    strategies are not of one model.
    """
    if source.is_complete or target.is_complete:
        return source.is_complete and target.is_complete
    common = source.layouts.keys() & target.layouts.keys()
    if not common or (source.stages, source.stage_devices) != (target.stages, target.stage_devices):
        return False
    if any(name not in common and not is_optimizer_state(name) for name in source.layouts):
        return False
    if any(name in source.refused or name in target.refused for name in common):
        return False
    return all(source.stages_of(n) == target.stages_of(n) for n in common) and all(
        _same_layout(source.layouts[n][stage], target.layouts[n][stage]) for n in common for stage in source.layouts[n]
    )


def describe_difference(source: Strategy, target: Strategy) -> str:
    """One line that says how two strategies differ, for people."""
    sizes = [f"{s.world_size} ranks in {s.stages} stage{'s' * (s.stages > 1)}" for s in (source, target)]
    text = f"{sizes[0]} -> {sizes[1]}"
    known = target if source.is_complete else source
    for name in known.names():
        before, after = (s.layout(name, s.stages_of(name)[0]) if s.stages_of(name) else None for s in (source, target))
        if before and after and name not in known.refused:
            ndim = max(len(before.tensor_map), len(after.tensor_map))
            cut = [" x ".join(map(str, layout.grid(ndim))) for layout in (before, after)]
            if cut[0] != cut[1]:
                return f"{text}, e.g. {name} cut {cut[0]} -> {cut[1]}"
    return text


def _same_layout(a: Layout, b: Layout) -> bool:
    if a == b:
        return True
    ndim = max(len(a.tensor_map), len(b.tensor_map))
    try:
        return a.grid(ndim) == b.grid(ndim) and all(a.cell(r, ndim) == b.cell(r, ndim) for r in range(a.devices))
    except LayoutError:
        return False


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
    by_digest: dict[str, tuple[_StageFile, Path]] = {}
    by_stage: dict[int, tuple[_StageFile, Path]] = {}
    for rank, file in files.items():
        digest = xxhash.xxh3_128_hexdigest(file.read_bytes())
        if digest not in by_digest:
            stages, _ = _read_file(file)
            if len(stages) > 1:
                raise StrategyError(f"{file} is a merged strategy file under a per-rank name; rename or remove it")
            by_digest[digest] = (stages[0], file)
        part = by_digest[digest][0]
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
    message = _parse(file)
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
    return [layouts[stage] for stage in sorted(layouts)], xxhash.xxh3_128_hexdigest(message.SerializeToString())


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


def _parse(file: Path) -> Any:
    try:
        content = file.read_bytes()
    except OSError as e:
        raise StrategyError(f"strategy file {file} cannot be read: {e}") from e
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

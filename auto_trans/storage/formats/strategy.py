"""The contents of one strategy file: what it tells of the parameters of a pipeline stage, or of all stages if it is merged.

A ``.ckpt`` strategy file is the protobuf message ``ParallelStrategyMap`` (``mindspore.train.node_strategy_pb2``)::

    ParallelStrategyMap { uint32 current_stage = 1; repeated ParallelStrategyItem = 2; repeated ParallelLayoutItem = 3; }
    ParallelStrategyItem{ string node_name = 1; ParallelStrategys parallel_strategys = 2; }
    ParallelStrategys   { uint32 stage = 1; repeated ParallelStrategy = 2; }
    ParallelLayoutItem  { string param_name = 1; ParallelLayouts parallel_layouts = 2; }
    ParallelLayouts     { repeated DevMatrix = 1; repeated TensorMap = 2; repeated ParamSplitShape = 3;
                          repeated IndicesOffset = 4; int32 field = 5; int32 opt_weight_shard_step = 6;
                          int32 opt_weight_shard_size = 7; }

where the messages without a name here hold ``repeated dim = 1`` each. The names of a merged file carry the stage as
``<stage>-``. A ``.json`` file is turned into that message first, so that both are read in one way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from auto_trans.core.layout import Layout
from auto_trans.errors import LayoutError, StrategyError
from auto_trans.storage.formats.strategy_json import message_of_json
from auto_trans.storage.formats.wire import (
    INT32,
    INT64,
    UINT32,
    WireReader,
    bytes_field,
    number_field,
)

__all__ = ["StagePart", "StrategyFile", "merge", "parse"]

_STAGE_PREFIX = re.compile(r"([0-9]{1,9})-(.+)", re.DOTALL)
# The repeated fields of ParallelLayouts.
_REPEATED = {1: UINT32, 2: INT32, 3: INT64, 4: INT64}
# An uneven slicing may list numbers for every device.
_MOST_NUMBERS = 1 << 20


class StagePart(NamedTuple):
    """One stage's part of a strategy: parameter name -> layout, or why it is refused."""

    stage: int
    layouts: dict[str, Layout]
    refused: dict[str, str]


@dataclass(frozen=True)
class StrategyFile:
    """What a strategy file tells.

    Attributes:
        parts: What it tells of every stage, in ascending order of the stages; at least one.
        is_merged: Whether its names carry the stage.
        message: The file as a protobuf message.
    """

    parts: tuple[StagePart, ...]
    is_merged: bool
    message: bytes = field(repr=False)


def parse(file: Path, content: bytes) -> StrategyFile:
    """What a strategy file tells.

    Args:
        file: Its name, which tells the kind (``.json``, else protobuf) and is named in errors.
        content: Its bytes.

    Raises:
        StrategyError: The file is none that MindSpore wrote, or holds no layouts.
    """
    try:
        message = message_of_json(content) if file.suffix == ".json" else content
        stages, items = _read_map(WireReader.of_bytes(message))
    except ValueError as e:
        raise StrategyError(
            f"{file} is not a strategy file that MindSpore wrote ({e}); give the file as MindSpore saved it, and keep "
            f"other files out of a strategy folder"
        ) from e
    if not items:
        raise StrategyError(
            f"{file} holds no parameter layouts: it is no strategy file (is it a checkpoint?), or the job that wrote it "
            f"was not parallel"
        )
    prefixed = {name: match for name in items if (match := _STAGE_PREFIX.fullmatch(name))}
    is_merged = len(prefixed) == len(items)
    if not is_merged and len(stages) > 1:
        raise StrategyError(f"{file} names several stages, {sorted(stages)}, but its parameters carry no stage prefix")
    own_stage = next(iter(stages), 0)
    parts: dict[int, StagePart] = {}
    for name, entries in items.items():
        stage, plain = (int(prefixed[name][1]), prefixed[name][2]) if is_merged else (own_stage, name)
        part = parts.setdefault(stage, StagePart(stage, {}, {}))
        try:
            part.layouts[plain] = entries.layout()
        except LayoutError as e:
            part.refused[plain] = str(e)
    return StrategyFile(tuple(parts[stage] for stage in sorted(parts)), is_merged, message)


def merge(files: Iterable[tuple[int, StrategyFile]]) -> Iterator[bytes]:
    """The pieces of a merged file, from the file of every stage.

    Only the names of the parameters change; all else is copied as it is, also what is unknown here.
    """
    yield number_field(1, 1)
    for stage, file in files:
        reader = WireReader.of_bytes(file.message)
        start = 0
        for number, wire_type in reader.fields(reader.end):
            if number == 3:
                yield _with_prefix(reader, reader.extent(wire_type), file.message, f"{stage}-")
            else:
                reader.skip(wire_type)
                if number != 1:
                    yield file.message[start : reader.position]
            start = reader.position


def _with_prefix(reader: WireReader, end: int, message: bytes, prefix: str) -> bytes:
    """A ParallelLayoutItem whose parameter has another name."""
    pieces = []
    start = reader.position
    for number, wire_type in reader.fields(end):
        if number == 1:
            pieces.append(bytes_field(1, (prefix + reader.text(wire_type)).encode()))
        else:
            reader.skip(wire_type)
            pieces.append(message[start : reader.position])
        start = reader.position
    return bytes_field(3, b"".join(pieces))


class _Layouts(NamedTuple):
    """A ParallelLayouts message: the repeated fields by number, each with its numbers, and the single numbers."""

    repeated: dict[int, list[list[int]]]
    single: dict[int, int]

    def layout(self) -> Layout:
        """The layout that it describes.

        A single ``tensor_map`` entry holds one axis per tensor dimension. Several entries are those of a mindspore Layout,
        one per dimension; one without numbers does not count as a dimension for certain, as MindSpore adds one to
        one-dimensional parameters. A ``param_split_shape`` alone is what MindFormers writes for STAND_ALONE jobs, the shape
        of the parameter; with offsets it is that of parts of different sizes.
        """
        dev_matrices, entries, split_shapes, offsets = (self.repeated[number] for number in (1, 2, 3, 4))
        if self.single[5] or any(offsets):
            raise LayoutError(
                f"it is sliced unevenly (dev_matrix {dev_matrices}, tensor_map {entries}, param_split_shape {split_shapes}, "
                f"indices_offset {offsets}, field {self.single[5]}), which is not supported; save the weights with an even "
                f"slicing of this parameter"
            )
        if len(dev_matrices) != 1:
            raise LayoutError(f"it has {len(dev_matrices)} device matrices instead of one")
        extra = 0
        if len(entries) == 1:
            tensor_map: list[tuple[int, ...]] = [() if axis == -1 else (axis,) for axis in entries[0]]
        else:
            tensor_map = [tuple(axis for axis in entry if axis != -1) for entry in entries]
            while extra < len(entries) and not entries[-1 - extra]:
                extra += 1
        ndims = tuple(range(len(tensor_map) - extra, len(tensor_map) + 1))
        return Layout(tuple(dev_matrices[0]), tuple(tensor_map), self.single[7], self.single[6], ndims)


def _read_map(reader: WireReader) -> tuple[set[int], dict[str, _Layouts]]:
    """The stages that the operators of a ParallelStrategyMap name, and its parameters."""
    stages: set[int] = set()
    items: dict[str, _Layouts] = {}
    for number, wire_type in reader.fields(reader.end):
        if number == 1:
            reader.number(wire_type, UINT32)
        elif number == 2:
            stages.add(_read_stage(reader, reader.extent(wire_type)))
        elif number == 3:
            name, layouts = _read_item(reader, reader.extent(wire_type))
            if name in items:
                raise reader.error(f"parameter {name} for the second time")
            items[name] = layouts
        else:
            reader.skip(wire_type)
    return stages, items


def _read_stage(reader: WireReader, end: int) -> int:
    stage = None
    for number, wire_type in reader.fields(end):
        if number == 1:
            reader.text(wire_type)
        elif number == 2:
            for inner, inner_type in reader.fields(reader.extent(wire_type)):
                if inner == 1:
                    stage = reader.number(inner_type, UINT32)
                else:
                    reader.skip(inner_type)
        else:
            reader.skip(wire_type)
    if stage is None:
        raise reader.error("an operator without stage")
    return stage


def _read_item(reader: WireReader, end: int) -> tuple[str, _Layouts]:
    name, layouts = "", None
    for number, wire_type in reader.fields(end):
        if number == 1:
            name = reader.text(wire_type)
        elif number == 2 and layouts is None:
            layouts = _read_layouts(reader, reader.extent(wire_type))
        elif number == 2:
            raise reader.error(f"parameter {name} with two layouts")
        else:
            reader.skip(wire_type)
    if not name:
        raise reader.error("a parameter without name")
    if layouts is None or len(layouts.single) != 3:
        raise reader.error(f"parameter {name} without field, opt_weight_shard_step or opt_weight_shard_size")
    return name, layouts


def _read_layouts(reader: WireReader, end: int) -> _Layouts:
    repeated: dict[int, list[list[int]]] = {number: [] for number in _REPEATED}
    single: dict[int, int] = {}
    for number, wire_type in reader.fields(end):
        if number in _REPEATED:
            numbers: list[int] = []
            for inner, inner_type in reader.fields(reader.extent(wire_type)):
                if inner == 1:
                    reader.extend(numbers, inner_type, _REPEATED[number], 64 if number <= 2 else _MOST_NUMBERS)
                else:
                    reader.skip(inner_type)
            repeated[number].append(numbers)
            if number <= 2 and len(repeated[number]) > 64:
                raise reader.error("a layout of more than 64 dimensions")
        elif number in (5, 6, 7):
            single[number] = reader.number(wire_type, INT32)
        else:
            reader.skip(wire_type)
    return _Layouts(repeated, single)

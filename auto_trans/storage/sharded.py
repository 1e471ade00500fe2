"""A complete checkpoint in several safetensors files: shards, and the index that tells which holds what."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

from auto_trans.errors import CheckpointNotFoundError, CorruptCheckpointError
from auto_trans.log import logger
from auto_trans.storage.formats.head import FileHead
from auto_trans.storage.names import HYPER_PARAMETERS, INDEX_NAMES

__all__ = ["check_against_index", "find_shards", "is_index", "is_lone_shard", "is_one_of_several"]

_SHARD = re.compile(r"-([0-9]+)-of-([0-9]+)\.safetensors$")
_INDEX_ENDING, _MINDSPORE_INDEX = ".safetensors.index.json", INDEX_NAMES[1]


def is_lone_shard(file: Path) -> bool:
    """Whether a file is, by its name, one of several shards."""
    match = _SHARD.search(file.name)
    return bool(match) and int(match[2]) > 1  # type: ignore[index]


def is_index(file: Path) -> bool:
    """Whether a file is, by its name, the index of shards."""
    return not file.name.startswith(".") and (file.name.endswith(_INDEX_ENDING) or file.name == _MINDSPORE_INDEX)


def is_one_of_several(file: Path) -> bool:
    """Whether a file is, by its name or by the index beside it, one of several shards."""
    if is_lone_shard(file):
        return True
    try:
        named = set((_read_indices(file.parent) or {}).values())
    except CorruptCheckpointError:  # of an index that nobody asked for
        return False
    return file.name in named and len(named) > 1


def find_shards(folder: Path, files: Sequence[Path]) -> Optional[list[Path]]:
    """The shards of the one checkpoint that a folder holds, if it holds shards.

    Args:
        folder: The folder.
        files: The safetensors files in it, by name.

    Returns:
        The shards that the index names, and ``hyper_param.safetensors`` where it is there; None where there is no index
        and no file is a shard by its name.

    Raises:
        CheckpointNotFoundError: The index names a file that is missing, or shards have no index.
        CorruptCheckpointError: An index cannot be read, or two indices contradict each other.
    """
    weight_map = _read_indices(folder)
    if weight_map is None:
        lone = [file.name for file in files if is_lone_shard(file) or file.name == HYPER_PARAMETERS]
        if lone:
            raise CheckpointNotFoundError(
                f"{folder} holds shards of a checkpoint ({lone[0]}, ...), but no *{_INDEX_ENDING} and no "
                f"{_MINDSPORE_INDEX}, without which nobody knows whether all are there; copy the index there («src»)"
            )
        return None
    by_name = {file.name: file for file in files}
    named = sorted(set(weight_map.values()))
    missing = [name for name in named if name not in by_name]
    if missing:
        parameter = next(name for name, file in weight_map.items() if file == missing[0])
        raise CheckpointNotFoundError(
            f"the index in {folder} names {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}, e.g. for parameter "
            f"{parameter}, which is not there; copy the missing shards («src»)"
        )
    rest = [name for name in by_name if name not in named and name != HYPER_PARAMETERS]
    unnamed = [name for name in rest if is_lone_shard(by_name[name])]
    if unnamed:
        raise CorruptCheckpointError(
            f"{folder / unnamed[0]} is a shard that the index does not name; copy shards and index of one checkpoint («src»)"
        )
    if rest:
        logger.warning("%s: %s is not in the index and is not read", folder, ", ".join(rest[:3]))
    hyper = [HYPER_PARAMETERS] if HYPER_PARAMETERS in by_name and HYPER_PARAMETERS not in named else []
    return [by_name[name] for name in (*named, *hyper)]


def check_against_index(folder: Path, heads: Sequence[FileHead]) -> None:
    """Compares what the shards hold with what the index says.

    Raises:
        CorruptCheckpointError: They contradict each other, or a parameter lies in two shards.
    """
    weight_map = _read_indices(folder) or {}
    found: dict[str, str] = {}
    for head in heads:
        for name in head.tensors:
            if name in found:
                raise CorruptCheckpointError(
                    f"parameter {name} is in {found[name]} and in {head.path.name} of {folder}; copy the shards of one "
                    f"checkpoint («src»)"
                )
            found[name] = head.path.name
    for name, file in weight_map.items():
        if found.get(name) != file:
            raise CorruptCheckpointError(
                f"by the index in {folder} parameter {name} is in {file}, but {_where(found.get(name))}; copy shards and "
                f"index of one checkpoint («src»)"
            )
    for name, file in found.items():
        if name not in weight_map and file != HYPER_PARAMETERS:
            raise CorruptCheckpointError(
                f"parameter {name} is in {folder / file}, but not in the index; copy shards and index of one checkpoint "
                f"(«src»)"
            )


def _where(file: Optional[str]) -> str:
    return f"it is in {file}" if file else "no shard holds it"


def _read_indices(folder: Path) -> Optional[Mapping[str, str]]:
    """Parameter -> file, by HuggingFace's index or MindSpore's; they agree where both are there.

    MindFormers leaves MindSpore's beside HuggingFace's when it has loaded such weights, with its own names of the same
    parameters; the shards bear HuggingFace's.
    """
    maps = {path: _read_index(path) for path in sorted(folder.iterdir()) if is_index(path) and path.is_file()}
    if not maps:
        return None
    (first, weight_map), *others = sorted(maps.items(), key=lambda item: item[0].name == _MINDSPORE_INDEX)
    for path, other in others:
        renamed = path.name == _MINDSPORE_INDEX and sorted(other.values()) == sorted(weight_map.values())
        if other != weight_map and not (renamed and all(weight_map.get(n, f) == f for n, f in other.items())):
            name = next(n for n in (*weight_map, *other) if weight_map.get(n) != other.get(n))
            places = [one.get(name, "no file") for one in (weight_map, other)]
            raise CorruptCheckpointError(
                f"{first} and {path.name} contradict each other: parameter {name} is in {places[0]} by the "
                f"one and in {places[1]} by the other; keep the index of the shards that are there («src»)"
            )
    return weight_map


def _read_index(path: Path) -> Mapping[str, str]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        weight_map = dict(content.get("weight_map", content).items())
    except (OSError, ValueError, AttributeError, RecursionError) as e:
        raise CorruptCheckpointError(f"{path} cannot be read ({type(e).__name__}: {e}); copy it again") from e
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name:
            raise CorruptCheckpointError(
                f"{path} gives parameter {name} the place {file!r}, which is no file in its folder; copy it again"
            )
    if not weight_map:
        raise CorruptCheckpointError(f"{path} names no parameters; copy it again")
    return weight_map

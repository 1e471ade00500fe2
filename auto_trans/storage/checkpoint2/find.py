"""Finds the iteration of a Checkpoint 2.0 that is meant, and its files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Optional

from auto_trans.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    UnsupportedCheckpointError,
)
from auto_trans.log import logger
from auto_trans.storage.checkpoint import Checkpoint
from auto_trans.storage.checkpoint2.metadata import read_metadata
from auto_trans.storage.names import ITERATION_FILE, ITERATION_FOLDER, METADATA_NAME, TRACKER_NAME

__all__ = ["check_no_iteration_file", "find_iteration", "is_checkpoint2"]


def is_checkpoint2(path: Path) -> bool:
    """Whether a path is, by the names there, a Checkpoint 2.0: its root, an iteration, or a file of one.

    Nothing is read; what cannot be looked at is none.
    """
    try:
        if not path.is_dir():
            return bool(ITERATION_FILE.match(path.name)) and path.is_file()
        return bool(_root_signs(path)) or _is_iteration(path)
    except (OSError, RuntimeError):
        return False


def check_no_iteration_file(files: Iterable[Path]) -> None:
    """Refuses files of an iteration where complete files, or those of rank folders, are looked for.

    Raises:
        UnsupportedCheckpointError: One is.
    """
    for file in files:
        if ITERATION_FILE.match(file.name):
            raise UnsupportedCheckpointError(
                f"{file} is a file of a Checkpoint 2.0 of MindFormers, one part of a checkpoint; give the folder of its "
                f"iteration, or the one above with {TRACKER_NAME} («src»)"
            )


def find_iteration(path: Path, **choices: Optional[str]) -> Optional[Checkpoint]:
    """The Checkpoint 2.0 at a path, if that is the root of one or one of its iterations.

    Args:
        path: The folder.
        choices: By which rank folders are chosen from; an iteration is chosen by its folder.

    Raises:
        CheckpointNotFoundError: The iteration, or a file of it, is not there.
        ConfigError: A step is given.
        CorruptCheckpointError: Its files contradict each other.
    """
    iteration = _is_iteration(path)
    if not iteration and not _root_signs(path):
        return None
    for name, choice in choices.items():
        if choice is not None:
            raise ConfigError(
                f"{path} is a Checkpoint 2.0 of MindFormers, which has iterations; give the folder of one («src») and leave "
                f"«{name}» out"
            )
    return _open(path if iteration else _latest(path))


def _root_signs(path: Path) -> list[str]:
    """The tracker file, or folders of iterations."""
    children = [child for child in path.iterdir() if child.name == TRACKER_NAME or ITERATION_FOLDER.match(child.name)]
    return sorted(child.name for child in children if child.name == TRACKER_NAME or child.is_dir())


def _is_iteration(path: Path) -> bool:
    """Whether a folder holds files of an iteration, or has its name and metadata.json alone."""
    named = ITERATION_FOLDER.match(path.resolve().name) and (path / METADATA_NAME).is_file()
    return bool(named or _iteration_files(path))


def _iteration_files(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if ITERATION_FILE.match(child.name))


def _latest(root: Path) -> Path:
    """The folder of the iteration that the tracker file names."""
    there = [name for name in _root_signs(root) if name != TRACKER_NAME]
    names = f"there is {', '.join(there)}" if there else "there is none"
    tracker = root / TRACKER_NAME
    try:
        text = tracker.read_text(encoding="utf-8").strip()
    except FileNotFoundError as e:
        raise CheckpointNotFoundError(
            f"{tracker} is not found, so that no iteration is known to be complete; {names}: give the folder of one («src»)"
        ) from e
    except (OSError, ValueError) as e:
        raise CorruptCheckpointError(
            f"{tracker} cannot be read ({e}); {names}: give the folder of an iteration («src»)"
        ) from e
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise CorruptCheckpointError(
            f"{tracker} holds {text[:40]!r}, which is no iteration; {names}: give the folder of one («src»)"
        )
    folder = root / f"iteration_{int(text):08d}"
    if not folder.is_dir():
        raise CheckpointNotFoundError(
            f"{tracker} names iteration {int(text)}, but {folder} is not found; {names}: give the folder of one («src»)"
        )
    if len(there) > 1:
        logger.info("several iterations are there; %s, which %s names, is used", folder.name, TRACKER_NAME)
    return folder


def _open(folder: Path) -> Checkpoint:
    files = {file.name: file for file in _iteration_files(folder)}
    _check_alike(folder, files)
    metadata = folder / METADATA_NAME
    name = folder.resolve().name
    if not metadata.is_file():
        return Checkpoint(name, folder, {0: _lone_rank(folder, files)}, distributed=False, iteration=True)
    saved = read_metadata(metadata)
    world_size = saved.strategy.world_size
    by_rank: dict[int, dict[str, None]] = {}
    for rank, held in saved.held.items():
        for parameter, file in held.items():
            if file not in files:
                raise CheckpointNotFoundError(
                    f"{metadata} says that {file} holds parameter {parameter} of rank {rank}, but {folder / file} is not "
                    f"found; copy the missing files of this iteration («src»)"
                )
            by_rank.setdefault(rank, {})[file] = None
    for file in files:
        # what the graph does not use is in no metadata, and may have a file of its own
        found = ITERATION_FILE.match(file)
        assert found is not None
        if file not in saved.writers and int(found["total"]) != world_size:
            raise CorruptCheckpointError(
                f"{folder / file} is a file of {int(found['total'])} ranks, but {metadata} does not name it and tells of "
                f"{world_size} ranks: the files of two saves are mixed up; copy those of one («src»)"
            )
        by_rank.setdefault(saved.writers.get(file, int(found["index"])), {})[file] = None
    by_rank_files = {rank: tuple(files[file] for file in sorted(by_rank[rank])) for rank in sorted(by_rank)}
    return Checkpoint(name, folder, by_rank_files, distributed=True, iteration=True, saved=saved)


def _check_alike(folder: Path, files: Iterable[str]) -> None:
    """The files of one save have one prefix, and those of one kind tell the same number of files."""
    first: dict[str, tuple[str, str]] = {}  # what must be alike -> what it is, and in which file
    for file in files:
        found = ITERATION_FILE.match(file)
        assert found is not None
        for key, value in (("prefix", found["prefix"] or ""), (found["kind"], found["total"])):
            expected, other = first.setdefault(key, (value, file))
            if value != expected:
                raise CorruptCheckpointError(
                    f"{folder} holds {other} and {file}, which are of two saves; copy the files of one («src»)"
                )


def _lone_rank(folder: Path, files: dict[str, Path]) -> tuple[Path, ...]:
    """The files of a checkpoint of one rank, which has no metadata.json."""
    if not files:
        raise CheckpointNotFoundError(
            f"{folder} holds no files of an iteration, such as model-0000000-0000001.safetensors; copy them there («src»)"
        )
    several = next((file for file in files if int(ITERATION_FILE.match(file)["total"]) > 1), None)  # type: ignore[index]
    if several is not None:
        raise CheckpointNotFoundError(
            f"{folder} holds {several}, one file of several, but no {METADATA_NAME}, without which nobody knows what its "
            f"slices are; copy it there («src»)"
        )
    return tuple(files.values())

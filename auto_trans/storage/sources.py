"""Find the checkpoints at a path."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional, Union

from auto_trans.core.strategy import Strategy
from auto_trans.errors import CheckpointNotFoundError, ConfigError, ConfigTypeError, UnsupportedCheckpointError
from auto_trans.log import logger
from auto_trans.storage.checkpoint import Checkpoint
from auto_trans.storage.checkpoint2.find import check_no_iteration_file, find_iteration, is_checkpoint2
from auto_trans.storage.formats import FORMATS
from auto_trans.storage.names import RANK_FOLDER
from auto_trans.storage.scanned import ScannedFiles, read_errors
from auto_trans.storage.sharded import find_shards, is_index, is_lone_shard, is_one_of_several
from auto_trans.storage.siblings import check_not_a_slice
from auto_trans.storage.steps import check_names, choose_latest, choose_resumed, choose_step, choose_suffix
from auto_trans.storage.strategies import read_strategy

__all__ = [
    "Checkpoint",
    "PathLike",
    "ScannedFiles",
    "StrategyLike",
    "as_strategy",
    "find_checkpoints",
    "find_source",
    "find_sources",
]

PathLike = Union[str, "os.PathLike[str]"]
StrategyLike = Union[str, "os.PathLike[str]", Strategy, None]

_SUFFIXES = tuple(format.suffix for format in FORMATS.values())
# weights of other libraries, which often lie beside safetensors files
_FOREIGN = (".bin", ".pt", ".pth")


def find_sources(
    src: PathLike,
    strategy: Strategy,
    resume_file: Optional[str] = None,
    step: Optional[str] = None,
    suffix: Optional[str] = None,
) -> list[Checkpoint]:
    """Finds the source checkpoints and checks that strategy and files go together.

    Raises:
        ConfigError: A strategy is given for a complete checkpoint, or for one that tells of itself how it is sliced, or none
            for a distributed one or a slice of it.
    """
    found = find_checkpoints(Path(src), resume_file, step, suffix)
    for checkpoint in found:
        if checkpoint.iteration:
            if not strategy.is_complete:
                told = "its metadata.json tells how it is sliced" if checkpoint.distributed else "it is of one rank"
                raise ConfigError(
                    f"source {checkpoint.path} is a Checkpoint 2.0 of MindFormers, and {told}; leave the source strategy "
                    f"{strategy.origin} out («src_strategy»)"
                )
            continue
        if strategy.is_complete and len(checkpoint.files) > 1:
            raise ConfigError(
                f"source {checkpoint.path} is distributed over {len(checkpoint.files)} rank folders, but no source strategy "
                f"is given; set «src_strategy» to the strategy that it was saved under"
            )
        if strategy.world_size > 1 and not checkpoint.distributed:
            raise ConfigError(
                f"source {checkpoint.path} is complete, but its strategy {strategy.origin} describes {strategy.world_size} "
                f"ranks; give the folder above rank_0, or no source strategy («src_strategy»)"
            )
        if step is not None and not checkpoint.distributed:
            raise ConfigError(f"source {checkpoint.path} is complete and has no steps; leave «step» out")
        if not checkpoint.distributed:
            with read_errors(checkpoint.path):
                check_not_a_slice(checkpoint.all_files[0])
    return found


def find_source(
    src: PathLike,
    strategy: Strategy,
    resume_file: Optional[str] = None,
    step: Optional[str] = None,
    suffix: Optional[str] = None,
) -> Checkpoint:
    """Finds the one source checkpoint, see `find_sources`.

    Raises:
        ConfigError: There are several, too.
    """
    found = find_sources(src, strategy, resume_file, step, suffix)
    if len(found) > 1:
        names = ", ".join(one.path.name for one in found[:3])
        raise ConfigError(
            f"source {src} holds {len(found)} complete checkpoints ({names}, ...); give one of the files («src»)"
        )
    return found[0]


def find_checkpoints(
    path: PathLike, resume_file: Optional[str] = None, step: Optional[str] = None, suffix: Optional[str] = None
) -> list[Checkpoint]:
    """Finds the checkpoints at a path.

    Args:
        path: A ``.ckpt`` or ``.safetensors`` file, a folder of ``rank_N`` folders, a folder of shards with their index, the
            root of a Checkpoint 2.0 or one of its iterations, or a folder of complete files.
        resume_file: Name of the file to take from the rank folders, e.g. where ``resume_training`` picked a step; its
            ``_rank_N`` part is that of any rank. By default the latest step that all ranks have.
        step: The step to take from the rank folders, as ``{epoch}_{step}``.
        suffix: The end of the names of the files to take from the rank folders.

    Returns:
        The checkpoints; several only for a folder of complete files.

    Raises:
        CheckpointNotFoundError: There is nothing to convert.
        UnsupportedCheckpointError: The files are of neither format, or of both.
    """
    with read_errors(path):
        path = Path(path).expanduser()
        if path.is_file():
            return [_find_file(path)]
        if not path.is_dir():
            raise CheckpointNotFoundError(
                f"checkpoint {path} is not found; set it to a file or folder that exists («src»)"
            )
        folders = _rank_folders(path)
        if not folders:
            iteration = find_iteration(path, step=step, file_suffix=suffix, resume_training=resume_file)
            if iteration is not None:
                return [iteration]
        elif is_checkpoint2(path):
            logger.warning("%s holds rank folders and a Checkpoint 2.0; the rank folders are used", path)
        files = _checkpoint_files(path)
        if folders:
            if files:
                logger.warning("%s holds rank folders and complete files; the rank folders are used", path)
            by_rank = {rank: (file,) for rank, file in _choose(folders, resume_file, step, suffix).items()}
            return [Checkpoint(path.resolve().name, path, by_rank, distributed=True)]
        return _find_complete(path, files)


def as_strategy(strategy: StrategyLike) -> Strategy:
    """Reads a strategy unless it is one; None means complete weights, as does MindFormers' ``"None"``.

    Raises:
        ConfigTypeError: It is neither a strategy nor the path of one. An empty path is none: a variable may not be set.
    """
    if isinstance(strategy, Strategy):
        return strategy
    if strategy is None or strategy == "None":
        return Strategy.complete()
    if not isinstance(strategy, (str, os.PathLike)) or not str(strategy):
        raise ConfigTypeError(f"a strategy must be a path («src_strategy», «dst_strategy»), not {strategy!r}")
    return read_strategy(strategy)


def _find_file(path: Path) -> Checkpoint:
    if is_index(path):
        raise UnsupportedCheckpointError(
            f"{path} is the index of a checkpoint in shards; give the folder {path.parent} («src»)"
        )
    if path.suffix not in _SUFFIXES:
        raise UnsupportedCheckpointError(
            f"checkpoint {path} does not end with {' or '.join(_SUFFIXES)}; give such a file, or a folder («src»)"
        )
    check_no_iteration_file([path])
    if is_one_of_several(path):
        raise UnsupportedCheckpointError(
            f"{path} is one of several shards of a checkpoint; give the folder with all of them and their index («src»)"
        )
    return Checkpoint(path.stem, path, {0: (path,)}, distributed=False)


def _find_complete(path: Path, files: Sequence[Path]) -> list[Checkpoint]:
    """The complete checkpoints in a folder: that of the shards, or one of every file."""
    foreign = sorted(f.name for f in path.iterdir() if f.suffix in _FOREIGN)
    shards = find_shards(path, files)
    if not files:
        raise CheckpointNotFoundError(
            f"checkpoint folder {path} holds neither rank_N folders nor checkpoint files ({', '.join(_SUFFIXES)}); set it "
            f"to the folder above rank_0 («src»)"
        )
    if foreign:
        logger.warning("%s: %s is not read, only %s files are", path, ", ".join(foreign[:3]), files[0].suffix)
    if shards is not None:
        return [Checkpoint(path.resolve().name, path, {0: tuple(shards)}, distributed=False)]
    return [Checkpoint(file.stem, file, {0: (file,)}, distributed=False) for file in files]


def _rank_folders(path: Path) -> dict[int, Path]:
    """The rank folders in a folder, by rank."""
    folders: dict[int, Path] = {}
    for child in path.iterdir():
        match = RANK_FOLDER.match(child.name)
        if match:
            rank = int(match[1])
            if not child.is_dir():
                raise UnsupportedCheckpointError(
                    f"{child} is no folder, or a link to nothing; make it the folder with the weights of rank {rank}, or "
                    f"remove it"
                )
            if rank in folders:
                raise UnsupportedCheckpointError(
                    f"{folders[rank]} and {child} are both folders of rank {rank}; keep the one with its weights"
                )
            folders[rank] = child
    return dict(sorted(folders.items()))


def _choose(
    folders: Mapping[int, Path], resume_file: Optional[str], step: Optional[str], suffix: Optional[str]
) -> dict[int, Path]:
    """The file of every rank: the same step of all of them."""
    candidates: Mapping[int, Sequence[Path]] = {rank: _checkpoint_files(folder) for rank, folder in folders.items()}
    for rank, files in candidates.items():
        if not files:
            raise CheckpointNotFoundError(
                f"rank folder {folders[rank]} holds no checkpoint file; copy the weights of rank {rank} there, or remove "
                f"the folder if another rank holds the same slices"
            )
        check_no_iteration_file(files)
        shards = [file for file in files if is_lone_shard(file)]
        if shards:
            raise UnsupportedCheckpointError(
                f"rank folder {folders[rank]} holds shards of a complete checkpoint ({shards[0].name}, ...), not the slices "
                f"of rank {rank}; give that folder itself without a strategy («src»), or one file for every rank"
            )
    if step is not None:
        candidates = choose_step(candidates, step)
    if suffix is not None:
        candidates = choose_suffix(candidates, suffix)
    check_names(candidates)
    formats = {file.suffix: file for files in candidates.values() for file in files}
    if len(formats) > 1:
        raise UnsupportedCheckpointError(
            f"the rank folders hold files of both formats ({', '.join(map(str, formats.values()))}); keep one format"
        )
    return choose_latest(candidates) if resume_file is None else choose_resumed(candidates, resume_file)


def _checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoint files of a folder by name."""
    files = []
    for file in sorted(folder.iterdir()):
        if file.suffix in _SUFFIXES and not file.name.startswith("."):
            if file.is_file():
                files.append(file)
            elif not file.exists():
                raise CheckpointNotFoundError(f"{file} is a link to nothing; copy the weights there, or remove it")
    formats = {f.suffix for f in files}
    if len(formats) > 1:
        raise UnsupportedCheckpointError(
            f"{folder} holds both .ckpt and .safetensors files ({files[0].name}, ...); keep one format there"
        )
    return files

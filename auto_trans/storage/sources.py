"""Find the checkpoints at a path, and see their files as the source of a conversion."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import SourceFile
from auto_trans.errors import CheckpointNotFoundError, ConfigError, UnsupportedCheckpointError
from auto_trans.log import logger
from auto_trans.storage.formats import FORMATS, Format, format_of, scan
from auto_trans.storage.formats.head import FileHead, StoredTensor
from auto_trans.storage.sharded import check_against_index, find_shards, is_lone_shard
from auto_trans.storage.steps import choose_latest, choose_resumed, choose_step
from auto_trans.storage.strategies import read_strategy

__all__ = ["Checkpoint", "PathLike", "ScannedFiles", "StrategyLike", "as_strategy", "find_checkpoints", "find_sources"]

PathLike = Union[str, "os.PathLike[str]"]
StrategyLike = Union[str, "os.PathLike[str]", Strategy, None]

_RANK_FOLDER = re.compile(r"^rank_(\d+)$")
_SUFFIXES = tuple(format.suffix for format in FORMATS.values())


@dataclass(frozen=True)
class Checkpoint:
    """The chosen files of one checkpoint.

    Attributes:
        name: Name of the checkpoint: that of its folder, or of the file without its ending.
        path: The folder, or the file.
        files: Rank -> its files; several only for the shards of a complete checkpoint, which is rank 0.
        distributed: Whether it lies in ``rank_N`` folders.
    """

    name: str
    path: Path
    files: Mapping[int, tuple[Path, ...]]
    distributed: bool

    @property
    def format(self) -> Format:
        """The format of the files."""
        return format_of(self.all_files[0])

    @property
    def all_files(self) -> list[Path]:
        """All files, by rank."""
        return [file for files in self.files.values() for file in files]

    @property
    def is_sharded(self) -> bool:
        """Whether it is a complete checkpoint in shards with an index."""
        return not self.distributed and self.path == self.all_files[0].parent

    def as_json(self) -> dict[str, Any]:
        """The checkpoint as data that other ranks can read, see `from_json`."""
        files = {str(rank): [str(file) for file in files] for rank, files in self.files.items()}
        return {"name": self.name, "path": str(self.path), "files": files, "distributed": self.distributed}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint that another rank has chosen."""
        files = {int(rank): tuple(map(Path, files)) for rank, files in content["files"].items()}
        return cls(content["name"], Path(content["path"]), files, content["distributed"])


class ScannedFiles:
    """The heads of the files of a checkpoint, read as they are needed; see `auto_trans.core.source.Heads`.

    Args:
        checkpoint: The files.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.ranks: Sequence[int] = tuple(checkpoint.files)
        self._heads: dict[int, list[FileHead]] = {}
        self._tensors: dict[int, Mapping[str, StoredTensor]] = {}
        self._files: dict[Path, SourceFile] = {}
        self._places: dict[str, FileHead] = {}

    def heads(self, rank: int) -> list[FileHead]:
        """The heads of a rank's files.

        Raises:
            CheckpointError: A file is damaged, or the shards do not make up one checkpoint.
        """
        if rank not in self._heads:
            heads = [scan(file) for file in self.checkpoint.files[rank]]
            if self.checkpoint.is_sharded:
                check_against_index(self.checkpoint.path, heads)
                self._places = {name: head for head in heads for name in head.tensors}
            self._heads[rank] = heads
        return self._heads[rank]

    def tensors(self, rank: int) -> Mapping[str, StoredTensor]:
        """What a rank holds, by name, in file order."""
        if rank not in self._tensors:
            heads = self.heads(rank)
            merged = {name: tensor for head in heads for name, tensor in head.tensors.items()}
            self._tensors[rank] = heads[0].tensors if len(heads) == 1 else merged
        return self._tensors[rank]

    def file(self, rank: int, name: str) -> SourceFile:
        """The file in which a rank holds a parameter."""
        heads = self.heads(rank)
        head = self._places[name] if len(heads) > 1 else heads[0]
        if head.path not in self._files:
            self._files[head.path] = SourceFile(str(head.path), head.size, head.mtime_ns, rank)
        return self._files[head.path]

    def describe(self, rank: int) -> str:
        """The files of a rank, for messages."""
        files = self.checkpoint.files[rank]
        return str(files[0]) if len(files) == 1 else f"the {len(files)} shards in {files[0].parent}"


def find_sources(
    src: PathLike, strategy: Strategy, resume_file: Optional[str] = None, step: Optional[str] = None
) -> list[Checkpoint]:
    """Finds the source checkpoints and checks that strategy and files go together.

    Raises:
        ConfigError: A strategy is given for a complete checkpoint, or none for a distributed one.
    """
    found = find_checkpoints(Path(src), resume_file, step)
    for checkpoint in found:
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
    return found


def find_checkpoints(path: PathLike, resume_file: Optional[str] = None, step: Optional[str] = None) -> list[Checkpoint]:
    """Finds the checkpoints at a path.

    Args:
        path: A ``.ckpt`` or ``.safetensors`` file, a folder of ``rank_N`` folders, a folder of shards with their index, or
            a folder of complete files.
        resume_file: Name of the file to take from the rank folders, e.g. where ``resume_training`` picked a step; its
            ``_rank_N`` part is that of any rank. By default the latest step that all ranks have.
        step: The step to take from the rank folders, as ``{epoch}_{step}``.

    Returns:
        The checkpoints; several only for a folder of complete files.

    Raises:
        CheckpointNotFoundError: There is nothing to convert.
        UnsupportedCheckpointError: The files are of neither format, or of both.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return [_find_file(path)]
    if not path.is_dir():
        raise CheckpointNotFoundError(f"checkpoint {path} is not found; set it to a file or folder that exists («src»)")
    folders = {int(m.group(1)): f for f in path.iterdir() if (m := _RANK_FOLDER.match(f.name)) and f.is_dir()}
    files = _checkpoint_files(path)
    if folders:
        if files:
            logger.warning("%s holds rank folders and complete files; the rank folders are used", path)
        by_rank = _choose({rank: folders[rank] for rank in sorted(folders)}, resume_file, step)
        name = path.resolve().name
        return [Checkpoint(name, path, {rank: (file,) for rank, file in by_rank.items()}, distributed=True)]
    if not files:
        raise CheckpointNotFoundError(
            f"checkpoint folder {path} holds neither rank_N folders nor checkpoint files; set it to the folder above rank_0 "
            f"(«src»)"
        )
    shards = find_shards(path, files)
    if shards is not None:
        return [Checkpoint(path.resolve().name, path, {0: tuple(shards)}, distributed=False)]
    return [Checkpoint(file.stem, file, {0: (file,)}, distributed=False) for file in files]


def as_strategy(strategy: StrategyLike) -> Strategy:
    """Reads a strategy unless it is one; nothing means complete weights, as does MindFormers' ``"None"``."""
    if isinstance(strategy, Strategy):
        return strategy
    return read_strategy(strategy) if strategy and strategy != "None" else Strategy.complete()


def _find_file(path: Path) -> Checkpoint:
    if path.suffix not in _SUFFIXES:
        raise UnsupportedCheckpointError(
            f"checkpoint {path} does not end with {' or '.join(_SUFFIXES)}; give such a file, or a folder («src»)"
        )
    if is_lone_shard(path):
        raise UnsupportedCheckpointError(
            f"{path} is one of several shards of a checkpoint; give the folder with all of them and their index («src»)"
        )
    return Checkpoint(path.stem, path, {0: (path,)}, distributed=False)


def _choose(folders: Mapping[int, Path], resume_file: Optional[str], step: Optional[str]) -> dict[int, Path]:
    """The file of every rank: the same step of all of them."""
    candidates: Mapping[int, Sequence[Path]] = {rank: _checkpoint_files(folder) for rank, folder in folders.items()}
    for rank, files in candidates.items():
        if not files:
            raise CheckpointNotFoundError(
                f"rank folder {folders[rank]} holds no checkpoint file; copy the weights of rank {rank} there, or remove "
                f"the folder if another rank holds the same slices"
            )
    if step is not None:
        candidates = choose_step(candidates, step)
    formats = {file.suffix: file for files in candidates.values() for file in files}
    if len(formats) > 1:
        raise UnsupportedCheckpointError(
            f"the rank folders hold files of both formats ({', '.join(map(str, formats.values()))}); keep one format"
        )
    return choose_latest(candidates) if resume_file is None else choose_resumed(candidates, resume_file)


def _checkpoint_files(folder: Path) -> list[Path]:
    """The checkpoint files of a folder by name."""
    files = sorted(f for f in folder.iterdir() if f.suffix in _SUFFIXES and not f.name.startswith(".") and f.is_file())
    formats = {f.suffix for f in files}
    if len(formats) > 1:
        raise UnsupportedCheckpointError(
            f"{folder} holds both .ckpt and .safetensors files ({files[0].name}, ...); keep one format there"
        )
    return files

"""Find the checkpoints at a path, and see their files as the source of a conversion."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import SourceFile
from auto_trans.errors import (
    AutoTransError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    UnsupportedCheckpointError,
)
from auto_trans.log import logger
from auto_trans.storage.formats import FORMATS, Format, format_of, scan
from auto_trans.storage.formats.head import FileHead, StoredTensor
from auto_trans.storage.names import RANK_FOLDER
from auto_trans.storage.sharded import check_against_index, find_shards, is_index, is_lone_shard, is_one_of_several
from auto_trans.storage.siblings import check_not_a_slice
from auto_trans.storage.steps import check_names, choose_latest, choose_resumed, choose_step, choose_suffix
from auto_trans.storage.strategies import read_strategy

__all__ = ["Checkpoint", "PathLike", "ScannedFiles", "StrategyLike", "as_strategy", "find_checkpoints", "find_sources"]

PathLike = Union[str, "os.PathLike[str]"]
StrategyLike = Union[str, "os.PathLike[str]", Strategy, None]

_SUFFIXES = tuple(format.suffix for format in FORMATS.values())
# weights of other libraries, which often lie beside safetensors files
_FOREIGN = (".bin", ".pt", ".pth")


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
                with _read_errors(self.checkpoint.path):
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
    src: PathLike,
    strategy: Strategy,
    resume_file: Optional[str] = None,
    step: Optional[str] = None,
    suffix: Optional[str] = None,
) -> list[Checkpoint]:
    """Finds the source checkpoints and checks that strategy and files go together.

    Raises:
        ConfigError: A strategy is given for a complete checkpoint, or none for a distributed one or a slice of it.
    """
    found = find_checkpoints(Path(src), resume_file, step, suffix)
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
        if step is not None and not checkpoint.distributed:
            raise ConfigError(f"source {checkpoint.path} is complete and has no steps; leave «step» out")
        if not checkpoint.distributed:
            with _read_errors(checkpoint.path):
                check_not_a_slice(checkpoint.all_files[0])
    return found


def find_checkpoints(
    path: PathLike, resume_file: Optional[str] = None, step: Optional[str] = None, suffix: Optional[str] = None
) -> list[Checkpoint]:
    """Finds the checkpoints at a path.

    Args:
        path: A ``.ckpt`` or ``.safetensors`` file, a folder of ``rank_N`` folders, a folder of shards with their index, or
            a folder of complete files.
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
    with _read_errors(path):
        path = Path(path).expanduser()
        if path.is_file():
            return [_find_file(path)]
        if not path.is_dir():
            raise CheckpointNotFoundError(
                f"checkpoint {path} is not found; set it to a file or folder that exists («src»)"
            )
        folders, files = _rank_folders(path), _checkpoint_files(path)
        if folders:
            if files:
                logger.warning("%s holds rank folders and complete files; the rank folders are used", path)
            by_rank = {rank: (file,) for rank, file in _choose(folders, resume_file, step, suffix).items()}
            return [Checkpoint(path.resolve().name, path, by_rank, distributed=True)]
        return _find_complete(path, files)


def as_strategy(strategy: StrategyLike) -> Strategy:
    """Reads a strategy unless it is one; nothing means complete weights, as does MindFormers' ``"None"``."""
    if isinstance(strategy, Strategy):
        return strategy
    return read_strategy(strategy) if strategy and strategy != "None" else Strategy.complete()


def _find_file(path: Path) -> Checkpoint:
    if is_index(path):
        raise UnsupportedCheckpointError(
            f"{path} is the index of a checkpoint in shards; give the folder {path.parent} («src»)"
        )
    if path.suffix not in _SUFFIXES:
        raise UnsupportedCheckpointError(
            f"checkpoint {path} does not end with {' or '.join(_SUFFIXES)}; give such a file, or a folder («src»)"
        )
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


@contextlib.contextmanager
def _read_errors(path: PathLike) -> Iterator[None]:
    """Whatever the system says of a path becomes an error of the checkpoint."""
    try:
        yield
    except AutoTransError:
        raise
    except (OSError, RuntimeError) as e:  # RuntimeError: a home folder that nobody has, a link to itself
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {e}; set it to a folder that may be read («src»)"
        ) from e

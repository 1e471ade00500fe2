"""The heads of the files of a checkpoint, as a source sees them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Optional

from auto_trans.core.tensor import SourceFile
from auto_trans.errors import AutoTransError, CheckpointError, CorruptCheckpointError, SourceChangedError
from auto_trans.storage.checkpoint import Checkpoint
from auto_trans.storage.checkpoint2.common import common_head, read_common
from auto_trans.storage.formats import scan
from auto_trans.storage.formats.head import FileHead, StoredTensor
from auto_trans.storage.names import COMMON_NAME
from auto_trans.storage.sharded import check_against_index

__all__ = ["FileState", "ScannedFiles", "read_errors"]

# metadata.json tells of all parameters of the graph; MindFormers leaves these out of the files
_NEVER_SAVED = "accu_grads"


class FileState(NamedTuple):
    """How a file was when it was looked at.

    Attributes:
        size: Its bytes.
        mtime_ns: Its modification time.
    """

    size: int
    mtime_ns: int


class ScannedFiles:
    """The heads of the files of a checkpoint, read as they are needed; see `auto_trans.core.source.Heads`.

    Of the files of a Checkpoint 2.0 a rank has what metadata.json says, which may lie in a file of another rank, and of what
    that does not tell about all that its own files hold; with it the numbers of common.json that no file holds.

    Args:
        checkpoint: The files.
        states: How the files were when they were chosen, by path; by default as they are now.

    Raises:
        SourceChangedError: What tells of the files was written to since then.
    """

    def __init__(self, checkpoint: Checkpoint, states: Optional[Mapping[Path, FileState]] = None) -> None:
        self.checkpoint, self._states = checkpoint, states or {}
        self.ranks: Sequence[int] = tuple(checkpoint.files)
        self._heads: dict[int, list[FileHead]] = {}
        self._tensors: dict[int, Mapping[str, StoredTensor]] = {}
        self._files: dict[tuple[int, Path], SourceFile] = {}
        self._places: dict[int, Mapping[str, FileHead]] = {}
        self._scanned: dict[Path, FileHead] = {}
        for file in checkpoint.companions if self._states else ():
            self._check_state(file, self._look_at(file))

    def heads(self, rank: int) -> list[FileHead]:
        """The heads of a rank's files.

        Raises:
            CheckpointError: A file is damaged, or the shards do not make up one checkpoint.
        """
        if rank not in self._heads:
            heads = [self._scan(file) for file in self.checkpoint.files[rank]]
            if self.checkpoint.is_sharded:
                with read_errors(self.checkpoint.path):
                    check_against_index(self.checkpoint.path, heads)
            if self.checkpoint.iteration:
                heads = self._of_iteration(rank, heads)
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
        if len(heads) > 1 and rank not in self._places:
            self._places[rank] = {name: head for head in heads for name in head.tensors}
        head = self._places[rank][name] if len(heads) > 1 else heads[0]
        key = rank, head.path
        if key not in self._files:
            self._files[key] = SourceFile(str(head.path), head.size, head.mtime_ns, rank, head.contents)
        return self._files[key]

    def states(self) -> dict[Path, FileState]:
        """How the files are; reads the heads of all."""
        for rank in self.ranks:
            self.heads(rank)
        heads = {path: FileState(head.size, head.mtime_ns) for path, head in self._scanned.items()}
        return {**heads, **{path: self._look_at(path) for path in self.checkpoint.companions}}

    def describe(self, rank: int) -> str:
        """The files of a rank, for messages."""
        files = self.checkpoint.files[rank]
        if len(files) == 1:
            return str(files[0])
        what = f"the files of rank {rank}" if self.checkpoint.iteration else f"the {len(files)} shards"
        return f"{what} in {files[0].parent}"

    @cached_property
    def _common(self) -> Optional[FileHead]:
        """The numbers of the common.json of a Checkpoint 2.0."""
        path = self.checkpoint.path / COMMON_NAME
        return common_head(path, read_common(path))

    def _scan(self, file: Path) -> FileHead:
        if file not in self._scanned:
            head = scan(file)
            self._check_state(file, FileState(head.size, head.mtime_ns))
            self._scanned[file] = head
        return self._scanned[file]

    def _check_state(self, file: Path, now: FileState) -> None:
        if self._states.get(file, now) != now:
            raise SourceChangedError(
                f"{file} was written to since it was chosen to be loaded; start again once the weights are saved"
            )

    @staticmethod
    def _look_at(file: Path) -> FileState:
        with read_errors(file):
            stat = file.stat()
        return FileState(stat.st_size, stat.st_mtime_ns)

    def _of_iteration(self, rank: int, heads: Sequence[FileHead]) -> list[FileHead]:
        """What the files of a Checkpoint 2.0 hold for a rank."""
        found: dict[str, Path] = {}
        own = []
        for head in heads:
            tensors = {name: tensor for name, tensor in head.tensors.items() if self._is_of(rank, name, head.path)}
            for name in tensors:
                if name in found:
                    raise CorruptCheckpointError(
                        f"parameter {name} is in {found[name].name} and in {head.path.name} of {head.path.parent}; copy the "
                        f"files of one iteration («src»)"
                    )
                found[name] = head.path
            own.append(replace(head, tensors=tensors))
        self._check_saved(rank, own)
        if self._common is not None:
            missing = {name: tensor for name, tensor in self._common.tensors.items() if name not in found}
            own.append(replace(self._common, tensors=missing))
        return [head for head in own if head.tensors]

    def _is_of(self, rank: int, name: str, file: Path) -> bool:
        saved = self.checkpoint.saved
        if saved is None:
            return True
        if name in saved.tensors:
            return saved.held.get(rank, {}).get(name) == file.name
        return saved.writers.get(file.name, rank) == rank

    def _check_saved(self, rank: int, heads: Sequence[FileHead]) -> None:
        """Compares what the files hold with what metadata.json says of them."""
        saved = self.checkpoint.saved
        if saved is None:
            return
        by_name = {head.path.name: head for head in heads}
        for name, file in saved.held.get(rank, {}).items():
            tensor, path = saved.tensors[name], self.checkpoint.path / file
            stored = by_name[file].tensors.get(name)
            if stored is None and _NEVER_SAVED in name:
                continue
            if stored is None:
                raise CorruptCheckpointError(
                    f"parameter {name} of rank {rank} is not in {path}, where {saved.strategy.origin} says that it is; copy "
                    f"the files of one iteration («src»)"
                )
            if (stored.shape, stored.dtype) != (tensor.slice_shape, tensor.dtype):
                raise CorruptCheckpointError(
                    f"parameter {name} of rank {rank} is {list(stored.shape)} {stored.dtype} in {path}, but "
                    f"{list(tensor.slice_shape)} {tensor.dtype} by {saved.strategy.origin}; copy the files of one iteration "
                    f"(«src»)"
                )


@contextlib.contextmanager
def read_errors(path: object) -> Iterator[None]:
    """Whatever the system says of a path becomes an error of the checkpoint."""
    try:
        yield
    except AutoTransError:
        raise
    except (OSError, RuntimeError) as e:  # RuntimeError: a home folder that nobody has, a link to itself
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {e}; set it to a folder that may be read («src»)"
        ) from e

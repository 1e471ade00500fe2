"""The chosen files of a checkpoint, before anything of them is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from auto_trans.core.saved import Saved
from auto_trans.core.strategy import Strategy
from auto_trans.storage.checkpoint2.metadata import read_metadata
from auto_trans.storage.formats import Format, format_of
from auto_trans.storage.names import COMMON_NAME, ITERATION_FOLDER, METADATA_NAME
from auto_trans.storage.steps import step_of

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """The chosen files of one checkpoint.

    Attributes:
        name: Name of the checkpoint: that of its folder, or of the file without its ending.
        path: The folder, or the file.
        files: Rank -> its files; several only for the shards of a complete checkpoint, which is rank 0, and for a Checkpoint
            2.0, whose ranks may share files.
        distributed: Whether it is sliced over ranks.
        iteration: Whether it is an iteration of a Checkpoint 2.0.
        saved: What the metadata.json of a Checkpoint 2.0 tells; None where there is none.
    """

    name: str
    path: Path
    files: Mapping[int, tuple[Path, ...]]
    distributed: bool
    iteration: bool = False
    saved: Optional[Saved] = field(default=None, compare=False, repr=False)

    @property
    def format(self) -> Format:
        """The format of the files."""
        return format_of(self.all_files[0])

    @property
    def all_files(self) -> list[Path]:
        """All files, by rank."""
        return list(dict.fromkeys(file for files in self.files.values() for file in files))

    @property
    def companions(self) -> list[Path]:
        """The files that tell of those of the ranks."""
        if not self.iteration:
            return []
        return [file for name in (METADATA_NAME, COMMON_NAME) if (file := self.path / name).is_file()]

    @property
    def is_sharded(self) -> bool:
        """Whether it is a complete checkpoint in shards with an index."""
        return not self.distributed and not self.iteration and self.path == self.all_files[0].parent

    @property
    def step(self) -> Optional[int]:
        """The iteration of a Checkpoint 2.0, by its folder; else the step that the names of the files tell."""
        if not self.iteration:
            return step_of(self.all_files[0])
        found = ITERATION_FOLDER.match(self.path.resolve().name)
        return int(found[1]) if found else None

    def strategy(self, given: Strategy) -> Strategy:
        """The strategy that it was saved under: what it tells of itself, else the one that was given for it."""
        return self.saved.strategy if self.saved is not None else given

    def as_json(self) -> dict[str, Any]:
        """The checkpoint as data that other ranks can read, see `from_json`."""
        files = {str(rank): [str(file) for file in files] for rank, files in self.files.items()}
        return {
            "name": self.name,
            "path": str(self.path),
            "files": files,
            "distributed": self.distributed,
            "iteration": self.iteration,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint that another rank has chosen."""
        path, distributed, iteration = Path(content["path"]), content["distributed"], content["iteration"]
        files = {int(rank): tuple(map(Path, files)) for rank, files in content["files"].items()}
        saved = read_metadata(path / METADATA_NAME) if distributed and iteration else None
        return cls(content["name"], path, files, distributed, iteration, saved)

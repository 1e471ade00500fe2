"""What an engine is asked to do, and what it must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Protocol

from auto_trans.core.plan import FilePlan
from auto_trans.core.strategy import Strategy
from auto_trans.storage.manifest import FileRecord
from auto_trans.storage.sources import Checkpoint
from auto_trans.storage.targets import Target

__all__ = ["ConversionTask", "Engine", "Progress"]

# called with the bytes of tensors that were written since the last call
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ConversionTask:
    """What an engine is asked to do; picklable, so that worker processes can do parts of it.

    Attributes:
        files: The files to be written, none of which is there; each with all of its ranks that lack it.
        target: Where they go.
        checkpoint: The source.
        from_strategy: Strategy of the source.
        to_strategy: Strategy of the target.
        prefix: Beginning of the target files' names.
        memory_limit: Bytes of memory.
        by_rank: Has the mindspore engine convert rank by rank.
    """

    files: tuple[FilePlan, ...]
    target: Target
    checkpoint: Checkpoint
    from_strategy: Strategy
    to_strategy: Strategy
    prefix: str
    memory_limit: int
    by_rank: bool = False


class Engine(Protocol):
    """Writes the files of a task."""

    name: str
    tells_progress: bool

    def write(self, task: ConversionTask, progress: Progress) -> list[FileRecord]:
        """Writes and publishes the files of a task, with their replicas.

        Returns:
            The records of all files, replicas included.

        Raises:
            OutputError: A file cannot be written. What was published before stays.
            SourceChangedError: A source file was written to since its head was read.
        """

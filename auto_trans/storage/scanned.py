"""The source of a conversion: its files, and the strategy that they were saved under."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Optional, Union

from auto_trans.core.strategy import Strategy
from auto_trans.errors import ConfigError
from auto_trans.storage.formats import scan
from auto_trans.storage.formats.index import CheckpointIndex, StoredTensor
from auto_trans.storage.sources import SourceCheckpoint, find_checkpoints
from auto_trans.storage.strategies import read_strategy

__all__ = ["PathLike", "ScannedSource", "StrategyLike", "as_strategy", "find_source"]

PathLike = Union[str, "os.PathLike[str]"]
StrategyLike = Union[str, "os.PathLike[str]", Strategy, None]


@dataclass
class ScannedSource:
    """The files of a source, scanned as they are needed.

    Attributes:
        checkpoint: The files.
        exclude: Parameters that are treated as if they were not there.
    """

    checkpoint: SourceCheckpoint
    exclude: Callable[[str], bool] = lambda name: False
    _scanned: dict[int, CheckpointIndex] = field(default_factory=dict, repr=False)
    _shown: dict[int, dict[str, StoredTensor]] = field(default_factory=dict, repr=False)

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks whose files are there, in ascending order."""
        return tuple(self.checkpoint.files)

    def file(self, rank: int) -> CheckpointIndex:
        """What the file of a rank holds."""
        if rank not in self._scanned:
            self._scanned[rank] = scan(self.checkpoint.files[rank])
        return self._scanned[rank]

    def tensors(self, rank: int) -> Mapping[str, StoredTensor]:
        """The tensors of a rank's file by name, in file order."""
        if rank not in self._shown:
            self._shown[rank] = {name: t for name, t in self.file(rank).tensors.items() if not self.exclude(name)}
        return self._shown[rank]

    def describe(self, rank: int) -> str:
        """The rank's file."""
        return str(self.checkpoint.files[rank])


def find_source(
    src: PathLike, src_strategy: StrategyLike, resume_file: Optional[str] = None, step: Optional[str] = None
) -> list[SourceCheckpoint]:
    """Finds the source checkpoints and checks that strategy and files go together.

    Raises:
        ConfigError: A strategy is given for a single file, or none for a distributed checkpoint.
    """
    found = find_checkpoints(Path(src), resume_file, step)
    strategy = as_strategy(src_strategy)
    for checkpoint in found:
        if strategy.is_complete and len(checkpoint.files) > 1:
            raise ConfigError(
                f"source {checkpoint.path} is distributed over {len(checkpoint.files)} rank folders, but no source strategy "
                f"is given; set src_strategy_path_or_dir to the strategy that it was saved under"
            )
        if strategy.world_size > 1 and not checkpoint.distributed:
            raise ConfigError(
                f"source {checkpoint.path} is a single file, but its strategy {strategy.origin} describes "
                f"{strategy.world_size} ranks; give the folder above rank_0, or no source strategy if the file is complete"
            )
    return found


def as_strategy(strategy: StrategyLike) -> Strategy:
    """Reads a strategy unless it is one; nothing means complete weights, as does MindFormers' ``"None"``."""
    if isinstance(strategy, Strategy):
        return strategy
    return read_strategy(strategy) if strategy and strategy != "None" else Strategy.complete()

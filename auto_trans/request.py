"""Everything that a conversion depends on, as one frozen value."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Optional

import xxhash

from auto_trans.config import DEFAULT_MEMORY, parse_engine
from auto_trans.core.consistency import Network
from auto_trans.core.edits import Edit
from auto_trans.core.rules import NOTHING, Allowed
from auto_trans.core.strategy import Strategy
from auto_trans.errors import CheckpointNotFoundError, ConfigError, ConfigTypeError
from auto_trans.storage.checkpoint import Checkpoint
from auto_trans.storage.formats import FORMATS

__all__ = ["CHECKPOINT2", "DEFAULT_PREFIX", "TARGET_FORMATS", "Request", "as_path", "as_ranks"]

CHECKPOINT2 = "checkpoint2"
TARGET_FORMATS = (*FORMATS, CHECKPOINT2)
DEFAULT_PREFIX = "checkpoint_"


@dataclass(frozen=True)
class Request:
    """What is to be converted, how, and where to. Picklable.

    Attributes:
        src: The source: a complete file, a folder of ``rank_N`` folders, a folder of shards or of complete files.
        dst: The target folder.
        from_strategy: Strategy of the source.
        to_strategy: Strategy of the target.
        ranks: The target ranks to convert; None for all.
        edits: Changes on the way, in order.
        allowed: What is allowed although it looks wrong.
        prefix: Beginning of the target files' names; those of a Checkpoint 2.0 have none by default.
        format: ``ckpt`` or ``safetensors`` for rank folders of such files, ``checkpoint2`` for a Checkpoint 2.0 of
            MindFormers; None for that of the source.
        shard_size: Write a complete set of safetensors files with indices, of at most so many bytes each; None for rank
            folders.
        step: The step to take from the rank folders, as ``{epoch}_{step}``.
        file_suffix: The end of the names of the files to take from the rank folders.
        resume_file: Name of the file to take from the rank folders, where ``resume_training`` picked it.
        engine: ``native`` or ``mindspore``.
        by_rank: Has the mindspore engine convert rank by rank.
        processes: Worker processes on this machine.
        memory_limit: Bytes of memory of a process.
        reuse: Keep files that are there already and were made for the same request.
        durable: Whether files must be on the disk before they get their names; not if a power loss has them made anew.
        check_replicas: Compare the bytes of all copies of every slice first.
        network: The network that will load the target, where there is one.
    """

    src: Path
    dst: Path
    from_strategy: Strategy
    to_strategy: Strategy
    ranks: Optional[tuple[int, ...]] = None
    edits: tuple[Edit, ...] = ()
    allowed: Allowed = NOTHING
    prefix: str = DEFAULT_PREFIX
    format: Optional[str] = None
    shard_size: Optional[int] = None
    step: Optional[str] = None
    file_suffix: Optional[str] = None
    resume_file: Optional[str] = None
    engine: str = "native"
    by_rank: bool = False
    processes: int = 1
    memory_limit: int = DEFAULT_MEMORY
    reuse: bool = True
    durable: bool = True
    check_replicas: bool = False
    network: Optional[Network] = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.ranks is not None and not all(type(rank) is int for rank in self.ranks):
            raise ConfigTypeError(f"«ranks» must be whole numbers, not {list(self.ranks)!r}")
        if type(self.processes) is not int:
            raise ConfigTypeError(f"«processes» must be a whole number, not {self.processes!r}")
        try:
            object.__setattr__(self, "dst", self.dst.expanduser())
        except RuntimeError as e:
            raise ConfigError(f"{self.dst} is nowhere: {e}; set another output directory («dst»)") from e
        if not isinstance(self.prefix, str) or not re.fullmatch(r"[^./\0][^/\0]*", self.prefix):
            raise ConfigError(f"«prefix» must be the beginning of a file name that is not hidden, not {self.prefix!r}")
        if self.format not in (None, *TARGET_FORMATS):
            raise ConfigError(f"format must be one of {', '.join(TARGET_FORMATS)}, not {self.format!r}")
        if self.format == CHECKPOINT2:
            self._check_checkpoint2()
        parse_engine(self.engine)
        if self.processes < 1:
            raise ConfigError(f"«processes» must be at least 1, not {self.processes}")

    def _check_checkpoint2(self) -> None:
        if self.ranks is not None:
            raise ConfigError("a Checkpoint 2.0 is one for all ranks («format»); leave «ranks» out")
        if self.engine != "native":
            raise ConfigError(f"the {self.engine} engine cannot write a Checkpoint 2.0 («format»); use «engine» native")

    def digest(self, checkpoint: Checkpoint) -> str:
        """Digest of all that decides what the target files hold, the state of the source files included.

        Args:
            checkpoint: The chosen source.
        """
        sources = []
        # what tells of the files decides as much as the files
        for rank, files in (*checkpoint.files.items(), (-1, checkpoint.companions)):
            for file in files:
                try:
                    stat = file.stat()
                except OSError as e:
                    raise CheckpointNotFoundError(
                        f"checkpoint {file} is gone since it was found: {e}; start again"
                    ) from e
                sources.append((rank, str(file.resolve()), stat.st_size, stat.st_mtime_ns))
        content: list[tuple[str, Any]] = [("sources", sources)]
        for item in fields(self):
            if item.name not in _WITHOUT_EFFECT:
                value: Any = getattr(self, item.name)
                content.append((item.name, value.digest if isinstance(value, Strategy) else value))
        content.append(("format", self.format or checkpoint.format.name))
        return xxhash.xxh3_128_hexdigest(repr(content).encode())


def as_path(name: str, value: Any) -> Path:
    """A path that a caller gives.

    Raises:
        ConfigTypeError: It is none, or empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ConfigTypeError(f"{name} must be a path, not {value!r}")
    return Path(value)


def as_ranks(value: Optional[Iterable[int]]) -> Optional[tuple[int, ...]]:
    """Ranks that a caller gives.

    Raises:
        ConfigTypeError: They are not several numbers.
    """
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigTypeError(f"«ranks» must be a list of whole numbers, not {value!r}")
    return tuple(value)


# What changes nothing in the target files. The source and its step are known by the chosen files, and the ranks by the
# files' names.
_WITHOUT_EFFECT = frozenset(
    {
        "src", "dst", "ranks", "format", "step", "file_suffix", "resume_file", "by_rank", "processes", "memory_limit",
        "reuse", "durable", "check_replicas", "network",
    }
)  # fmt: skip

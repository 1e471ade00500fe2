"""The exceptions of auto_trans, each also the builtin that callers expect.

::

    AutoTransError
    ├── ConfigError                  (ValueError)         a setting has a value it cannot have
    │   └── ConfigTypeError          (TypeError)          ... or a type it cannot have
    ├── LayoutError                  (ValueError)         a layout contradicts itself or a tensor's shape
    ├── StrategyError                (ValueError)         a strategy file cannot be read or does not fit
    │   └── StrategyNotFoundError    (FileNotFoundError, RuntimeError)
    ├── CheckpointError              (ValueError)         a checkpoint cannot be used
    │   ├── CheckpointNotFoundError  (FileNotFoundError)
    │   ├── CorruptCheckpointError
    │   ├── EncryptedCheckpointError
    │   └── UnsupportedCheckpointError
    ├── PlanError                    (ValueError)         source and strategies do not make up the target
    │   └── MissingSliceError        (FileNotFoundError)
    ├── SourceChangedError           (RuntimeError)       the source was written to while it was converted
    ├── ProtectedSourceError         (ValueError)         cleaning would have deleted the user's source
    ├── OutputError                  (OSError)            the output cannot be written
    │   ├── OutputExistsError        (FileExistsError)    ... for files are there that are not ours to replace
    │   ├── InsufficientDiskError
    │   └── InsufficientMemoryError  (MemoryError)
    └── CoordinationError            (RuntimeError)       many ranks, one directory
        ├── JoinTimeoutError         (TimeoutError)
        ├── RankFailedError                               another rank failed; carries its traceback
        ├── RankLostError            (TimeoutError)       another rank died or hangs
        └── OutputBusyError                               another job works in the same output directory

Every message names what is concerned (rank, file, parameter) and what to do about it. A setting stands in it between « and »
by its name in the library; the door that the user came through shows its own name for it: `told_by`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = [
    "AutoTransError",
    "ConfigError",
    "ConfigTypeError",
    "LayoutError",
    "StrategyError",
    "StrategyNotFoundError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "EncryptedCheckpointError",
    "UnsupportedCheckpointError",
    "PlanError",
    "MissingSliceError",
    "SourceChangedError",
    "ProtectedSourceError",
    "OutputError",
    "OutputExistsError",
    "InsufficientDiskError",
    "InsufficientMemoryError",
    "CoordinationError",
    "JoinTimeoutError",
    "RankFailedError",
    "RankLostError",
    "OutputBusyError",
]


_SETTING = re.compile("«([^»]*)»")


class AutoTransError(Exception):
    """Base of everything auto_trans raises on purpose."""

    _words: Mapping[str, str] = {}

    def __str__(self) -> str:
        return _SETTING.sub(lambda match: self._words.get(match[1], match[1]), super().__str__())

    def told_by(self, words: Mapping[str, str]) -> None:
        """Has the message name settings as the user knows them, e.g. as flags or YAML keys.

        Of several doors the inner one, which was told first, knows better.

        Args:
            words: The library's name of a setting -> the user's.
        """
        self._words = {**words, **self._words}


class ConfigError(AutoTransError, ValueError):
    """A setting has a value that it cannot have."""


class ConfigTypeError(ConfigError, TypeError):
    """A setting has a type that it cannot have."""


class LayoutError(AutoTransError, ValueError):
    """A layout contradicts itself or the shape of the tensor it is applied to."""


class StrategyError(AutoTransError, ValueError):
    """A strategy file cannot be read, or does not belong to the weights."""


class StrategyNotFoundError(StrategyError, FileNotFoundError, RuntimeError):
    """A strategy file or folder is not there."""


class CheckpointError(AutoTransError, ValueError):
    """A checkpoint cannot be used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A checkpoint file or rank folder is not there."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint file is truncated or is not a MindSpore checkpoint."""


class EncryptedCheckpointError(CheckpointError):
    """A checkpoint file is encrypted."""


class UnsupportedCheckpointError(CheckpointError):
    """A checkpoint holds something that cannot be converted."""


class PlanError(AutoTransError, ValueError):
    """Source weights and strategies do not make up the target weights."""


class MissingSliceError(PlanError, FileNotFoundError):
    """No source rank that is there holds a slice which the target needs."""


class SourceChangedError(AutoTransError, RuntimeError):
    """A source file was written to while it was being read."""


class ProtectedSourceError(AutoTransError, ValueError):
    """Cleaning the output directory would have deleted the user's own source."""


class OutputError(AutoTransError, OSError):
    """The output cannot be written."""


class OutputExistsError(OutputError, FileExistsError):
    """The target folder holds files that are not of this conversion."""


class InsufficientDiskError(OutputError):
    """The output does not fit on the disk."""


class InsufficientMemoryError(OutputError, MemoryError):
    """The memory budget of the conversion is not available."""


class CoordinationError(AutoTransError, RuntimeError):
    """The ranks of a job could not work together."""


class JoinTimeoutError(CoordinationError, TimeoutError):
    """Some ranks did not arrive before the deadline."""


class RankFailedError(CoordinationError):
    """Another rank failed.

    Attributes:
        rank: The rank that failed.
        original: Its traceback as text.
    """

    def __init__(self, message: str, *, rank: int = -1, original: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.original = original


class RankLostError(CoordinationError, TimeoutError):
    """Another rank died or hangs.

    Attributes:
        rank: The rank that was lost.
    """

    def __init__(self, message: str, *, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class OutputBusyError(CoordinationError):
    """Another job works in the same output directory."""

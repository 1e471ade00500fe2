"""The board of a session: the place where its ranks leave messages for each other, small files on a shared directory."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from auto_trans.errors import OutputError

__all__ = ["Board", "Failure", "read_json", "write_json"]


@dataclass(frozen=True)
class Failure:
    """How a rank failed.

    Attributes:
        rank: The rank.
        type: Name of the exception's class.
        message: Its message.
        traceback: Its traceback, as Python prints it.
    """

    rank: int
    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """The failure of a rank by an exception."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return cls(rank, type(error).__name__, str(error), text)


class Board:
    """Where the ranks of one session leave messages for each other.

    Args:
        directory: The directory of the session, which no earlier run can have written to.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def post(self, name: str, content: Mapping[str, Any]) -> None:
        """Leaves a message under a name, for all to read.

        Raises:
            OutputError: It cannot be written.
        """
        write_json(self._directory / "posts" / f"{name}.json", content)

    def read(self, name: str) -> Optional[dict[str, Any]]:
        """The message of a name, or None if there is none yet."""
        return read_json(self._directory / "posts" / f"{name}.json")

    def post_failure(self, failure: Failure) -> None:
        """Tells that a rank failed. One file for all ranks, so that looking for it costs the same for any number of them.

        The first failure stays, as others follow from it.

        Raises:
            OutputError: It cannot be written.
        """
        if self.failure() is None:
            write_json(self._directory / "failed.json", asdict(failure))

    def failure(self) -> Optional[Failure]:
        """The failure that was posted, if any was."""
        content = read_json(self._directory / "failed.json")
        return None if content is None else Failure(**content)

    def tell(self, rank: int) -> None:
        """Leaves word that a rank knows of the failure.

        Raises:
            OutputError: It cannot be written.
        """
        write_json(self._directory / "told" / f"rank_{rank}.json", {})

    def told(self) -> int:
        """How many ranks know of the failure; lists a directory."""
        try:
            return sum(not name.startswith(".") for name in os.listdir(self._directory / "told"))
        except OSError:
            return 0

    def pulse_file(self, rank: int) -> Path:
        """Where a rank gives signs of life."""
        return self._directory / "pulses" / f"rank_{rank}.json"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file so that a reader sees all of it or none. Not synced: it need not outlive the machine.

    Raises:
        OutputError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputError(
            f"{path} cannot be written: {e}; set an output_dir that all ranks may write to, with some space left"
        ) from e


def read_json(path: Path) -> Optional[dict[str, Any]]:
    """The content of a file, or None while it is not there (or, on some network file systems, not yet whole)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None

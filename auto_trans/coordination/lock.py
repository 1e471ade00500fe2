"""The lock that keeps an output directory to one job."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

import filelock

from auto_trans.config import DEFAULT_TIMING
from auto_trans.coordination.barrier import wait_until
from auto_trans.coordination.board import read_json, write_json
from auto_trans.coordination.clock import SYSTEM_CLOCK, Clock
from auto_trans.errors import OutputBusyError, OutputError
from auto_trans.process import Process

__all__ = ["OutputLock"]


class OutputLock:
    """Keeps an output directory to one job; held by its rank 0, let go by the system if that dies.

    Args:
        path: The lock file, in a directory of ours in the output directory.
        timeout: Seconds to wait for another job to leave.
        clock: The time.
    """

    def __init__(self, path: Path, timeout: float, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._path, self._timeout, self._clock = path, timeout, clock
        self._owner = path.with_suffix(".owner.json")
        self._lock = filelock.FileLock(str(path), thread_local=False)

    def acquire(self) -> None:
        """Takes the lock; does nothing if it is held already.

        Raises:
            OutputBusyError: Another job keeps it.
            OutputError: The file cannot be made.
        """
        if self._lock.is_locked:
            return
        wait_until(
            self._try, DEFAULT_TIMING, waiting_for=lambda: f"another job ({self._describe_owner()}) to leave the output",
            deadline=self._timeout, on_timeout=self._busy, clock=self._clock,
        )  # fmt: skip
        write_json(self._owner, Process.current().to_json())

    def release(self) -> None:
        """Lets the lock go; does nothing if it is not held."""
        if self._lock.is_locked:
            self._lock.release()

    def _try(self) -> Optional[bool]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            return None
        except OSError as e:
            raise OutputError(f"{self._path} cannot be locked: {e}; set an output_dir that is writable") from e
        return True

    def _busy(self, seconds: float) -> Exception:
        return OutputBusyError(
            f"{self._path.parent.parent} is in use by another job ({self._describe_owner()}) that is converting or loading; "
            f"it did not leave within {seconds:.0f} s: give each job its own output_dir, or wait"
        )

    def _describe_owner(self) -> str:
        try:
            return str(Process.parse(read_json(self._owner) or {}))
        except ValueError:
            return "host and pid unknown"

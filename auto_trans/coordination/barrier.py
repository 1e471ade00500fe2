"""Waiting for other ranks: with back-off, a log line that says for whom, and an eye on whether they are alive."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, Optional, TypeVar

import psutil

from auto_trans.config import Timing
from auto_trans.coordination.files import read_json, write_json
from auto_trans.errors import RankLostError
from auto_trans.log import logger

__all__ = ["Heartbeat", "PulseMonitor", "process_identity", "wait_until"]

T = TypeVar("T")


def process_identity() -> dict[str, Any]:
    """What tells a process from all others: host, pid and start time, as pids are used again."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def wait_until(
    look: Callable[[], Optional[T]],
    timing: Timing,
    *,
    waiting_for: Callable[[], str],
    deadline: Optional[float] = None,
    on_timeout: Optional[Callable[[float], Exception]] = None,
) -> T:
    """Looks again and again until there is something.

    Args:
        look: Returns what is waited for, or None; raises to end the waiting.
        timing: Back-off and log interval.
        waiting_for: What a log line says is waited for.
        deadline: Seconds after which waiting ends; none by default.
        on_timeout: Makes the error that is raised then, from the seconds waited.
    """
    begin = time.monotonic()
    logged, pause = begin, timing.poll_min
    while True:
        found = look()
        if found is not None:
            return found
        now = time.monotonic()
        if deadline is not None and on_timeout is not None and now - begin > deadline:
            raise on_timeout(now - begin)
        if now - logged >= timing.log_interval:
            logged = now
            logger.info("waiting %.0f s for %s", now - begin, waiting_for())
        time.sleep(pause)
        pause = min(pause * 1.3, timing.poll_max)


class Heartbeat:
    """Gives signs of life of a busy rank, with its progress, in a thread of its own.

    Args:
        path: The file that is written again and again.
        interval: Seconds between two signs.
    """

    def __init__(self, path: Path, interval: float) -> None:
        self._path, self._interval = path, interval
        self._stop = threading.Event()
        self._done, self._total, self._beat, self._idle = 0, 0, 0, False
        self._identity = process_identity()
        self._thread = threading.Thread(target=self._run, name="auto_trans-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._write()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """While the rank itself waits, or cannot tell how far it is: alive is all that is asked of it."""
        self._idle = True
        try:
            yield
        finally:
            self._idle = False

    def progress(self, done: int, total: int) -> None:
        """Tells how far the work is; the next sign of life carries it."""
        self._done, self._total = done, total

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._write()
            except OSError as e:  # a passing fault of the file system; the waiters decide when it has lasted too long
                logger.warning("heartbeat %s cannot be written: %s", self._path, e)

    def _write(self) -> None:
        self._beat += 1
        state = {"beat": self._beat, "done": self._done, "total": self._total, "idle": self._idle}
        write_json(self._path, {**self._identity, **state})


class PulseMonitor:
    """Judges from its heartbeat file whether a busy rank is alive and makes progress.

    Times are those of this process, as clocks of different machines differ: what counts is when a change was seen.
    """

    def __init__(self, rank: int, path: Path, timing: Timing) -> None:
        self._rank, self._path, self._timing = rank, path, timing
        self._seen: Optional[Mapping[str, Any]] = None
        self._changed = self._progressed = time.monotonic()

    def check(self) -> None:
        """Raises RankLostError if the rank is dead or hangs."""
        now, content = time.monotonic(), read_json(self._path)
        if content is not None and content != self._seen:
            before, self._seen = self._seen, content
            self._changed = now
            if before is None or content.get("idle") or before.get("done") != content.get("done"):
                self._progressed = now
        if now - self._changed > self._timing.heartbeat_timeout:
            raise self._lost(f"gave no sign of life for {now - self._changed:.0f} s")
        if now - self._progressed > self._timing.stall_timeout:
            raise self._lost(f"is alive but made no progress for {now - self._progressed:.0f} s")
        if self._seen is not None and _is_dead(self._seen):
            raise self._lost("died")

    def describe(self) -> str:
        """How far the rank is, for log lines."""
        if not self._seen or not self._seen.get("total"):
            return f"rank {self._rank}"
        return f"rank {self._rank} ({100 * self._seen['done'] / self._seen['total']:.0f}%)"

    def _lost(self, what: str) -> RankLostError:
        seen = self._seen or {}
        return RankLostError(
            f"rank {self._rank} (host {seen.get('host', 'unknown')}, pid {seen.get('pid', 'unknown')}) {what}; see its log, "
            f"and start the job again: what is already converted of a folder that still exists is used again",
            rank=self._rank,
        )


def _is_dead(identity: Mapping[str, Any]) -> bool:
    """Whether a process of this machine is gone; of other machines nothing can be said."""
    if identity.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(int(identity["pid"]))
        return process.create_time() != identity["started"] or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, KeyError, ValueError):
        return False

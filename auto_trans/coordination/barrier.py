"""Waiting for other ranks: with back-off, a log line that says for whom, and an eye on whether they are alive."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Callable, Optional, TypeVar

from auto_trans.config import Timing
from auto_trans.coordination.board import read_json, write_json
from auto_trans.coordination.clock import SYSTEM_CLOCK, Clock
from auto_trans.errors import RankLostError
from auto_trans.log import logger
from auto_trans.process import Process

__all__ = ["Heartbeat", "PulseMonitor", "spread", "wait_until"]

T = TypeVar("T")

_BACK_OFF = 1.3
_LOOKS_PER_SECOND = 500


def wait_until(
    look: Callable[[], Optional[T]],
    timing: Timing,
    *,
    waiting_for: Callable[[], str],
    deadline: Optional[float] = None,
    on_timeout: Optional[Callable[[float], Exception]] = None,
    clock: Clock = SYSTEM_CLOCK,
) -> T:
    """Looks again and again until there is something.

    Args:
        look: Returns what is waited for, or None; raises to end the waiting.
        timing: Back-off and log interval.
        waiting_for: What a log line says is waited for.
        deadline: Seconds after which waiting ends; none by default. What is there by then is taken.
        on_timeout: Makes the error that is raised then, from the seconds waited; goes with ``deadline``.
        clock: The time.
    """
    begin = clock.now()
    logged, pause = begin, timing.poll_min
    while True:
        found = look()
        if found is not None:
            return found
        now = clock.now()
        if deadline is not None and on_timeout is not None and now - begin >= deadline:
            raise on_timeout(now - begin)
        if now - logged >= timing.log_interval:
            logged = now
            logger.info("waiting %.0f s for %s", now - begin, waiting_for())
        clock.sleep(pause)
        pause = min(pause * _BACK_OFF, timing.poll_max)


def spread(timing: Timing, world_size: int) -> Timing:
    """Has each of many ranks look less often, as all of them together look at one shared disk."""
    return dataclasses.replace(timing, poll_max=max(timing.poll_max, world_size / _LOOKS_PER_SECOND))


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
        self._thread = threading.Thread(target=self._run, name="auto_trans-heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """While the rank itself waits, or cannot tell how far it is: alive is all that is asked of it."""
        before, self._idle = self._idle, True
        try:
            yield
        finally:
            self._idle = before

    def progress(self, done: int, total: int) -> None:
        """Tells how far the work is; the next sign of life carries it."""
        self._done, self._total = done, total

    def beat(self) -> None:
        """Gives one sign of life; the thread does so at every interval."""
        self._beat += 1
        state = {"beat": self._beat, "done": self._done, "total": self._total, "idle": self._idle}
        try:
            write_json(self._path, state)
        except OSError as e:  # a passing fault of the file system; the waiters decide when it has lasted too long
            logger.warning("no sign of life of this rank can be given: %s", e)

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self.beat()


class PulseMonitor:
    """Judges from its signs of life whether a busy rank is alive and makes progress.

    Times are those of this process, as clocks of different machines differ: what counts is when a change was seen.

    Args:
        rank: The rank.
        process: Its process.
        path: The file of its `Heartbeat`.
        timing: How long it may be still.
        clock: The time.
    """

    def __init__(self, rank: int, process: Process, path: Path, timing: Timing, clock: Clock = SYSTEM_CLOCK) -> None:
        self._rank, self._process, self._path, self._timing, self._clock = rank, process, path, timing, clock
        self._seen: Mapping[str, Any] = {}
        self._changed = self._progressed = clock.now()

    def check(self) -> None:
        """Looks for a sign of life.

        Raises:
            RankLostError: The rank is dead or hangs.
        """
        now, content = self._clock.now(), read_json(self._path)
        if content is not None and content != self._seen:
            before, self._seen = self._seen, content
            self._changed = now
            if content.get("idle") or before.get("done") != content.get("done"):
                self._progressed = now
        if self._process.is_dead():
            raise self._lost("died")
        if now - self._changed > self._timing.heartbeat_timeout:
            raise self._lost(f"gave no sign of life for {now - self._changed:.0f} s")
        if now - self._progressed > self._timing.stall_timeout:
            raise self._lost(f"is alive but made no progress for {now - self._progressed:.0f} s")

    def describe(self) -> str:
        """How far the rank is, for log lines."""
        if not self._seen.get("total"):
            return f"rank {self._rank}"
        return f"rank {self._rank} ({100 * self._seen['done'] / self._seen['total']:.0f}%)"

    def _lost(self, what: str) -> RankLostError:
        return RankLostError(
            f"rank {self._rank} ({self._process}) {what}; see its log, and start the job again: what is already converted "
            f"of a folder that still exists is used again",
            rank=self._rank,
        )

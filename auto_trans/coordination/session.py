"""A session: the ranks of one run of one job, which tell each other what they have done, and how they failed.

`joining` is how they find each other, `board` where they leave their messages. A failure of any rank, with its traceback,
reaches all others, and so does a rank's death, by its signs of life. Two jobs in one output directory have different
directories by the address of their launcher; the lock on the output keeps the second from working while the first does. No
collective communication is used: it has no CPU kernel everywhere, and dies with a rank.

Only ranks that owe a post are watched. Nobody waits for a rank that itself only waits, so its death stops no other.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import xxhash

from auto_trans.config import DEFAULT_TIMING, Timing
from auto_trans.coordination.barrier import Heartbeat, PulseMonitor, spread, wait_until
from auto_trans.coordination.board import Board, Failure
from auto_trans.coordination.clock import SYSTEM_CLOCK, Clock, Pace
from auto_trans.coordination.election import LEADER
from auto_trans.coordination.joining import Joined, join
from auto_trans.errors import OutputError, RankFailedError, RankLostError
from auto_trans.log import logger

__all__ = ["LEADER", "Session", "job_key"]

# What the ranks of one launch have in common, and two launches at the same time do not.
_LAUNCH_VARIABLES = ("MS_SCHED_HOST", "MS_SCHED_PORT", "RANK_TABLE_FILE", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")

_WATCH_SECONDS = 1.0
_TOLD_SECONDS = 5.0
_ALL_TOLD = "all_told"
_WATCHED_AT_ONCE = 8  # the shared disk is not asked more often if there are more


def job_key(environ: Mapping[str, str] = os.environ) -> str:
    """A short name that the ranks of one launch share."""
    identity = "|".join(environ.get(name, "") for name in _LAUNCH_VARIABLES)
    return xxhash.xxh3_64_hexdigest(identity.encode())


class Session:
    """The ranks of one run of a job.

    Args:
        joined: What they have agreed on.
        rank: This rank.
        timing: How long to wait for each other.
        clock: The time.

    Attributes:
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, joined: Joined, rank: int, timing: Timing, clock: Clock = SYSTEM_CLOCK) -> None:
        self.rank, self.world_size = rank, len(joined.processes)
        self._processes, self._timing, self._clock = joined.processes, timing, clock
        self._board = Board(joined.directory)

    @classmethod
    def join(
        cls, root: Path, rank: int, world_size: int, *, settings: str = "", timing: Timing = DEFAULT_TIMING,
        clock: Clock = SYSTEM_CLOCK,
    ) -> Session:  # fmt: skip
        """Joins the session of this run, see `joining.join`; returns once all ranks are there."""
        timing = spread(timing, world_size)
        return cls(join(root, rank, world_size, settings=settings, timing=timing, clock=clock), rank, timing, clock)

    @property
    def is_leader(self) -> bool:
        """Whether this is the rank that prepares and finishes."""
        return self.rank == LEADER

    def neighbours(self, ranks: Iterable[int]) -> int:
        """How many of ``ranks`` run on this machine."""
        host = self._processes[self.rank].host
        return sum(self._processes[rank].host == host for rank in ranks)

    def heartbeat(self) -> Heartbeat:
        """Signs of life of this rank while it works, which a rank that owes a post must give."""
        return Heartbeat(self._board.pulse_file(self.rank), self._timing.heartbeat_interval)

    def post(self, name: str, content: Mapping[str, Any]) -> None:
        """Tells all ranks something under a name.

        Raises:
            OutputError: The message cannot be written.
        """
        self._board.post(name, content)

    def fail(self, error: BaseException) -> None:
        """Tells all ranks that this one failed, and how."""
        try:
            self._board.post_failure(Failure.of(self.rank, error))
        except OutputError as e:
            logger.error("the failure of rank %d cannot be told to the others: %s", self.rank, e)

    def await_told(self) -> None:
        """Says that this rank knows of the failure, and waits some seconds for the others to say so.

        A launcher kills all ranks once one has ended with an error; the log of each is to tell why before.
        """
        until = self._clock.now() + _TOLD_SECONDS + 3 * self._timing.poll_max
        with contextlib.suppress(OutputError):
            self._board.tell(self.rank)
            while self._clock.now() < until:
                if self.is_leader and self._board.told() == self.world_size:  # one rank counts, for all to read
                    self.post(_ALL_TOLD, {})
                if self._board.read(_ALL_TOLD) is not None:
                    return
                self._clock.sleep(self._timing.poll_max)

    def await_posts(self, names: Mapping[str, int], what: str) -> dict[str, dict[str, Any]]:
        """Waits until all of some names are posted, watching the ranks that owe them.

        Args:
            names: Name -> the rank that posts it and gives signs of life until then.
            what: What is being done, for log lines.

        Returns:
            The contents by name, in the order of ``names``.

        Raises:
            RankFailedError: A rank failed.
            RankLostError: A rank that is waited for died or hangs.
        """
        monitors = {
            rank: PulseMonitor(rank, self._processes[rank], self._board.pulse_file(rank), self._timing, self._clock)
            for rank in names.values()
            if rank != self.rank
        }
        debts = _Debts(self._board, names)
        # the ranks begin at different ones, so that together they soon see all
        watched = deque(sorted(monitors))
        watched.rotate(-self.rank * _WATCHED_AT_ONCE)
        pace = Pace(self._clock, _WATCH_SECONDS)

        def look() -> Optional[dict[str, dict[str, Any]]]:
            if debts.first() is None:
                return debts.paid()
            if pace.due():
                self._raise_failure()
                for _ in range(min(_WATCHED_AT_ONCE, len(watched))):
                    self._check(monitors[watched[0]], watched[0], debts)
                    watched.rotate(-1)
            return None

        def waiting_for() -> str:
            late = [monitors[rank].describe() if rank in monitors else f"rank {rank}" for rank in debts.debtors()]
            more = f" and {len(late) - 8} more" if len(late) > 8 else ""
            return f"{', '.join(late[:8])}{more} to {what}"

        return wait_until(look, self._timing, waiting_for=waiting_for, clock=self._clock)

    def _check(self, monitor: PulseMonitor, rank: int, debts: _Debts) -> None:
        """Looks whether a rank is lost that still owes something."""
        try:
            monitor.check()
        except RankLostError:
            if debts.owes(rank):  # else it was free to go
                self._raise_failure()  # what it said at the end tells more
                raise

    def _raise_failure(self) -> None:
        failure = self._board.failure()
        if failure is not None and failure.rank != self.rank:
            raise RankFailedError(
                f"rank {failure.rank} failed with {failure.type}: {failure.message}\n\nIts traceback:\n{failure.traceback}",
                rank=failure.rank,
                original=failure.traceback,
            )


class _Debts:
    """The posts that are waited for, each read once and no more of them than needed."""

    def __init__(self, board: Board, names: Mapping[str, int]) -> None:
        self._board, self._names = board, names
        self._contents: dict[str, dict[str, Any]] = {}

    def first(self) -> Optional[str]:
        """The first name that is not there; until it is, nobody needs to know of those after it."""
        return next((name for name in self._names if not self._is_there(name)), None)

    def owes(self, rank: int) -> bool:
        """Whether a post of a rank is not there."""
        return any(owner == rank and not self._is_there(name) for name, owner in self._names.items())

    def debtors(self) -> list[int]:
        """All ranks of which a post is not there."""
        return sorted({owner for name, owner in self._names.items() if not self._is_there(name)})

    def paid(self) -> dict[str, dict[str, Any]]:
        """The contents, once all are there."""
        return {name: self._contents[name] for name in self._names}

    def _is_there(self, name: str) -> bool:
        if name not in self._contents:
            content = self._board.read(name)
            if content is None:
                return False
            self._contents[name] = content
        return True

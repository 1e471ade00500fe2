"""How the ranks of one run find each other through files on a shared directory.

Files outlive the runs that wrote them, so none is believed for its name alone:

1. Rank 0 makes a directory with a new name, which no earlier run can have written to, and offers it in ``offer.json``.
2. Every rank makes up a nonce, and says in the offered directory that it is present: ``present_rank_N.json``. The offer
   may be one of an earlier run; then rank 0 of this run replaces it, and the rank follows.
3. Once all are present, rank 0 starts the session: ``started.json`` names the nonces. A rank goes on only where its own
   nonce is named; what had started before the rank came is of an earlier run.

Waiting costs rank 0 one listing of the directory a look, and the others one or two small files.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from auto_trans.config import Timing
from auto_trans.coordination.barrier import wait_until
from auto_trans.coordination.board import read_json, write_json
from auto_trans.coordination.clock import SYSTEM_CLOCK, Clock, Pace
from auto_trans.coordination.election import LEADER
from auto_trans.errors import CoordinationError, JoinTimeoutError, OutputBusyError
from auto_trans.log import logger
from auto_trans.process import Process, parse_fields

__all__ = ["Arrival", "Gathering", "Joined", "Member", "join"]

_OFFER, _STARTED = "offer.json", "started.json"
_ID = re.compile("[0-9a-f]{32}")
_PLACE_SECONDS = 2.0
_LISTING_SECONDS = 10.0  # a network file system may list a new file later than it opens it


@dataclass(frozen=True)
class Member:
    """What a rank says of itself when it joins.

    Attributes:
        nonce: Made up by this process for this session.
        world_size: Number of ranks as it knows it.
        settings: What must be the same on all ranks, as text.
        process: Its process.
    """

    nonce: str
    world_size: int
    settings: str
    process: Process

    @classmethod
    def current(cls, world_size: int, settings: str) -> Member:
        """This process, with a new nonce."""
        return cls(uuid.uuid4().hex, world_size, settings, Process.current())

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Member:
        """Reads what `to_json` made.

        Raises:
            ValueError: It is something else.
        """
        kinds = {"nonce": str, "world_size": int, "settings": str, "process": dict}
        fields = parse_fields(content, "a rank", kinds)
        return cls(**{**fields, "process": Process.parse(fields["process"])})

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**self.__dict__, "process": self.process.to_json()}


@dataclass(frozen=True)
class Joined:
    """A session that has started.

    Attributes:
        directory: Its directory.
        processes: The process of every rank, by rank.
    """

    directory: Path
    processes: tuple[Process, ...]


def join(
    root: Path, rank: int, world_size: int, *, settings: str, timing: Timing, clock: Clock = SYSTEM_CLOCK
) -> Joined:  # fmt: skip
    """Joins the session of this run; returns once all ranks are there.

    Args:
        root: Directory for this job and purpose, on a file system that all ranks share.
        rank: This rank.
        world_size: Number of ranks.
        settings: What must be the same on all ranks, as text.
        timing: How long to wait.
        clock: The time.

    Raises:
        JoinTimeoutError: Not all ranks arrived in time.
        OutputBusyError: Another process took this rank's place.
        CoordinationError: The ranks were started with different settings.
        OutputError: The directory cannot be written to.
    """
    gathering = Gathering(root, world_size, clock) if rank == LEADER else None
    arrival = Arrival(
        root, rank, Member.current(world_size, settings), clock, own_offer=gathering.id if gathering else None
    )  # fmt: skip
    begin = clock.now()

    def look() -> Optional[Joined]:
        if gathering is not None:
            gathering.look()
        return arrival.look()

    def waiting_for() -> str:
        # all ranks listing the directory at every line would be too much for the shared disk
        return arrival.waiting_for() if gathering is not None else f"rank {LEADER} to gather all ranks"

    def timeout(seconds: float) -> Exception:
        return JoinTimeoutError(
            f"rank {rank} waited {seconds:.0f} s in {root} for {arrival.waiting_for()}: they did not start, failed before, "
            f"or see another directory; look at their logs, and check that output_dir is shared between all nodes"
        )

    joined = wait_until(
        look, timing, waiting_for=waiting_for, deadline=timing.join_timeout, on_timeout=timeout, clock=clock
    )
    logger.info("all %d ranks are there after %.1f s", world_size, clock.now() - begin)
    return joined


class Gathering:
    """Rank 0's part: offers a new directory, and starts the session once all ranks are present in it.

    Attributes:
        id: Name of the directory.
    """

    def __init__(self, root: Path, world_size: int, clock: Clock) -> None:
        self.id = uuid.uuid4().hex
        self._root, self._directory, self._world_size = root, root / self.id, world_size
        self._doubt = Pace(clock, _LISTING_SECONDS)
        write_json(root / _OFFER, {"id": self.id})

    def look(self) -> None:
        """Looks who is present; starts the session if all are."""
        missing = _missing(self._directory, self._world_size)
        if missing and self._doubt.due():
            missing = [rank for rank in missing if _present(self._directory, rank) is None]
        if missing or _read_offer(self._root) != self.id:  # a second rank 0 has come: `Arrival` tells
            return
        # read only now, as a process that was started again says anew that it is present
        members = [_present(self._directory, rank) for rank in range(self._world_size)]
        if None not in members:
            self._start([member for member in members if member is not None])

    def _start(self, members: list[Member]) -> None:
        # all ranks are here now, so none still reads an earlier session
        for old in self._root.iterdir():
            if old.name != self.id and old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)
        write_json(
            self._directory / _STARTED,
            {
                "nonces": [member.nonce for member in members],
                "processes": [member.process.to_json() for member in members],
                "difference": _difference(members),
            },
        )


class Arrival:
    """The part of every rank: says in the offered directory that it is present, until a session starts with it.

    Args:
        root: Where sessions are offered.
        rank: This rank.
        member: What it says of itself.
        clock: The time.
        own_offer: The offer that this process itself makes, if it is rank 0.
    """

    def __init__(self, root: Path, rank: int, member: Member, clock: Clock, *, own_offer: Optional[str] = None) -> None:
        self._root, self._rank, self._member, self._own_offer = root, rank, member, own_offer
        self._offer = ""
        self._directory: Optional[Path] = None  # where it said that it is present
        self._place = Pace(clock, _PLACE_SECONDS)

    def look(self) -> Optional[Joined]:
        """Answers a new offer; the session if it has started with this rank.

        Raises:
            OutputBusyError: Another process came as this rank.
            CoordinationError: The ranks were started with different settings.
        """
        once_in_a_while = self._place.due()
        if self._directory is None or once_in_a_while:
            self._follow_offer()
        if self._directory is None:
            return None
        started = read_json(self._directory / _STARTED)
        if started is not None:
            return self._admitted(self._directory, started)
        if once_in_a_while:
            present = _present(self._directory, self._rank)
            if present is not None and present.nonce != self._member.nonce:
                raise self._replaced_by(str(present.process))
        return None

    def waiting_for(self) -> str:
        """What keeps the session from starting; lists the directory."""
        if self._directory is None:
            return f"rank {LEADER} to arrive"
        missing = _missing(self._directory, self._member.world_size)
        if not missing:
            return f"rank {LEADER} to start the session"
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        return f"rank {', '.join(map(str, missing[:8]))}{more} to arrive"

    def _follow_offer(self) -> None:
        offer = _read_offer(self._root)
        if self._own_offer is not None and offer not in (None, self._own_offer):
            other = _present(self._root / str(offer), self._rank)
            raise self._replaced_by(str(other.process) if other else "host and pid unknown")
        if offer is None or offer == self._offer:
            return
        self._offer, directory = offer, self._root / offer
        if not (directory / _STARTED).exists():  # else it started without this process: it is of an earlier run
            write_json(directory / f"present_rank_{self._rank}.json", self._member.to_json())
            self._directory = directory

    def _admitted(self, directory: Path, started: Mapping[str, Any]) -> Joined:
        try:
            processes = tuple(map(Process.parse, started["processes"]))
            nonces, difference = list(started["nonces"]), started["difference"]
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CoordinationError(
                f"rank {self._rank} cannot read {directory / _STARTED} ({type(e).__name__}: {e}); install the same version "
                f"of auto_trans on all nodes"
            ) from None
        if difference:
            raise CoordinationError(difference)
        if self._rank >= len(nonces) or nonces[self._rank] != self._member.nonce:
            raise self._replaced_by(str(processes[self._rank]) if self._rank < len(processes) else "of another job")
        return Joined(directory, processes)

    def _replaced_by(self, process: str) -> OutputBusyError:
        return OutputBusyError(
            f"another process ({process}) also came as rank {self._rank} to {self._root}: two jobs use one output "
            f"directory; give each its own output_dir"
        )


def _read_offer(root: Path) -> Optional[str]:
    offer = (read_json(root / _OFFER) or {}).get("id")
    return offer if isinstance(offer, str) and _ID.fullmatch(offer) else None


def _present(directory: Path, rank: int) -> Optional[Member]:
    """What a rank said of itself in the directory of a session, or None while it has not."""
    try:
        return Member.parse(read_json(directory / f"present_rank_{rank}.json") or {})
    except ValueError:
        return None


def _missing(directory: Path, world_size: int) -> list[int]:
    """The ranks that a listing of the directory of a session does not show."""
    try:
        names = set(os.listdir(directory))
    except OSError:
        names = set()
    return [rank for rank in range(world_size) if f"present_rank_{rank}.json" not in names]


def _difference(members: list[Member]) -> Optional[str]:
    """How ranks differ that must not, as a message."""
    first = members[LEADER]
    for rank, member in enumerate(members):
        for own, other in ((first.world_size, member.world_size), (first.settings, member.settings)):
            if own != other:
                return (
                    f"rank {LEADER} and rank {rank} were started with different settings ({own} and {other}); start all "
                    f"ranks with the same YAML"
                )
    return None

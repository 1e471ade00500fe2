"""A session: the ranks of one run of one job, agreed on through files on a shared directory.

Files outlive the runs that wrote them, so none is believed for its name alone:

1. Every rank makes up a nonce and writes it to ``joining/rank_N.json``.
2. Rank 0 reads them and publishes an offer, ``offer.json``, that names all nonces and a new session id. Should a late
   rank replace the nonce of an earlier run, rank 0 publishes a new offer.
3. A rank whose own nonce is in the offer says so in the directory of the session, ``<id>/present_rank_N.json``. Once all
   have, rank 0 writes ``<id>/started.json``, and everything that follows happens in that directory, which no earlier run
   can have written to.

A failure of any rank (``failed_rank_N.json``, with its traceback) reaches all others, and so does a rank's death, by its
heartbeat. Two jobs in one output directory have different directories by the address of their launcher; the lock on the
output (`OutputLock`) keeps the second from working while the first does. No collective communication is used: it has no
CPU kernel everywhere, and dies with a rank.
"""

from __future__ import annotations

import os
import shutil
import time
import traceback
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import filelock
import xxhash

from auto_trans.config import DEFAULT_TIMING, Timing
from auto_trans.coordination.barrier import Heartbeat, PulseMonitor, process_identity, wait_until
from auto_trans.coordination.files import read_json, write_json
from auto_trans.errors import CoordinationError, JoinTimeoutError, OutputBusyError, RankFailedError
from auto_trans.log import logger

__all__ = ["LEADER", "OutputLock", "Session", "job_key"]

LEADER = 0

# What the ranks of one launch have in common, and two launches at the same time do not.
_LAUNCH_VARIABLES = ("MS_SCHED_HOST", "MS_SCHED_PORT", "RANK_TABLE_FILE", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")


def job_key(environ: Mapping[str, str] = os.environ) -> str:
    """A short name that the ranks of one launch share."""
    identity = "|".join(environ.get(name, "") for name in _LAUNCH_VARIABLES)
    return xxhash.xxh3_64_hexdigest(identity.encode())


class Session:
    """The ranks of one run of a job; see the module for how they find each other.

    Attributes:
        rank: This rank.
        world_size: Number of ranks.
        members: Rank -> identity (host, pid, started) of its process.
    """

    def __init__(
        self, directory: Path, rank: int, world_size: int, members: Mapping[int, Mapping], timing: Timing
    ) -> None:
        self._directory, self._timing = directory, timing
        self.rank, self.world_size, self.members = rank, world_size, members

    @classmethod
    def join(
        cls, root: Path, rank: int, world_size: int, *, settings: str = "", timing: Timing = DEFAULT_TIMING
    ) -> Session:  # fmt: skip
        """Joins the session of this run; returns once all ranks are there.

        Args:
            root: Directory for this job and purpose, on a file system that all ranks share.
            rank: This rank.
            world_size: Number of ranks.
            settings: What must be the same on all ranks, as text.
            timing: How long to wait.

        Raises:
            JoinTimeoutError: Not all ranks arrived in time.
            CoordinationError: The ranks were started with different settings, or another process took this rank's place.
        """
        joining, nonce = root / "joining", uuid.uuid4().hex
        own = {"nonce": nonce, "world_size": world_size, "settings": settings, **process_identity()}
        write_json(joining / f"rank_{rank}.json", own)
        leader = _Leader(root, world_size) if rank == LEADER else None
        answered = ""
        begin = time.monotonic()

        def look() -> Optional[Session]:
            nonlocal answered
            if leader is not None:
                leader.lead()
            offer = read_json(root / "offer.json") or {}
            if offer.get("nonces", {}).get(str(rank)) == nonce:
                directory = root / offer["id"]
                if answered != offer["id"]:
                    write_json(directory / f"present_rank_{rank}.json", own)
                    answered = offer["id"]
                started = read_json(directory / "started.json")
                if started is not None:
                    members = {int(r): m for r, m in started["members"].items()}
                    session = cls(directory, rank, world_size, members, timing)
                    session._check_members()
                    return session
            else:
                _check_still_joining(joining / f"rank_{rank}.json", nonce, rank)
            return None

        def waiting_for() -> str:
            missing = leader.missing() if leader is not None else []
            return f"rank {', '.join(map(str, missing[:8]))} to arrive" if missing else "rank 0 to gather all ranks"

        def timeout(seconds: float) -> Exception:
            return JoinTimeoutError(
                f"rank {rank} waited {seconds:.0f} s in {root} for {waiting_for()}: they did not start, failed before, or "
                f"see another directory; look at their logs, and check that output_dir is shared between all nodes"
            )

        session = wait_until(look, timing, waiting_for=waiting_for, deadline=timing.join_timeout, on_timeout=timeout)
        logger.info("all %d ranks are there after %.1f s", world_size, time.monotonic() - begin)
        return session

    @property
    def is_leader(self) -> bool:
        """Whether this is the rank that prepares and finishes."""
        return self.rank == LEADER

    def neighbours(self, ranks: Iterable[int]) -> int:
        """How many of ``ranks`` run on this machine."""
        host = self.members[self.rank].get("host")
        return sum(self.members[rank].get("host") == host for rank in ranks)

    def heartbeat(self) -> Heartbeat:
        """Signs of life of this rank while it works."""
        return Heartbeat(self._alive(self.rank), self._timing.heartbeat_interval)

    def publish(self, name: str, content: Mapping[str, Any]) -> None:
        """Tells all ranks something under a name."""
        write_json(self._directory / f"{name}.json", content)

    def fail(self, error: BaseException) -> None:
        """Tells all ranks that this one failed, and how."""
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        content = {"type": type(error).__name__, "message": str(error), "traceback": text}
        try:
            write_json(self._directory / f"failed_rank_{self.rank}.json", content)
        except OSError as e:
            logger.error("the failure of rank %d cannot be told to the others: %s", self.rank, e)

    def await_published(self, names: Mapping[str, int], what: str) -> dict[str, dict[str, Any]]:
        """Waits until all of some names are published, watching the ranks that owe them.

        Args:
            names: Name -> the rank that publishes it and gives signs of life until then.
            what: What is being done, for log lines.

        Returns:
            The contents by name.

        Raises:
            RankFailedError: A rank failed.
            RankLostError: A rank that is waited for died or hangs.
        """
        contents: dict[str, dict[str, Any]] = {}
        pulses = {
            rank: PulseMonitor(rank, self._alive(rank), self._timing) for rank in names.values() if rank != self.rank
        }

        def look() -> Optional[bool]:
            for name in names:
                if name not in contents:
                    content = read_json(self._directory / f"{name}.json")
                    if content is not None:
                        contents[name] = content
            if len(contents) == len(names):
                return True
            self._raise_failure()
            for name, rank in names.items():
                if name not in contents and rank in pulses:
                    pulses[rank].check()
            return None

        def waiting_for() -> str:
            late = sorted({rank for name, rank in names.items() if name not in contents})
            return f"{', '.join(pulses[rank].describe() for rank in late[:8] if rank in pulses)} to {what}"

        wait_until(look, self._timing, waiting_for=waiting_for)
        return contents

    def _alive(self, rank: int) -> Path:
        return self._directory / f"alive_rank_{rank}.json"

    def _raise_failure(self) -> None:
        # one look at the directory tells of all ranks
        failed = sorted(name for name in os.listdir(self._directory) if name.startswith("failed_rank_"))
        for name in failed:
            rank = int(name[len("failed_rank_") : -len(".json")])
            content = read_json(self._directory / name)
            if content is not None and rank != self.rank:
                raise RankFailedError(
                    f"rank {rank} failed with {content['type']}: {content['message']}\n\n"
                    f"Its traceback:\n{content['traceback']}",
                    rank=rank,
                    original=content["traceback"],
                )

    def _check_members(self) -> None:
        own = self.members[self.rank]
        for rank, member in self.members.items():
            for key in ("world_size", "settings"):
                if member.get(key) != own.get(key):
                    raise CoordinationError(
                        f"rank {self.rank} and rank {rank} were started with different settings ({own.get(key)} and "
                        f"{member.get(key)}); start all ranks with the same YAML"
                    )


class _Leader:
    """Rank 0's part of joining."""

    def __init__(self, root: Path, world_size: int) -> None:
        self._root, self._world_size = root, world_size
        self._nonces: dict[str, str] = {}
        self._id = ""
        self._started = False
        self._missing = list(range(world_size))

    def missing(self) -> list[int]:
        """The ranks that have not arrived."""
        return self._missing

    def lead(self) -> None:
        """Looks who has arrived, and offers and starts the session."""
        if self._started:
            return
        joined = {rank: read_json(self._root / "joining" / f"rank_{rank}.json") for rank in range(self._world_size)}
        nonces = {str(rank): content["nonce"] for rank, content in joined.items() if content}
        if len(nonces) < self._world_size:
            self._missing = [rank for rank, content in joined.items() if not content]
            return
        if nonces != self._nonces:
            self._nonces, self._id = nonces, uuid.uuid4().hex
            (self._root / self._id).mkdir()
            write_json(self._root / "offer.json", {"id": self._id, "nonces": nonces})
        directory = self._root / self._id
        present = {rank: read_json(directory / f"present_rank_{rank}.json") for rank in range(self._world_size)}
        self._missing = [rank for rank, content in present.items() if not content]
        if not self._missing:
            # all ranks are here now, so none still reads an earlier session
            self._remove_others()
            write_json(directory / "started.json", {"members": present})
            self._started = True

    def _remove_others(self) -> None:
        for old in self._root.iterdir():
            if old.name not in ("joining", self._id) and old.is_dir() and not old.is_symlink():
                shutil.rmtree(old, ignore_errors=True)


def _check_still_joining(path: Path, nonce: str, rank: int) -> None:
    content = read_json(path)
    if content is not None and content["nonce"] != nonce:
        raise OutputBusyError(
            f"another process (host {content.get('host')}, pid {content.get('pid')}) also came as rank {rank} to "
            f"{path.parent}: two jobs use one output directory; give each its own output_dir"
        )


class OutputLock:
    """Keeps an output directory to one job; held by its rank 0, let go by the system if that dies.

    Args:
        path: The lock file.
        timeout: Seconds to wait for another job to leave.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self._path, self._timeout = path, timeout
        self._owner = path.with_suffix(".owner.json")
        self._lock = filelock.FileLock(str(path), thread_local=False)

    def acquire(self) -> None:
        """Takes the lock; does nothing if it is held already.

        Raises:
            OutputBusyError: Another job keeps it.
        """
        if self._lock.is_locked:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=self._timeout)
        except filelock.Timeout:
            owner = read_json(self._owner) or {}
            raise OutputBusyError(
                f"{self._path.parent.parent} is in use by another job (host {owner.get('host', 'unknown')}, pid "
                f"{owner.get('pid', 'unknown')}) that is converting or loading; give each job its own output_dir, or wait"
            ) from None
        write_json(self._owner, process_identity())

    def release(self) -> None:
        """Lets the lock go."""
        if self._lock.is_locked:
            self._lock.release()

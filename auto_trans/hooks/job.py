"""The running MindFormers job: its ranks, its output directory, its settings."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Optional

from auto_trans.config import YAML_KEYS, Timing
from auto_trans.coordination.lock import OutputLock
from auto_trans.coordination.session import Session, job_key
from auto_trans.core.consistency import Network
from auto_trans.errors import AutoTransError, RankFailedError
from auto_trans.jobs import Load
from auto_trans.log import logger

__all__ = ["Job", "Running", "in_yaml_words"]


@dataclass(frozen=True)
class Running:
    """What MindFormers knows where it calls us, and does not hand on.

    Attributes:
        settings: The configuration of the job.
        network: The network, while weights are loaded into it.
        load: What is loaded, while it is.
        reshards: Whether the job is left alone because it reshards its checkpoint itself.
    """

    settings: Mapping[str, Any]
    network: Optional[Network] = None
    load: Optional[Load] = None
    reshards: bool = False


# MindFormers calls what it imported from us deep inside of what we wrap: this carries from the outer call to the inner one
# what it does not pass on.
_RUNNING: ContextVar[Optional[Running]] = ContextVar("auto_trans_running", default=None)


class Job:
    """This process's place in the running job, as MindFormers knows it.

    Attributes:
        rank: This rank.
        world_size: Number of ranks.
        output: The output directory, shared by all ranks.
    """

    # A process is part of one job, and holds its output from its start to the end of its load, whichever thread does what.
    _held: ClassVar[Optional[OutputLock]] = None
    _emptied: ClassVar[bool] = False

    def __init__(self, rank: int, world_size: int, output: Path) -> None:
        self.rank, self.world_size, self.output = rank, world_size, output

    @classmethod
    def current(cls, rank: Optional[int] = None, world_size: Optional[int] = None) -> Job:
        """The job that this process is part of, as MindFormers knows it."""
        from mindformers.tools import utils

        return cls(
            utils.get_real_rank() if rank is None else rank,
            utils.get_real_group_size() if world_size is None else world_size,
            Path(utils.get_output_root_path()),
        )

    @staticmethod
    def in_modelarts() -> bool:
        """Whether the job runs on ModelArts."""
        from mindformers.tools import utils

        return bool(utils.check_in_modelarts())

    @staticmethod
    def mindformers() -> str:
        """The version of MindFormers; empty if it tells none."""
        return getattr(sys.modules.get("mindformers"), "__version__", "")

    @staticmethod
    def running() -> Optional[Running]:
        """What is known of the call of MindFormers that is under way."""
        return _RUNNING.get()

    @staticmethod
    @contextlib.contextmanager
    def knowing(running: Running) -> Iterator[None]:
        """Makes something known to what MindFormers calls meanwhile."""
        token = _RUNNING.set(running)
        try:
            yield
        finally:
            _RUNNING.reset(token)

    @property
    def strategy_dir(self) -> Path:
        """Where MindSpore saves the strategy that this job compiled."""
        return self.output / "strategy"

    @property
    def unified_dir(self) -> Path:
        """Where the weights of a safetensors job go if they are merged first."""
        return self.output / "unified_checkpoint"

    @property
    def transformed_dir(self) -> Path:
        """Where the converted weights go."""
        return self.output / "transformed_checkpoint"

    @contextlib.contextmanager
    def session(self, purpose: str, settings: str, timing: Timing) -> Iterator[Session]:
        """The session of all ranks for a purpose; an exception in it reaches all of them.

        Rank 0 holds the lock on the output directory from here to the end of the load.
        """
        root = self.output / ".auto_trans" / job_key() / purpose
        session = Session.join(root, self.rank, self.world_size, settings=settings, timing=timing)
        try:
            if session.is_leader:
                self._lock(timing)
            with in_yaml_words():
                yield session
        except BaseException as e:
            logger.error("rank %d: %s: %s", self.rank, type(e).__name__, e)
            if not isinstance(e, RankFailedError):  # that failure is known to all
                session.fail(e)
            self.release()
            if isinstance(e, Exception):  # who interrupts a job wants it to end now
                session.await_told()
            raise

    @property
    def is_emptied(self) -> bool:
        """Whether the output directory was emptied since the last load."""
        return Job._emptied

    def emptied(self) -> None:
        """Notes that the output directory is emptied."""
        Job._emptied = True

    def release(self) -> None:
        """Lets other jobs into the output directory."""
        Job._emptied = False
        if Job._held is not None:
            Job._held.release()
            Job._held = None

    def _lock(self, timing: Timing) -> None:
        """Takes the output directory, unless this job has it."""
        if Job._held is None:
            lock = OutputLock(self.output / ".auto_trans" / "output.lock", timing.lock_timeout)
            lock.acquire()
            Job._held = lock


@contextlib.contextmanager
def in_yaml_words() -> Iterator[None]:
    """Has errors name settings by their YAML keys."""
    try:
        yield
    except AutoTransError as e:
        e.told_by(YAML_KEYS)
        raise

"""The running MindFormers job: its ranks, its output directory, its settings."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from auto_trans.config import AutoTransConfig, Timing
from auto_trans.coordination.session import OutputLock, Session, job_key
from auto_trans.errors import AutoTransError, RankFailedError
from auto_trans.log import logger

__all__ = ["Job"]

# of this process: what transform_and_load_checkpoint was called with, and the locks that it holds
_settings: list[AutoTransConfig] = []
_locks: dict[Path, OutputLock] = {}


class Job:
    """This process's place in the running job, as MindFormers knows it.

    Attributes:
        rank: This rank.
        world_size: Number of ranks.
        output: The output directory, shared by all ranks.
    """

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

    @property
    def strategy_dir(self) -> Path:
        """Where MindSpore saves the strategy that this job compiled."""
        return self.output / "strategy"

    @property
    def transformed_dir(self) -> Path:
        """Where the converted weights go."""
        return self.output / "transformed_checkpoint"

    @staticmethod
    def settings() -> Optional[AutoTransConfig]:
        """The settings of the load that is under way, if there is one."""
        return _settings[-1] if _settings else None

    @contextlib.contextmanager
    def loading(self, settings: AutoTransConfig) -> Iterator[None]:
        """A load under these settings; at its end the output directory is free for other jobs again."""
        _settings.append(settings)
        try:
            yield
        finally:
            _settings.pop()
            self.release()

    @contextlib.contextmanager
    def session(self, purpose: str, settings: str, timing: Timing) -> Iterator[Session]:
        """The session of all ranks for a purpose; an exception in it reaches all of them.

        Rank 0 holds the lock on the output directory from here to the end of the load.
        """
        root = self.output / ".auto_trans" / job_key() / purpose
        session = Session.join(root, self.rank, self.world_size, settings=settings, timing=timing)
        try:
            if session.is_leader:
                self._lock(timing).acquire()
            yield session
        except BaseException as e:
            if not isinstance(e, AutoTransError):
                logger.error("rank %d: %s: %s", self.rank, type(e).__name__, e)
            if not isinstance(e, RankFailedError):  # that failure is known to all
                session.fail(e)
            self.release()
            raise

    def release(self) -> None:
        """Lets other jobs into the output directory."""
        lock = _locks.get(self.output)
        if lock is not None:
            lock.release()

    def _lock(self, timing: Timing) -> OutputLock:
        if self.output not in _locks:
            os.makedirs(self.output, exist_ok=True)
            _locks[self.output] = OutputLock(self.output / ".auto_trans" / "output.lock", timing.lock_timeout)
        return _locks[self.output]

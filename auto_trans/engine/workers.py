"""An engine that shares a task among worker processes of this machine.

The workers get the plan, not the request: nothing is planned again. None outlives the process that started it: a worker
watches its parent and ends with it, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Optional, Union

from auto_trans.core.work import split_files
from auto_trans.engine.base import ConversionTask, Engine, Progress
from auto_trans.errors import ConfigError, RankLostError
from auto_trans.storage.manifest import FileRecord

__all__ = ["WorkerEngine"]

_JOIN_SECONDS = 1.5


@dataclass(frozen=True)
class _Bytes:
    """Bytes written since the last message."""

    number: int


@dataclass(frozen=True)
class _Done:
    """A worker's share is written."""

    records: list[FileRecord]


@dataclass(frozen=True)
class _Failed:
    """A worker failed."""

    error: BaseException


_Message = Union[_Bytes, _Done, _Failed]


class WorkerEngine:
    """Has several processes write the files of a task, each with another engine.

    Args:
        engine: The engine of the workers.
        processes: How many workers; no more than there are files are started.

    Raises:
        ConfigError: The number of processes is less than 1.
    """

    def __init__(self, engine: Engine, processes: int) -> None:
        if processes < 1:
            raise ConfigError(f"«processes» must be at least 1, not {processes}")
        self.name, self.tells_progress = engine.name, engine.tells_progress
        self._engine, self.processes = engine, processes

    def write(self, task: ConversionTask, progress: Progress) -> list[FileRecord]:
        """Writes the files of a task, see `auto_trans.engine.base.Engine`.

        Raises:
            RankLostError: A worker died; what is complete is used again when the conversion is started again.
        """
        shares = split_files(task.files, self.processes)
        if len(shares) < 2:
            return self._engine.write(task, progress)
        workers = [_Worker(self._engine, replace(task, files=tuple(files))) for files in shares]
        try:
            return _gather(workers, progress)
        finally:
            _stop(workers)


class _Worker:
    """A worker process, and what it says."""

    def __init__(self, engine: Engine, task: ConversionTask) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe(duplex=False)
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, engine, task), daemon=True)
        self.process.start()
        theirs.close()


def _stop(workers: Iterable[_Worker]) -> None:
    """Ends all workers that have not ended, together; they remove what they have half written."""
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + _JOIN_SECONDS
    for worker in workers:
        worker.process.join(max(deadline - time.monotonic(), 0))
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.connection.close()


def _gather(workers: Iterable[_Worker], progress: Progress) -> list[FileRecord]:
    """Listens until all workers are done; raises what one of them raised."""
    talking: dict[Any, _Worker] = {worker.connection: worker for worker in workers}
    records: list[FileRecord] = []
    while talking:
        for connection in wait(list(talking)):
            message = _receive(connection)
            if isinstance(message, _Bytes):
                progress(message.number)
            elif isinstance(message, _Done):
                records += message.records
                del talking[connection]
            elif isinstance(message, _Failed):
                raise message.error
            else:
                raise RankLostError(
                    "a worker process died, most likely killed for lack of memory or by a user; start the conversion again: "
                    "what is already complete is used again"
                )
    return records


def _receive(connection: Any) -> Optional[_Message]:
    """The next message; None if the worker is gone."""
    try:
        message: _Message = connection.recv()
    except (EOFError, OSError):
        return None
    return message


def _work(connection: Connection, engine: Engine, task: ConversionTask) -> None:
    """The worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it, too, and ends its workers
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    threading.Thread(target=_end_with_parent, name="auto_trans-parent", daemon=True).start()
    message: _Message
    try:
        message = _Done(engine.write(task, lambda nbytes: connection.send(_Bytes(nbytes))))
    except Exception as e:
        message = _Failed(e)
    # The parent may end this process as soon as it has the message; an exception would be shown while Python shuts down.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    connection.send(message)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # what is half written is swept by the next run

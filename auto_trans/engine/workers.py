"""Several worker processes on one machine convert the target ranks of one conversion."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from auto_trans.conversion import Conversion
from auto_trans.core.work import split_ranks
from auto_trans.errors import ConfigError, RankLostError
from auto_trans.progress import Meter
from auto_trans.report import ConversionReport

__all__ = ["run_with_workers"]

_progress: Any = None  # in a worker: where the bytes done are put


def run_with_workers(conversion: Conversion, processes: int, *, quiet: bool = False) -> ConversionReport:
    """Runs a planned conversion with worker processes of this machine.

    Ranks with equal contents stay with one worker, so that they are still written once.

    Args:
        conversion: What to do; checked here before any work.
        processes: How many workers; no more than there are distinct files are started.
        quiet: Show no progress.

    Returns:
        The report of the whole.

    Raises:
        ConfigError: The number of processes is less than 1.
        RankLostError: A worker died; what is complete is used again when the conversion is started again.
    """
    if processes < 1:
        raise ConfigError(f"processes must be at least 1, not {processes}")
    shares = split_ranks(conversion.plan, processes)
    conversion.check(neighbours=max(len(shares), 1))
    conversion.log_plan()
    if len(shares) < 2:
        return conversion.run(quiet=quiet)
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    total = sum(file.nbytes for file in conversion.todo())
    meter = Meter(total, f"converting {conversion.checkpoint.name}", quiet=quiet)
    with (
        _draining(queue, meter),
        ProcessPoolExecutor(len(shares), mp_context=context, initializer=_start, initargs=(queue,)) as pool,
    ):
        futures = [pool.submit(_convert, _task(conversion, share)) for share in shares]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            reports = [future.result() for future in futures]
        except BrokenProcessPool as e:
            raise RankLostError(
                "a worker process died, most likely killed for lack of memory or by a user; start the conversion again: "
                "what is already complete is used again"
            ) from e
    conversion.folder.manifest.finish()
    return ConversionReport.merged(reports)


def _task(conversion: Conversion, ranks: Sequence[int]) -> dict[str, Any]:
    return {
        "checkpoint": conversion.checkpoint,
        "dst": conversion.dst,
        "source": conversion.source,
        "target": conversion.target,
        "prefix": conversion.prefix,
        "ranks": ranks,
        "memory_limit": conversion.memory_limit,
        "format": conversion.format.name,
        "reuse": conversion.reuse,
    }


def _start(queue: Any) -> None:
    global _progress
    _progress = queue


def _convert(task: dict[str, Any]) -> ConversionReport:
    last = 0

    def listener(done: int, total: int) -> None:
        nonlocal last
        _progress.put(done - last)
        last = done

    return Conversion(**task).run(quiet=True, listener=listener)


@contextlib.contextmanager
def _draining(queue: Any, meter: Meter) -> Iterator[None]:
    """Shows the progress of the workers; a queue that nobody empties would stop them."""
    stop = threading.Event()

    def drain() -> None:
        while True:
            last = stop.wait(0.1)
            while not queue.empty():
                meter(queue.get())
            if last:
                return

    thread = threading.Thread(target=drain, name="auto_trans-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        meter.close()

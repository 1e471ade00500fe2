"""Many ranks in one process in a time of their own: threads of which one runs, until it sleeps."""

from __future__ import annotations

import heapq
import itertools
import threading
from typing import Any, Callable

from auto_trans.coordination.clock import Clock


class World:
    """Runs functions side by side, in the order of the times at which they wake up, and each time in the same order.

    Attributes:
        clock: Its time, which passes only while all sleep.
        slept: The seconds of every sleep.
    """

    def __init__(self, end: float = 100_000.0) -> None:
        self.clock = Clock(now=lambda: self._now, sleep=self._sleep)
        self.slept: list[float] = []
        self._now, self._end = 1000.0, 1000.0 + end
        self._order = itertools.count()
        self._waking: list[tuple[float, int, threading.Event]] = []
        self._turn = threading.Event()

    def run(self, **functions: Callable[[], Any]) -> dict[str, Any]:
        """Runs functions until all have returned: what each returned or raised."""
        results: dict[str, Any] = {}
        threads = [threading.Thread(target=self._live, args=(n, f, results), daemon=True) for n, f in functions.items()]
        for thread in threads:
            thread.start()
            self._turn.wait()  # until it sleeps before its beginning
            self._turn.clear()
        while self._waking:
            self._now, _, awake = heapq.heappop(self._waking)
            assert self._now < self._end, f"still waiting: {set(functions) - set(results)}"
            awake.set()
            self._turn.wait()
            self._turn.clear()
        return results

    def _live(self, name: str, function: Callable[[], Any], results: dict[str, Any]) -> None:
        self._sleep(0)
        try:
            results[name] = function()
        except BaseException as e:
            results[name] = e
        self._turn.set()

    def _sleep(self, seconds: float) -> None:
        if seconds:
            self.slept.append(seconds)
        awake = threading.Event()
        heapq.heappush(self._waking, (self._now + seconds, next(self._order), awake))
        self._turn.set()
        awake.wait()

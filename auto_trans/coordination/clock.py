"""Time as the waiting code sees it, so that tests need not wait."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable

__all__ = ["SYSTEM_CLOCK", "Clock", "Pace"]


@dataclass(frozen=True)
class Clock:
    """What tells the time and what lets it pass.

    Attributes:
        now: The time in seconds, from any beginning; never goes back.
        sleep: Waits for some seconds.
    """

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


SYSTEM_CLOCK = Clock()


class Pace:
    """Keeps what is dear to once in a while.

    Args:
        clock: The time.
        seconds: From the beginning to the first time, and from one time to the next.
    """

    def __init__(self, clock: Clock, seconds: float) -> None:
        self._clock, self._seconds = clock, seconds
        self._last = clock.now()

    def due(self) -> bool:
        """Whether it is time; counts as done if so."""
        now = self._clock.now()
        if now - self._last < self._seconds:
            return False
        self._last = now
        return True

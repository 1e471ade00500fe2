"""Progress of long work: a bar on a terminal, else a log line every ten seconds."""

from __future__ import annotations

import sys
import time
from typing import Callable, NoReturn, Optional

from tqdm import tqdm

from auto_trans.log import logger
from auto_trans.sizes import format_bytes

__all__ = ["Meter"]

_LOG_SECONDS = 10.0


class Meter:
    """Counts bytes and shows how far the work is.

    Args:
        total: Bytes of the whole work.
        label: What is being done.
        quiet: Show nothing.
        listener: Called with (done, total) at every step, e.g. to put it into a heartbeat.
        now: Tells the time in seconds.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        quiet: bool = False,
        listener: Optional[Callable[[int, int], None]] = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done, self.total = 0, total
        self._label, self._listener, self._quiet, self._now = label, listener, quiet, now
        self._begin = self._logged = now()
        self._bar: Optional[tqdm[NoReturn]] = None
        if total and sys.stderr.isatty() and not quiet:
            # left behind, it would be an empty line on a terminal that does not tell its width
            self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, leave=False)

    def __call__(self, nbytes: int) -> None:
        """Counts ``nbytes`` more."""
        self.done += nbytes
        if self._listener:
            self._listener(self.done, self.total)
        if self._bar is not None:
            self._bar.update(nbytes)
        elif not self._quiet and self.done and self._now() - self._logged >= _LOG_SECONDS:
            self._logged = self._now()
            rate = self.done / (self._logged - self._begin)
            logger.info(
                "%s: %.0f%%, %s of %s, %s/s, about %.0f s left",
                self._label, 100 * self.done / self.total, format_bytes(self.done), format_bytes(self.total),
                format_bytes(rate), (self.total - self.done) / rate,
            )  # fmt: skip

    def close(self) -> None:
        """Takes the bar away; what was done is told by others."""
        if self._bar is not None:
            self._bar.close()

"""The logger: the standard library's, which speaks through MindFormers' own in its jobs."""

from __future__ import annotations

import logging
import sys

__all__ = ["logger", "use_mindformers_logger"]

logger = logging.getLogger("auto_trans")


def use_mindformers_logger() -> None:
    """Has our lines appear where MindFormers' do, once its logger is loaded, and nowhere else; never loads it.

    Until then they go where they would have gone.
    """
    if not any(isinstance(handler, _Forward) for handler in logger.handlers):
        logger.addHandler(_Forward())
    logger.propagate = False
    logger.setLevel(logging.DEBUG)  # the logger that a line is passed on to has levels of its own


class _Forward(logging.Handler):
    """Passes lines on to MindFormers' logger, or to the root logger while there is none."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            module = sys.modules.get("mindformers.tools.logger")
            # not there yet while the module is being imported
            get_logger = getattr(module, "get_logger", None)
            target = get_logger() if get_logger else logging.getLogger()
            if target.isEnabledFor(record.levelno):
                target.handle(record)
        except Exception:
            self.handleError(record)

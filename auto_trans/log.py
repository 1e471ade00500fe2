"""The logger: MindFormers' own where MindFormers runs, else the standard library's."""

from __future__ import annotations

import logging
import sys
from typing import Any

__all__ = ["logger"]


class _Logger:
    """Forwards to MindFormers' logger once MindFormers is loaded; never loads it."""

    def __getattr__(self, name: str) -> Any:
        module = sys.modules.get("mindformers.tools.logger")
        return getattr(getattr(module, "logger", None) or logging.getLogger("auto_trans"), name)


logger = _Logger()

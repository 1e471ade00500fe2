"""Installs the hook by a call, where the environment ignores ``.pth`` files."""

from __future__ import annotations

import os
import sys

from auto_trans.hooks import finder
from auto_trans.hooks.patches import patch

__all__ = ["install"]


def install() -> None:
    """Installs the hook in this process, whether MindFormers is imported already or not.

    Only needed where the environment ignores ``.pth`` files; call it before the training starts.
    """
    finder.install()  # type: ignore[no-untyped-call]
    if os.environ.get("AUTO_TRANS_DISABLE", "0") not in ("", "0"):
        return
    for name in sorted(finder.WATCHED):
        module = sys.modules.get(name)
        if module is not None:
            patch(module)

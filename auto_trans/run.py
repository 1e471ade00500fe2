"""``python -m auto_trans.run script.py args...``: runs a script with the hook, where ``.pth`` files are ignored."""

from __future__ import annotations

import os
import runpy
import sys

from auto_trans.hooks.installation import install

__all__ = ["main"]


def main() -> None:
    """Installs the hook and runs the script as Python would."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m auto_trans.run SCRIPT [ARGUMENT ...]")
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

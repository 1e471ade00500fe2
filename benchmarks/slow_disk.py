"""A stand-in for a file server: shows a folder, read-only, and answers every read only after a while.

    python benchmarks/slow_disk.py FOLDER MOUNT_POINT MILLISECONDS

It needs ``pip install fusepy`` and libfuse 2. What the kernel asks of it is what it would ask of a server: a mapping fetches
pages as they are touched, with read-ahead; a read asks for all that fits a request. Several requests are answered at once.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from fuse import FUSE, Operations


class Slow(Operations):  # type: ignore[misc]
    """The folder."""

    def __init__(self, folder: str, seconds: float) -> None:
        self._folder, self._seconds = folder, seconds

    def _path(self, path: str) -> str:
        return os.path.join(self._folder, path.lstrip("/"))

    def getattr(self, path: str, fh: Any = None) -> dict[str, Any]:
        """State of a file."""
        state = os.lstat(self._path(path))
        names = ("st_mode", "st_size", "st_mtime", "st_ctime", "st_atime", "st_nlink", "st_uid", "st_gid")
        return {name: getattr(state, name) for name in names}

    def readdir(self, path: str, fh: Any) -> list[str]:
        """Names in a folder."""
        return [".", "..", *os.listdir(self._path(path))]

    def open(self, path: str, flags: int) -> int:
        """Opens a file."""
        return os.open(self._path(path), flags)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Reads after a while."""
        time.sleep(self._seconds)
        return os.pread(fh, size, offset)

    def release(self, path: str, fh: int) -> None:
        """Closes a file."""
        os.close(fh)


if __name__ == "__main__":
    FUSE(Slow(sys.argv[1], float(sys.argv[3]) / 1000), sys.argv[2], foreground=True, ro=True)

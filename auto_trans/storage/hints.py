"""What the system is told of a file that is being written, so that it goes faster.

Where the system or the file system does not know of such a thing nothing happens, and nothing is lost but time.
"""

from __future__ import annotations

import ctypes

__all__ = ["reserve", "start_writing_out"]

_FALLOC_FL_KEEP_SIZE = 1  # of linux/falloc.h
_SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h


def reserve(fd: int, nbytes: int) -> None:
    """Reserves the place of a file of at least ``nbytes`` bytes, which stays as long as it is.

    The system finds it at once then, and not page by page. ``os.posix_fallocate`` is not used, for where the file system
    reserves nothing it writes to every block.
    """
    if nbytes:
        _call("fallocate", fd, ctypes.c_int(_FALLOC_FL_KEEP_SIZE), ctypes.c_int64(0), ctypes.c_int64(nbytes))


def start_writing_out(fd: int, offset: int, nbytes: int) -> None:
    """Starts to write out what is dirty in a part of a file, without waiting for it; it stays cached."""
    extent = ctypes.c_int64(offset), ctypes.c_int64(nbytes)
    _call("sync_file_range", fd, *extent, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def _call(name: str, fd: int, *arguments: ctypes._SimpleCData[int]) -> None:
    function = getattr(ctypes.CDLL(None), name, None)  # both are Linux's own
    if function is not None:
        function(fd, *arguments)

"""Has the system write out what a file has in the page cache, before anybody waits for it."""

from __future__ import annotations

import ctypes

__all__ = ["start_writing_out"]

_SYNC_FILE_RANGE_WRITE = 2  # of linux/fs.h


def start_writing_out(fd: int, offset: int, nbytes: int) -> None:
    """Starts to write out what is dirty in a part of a file, without waiting for it; it stays cached.

    Where the system does not offer it, or the file system refuses it, nothing is done: whoever syncs the file waits longer.
    """
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux
    if call is not None:
        call(fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))

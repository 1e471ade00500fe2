"""Temporary files: named after who writes them, so that those of a killed writer can be told from those of a live one."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import xxhash

from auto_trans.process import Process

__all__ = ["SILENT_SECONDS", "sweep", "temporary_name"]

# .{file}.{digest of where the number counts}-{number}-{start} of the writer-{8 digits by chance}.tmp
_NAME = re.compile(r"^\..+\.(?P<space>[0-9a-f]{16})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{8}\.tmp$")

# Seconds without a write before the file of a process on another machine, or of an unknown one, is given up.
SILENT_SECONDS = 24 * 3600.0


def temporary_name(path: Path) -> Path:
    """A new temporary name beside a file, which names this process."""
    writer = Process.current()
    mark = f"{_digest(writer.space)}-{writer.pid}-{writer.started}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}.{mark}.tmp")


def sweep(folders: Iterable[Path]) -> list[Path]:
    """Removes temporary files whose writer is gone, and never those of a live process.

    A process of this machine is gone if no process has its number and start time. Of other machines nothing can be said
    for certain: their files are removed once nobody has written to them for a day and no lock is on them.

    Args:
        folders: Where to look, not below; those that do not exist are passed over.

    Returns:
        What was removed.
    """
    found = itertools.chain.from_iterable(folder.glob(".*.tmp") for folder in folders if folder.is_dir())
    removed = []
    for file in list(found):
        with contextlib.suppress(OSError):
            if _is_abandoned(file):
                file.unlink()
                removed.append(file)
    return removed


def _is_abandoned(file: Path) -> bool:
    match, here = _NAME.match(file.name), Process.current()
    if match and here.space and match["space"] == _digest(here.space):
        return replace(here, pid=int(match["pid"]), started=int(match["started"])).is_dead() and _is_unlocked(file)
    return time.time() - file.stat().st_mtime > SILENT_SECONDS and _is_unlocked(file)


def _digest(space: str) -> str:
    return xxhash.xxh3_64_hexdigest(space.encode())


def _is_unlocked(file: Path) -> bool:
    """Whether nobody holds the lock that a writer takes; a file system without locks does not tell."""
    fd = os.open(file, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(fd)
    return True

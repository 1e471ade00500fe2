"""Temporary files: named after who writes them, so that those of a killed writer can be told from those of a live one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Optional

import xxhash

from auto_trans.process import Process

__all__ = ["SILENT_SECONDS", "find_busy", "lock", "sweep", "temporary_name"]

# .{file}.{digest of where the number counts}-{number}-{start} of the writer-{8 digits by chance}.tmp
_NAME = re.compile(r"^\..+\.(?P<space>[0-9a-f]{16})-(?P<pid>\d+)-(?P<started>\d+)-[0-9a-f]{8}\.tmp$")

# Seconds without a write before the file of a process on another machine is given up.
SILENT_SECONDS = 24 * 3600.0


def temporary_name(path: Path) -> Path:
    """A new temporary name beside a file, which names this process."""
    writer = Process.current()
    mark = f"{_digest(writer.space)}-{writer.pid}-{writer.started}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f".{path.name}.{mark}.tmp")


def lock(fd: int) -> None:
    """Takes the lock by which other machines see that a writer lives, where the file system has locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sweep(folders: Iterable[Path]) -> list[Path]:
    """Removes temporary files whose writer is gone, and never those of a live process.

    A process of this machine is gone if no process has its number and start time. Of other machines nothing can be said
    for certain: their files are removed once nobody has written to them for a day and no lock is on them.

    Args:
        folders: Where to look, not below; those that do not exist are passed over.

    Returns:
        What was removed.
    """
    removed = []
    for folder in folders:
        for match in filter(None, map(_NAME.match, _names(folder))):
            file = folder / match.string
            with contextlib.suppress(OSError):
                if _is_abandoned(file, _writer(match)):
                    file.unlink()
                    removed.append(file)
    return removed


def find_busy(folder: Path) -> Optional[tuple[Path, int]]:
    """A temporary file in a folder, or anywhere below, whose writer surely lives, and the writer's process number.

    A process of this machine lives if one has its number and start time; one of another machine if it holds the lock of
    its file. What was just written tells nothing: a job that was killed is often started again at once.
    """
    for root, _, names in os.walk(folder):
        for match in filter(None, map(_NAME.match, names)):
            file, writer = Path(root, match.string), _writer(match)
            with contextlib.suppress(OSError):
                if (writer is not None and not writer.is_dead()) or not _is_unlocked(file):
                    return file, int(match["pid"])
    return None


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # what cannot be seen cannot be written to, either, and that is told
        return []


def _writer(match: re.Match[str]) -> Optional[Process]:
    """The process of this machine that a temporary name names; None if it is one of another."""
    here = Process.current()
    if not here.space or match["space"] != _digest(here.space):
        return None
    return replace(here, pid=int(match["pid"]), started=int(match["started"]))


def _is_abandoned(file: Path, writer: Optional[Process]) -> bool:
    stat = file.stat()
    # a link to an older file is as old as that, but its state changed when it was made
    silent = time.time() - (stat.st_mtime if stat.st_nlink == 1 else max(stat.st_mtime, stat.st_ctime))
    gone = writer.is_dead() if writer else silent > SILENT_SECONDS
    return gone and _is_unlocked(file)


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

"""What the machine has to offer: memory within all limits, and disk space."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Optional

import psutil

from auto_trans.errors import InsufficientDiskError, InsufficientMemoryError, OutputError
from auto_trans.sizes import format_bytes

__all__ = ["available_memory", "check_disk", "check_memory", "check_slices_fit", "existing_part", "free_disk"]

_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that can be allocated now: of the machine, and of the control group if that allows less."""
    available = int(psutil.virtual_memory().available)
    limits = (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    )
    for limit_file, usage_file, stat_file in limits:
        limit, usage = _number(_CGROUP / limit_file), _number(_CGROUP / usage_file)
        if limit is not None and usage is not None:
            available = min(available, limit - usage + _reclaimable(_CGROUP / stat_file))
    return max(available, 0)


def check_memory(needed: int, processes: int = 1) -> None:
    """Raises InsufficientMemoryError unless ``processes`` converters can have ``needed`` bytes each."""
    available = available_memory()
    if needed * processes > available:
        raise InsufficientMemoryError(
            f"the conversion needs {format_bytes(needed)} of memory in each of {processes} processes on this machine, but "
            f"only {format_bytes(available)} is available; decrease «processes» or «memory_limit»"
        )


def check_slices_fit(nbytes: int, ranks: int = 1) -> None:
    """Checks that the slices of this rank, and as many of each of its neighbours, can be held in memory.

    What is available now is for this rank alone: its neighbours may have taken theirs already.

    Args:
        nbytes: Bytes of the slices.
        ranks: How many ranks are on this machine.

    Raises:
        InsufficientMemoryError: They do not fit.
    """
    for needed, memory, who, what in (
        (nbytes, available_memory(), "this rank take", "is available"),
        (nbytes * ranks, all_memory(), f"the {ranks} ranks of this machine take", "is there"),
    ):
        if needed > memory:
            raise InsufficientMemoryError(
                f"the slices of {who} {format_bytes(needed)} of memory, but only {format_bytes(memory)} {what}; start "
                f"fewer ranks on a machine, or slice the model further"
            )


def all_memory() -> int:
    """Bytes of memory of the machine, or of the control group if that has less."""
    limits = (_number(_CGROUP / name) for name in ("memory.max", "memory/memory.limit_in_bytes"))
    return min([int(psutil.virtual_memory().total), *(limit for limit in limits if limit is not None)])


def free_disk(folder: Path) -> int:
    """Bytes that are free on the file system of a folder, existing or not."""
    return shutil.disk_usage(existing_part(folder)).free


def existing_part(folder: Path) -> Path:
    """The nearest folder above a path, or the path itself, that exists: on the file system where it would be made."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing


def check_disk(folder: Path, needed: int) -> None:
    """Checks that ``needed`` bytes can be written to a folder, existing or not.

    Raises:
        InsufficientDiskError: They do not fit on its file system.
        OutputError: The folder cannot be written to.
    """
    place = existing_part(folder)
    if needed and not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"{place} cannot be written to; set an output directory that is writable («dst»)")
    free = free_disk(folder)
    if needed > free:
        raise InsufficientDiskError(
            f"the converted weights need {format_bytes(needed)} in {folder}, but only {format_bytes(free)} is free there; "
            f"free space or set another output directory («dst»)"
        )


def _number(path: Path) -> Optional[int]:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max"
        return None


def _reclaimable(stat: Path) -> int:
    """Page cache that the kernel takes back before it runs out of memory."""
    try:
        fields = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))

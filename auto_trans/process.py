"""Processes of this and other machines: which one a rank is, and whether it is dead."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

__all__ = ["Process", "parse_fields"]


@dataclass(frozen=True)
class Process:
    """What tells a process from all others.

    Attributes:
        host: Name of its machine, as its user knows it.
        pid: Its number; numbers are used again.
        started: When it started, in ticks since its machine did; the time of day may be set while it runs.
        space: Where the number counts: two machines may have one name, and two containers of one machine count apart.
    """

    host: str
    pid: int
    started: int
    space: str

    @classmethod
    def current(cls) -> Process:
        """This process."""
        state = _state(os.getpid())
        return cls(socket.gethostname(), os.getpid(), state[1] if state else 0, _space())

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> Process:
        """Reads what `to_json` made.

        Raises:
            ValueError: It is something else.
        """
        return cls(**parse_fields(content, "a process", {"host": str, "pid": int, "started": int, "space": str}))

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    def is_dead(self) -> bool:
        """Whether it is known to be gone; of other machines nothing is known."""
        if not self.space or self.space != _space():
            return False
        try:
            state = _state(self.pid)
        except OSError:
            return False
        return state is None or state[0] == "Z" or state[1] != self.started

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}"


def parse_fields(content: Mapping[str, Any], what: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The fields of something that another process has written.

    Args:
        content: What it has written; other fields are passed over.
        what: What the fields describe, for the message.
        kinds: Field -> its type, exactly.

    Raises:
        ValueError: A field is missing, or of another type.
    """
    if any(type(content.get(name)) is not kind for name, kind in kinds.items()):
        raise ValueError(f"{content} does not describe {what}")
    return {name: content[name] for name in kinds}


def _space() -> str:
    """The machine since its start, and the process numbers that count in it; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _state(pid: int) -> Optional[tuple[str, int]]:
    """State and start of a process of this machine, or None if there is none of this number."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # "pid (name) state ppid ...": the name may hold spaces and brackets; the start is the 22nd of all fields
    fields = text.rpartition(")")[2].split()
    return fields[0], int(fields[19])

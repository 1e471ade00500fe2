"""Small files on a shared directory: written atomically, read as they are or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

__all__ = ["read_json", "write_json"]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file so that a reader sees all of it or none. Not synced: it need not outlive the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def read_json(path: Path) -> Optional[dict[str, Any]]:
    """The content of a file, or None while it is not there (or, on some network file systems, not yet whole)."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None

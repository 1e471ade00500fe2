"""What a finished conversion says of itself, and the records by which an interrupted one is resumed.

Every published file gets a record at once; the manifest, written last, gathers them. Both name the digest of the inputs
(source files, strategies, prefix): a file counts as done only for the very same inputs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

from auto_trans.checkpoint.formats import FORMATS
from auto_trans.checkpoint.publish import write_json

__all__ = ["MANIFEST_NAME", "FileRecord", "Manifest"]

MANIFEST_NAME = "auto_trans_manifest.json"
_RECORDS = ".auto_trans_records"
_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """A published target file.

    Attributes:
        rank: Its rank.
        file: Its path relative to the target folder.
        size: Its bytes.
        mtime_ns: Its modification time.
        xxh3_128: Digest of its contents.
    """

    rank: int
    file: str
    size: int
    mtime_ns: int
    xxh3_128: str


class Manifest:
    """The records of a target folder.

    Args:
        folder: The target folder, which holds ``rank_N`` folders.
        inputs: Digest of everything that the target is made from.
        world_size: Number of target ranks.
    """

    def __init__(self, folder: Path, inputs: str, world_size: int) -> None:
        self._folder, self._inputs, self._world_size = folder, inputs, world_size
        self._known = self._read_manifest()

    def done(self, rank: int) -> Optional[FileRecord]:
        """The record of a rank's file, if it was made from the same inputs and is still as it was published."""
        record = self._known.get(rank)
        if record is None:
            content = _load(self._record_path(rank))
            if content.get("inputs") == self._inputs:
                record = FileRecord(**content["file"])
        if record is None:
            return None
        try:
            stat = (self._folder / record.file).stat()
        except OSError:
            return None
        return record if (stat.st_size, stat.st_mtime_ns) == (record.size, record.mtime_ns) else None

    def foreign(self, rank: int) -> Optional[Path]:
        """A checkpoint file in the rank's folder that was not made by this conversion, if there is one."""
        record = self.done(rank)
        ours = self._folder / record.file if record else None
        folder = self._folder / f"rank_{rank}"
        files = [f for f in sorted(folder.iterdir()) if f.suffix[1:] in FORMATS] if folder.is_dir() else []
        return next((file for file in files if file != ours), None)

    def add(self, rank: int, file: Path, digest: str) -> FileRecord:
        """Records a file that has just been published."""
        stat = file.stat()
        record = FileRecord(rank, str(file.relative_to(self._folder)), stat.st_size, stat.st_mtime_ns, digest)
        write_json(self._record_path(rank), {"inputs": self._inputs, "file": asdict(record)})
        return record

    def finish(self) -> bool:
        """Writes the manifest if the files of all ranks are there, and drops the records.

        Returns:
            Whether all ranks' files are there.
        """
        records = [self.done(rank) for rank in range(self._world_size)]
        if not all(records):
            return False
        write_json(
            self._folder / MANIFEST_NAME,
            {
                "version": _VERSION,
                "inputs": self._inputs,
                "world_size": self._world_size,
                "files": [asdict(record) for record in records if record],
            },
        )
        shutil.rmtree(self._folder / _RECORDS, ignore_errors=True)
        return True

    def _record_path(self, rank: int) -> Path:
        return self._folder / _RECORDS / f"rank_{rank}.json"

    def _read_manifest(self) -> dict[int, FileRecord]:
        content = _load(self._folder / MANIFEST_NAME)
        if content.get("version") != _VERSION or content.get("inputs") != self._inputs:
            return {}
        files: Iterable[dict] = content["files"]
        return {record["rank"]: FileRecord(**record) for record in files}


def _load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

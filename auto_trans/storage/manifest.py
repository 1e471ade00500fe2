"""What a finished conversion says of itself, and the records by which an interrupted one is resumed.

Every file that is published is on record; the manifest, written last, gathers the records. Both name the digest of the
inputs (source files, strategies, prefix): a file counts as done only for the very same inputs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

from auto_trans.storage.files import write_json
from auto_trans.storage.formats import FORMATS

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
        self._known: dict[int, set[FileRecord]] = defaultdict(set)
        self.refresh()

    def refresh(self) -> None:
        """Reads what is recorded now, by other processes, too."""
        for path in (self._folder / MANIFEST_NAME, *sorted((self._folder / _RECORDS).glob("*.json"))):
            content = _load(path)
            if content.get("version") == _VERSION and content.get("inputs") == self._inputs:
                self._add(FileRecord(**file) for file in content["files"])

    def done(self, rank: int) -> Optional[FileRecord]:
        """The record of a rank's file, if it was made from the same inputs and is still as it was published."""
        for record in self._known.get(rank, ()):
            with contextlib.suppress(OSError):
                stat = (self._folder / record.file).stat()
                if (stat.st_size, stat.st_mtime_ns) == (record.size, record.mtime_ns):
                    return record
        return None

    def foreign(self, rank: int) -> Optional[Path]:
        """A checkpoint file in the rank's folder that was not made by this conversion, if there is one."""
        record = self.done(rank)
        ours = self._folder / record.file if record else None
        folder = self._folder / f"rank_{rank}"
        files = [f for f in sorted(folder.iterdir()) if f.suffix[1:] in FORMATS] if folder.is_dir() else []
        return next((file for file in files if file != ours), None)

    @contextlib.contextmanager
    def adding(self, records: Sequence[FileRecord]) -> Iterator[None]:
        """Records files that are published meanwhile.

        They are on record before they bear their names: whenever the process is killed, each is known if it is there.
        """
        name = f"rank_{records[0].rank}.json"
        pending = self._folder / _RECORDS / f"pending_{name}"
        write_json(pending, self._content(records))
        yield
        with contextlib.suppress(FileNotFoundError):  # these were the last, and another process has finished meanwhile
            pending.replace(pending.with_name(name))
        self._add(records)

    def finish(self) -> bool:
        """Writes the manifest if the files of all ranks are there, and drops the records.

        Returns:
            Whether all ranks' files are there.
        """
        self.refresh()
        records = []
        for rank in range(self._world_size):
            record = self.done(rank)
            if record is None:  # of thousands of files not one more is looked at
                return False
            records.append(record)
        write_json(self._folder / MANIFEST_NAME, {"world_size": self._world_size, **self._content(records)})
        shutil.rmtree(self._folder / _RECORDS, ignore_errors=True)
        return True

    def _add(self, records: Iterable[FileRecord]) -> None:
        for record in records:
            self._known[record.rank].add(record)

    def _content(self, records: Sequence[FileRecord]) -> dict[str, Any]:
        return {"version": _VERSION, "inputs": self._inputs, "files": [asdict(record) for record in records]}


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}

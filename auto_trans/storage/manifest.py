"""What a finished conversion says of itself, and the records by which an interrupted one is resumed.

Every file that is published is on record; the manifest, written last, gathers the records. Both name the digest of the
request that they were made for: a file counts as done only for the very same request. Both tell where the files were not
synced, so that a power loss may have damaged what they vouch for: nobody who promises more than that believes them.
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

from auto_trans.errors import OutputExistsError
from auto_trans.process import Process
from auto_trans.storage.files import write_json, write_new

__all__ = ["MANIFEST_NAME", "RECORDS_NAME", "FileRecord", "Manifest", "read_manifest", "read_records"]

MANIFEST_NAME = "auto_trans_manifest.json"
RECORDS_NAME = ".auto_trans_records"
_VERSION = 2
_CLAIM = "claim"
_TRIES = 5
_PENDING = "pending_"


@dataclass(frozen=True)
class FileRecord:
    """A published target file.

    Attributes:
        rank: Its rank; 0 for a complete checkpoint.
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
        folder: The target folder.
        request: Digest of everything that the target is made from.
        world_size: Number of target ranks.
        durable: Whether the files are synced; if so, records of files that were not are not believed.
    """

    def __init__(self, folder: Path, request: str, world_size: int, *, durable: bool = True) -> None:
        self._folder, self._request, self._world_size, self._durable = folder, request, world_size, durable
        self._known: dict[str, set[FileRecord]] = defaultdict(set)
        self.refresh()

    def refresh(self) -> None:
        """Reads what is recorded now, by other processes, too."""
        for path in (self._folder / MANIFEST_NAME, *sorted((self._folder / RECORDS_NAME).glob("*.json"))):
            content = _load(path)
            kept = content.get("durable", True) is True or not self._durable
            if kept and content.get("version") == _VERSION and content.get("request") == self._request:
                self._add(_parse(content) or ())

    def rival(self) -> str:
        """What else was made, or is being made, in the folder; empty if nothing is."""
        finished = _load(self._folder / MANIFEST_NAME)
        if finished and finished.get("request") != self._request:
            return f"a finished conversion of something else ({MANIFEST_NAME})"
        records = sorted((self._folder / RECORDS_NAME).glob("*.json"))
        if records and _load(records[0]).get("request", self._request) != self._request:
            return "files of a conversion of something else, which is not finished"
        claim = _load(self._folder / RECORDS_NAME / _CLAIM)
        if not claim or claim.get("request") == self._request:
            return ""
        return "" if self._is_abandoned(claim) else f"a conversion of something else, begun by {claim.get('by')}"

    def claim(self) -> None:
        """Takes the folder for this request, for all processes that work on it, until it is finished.

        Raises:
            OutputExistsError: It is taken for another.
        """
        path = self._folder / RECORDS_NAME / _CLAIM
        for _ in range(_TRIES):
            rival = self.rival()
            if rival:
                raise OutputExistsError(
                    f"{self._folder} holds {rival}; give another target folder («dst»), or remove it"
                )
            if _load(path).get("request") == self._request:
                return
            path.unlink(missing_ok=True)  # of one that was given up before it had made anything
            process = Process.current()
            content = {"version": _VERSION, "request": self._request, "by": str(process), "process": process.to_json()}
            if write_new(path, json.dumps(content).encode()):
                continue  # look once more: another may have finished meanwhile
        raise OutputExistsError(
            f"{self._folder} is wanted by several conversions at once; start them one after the other"
        )

    def give_up(self) -> None:
        """Lets the folder go if this process took it and nothing was made."""
        records = self._folder / RECORDS_NAME
        claim = records / _CLAIM
        if _load(claim).get("process") == Process.current().to_json() and not any(records.glob("*.json")):
            with contextlib.suppress(OSError):
                claim.unlink()
                records.rmdir()

    def _is_abandoned(self, claim: dict[str, Any]) -> bool:
        """Whether the process of a claim is gone and has left nothing."""
        try:
            is_dead = Process.parse(claim.get("process", {})).is_dead()
        except ValueError:
            is_dead = True
        return is_dead and not any((self._folder / RECORDS_NAME).glob("*.json"))

    def done(self, file: str) -> Optional[FileRecord]:
        """The record of a file, if it was made for the same request and is still as it was published."""
        for record in self._known.get(file, ()):
            with contextlib.suppress(OSError):
                stat = (self._folder / file).stat()
                if (stat.st_size, stat.st_mtime_ns) == (record.size, record.mtime_ns):
                    return record
        return None

    @contextlib.contextmanager
    def adding(self, records: Sequence[FileRecord]) -> Iterator[None]:
        """Records files that are published meanwhile.

        They are on record before they bear their names: whenever the process is killed, each is known if it is there.
        """
        name = f"{records[0].file.replace('/', '_')}.json"
        pending = self._folder / RECORDS_NAME / f"{_PENDING}{name}"
        write_json(pending, self._content(records), durable=self._durable)
        yield
        with contextlib.suppress(FileNotFoundError):  # these were the last, and another process has finished meanwhile
            pending.replace(pending.with_name(name))
        self._add(records)

    def finish(self, files: Iterable[str]) -> bool:
        """Writes the manifest if all files of the target are there, and drops the records.

        Returns:
            Whether all are there.
        """
        self.refresh()
        records = []
        for file in files:
            record = self.done(file)
            if record is None:  # of thousands of files not one more is looked at
                return False
            records.append(record)
        content = {"world_size": self._world_size, **self._content(records)}
        write_json(self._folder / MANIFEST_NAME, content, durable=self._durable)
        shutil.rmtree(self._folder / RECORDS_NAME, ignore_errors=True)
        return True

    def _add(self, records: Iterable[FileRecord]) -> None:
        for record in records:
            self._known[record.file].add(record)

    def _content(self, records: Sequence[FileRecord]) -> dict[str, Any]:
        kept = {} if self._durable else {"durable": False}
        return {"version": _VERSION, "request": self._request, **kept, "files": [asdict(record) for record in records]}


def read_manifest(folder: Path) -> Optional[list[FileRecord]]:
    """The records of a finished conversion, or None where the folder has no manifest that can be read."""
    return _parse(_load(folder / MANIFEST_NAME))


def read_records(folder: Path) -> list[FileRecord]:
    """The records of a conversion that is not finished, of which a folder has several if it was started with others.

    A file that was about to be published when the process was killed is on record only if it is there.
    """
    records: dict[FileRecord, None] = {}
    for path in sorted((folder / RECORDS_NAME).glob("*.json")):
        content = _load(path)
        for record in (_parse(content) or ()) if content.get("version") == _VERSION else ():
            if not path.name.startswith(_PENDING) or (folder / record.file).exists():
                records[record] = None
    return sorted(records, key=lambda record: (record.rank, record.file))


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _parse(content: dict[str, Any]) -> Optional[list[FileRecord]]:
    """The records in a file; None where it is damaged: as if it were not there."""
    kinds = {"rank": int, "file": str, "size": int, "mtime_ns": int, "xxh3_128": str}
    try:
        records = [FileRecord(**file) for file in content["files"]]
    except (KeyError, TypeError):
        return None
    valid = all(type(getattr(record, name)) is kind for record in records for name, kind in kinds.items())
    return records if valid else None

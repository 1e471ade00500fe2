"""The folder that gets the files of a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Optional

from auto_trans.errors import OutputExistsError
from auto_trans.storage.files import NewFile, replicate
from auto_trans.storage.formats import Format
from auto_trans.storage.manifest import FileRecord, Manifest
from auto_trans.storage.sources import rank_file

__all__ = ["TargetFolder"]


class TargetFolder:
    """Knows what is there already, publishes files and replicates them for ranks with equal contents.

    Args:
        path: The folder; gets ``rank_N/{prefix}N.ckpt``.
        prefix: Beginning of the files' names.
        format: Format of the files.
        inputs: Digest of everything that they are made from.
        world_size: Number of target ranks.
        reuse: Keep files that are there already and were made from the same inputs.
    """

    def __init__(
        self, path: Path, prefix: str, format: Format, inputs: str, world_size: int, *, reuse: bool = True
    ) -> None:
        self.path, self._prefix, self._suffix, self._reuse = path, prefix, format.suffix, reuse
        self.manifest = Manifest(path, inputs, world_size)

    def file(self, rank: int) -> Path:
        """Where the file of a rank goes."""
        return rank_file(self.path, self._prefix, rank, self._suffix)

    def done(self, rank: int) -> Optional[FileRecord]:
        """The record of a rank's file that is there already and is kept."""
        return self.manifest.done(rank) if self._reuse else None

    def check_not_foreign(self, rank: int) -> None:
        """Raises OutputExistsError if a rank has a file that was not made from the same inputs."""
        foreign = self.manifest.foreign(rank)
        if foreign is not None:
            raise OutputExistsError(
                f"{foreign} is there already and was not made by this conversion; it is not overwritten: give another "
                f"target folder, or remove it"
            )

    def publish(self, out: NewFile, ranks: Sequence[int]) -> list[FileRecord]:
        """Syncs a file that is written and names it as the first rank's; the other ranks get replicas.

        Returns:
            The records of the ranks' files.
        """
        with out:
            stat = out.sync()
            first = FileRecord(ranks[0], self._name(ranks[0]), stat.st_size, stat.st_mtime_ns, out.digest)
            records = self._records(first, ranks)
            with self.manifest.adding(records):
                out.publish()
                self._replicate(first, ranks[1:])
        return records

    def replicate(self, original: FileRecord, ranks: Sequence[int]) -> list[FileRecord]:
        """Makes the files of ranks the same as one that is published.

        Returns:
            The records of the ranks' files.
        """
        records = self._records(original, ranks)
        with self.manifest.adding(records):
            self._replicate(original, ranks)
        return records

    def _replicate(self, original: FileRecord, ranks: Sequence[int]) -> None:
        for rank in ranks:
            replicate(self.path / original.file, self.file(rank))

    def _records(self, original: FileRecord, ranks: Sequence[int]) -> list[FileRecord]:
        return [replace(original, rank=rank, file=self._name(rank)) for rank in ranks]

    def _name(self, rank: int) -> str:
        return str(self.file(rank).relative_to(self.path))

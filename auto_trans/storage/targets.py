"""Where the files of a conversion go: rank folders, or a complete set of safetensors files with its indices.

A target knows the names of the files of a plan, what is there already, and how files are published, replicated and
finished. It is picklable: worker processes write to the same target.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Optional

from auto_trans.core.plan import FilePlan, Plan, TensorPlan
from auto_trans.errors import OutputError, OutputExistsError
from auto_trans.storage.files import NewFile, replicate, write_json
from auto_trans.storage.formats import FORMATS, Format, encoded_size
from auto_trans.storage.manifest import MANIFEST_NAME, RECORDS_NAME, FileRecord, Manifest
from auto_trans.storage.names import HYPER_PARAMETERS, INDEX_NAMES, RANK_FOLDER, rank_file
from auto_trans.storage.temporary import sweep

__all__ = ["RankFolders", "SafetensorsSet", "Target", "contents", "refuse"]


class Target(ABC):
    """A folder that gets the files of a conversion.

    A conversion calls, in this order: `arrange` and `check`, which write nothing; `begin`; for every file `done`, and `open`
    and `publish` or `replicate`; and in the end `finish`, whichever of several processes comes last.

    Args:
        folder: The folder.
        format: Format of the files.
        request: Digest of everything that they are made from.
        world_size: Number of target ranks.
        reuse: Keep files that are there already and were made for the same request.
        durable: Whether files must be on the disk before they get their names.
    """

    def __init__(
        self, folder: Path, format: Format, request: str, world_size: int, *, reuse: bool = True, durable: bool = True
    ) -> None:
        self.folder, self.format = folder, format
        self._reuse, self._durable = reuse, durable
        self._manifest = Manifest(folder, request, world_size, durable=durable)

    @abstractmethod
    def arrange(self, plan: Plan) -> tuple[FilePlan, ...]:
        """The files of a plan as this target has them."""

    @abstractmethod
    def name(self, rank: int, part: int) -> str:
        """Name of a file, relative to the folder."""

    @abstractmethod
    def check(self, files: Iterable[FilePlan]) -> None:
        """Raises OutputExistsError if a file is there that was not made for this request."""

    @abstractmethod
    def finish(self) -> bool:
        """Marks the target as finished if all of its files are there; returns whether they are."""

    @abstractmethod
    def folders(self, files: Iterable[FilePlan]) -> set[Path]:
        """The folders that files go to."""

    def names(self, file: FilePlan) -> list[str]:
        """Names of a file and its replicas, relative to the folder."""
        return [self.name(rank, file.part) for rank in file.ranks]

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return self.folder / name

    def size(self, file: FilePlan) -> int:
        """Bytes of a file."""
        return encoded_size(self.format, file.tensors)

    def begin(self, files: Iterable[FilePlan]) -> None:
        """Takes the folder for this request, removes what killed conversions left, and looks at what is there.

        Raises:
            OutputExistsError: The folder is taken for something else.
        """
        self._manifest.claim()
        sweep({self.folder, self.folder / RECORDS_NAME, *self.folders(files)})
        self._manifest.refresh()

    def give_up(self) -> None:
        """Lets the folder go if nothing was made."""
        self._manifest.give_up()

    def done(self, rank: int, part: int = 0) -> Optional[FileRecord]:
        """The record of a file that is there already and is kept."""
        return self._manifest.done(self.name(rank, part)) if self._reuse else None

    def open(self, file: FilePlan) -> NewFile:
        """A new file for the first of the ranks of a plan."""
        path = self.path(self.name(file.ranks[0], file.part))
        return NewFile(path, durable=self._durable, least_bytes=file.nbytes)

    def publish(self, out: NewFile, file: FilePlan) -> list[FileRecord]:
        """Names a file that is written as the first rank's, synced if it is to be durable; the other ranks get replicas.

        Returns:
            The records of the ranks' files.
        """
        with out:
            stat = out.sync()
            rank = file.ranks[0]
            first = FileRecord(rank, self.name(rank, file.part), stat.st_size, stat.st_mtime_ns, out.digest)
            records = self._records(first, file)
            with self._manifest.adding(records):
                out.publish()
                self._replicate(first, records[1:])
        return records

    def replicate(self, original: FileRecord, file: FilePlan) -> list[FileRecord]:
        """Makes the files of the ranks of a plan the same as one that is published.

        Returns:
            The records of the ranks' files.
        """
        records = self._records(original, file)
        with self._manifest.adding(records):
            self._replicate(original, records)
        return records

    def _refuse_rival(self) -> None:
        rival = self._manifest.rival()
        if rival:
            raise OutputExistsError(f"{self.folder} holds {rival}; give another target folder («dst»), or remove it")

    def _replicate(self, original: FileRecord, replicas: Iterable[FileRecord]) -> None:
        for replica in replicas:
            replicate(self.path(original.file), self.path(replica.file), durable=self._durable)

    def _records(self, original: FileRecord, file: FilePlan) -> list[FileRecord]:
        return [replace(original, rank=rank, file=self.name(rank, file.part)) for rank in file.ranks]


class RankFolders(Target):
    """``rank_N/{prefix}N.ckpt``, a file for every rank.

    Args:
        folder: The folder.
        format: Format of the files.
        request: Digest of everything that they are made from.
        world_size: Number of target ranks.
        prefix: Beginning of the files' names.
        reuse: Keep files that are there already and were made for the same request.
        durable: Whether files must be on the disk before they get their names.
    """

    def __init__(
        self,
        folder: Path,
        format: Format,
        request: str,
        world_size: int,
        *,
        prefix: str,
        reuse: bool = True,
        durable: bool = True,
    ) -> None:
        super().__init__(folder, format, request, world_size, reuse=reuse, durable=durable)
        self._prefix, self._world_size = prefix, world_size

    def arrange(self, plan: Plan) -> tuple[FilePlan, ...]:
        """One file for every rank, see `Target`."""
        return plan.files

    def name(self, rank: int, part: int = 0) -> str:
        """Name of a rank's file, see `Target`."""
        return str(rank_file(Path(), self._prefix, rank, self.format.suffix))

    def folders(self, files: Iterable[FilePlan]) -> set[Path]:
        """The rank folders, see `Target`."""
        return {self.folder / f"rank_{rank}" for file in files for rank in file.ranks}

    def check(self, files: Iterable[FilePlan]) -> None:
        """Refuses other checkpoint files in the rank folders, and rank folders of a larger job, see `Target`."""
        for file in files:
            for rank in file.ranks:
                record = self._manifest.done(self.name(rank))
                ours = self.path(record.file) if record else None
                there = contents(self.folder / f"rank_{rank}")
                refuse(next((f for f in there if f.suffix[1:] in FORMATS and f != ours), None))
        for child in contents(self.folder):
            found = RANK_FOLDER.match(child.name)
            if found and int(found[1]) >= self._world_size:
                refuse(next((f for f in contents(child) if f.suffix[1:] in FORMATS), None))
        self._refuse_rival()

    def finish(self) -> bool:
        """Writes the manifest, see `Target`."""
        return self._manifest.finish(self.name(rank) for rank in range(self._world_size))


class SafetensorsSet(Target):
    """``model-00001-of-0000K.safetensors`` with the indices of HuggingFace and MindSpore: one complete checkpoint.

    What no strategy lists goes to ``hyper_param.safetensors``, as MindFormers has it.

    Args:
        folder: The folder.
        request: Digest of everything that the files are made from.
        shard_size: Largest bytes of tensors in a file; a single larger one gets a file of its own.
        reuse: Keep files that are there already and were made for the same request.
        durable: Whether files must be on the disk before they get their names.
    """

    def __init__(
        self, folder: Path, request: str, *, shard_size: int, reuse: bool = True, durable: bool = True
    ) -> None:
        super().__init__(folder, FORMATS["safetensors"], request, 1, reuse=reuse, durable=durable)
        self._shard_size = shard_size
        self._names: list[str] = []
        self._weight_map: dict[str, str] = {}
        self._total_size = 0

    @property
    def weight_map(self) -> dict[str, str]:
        """Parameter -> the file that holds it."""
        return self._weight_map

    @property
    def total_size(self) -> int:
        """Bytes of the parameters in the index."""
        return self._total_size

    def arrange(self, plan: Plan) -> tuple[FilePlan, ...]:
        """Splits the one file of a complete checkpoint by size, see `Target`."""
        carried = set(plan.carried)
        tensors = plan.files[0].tensors
        shards = self._split([tensor for tensor in tensors if tensor.name not in carried])
        hyper = [tensor for tensor in tensors if tensor.name in carried]
        self._names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        self._weight_map = {tensor.name: name for name, shard in zip(self._names, shards) for tensor in shard}
        self._total_size = sum(tensor.nbytes for shard in shards for tensor in shard)
        if hyper:
            self._names.append(HYPER_PARAMETERS)
            shards.append(hyper)
        return tuple(FilePlan((0,), tuple(shard), part) for part, shard in enumerate(shards))

    def name(self, rank: int, part: int) -> str:
        """Name of a part of the set, see `Target`."""
        return self._names[part]

    def folders(self, files: Iterable[FilePlan]) -> set[Path]:
        """The folder itself, see `Target`."""
        return {self.folder}

    def check(self, files: Iterable[FilePlan]) -> None:
        """Refuses whatever else lies in the folder, see `Target`; what other converters write is theirs to check."""
        there = contents(self.folder)
        self._manifest.refresh()  # only now: others publish meanwhile
        done = {name for name in self._names if self._manifest.done(name)}
        theirs = set(self._names) - {name for file in files for name in self.names(file)}
        ours = {*done, *theirs, *((MANIFEST_NAME, *INDEX_NAMES) if done else ())}
        refuse(next((file for file in there if file.name not in ours and not file.name.startswith(".")), None))
        self._refuse_rival()

    def finish(self) -> bool:
        """Writes the indices and the manifest, last: they tell that the set is complete. See `Target`."""
        self._manifest.refresh()
        if not all(self._manifest.done(name) for name in self._names):
            return False
        for name in INDEX_NAMES:
            index = {"metadata": {"total_size": self._total_size}, "weight_map": self._weight_map}
            write_json(self.folder / name, index, durable=self._durable)
        return self._manifest.finish(self._names)

    def _split(self, tensors: Sequence[TensorPlan]) -> list[list[TensorPlan]]:
        """The tensors by file, in their order."""
        shards: list[list[TensorPlan]] = []
        room = 0
        for tensor in tensors:
            if not shards or tensor.nbytes > room:
                shards.append([])
                room = self._shard_size
            shards[-1].append(tensor)
            room -= tensor.nbytes
        return shards


def contents(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where it is yet to be made."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except NotADirectoryError as e:
        file = next(path for path in (folder, *folder.parents) if path.exists())
        raise OutputError(f"{file} is a file and no folder; set an output directory that is writable («dst»)") from e
    except OSError as e:
        raise OutputError(
            f"{folder} cannot be read: {e}; set an output directory that is readable and writable («dst»)"
        ) from e


def refuse(file: Optional[Path]) -> None:
    """Raises OutputExistsError for a file, if there is one, that was not made for this request."""
    if file is not None:
        raise OutputExistsError(
            f"{file} is there already and was not made by this conversion (of the same source in the same state, with the "
            f"same strategies and settings); it is not overwritten: give another target folder («dst»), or remove it"
        )

"""The use case beside conversion: the slices of one rank are assembled in memory, and nothing is written.

Of the source only what the rank needs is read, each byte once, straight to where it stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np

from auto_trans.core.plan import FilePlan, TensorPlan
from auto_trans.core.rules import some
from auto_trans.core.strategy import Strategy
from auto_trans.core.tensor import ITEM_BYTES, Shape
from auto_trans.engine.base import Progress
from auto_trans.engine.gather import Gatherer
from auto_trans.errors import PlanError
from auto_trans.planned import Planned
from auto_trans.sizes import format_bytes, plural
from auto_trans.storage.checkpoint import Checkpoint
from auto_trans.storage.readers import open_reader

__all__ = ["LoadReport", "Loaded", "Names", "assemble", "file_of_rank", "find_file"]

_BUFFER_BYTES = 1024 * 1024
_SLAB_BYTES = 32 * 1024 * 1024
_KEPT_SLAB_BYTES = 512 * 1024 * 1024
_ALIGNED_BYTES = 64  # as kernels like to have arrays


class Loaded(NamedTuple):
    """A slice of a parameter in memory.

    Attributes:
        name: The parameter.
        dtype: MindSpore's name of its type, e.g. ``BFloat16``.
        shape: Shape of the slice; of what cannot be sliced (strings, packed integers) the dims under which it was stored.
        data: Its bytes, an array of uint8.
    """

    name: str
    dtype: str
    shape: Shape
    data: np.ndarray


@dataclass(frozen=True)
class Names:
    """Which parameters are loaded: all, unless something is given.

    Attributes:
        names: These.
        only: Those whose names begin with one of these.
        skip: Those whose names do not begin with one of these.
    """

    names: Optional[frozenset[str]] = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def choose(self, tensors: Iterable[TensorPlan]) -> list[TensorPlan]:
        """Those of a rank's parameters that are loaded.

        Raises:
            PlanError: One that is asked for is not there, or none is left.
        """
        held = {tensor.name: tensor for tensor in tensors}
        missing = sorted((self.names or frozenset()) - held.keys())
        if missing:
            raise PlanError(
                f"parameter {some(missing)} is asked for (names), but the rank has none of that name; it has {some(held)}"
            )
        chosen = [tensor for name, tensor in held.items() if self._takes(name)]
        if not chosen:
            raise PlanError(
                f"no parameter is left to load: the rank has {some(held)}; change names, only_prefix or skip_prefix"
            )
        return chosen

    def _takes(self, name: str) -> bool:
        listed = self.names is None or name in self.names
        return listed and (not self.only or name.startswith(self.only)) and not name.startswith(self.skip)


@dataclass(frozen=True)
class LoadReport:
    """What a rank has loaded.

    Attributes:
        parameters: How many parameters.
        nbytes: Their bytes.
        files: How many source files it has read from.
        seconds: Wall time.
    """

    parameters: int
    nbytes: int
    files: int
    seconds: float

    def __str__(self) -> str:
        rate = format_bytes(int(self.nbytes / max(self.seconds, 1e-3)))
        return (
            f"{plural(self.parameters, 'parameter')}, {format_bytes(self.nbytes)}, of {plural(self.files, 'file')} in "
            f"{self.seconds:.1f} s ({rate}/s)"
        )


def file_of_rank(planned: Planned, rank: int) -> FilePlan:
    """What a plan gives a target rank."""
    return next(file for file in planned.plan.files if rank in file.ranks)


def assemble(
    tensors: Sequence[TensorPlan], progress: Optional[Progress] = None, *, keep: bool = True
) -> Iterator[Loaded]:
    """Reads the slices of a rank, one after the other, in the order in which they are given.

    Args:
        tensors: The slices.
        progress: Told of the bytes of each.
        keep: Whether all will be held at once; else the memory of each can soon be given back.

    Yields:
        The slices; each is the caller's to keep, or to let go before the next is read.

    Raises:
        CheckpointError: A source file cannot be read.
        SourceChangedError: A source file was written to since its head was read. What was yielded before may be of either
            state.
    """
    with Gatherer(_BUFFER_BYTES, partial(open_reader, mapped=False)) as gatherer:
        files, memory = {}, _Slabs([tensor.nbytes for tensor in tensors], _KEPT_SLAB_BYTES if keep else _SLAB_BYTES)
        for tensor in tensors:
            data = memory.take(tensor.nbytes)
            gatherer.fill(tensor, data)
            files.update({copy.shard.file.path: copy.shard.file for copy in tensor.copies})
            shape = tensor.shape if tensor.dtype in ITEM_BYTES else tensor.dims
            loaded = Loaded(tensor.name, tensor.dtype, shape, data)
            del data  # what is yielded is the caller's alone
            yield loaded
            del loaded
            if progress is not None:
                progress(tensor.nbytes)
        gatherer.check_unchanged(list(files.values()))


def find_file(path: Path) -> list[TensorPlan]:
    """What a file holds, to be read as it is: that of one rank, or complete weights.

    Raises:
        CheckpointError: It cannot be read.
    """
    whole = Strategy.complete()
    planned = Planned(Checkpoint(path.stem, path, {0: (path,)}, distributed=False), whole, whole)
    return list(file_of_rank(planned, 0).tensors)


class _Slabs:
    """Memory for slices, cut from pieces that are large enough for huge pages.

    To touch fresh memory in small pages costs more than to fill it. A slab is given back once nothing of it is held. Of the
    last huge page of each a part is for nothing, so there should be few.

    Args:
        sizes: Bytes of all slices.
        slab_bytes: Bytes of a slab; what is larger gets one of its own.
    """

    def __init__(self, sizes: Iterable[int], slab_bytes: int) -> None:
        self._left, self._slab_bytes = sum(map(_padded, sizes)), slab_bytes
        self._rest = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """An array of uint8 whose contents are anything."""
        padded = _padded(nbytes)
        if padded > self._slab_bytes:
            self._left -= padded
            return _aligned(nbytes)
        if padded > self._rest.nbytes:
            del self._rest  # of which nothing may be held any more
            self._rest = _aligned(min(self._slab_bytes, self._left))
        self._left -= padded
        taken, self._rest = self._rest[:nbytes], self._rest[padded:]
        return taken


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES


def _aligned(nbytes: int) -> np.ndarray:
    memory = np.empty(nbytes + _ALIGNED_BYTES, np.uint8)
    begin = -memory.ctypes.data % _ALIGNED_BYTES
    return memory[begin : begin + nbytes]

"""What has to be copied where: a plan is data, made in `auto_trans.core.planning` and carried out by an engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Optional

from auto_trans.core.tensor import Box, Shape, Shard, SourceFile, Tensor

__all__ = ["Addition", "Copy", "FilePlan", "Plan", "TensorPlan"]


class Copy(NamedTuple):
    """A box of a shard that goes to a box of a target slice. A tuple, for a plan may hold millions.

    Attributes:
        shard: What is copied from.
        start: Where the box begins in the shard, in elements per dimension.
        box: Where it goes: its box in the target slice, of the same size.
    """

    shard: Shard
    start: Shape
    box: Box


class TensorPlan(NamedTuple):
    """A slice of a target tensor and the copies that make it up; they cover it exactly once. A tuple, as a copy is.

    Attributes:
        tensor: The full target tensor.
        box: The slice of it.
        copies: What it is copied from.
        added: What is added to it on the way.
    """

    tensor: Tensor
    box: Box
    copies: tuple[Copy, ...]
    added: Optional[Addition] = None

    @property
    def name(self) -> str:
        """The parameter."""
        return self.tensor.name

    @property
    def dtype(self) -> str:
        """MindSpore's name of its type."""
        return self.tensor.dtype

    @property
    def shape(self) -> Shape:
        """Shape of the slice."""
        return self.box.size

    @property
    def dims(self) -> Shape:
        """The dims under which a file stores the slice."""
        return self.tensor.dims(self.box)

    @property
    def nbytes(self) -> int:
        """Bytes of the slice."""
        return self.tensor.nbytes(self.box)


@dataclass(frozen=True)
class Addition:
    """What is added to a matrix W [out, in]: (B [out, r] @ A [r, in]) * scaling.

    Attributes:
        a: The whole of A.
        b: The whole of B.
        scaling: The factor.
    """

    a: TensorPlan
    b: TensorPlan
    scaling: float


@dataclass(frozen=True)
class FilePlan:
    """The contents of a target file.

    Attributes:
        ranks: The target ranks with these contents (replicas).
        tensors: What it holds, in order.
        part: Which of several files of a complete checkpoint this is, from 0.
    """

    ranks: tuple[int, ...]
    tensors: tuple[TensorPlan, ...]
    part: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def shards(self) -> Iterator[Shard]:
        """Everything that is read for it, in order; a shard may come more than once."""
        for tensor in self.tensors:
            yield from (copy.shard for copy in tensor.copies)
            if tensor.added is not None:
                for matrix in (tensor.added.a, tensor.added.b):
                    yield from (copy.shard for copy in matrix.copies)


@dataclass(frozen=True)
class Plan:
    """A whole conversion.

    Attributes:
        files: The distinct target files.
        carried: Parameters that no strategy lists; every rank gets them as they are.
        absent: Parameters that the target lists and the source does not hold.
        dropped: Optimizer state that the target, which has no optimizer, does not take.
        warnings: What a user should know, as sentences.
        replicated: Pairs of shards that must hold the same bytes, or what no strategy lists is sliced after all.
        replicas: All ranks of the target, planned or not, by equal contents.
    """

    files: tuple[FilePlan, ...]
    carried: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    replicated: tuple[tuple[Shard, Shard], ...] = ()
    replicas: tuple[tuple[int, ...], ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of tensors to be written, replicas counted once."""
        return sum(file.nbytes for file in self.files)

    @property
    def ranks(self) -> list[int]:
        """The target ranks that are planned, in ascending order."""
        return sorted({rank for file in self.files for rank in file.ranks})

    @property
    def source_files(self) -> list[SourceFile]:
        """The source files that are read, by rank and path."""
        found = {shard.file.path: shard.file for file in self.files for shard in file.shards}
        return sorted(found.values(), key=lambda file: (file.rank, file.path))

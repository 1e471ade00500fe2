"""Checks converted weights: by the digests of the manifest, and byte by byte against the source.

The comparison with the source takes another path than the conversion: it does not know plans. For every part of a target
slice it asks each source rank in turn which box of the full tensor it holds, reads the file (not a mapping of it), and
compares what both hold.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Optional

import numpy as np
import xxhash

from auto_trans.core.layout import Box, Layout, Shape, split_box
from auto_trans.core.strategy import Strategy
from auto_trans.errors import CheckpointNotFoundError, LayoutError
from auto_trans.storage.formats import scan
from auto_trans.storage.formats.index import CheckpointIndex, StoredTensor
from auto_trans.storage.manifest import MANIFEST_NAME
from auto_trans.storage.sources import SourceCheckpoint, find_checkpoints

__all__ = ["Difference", "verify_against", "verify_digests"]

_READ_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Difference:
    """Something that is not as it should be.

    Attributes:
        rank: The target rank.
        file: Its file.
        parameter: The parameter, or "" where the whole file is concerned.
        what: What is wrong.
    """

    rank: int
    file: str
    parameter: str
    what: str

    def __str__(self) -> str:
        parameter = f", parameter {self.parameter}" if self.parameter else ""
        return f"rank {self.rank}, {self.file}{parameter}: {self.what}"


def verify_digests(folder: Path) -> list[Difference]:
    """Compares the files of a finished conversion with the digests in its manifest.

    Raises:
        CheckpointNotFoundError: The folder has no manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointNotFoundError(
            f"{folder} has no readable {MANIFEST_NAME} ({e}): the conversion was not finished, or not made by auto_trans; "
            f"compare it with its source instead (--against)"
        ) from e
    differences = []
    for record in manifest["files"]:
        path = folder / record["file"]
        if not path.is_file():
            differences.append(Difference(record["rank"], str(path), "", "is missing"))
        elif _digest(path) != record["xxh3_128"]:
            differences.append(Difference(record["rank"], str(path), "", "differs from its digest in the manifest"))
    return differences


def verify_against(
    folder: Path,
    original: SourceCheckpoint,
    source: Strategy,
    target: Strategy,
    *,
    ranks: Optional[Sequence[int]] = None,
    limit: int = 20,
) -> tuple[list[Difference], int]:
    """Compares every byte of converted weights with their source.

    Args:
        folder: The converted weights: ``rank_N`` folders.
        original: The source.
        source: Strategy of the source.
        target: Strategy of the converted weights.
        ranks: The target ranks to compare; all by default.
        limit: After how many differences to stop.

    Returns:
        The differences, and the number of bytes compared.
    """
    (made,) = find_checkpoints(folder)
    sources = {rank: _Reader(scan(file)) for rank, file in original.files.items()}
    differences: list[Difference] = []
    compared = 0
    for rank in range(target.world_size) if ranks is None else ranks:
        if rank not in made.files:
            differences.append(Difference(rank, str(folder / f"rank_{rank}"), "", "is missing"))
            continue
        reader = _Reader(scan(made.files[rank]))
        for name, tensor in reader.index.tensors.items():
            layout = target.layout(name, target.stage_of(rank)) or Layout.complete(target.stage_devices)
            what = _compare(name, tensor, reader, layout, rank % target.stage_devices, sources, source)
            compared += tensor.nbytes
            if what:
                differences.append(Difference(rank, str(made.files[rank]), name, what))
                if len(differences) >= limit:
                    return differences, compared
    return differences, compared


class _Reader:
    """Reads boxes of the tensors of a file with plain reads."""

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index

    def read(self, tensor: StoredTensor, box: Box) -> np.ndarray:
        """A box of a tensor, as an array of elements of raw bytes."""
        item = tensor.nbytes // max(math.prod(tensor.shape), 1)
        out = np.empty((*box.size, item), np.uint8)
        rows = out.reshape(-1, (box.size[-1] if box.size else 1) * item)
        with open(self.index.path, "rb", buffering=0) as f:
            for row, position in zip(rows, _row_positions(tensor.shape, box)):
                _read_flat(f, tensor.segments, position * item, row)
        return out


def _compare(
    name: str,
    tensor: StoredTensor,
    reader: _Reader,
    layout: Layout,
    local: int,
    sources: dict[int, _Reader],
    source: Strategy,
) -> str:
    """What is wrong with a target tensor, or nothing."""
    holders = {rank: r for rank, r in sources.items() if name in r.index.tensors}
    if not holders:
        return "is not in the source"
    try:
        full, target_box = _full_box(tensor, layout, local)
    except LayoutError as e:
        return str(e)
    for part in split_box(
        Box.whole(tensor.shape), max(1, _READ_BYTES * math.prod(tensor.shape) // max(tensor.nbytes, 1))
    ):
        place = Box(tuple(o + p for o, p in zip(target_box.offset, part.offset)), part.size)
        got = reader.read(tensor, part)
        seen = np.zeros(part.size, bool)
        for rank, holder in holders.items():
            stored = holder.index.tensors[name]
            held = source.layout(name, source.stage_of(rank)) or Layout.complete(source.stage_devices)
            source_full, source_box = _full_box(stored, held, rank % source.stage_devices)
            if source_full != full or stored.dtype != tensor.dtype:
                return (
                    f"is {list(full)} {tensor.dtype} as a whole, but {list(source_full)} {stored.dtype} in the source"
                )
            common = place.intersect(source_box) if place.size else place
            if common is None or seen[common.relative_to(place.offset).slices()].all():
                continue
            expected = holder.read(stored, common.relative_to(source_box.offset))
            inside = common.relative_to(place.offset).slices()
            if not np.array_equal(got[inside], expected):
                return f"differs from {holder.index.path}"
            seen[inside] = True
        if not seen.all():
            return "is not covered by the source ranks that are there"
    return ""


def _full_box(tensor: StoredTensor, layout: Layout, local: int) -> tuple[Shape, Box]:
    full = layout.full_shape(tensor.shape)
    return full, layout.box(local, full)


def _row_positions(shape: Shape, box: Box) -> Any:
    """Where each row (run along the last dimension) of a box begins, in elements."""
    if not shape:
        return [0]
    starts = np.zeros(1, np.int64)
    for dim, (offset, size) in enumerate(zip(box.offset[:-1], box.size[:-1])):
        stride = math.prod(shape[dim + 1 :])
        starts = (starts[:, None] + (offset + np.arange(size)) * stride).reshape(-1)
    return (starts + box.offset[-1]).tolist()


def _read_flat(f: BinaryIO, segments: tuple[tuple[int, int], ...], position: int, out: np.ndarray) -> None:
    view = memoryview(out)  # type: ignore[arg-type]
    for offset, nbytes in segments:
        if position < nbytes and view.nbytes:
            now = min(nbytes - position, view.nbytes)
            f.seek(offset + position)
            f.readinto(view[:now])  # type: ignore[attr-defined]
            view, position = view[now:], 0
        else:
            position -= nbytes


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as f:
        while part := f.read(_READ_BYTES):
            digest.update(part)
    return digest.hexdigest()

"""Checks converted weights: by the digests of the manifest, and byte by byte against the source.

The comparison with the source takes another path than the conversion: it does not know plans. For every part of a target
slice it asks each source rank in turn which box of the full tensor it holds, reads the file (not a mapping of it), and
compares what both hold.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional

import numpy as np

from auto_trans.core.layout import Layout
from auto_trans.core.planning import make_plan
from auto_trans.core.rules import NOTHING, Allowed
from auto_trans.core.source import SlicedSource
from auto_trans.core.strategy import Strategy, is_optimizer_state
from auto_trans.core.tensor import Box, Shape, split_box
from auto_trans.errors import CheckpointNotFoundError, ConfigError, LayoutError
from auto_trans.storage.formats.head import FileHead, StoredTensor
from auto_trans.storage.manifest import MANIFEST_NAME, RECORDS_NAME, read_manifest, read_records
from auto_trans.storage.readers import digest_extents
from auto_trans.storage.sources import Checkpoint, ScannedFiles, find_checkpoints

__all__ = ["Difference", "DigestCheck", "verify_against", "verify_digests"]

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


@dataclass(frozen=True)
class DigestCheck:
    """What a comparison with digests found.

    Attributes:
        differences: What is not as it was recorded.
        files: How many files are on record.
        finished: Whether the conversion is; until then no manifest says which files there must be.
    """

    differences: tuple[Difference, ...]
    files: int
    finished: bool


def verify_digests(folder: Path, ranks: Optional[Sequence[int]] = None) -> DigestCheck:
    """Compares the files of a conversion with their digests: in its manifest, or on record where it is not finished.

    Args:
        folder: The target folder of the conversion; of several complete checkpoints the one above theirs.
        ranks: The target ranks to compare; all that are on record by default.

    Raises:
        CheckpointNotFoundError: The folder has neither a manifest nor records.
    """
    manifest = read_manifest(folder)
    records = read_records(folder) if manifest is None else manifest
    if not records:
        names = (f"*/{MANIFEST_NAME}", f"*/{RECORDS_NAME}")
        below = sorted({path.parent for name in names for path in folder.glob(name)})
        if not below:
            raise CheckpointNotFoundError(
                f"{folder} has no readable {MANIFEST_NAME}: the conversion was not finished, or not made by auto_trans; "
                f"compare it with its source instead («against»)"
            )
        checks = [verify_digests(one, ranks) for one in below]
        found = tuple(difference for check in checks for difference in check.differences)
        return DigestCheck(found, sum(check.files for check in checks), all(check.finished for check in checks))
    digests: dict[tuple[int, str], set[str]] = {}
    for record in records:
        if ranks is None or record.rank in ranks:
            digests.setdefault((record.rank, record.file), set()).add(record.xxh3_128)
    differences = []
    for (rank, file), known in digests.items():
        path = folder / file
        if not path.is_file():
            differences.append(Difference(rank, str(path), "", "is missing"))
        elif digest_extents(path, [(0, path.stat().st_size)]) not in known:
            where = "on record" if manifest is None else "in the manifest"
            differences.append(Difference(rank, str(path), "", f"differs from its digest {where}"))
    for rank in sorted(set(ranks or ()) - {rank for rank, _ in digests}):
        differences.append(Difference(rank, str(folder / f"rank_{rank}"), "", "is not on record"))
    return DigestCheck(tuple(differences), len(digests), manifest is not None)


def verify_against(
    folder: Path,
    original: Checkpoint,
    source: Strategy,
    target: Strategy,
    *,
    ranks: Optional[Sequence[int]] = None,
    allowed: Allowed = NOTHING,
    limit: int = 20,
) -> tuple[list[Difference], int]:
    """Compares every byte of converted weights with their source, all copies of a slice included.

    Args:
        folder: The converted weights: ``rank_N`` folders, or one complete checkpoint.
        original: The source.
        source: Strategy of the source.
        target: Strategy of the converted weights; a Checkpoint 2.0 tells its own where this is complete.
        ranks: The target ranks to compare; all by default.
        allowed: What was allowed although it looked wrong.
        limit: After how many differences to stop.

    Returns:
        The differences, and the number of bytes compared.

    Raises:
        ConfigError: The folder holds several complete checkpoints.
        PlanError: The strategies do not tell how a weight is sliced, so that being equal would say nothing.
    """
    found = find_checkpoints(folder)
    if len(found) > 1:
        names = ", ".join(one.path.name for one in found[:3])
        raise ConfigError(f"{folder} holds {len(found)} complete checkpoints ({names}, ...); give one of the files")
    (made,) = found
    source = original.strategy(source)
    target = made.strategy(target) if target.is_complete else target
    plan = make_plan(SlicedSource(source, ScannedFiles(original)), target, ranks, allowed=allowed)
    expected = {rank: {tensor.name for tensor in file.tensors} for file in plan.files for rank in file.ranks}
    sources = [_Held(rank, head) for rank, heads in _heads(original) for head in heads]
    converted = dict(_heads(made))
    differences: list[Difference] = []
    for rank in converted if ranks is None else ():
        if rank >= target.world_size:
            differences.append(Difference(rank, str(folder / f"rank_{rank}"), "", "is not of this target"))
    if made.iteration:  # a slice may lie with any of the ranks that share it
        held = {name for heads in converted.values() for head in heads for name in head.tensors}
        differences += [
            Difference(rank, str(folder), n, "is missing") for rank in expected for n in expected[rank] - held
        ]
        expected = {}
    compared = 0
    done: set[tuple[str, Box]] = set()
    for rank in range(target.world_size) if ranks is None else ranks:
        if rank not in converted:
            differences.append(Difference(rank, str(folder / f"rank_{rank}"), "", "is missing"))
            continue
        differences += _missing(rank, converted[rank], expected.get(rank, set()))
        for head in converted[rank]:
            if head.contents is not None:  # no weights, but numbers about them
                continue
            for name, tensor in head.tensors.items():
                layout = target.layout(name, target.stage_of(rank)) or Layout.whole(target.stage_devices)
                slice_ = _Slice(name, tensor, head, layout, rank % target.stage_devices)
                what = _compare(slice_, sources, source, done)
                compared += tensor.nbytes
                if what:
                    differences.append(Difference(rank, str(head.path), name, what))
                    if len(differences) >= limit:
                        return differences, compared
    return differences, compared


def _missing(rank: int, heads: Sequence[FileHead], expected: set[str]) -> Iterator[Difference]:
    """Parameters that a rank lacks; weights may be saved without any optimizer state."""
    held = {name for head in heads for name in head.tensors}
    if not any(is_optimizer_state(name) for name in held):
        expected = {name for name in expected if not is_optimizer_state(name)}
    for name in sorted(expected - held):
        yield Difference(rank, str(heads[0].path), name, "is missing")


class _Held(NamedTuple):
    """A source file and the rank that it belongs to."""

    rank: int
    head: FileHead


class _Slice(NamedTuple):
    """A converted slice: where it lies and how it should be sliced."""

    name: str
    tensor: StoredTensor
    head: FileHead
    layout: Layout
    local: int


def _heads(checkpoint: Checkpoint) -> Iterator[tuple[int, list[FileHead]]]:
    scanned = ScannedFiles(checkpoint)
    return ((rank, scanned.heads(rank)) for rank in scanned.ranks)


def _read(head: FileHead, tensor: StoredTensor, box: Box) -> np.ndarray:
    """A box of a tensor, as an array of elements of raw bytes, by plain reads."""
    item = tensor.nbytes // max(math.prod(tensor.shape), 1)
    out = np.empty((*box.size, item), np.uint8)
    rows = out.reshape(-1, (box.size[-1] if box.size else 1) * item)
    with _open(head) as f:
        for row, position in zip(rows, _row_positions(tensor.shape, box)):
            _read_flat(f, tensor.segments, position * item, row)
    return out


def _open(head: FileHead) -> BinaryIO:
    return open(head.path, "rb", buffering=0) if head.contents is None else io.BytesIO(head.contents)


def _compare(made: _Slice, sources: Sequence[_Held], source: Strategy, done: set[tuple[str, Box]]) -> str:
    """What is wrong with a converted slice, or nothing.

    The first of equal target slices is compared with all copies in the source and is ``done``; those after it with one
    copy, or replicas on both sides would be read as often as the product of their numbers.
    """
    holders = [held for held in sources if made.name in held.head.tensors]
    if not holders:
        return "is not in the source"
    try:
        full, target_box = _full_box(made.tensor, made.layout, made.local)
    except LayoutError as e:
        return str(e)
    own = not source.lists(made.name) and math.prod(full) == 1  # may be another number on every rank
    copies = (made.name, target_box) not in done and not own
    first_stage = source.stage_of(holders[0].rank)
    whole, nbytes = Box.whole(made.tensor.shape), made.tensor.nbytes
    for part in split_box(whole, max(1, _READ_BYTES * whole.volume // max(nbytes, 1))):
        place = Box(tuple(o + p for o, p in zip(target_box.offset, part.offset)), part.size)
        got, seen = _read(made.head, made.tensor, part), np.zeros(part.size, bool)
        for rank, head in holders:
            stored = head.tensors[made.name]
            held = source.layout(made.name, source.stage_of(rank)) or Layout.whole(source.stage_devices)
            source_full, source_box = _full_box(stored, held, rank % source.stage_devices)
            if source_full != full or stored.dtype != made.tensor.dtype:
                before = f"{list(source_full)} {stored.dtype}"
                return f"is {list(full)} {made.tensor.dtype} as a whole, but {before} in the source"
            common = place.intersect(source_box) if place.size else place
            if common is None:
                continue
            inside = common.relative_to(place.offset).slices()
            again = bool(seen[inside].all())
            if again and not (copies and source.stage_of(rank) == first_stage):
                continue
            if not np.array_equal(got[inside], _read(head, stored, common.relative_to(source_box.offset))):
                if own and rank != holders[-1].rank:
                    continue
                return f"differs from {head.path}" + (", but not from another copy in the source" if again else "")
            seen[inside] = True
        if not seen.all():
            return "is not covered by the source ranks that are there"
    done.add((made.name, target_box))
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

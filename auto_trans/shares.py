"""How several converters share one conversion: who writes what, and how much that is.

Pure: nothing is read or written here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from auto_trans.plan import ConversionPlan

__all__ = ["Load", "assign_writers", "loads", "split_ranks"]


@dataclass(frozen=True)
class Load:
    """What a converter reads and writes, in bytes of tensors.

    Attributes:
        read: Bytes of the source, each counted once.
        written: Bytes of the files that it writes itself.
        linked: Ranks that get a link to a file.
    """

    read: int
    written: int
    linked: int


def split_ranks(plan: ConversionPlan, processes: int) -> list[list[int]]:
    """Splits the ranks of a plan among processes: replicas stay together, each gets about the same number of bytes.

    Returns:
        The ranks by process; no more processes than there are distinct files.
    """
    shares: list[tuple[int, list[int]]] = [(0, []) for _ in range(processes)]
    for file in sorted(plan.files, key=lambda f: -f.nbytes):
        lightest = min(range(processes), key=lambda i: shares[i][0])
        nbytes, ranks = shares[lightest]
        shares[lightest] = (nbytes + file.nbytes, ranks + list(file.ranks))
    return [sorted(ranks) for _, ranks in shares if ranks]


def assign_writers(replicas: Iterable[Sequence[int]], shares: Sequence[Sequence[int]]) -> dict[int, int]:
    """Says which of several converters, whose ranks are given, writes a file that ranks of several of them need.

    It is one that needs the file itself, of those the one with the fewest files so far. Every converter comes to the same
    result by itself.

    Args:
        replicas: The ranks by equal contents.
        shares: The ranks of every converter.

    Returns:
        Rank -> the index of the share that writes its file; the other shares with such a rank link it.
    """
    share_of = {rank: i for i, ranks in enumerate(shares) for rank in ranks}
    files = [0] * len(shares)
    writers = {}
    for group in replicas:
        needed_by = sorted({share_of[rank] for rank in group if rank in share_of})
        if needed_by:
            writer = min(needed_by, key=lambda i: files[i])
            files[writer] += 1
            writers.update(dict.fromkeys(group, writer))
    return writers


def loads(plan: ConversionPlan, shares: Sequence[Sequence[int]]) -> list[Load]:
    """What each of several converters would read and write.

    Args:
        plan: The plan of all ranks.
        shares: The ranks of every converter.
    """
    writers = assign_writers(plan.replicas, shares)
    read: list[dict[tuple[Any, ...], int]] = [{} for _ in shares]
    written = [0] * len(shares)
    files = [0] * len(shares)
    for file in plan.files:
        writer = writers[file.ranks[0]]
        written[writer] += file.nbytes
        files[writer] += 1
        for tensor in file.tensors:
            for copy in tensor.copies:
                part = (tensor.name, copy.rank, copy.source, copy.target.size)
                read[writer][part] = tensor.nbytes * copy.target.volume // max(math.prod(tensor.shape), 1)
    return [
        Load(sum(copies.values()), nbytes, len(ranks) - count)
        for copies, nbytes, ranks, count in zip(read, written, shares, files)
    ]

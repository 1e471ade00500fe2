"""How several converters share one conversion: who writes what, and how much that is.

Pure: nothing is read or written here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from auto_trans.core.plan import ConversionPlan, FilePlan

__all__ = ["Load", "assign_writers", "loads", "process_nums", "read_bytes", "split_ranks"]


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
    files: list[list[FilePlan]] = [[] for _ in shares]
    for file in plan.files:
        files[writers[file.ranks[0]]].append(file)
    return [
        Load(read_bytes(own), sum(file.nbytes for file in own), len(ranks) - len(own))
        for own, ranks in zip(files, shares)
    ]


def process_nums(world_size: int, most: int = 9) -> list[int]:
    """Values of ``transform_process_num`` to choose from: divisors of the world size, each at least twice the last."""
    chosen = [1]
    for number in range(2, world_size + 1):
        if world_size % number == 0 and number >= 2 * chosen[-1]:
            chosen.append(number)
    return chosen if len(chosen) <= most else [*chosen[: most - 1], chosen[-1]]


def read_bytes(files: Iterable[FilePlan]) -> int:
    """Bytes of the source that files are made of, each counted once."""
    parts: dict[tuple[Any, ...], int] = {}
    for file in files:
        for tensor in file.tensors:
            for copy in tensor.copies:
                part = (tensor.name, copy.rank, copy.source, copy.target.size)
                parts[part] = tensor.nbytes * copy.target.volume // max(math.prod(tensor.shape), 1)
    return sum(parts.values())

"""How several converters share one conversion: who writes what, and how much that is.

Pure: nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from auto_trans.core.plan import Copy, FilePlan, Plan, TensorPlan
from auto_trans.core.tensor import Shape

__all__ = [
    "DirectReads",
    "Share",
    "assign_writers",
    "direct_reads",
    "process_nums",
    "read_bytes",
    "share_out",
    "split_files",
]


@dataclass(frozen=True)
class Share:
    """What a converter reads and writes, in bytes of tensors.

    Attributes:
        read: Bytes of the source, each counted once.
        written: Bytes of the files that it writes itself.
        linked: Ranks that get a link to a file.
    """

    read: int
    written: int
    linked: int


def split_files(files: Iterable[FilePlan], processes: int) -> list[list[FilePlan]]:
    """Splits files among processes, so that each gets about the same number of bytes.

    Returns:
        The files by process; no more processes than there are files.
    """
    shares: list[tuple[int, list[FilePlan]]] = [(0, []) for _ in range(processes)]
    for file in sorted(files, key=lambda f: -f.nbytes):
        lightest = min(range(processes), key=lambda i: shares[i][0])
        nbytes, own = shares[lightest]
        shares[lightest] = nbytes + file.nbytes, [*own, file]
    return [sorted(own, key=lambda f: (f.ranks, f.part)) for _, own in shares if own]


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


def share_out(plan: Plan, shares: Sequence[Sequence[int]]) -> list[Share]:
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
        Share(read_bytes(own), sum(file.nbytes for file in own), len(ranks) - len(own))
        for own, ranks in zip(files, shares)
    ]


@dataclass(frozen=True)
class DirectReads:
    """What is read if every rank loads its slices directly, in bytes of tensors.

    Attributes:
        rank: By the rank that reads most, each byte once.
        ranks: By all ranks.
        node: By the node that reads most; what several of its ranks read counts once, for they share its page cache.
        nodes: By all nodes.
    """

    rank: int
    ranks: int
    node: int
    nodes: int


def direct_reads(plan: Plan, node_devices: int) -> DirectReads:
    """What ranks and nodes would read if every rank loads its slices directly.

    Args:
        plan: The plan.
        node_devices: Ranks of a node; rank // node_devices is the number of its node.
    """
    by_rank = [(read_bytes([file]), len(file.ranks)) for file in plan.files]
    nodes: dict[int, list[FilePlan]] = {}
    for file in plan.files:
        for node in {rank // node_devices for rank in file.ranks}:
            nodes.setdefault(node, []).append(file)
    by_node = [read_bytes(files) for files in nodes.values()]
    return DirectReads(
        max(nbytes for nbytes, _ in by_rank),
        sum(nbytes * ranks for nbytes, ranks in by_rank),
        max(by_node),
        sum(by_node),
    )


def process_nums(world_size: int, most: int = 9) -> list[int]:
    """Values of ``transform_process_num`` to choose from: divisors of the world size, each at least twice the last."""
    chosen = [1]
    for number in range(2, world_size + 1):
        if world_size % number == 0 and number >= 2 * chosen[-1]:
            chosen.append(number)
    return chosen if len(chosen) <= most else [*chosen[: most - 1], chosen[-1]]


def read_bytes(files: Iterable[FilePlan]) -> int:
    """Bytes of the source that files are made of, each counted once."""
    nbytes = 0
    seen: set[tuple[str, str, Shape, Shape, Shape]] = set()
    for file in files:
        for tensor in file.tensors:
            for shard, start, box in _copies(tensor):
                part = shard.tensor.name, shard.file.path, shard.box.offset, start, box.size
                if part not in seen:
                    seen.add(part)
                    nbytes += shard.tensor.nbytes(box)
    return nbytes


def _copies(tensor: TensorPlan) -> tuple[Copy, ...]:
    added = tensor.added
    return tensor.copies if added is None else (*tensor.copies, *added.a.copies, *added.b.copies)

"""Which ranks convert which slices, exactly as documented for ``transform_process_num``."""

from __future__ import annotations

from dataclasses import dataclass

from auto_trans.config import parse_process_num
from auto_trans.errors import ConfigError
from auto_trans.log import logger

__all__ = ["LEADER", "Assignment", "elect"]

LEADER = 0  # the rank that prepares and finishes


@dataclass(frozen=True)
class Assignment:
    """A converter rank and the target slices that it converts."""

    rank: int
    slices: range


def elect(world_size: int, transform_process_num: int = 1) -> tuple[Assignment, ...]:
    """Elects the converter ranks.

    With ``transform_process_num: 2`` of 8 ranks, rank 0 converts the slices 0 to 3 and rank 4 converts 4 to 7; the others
    wait.

    Args:
        world_size: Number of ranks, which is the number of target slices.
        transform_process_num: Number of converter ranks; more than there are ranks counts as all of them, as in
            MindFormers.

    Returns:
        The converter ranks in ascending order.

    Raises:
        ConfigError: The number is less than 1, or does not divide the world size.
    """
    if world_size < 1:
        raise ConfigError(f"world_size must be at least 1, not {world_size}")
    number = parse_process_num(transform_process_num)
    if number > world_size:
        logger.warning("transform_process_num %d is more than the %d ranks; all of them convert", number, world_size)
        number = world_size
    if world_size % number:
        allowed = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ConfigError(
            f"transform_process_num {number} does not divide the world size {world_size}; set it to one of {allowed}"
        )
    share = world_size // number
    return tuple(Assignment(rank, range(rank, rank + share)) for rank in range(0, world_size, share))

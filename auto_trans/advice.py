"""What a job would have to do by its settings, so that they can be chosen."""

from __future__ import annotations

from typing import Any

from auto_trans.conversion import Conversion
from auto_trans.coordination.election import elect
from auto_trans.core.work import process_nums, share_out

__all__ = ["advise"]


def advise(conversion: Conversion) -> list[dict[str, Any]]:
    """What the converters of a job would read and write by ``transform_process_num``, of which one can be chosen.

    Returns:
        Per value the bytes that the busiest converter reads and writes, the bytes that all write, and how many of the
        converters write at all. Empty if the plan is not that of a whole job.
    """
    plan, world_size = conversion.plan, conversion.request.to_strategy.world_size
    if world_size == 1 or len(plan.ranks) < world_size:
        return []
    advice = []
    for number in process_nums(world_size):
        shares = share_out(plan, [assignment.slices for assignment in elect(world_size, number)])
        advice.append(
            {
                "transform_process_num": number,
                "busiest_reads": max(share.read for share in shares),
                "busiest_writes": max(share.written for share in shares),
                "all_write": sum(share.written for share in shares),
                "writing": sum(share.written > 0 for share in shares),
            }
        )
    return advice

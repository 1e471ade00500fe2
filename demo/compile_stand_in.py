"""Stand-in for the compile step, which saves the strategy files: semi_auto_parallel does not compile on a CPU.

The layouts are those that MindSpore 2.7.1 saved for MindFormers' LLaMA under tensor parallelism: wq, wk, wv, w1 and w3
are sliced on dimension 0, wo and w2 on dimension 1, everything else is held whole by every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

__all__ = ["sliced_dimension", "write_strategy_files"]

_DIMENSIONS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}


def sliced_dimension(name: str) -> int | None:
    """The dimension that tensor parallelism slices of a LLaMA parameter (or its moments), or None."""
    parts = name.split(".")
    return _DIMENSIONS.get(parts[-2]) if parts[-1] == "weight" and len(parts) > 1 else None


def write_strategy_files(folder: Path, parameters: Iterable[tuple[str, int]], dp: int, mp: int) -> None:
    """Writes ``ckpt_strategy_rank_N.ckpt`` of every rank, as a job with data_parallel dp and model_parallel mp would.

    Args:
        folder: The strategy folder.
        parameters: Name and number of dimensions of every parameter.
        dp: Data parallelism.
        mp: Tensor parallelism.
    """
    message = ParallelStrategyMap(current_stage=2)
    message.parallel_strategy_item.add(node_name="MatMul_stand_in").parallel_strategys.stage = 0
    for name, ndim in parameters:
        layouts = message.parallel_layout_item.add(param_name=name).parallel_layouts
        layouts.dev_matrix.add(dim=[dp, mp])
        sliced = sliced_dimension(name) if mp > 1 else None
        layouts.tensor_map.add(dim=[0 if dim == sliced else -1 for dim in range(ndim)])
        layouts.param_split_shape.add()
        layouts.indices_offset.add()
        layouts.field = layouts.opt_weight_shard_step = layouts.opt_weight_shard_size = 0
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(dp * mp):
        (folder / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(message.SerializeToString())

"""Stand-ins for what MindFormers needs of an NPU; the demo's and the tests' own, never the package's.

* The overflow check of the training step uses FloatStatus, which has no CPU kernel: no overflow is reported.
* ``mindspore.communication.comm_func.barrier`` has no CPU kernel: an AllReduce serves.
"""

from __future__ import annotations

from typing import Any

import mindspore
import mindspore.nn.wrap.loss_scale as loss_scale
from mindspore import ops
from mindspore.communication import comm_func, get_group_size

__all__ = ["stand_in_for_npu"]


def stand_in_for_npu() -> None:
    """Replaces what has no CPU kernel; call it before MindFormers is imported."""
    loss_scale.TrainOneStepWithLossScaleCell.get_overflow_status = _no_overflow
    comm_func.barrier = _all_reduce_barrier


def _no_overflow(self: Any, status: Any, compute_output: Any) -> Any:
    return mindspore.Tensor(False)


def _all_reduce_barrier(group: Any = None) -> None:
    try:
        size = get_group_size()
    except RuntimeError:  # a single process
        return
    if size > 1:
        ops.AllReduce()(mindspore.Tensor([1.0], mindspore.float32)).asnumpy()

"""What is loaded as parameters of MindSpore, for its networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Optional, Union

from auto_trans.arrays import as_array, choose_names, load_slices
from auto_trans.core.rules import Allowed
from auto_trans.core.tensor import ITEM_BYTES
from auto_trans.loading import Loaded
from auto_trans.storage.sources import PathLike, StrategyLike

__all__ = ["as_parameters", "load_into"]


def load_into(
    network: Any,
    src: PathLike,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    *,
    rank: Optional[int] = None,
    names: Optional[Iterable[str]] = None,
    only_prefix: Union[str, Sequence[str]] = (),
    skip_prefix: Union[str, Sequence[str]] = (),
    step: Optional[str] = None,
    allow_extra: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    strict_load: bool = False,
) -> tuple[list[str], list[str]]:
    """Loads the slices of a rank into a network of MindSpore, whatever strategy they were saved under.

    For scripts that train with MindSpore and without the Trainer of MindFormers. Nothing is written, and nothing is loaded
    unless all of it could be read.

    Args:
        network: The network, a ``mindspore.nn.Cell``, compiled if it is sliced; an optimizer is one, too.
        src: The checkpoint, as `auto_trans.convert` takes it.
        src_strategy: Strategy file, merged file or folder of the source; None if it is complete, or a Checkpoint 2.0.
        dst_strategy: The strategy that the network was compiled under; None if every rank holds it whole.
        rank: This rank; by default MindSpore knows it.
        names: The parameters to load; all by default.
        only_prefix: Load only parameters whose names begin with this, or with one of these.
        skip_prefix: Leave out parameters whose names begin with this, or with one of these.
        step: The step to take from the rank folders, as ``{epoch}_{step}``; the latest by default.
        allow_extra: Patterns (``*`` and ``?``) of parameters that every rank may hold whole although no strategy lists them.
        allow_missing: Patterns of weights that the target lists and the source may lack.
        strict_load: As of ``mindspore.load_param_into_net``.

    Returns:
        What ``mindspore.load_param_into_net`` returns: the parameters of the network that were not loaded, and those of the
        source that the network does not have.

    Raises:
        AutoTransError: Anything that is wrong with the input, see `auto_trans.errors`.
    """
    import mindspore

    slices = load_slices(
        src, _rank() if rank is None else rank, src_strategy, dst_strategy,
        choose_names(names, only_prefix, skip_prefix), step=step, allowed=Allowed.of(allow_extra, allow_missing),
    )  # fmt: skip
    not_loaded, unknown = mindspore.load_param_into_net(network, as_parameters(slices), strict_load)
    return list(not_loaded), list(unknown)


def as_parameters(slices: Iterable[Loaded]) -> dict[str, Any]:
    """Slices as ``mindspore.load_checkpoint`` would return them, by name; strings as strings.

    On a CPU a parameter takes the array as it is, so that there is no second copy.
    """
    import mindspore
    from mindspore import Parameter, Tensor
    from mindspore.common.np_dtype import bfloat16

    parameters: dict[str, Any] = {}
    blanks: dict[Any, Any] = {}
    for one in slices:
        if one.dtype in ITEM_BYTES:
            tensor = Tensor.from_numpy(as_array(one, bfloat16))
            # Parameter() copies what anybody else may know of; what it is set to it takes as it is
            if one.dtype not in blanks:
                blanks[one.dtype] = Tensor(0, tensor.dtype)
            parameter = Parameter(blanks[one.dtype], name=one.name)
            parameter.set_data(tensor, slice_shape=True)
            parameter.sliced = False
        elif one.dtype == "str":
            parameter = str(as_array(one))
        else:
            packed = mindspore.common.tensor.Tensor_.convert_bytes_to_tensor(
                one.data.tobytes(), one.shape, mindspore.train.serialization.tensor_to_ms_type[one.dtype]
            )
            parameter = Parameter(packed, name=one.name)
        parameters[one.name] = parameter
    return parameters


def _rank() -> int:
    from mindspore.communication import GlobalComm, get_rank

    return int(get_rank()) if GlobalComm.INITED else 0

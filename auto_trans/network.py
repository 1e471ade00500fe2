"""What is loaded as parameters of MindSpore, for its networks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, Union

from auto_trans.arrays import as_array, as_text, choose_names, find_slices
from auto_trans.core.consistency import Network
from auto_trans.core.plan import TensorPlan
from auto_trans.core.rules import Allowed, some
from auto_trans.core.tensor import ITEM_BYTES, Shape
from auto_trans.errors import ConfigTypeError, PlanError, UnsupportedCheckpointError
from auto_trans.loading import Loaded, assemble
from auto_trans.storage.capacity import check_slices_fit
from auto_trans.storage.sources import PathLike, StrategyLike

__all__ = ["as_parameters", "load_into", "look_at"]


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
    unless all of it could be read: until it is, the memory is that of the slices beside that of the network. To load one
    parameter at a time, see `auto_trans.load_each`.

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
        AutoTransError: Anything that is wrong with the input, see `auto_trans.errors`; the network stays as it was.
        RuntimeError: MindSpore does not convert the type of a parameter; it has set those before it.
    """
    import mindspore

    if not isinstance(network, mindspore.nn.Cell):
        raise ConfigTypeError(f"network must be a mindspore.nn.Cell, not {network!r}")
    tensors = find_slices(
        src, _rank() if rank is None else rank, src_strategy, dst_strategy,
        choose_names(names, only_prefix, skip_prefix), step=step, allowed=Allowed.of(allow_extra, allow_missing),
    )  # fmt: skip
    _check_fits(look_at(1, network).shapes, tensors, strict_load)
    check_slices_fit(sum(tensor.nbytes for tensor in tensors))
    not_loaded, unknown = mindspore.load_param_into_net(network, as_parameters(assemble(tensors)), strict_load)
    return list(not_loaded), list(unknown)


def _check_fits(shapes: Mapping[str, Shape], tensors: Sequence[TensorPlan], strict: bool) -> None:
    """Looks whether a network has parameters of these names and sizes, before any is set.

    Raises:
        PlanError: It has none of them, or one has another shape.
    """
    names = {tensor.name for tensor in tensors}
    endings = {name.partition(".")[2] for name in (*names, *shapes)}  # by which MindSpore finds some, too
    if not names & shapes.keys() and (strict or not endings & (names | shapes.keys())):
        held = some(tensor.name for tensor in tensors)
        raise PlanError(
            f"the source holds no parameter of the network ({held} instead of {some(shapes)}): it is of another model"
        )
    for tensor in tensors:
        expected = shapes.get(tensor.name, tensor.shape)
        if math.prod(expected) != math.prod(tensor.shape):
            raise PlanError(
                f"parameter {tensor.name} is {list(expected)} in the network, but {list(tensor.shape)} is loaded; give the "
                f"strategy that the network was compiled under («dst_strategy»), and its own rank"
            )


def as_parameters(slices: Iterable[Loaded]) -> dict[str, Any]:
    """Slices as ``mindspore.load_checkpoint`` would return them, by name; strings as strings.

    On a CPU a parameter takes the array as it is, so that there is no second copy.

    Raises:
        AutoTransError: A slice cannot be read, or is of a type that MindSpore does not know.
    """
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
            parameter = as_text(one)
        else:
            from mindspore.train.serialization import Tensor_, tensor_to_ms_type

            kind = tensor_to_ms_type.get(one.dtype)
            if kind is None:
                raise UnsupportedCheckpointError(
                    f"parameter {one.name} is of type {one.dtype}, which this MindSpore does not know; load it with the one "
                    f"that saved it, or leave it out"
                )
            packed = Tensor_.convert_bytes_to_tensor(one.data.tobytes(), one.shape, kind)
            parameter = Parameter(packed, name=one.name)
        parameters[one.name] = parameter
    return parameters


def _rank() -> int:
    from mindspore.communication import GlobalComm, get_rank

    return int(get_rank()) if GlobalComm.INITED else 0


def look_at(world_size: int, *cells: Any) -> Network:
    """What is known of networks and optimizers that MindFormers has built, and perhaps compiled."""
    from mindspore import context

    shapes = {}
    for cell in cells:
        for _, parameter in cell.parameters_and_names() if hasattr(cell, "parameters_and_names") else ():
            shape = tuple(parameter.shape)
            if all(n >= 0 for n in shape):  # -1: not known before the first step
                shapes[parameter.name] = shape
    # with parallel_mode STAND_ALONE the layers of a network for inference are built as slices
    sliced = world_size > 1 and context.get_auto_parallel_context("parallel_mode") != "data_parallel"
    return Network(shapes, sliced=sliced)

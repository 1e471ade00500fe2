"""The library calls that load: the slices of one rank as arrays of numpy. No MindSpore is needed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Optional, Union

import numpy as np

from auto_trans.core.plan import TensorPlan
from auto_trans.core.rules import Allowed
from auto_trans.core.strategy import Strategy
from auto_trans.errors import ConfigError, ConfigTypeError, CorruptCheckpointError
from auto_trans.loading import Loaded, Names, assemble, file_of_rank
from auto_trans.planned import Planned
from auto_trans.request import as_path
from auto_trans.storage.capacity import check_slices_fit
from auto_trans.storage.sources import PathLike, StrategyLike, as_strategy, find_source

__all__ = ["as_array", "as_text", "choose_names", "find_slices", "load", "load_each"]

_NUMPY: dict[str, Any] = {
    "Bool": np.bool_, "Int8": np.int8, "UInt8": np.uint8, "Int16": np.int16, "UInt16": np.uint16, "Int32": np.int32,
    "UInt32": np.uint32, "Int64": np.int64, "UInt64": np.uint64, "Float16": np.float16, "Float32": np.float32,
    "Float64": np.float64, "Complex64": np.complex64, "Complex128": np.complex128,
}  # fmt: skip


def load(
    src: PathLike,
    rank: int = 0,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    *,
    names: Optional[Iterable[str]] = None,
    only_prefix: Union[str, Sequence[str]] = (),
    skip_prefix: Union[str, Sequence[str]] = (),
    step: Optional[str] = None,
    allow_extra: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    bfloat16: Any = None,
) -> dict[str, np.ndarray]:
    """Loads the slices that one rank has under another parallel strategy, without writing anything.

    Only the bytes that the rank needs are read, each once; memory is that of the arrays and a few MiB.

    Args:
        src: The checkpoint, as `auto_trans.convert` takes it.
        rank: The rank of the target.
        src_strategy: Strategy file, merged file or folder of the source; None if it is complete, or a Checkpoint 2.0.
        dst_strategy: The same of the target; None for the whole of every parameter.
        names: The parameters to load; all by default.
        only_prefix: Load only parameters whose names begin with this, or with one of these.
        skip_prefix: Leave out parameters whose names begin with this, or with one of these.
        step: The step to take from the rank folders, as ``{epoch}_{step}``; the latest by default.
        allow_extra: Patterns (``*`` and ``?``) of parameters that every rank may hold whole although no strategy lists them.
        allow_missing: Patterns of weights that the target lists and the source may lack.
        bfloat16: The type of numpy for BFloat16, which numpy itself lacks: by default that of the package ml_dtypes;
            ``numpy.uint16`` gives the bits.

    Returns:
        Parameter -> its slice, in file order. Strings are arrays of no dimensions, packed integers their bytes.

    Raises:
        AutoTransError: Anything that is wrong with the input, see `auto_trans.errors`.

    Example:
        >>> weights = auto_trans.load("output/checkpoint", 3, "output/strategy", "new/strategy")  # doctest: +SKIP
        >>> weights["model.norm_out.weight"].shape  # doctest: +SKIP
        (4096,)
    """
    chosen, allowed = choose_names(names, only_prefix, skip_prefix), Allowed.of(allow_extra, allow_missing)
    tensors = find_slices(src, rank, src_strategy, dst_strategy, chosen, step=step, allowed=allowed)
    check_slices_fit(sum(tensor.nbytes for tensor in tensors))
    return dict(_as_arrays(assemble(tensors), _type_for(tensors, bfloat16)))


def load_each(
    src: PathLike,
    rank: int = 0,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    *,
    names: Optional[Iterable[str]] = None,
    only_prefix: Union[str, Sequence[str]] = (),
    skip_prefix: Union[str, Sequence[str]] = (),
    step: Optional[str] = None,
    allow_extra: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    bfloat16: Any = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Loads like `load`, one parameter after the other: who lets each go needs the memory of one.

    All that can be checked without reading the contents is checked before this returns. That no file was written to
    meanwhile is known only in the end: use nothing of it before.

    Yields:
        Parameter and slice, in file order.

    Raises:
        AutoTransError: Anything that is wrong with the input, see `auto_trans.errors`.
    """
    chosen, allowed = choose_names(names, only_prefix, skip_prefix), Allowed.of(allow_extra, allow_missing)
    tensors = find_slices(src, rank, src_strategy, dst_strategy, chosen, step=step, allowed=allowed)
    return _as_arrays(assemble(tensors, keep=False), _type_for(tensors, bfloat16))


def find_slices(
    src: PathLike,
    rank: int,
    src_strategy: StrategyLike,
    dst_strategy: StrategyLike,
    names: Names,
    *,
    step: Optional[str],
    allowed: Allowed,
) -> list[TensorPlan]:
    """Finds, plans and checks; nothing is assembled yet. See `load` for the arguments.

    Raises:
        AutoTransError: Anything that is wrong with the input, see `auto_trans.errors`.
    """
    try:
        rank = operator.index(None if isinstance(rank, bool) else rank)  # type: ignore[arg-type]  # also one of numpy
    except TypeError:
        raise ConfigTypeError(f"rank must be a whole number, not {rank!r}") from None
    if rank < 0:
        raise ConfigError(f"rank must be 0 or more, not {rank}")
    src, from_strategy = as_path("«src»", src), as_strategy(src_strategy)
    # without a strategy every rank has all weights whole
    to_strategy = as_strategy(dst_strategy) if dst_strategy is not None else Strategy.complete(rank + 1)
    if rank >= to_strategy.world_size:
        raise ConfigError(
            f"rank {rank} is not in {to_strategy.origin}, which describes ranks 0 to {to_strategy.world_size - 1}; give one "
            f"of these (rank), or another strategy («dst_strategy»)"
        )
    checkpoint = find_source(src, from_strategy, step=step)
    planned = Planned(checkpoint, from_strategy, to_strategy, [rank], allowed=allowed)
    tensors = names.choose(file_of_rank(planned, rank).tensors)
    planned.check_heads()
    planned.check_carried()
    planned.log()
    return tensors


def choose_names(
    names: Optional[Iterable[str]], only_prefix: Union[str, Sequence[str]], skip_prefix: Union[str, Sequence[str]]
) -> Names:
    """The choice of parameters that a caller gives.

    Raises:
        ConfigTypeError: It is none.
    """
    if isinstance(names, str) or not (names is None or isinstance(names, Iterable)):
        raise ConfigTypeError(f"names must be several names of parameters, not {names!r}")
    only, skip = (
        (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
        for given in (only_prefix, skip_prefix)
    )
    chosen = None if names is None else tuple(names)
    for what, given in (("names", chosen or ()), ("only_prefix", only), ("skip_prefix", skip)):
        if not all(isinstance(one, str) and one for one in given):
            raise ConfigTypeError(f"{what} must be names of parameters, or their beginnings, not {given!r}")
    return Names(None if chosen is None else frozenset(chosen), only, skip)


def as_array(loaded: Loaded, bfloat16: Any) -> np.ndarray:
    """A slice as an array of numpy, which holds the same bytes.

    Args:
        loaded: The slice.
        bfloat16: The type for BFloat16, see `load`.

    Raises:
        CorruptCheckpointError: It is a string that holds no characters.
    """
    data, dtype = loaded.data, loaded.dtype
    if dtype == "BFloat16":
        return data.view(bfloat16).reshape(loaded.shape)
    if dtype in _NUMPY:
        return data.view(_NUMPY[dtype]).reshape(loaded.shape)
    if dtype == "str":
        return np.array(as_text(loaded))
    return data


def as_text(loaded: Loaded) -> str:
    """What a string holds.

    Raises:
        CorruptCheckpointError: No characters.
    """
    try:
        return loaded.data.tobytes().decode("utf-32-le").rstrip("\0")  # with which numpy fills up
    except UnicodeDecodeError as e:
        raise CorruptCheckpointError(f"parameter {loaded.name} is no text: {e}; save the checkpoint again") from e


def _as_arrays(slices: Iterator[Loaded], bfloat16: Any) -> Iterator[tuple[str, np.ndarray]]:
    for one in slices:
        named = one.name, as_array(one, bfloat16)
        del one  # or its memory would be held while the next is read
        yield named
        del named


def _type_for(tensors: Iterable[TensorPlan], given: Any) -> Any:
    """The type for BFloat16 that a caller gives, or if there is need of one, that of ml_dtypes.

    Raises:
        ConfigError: There is none.
    """
    if given is not None:
        # float16 would read the bits as other numbers
        if not isinstance(given, (type, np.dtype)) or np.dtype(given).name not in ("bfloat16", "uint16", "int16"):
            raise ConfigTypeError(f"bfloat16 must be numpy.uint16, for the bits, or a type of bfloat16, not {given!r}")
        return given
    name = next((tensor.name for tensor in tensors if tensor.dtype == "BFloat16"), None)
    if name is None:
        return None
    try:
        import ml_dtypes
    except ImportError:
        raise ConfigError(
            f"parameter {name} is of type BFloat16, which numpy lacks; install ml_dtypes, or give bfloat16=numpy.uint16 for "
            f"the bits"
        ) from None
    return ml_dtypes.bfloat16

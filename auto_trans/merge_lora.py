"""Merges LoRA weights into the weights of the base model: W' = W + (B @ A) * scaling.

The base weights stream through the same engine as every conversion, so complete and distributed sources, and complete and
distributed targets, are one pass; the product is added to each part on its way. Only the A and B matrices, which are small,
are held in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

import numpy as np

from auto_trans.config import parse_memory
from auto_trans.conversion import Conversion
from auto_trans.core.layout import Box, Shape
from auto_trans.core.plan import TensorPlan, plan_conversion
from auto_trans.core.strategy import Strategy
from auto_trans.engine.native import Executor
from auto_trans.errors import ConfigError, OutputExistsError, PlanError
from auto_trans.report import ConversionReport
from auto_trans.storage.scanned import PathLike, ScannedSource, StrategyLike, as_strategy, find_source

__all__ = ["LoraPair", "find_pairs", "is_lora", "merge_lora", "parse_scaling"]

# MindFormers: ...mindpet_delta_lora_a beside ...weight; ...weight_lora_a; ...lora_A.weight. Moments carry a prefix.
_LORA = re.compile(r"(?:_lora_|\.lora_)([aAbB])(?=$|\.)")
_MEMORY_SHARE = 8  # of the memory limit: float32 copies of a part take several times the part


class LoraPair(NamedTuple):
    """The names of the two matrices that belong to a base weight."""

    a: str
    b: str


def is_lora(name: str) -> bool:
    """Whether a parameter is a LoRA matrix, or the optimizer state of one."""
    return bool(_LORA.search(name))


def find_pairs(names: Iterable[str]) -> dict[str, LoraPair]:
    """The base weights that LoRA changes, with their matrices.

    Raises:
        PlanError: A matrix has no partner, or a base weight is missing.
    """
    names = list(names)
    known = set(names)
    sides: dict[str, dict[str, str]] = {}
    for name in names:
        match = _LORA.search(name)
        if match and not name.startswith(("adam_m.", "adam_v.", "moment1.", "moment2.", "accu_grads.")):
            base = name[: match.start()] + name[match.end() :]
            base = re.sub(r"\.(?:mindpet|tk)_delta$", ".weight", base)
            sides.setdefault(base, {})[match[1].lower()] = name
    for base, pair in sides.items():
        for side, other in (("a", "b"), ("b", "a")):
            if side not in pair:
                raise PlanError(
                    f"LoRA parameter {pair[other]} has no partner {side.upper()}; the weights are incomplete"
                )
        if base not in known:
            raise PlanError(
                f"LoRA parameter {pair['a']} belongs to {base}, which is not there; give base and LoRA weights"
            )
    if not sides:
        raise PlanError("the source holds no LoRA parameters (..._lora_a and ..._lora_b, or ...lora_A and ...lora_B)")
    return {base: LoraPair(pair["a"], pair["b"]) for base, pair in sides.items()}


def parse_scaling(value: Union[str, float]) -> float:
    """A scaling as a number, or as ``alpha/rank``, e.g. ``16/8``.

    Raises:
        ConfigError: It is neither.
    """
    match = re.fullmatch(r"\s*([-+.\deE]+)\s*(?:/\s*([-+.\deE]+)\s*)?", str(value))
    try:
        if match is None:
            raise ValueError
        scaling = float(match[1]) / float(match[2] or 1)
        if not np.isfinite(scaling):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"lora_scaling must be a number or alpha/rank such as 16/8, not {value!r}") from None
    return scaling


def merge_lora(
    src: PathLike,
    dst: PathLike,
    src_strategy: StrategyLike = None,
    dst_strategy: StrategyLike = None,
    *,
    scaling: Union[str, float] = 1.0,
    prefix: str = "checkpoint_",
    format: Optional[str] = None,
    memory_limit: Union[int, str, None] = None,
    quiet: bool = True,
) -> ConversionReport:
    """Merges LoRA weights into the base weights beside them.

    Args:
        src: A complete file, or a folder of ``rank_N/`` folders, that holds base and LoRA weights.
        dst: An empty or new folder; gets ``rank_N/{prefix}N.ckpt``.
        src_strategy: Strategy of the source; None if it is complete.
        dst_strategy: Strategy of the target; None for one complete file.
        scaling: lora_alpha / lora_rank, as a number or as ``alpha/rank``.
        prefix: Beginning of the target files' names.
        format: ``ckpt`` or ``safetensors``; that of the source by default.
        memory_limit: Memory for the parts that are merged, in bytes or e.g. ``"512MiB"``; 64 MiB by default.
        quiet: Show no progress.

    Returns:
        What was done. The result holds the parameters of the base model: LoRA matrices and their moments are left out.

    Raises:
        OutputExistsError: The target folder is not empty.
        PlanError: A matrix has no partner or no base weight, or shapes do not multiply.
    """
    target_folder, limit, factor = Path(dst), parse_memory(memory_limit), parse_scaling(scaling)
    if target_folder.exists() and (not target_folder.is_dir() or any(target_folder.iterdir())):
        raise OutputExistsError(f"{target_folder} is not an empty folder; give a new or empty one")
    source, target = as_strategy(src_strategy), as_strategy(dst_strategy)
    found = find_source(src, source)
    if len(found) > 1:
        raise ConfigError(f"source {src} holds {len(found)} complete checkpoints; give one of the files")
    matrices = _read_matrices(ScannedSource(found[0]), source, limit)
    conversion = Conversion(
        found[0], target_folder, source, target, prefix=prefix, memory_limit=max(limit // _MEMORY_SHARE, 1 << 16),
        format=format, exclude=is_lora, variant=f"lora {factor!r}",
    )  # fmt: skip
    conversion.check()
    conversion.log_plan()

    def adapt(tensor: TensorPlan, box: Box, part: memoryview) -> memoryview:
        pair = matrices.get(tensor.name)
        if pair is None:
            return part
        rows, columns = Box(tuple(o + p for o, p in zip(tensor.offset, box.offset)), box.size).slices()
        return _add(part, box.size, tensor.dtype, pair[1][rows], pair[0][:, columns], factor)

    return conversion.run(quiet=quiet, adapt=adapt)


def _read_matrices(index: ScannedSource, source: Strategy, limit: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The complete A and B matrix of every base weight that LoRA changes.

    Shapes: A [r, in], B [out, r], of which W [out, in] is changed.
    """
    plan = plan_conversion(source, Strategy.complete(), index)
    tensors = {tensor.name: tensor for tensor in plan.files[0].tensors}
    pairs = find_pairs(tensors)
    sources = {rank: index.file(rank) for rank in plan.source_ranks}
    matrices = {}
    with Executor(sources, max(limit // _MEMORY_SHARE, 1 << 16)) as executor:
        for base, pair in pairs.items():
            weight, a, b = tensors[base], tensors[pair.a], tensors[pair.b]
            fits = len(weight.shape) == len(a.shape) == len(b.shape) == 2
            if not fits or weight.shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
                raise PlanError(
                    f"{pair.b} {list(b.shape)} times {pair.a} {list(a.shape)} does not give {base} {list(weight.shape)}"
                )
            wide = np.float64 if weight.dtype == "Float64" else np.float32
            read = (_to_float(b"".join(_bytes(executor, t)), t.shape, t.dtype, wide, t.name) for t in (a, b))
            matrices[base] = (next(read), next(read))
            _to_float(b"", (0,), weight.dtype, wide, base)  # refuses a type that is no floating point number
    return matrices


def _bytes(executor: Executor, tensor: TensorPlan) -> Iterator[bytes]:
    return (bytes(part) for _, part in executor.parts(tensor))


def _add(part: memoryview, shape: Shape, dtype: str, b: np.ndarray, a: np.ndarray, scaling: float) -> memoryview:
    """A part of W plus its part of the product, rounded once to the type of W."""
    wide = a.dtype.type
    weight = _to_float(part, shape, dtype, wide, "")
    weight += (b @ a) * wide(scaling)
    if dtype == "BFloat16":
        return _round_to_bfloat16(weight).data.cast("B")
    return np.ascontiguousarray(weight.astype(_NUMPY[dtype])).data.cast("B")


_NUMPY: Mapping[str, Any] = {"Float16": np.float16, "Float32": np.float32, "Float64": np.float64}


def _to_float(content: Union[bytes, memoryview], shape: Shape, dtype: str, wide: Any, name: str) -> np.ndarray:
    """Stored numbers as an array of float32 or float64 that may be written to."""
    if dtype == "BFloat16":  # the upper half of a float32
        return (np.frombuffer(content, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape).astype(wide)
    if dtype not in _NUMPY:
        raise PlanError(f"parameter {name} is of type {dtype}, to which no LoRA product can be added")
    return np.frombuffer(content, _NUMPY[dtype]).reshape(shape).astype(wide)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of float32 numbers, to even where two are as near, as uint16."""
    bits = values.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)
    return np.ascontiguousarray(rounded.astype(np.uint16))

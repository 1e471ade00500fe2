"""Synthetic inputs: LLaMA-like weights of any size, and the strategy files of any parallel strategy for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from auto_trans.storage.formats import FORMATS
from auto_trans.storage.formats.wire import bytes_field, number_field

__all__ = ["Shapes", "llama_parameters", "with_moments", "write_checkpoint", "write_strategy"]

Shapes = Mapping[str, tuple[int, ...]]


class Head(NamedTuple):
    """What a file says of a tensor besides its contents."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    nbytes: int


# parameter -> the dimension that tensor parallelism slices
_SLICED = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "wo": 1, "w2": 1}


def llama_parameters(nbytes: int, item: int = 2, *, layers: int = 4) -> dict[str, tuple[int, ...]]:
    """Shapes of a LLaMA of about ``nbytes`` bytes: hidden size h, feed-forward 2.75 h, vocabulary 4 h."""
    hidden = max(int((nbytes / item / (layers * 12.25 + 8)) ** 0.5) // 128 * 128, 128)
    feed = hidden * 11 // 4
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.embedding_weight": (4 * hidden, hidden)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in ("wq", "wk", "wv", "wo"):
            shapes[f"{layer}.attention.{name}.weight"] = (hidden, hidden)
        shapes[f"{layer}.feed_forward.w1.weight"] = shapes[f"{layer}.feed_forward.w3.weight"] = (feed, hidden)
        shapes[f"{layer}.feed_forward.w2.weight"] = (hidden, feed)
        shapes[f"{layer}.attention_norm.weight"] = shapes[f"{layer}.ffn_norm.weight"] = (hidden,)
    shapes["model.norm_out.weight"] = (hidden,)
    shapes["lm_head.weight"] = (4 * hidden, hidden)
    return shapes


def with_moments(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The same parameters with Adam's two moments, which are sliced as their weights are."""
    return {**shapes, **{f"adam_{moment}.{name}": shape for moment in "mv" for name, shape in shapes.items()}}


def write_strategy(
    folder: Path, shapes: Shapes, dp: int = 1, mp: int = 1, pp: int = 1, *, optimizer_shard: bool = False
) -> Path:
    """Writes the per-rank strategy files of a job; layers are spread evenly over the stages.

    With ``optimizer_shard`` every matrix is also split among the ranks that would hold the same slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = 1 + max(_layer(name) for name in shapes)
    for stage in range(pp):
        operator = bytes_field(1, f"MatMul_{stage}".encode()) + bytes_field(2, number_field(1, stage))
        content = number_field(1, 2) + bytes_field(2, operator)
        for name, shape in shapes.items():
            if _stage(name, layers, pp) != stage:
                continue
            sliced = _SLICED.get(name.split(".")[-2]) if mp > 1 else None
            sharded = optimizer_shard and len(shape) > 1
            tensor_map = [0 if dim == sliced else -1 for dim in range(len(shape))]
            layouts = [
                bytes_field(1, b"".join(number_field(1, n) for n in (dp, mp))),
                bytes_field(2, b"".join(number_field(1, n) for n in tensor_map)),
                bytes_field(3, b"") + bytes_field(4, b"") + number_field(5, 0),
                number_field(6, 0 if not sharded else 1 if sliced is None else mp),
                number_field(7, 0 if not sharded else dp * mp if sliced is None else dp),
            ]
            content += bytes_field(3, bytes_field(1, name.encode()) + bytes_field(2, b"".join(layouts)))
        for rank in range(stage * dp * mp, (stage + 1) * dp * mp):
            (folder / f"ckpt_strategy_rank_{rank}.ckpt").write_bytes(content)
    return folder


def write_checkpoint(path: Path, shapes: Shapes, dtype: str = "Float16") -> int:
    """Writes a complete ``.ckpt`` or ``.safetensors`` file with random contents; returns its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    item = {"Float16": 2, "BFloat16": 2, "Float32": 4}[dtype]
    with open(path, "wb") as f:
        tensors = (Head(name, dtype, shape, item * math.prod(shape)) for name, shape in shapes.items())
        for _, records in FORMATS[path.suffix[1:]].encode(tensors):
            for head, length in records:
                f.write(head)
                # small numbers in every type: no NaN that a detour over float32 could change
                f.write((rng.integers(0, 256, length // 2, dtype=np.uint16) | 0x3C00).tobytes())
    return path.stat().st_size


def _layer(name: str) -> int:
    return int(name.partition("layers.")[2].split(".")[0]) if "layers." in name else 0


def _stage(name: str, layers: int, pp: int) -> int:
    if "layers." in name:
        return _layer(name) * pp // layers
    return 0 if "tok_embeddings" in name else pp - 1

"""What one MindSpore makes of the genuine weights and strategies; ``python one_mindspore.py FOLDER`` prints its version.

``test_two_mindspores.py`` has two of them do it. It needs nothing but MindSpore, numpy and `oracle`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import oracle

__all__ = ["CONVERSIONS", "DTYPES"]

# model, source, target
CONVERSIONS = (
    ("mf_llama", "dp2mp2_opt", "dp1mp1"),
    ("mf_llama", "dp1mp1", "dp2mp2pp2"),
    ("mf_llama", "dp2mp2pp2", "dp2mp2_opt"),
    ("toy", "dp1mp1", "dp2mp4_lay"),
)
DTYPES = ("bool_", "int8", "int16", "int32", "int64", "uint8", "float16", "bfloat16", "float32", "float64", "complex64")


def main(folder: Path) -> None:
    """Saves weights, rewrites and merges strategies, and converts."""
    import mindspore
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap

    folder.mkdir(parents=True)
    numbers = np.arange(24).reshape(2, 3, 4) % 2
    every = [{"name": d, "data": mindspore.Tensor(numbers, getattr(mindspore, d))} for d in DTYPES]
    every.append({"name": "scalar", "data": mindspore.Tensor(3, mindspore.int32)})
    mindspore.save_checkpoint(every, str(folder / "every_dtype.ckpt"))
    mindspore.save_checkpoint(every, str(folder / "every_dtype.safetensors"), format="safetensors")
    merged = {}
    for model, cases in oracle.CASES.items():
        weights = oracle.Genuine(model)
        for case in cases:
            oracle.save_with_mindspore(folder / "saved" / model / case, weights.slices(case), weights.dtypes)
            merged[model, case] = folder / f"{model}_{case}_merged.ckpt"
            mindspore.merge_pipeline_strategys(str(weights.strategy(case)), str(merged[model, case]))
            for file in weights.strategy(case).iterdir():
                message = ParallelStrategyMap.FromString(file.read_bytes())
                rewritten = folder / "strategies" / model / case / file.name
                rewritten.parent.mkdir(parents=True, exist_ok=True)
                rewritten.write_bytes(message.SerializeToString(deterministic=True))
    for model, source, target in CONVERSIONS:
        mindspore.transform_checkpoints(
            str(folder / "saved" / model / source),
            str(folder / "converted" / model / f"{source}-{target}"),
            "checkpoint_",
            str(merged[model, source]),
            str(merged[model, target]),
        )
    print(mindspore.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

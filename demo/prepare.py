"""Makes the demo's inputs.

``python prepare.py data FOLDER`` and ``python prepare.py slice CHECKPOINT FOLDER MP [ckpt|safetensors]``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mindspore
import numpy as np
from compile_stand_in import sliced_dimension, write_strategy_files
from mindspore.mindrecord import FileWriter

_SAMPLES, _LENGTH, _VOCABULARY = 64, 17, 128


def make_data(folder: Path) -> None:
    """Writes a MindRecord file of sequences that count upwards, which a tiny model learns in a few steps."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = FileWriter(str(folder / "tiny.mindrecord"), shard_num=1, overwrite=True)
    writer.add_schema({"input_ids": {"type": "int32", "shape": [-1]}}, "counting")
    starts = np.random.default_rng(0).integers(3, _VOCABULARY - _LENGTH, _SAMPLES)
    writer.write_raw_data([{"input_ids": np.arange(s, s + _LENGTH, dtype=np.int32)} for s in starts])
    writer.commit()


def slice_checkpoint(checkpoint: Path, folder: Path, mp: int, form: str = "ckpt") -> None:
    """Cuts a complete LLaMA checkpoint into ``mp`` tensor-parallel slices, with the strategy files that belong to them.

    MindSpore writes the files, in either format.
    """
    weights = {name: p.asnumpy() for name, p in mindspore.load_checkpoint(str(checkpoint)).items()}
    for rank in range(mp):
        slices = []
        for name, weight in weights.items():
            dimension = sliced_dimension(name)
            part = weight if dimension is None else np.split(weight, mp, dimension)[rank]
            slices.append({"name": name, "data": mindspore.Tensor(np.array(part, order="C"))})
        target = folder / "checkpoint" / f"rank_{rank}"
        target.mkdir(parents=True)
        mindspore.save_checkpoint(slices, str(target / f"tiny_rank_{rank}-1_8.{form}"), format=form)
    listed = [(name, weight.ndim) for name, weight in weights.items() if weight.size > 1]
    write_strategy_files(folder / "strategy", listed, 1, mp)


if __name__ == "__main__":
    if sys.argv[1] == "data":
        make_data(Path(sys.argv[2]))
    else:
        slice_checkpoint(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), *sys.argv[5:6])

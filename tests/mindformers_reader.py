"""Has MindFormers itself read a Checkpoint 2.0: run as a program under the MindFormers that is to read.

Arguments: the root, and a JSON file: folder, which gets ``rank_N.npz`` -> rank -> parameter -> null for the whole, or its
layout: device_matrix, tensor_map, rank_list, shape.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(root: str, told: str) -> None:
    import mindspore
    import numpy as np
    from mindformers.checkpoint import reshard
    from mindformers.checkpoint.checkpoint import CommonInfo, get_checkpoint_path
    from mindformers.checkpoint.metadata import get_metadata_of_checkpoint
    from mindformers.checkpoint.sharded_tensor import build_sharded_tensor, get_sharded_tensor_from_strategy_metadata

    folder = get_checkpoint_path(root)
    common = CommonInfo.load_common(f"{folder}/common.json")
    tensors, files = get_metadata_of_checkpoint(folder)
    wanted = json.loads(Path(told).read_text())
    for out, rank, parameters in [(out, *item) for out, ranks in wanted.items() for item in ranks.items()]:
        whole, sliced = {}, {}
        for name, told in parameters.items():
            if told is None:
                shape = tensors[name][0].global_shape
                whole[name] = build_sharded_tensor(name, mindspore.float32, shape, shape, [1] * len(shape))
                continue
            matrix = tuple(told["device_matrix"])
            aliases = tuple(f"x{i}" for i in range(len(matrix)))
            layout = mindspore.parallel.Layout(matrix, aliases, told["rank_list"])
            layout = layout(*("None" if axis == -1 else aliases[-1 - axis] for axis in told["tensor_map"]))
            sliced[name] = [layout, mindspore.float32, told["shape"]]
        if sliced:
            whole.update(get_sharded_tensor_from_strategy_metadata(sliced, int(rank)))
        reshard.get_real_rank = lambda rank=rank: int(rank)
        loaded = reshard.ReshardLoader(folder, whole, tensors, files).load()
        np.savez(f"{out}/rank_{rank}.npz", **{name: parameter.asnumpy() for name, parameter in loaded.items()})
    print("READ", folder, "STEP", common.global_step)


if __name__ == "__main__":
    main(*sys.argv[1:])

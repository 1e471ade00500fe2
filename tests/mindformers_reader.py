"""Has MindFormers itself read a Checkpoint 2.0: run as a program under the MindFormers that is to read.

Arguments: the root, and a JSON file: folder, which gets ``rank_N.npz`` -> rank -> parameter -> null for the whole, or its
layout: device_matrix, tensor_map, rank_list, shape.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(root: str, told: str) -> None:
    for out, ranks in json.loads(Path(told).read_text()).items():
        for rank, parameters in ranks.items():
            whole = all(layout is None for layout in parameters.values())
            arrays = load(root, list(parameters)) if whole else reshard(root, int(rank), parameters)
            np.savez(f"{out}/rank_{rank}.npz", **arrays)


def load(root: str, names: list[str]) -> dict[str, np.ndarray]:
    """What load_checkpoint makes of a network of one rank."""
    import mindspore
    from mindformers.checkpoint.checkpoint import get_checkpoint_path, load_checkpoint
    from mindformers.checkpoint.metadata import get_metadata_of_checkpoint

    tensors, _ = get_metadata_of_checkpoint(get_checkpoint_path(root))
    network = mindspore.nn.Cell()
    for name in names:
        empty = mindspore.Tensor(np.full(tensors[name][0].global_shape, -1, np.float32))
        network.insert_param_to_cell(name.replace(".", "|"), mindspore.Parameter(empty, name=name))
    for parameter, name in zip(network.get_parameters(), names):
        parameter.name = name
    load_checkpoint(root, network)
    return {parameter.name: parameter.asnumpy() for parameter in network.get_parameters()}


def reshard(root: str, rank: int, layouts: dict[str, dict[str, Any]]) -> dict[str, np.ndarray]:
    """What its loader reads and reshards for a rank of another strategy."""
    import mindspore
    from mindformers.checkpoint import reshard
    from mindformers.checkpoint.checkpoint import get_checkpoint_path
    from mindformers.checkpoint.metadata import get_metadata_of_checkpoint
    from mindformers.checkpoint.sharded_tensor import get_sharded_tensor_from_strategy_metadata

    folder = get_checkpoint_path(root)
    wanted = {}
    for name, told in layouts.items():
        matrix = tuple(told["device_matrix"])
        aliases = tuple(f"x{i}" for i in range(len(matrix)))
        layout = mindspore.parallel.Layout(matrix, aliases, told["rank_list"])
        layout = layout(*("None" if axis == -1 else aliases[-1 - axis] for axis in told["tensor_map"]))
        wanted[name] = [layout, mindspore.float32, told["shape"]]
    reshard.get_real_rank = lambda: rank
    sharded = get_sharded_tensor_from_strategy_metadata(wanted, rank)
    loader = reshard.ReshardLoader(folder, sharded, *get_metadata_of_checkpoint(folder))
    return {name: parameter.asnumpy() for name, parameter in loader.load().items()}


if __name__ == "__main__":
    main(*sys.argv[1:])

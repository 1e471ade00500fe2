"""Has MindFormers itself write a Checkpoint 2.0: run as a program under the MindFormers that is to write.

Argument: a JSON file with root, iteration, prefix, arrays (an .npz file with the full ones) and layouts: rank -> parameter
-> device_matrix, tensor_map, rank_list. As in a job of several stages every file also holds the parameters of the other
stages, whole and with numbers that mean nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(told: str) -> None:
    import mindspore
    import numpy as np
    from mindformers.checkpoint import checkpoint, metadata
    from mindformers.checkpoint import utils as names
    from mindformers.checkpoint.reshard import infer_slice_area_by_rank
    from mindformers.checkpoint.sharded_tensor import get_sharded_tensor_from_strategy_metadata

    job = json.loads(Path(told).read_text())
    full = dict(np.load(job["arrays"]))
    model = [name for name in full if not name.startswith("adam_") and name != "global_step"]
    world_size = len(job["layouts"])
    folder = Path(names.get_checkpoint_iter_dir(job["root"], job["iteration"]))
    folder.mkdir(parents=True)
    sharded = {}
    for rank in range(world_size):
        listed, held = {}, {}
        for name, array in full.items():
            one = job["layouts"][str(rank)].get(name)
            if one is None:
                held[name] = array if name == "global_step" else np.full_like(array, -1)
                continue
            matrix = tuple(one["device_matrix"])
            aliases = tuple(f"x{i}" for i in range(len(matrix)))
            layout = mindspore.parallel.Layout(matrix, aliases, one["rank_list"])
            layout = layout(*(_aliases(entry, aliases) for entry in one["tensor_map"]))
            listed[name] = [layout, mindspore.float32, array.shape]
            area = infer_slice_area_by_rank(matrix, one["tensor_map"], one["rank_list"].index(rank), array.shape)
            held[name] = array[tuple(slice(*part) for part in area)]
        sharded[rank] = get_sharded_tensor_from_strategy_metadata(listed, rank)
        for kind in names.FileType:
            own = [name for name in held if (name in model) == (kind is names.FileType.MODEL)]
            tensors = [{"name": name, "data": mindspore.Tensor(np.array(held[name], order="C"))} for name in own]
            file = names.get_checkpoint_name(str(folder), job["prefix"], rank, world_size, kind)
            mindspore.save_checkpoint(tensors, file, format="safetensors")
    metadata.get_group_size = lambda: world_size
    files = metadata.get_total_params_file_mapping_info(sharded, job["prefix"], model)
    metadata.save_metadata(sharded, files, str(folder / "metadata.json"))
    common = checkpoint.CommonInfo(1, job["iteration"], job["iteration"], 2.0, 8)
    common.save_common(str(folder / "common.json"))
    Path(names.get_checkpoint_tracker_filename(job["root"])).write_text(str(job["iteration"]))
    print("WRITTEN")


def _aliases(entry: object, aliases: tuple[str, ...]) -> object:
    if isinstance(entry, list):
        return tuple(_aliases(axis, aliases) for axis in entry)
    return "None" if entry == -1 else aliases[-1 - entry]


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Checkpoint 2.0 as MindFormers writes it, written by the tests themselves; what can be wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle

from auto_trans.core.saved import with_axes

GENUINE = Path(__file__).parent / "genuine" / "checkpoint2"
COMMON = {
    "epoch_num": 2,
    "step_num": 7,
    "global_step": 6,
    "loss_scale": 0.5,
    "global_batch_size": 4,
    "ckpt_status": None,
}


def write_iteration(
    root: Path,
    full: dict[str, np.ndarray],
    strategy: Any,
    *,
    number: int = 7,
    prefix: str = "",
    saver: Callable[[str, tuple[int, ...]], int] | None = None,
    foreign: bool = False,
    common: dict[str, Any] | None = None,
    states: tuple[str, ...] = ("adam_", "global_step"),
) -> Path:
    """Writes an iteration and the tracker file.

    Args:
        root: The root.
        full: The full arrays; what the strategy does not list goes to every rank's file and to no metadata.
        strategy: The strategy.
        number: The iteration.
        prefix: Beginning of the files' names.
        saver: Of the ranks that hold a slice of a parameter the one that saves it; all do by default.
        foreign: Whether files also hold, of parameters of other stages, numbers that mean nothing.
        common: The content of common.json.
        states: How the names of what goes to the optimizer's file begin.

    Returns:
        The folder of the iteration.
    """
    folder = root / f"iteration_{number:08d}"
    files: dict[str, dict[str, oracle.Raw]] = {}
    described: dict[str, Any] = {}
    stored: dict[str, Any] = {}
    world, devices = strategy.world_size, strategy.stage_devices
    for name, array in full.items():
        kind = "opt" if name.startswith(states) else "model"

        def file_of(rank: int, kind: str = kind) -> str:
            return f"{prefix}{kind}-{rank:07d}-{world:07d}.safetensors"

        for rank in range(world):
            held = strategy.layouts.get(name, {})
            if not strategy.lists(name):
                files.setdefault(file_of(rank), {})[name] = oracle.raw(array)
            elif foreign and rank // devices not in held:
                files.setdefault(file_of(rank), {})[name] = oracle.raw(np.full_like(array, -1))
        for stage, sliced in strategy.layouts.get(name, {}).items():
            layout = with_axes(sliced)
            ranks = list(range(stage * devices, (stage + 1) * devices))
            grid = layout.grid(array.ndim)
            holders: dict[int, list[int]] = {}
            for rank in ranks:
                cell = layout.cell(rank - ranks[0], array.ndim)
                number = int(np.ravel_multi_index(cell, grid)) if cell else 0
                holders.setdefault(number, []).append(rank)
            shape = [n // count for n, count in zip(array.shape, grid)]
            replicas = [sum(r in group and r < rank for r in group) for rank in ranks for group in [_of(holders, rank)]]
            described.setdefault(
                name,
                {
                    "properties": {
                        "dtype": oracle.NAMES[array.dtype.name],
                        "replica_id": replicas,
                        "allow_shape_mismatch": False,
                        "allow_to_save": True,
                    },
                    "global_shape": list(array.shape),
                    "axis_fragmentations": list(grid),
                    "layout": {
                        "device_matrix": list(layout.dev_matrix),
                        "tensor_map": [_entry(layout, dim) for dim in range(array.ndim)],
                        "interleaved_parallel": False,
                        "alias_name": [f"x{i}" for i in range(len(layout.dev_matrix))],
                        "rank_list": ranks,
                    },
                    "chunk": [],
                },
            )
            chunks = described[name]["chunk"]
            own = [{"global_offset": [n], "local_shape": shape} for n in holders]
            chunks += [chunk for chunk in own if chunk not in chunks]
            for number, group in holders.items():
                savers = group if saver is None else [saver(name, tuple(group))]
                for rank in savers:
                    box = sliced.box(rank - ranks[0], array.shape)
                    files.setdefault(file_of(rank), {})[name] = oracle.raw(np.array(array[box.slices()], order="C"))
                    stored.setdefault(str((name, (number,))), []).append(
                        {"file_name": file_of(rank), "storage_rank": rank, "rank_group": group}
                    )
    for file, tensors in files.items():
        oracle.write_safetensors_raw(folder / file, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    if world > 1:
        metadata = {"state_dict_metadata": described, "storage_data": stored}
        (folder / "metadata.json").write_text(json.dumps(metadata, ensure_ascii=False))
    (folder / "common.json").write_text(json.dumps(COMMON if common is None else common))
    (root / "latest_checkpointed_iteration.txt").write_text(str(int(folder.name[10:])))
    return folder


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """Edits the metadata.json of an iteration."""
    path = folder / "metadata.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def _of(holders: dict[int, list[int]], rank: int) -> list[int]:
    return next(group for group in holders.values() if rank in group)


def _entry(layout: Any, dim: int) -> Any:
    axes = layout.tensor_map[dim] if dim < len(layout.tensor_map) else ()
    return -1 if not axes else axes[0] if len(axes) == 1 else list(axes)

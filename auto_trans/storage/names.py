"""How files and folders of checkpoints are named, by MindFormers, MindSpore and HuggingFace."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = [
    "COMMON_NAME",
    "HYPER_PARAMETERS",
    "INDEX_NAMES",
    "ITERATION_FILE",
    "ITERATION_FOLDER",
    "METADATA_NAME",
    "RANK_FOLDER",
    "RANK_IN_NAME",
    "TRACKER_NAME",
    "rank_file",
]

RANK_FOLDER = re.compile(r"^rank_([0-9]+)$")
RANK_IN_NAME = re.compile(r"_rank_([0-9]+)")

# what no strategy lists, beside the shards of a complete checkpoint
HYPER_PARAMETERS = "hyper_param.safetensors"
# that of HuggingFace, and the same map for mindspore.load_distributed_checkpoint(unified_safetensors_dir=...)
INDEX_NAMES = ("model.safetensors.index.json", "param_name_map.json")

# Checkpoint 2.0: the iteration that counts, its folder, and in that the files beside those of its ranks
TRACKER_NAME = "latest_checkpointed_iteration.txt"
ITERATION_FOLDER = re.compile(r"^iteration_([0-9]{8,})$")
ITERATION_FILE = re.compile(
    r"^(?:(?P<prefix>[^/]+)-)?(?P<kind>model|opt)-(?P<index>[0-9]{7,})-(?P<total>[0-9]{7,})\.safetensors$"
)
METADATA_NAME, COMMON_NAME = "metadata.json", "common.json"


def rank_file(folder: Path, prefix: str, rank: int, suffix: str = ".ckpt") -> Path:
    """Where the slice of ``rank`` lies in a target folder: ``rank_N/{prefix}N.ckpt``, as MindFormers expects it."""
    return folder / f"rank_{rank}" / f"{prefix}{rank}{suffix}"

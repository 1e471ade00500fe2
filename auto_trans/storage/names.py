"""How files and folders of checkpoints are named, by MindFormers, MindSpore and HuggingFace."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["HYPER_PARAMETERS", "INDEX_NAMES", "RANK_FOLDER", "RANK_IN_NAME", "rank_file"]

RANK_FOLDER = re.compile(r"^rank_([0-9]+)$")
RANK_IN_NAME = re.compile(r"_rank_([0-9]+)")

# what no strategy lists, beside the shards of a complete checkpoint
HYPER_PARAMETERS = "hyper_param.safetensors"
# that of HuggingFace, and the same map for mindspore.load_distributed_checkpoint(unified_safetensors_dir=...)
INDEX_NAMES = ("model.safetensors.index.json", "param_name_map.json")


def rank_file(folder: Path, prefix: str, rank: int, suffix: str = ".ckpt") -> Path:
    """Where the slice of ``rank`` lies in a target folder: ``rank_N/{prefix}N.ckpt``, as MindFormers expects it."""
    return folder / f"rank_{rank}" / f"{prefix}{rank}{suffix}"

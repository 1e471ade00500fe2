r"""Drop-in for MindFormers' ``transform_ckpt_lora.py``: merges LoRA weights into the base weights.

    python transform_ckpt_lora.py \
      --src_ckpt_strategy src_strategy_path_or_dir \
      --src_ckpt_path_or_dir src_ckpt_path_or_dir \
      --dst_ckpt_dir dst_ckpt_dir \
      --prefix "checkpoint_" \
      --lora_scaling lora_alpha/lora_rank

The merged weights are in ``<dst_ckpt_dir>/rank_N/checkpoint_N.ckpt``; the last line printed is the ``load_checkpoint:`` to
set. In a strategy folder of several pipeline stages ``merged_ckpt_strategy.ckpt`` is written anew, as MindFormers does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

if __package__ in (None, ""):  # run by its path from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from auto_trans.log import logger
from auto_trans.merge_lora import merge_lora
from auto_trans.storage.strategies import remerge_strategies
from auto_trans.tools.script import run_script, script_parser

__all__ = ["main"]

_FLAGS = {
    "src": "--src_ckpt_path_or_dir",
    "dst": "--dst_ckpt_dir",
    "src_strategy": "--src_ckpt_strategy",
    "dst_strategy": "--dst_ckpt_strategy",
    "prefix": "--prefix",
    "format": "--save_format",
    "scaling": "--lora_scaling",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Merges by the documented flags.

    Returns:
        The exit code: 0 done, 1 failed.
    """
    parser = script_parser("transform_ckpt_lora.py", __doc__)
    add = parser.add_argument
    add("--src_ckpt_strategy", default="", help="strategy file or folder of the source (none: it is complete)")
    add("--dst_ckpt_strategy", default="", help="strategy file or folder of the target (none: one complete file)")
    add("--src_ckpt_path_or_dir", required=True, help="complete file, or folder of rank_x folders, of the source")
    add("--dst_ckpt_dir", required=True, help="an empty or new folder")
    add("--prefix", default="checkpoint_", help="beginning of the target files' names (default: checkpoint_)")
    add("--lora_scaling", default=None, help="lora_alpha/lora_rank, as a number or as 16/8 (default: 1)")
    add("--save_format", default="ckpt", choices=["ckpt", "safetensors"], help="format of the target (default: ckpt)")
    arguments = parser.parse_args(argv)
    return run_script("transform_ckpt_lora", lambda: f"load_checkpoint: {_merge(arguments)}", _FLAGS)


def _merge(arguments: argparse.Namespace) -> Path:
    remerge_strategies(arguments.src_ckpt_strategy)
    scaling = arguments.lora_scaling
    if scaling is None:
        scaling = 1.0
        logger.warning("--lora_scaling is not given; 1 is used, which is right only where lora_alpha equals lora_rank")
    report = merge_lora(
        arguments.src_ckpt_path_or_dir,
        arguments.dst_ckpt_dir,
        arguments.src_ckpt_strategy or None,
        arguments.dst_ckpt_strategy or None,
        scaling=scaling,
        prefix=arguments.prefix,
        format=arguments.save_format,
        allow_extra=tuple(arguments.allow_extra),
        allow_missing=tuple(arguments.allow_missing),
        quiet=False,
    )
    single = len(report.files) == 1
    return Path(arguments.dst_ckpt_dir).absolute() / (report.files[0].file if single else "")


if __name__ == "__main__":
    sys.exit(main())

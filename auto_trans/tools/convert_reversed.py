r"""Drop-in for MindFormers' ``convert_reversed.py``: merges distributed safetensors weights into complete ones.

    python convert_reversed.py \
      --src_strategy_dirs src_strategy_path_or_dir \
      --mindspore_ckpt_dir mindspore_ckpt_dir \
      --tmp_dir tmp_dir \
      --file_suffix "1_1" \
      --has_redundancy True

``--has_redundancy True`` says, as in MindFormers, that redundancy was *removed* from the weights; where the files' metadata
tell otherwise, they are right. In a strategy folder of several pipeline stages ``merged_ckpt_strategy.ckpt`` is written
anew, as MindFormers does. The last line printed is the folder of the merged weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

if __package__ in (None, ""):  # run by its path from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from auto_trans.merge_safetensors import merge_safetensors
from auto_trans.storage.strategies import remerge_strategies
from auto_trans.tools.script import boolean, run_script, script_parser

__all__ = ["main"]

_FLAGS = {
    "src": "--mindspore_ckpt_dir",
    "dst": "--tmp_dir",
    "src_strategy": "--src_strategy_dirs",
    "file_suffix": "--file_suffix",
    "max_shard_size": "--max_shard_size",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Merges by the documented flags.

    Returns:
        The exit code: 0 done, 1 failed.
    """
    parser = script_parser("convert_reversed.py", __doc__)
    add = parser.add_argument
    add("--src_strategy_dirs", required=True, help="strategy file, merged file or folder of the source")
    add("--mindspore_ckpt_dir", required=True, help="folder of the rank_x folders")
    add("--tmp_dir", required=True, help="an empty or new folder for the merged weights")
    add("--file_suffix", default="1_1", help="end of the file names to take (default: 1_1)")
    add("--has_redundancy", type=boolean, default=True, metavar="BOOL", help="redundancy was removed (default: True)")
    add("--filter_out_param_prefix", nargs="*", default=[], help="leave out parameters that begin so")
    add("--max_shard_size", default="5GB", help="largest size of a file (default: 5GB)")
    arguments = parser.parse_args(argv)
    return run_script("convert_reversed", lambda: str(_merge(arguments)), _FLAGS)


def _merge(arguments: argparse.Namespace) -> Path:
    remerge_strategies(arguments.src_strategy_dirs)
    report = merge_safetensors(
        arguments.mindspore_ckpt_dir, arguments.tmp_dir, arguments.src_strategy_dirs, file_suffix=arguments.file_suffix,
        redundancy_removed=arguments.has_redundancy, max_shard_size=arguments.max_shard_size,
        filter_out_param_prefix=arguments.filter_out_param_prefix, allow_extra=arguments.allow_extra,
        allow_missing=arguments.allow_missing, quiet=False,
    )  # fmt: skip
    return report.target.absolute()


if __name__ == "__main__":
    sys.exit(main())

r"""Drop-in for MindFormers' ``transform_checkpoint.py``: the same flags, without MindFormers and without an NPU.

    python transform_checkpoint.py \
      --src_checkpoint /worker/checkpoint/llama3-8b-2layer/rank_0/llama3_8b.ckpt \
      --dst_checkpoint /worker/transform_ckpt/llama3_8b_1to8/ \
      --dst_strategy /worker/mindformers/output/strategy/

The converted weights are in ``<dst>/<name>/rank_N/checkpoint_N.ckpt``; the last line printed is the ``load_checkpoint:`` to
set. With ``--transform_process_num`` above 1 a process converts only the slices that ``--rank_id`` is elected for; start one
process for each, as ``transform_checkpoint.sh`` does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Optional

if __package__ in (None, ""):  # run by its path from a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from auto_trans.conversion import Conversion
from auto_trans.coordination.election import elect
from auto_trans.core.rules import Allowed
from auto_trans.core.strategy import Strategy
from auto_trans.errors import ConfigError
from auto_trans.log import logger
from auto_trans.request import Request
from auto_trans.storage.sources import as_strategy, find_sources
from auto_trans.tools.script import boolean, run_script, script_parser

__all__ = ["main"]

_FLAGS = {
    "src": "--src_checkpoint",
    "dst": "--dst_checkpoint",
    "src_strategy": "--src_strategy",
    "dst_strategy": "--dst_strategy",
    "prefix": "--prefix",
    "ranks": "--rank_id",
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Converts by the documented flags.

    Returns:
        The exit code: 0 done, 1 failed.
    """
    arguments = _parser().parse_args(argv)
    return run_script("transform_checkpoint", lambda: f"load_checkpoint: {_transform(arguments)}", _FLAGS)


def _parser() -> argparse.ArgumentParser:
    parser = script_parser("transform_checkpoint.py", __doc__)
    add = parser.add_argument
    add("--src_checkpoint", required=True, help="complete file, or folder of rank_x folders, of the source")
    add("--dst_checkpoint_dir", "--dst_checkpoint", required=True, help="folder of the target")
    add("--src_strategy", default=None, help="strategy file or folder of the source (none: it is complete)")
    add("--dst_strategy", default=None, help="strategy file or folder of the target (none: one complete file)")
    add("--prefix", default="checkpoint_", help="beginning of the target files' names (default: checkpoint_)")
    add("--rank_id", type=int, default=0, help="which of several processes this is (default: 0)")
    add("--world_size", type=int, default=1, help="number of slices of the target (default: 1, as the strategy says)")
    add("--transform_process_num", type=int, default=1, help="number of processes (default: 1)")
    add("--transform_by_rank", type=boolean, default=False, metavar="BOOL", help="accepted; makes no difference here")
    return parser


def _transform(arguments: argparse.Namespace) -> Path:
    source, target = (as_strategy(given or None) for given in (arguments.src_strategy, arguments.dst_strategy))
    if source.is_complete and target.is_complete:
        raise ConfigError("«src_strategy» and «dst_strategy» cannot both be None: there is nothing to convert")
    ranks = _own_ranks(arguments, target)
    folder = Path(arguments.dst_checkpoint_dir).absolute()
    found = find_sources(arguments.src_checkpoint, source)
    request = Request(
        Path(arguments.src_checkpoint), folder, source, target, ranks=tuple(ranks), prefix=arguments.prefix,
        allowed=Allowed.of(arguments.allow_extra, arguments.allow_missing),
    )  # fmt: skip
    for checkpoint in found if ranks else ():
        conversion = Conversion(replace(request, dst=folder / checkpoint.name), checkpoint)
        logger.info("%s", conversion.carry_out(part=1 / arguments.transform_process_num))
    return folder / found[0].name if len(found) == 1 else folder


def _own_ranks(arguments: argparse.Namespace, target: Strategy) -> range:
    """The target ranks that this process converts."""
    if arguments.world_size not in (1, target.world_size):
        raise ConfigError(
            f"world_size {arguments.world_size} is not that of the target: {target.origin} describes {target.world_size} "
            f"slices; set --world_size {target.world_size}"
        )
    assignments = {a.rank: a.slices for a in elect(target.world_size, arguments.transform_process_num)}
    if not 0 <= arguments.rank_id < target.world_size:
        raise ConfigError(f"rank_id {arguments.rank_id} is not from 0 to {target.world_size - 1}")
    if arguments.rank_id not in assignments:
        logger.info(
            "rank_id %d converts nothing; the processes are rank_id %s",
            arguments.rank_id, ", ".join(map(str, assignments)),
        )  # fmt: skip
        return range(0)
    return assignments[arguments.rank_id]


if __name__ == "__main__":
    sys.exit(main())

"""Starts a MindFormers job on a CPU from a YAML, like run_mindformer.py: ``python start.py CONFIG [KEY=VALUE ...]``.

Keys may be dotted (``parallel.parallel_mode=1``); values are YAML. ``compile_stand_in=DPxMP`` writes the strategy files
that the compile step of such a job would save, right before the weights are loaded.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import yaml
from cpu import stand_in_for_npu

stand_in_for_npu()

from compile_stand_in import write_strategy_files  # noqa: E402
from mindformers import MindFormerConfig, Trainer, build_context  # noqa: E402
from mindformers.tools.utils import get_output_root_path, get_real_rank  # noqa: E402
from mindformers.trainer import base_trainer  # noqa: E402


def main() -> None:
    """Reads the configuration, overrides it, and trains."""
    config = MindFormerConfig(sys.argv[1])
    compiled = ""
    for argument in sys.argv[2:]:
        key, value = argument.split("=", 1)
        if key == "compile_stand_in":
            compiled = value
        else:
            _set(config, key.split("."), yaml.safe_load(value))
    if compiled:
        _save_strategy_before_loading(*map(int, compiled.split("x")))
    build_context(config)
    Trainer(config).train()


def _set(config: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        config = config[key]
    config[keys[-1]] = value


def _save_strategy_before_loading(dp: int, mp: int) -> None:
    load = base_trainer.transform_and_load_checkpoint

    @functools.wraps(load)
    def compile_and_load(config: Any, model: Any, network: Any, *args: Any, **kwargs: Any) -> Any:
        rank = get_real_rank()
        folder = Path(get_output_root_path()) / "strategy"
        scratch = folder / f".rank_{rank}"
        parameters = [(p.name, len(p.shape)) for p in network.get_parameters() if p.requires_grad]
        moments = [(f"{kind}.{name}", ndim) for name, ndim in parameters for kind in ("adam_m", "adam_v")]
        write_strategy_files(scratch, parameters + moments, dp, mp)
        name = f"ckpt_strategy_rank_{rank}.ckpt"  # every rank saves its own, as MindSpore does
        (scratch / name).rename(folder / name)
        for rest in scratch.iterdir():
            rest.unlink()
        scratch.rmdir()
        return load(config, model, network, *args, **kwargs)

    base_trainer.transform_and_load_checkpoint = compile_and_load


if __name__ == "__main__":
    main()

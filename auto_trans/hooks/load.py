"""The wrapper of MindFormers' ``transform_and_load_checkpoint``.

MindFormers keeps what it does well: compiling, ``only_save_strategy`` and the final load. The wrapper checks the settings
before the graph is compiled, which can take an hour, and tells them to `TransformCkpt`, which MindFormers calls after it.
"""

from __future__ import annotations

from typing import Any, Callable

from auto_trans.config import AutoTransConfig
from auto_trans.coordination.election import elect
from auto_trans.hooks.job import Job
from auto_trans.log import logger

__all__ = ["load_checkpoint"]


def load_checkpoint(original: Callable[..., None], config: Any, *args: Any, **kwargs: Any) -> None:
    """Has MindFormers compile and load, with the conversion in between done by auto_trans.

    Args:
        original: MindFormers' own function.
        config: The job's configuration.
        *args: Passed on.
        **kwargs: Passed on.

    Raises:
        ConfigError: A setting has a value that it cannot have.
    """
    if not config.auto_trans_ckpt or config.only_save_strategy:
        original(config, *args, **kwargs)
        return
    if config.load_ckpt_format == "safetensors":
        logger.info("load_ckpt_format is safetensors: MindFormers' own conversion is used, not that of auto_trans")
        original(config, *args, **kwargs)
        return
    if Job.in_modelarts():
        logger.info("on ModelArts MindFormers' own conversion is used, not that of auto_trans")
        original(config, *args, **kwargs)
        return
    job = Job.current()
    settings = AutoTransConfig.from_settings(config, _load_path(config))
    elect(job.world_size, settings.transform_process_num)
    with job.loading(settings):
        original(config, *args, **kwargs)


def _load_path(config: Any) -> Any:
    """The path of the weights; MindFormers 1.9 moved it to ``config.checkpoint.load_path``."""
    checkpoint = config.get("checkpoint")
    moved = checkpoint.get("load_path") if hasattr(checkpoint, "get") else None
    return moved or config.load_checkpoint

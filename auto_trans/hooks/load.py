"""The wrappers of what MindFormers does with a job's settings: checking them, and loading its weights.

MindFormers keeps what it does well: compiling, ``only_save_strategy`` and the final load. The settings are checked before
the graph is compiled, which can take an hour, and told to what MindFormers calls in between.
"""

from __future__ import annotations

from typing import Any, Callable

from auto_trans.config import AutoTransConfig
from auto_trans.coordination.election import elect
from auto_trans.core.consistency import Network
from auto_trans.hooks.job import Job, Running, in_yaml_words
from auto_trans.log import logger

__all__ = ["WHOLE_MODES", "check_settings", "load_checkpoint", "load_path", "look_at"]

# parallel modes in which every rank holds all weights whole
WHOLE_MODES = ("stand_alone", "data_parallel")


def check_settings(original: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Has the Trainer check its settings, known to what it calls meanwhile (`auto_trans.hooks.clear`).

    Args:
        original: MindFormers' own method.
        trainer: The Trainer.
        *args: Passed on.
        **kwargs: Passed on.
    """
    with Job.knowing(Running(trainer.config)):
        original(trainer, *args, **kwargs)


def load_checkpoint(
    original: Callable[..., None], config: Any, model: Any, network: Any, *args: Any, **kwargs: Any
) -> None:
    """Has MindFormers compile and load, with the conversion in between done by auto_trans.

    Args:
        original: MindFormers' own function.
        config: The job's configuration.
        model: Passed on.
        network: What the weights are loaded into.
        *args: Passed on; the second is the optimizer.
        **kwargs: Passed on.

    Raises:
        ConfigError: A setting has a value that it cannot have.
    """
    leave_to_stock = ""
    if config.load_ckpt_format == "safetensors":
        leave_to_stock = "load_ckpt_format is safetensors"
    elif Job.in_modelarts():
        leave_to_stock = "this is ModelArts"
    if not config.auto_trans_ckpt or config.only_save_strategy or leave_to_stock:
        if leave_to_stock and config.auto_trans_ckpt:
            logger.info("%s: MindFormers' own conversion is used, not that of auto_trans", leave_to_stock)
        original(config, model, network, *args, **kwargs)
        return
    job = Job.current()
    with in_yaml_words():
        settings = AutoTransConfig.from_settings(config, load_path(config))
        elect(job.world_size, settings.transform_process_num)
    optimizer = kwargs.get("optimizer", args[1] if len(args) > 1 else None)
    try:
        with Job.knowing(Running(config, look_at(network, optimizer))):
            original(config, model, network, *args, **kwargs)
    finally:
        job.release()


def look_at(*cells: Any) -> Network:
    """What is known of networks and optimizers that MindFormers has built, and perhaps compiled."""
    from mindspore import context

    shapes = {}
    for cell in cells:
        for _, parameter in cell.parameters_and_names() if hasattr(cell, "parameters_and_names") else ():
            shape = tuple(parameter.shape)
            if all(n >= 0 for n in shape):  # -1: not known before the first step
                shapes[parameter.name] = shape
    return Network(shapes, sliced=context.get_auto_parallel_context("parallel_mode") not in WHOLE_MODES)


def load_path(config: Any) -> Any:
    """The path of the weights; MindFormers 1.9 moved it to ``config.checkpoint.load_path``."""
    checkpoint = config.get("checkpoint")
    moved = checkpoint.get("load_path") if hasattr(checkpoint, "get") else None
    return moved or config.load_checkpoint

"""The wrappers of what MindFormers does with a job's settings: checking them, and loading its weights.

MindFormers keeps what it does well: compiling, ``only_save_strategy`` and the final load. The settings are checked before
the graph is compiled, which can take an hour, and told to what MindFormers calls in between.
"""

from __future__ import annotations

from typing import Any, Callable

from auto_trans.core.consistency import Network, check_known
from auto_trans.hooks.clear import check_and_empty
from auto_trans.hooks.direct import judge_names
from auto_trans.hooks.job import Job, Running, in_yaml_words
from auto_trans.hooks.safetensors import check_concatenation
from auto_trans.jobs import RESHARDS, Load, load_path, reshards_itself
from auto_trans.log import logger
from auto_trans.network import look_at
from auto_trans.storage.sources import ScannedFiles

__all__ = ["check_settings", "load_checkpoint", "preload"]


def check_settings(original: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
    """Has the Trainer check its settings, known to what it calls meanwhile (`auto_trans.hooks.clear`).

    Not every version of MindFormers empties the output directory of a safetensors job then, so that is done here.

    Args:
        original: MindFormers' own method.
        trainer: The Trainer.
        *args: Passed on.
        **kwargs: Passed on.

    Raises:
        AutoTransError: The source cannot be converted, or lies where it would be deleted.
    """
    reshards = reshards_itself(trainer.config, Job.mindformers())
    if reshards and trainer.config.get("auto_trans_ckpt"):
        logger.info("auto_trans leaves this job alone: %s", RESHARDS)
    with Job.knowing(Running(trainer.config, reshards=reshards)):
        original(trainer, *args, **kwargs)
    config = trainer.config
    ours = config.get("auto_trans_ckpt") and config.get("load_ckpt_format") == "safetensors" and not reshards
    if ours and load_path(config) and not Job.in_modelarts():
        with in_yaml_words():
            load = Load.of(config)
        check_and_empty(Job.current(), load)


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
        PlanError: Complete weights are of another model.
    """
    if not config.auto_trans_ckpt or config.only_save_strategy:
        original(config, model, network, *args, **kwargs)
        return
    job = Job.current()
    try:
        with in_yaml_words():
            load = judge_names(Load.of(config, modelarts=Job.in_modelarts()), config, network)
            if load.left:
                logger.info("%s: MindFormers' own conversion is used, not that of auto_trans", load.left)
        _, optimizer, _, predicts = _arguments(*args, **kwargs)
        known = look_at(job.world_size, network, optimizer)
        if load.checked and not load.left and not job.is_emptied:  # a load without the Trainer, as for a service
            check_and_empty(job, load)
        with in_yaml_words():
            if (load.left and load.checked) or (load.is_direct and not load.config.src_strategy):
                _check_known(load, network, known)
            if load.format == "safetensors" and not load.left and predicts:
                check_concatenation(load, config, network)
        with Job.knowing(Running(config, known, load)):
            original(config, model, network, *args, **kwargs)
    finally:
        job.release()


def preload(original: Callable[..., None], config: Any) -> None:
    """Leaves out reading ahead what no rank will load: of a source that is converted it finds nothing, or not for all ranks.

    Args:
        original: MindFormers' own function, from 1.8 on.
        config: The job's configuration.
    """
    with in_yaml_words():
        if Load.of(config, modelarts=Job.in_modelarts()).left:
            original(config)


def _arguments(
    dataset: Any = None, optimizer: Any = None, do_eval: bool = False, do_predict: bool = False
) -> tuple[Any, Any, bool, bool]:
    """The last arguments of MindFormers' function, by name."""
    return dataset, optimizer, do_eval, do_predict


def _check_known(load: Load, network: Any, known: Network) -> None:
    """Looks whether weights from which ranks take slices while they load them are of this model at all."""
    translate = _translator(network)
    for checkpoint in load.find(load.source_strategy()):
        heads = ScannedFiles(checkpoint)
        check_known(known, (translate(n) for rank in heads.ranks for n in heads.tensors(rank)), str(checkpoint.path))


def _translator(network: Any) -> Callable[[str], str]:
    """What gives the network's own name of a parameter that may bear HuggingFace's."""
    cells = (network, *(cell for _, cell in network.cells_and_names()))
    cell = next((cell for cell in cells if hasattr(cell, "convert_name")), None)

    def translate(name: str) -> str:
        try:
            return name if cell is None else str(cell.convert_name(name))
        except RuntimeError:  # a model that has no names of HuggingFace
            return name

    return translate

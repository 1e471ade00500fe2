"""Loads weights as MindFormers does for evaluation or inference, and prints a digest of the network.

``python load_only.py CONFIG eval,predict [KEY=VALUE ...]``. To generate text takes a tokenizer and kernels that a CPU
does not have; the load is the same.
"""

from __future__ import annotations

import hashlib
import sys

import start  # first: it stands in for what MindFormers needs of an NPU
import yaml
from mindformers import MindFormerConfig, Trainer, build_context
from mindformers.models import build_network
from mindformers.trainer.utils import transform_and_load_checkpoint
from mindspore import Model


def main() -> None:
    """Loads, and prints, once for each mode."""
    config, modes = MindFormerConfig(sys.argv[1]), sys.argv[2].split(",")
    for argument in sys.argv[3:]:
        key, value = argument.split("=", 1)
        start._set(config, key.split("."), yaml.safe_load(value))
    build_context(config)
    for mode in modes:
        load(mode, config)


def load(mode: str, config: MindFormerConfig) -> None:
    """Loads for one mode, as a Trainer of its own does."""
    config.run_mode = mode
    trainer = Trainer(config)
    trainer.config.load_checkpoint = config.load_checkpoint
    trainer._check_config_rules()
    network = build_network(trainer.config.model)
    flags = {"do_eval": mode == "eval", "do_predict": mode == "predict"}
    transform_and_load_checkpoint(trainer.config, Model(network), network, None, **flags)
    digest = hashlib.sha256()
    for name, parameter in sorted(network.parameters_dict().items()):
        digest.update(name.encode() + parameter.asnumpy().tobytes())
    print(mode, "digest", digest.hexdigest(), flush=True)


if __name__ == "__main__":
    main()

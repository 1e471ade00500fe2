"""The public face of the replacement of MindFormers' TransformCkpt."""

from __future__ import annotations

import inspect
import json
import os

import numpy as np
import oracle
import pytest

from auto_trans.config import AutoTransConfig
from auto_trans.coordination.election import elect
from auto_trans.errors import ConfigError
from auto_trans.storage.manifest import MANIFEST_NAME

pytestmark = pytest.mark.mindspore


@pytest.fixture
def transform(monkeypatch):
    from auto_trans.hooks.transform import TransformCkpt

    monkeypatch.setattr(TransformCkpt, "stock", None)
    return TransformCkpt


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"npu_num_per_node": 3}, "npu_num_per_node must be a power of 2, but got 3"),
        ({"npu_num_per_node": "many"}, "npu_num_per_node must be a power of 2"),
        ({"transform_by_rank": "yes"}, "transform_by_rank must be"),
        ({"transform_process_num": 0}, "should not be smaller than 1"),
        ({"transform_process_num": 3}, "does not divide the world size 8"),
    ],
)
def test_what_a_yaml_may_not_say_the_constructor_may_not_either(transform, settings, message):
    with pytest.raises(ConfigError, match=message):
        transform(auto_trans_ckpt=True, rank_id=0, world_size=8, **settings)


def test_public_face_is_that_of_mindformers(transform):
    from mindformers.tools.ckpt_transform import TransformCkpt as Stock

    stock = getattr(Stock, "_auto_trans_original", Stock)
    for method in ("__init__", "__call__"):
        assert list(inspect.signature(getattr(transform, method)).parameters) == list(
            inspect.signature(getattr(stock, method)).parameters
        )
    made = transform(auto_trans_ckpt=True, rank_id=0, world_size=8, transform_process_num=2)
    assert made.transform_rank_id_list == [0, 4]


@pytest.mark.parametrize("emptied", [True, False])
def test_disk_is_waited_for_only_where_the_next_start_does_not_empty_the_output(job, tmp_path, monkeypatch, emptied):
    """Every load empties it, and so need not wait; a call that comes without a load leaves what it finds."""
    from auto_trans.hooks.transform import convert_for_job

    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), fsync(fd)))
    source = oracle.write_raw(tmp_path / "llama.ckpt", {"w": oracle.raw(np.ones(3, np.float32))})
    if emptied:
        job.emptied()
    convert_for_job(job, AutoTransConfig(str(source)), elect(1, 1), "checkpoint_", None, format="safetensors")
    assert bool(synced) is not emptied
    folder = job.transformed_dir / "llama"
    assert (folder / "rank_0" / "checkpoint_0.safetensors").is_file()
    assert json.loads((folder / MANIFEST_NAME).read_text()).get("durable", True) is not emptied

"""The public face of the replacement of MindFormers' TransformCkpt."""

from __future__ import annotations

import inspect

import pytest

from auto_trans.errors import ConfigError

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

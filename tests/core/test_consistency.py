"""A strategy of the right names but another slicing is noticed by what contradicts itself, or by the network."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from builders import Index, hold, source_of, strategy

from auto_trans import read_strategy
from auto_trans.core.consistency import Network, check_heads, check_names, check_network, check_shapes
from auto_trans.core.layout import Layout
from auto_trans.core.rules import Allowed
from auto_trans.core.strategy import Strategy
from auto_trans.errors import PlanError

MP2, WHOLE2 = Layout((2,), ((0,),)), Layout((2,), ((),))


def shapes_under(wrong, full, right):
    """Checks what files saved under one strategy look like under another."""
    check_shapes(source_of(strategy(wrong, origin="wrong.ckpt"), hold(full, strategy(right))))


@pytest.mark.parametrize("model", oracle.CASES)
def test_every_genuine_strategy_agrees_with_its_own_weights(model):
    weights = oracle.Genuine(model)
    for case in oracle.CASES[model]:
        check_shapes(source_of(read_strategy(weights.strategy(case)), weights.slices(case)))


def test_genuine_optimizer_shard_given_for_weights_without_it():
    weights = oracle.Genuine("mf_llama")
    source = source_of(read_strategy(weights.strategy("dp2mp2_opt")), weights.slices("dp2mp2"))
    with pytest.raises(
        PlanError, match=r"feed_forward.*contradict each other.*not the strategy that the weights were saved"
    ):
        check_shapes(source)


def test_moments_have_the_shape_of_their_weight():
    full = {"w": np.zeros((4, 2)), "adam_m.w": np.zeros((4, 2))}
    right = {"w": MP2, "adam_m.w": WHOLE2}
    with pytest.raises(PlanError, match=r"wrong\.ckpt parameter adam_m\.w is \[8, 2\] as a whole and w \[4, 2\]"):
        shapes_under({"w": MP2, "adam_m.w": MP2}, full, right)
    shapes_under(right, full, right)


def test_bias_has_the_length_of_a_dimension_of_its_weight():
    full = {"d.weight": np.zeros((4, 2)), "d.bias": np.zeros(4)}
    right = {"d.weight": MP2, "d.bias": WHOLE2}
    with pytest.raises(PlanError, match=r"d\.bias is \[8\]"):
        shapes_under({"d.weight": MP2, "d.bias": MP2}, full, right)
    shapes_under(right, full, right)


def test_layers_with_slices_of_one_shape_are_of_one_shape():
    full = {"layers.0.w": np.zeros((4, 2)), "layers.1.w": np.zeros((4, 2))}
    right = dict.fromkeys(full, MP2)
    with pytest.raises(PlanError, match=r"layers\.1\.w is \[2, 2\] as a whole and layers\.0\.w \[4, 2\]"):
        shapes_under({**right, "layers.1.w": WHOLE2}, full, right)


def test_layers_may_differ_in_width():
    full = {"layers.0.w": np.zeros((4, 2)), "layers.1.w": np.zeros((8, 2))}
    shapes_under(dict.fromkeys(full, MP2), full, dict.fromkeys(full, MP2))


def test_norm_has_the_length_of_a_dimension_of_its_layer():
    full = {"layers.0.norm.weight": np.zeros(4), "layers.0.w.weight": np.zeros((6, 4)), "layers.0.q_norm": np.zeros(3)}
    right = {"layers.0.norm.weight": WHOLE2, "layers.0.w.weight": MP2, "layers.0.q_norm": WHOLE2}
    with pytest.raises(PlanError, match=r"layers\.0\.norm\.weight is \[8\]"):
        shapes_under({**right, "layers.0.norm.weight": MP2}, full, right)
    shapes_under(right, full, right)


def test_complete_weights_have_nothing_to_contradict():
    check_shapes(source_of(Strategy.complete(), {0: {"w": np.zeros((4, 2)), "adam_m.w": np.zeros(3)}}))


def test_heads_of_all_ranks_are_compared():
    a = strategy({"w": MP2, "v": WHOLE2})
    held = hold({"w": np.zeros((4, 2)), "v": np.zeros(3), "seed": np.zeros(1)}, a)
    held[1]["seed"] = np.zeros(7)
    check_heads(a, Index(held))
    held[1]["w"] = np.zeros((4, 2))
    with pytest.raises(
        PlanError, match=r"w is \[2, 2\] Float32 in rank_0/x\.ckpt but \[4, 2\] Float32 in rank_1/x\.ckpt"
    ):
        check_heads(a, Index(held))


def test_stages_may_slice_a_tied_weight_differently():
    a = strategy({"tied": {0: Layout((1,), ((),)), 1: Layout((1,), ((),))}}, stages=2)
    check_heads(a, Index({0: {"tied": np.zeros(4)}, 1: {"tied": np.zeros(2)}}))


@pytest.mark.parametrize(
    "shape, sliced, content",
    [
        ((8, 2), False, True),  # the whole
        ((8, 2), True, True),
        ((2, 2), False, False),  # a slice, where nothing was compiled
        ((2, 2), True, True),
        ((4, 2), True, True),  # a slice before optimizer shard
        ((16, 2), True, False),
        ((1, 2), True, False),
        ((3, 2), True, False),
        ((8, 2, 1), True, False),
    ],
)
def test_network_may_hold_the_whole_or_what_it_was_compiled_for(shape, sliced, content):
    network = Network({"w": shape}, sliced=sliced)
    planned = [("w", (8, 2), [(2, 2), (4, 2)]), ("unknown to the network", (4,), [(4,)])]
    if content:
        check_network(network, planned, "src")
        return
    with pytest.raises(
        PlanError, match=r"w is .* in the network, but by the source strategy src its slices make up \[8, 2\]"
    ):
        check_network(network, planned, "src")


@pytest.mark.parametrize("weight, bias", [((4, 2, 6), (1, 4, 1, 2)), ((6, 4), (6,))])
def test_bias_of_experts_has_dimensions_of_one(weight, bias):
    whole = {"d.weight": WHOLE2, "d.bias": WHOLE2}
    full = {"d.weight": np.zeros(weight), "d.bias": np.zeros(bias)}
    shapes_under(whole, full, whole)


def test_feed_forward_may_be_fused_with_its_gate():
    full = {"ffn.w1.weight": np.zeros((12, 4)), "ffn.w2.weight": np.zeros((4, 6))}
    shapes_under(dict.fromkeys(full, WHOLE2), full, dict.fromkeys(full, WHOLE2))


def test_vocabulary_may_be_padded_but_is_no_multiple_of_itself():
    full = {"model.tok_embeddings.embedding_weight": np.zeros((8, 3)), "lm_head.weight": np.zeros((8, 3))}
    with pytest.raises(
        PlanError, match=r"model\.tok_embeddings\.embedding_weight is \[16, 3\].*lm_head\.weight \[8, 3\]"
    ):
        shapes_under(
            {"model.tok_embeddings.embedding_weight": MP2, "lm_head.weight": WHOLE2}, full, dict.fromkeys(full, WHOLE2)
        )
    padded = {**full, "lm_head.weight": np.zeros((10, 3))}
    shapes_under(dict.fromkeys(full, WHOLE2), padded, dict.fromkeys(full, WHOLE2))


def test_what_is_allowed_is_not_judged_by_its_shape():
    full = {"w": np.zeros((4, 2)), "adam_m.w": np.zeros((4, 2))}
    source = source_of(strategy(dict.fromkeys(full, MP2)), hold(full, strategy({"w": MP2, "adam_m.w": WHOLE2})))
    with pytest.raises(PlanError):
        check_shapes(source)
    check_shapes(source, Allowed(extra=("adam_m.w",)))


def test_parameter_that_lies_with_a_later_rank_only_is_told():
    a = strategy({"w": WHOLE2})
    held = hold({"w": np.zeros(4)}, a)
    held[1]["extra.weight"] = np.zeros((2, 2))
    with pytest.raises(PlanError, match=r"extra\.weight is in rank_1/x\.ckpt, but not in the first file of its stage"):
        check_names(source_of(a, held), Index(held))

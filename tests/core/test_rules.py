"""What would be silently wrong is refused; what is legitimate is carried, and said."""

from __future__ import annotations

import numpy as np
import pytest
from builders import hold, plan_of, strategy

from auto_trans.core.edits import AddLora
from auto_trans.core.layout import Layout
from auto_trans.core.rules import Allowed
from auto_trans.core.strategy import Strategy
from auto_trans.errors import ConfigTypeError, PlanError

MP2, WHOLE2 = Layout((2,), ((0,),)), Layout((2,), ((),))
COMPLETE = Strategy.complete()


def layers(*numbers, name="model.layers.{}.wq.weight"):
    return {name.format(n): np.arange(8).reshape(4, 2) for n in numbers}


def complete(**held):
    return {0: {name.replace("__", "."): array for name, array in held.items()}}


def plan_complete(held, listed, **options):
    """Complete weights to a strategy of two ranks that lists some names."""
    return plan_of(COMPLETE, strategy(dict.fromkeys(listed, MP2), origin="target.ckpt"), {0: held}, **options)


def test_layers_of_a_stage_whose_strategy_is_missing_are_refused():
    held = layers(0, 1, 2, 3)
    with pytest.raises(
        PlanError, match=r"target\.ckpt does not list parameter model\.layers\.2.*of other layers.*stage 0 only"
    ):
        plan_complete(held, layers(0, 1))


def test_accumulated_gradients_tell_that_it_is_a_stage_of_a_pipeline():
    listed = [*layers(0), "accu_grads.model.layers.0.wq.weight"]
    with pytest.raises(PlanError, match="lists accumulated gradients, as the stage files of pipeline jobs do"):
        plan_complete(layers(0, 1), listed)
    assert any("describes one stage only" in text for text in plan_complete(layers(0), listed).warnings)
    assert not plan_complete(layers(0), layers(0)).warnings


@pytest.mark.parametrize(
    "name, array",
    [
        ("lm_head.weight", np.zeros((4, 2))),  # a matrix without siblings
        ("norm_out.weight", np.zeros(4)),  # a vector that is named as a weight
        ("lm_head.bias", np.zeros(4)),
        ("adam_m.model.layers.0.wq.weight", np.zeros((4, 2))),  # a moment, where the target trains the weight
        ("adam_m.lm_head.weight", np.zeros((4, 2))),  # a moment of a weight of another stage
        ("muon.model.layers.0.wq.weight", np.zeros(4)),  # the state of another optimizer, by the weight's name
        ("model.layers.7.scale", np.zeros(())),  # a single number, but its siblings are listed
        ("rotary_proj.weight", np.zeros((4, 2))),  # named like a buffer and a weight
    ],
)
def test_weights_and_their_moments_are_never_carried_beside_sliced_ones(name, array):
    listed = [*layers(0), "adam_v.model.layers.0.wq.weight", "model.layers.0.scale"]
    held = {**layers(0), "model.layers.0.scale": np.zeros(2), name: array}
    with pytest.raises(PlanError, match=f"does not list parameter {name}"):
        plan_complete(held, listed)
    plan = plan_complete(held, listed, allowed=Allowed(extra=(name,)))
    assert plan.carried == (name,)
    if array.size > 1:
        assert any(name in text for text in plan.warnings), "what was allowed is still said"


def test_weight_with_moments_is_no_buffer_whatever_its_name():
    held = {**layers(0), "table.cos": np.zeros((4, 2)), "adam_m.table.cos": np.zeros((4, 2))}
    with pytest.raises(PlanError, match=r"does not list parameter table\.cos"):
        plan_complete(held, [*layers(0), "adam_m.model.layers.0.wq.weight"])


@pytest.mark.parametrize(
    "name",
    ["freqs_cos", "model.layers.0.rotary_emb.inv_freq", "model.freqs_mgr.swap_mask", "attention.mask", "learning_rate"],
)
def test_buffers_that_no_graph_uses_are_carried_with_a_warning(name):
    array = np.arange(8).reshape(4, 2) if name != "learning_rate" else np.arange(5)
    plan = plan_complete({**layers(0), name: array, "global_step": np.array([3])}, layers(0))
    assert plan.carried == (name, "global_step")
    (warning,) = plan.warnings
    assert name in warning and "global_step" not in warning


def test_buffer_whose_siblings_are_listed_is_none():
    listed = {**layers(0), "model.layers.0.rotary.cos": 0}
    held = {**layers(0), "model.layers.0.rotary.cos": np.zeros((4, 2)), "model.layers.1.rotary.cos": np.zeros((4, 2))}
    with pytest.raises(PlanError, match=r"model\.layers\.1\.rotary\.cos"):
        plan_complete(held, listed)


def test_the_number_of_a_matrix_is_not_the_number_of_a_layer():
    held = {**layers(0), "model.layers.0.w1.cos": np.zeros(4), "model.layers.0.w2.cos": np.zeros(4)}
    plan = plan_complete(held, [*layers(0), "model.layers.0.w1.cos"])
    assert plan.carried == ("model.layers.0.w2.cos",)


def test_moments_of_a_distributed_source_that_its_strategy_does_not_list_are_refused():
    """The strategy of an inference job, given for the weights of a training job."""
    a = strategy(dict.fromkeys(layers(0), MP2))
    held = hold({**layers(0), "adam_m.model.layers.0.wq.weight": np.zeros((4, 2))}, a)
    with pytest.raises(PlanError, match=r"does not list parameter adam_m\.model\.layers\.0\.wq\.weight"):
        plan_of(a, COMPLETE, held)
    assert plan_of(a, strategy(dict.fromkeys(layers(0), WHOLE2)), held).dropped == ("adam_m.model.layers.0.wq.weight",)


def test_what_the_target_does_not_list_can_be_allowed_and_is_put_together():
    a = strategy({**dict.fromkeys(layers(0), MP2), "extra": MP2})
    held = hold({**layers(0), "extra": np.arange(4)}, a)
    b = strategy(dict.fromkeys(layers(0), MP2))
    with pytest.raises(PlanError, match=r"extra is in the source, but not in the target strategy.*allow_extra"):
        plan_of(a, b, held)
    plan = plan_of(a, b, held, allowed=Allowed(extra=("ext*",)))
    (tensor,) = [t for t in plan.files[0].tensors if t.name == "extra"]
    assert tensor.shape == (4,) and len(tensor.copies) == 2


def test_layers_that_the_source_lacks_are_refused_and_new_parameters_are_told():
    target = strategy(
        {**dict.fromkeys(layers(0, 1), MP2), "model.layers.0.lora_a": MP2, "adam_m.model.layers.1.wq.weight": MP2}
    )
    held = {0: {**layers(0), "adam_m.model.layers.0.wq.weight": np.zeros((4, 2))}}
    target.layouts["adam_m.model.layers.0.wq.weight"] = {0: MP2}
    with pytest.raises(PlanError, match=r"lacks parameter model\.layers\.1\.wq\.weight, though.*allow_missing"):
        plan_of(COMPLETE, target, held)
    plan = plan_of(COMPLETE, target, held, allowed=Allowed(missing=("*layers.1.*",)))
    assert plan.absent == ("adam_m.model.layers.1.wq.weight", "model.layers.0.lora_a", "model.layers.1.wq.weight")


def test_layers_that_a_strategy_lists_and_no_file_holds_are_refused_in_a_merge():
    a = strategy(dict.fromkeys(layers(0, 1), MP2))
    with pytest.raises(PlanError, match=r"lacks parameter model\.layers\.1\.wq\.weight"):
        plan_of(a, COMPLETE, hold(layers(0), a))


def test_errors_name_settings_as_the_user_knows_them():
    with pytest.raises(PlanError) as caught:
        plan_complete(layers(0, 1), layers(0))
    assert "allow_extra" in str(caught.value) and "«" not in str(caught.value)
    caught.value.told_by({"allow_extra": "--allow-extra GLOB", "dst_strategy": "--dst-strategy"})
    assert "--allow-extra GLOB" in str(caught.value) and "--dst-strategy" in str(caught.value)


def test_job_that_trains_only_lora_weights_drops_the_moments_of_the_others():
    trained = {"model.layers.0.wq.lora_a": np.zeros((4, 2)), "adam_m.model.layers.0.wq.lora_a": np.zeros((4, 2))}
    held = {**layers(0), "adam_m.model.layers.0.wq.weight": np.zeros((4, 2))}
    for source in (COMPLETE, strategy(dict.fromkeys(held, MP2))):
        plan = plan_of(source, strategy(dict.fromkeys([*layers(0), *trained], MP2)), hold(held, source))
        assert plan.dropped == ("adam_m.model.layers.0.wq.weight",)
        assert plan.absent == tuple(sorted(trained))


@pytest.mark.parametrize(
    "state", ["exp_avg.", "exp_avg_sq.", "exp_avg_sq_row_", "exp_avg_insta_col_", "pma_weight_", "muon."]
)
def test_state_of_every_optimizer_is_dropped_for_inference(state):
    held = {**layers(0), f"{state}model.layers.0.wq.weight": np.zeros((4, 2))}
    a = strategy(dict.fromkeys(held, MP2))
    plan = plan_of(a, strategy(dict.fromkeys(layers(0), MP2)), hold(held, a))
    assert plan.dropped == (f"{state}model.layers.0.wq.weight",)


@pytest.mark.parametrize("name, array", [("freqs_cos", np.arange(8).reshape(4, 2)), ("global_step", np.array([3]))])
def test_buffer_or_number_that_only_the_target_lists_is_taken_as_whole(name, array):
    a = strategy(dict.fromkeys(layers(0), MP2))
    target = strategy({**dict.fromkeys(layers(0), MP2), name: WHOLE2})
    plan = plan_of(a, target, hold({**layers(0), name: array}, a))
    assert any(t.name == name for t in plan.files[0].tensors)
    assert [pair[0].tensor.name for pair in plan.replicated] == ([name] if array.size > 1 else [])


def test_weight_that_only_the_target_lists_must_be_allowed():
    a = strategy(dict.fromkeys(layers(0), MP2))
    target = strategy({**dict.fromkeys(layers(0), MP2), "lm_head.weight": MP2})
    held = hold({**layers(0), "lm_head.weight": np.arange(8).reshape(4, 2)}, a)
    with pytest.raises(PlanError, match=r"lm_head\.weight is in the source and in the target strategy.*allow_extra"):
        plan_of(a, target, held)
    plan = plan_of(a, target, held, allowed=Allowed(extra=("lm_head.*",)))
    assert [t.shape for t in plan.files[0].tensors if t.name == "lm_head.weight"] == [(2, 2)]


def test_head_that_the_source_lacks_is_refused_though_it_has_no_layers():
    target = strategy({**dict.fromkeys(layers(0), MP2), "lm_head.weight": MP2})
    with pytest.raises(PlanError, match=r"lacks parameter lm_head\.weight: .*allow_missing"):
        plan_of(COMPLETE, target, {0: layers(0)})
    plan = plan_of(COMPLETE, target, {0: layers(0)}, allowed=Allowed(missing=("lm_head.weight",)))
    assert plan.absent == ("lm_head.weight",)


def test_matrices_of_a_product_that_no_strategy_lists_are_compared():
    names = {"w.weight": np.zeros((4, 4)), "w.lora_A.weight": np.ones((2, 4)), "w.lora_B.weight": np.ones((4, 2))}
    a = strategy({"w.weight": MP2})
    plan = plan_of(a, COMPLETE, hold(names, a), edits=[AddLora(2.0)])
    assert {pair[0].tensor.name for pair in plan.replicated} == {"w.lora_A.weight", "w.lora_B.weight"}


def test_single_pattern_may_be_a_string_and_what_matches_nothing_is_said():
    assert Allowed.of("*.cos", ()).extra == ("*.cos",)
    with pytest.raises(ConfigTypeError, match="allow_extra must be patterns"):
        Allowed.of([3], ())
    plan = plan_complete(layers(0), layers(0), allowed=Allowed(extra=("*.nosuch",)))
    assert plan.warnings == ("no parameter matches *.nosuch, which is allowed",)

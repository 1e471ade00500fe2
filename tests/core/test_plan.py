from __future__ import annotations

import gc

import numpy as np
import pytest
from builders import Index, conversions, hold, plan_of, strategy
from hypothesis import given, settings
from hypothesis import strategies as st

from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy
from auto_trans.errors import ConfigError, MissingSliceError, PlanError


def run(plan, index):
    """Carries a plan out on arrays."""
    made = {}
    for file in plan.files:
        tensors = {}
        for tensor in file.tensors:
            out = np.full(tensor.shape, -1)
            written = np.zeros(tensor.shape, int)
            for copy in tensor.copies:
                source = tuple(slice(o, o + n) for o, n in zip(copy.start, copy.box.size))
                out[copy.box.slices()] = index.held[copy.shard.file.rank][copy.shard.tensor.name][source]
                written[copy.box.slices()] += 1
            assert (written == 1).all(), "covered exactly once"
            tensors[tensor.name] = out
        made.update({rank: tensors for rank in file.ranks})
    return made


@given(conversions())
@settings(max_examples=150)
def test_plan_makes_up_every_target_slice(case):
    source, target, full = case
    a, b = strategy({"w": source}), strategy({"w": target})
    index = Index(hold({"w": full, "global_step": np.array([3])}, a))
    made = run(plan_of(a, b, index), index)
    expected = hold({"w": full, "global_step": np.array([3])}, b)
    assert made.keys() == expected.keys()
    for rank, tensors in expected.items():
        for name, array in tensors.items():
            assert np.array_equal(made[rank][name], array)


@given(conversions(), st.data())
def test_a_ranks_plan_does_not_depend_on_which_others_are_planned(case, data):
    source, target, full = case
    a, b = strategy({"w": source}), strategy({"w": target})
    index = Index(hold({"w": full, "step": np.array([3])}, a))
    rank = data.draw(st.integers(0, target.devices - 1))
    whole = {r: file.tensors for file in plan_of(a, b, index).files for r in file.ranks}
    (file,) = plan_of(a, b, index, [rank]).files
    assert file.ranks == (rank,)
    assert file.tensors == whole[rank]


@given(conversions())
def test_any_one_holder_of_a_slice_is_enough(case):
    source, target, full = case
    a, b = strategy({"w": source}), strategy({"w": target})
    held = hold({"w": full}, a)
    ndim = full.ndim
    last = {source.owners(source.cell(rank, ndim))[-1] for rank in range(source.devices)}
    index = Index({rank: held[rank] for rank in last})
    made = run(plan_of(a, b, index), index)
    for rank, tensors in hold({"w": full}, b).items():
        assert np.array_equal(made[rank]["w"], tensors["w"])


MP2 = Layout((2,), ((0,),))
DP2 = Layout((2,), ((),))


def test_replicas_share_one_file_plan():
    a, b = strategy({"w": MP2}), strategy({"w": Layout((4, 2), ((0,),))})
    plan = plan_of(a, b, Index(hold({"w": np.arange(8)}, a)))
    assert [file.ranks for file in plan.files] == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_only_needed_source_ranks_are_read():
    a, b = strategy({"w": Layout((8,), ((0,),))}), strategy({"w": Layout((4,), ((0,),))})
    plan = plan_of(a, b, Index(hold({"w": np.arange(16)}, a)), [2])
    assert [file.rank for file in plan.source_files] == [4, 5]


def test_stages_are_redistributed():
    pp2 = strategy({"a": {0: MP2}, "b": {1: MP2}, "tied": {0: DP2, 1: DP2}}, stages=2)
    flat = strategy({"a": MP2, "b": DP2, "tied": DP2})
    full = {"a": np.arange(4), "b": np.arange(6), "tied": np.arange(3)}
    index = Index(hold(full, pp2))
    for source, target, held in ((pp2, flat, index), (flat, pp2, Index(hold(full, flat)))):
        made = run(plan_of(source, target, held), held)
        for rank, tensors in hold(full, target).items():
            assert made[rank].keys() == tensors.keys()
            assert all(np.array_equal(made[rank][n], t) for n, t in tensors.items())


def test_missing_slice_names_parameter_and_ranks():
    a, b = strategy({"w": MP2}), strategy({"w": DP2})
    index = Index({0: {"w": np.arange(4)}})
    with pytest.raises(MissingSliceError, match=r"parameter w is held by source rank 1 only"):
        plan_of(a, b, index)


def test_parameter_removed_from_some_ranks_is_found_on_others():
    a, b = strategy({"w": DP2, "v": DP2}), strategy({"w": MP2, "v": MP2})
    index = Index({0: {"w": np.arange(4)}, 1: {"v": np.arange(4) + 10}})
    made = run(plan_of(a, b, index), index)
    assert made[1]["v"].tolist() == [12, 13]


def test_unlisted_parameter_removed_from_some_ranks_is_found_too():
    a, b = strategy({"w": DP2, "v": DP2}), strategy({"w": MP2, "v": MP2})
    index = Index({0: {"w": np.arange(4)}, 1: {"v": np.arange(4), "scale": np.array([3]), "rates": np.arange(5)}})
    plan = plan_of(a, b, index)
    assert plan.carried == ("scale", "rates") and plan.replicated == ()
    assert run(plan, index)[0]["rates"].tolist() == [0, 1, 2, 3, 4]


def test_parameter_missing_from_all_owners_of_a_slice_is_an_error_not_zeros():
    a, b = strategy({"w": MP2, "v": MP2}), strategy({"w": DP2, "v": DP2})
    index = Index({0: {"w": np.arange(2), "v": np.arange(2)}, 1: {"w": np.arange(2)}})
    with pytest.raises(MissingSliceError, match="parameter v"):
        plan_of(a, b, index)


def test_more_rank_folders_than_the_strategy_has_ranks_is_one_stage_of_a_pipeline():
    a, b = strategy({"w": MP2}, origin="stage0.ckpt"), strategy({"w": DP2})
    index = Index({rank: {"w": np.arange(2)} for rank in range(4)})
    with pytest.raises(PlanError, match=r"4 rank folders.*stage0\.ckpt describes 2 ranks.*pipeline"):
        plan_of(a, b, index)


def test_distributed_source_without_strategy_is_refused():
    index = Index({0: {"w": np.arange(2)}, 1: {"w": np.arange(2)}})
    with pytest.raises(PlanError, match="src_strategy"):
        plan_of(Strategy.complete(), strategy({"w": MP2}), index)


def test_parameter_that_the_target_lacks_is_refused_by_name():
    a, b = strategy({"w": MP2, "lost": MP2}), strategy({"w": MP2})
    with pytest.raises(PlanError, match="lost is in the source, but not in the target strategy"):
        plan_of(a, b, Index(hold({"w": np.arange(4), "lost": np.arange(4)}, a)))


def test_parameter_that_the_source_strategy_lacks_is_refused_by_name():
    a, b = strategy({"w": MP2}), strategy({"w": MP2, "new": MP2})
    with pytest.raises(PlanError, match="new is in the source and in the target strategy"):
        plan_of(a, b, Index(hold({"w": np.arange(4), "new": np.arange(4)}, a)))


def test_strategies_of_another_model_are_refused():
    a, b = strategy({"w": MP2}), strategy({"other": MP2})
    with pytest.raises(PlanError, match="another model"):
        plan_of(a, b, Index(hold({"w": np.arange(4)}, a)))
    with pytest.raises(PlanError, match="another model"):
        plan_of(Strategy.complete(), b, Index({0: {"w": np.arange(4)}}))
    half = strategy({"w": MP2, "other": MP2})
    with pytest.raises(PlanError, match=r"holds strange.*lacks other.*another model"):
        plan_of(Strategy.complete(), half, Index({0: {"w": np.arange(4), "strange": np.arange(4)}}))


def test_optimizer_state_is_dropped_only_where_the_target_has_no_optimizer():
    a = strategy({"w": MP2, "adam_m.w": MP2})
    index = Index(hold({"w": np.arange(4), "adam_m.w": np.arange(4)}, a))
    plan = plan_of(a, strategy({"w": DP2}), index)
    assert plan.dropped == ("adam_m.w",)
    assert [t.name for t in plan.files[0].tensors] == ["w"]
    with pytest.raises(PlanError, match=r"adam_m\.w"):
        plan_of(a, strategy({"w": DP2, "adam_v.w": DP2}), index)


def test_what_the_source_lacks_is_told():
    a, b = strategy({"w": MP2}), strategy({"w": DP2, "lora_a": DP2, "accu_grads.w": DP2})
    assert plan_of(a, b, Index(hold({"w": np.arange(4)}, a))).absent == ("lora_a",)


def test_carried_tensors_of_a_distributed_source_must_be_replicas():
    a, b = strategy({"w": MP2}), strategy({"w": DP2})
    full = {"w": np.arange(4), "learning_rate": np.arange(9), "global_step": np.array([1])}
    plan = plan_of(a, b, Index(hold(full, a)))
    assert plan.carried == ("learning_rate", "global_step")
    assert [(a.tensor.name, a.file.rank, b.file.rank) for a, b in plan.replicated] == [("learning_rate", 0, 1)]


def test_shape_that_does_not_divide_names_parameter_and_strategy():
    a, b = strategy({"w": MP2}, origin="a.ckpt"), strategy({"w": Layout((3,), ((0,),))}, origin="b.ckpt")
    with pytest.raises(PlanError, match=r"parameter w .*shape \[4\].*b\.ckpt.*does not divide"):
        plan_of(a, b, Index(hold({"w": np.arange(4)}, a)))


def test_slices_of_different_shape_or_type_are_refused():
    a, b = strategy({"w": MP2}), strategy({"w": DP2})
    with pytest.raises(PlanError, match="different jobs or steps"):
        plan_of(a, b, Index({0: {"w": np.arange(2)}, 1: {"w": np.arange(3)}}))


@pytest.mark.parametrize("ranks", [[2], [-1], []])
def test_unknown_target_ranks_are_refused(ranks):
    a = strategy({"w": MP2})
    with pytest.raises(ConfigError, match="ranks 0 to 1"):
        plan_of(a, a, Index(hold({"w": np.arange(4)}, a)), ranks)


def test_carried_parameter_has_the_shape_that_it_has_at_its_own_rank():
    """Ranks 0 and 3, which are compared, agree; rank 1 between them has more."""
    layouts = {"w": Layout((4,), ((0,),))}
    held = hold({"w": np.arange(8), "history": np.arange(3)}, strategy(layouts))
    held[1]["history"] = np.arange(5)
    index = Index(held)
    made = run(plan_of(strategy(layouts), strategy(layouts), index), index)
    assert [made[rank]["history"].tolist() for rank in range(4)] == [list(range(n)) for n in (3, 5, 3, 3)]


@pytest.mark.parametrize("enabled", [True, False])
def test_planning_leaves_the_collector_of_cycles_as_it_was(enabled):
    whole, mismatched = strategy({"w": Layout((1,), ((),))}), strategy({"w": Layout((3,), ((0,),))})
    index = Index(hold({"w": np.zeros((4,))}, whole))
    try:
        (gc.enable if enabled else gc.disable)()
        plan_of(whole, whole, index)
        assert gc.isenabled() == enabled
        with pytest.raises(PlanError):
            plan_of(whole, mismatched, index)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()

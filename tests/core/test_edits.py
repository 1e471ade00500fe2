"""New names on the way: every parameter arrives under its own, and none under that of another."""

from __future__ import annotations

import numpy as np
import pytest
from builders import hold, plan_of, source_of, strategy
from hypothesis import given
from hypothesis import strategies as st

from auto_trans.core.edits import AddLora, Drop, LeaveOut, Product, Recipe, Rename, apply_edits
from auto_trans.core.layout import Layout
from auto_trans.core.planning import make_plan
from auto_trans.core.strategy import Strategy
from auto_trans.errors import PlanError

ROWS = Layout((2,), ((0,), ()))


def test_new_names_stand_for_the_old_ones_and_unknown_names_stay():
    made = Rename((("b", "y"), ("a", "x"), ("c", "not there"))).apply(apply_edits((), ["x", "z", "y"]))
    assert made == {"a": Recipe("x"), "z": Recipe("z"), "b": Recipe("y")} and list(made) == ["a", "z", "b"]


def test_only_what_is_named_is_left_out():
    made = LeaveOut(("a", "not there")).apply(apply_edits((), ["a", "a.b", "b"]))
    assert made == {"a.b": Recipe("a.b"), "b": Recipe("b")}


def test_names_may_be_exchanged():
    made = Rename((("a", "b"), ("b", "a"))).apply(apply_edits((), ["a", "b"]))
    assert made == {"b": Recipe("a"), "a": Recipe("b")}


@pytest.mark.parametrize("names", [(("a", "x"),), (("b", "x"), ("b", "y")), (("y", "x"),)])
def test_two_parameters_of_one_name_are_refused(names):
    with pytest.raises(PlanError, match=r"parameter \w and \w would both be named [aby]"):
        Rename(names).apply(apply_edits((), ["x", "a", "y"]))


def test_what_has_two_new_names_is_there_under_both():
    """The table of words that is also the output of the model."""
    made = Rename((("embedding", "x"), ("lm_head", "x"), ("lm_head", "x"))).apply(apply_edits((), ["x"]))
    assert made == {"embedding": Recipe("x"), "lm_head": Recipe("x")}


@given(st.permutations(["a", "b", "c", "d"]), st.permutations(["a", "b", "c", "d"]))
def test_renamed_back_everything_is_as_it_was(one, other):
    there, back = Rename(tuple(zip(one, other))), Rename(tuple(zip(other, one)))
    recipes = apply_edits((), ["a", "b", "c", "d", "e"])
    assert back.apply(there.apply(recipes)) == recipes


def test_product_follows_its_parameter_and_still_names_what_the_source_holds():
    names = ["wq.weight", "wq.weight_lora_a", "wq.weight_lora_b", "other"]
    added = Recipe("wq.weight", Product("wq.weight_lora_a", "wq.weight_lora_b", 2.0))
    renamed = Rename((("q.weight", "wq.weight"),))
    assert apply_edits((AddLora(2.0), renamed), names) == {"q.weight": added, "other": Recipe("other")}
    all_renamed = Rename(tuple((name.replace("wq", "q"), name) for name in names[:3]))
    assert apply_edits((all_renamed, AddLora(2.0)), names) == {"q.weight": added, "other": Recipe("other")}


def test_later_edits_see_the_new_names():
    assert list(apply_edits((Rename((("adam_m.w", "x"),)), Drop(("adam_m.",))), ["x", "w"])) == ["w"]


@pytest.mark.parametrize("source", ["complete", "sliced"])
def test_plan_has_the_target_slice_by_new_names_and_reads_the_old(source):
    full = {"old": np.arange(8).reshape(4, 2), "kept": np.arange(4).reshape(2, 2), "step": np.array(7)}
    from_strategy = Strategy.complete() if source == "complete" else strategy({"old": ROWS, "kept": ROWS})
    target = strategy({"new": ROWS, "kept": ROWS})
    plan = plan_of(
        from_strategy, target, hold(full, from_strategy), edits=(Rename((("new", "old"), ("number", "step"))),)
    )
    for rank, held in hold({"new": full["old"], "kept": full["kept"]}, target).items():
        file = next(file for file in plan.files if rank in file.ranks)
        assert [tensor.name for tensor in file.tensors] == ["new", "kept", "number"]
        assert {t.name: t.shape for t in file.tensors} == {**{n: a.shape for n, a in held.items()}, "number": ()}
        assert [{copy.shard.tensor.name for copy in tensor.copies} for tensor in file.tensors] == [
            {"old"},
            {"kept"},
            {"step"},
        ]


def test_target_that_lists_only_the_old_names_is_of_another_model():
    full = {"old": np.arange(8).reshape(4, 2)}
    complete = Strategy.complete()
    with pytest.raises(PlanError, match="of another model"):
        make_plan(
            source_of(complete, hold(full, complete)), strategy({"old": ROWS}), edits=(Rename((("new", "old"),)),)
        )

"""How two strategies compare."""

from __future__ import annotations

import dataclasses
import json

import oracle
import pytest
from builders import layouts, strategy
from hypothesis import given
from hypothesis import strategies as st

from auto_trans import read_strategy
from auto_trans.core.layout import Layout
from auto_trans.core.strategy import Strategy, same_slices

ROWS, COLUMNS = Layout((4,), ((0,), ())), Layout((4,), ((), (0,)))


@given(layouts())
def test_strategy_matches_itself_and_is_known_by_its_layouts(layout):
    one, other = strategy({"w": layout}, origin="a"), strategy({"w": layout}, origin="b")
    assert same_slices(one, other) and one.digest == other.digest


@given(layouts(), layouts())
def test_strategies_match_where_every_rank_has_the_same_slice(a, b):
    ndim = max(len(a.tensor_map), len(b.tensor_map))
    alike = a.devices == b.devices and a.grid(ndim) == b.grid(ndim)
    alike = alike and all(a.cell(rank, ndim) == b.cell(rank, ndim) for rank in range(a.devices))
    assert same_slices(strategy({"w": a}), strategy({"w": b})) == alike


def test_order_of_the_ranks_counts():
    one, other = Layout((2, 2), ((1, 0), ())), Layout((2, 2), ((0, 1), ()))
    assert same_slices(strategy({"w": one}), strategy({"w": ROWS}))
    assert not same_slices(strategy({"w": other}), strategy({"w": ROWS}))


@pytest.mark.parametrize(
    "source, target, same",
    [
        ({"w": ROWS}, {"w": ROWS, "new": ROWS}, True),
        ({"w": ROWS, "adam_m.w": ROWS}, {"w": ROWS}, True),
        ({"w": ROWS, "lost": ROWS}, {"w": ROWS}, False),
        ({"w": ROWS, "v": ROWS}, {"w": ROWS, "v": COLUMNS}, False),
        ({"w": ROWS}, {"other": ROWS}, False),
        ({"w": {0: ROWS}, "v": {1: ROWS}}, {"w": {0: ROWS}, "v": {0: ROWS, 1: ROWS}}, False),
        ({"w": {0: ROWS}, "v": {1: ROWS}}, {"v": {0: ROWS}, "w": {1: ROWS}}, False),
    ],
)
def test_what_only_one_lists_must_be_no_weight_of_the_source(source, target, same):
    stages = 1 + any(isinstance(layout, dict) for layout in source.values())
    assert same_slices(strategy(source, stages), strategy(target, stages)) == same


def test_stages_and_ranks_must_be_the_same():
    one = strategy({"w": {0: ROWS}, "v": {0: ROWS}})
    assert not same_slices(one, strategy({"w": {0: ROWS}, "v": {1: ROWS}}, 2))
    assert not same_slices(one, strategy({"w": Layout((8,), ((), ())), "v": Layout((8,), ((), ()))}))


@pytest.mark.parametrize("refused", [0, 1])
def test_what_cannot_be_converted_does_not_match(refused):
    sides = [strategy({"w": ROWS}), strategy({"w": ROWS})]
    sides[refused] = dataclasses.replace(sides[refused], refused={"w": "it is sliced unevenly"})
    assert not same_slices(*sides)


def test_complete_weights_match_complete_weights_only():
    assert same_slices(Strategy.complete(), Strategy.complete(4))
    assert not same_slices(Strategy.complete(), strategy({"w": ROWS}))
    assert not same_slices(strategy({"w": ROWS}), Strategy.complete(4))


def told(one):
    """The strategy as another rank reads it."""
    return Strategy.from_json(json.loads(json.dumps(one.as_json())))


def is_same(one, other):
    """Whether two strategies are equal in all that they tell, the order of their parameters included."""
    return one == other and list(one.layouts) == list(other.layouts) and one.digest == other.digest


@st.composite
def strategies(draw):
    """Any strategy: stages that share parameters, layouts for some numbers of dimensions, refused and complete ones."""
    one = draw(layouts())
    devices, stages = one.devices, draw(st.integers(1, 3))
    fitting = [one, Layout.whole(devices), dataclasses.replace(one, ndims=(len(one.tensor_map), 5))]
    names = st.text(st.characters(codec="utf-8"), max_size=5)
    by_stage = st.dictionaries(st.integers(0, stages - 1), st.sampled_from(fitting), min_size=1)
    return Strategy(
        stages, devices, draw(st.dictionaries(names, by_stage, max_size=5)), draw(st.dictionaries(names, names, max_size=2)),
        draw(names), draw(st.sampled_from([None, Layout.whole(devices)])),
    )  # fmt: skip


@given(strategies())
def test_strategy_is_told_to_other_ranks_as_it_is(one):
    assert is_same(told(one), one)


@pytest.mark.parametrize(("model", "case"), [(m, c) for m, cases in oracle.CASES.items() for c in cases])
def test_genuine_strategy_is_told_to_other_ranks_as_it_is(genuine, model, case):
    one = read_strategy(genuine.model(model).strategy(case))
    other = told(one)
    assert is_same(other, one) and other.origin == one.origin and same_slices(one, other)
    distinct = {layout for stages in one.layouts.values() for layout in stages.values()}
    assert len(one.as_json()["layouts"]) == len(distinct), "a layout is told once, however many parameters share it"

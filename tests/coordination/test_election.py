from __future__ import annotations

import pytest

from auto_trans.coordination.election import elect
from auto_trans.errors import ConfigError


@pytest.mark.parametrize(
    "world_size, number, expected",
    [
        (8, 1, {0: range(0, 8)}),
        (8, 2, {0: range(0, 4), 4: range(4, 8)}),
        (8, 4, {0: range(0, 2), 2: range(2, 4), 4: range(4, 6), 6: range(6, 8)}),
        (8, 8, {r: range(r, r + 1) for r in range(8)}),
        (16, 2, {0: range(0, 8), 8: range(8, 16)}),
        (6, 3, {0: range(0, 2), 2: range(2, 4), 4: range(4, 6)}),
        (1, 1, {0: range(0, 1)}),
    ],
)
def test_table_of_the_documentation(world_size, number, expected):
    assert {a.rank: a.slices for a in elect(world_size, number)} == expected


def test_more_than_the_world_size_is_clamped_with_a_warning(caplog):
    assert [a.rank for a in elect(4, 9)] == [0, 1, 2, 3]
    assert "transform_process_num 9 is more than the 4 ranks" in caplog.text


@pytest.mark.parametrize("number", [3, 5, 6])
def test_non_divisor_names_the_allowed_values(number):
    with pytest.raises(ValueError, match=rf"transform_process_num {number} .*one of 1, 2, 4, 8"):
        elect(8, number)


@pytest.mark.parametrize("number", [0, -1])
def test_less_than_one_is_a_value_error(number):
    with pytest.raises(ValueError, match=f"should not be smaller than 1, but got {number}"):
        elect(8, number)


@pytest.mark.parametrize("number", ["two", 1.5, True, [1]])
def test_what_is_no_number_is_a_type_error_too(number):
    with pytest.raises(ConfigError, match="must be a whole number") as caught:
        elect(8, number)
    assert isinstance(caught.value, TypeError) and isinstance(caught.value, ValueError)

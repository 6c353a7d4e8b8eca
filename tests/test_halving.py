from __future__ import annotations

import pytest

from finetune import halving


@pytest.mark.parametrize(("count", "rungs"), [(1, 0), (2, 1), (3, 1), (4, 2), (6, 2), (8, 3), (9, 3)])
def test_one_or_two_are_left(count: int, rungs: int) -> None:
    assert halving.rungs(count) == rungs
    for _ in range(rungs):
        count = halving.better_half(count)
    assert count in (1, 2)


def test_shares_double_and_end_with_the_whole() -> None:
    assert [halving.step(100, rung, 2) for rung in range(3)] == [25, 50, 100]
    assert [halving.step(3, rung, 3) for rung in range(4)] == [1, 1, 2, 3]


def test_the_time_is_that_of_the_dearest_way() -> None:
    assert halving.at_most([8.0]) == 8.0
    assert halving.at_most([4.0, 8.0, 8.0, 16.0]) == (4 + 8 + 8 + 16) / 4 + (16 + 8) / 4 + 16 / 2
    assert halving.at_most([10.0] * 8) == 80 / 8 + 40 / 8 + 20 / 4 + 10 / 2

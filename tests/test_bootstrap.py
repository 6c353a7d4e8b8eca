"""Intervals and answers from rows: against exact arithmetic, and against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finetune import bootstrap


def gains(better: int, worse: int, rows: int) -> list[float]:
    return [1.0] * better + [-1.0] * worse + [0.0] * (rows - better - worse)


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided test: of the rows that differ, each is a coin."""
    low, rows = min(better, worse), better + worse
    return min(1.0, 2 * sum(math.comb(rows, k) for k in range(low + 1)) / 2**rows)


@pytest.mark.parametrize(("better", "worse"), [(4, 0), (5, 1), (7, 7), (12, 2), (20, 8), (40, 22), (3, 30)])
def test_the_chance_is_mcnemars(better: int, worse: int) -> None:
    found = bootstrap.paired(gains(better, worse, 200), [1.0] * 200)
    assert found.chance == pytest.approx(mcnemar(better, worse), abs=0.01)
    assert (found.better, found.worse, found.rows) == (better, worse, 200)
    assert found.difference == pytest.approx((better - worse) / 200)


def test_the_interval_of_a_share_is_the_binomial_one() -> None:
    """Whether 60 of 200 rows are right: the bootstrap's distribution is Binomial(200, 0.3) exactly."""
    low, high = bootstrap.interval([1.0] * 60 + [0.0] * 140, [1.0] * 200)
    cumulative = np.cumsum([math.comb(200, k) * 0.3**k * 0.7 ** (200 - k) for k in range(201)])
    exact = [int(np.searchsorted(cumulative, tail)) / 200 for tail in (0.025, 0.975)]
    assert [low, high] == pytest.approx(exact, abs=0.0051)


def test_rows_weigh_what_they_weigh() -> None:
    """A mean over tokens, not over rows; rows that all have the same mean leave no doubt."""
    found = bootstrap.paired([1.0, 10.0, 5.0] * 10, [2.0, 20.0, 10.0] * 10)
    assert (found.difference, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    found = bootstrap.paired([2.0, 0.0] * 30, [1.0, 3.0] * 30)
    assert found.difference == 0.5
    assert found.low < 0.5 < found.high


@pytest.mark.parametrize(
    ("better", "worse", "answer"),
    [
        (0, 0, "equal"), (4, 0, "cannot tell"), (6, 6, "cannot tell"), (12, 7, "cannot tell"), (30, 5, "better"),
        (5, 30, "worse"),
    ],
)  # fmt: skip
def test_the_answer(better: int, worse: int, answer: str) -> None:
    assert bootstrap.paired(gains(better, worse, 200), [1.0] * 200).answer == answer


def test_the_bootstrap_alone_would_be_too_bold() -> None:
    found = bootstrap.paired(gains(5, 0, 200), [1.0] * 200)
    assert found.low > 0
    assert found.answer == "cannot tell"


def test_the_same_rows_give_the_same_answer() -> None:
    rows = [float(x) for x in np.random.default_rng(1).normal(0.1, 1, 150)]
    assert bootstrap.paired(rows, [1.0] * 150) == bootstrap.paired(rows, [1.0] * 150)


def test_a_stricter_level_asks_for_more() -> None:
    rows = gains(20, 6, 100)
    assert bootstrap.paired(rows, [1.0] * 100).answer == "better"
    strict = bootstrap.paired(rows, [1.0] * 100, 1 - 0.05 / 28)
    assert strict.answer == "cannot tell"
    assert strict.low < bootstrap.paired(rows, [1.0] * 100).low


@pytest.mark.parametrize("kind", ["answers", "losses"])
def test_two_alike_are_told_apart_in_one_of_twenty_at_most(kind: str) -> None:
    """Seeded simulation over 300 pairs of equal systems; then systems that differ must be found."""
    chance = np.random.default_rng(7)
    wrong = found = 0
    for _ in range(300):
        if kind == "answers":
            noise = chance.choice([-1.0, 0.0, 1.0], p=[0.1, 0.8, 0.1], size=60)
            shifted = chance.choice([-1.0, 0.0, 1.0], p=[0.05, 0.55, 0.4], size=60)
        else:
            noise = chance.standard_t(4, size=60)
            shifted = noise + 0.7
        wrong += bootstrap.paired(list(noise), [1.0] * 60).answer in ("better", "worse")
        found += bootstrap.paired(list(shifted), [1.0] * 60).answer == "better"
    assert wrong <= 24  # 300 · 0.05 = 15, and more than 24 of them have a chance of 1 %
    assert found >= 270


def test_many_rows_fit_in_little_memory() -> None:
    rows = 50_000
    found = bootstrap.paired([1.0] * 300 + [0.0] * (rows - 300), [1.0] * rows)
    assert found.answer == "better"


# Newcombe (Statistics in Medicine 17, 1998), table I, method 3: the score interval without continuity correction.
PUBLISHED = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
# By the formula in decimal arithmetic, to six digits.
FIGURED = [
    (0, 200, 0.0, 0.018845),
    (185, 200, 0.879956, 0.954025),
    (200, 200, 0.981155, 1.0),
    (1, 1, 0.206549, 1.0),
]


@pytest.mark.parametrize(("right", "rows", "low", "high"), PUBLISHED)
def test_interval_is_the_published_one(right: int, rows: int, low: float, high: float) -> None:
    assert bootstrap.wilson(right, rows) == pytest.approx((low, high), abs=5.1e-5)


@pytest.mark.parametrize(("right", "rows", "low", "high"), FIGURED)
def test_interval_at_the_edges(right: int, rows: int, low: float, high: float) -> None:
    found = bootstrap.wilson(right, rows)
    assert found == pytest.approx((low, high), abs=5.1e-7)
    assert 0.0 <= found[0] <= found[1] <= 1.0

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest

from finetune import schedule

ROWS = 23
LENGTHS = [random.Random(7).randint(1, 60) for _ in range(ROWS)]


def steps(**wanted: Any) -> list[tuple[int, ...]]:
    plain: dict[str, Any] = {"count": None, "epochs": None, "examples": None, "tokens": None}
    return schedule.steps(LENGTHS, wanted.pop("seed", 0), **(plain | wanted))


SIZES = [{"examples": 1}, {"examples": 4}, {"examples": 23}, {"examples": 50}, {"tokens": 1}, {"tokens": 100}]


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    orders = [schedule.epoch_order(ROWS, epoch, seed) for seed in (0, 1) for epoch in range(3)]
    assert all(sorted(order) == list(range(ROWS)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert orders[1] == schedule.epoch_order(ROWS, 1, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_sample_once_in_each_epoch(size: dict[str, int], epochs: int) -> None:
    seen = [index for step in steps(epochs=epochs, **size) for index in step]
    for epoch in range(epochs):
        assert sorted(seen[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS))
    assert len(seen) == epochs * ROWS


@pytest.mark.parametrize(("epochs", "samples"), [(0.5, 12), (1.0, 23), (1.25, 29), (2.0, 46)])
def test_part_of_an_epoch_is_rounded_up_to_a_sample(epochs: float, samples: int) -> None:
    assert sum(map(len, steps(epochs=epochs, examples=4))) == samples


def test_examples_of_a_step_and_its_short_last_one() -> None:
    assert list(map(len, steps(epochs=1, examples=5))) == [5, 5, 5, 5, 3]
    assert list(map(len, steps(epochs=2, examples=23))) == [23, 23]
    assert list(map(len, steps(epochs=1, examples=50))) == [23]
    # A step may cross from one epoch into the next: only the very last one is short.
    assert list(map(len, steps(epochs=2, examples=5))) == [5] * 9 + [1]


@pytest.mark.parametrize("limit", [1, 40, 60, 100, 10_000])
def test_tokens_of_a_step_fill_the_limit_and_never_pass_it(limit: int) -> None:
    found = steps(epochs=2, tokens=limit)
    sizes = [sum(LENGTHS[i] for i in step) for step in found]
    assert all(size <= limit or len(step) == 1 for size, step in zip(sizes, found, strict=True))
    for size, follower in zip(sizes, found[1:], strict=False):
        assert size + LENGTHS[follower[0]] > limit  # the next sample did not fit any more


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 7, 40])
def test_a_number_of_steps_is_met_exactly(size: dict[str, int], count: int) -> None:
    found = steps(count=count, **size)
    assert len(found) == count
    assert all(found)


@pytest.mark.parametrize("size", SIZES)
def test_a_longer_run_begins_with_the_steps_of_a_shorter(size: dict[str, int]) -> None:
    longest = steps(count=60, **size)
    for count in range(1, 60):
        assert steps(count=count, **size) == longest[:count]
    two, three = steps(epochs=2, **size), steps(epochs=3, **size)
    whole = two if len(two[-1]) == len(three[len(two) - 1]) else two[:-1]  # the last one may have been cut short
    assert three[: len(whole)] == whole


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 5])
def test_stop_and_resume_anywhere_sees_each_sample_of_each_epoch_once(size: dict[str, int], seed: int) -> None:
    """Whoever resumes makes the list anew and begins at a step: nothing is replayed, nothing left out."""
    whole = steps(epochs=2, seed=seed, **size)
    places = list(schedule._stream(ROWS, seed, 2))
    for stop in range(len(whole) + 1):
        first = [index for step in steps(epochs=2, seed=seed, **size)[:stop] for index in step]
        rest = [index for step in steps(epochs=2, seed=seed, **size)[stop:] for index in step]
        assert first + rest == places
        assert set(Counter(first + rest).values()) == {2}


@pytest.mark.parametrize("limit", [1, 30, 60, 200, 10_000])
def test_pack_takes_each_sample_once_within_the_limit(limit: int) -> None:
    packs = schedule.pack(LENGTHS, limit)
    assert sorted(position for pack in packs for position in pack) == list(range(ROWS))
    assert all(pack == sorted(pack) for pack in packs)
    sizes = [sum(LENGTHS[i] for i in pack) for pack in packs]
    assert all(size <= limit or len(pack) == 1 for size, pack in zip(sizes, packs, strict=True))
    assert schedule.pack(LENGTHS, limit) == packs


def test_best_fit_finds_what_first_fit_in_order_does_not() -> None:
    assert schedule.pack([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("seed", range(5))
def test_batches_of_lognormal_lengths_are_filled_to_95_percent(seed: int) -> None:
    """Median 300 tokens, as chat data have it: over whole steps, and over the micro-batches within them."""
    source = random.Random(seed)
    lengths = [min(4096, max(8, round(source.lognormvariate(5.7, 1.0)))) for _ in range(4000)]
    found = schedule.steps(lengths, seed, count=None, epochs=1, examples=None, tokens=32_768)
    filled = [sum(lengths[i] for i in step) / 32_768 for step in found[:-1]]
    assert sum(filled) / len(filled) > 0.95
    packs = [pack for step in found[:-1] for pack in schedule.pack([lengths[i] for i in step], 8192)]
    tokens = sum(lengths[i] for step in found[:-1] for i in step)
    assert tokens / (len(packs) * 8192) > 0.95


def _mixed(shares: list[float], sizes: list[int], *, seed: int = 0, **wanted: Any) -> tuple[list[int], list[int]]:
    """(tokens drawn, samples drawn) of each source."""
    source = random.Random(seed)
    lengths = [source.randint(5, 400) for _ in range(sum(sizes))]
    parts = [
        schedule.Part(name=str(n), samples=size, share=share)
        for n, (size, share) in enumerate(zip(sizes, shares, strict=True))
    ]
    plain: dict[str, Any] = {"count": None, "epochs": None, "examples": 8, "tokens": None}
    chosen = [i for step in schedule.steps(lengths, seed, parts=parts, **(plain | wanted)) for i in step]
    bounds = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    owners = [next(n for n, bound in enumerate(bounds) if i < bound) for i in chosen]
    tokens = [sum(lengths[i] for i, owner in zip(chosen, owners, strict=True) if owner == n) for n in range(len(sizes))]
    return tokens, [owners.count(n) for n in range(len(sizes))]


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.9, 0.1], [0.2, 0.3, 0.5]])
@pytest.mark.parametrize("seed", [0, 1])
def test_each_source_gives_its_share_of_the_tokens(shares: list[float], seed: int) -> None:
    sizes = [400, 30, 90][: len(shares)]
    tokens, _ = _mixed(shares, sizes, seed=seed, count=100)
    for share, count in zip(shares, tokens, strict=True):
        assert abs(count - share * sum(tokens)) <= 8 * 400  # within a sample, and the samples of a cut step


def test_a_small_source_is_repeated_in_fresh_orders_and_a_pass_is_all_tokens() -> None:
    tokens, samples = _mixed([0.5, 0.5], [400, 40], epochs=1)
    assert samples[1] > 3 * 40  # it must give half of the tokens
    assert samples[0] < 400
    source = random.Random(0)
    every = sum(source.randint(5, 400) for _ in range(440))
    assert every <= sum(tokens) < every + 400
    orders = [schedule.epoch_order(40, epoch, 0, 1) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != schedule.epoch_order(40, 0, 0, 0)


def test_a_longer_mixture_begins_with_a_shorter() -> None:
    parts = [schedule.Part(name="a", samples=13, share=0.3), schedule.Part(name="b", samples=10, share=0.7)]
    longest = steps(count=60, examples=3, parts=parts)
    assert all(steps(count=count, examples=3, parts=parts) == longest[:count] for count in range(1, 60))


def test_sources_without_shares_are_one_pile() -> None:
    parts = [schedule.Part(name="a", samples=13, share=None), schedule.Part(name="b", samples=10, share=None)]
    assert steps(epochs=2, examples=3, parts=parts) == steps(epochs=2, examples=3)


def test_pack_puts_a_sample_over_the_limit_by_itself() -> None:
    assert schedule.pack([3, 90, 4, 5, 10], 10) == [[0], [1], [2, 3], [4]]
    assert schedule.pack([10], 10) == [[0]]
    assert schedule.pack([], 10) == []


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_rate_rises_to_the_peak_and_never_rises_again(kind: str, warmup: int) -> None:
    rates = [schedule.learning_rate(s, total=20, peak=0.5, warmup=warmup, kind=kind) for s in range(20)]
    assert rates[:warmup] == pytest.approx([0.5 * (s + 1) / warmup for s in range(warmup)])
    assert rates[warmup] == pytest.approx(0.5)
    assert all(one >= two for one, two in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    assert all(0 < rate <= 0.5 for rate in rates)
    assert rates[-1] == 0.5 if kind == "constant" else rates[-1] < 0.2


def test_shapes_at_known_points() -> None:
    def rate(kind: str, step: int) -> float:
        return schedule.learning_rate(step, total=110, peak=2.0, warmup=10, kind=kind)

    assert rate("linear", 60) == pytest.approx(1.0)
    assert rate("cosine", 60) == pytest.approx(1.0)
    assert rate("cosine", 35) == pytest.approx(1 + math.sqrt(0.5))
    assert [rate("wsd", step) for step in (10, 60, 90, 100)] == pytest.approx([2.0, 2.0, 2.0, 1.0])


def test_warmup_longer_than_the_run_only_rises() -> None:
    rates = [schedule.learning_rate(s, total=4, peak=1.0, warmup=8, kind="cosine") for s in range(4)]
    assert rates == pytest.approx([0.125, 0.25, 0.375, 0.5])


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'sine'"):
        schedule.learning_rate(3, total=9, peak=1.0, warmup=0, kind="sine")

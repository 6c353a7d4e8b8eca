"""How sure is a difference that was seen on some rows? Intervals by the bootstrap, pairs by their rows, no model asked.

Sources: B. Efron and R. Tibshirani, *An Introduction to the Bootstrap*, 1993 (percentile interval: chapter 13; test by
permutation: chapter 15); P. Koehn, *Statistical Significance Tests for Machine Translation Evaluation*, 2004 (paired
bootstrap: rows are drawn for both systems at once); for the counts of the draws themselves B. Phipson and G. Smyth,
*Permutation P-values Should Never Be Zero*, 2010.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

SEED = 20041
"""Of every draw: the same rows give the same answer."""
DRAWS = 10_000
_TAIL = 20
"""Draws that are to lie beyond the least chance that is asked about."""
_AT_ONCE = 1 << 22
"""Indices drawn at once: 32 MB."""
_LISTED = 14
"""Rows that differ, up to which every pattern of signs is counted instead of drawn."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """What the rows say of a difference; positive: the second is better.

    ``chance``: how often pure chance would make a difference at least as large. ``wins``: the share of the drawn sets
    of rows on which the second is better. ``better``, ``worse``: rows.
    """

    rows: int
    better: int
    worse: int
    difference: float
    low: float
    high: float
    level: float
    chance: float
    wins: float

    @property
    def answer(self) -> str:
        """``better``, ``worse``, ``equal`` (no row differs) or ``cannot tell``.

        The interval and the permutation test must agree. Where few rows differ the bootstrap alone is too bold: four
        rows of 200, all in favour, are 2 % to it and 12 % to the exact test.
        """
        if not self.better and not self.worse:
            return "equal"
        if self.chance > 1 - self.level or self.low <= 0 <= self.high:
            return "cannot tell"
        return "better" if self.difference > 0 else "worse"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"answer": self.answer}


def wilson(right: float, rows: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a share of rows (Wilson 1927): sound at 0 and 1, where the normal one is not."""
    share = right / rows
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, middle - half), min(1.0, middle + half)


def paired(gains: Sequence[float], weights: Sequence[float], level: float = 0.95) -> Paired:
    """Compare two systems on the rows that both were judged on.

    ``gains``: for each row by how much the second is better, summed over what the row weighs (its tokens; 1 for an
    answer). The difference is Σ gains / Σ weights.
    """
    import numpy as np

    gain, weight = np.asarray(gains, "f8"), np.asarray(weights, "f8")
    draws = max(DRAWS, math.ceil(_TAIL / (1 - level)))
    drawn = _resampled(gain, weight, draws)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Paired(
        rows=len(gain), better=int((gain > 0).sum()), worse=int((gain < 0).sum()),
        difference=float(gain.sum() / weight.sum()), low=float(low), high=float(high), level=level,
        chance=_chance(gain[gain != 0], draws),
        wins=float((drawn > 0).mean() + (drawn == 0).mean() / 2),
    )  # fmt: skip


def interval(totals: Sequence[float], weights: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Of a weighted mean over rows, Σ totals / Σ weights."""
    import numpy as np

    drawn = _resampled(np.asarray(totals, "f8"), np.asarray(weights, "f8"), DRAWS)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled(totals: Array, weights: Array, draws: int) -> Array:
    """The mean over as many rows, drawn with replacement, again and again. → [draws]"""
    import numpy as np

    chance = np.random.Generator(np.random.PCG64(SEED))
    found = []
    for count in _portions(draws, len(totals)):
        rows = chance.integers(0, len(totals), size=(count, len(totals)))
        found.append(totals[rows].sum(axis=1) / weights[rows].sum(axis=1))
    return np.concatenate(found)


def _chance(gains: Array, draws: int) -> float:
    """Two-sided: were the two alike, each row's gain would be as likely a loss. ``gains`` without zeros.

    For answers that are right or wrong this is McNemar's exact test.
    """
    import numpy as np

    if not len(gains):
        return 1.0
    bound = abs(gains.sum()) * (1 - 1e-12)
    if len(gains) <= _LISTED:
        patterns = (np.arange(1 << len(gains))[:, None] >> np.arange(len(gains))) & 1
        return float((np.abs((2 * patterns - 1) @ gains) >= bound).mean())
    chance = np.random.Generator(np.random.PCG64(SEED + 1))
    beyond = 0
    for count in _portions(draws, len(gains)):
        signs = chance.integers(0, 2, size=(count, len(gains)), dtype="i1") * 2 - 1
        beyond += int((np.abs(signs @ gains) >= bound).sum())
    return (1 + beyond) / (1 + draws)


def _portions(draws: int, rows: int) -> Iterator[int]:
    size = max(1, _AT_ONCE // rows)
    for done in range(0, draws, size):
        yield min(size, draws - done)

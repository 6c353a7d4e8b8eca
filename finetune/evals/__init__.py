"""How a result is judged, one file each; the file's name is the word in ``evaluate.metrics``."""

from __future__ import annotations

LOWER_IS_BETTER = frozenset({"loss", "perplexity"})
"""Of every other score more is better."""


def gain(metric: str, one: float, other: float) -> float:
    """By how much ``one`` is better than ``other``; negative where it is worse."""
    return other - one if metric in LOWER_IS_BETTER else one - other

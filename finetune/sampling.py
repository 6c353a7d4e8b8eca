"""How the next token is chosen: the likeliest (greedy), or drawn with a temperature.

A draw is the argmax of the logits plus Gumbel noise (Gumbel 1954; Maddison et al. 2014), which is distributed as the
softmax is. The noise of an answer comes from a generator of its own on the CPU, so that an answer depends on its
prompt, its settings, its seed and its number: not on the prompts beside it in a batch, nor on the global generator.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_GREEDY_BELOW = 1e-5
"""A smaller temperature is 0: logits divided by it overflow, and nothing but the likeliest token is ever drawn."""
_SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature 0 is greedy, and then the others mean nothing. ``top_k`` 0 and ``top_p`` 1 keep every token.

    ``seed`` None: another draw each time.

    Raises:
        ValueError: a setting is out of its range; its text names the setting, its value and the range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature is {self.temperature}: give 0 (greedy) to 2")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: give 0 to 1 (every token)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: give 0 (every token) or more")
        if self.seed is not None and not -_SEEDS <= self.seed < _SEEDS:
            raise ValueError(f"seed is {self.seed}: give a number of 64 bits")

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW

    def processors(self, numbers: Sequence[int]) -> Any:
        """For transformers' ``generate(do_sample=False)``: what makes its argmax such a draw. None where greedy.

        ``numbers``: one for each answer of the batch. Seed and number together say which draw it is.
        """
        if self.greedy:
            return None
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        chosen: list[Any] = [TemperatureLogitsWarper(float(self.temperature))]
        if self.top_k:
            chosen.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            chosen.append(TopPLogitsWarper(float(self.top_p)))
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return LogitsProcessorList([*chosen, _Noise(seed, numbers)])


GREEDY = Sampling()


class _Noise:
    """Adds standard Gumbel noise to the logits. [answers, vocabulary] → the same."""

    def __init__(self, seed: int, numbers: Sequence[int]) -> None:
        import torch

        self._generators = [torch.Generator().manual_seed(_mixed(seed, number)) for number in numbers]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        waits = torch.empty(scores.shape, dtype=torch.float32)
        for row, generator in zip(waits, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores - waits.clamp_(min=torch.finfo(torch.float32).tiny).log_().to(scores.device)


def _mixed(seed: int, number: int) -> int:
    """One seed of two numbers, without the likeness of neighbours."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big") >> 1

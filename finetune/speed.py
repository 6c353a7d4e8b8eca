"""Time, predicted: what a course's micro-batches cost, as products at the measured rate and as bytes worked through.

The constants of a CPU were measured (``make bench-plan``, whose record ``tests/test_calibration.py`` holds them to);
those of a card are estimates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune import evals, schedule
from finetune.budget import BYTES, Load, Need, Pass
from finetune.recipe import Recipe

_EFFICIENCY_CARD = 0.45
"""Share of a card's matrix-product rate that a whole step reaches."""
_COST = {
    "products": 1.15, "moved": 0.82e-9, "scores": 1.5e-9, "logits": 1.6e-9, "unpacked": 0.73e-9, "layer": 0.0021,
    "step": 0.015,
}  # fmt: skip
"""On a CPU, by the names of ``parts``: how many times the plain cost, or seconds each. What is not a product costs a
thread the same on processors whose memory differs by four times in speed: a core is what bounds it."""
_WITHOUT_KERNELS = 1.5
"""Times as long without them."""
_FORWARD = 0.4
"""Share of a training step that its forward pass takes."""
_TOKEN_LAYER = 0.0006
"""Seconds of one layer for one generated token of all rows, beside reading its weights."""
_CARD_BANDWIDTH = 1e12
"""Bytes/s of a card's memory, where that was not measured."""
_MOST_PACKED = 100_000
"""Samples that are packed to know a course's micro-batches; of a longer one, a share of the steps stands for all."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What goes through the model in a course. ``squares``: the sum of the samples' squared lengths."""

    steps: float
    passes: float
    tokens: float
    supervised: float
    squares: float
    heaviest: Pass
    samples: tuple[int, ...] = ()
    """Of the heaviest micro-batch."""


def work(steps: Sequence[Sequence[int]], load: Load, micro_batch_tokens: int) -> Work:
    """The micro-batches of a course, added up."""
    samples = sum(map(len, steps))
    every = max(1, samples // _MOST_PACKED)
    passes = tokens = supervised = squares = 0
    heaviest, samples_of = Pass(tokens=0, supervised=0, longest=0), tuple[int, ...]()
    for step in steps[::every]:
        lengths = [load.lengths[index] for index in step]
        for pack in schedule.pack(lengths, micro_batch_tokens):
            sizes = [lengths[position] for position in pack]
            seen = sum(load.supervised[step[position]] for position in pack)
            one = Pass(tokens=sum(sizes), supervised=seen, longest=max(sizes))
            if one.tokens > heaviest.tokens:
                heaviest, samples_of = one, tuple(step[position] for position in pack)
            passes, tokens, supervised = passes + 1, tokens + one.tokens, supervised + seen
            squares += sum(size * size for size in sizes)
    share = samples / max(1, sum(map(len, steps[::every])))
    if every > 1:  # one that was not looked at may be fuller
        longest = max(load.lengths)
        heaviest = Pass(tokens=max(longest, micro_batch_tokens), supervised=heaviest.supervised, longest=longest)
    return Work(
        steps=len(steps), passes=passes * share, tokens=tokens * share, supervised=supervised * share,
        squares=squares * share, heaviest=heaviest, samples=samples_of,
    )  # fmt: skip


def parts(need: Need, layers: int, done: Work) -> dict[str, float]:
    """What that work consists of, by the constants' names: products in seconds at the measured rate, bytes that one
    thread works through, or counts."""
    shape, hardware, width = need.shape, need.hardware, BYTES[need.compute]
    rate = (hardware.flops_fp32 if need.compute == "fp32" else None) or hardware.flops or 1.0
    threads = hardware.threads
    linear, head = shape.linear_parameters(), 0 if shape.scored else shape.vocab * shape.hidden
    again = layers / shape.layers
    # A token's products: forward 2N, backward 2N (the base has no weight gradients), 2N again where it is recomputed.
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    row = width * (6 * shape.hidden + 3 * (query + key_value) + 4 * shape.intermediate)
    packed = need.recipe.quantize.weights not in BYTES
    return {
        "products": (done.tokens * (4 + 2 * again) * linear + 4 * done.supervised * head) / rate,
        "moved": done.tokens * (2 + again) * shape.layers * row / threads,
        "scores": (1 + again / 3) * done.squares * shape.layers * shape.heads * 4 / threads,
        "logits": 0.0 if shape.scored else done.supervised * shape.vocab * 4 / threads,
        "unpacked": done.passes * (2 + again) * linear * width / threads if packed else 0.0,
        "layer": done.passes * shape.layers * (2 + again),
        "step": done.steps,
    }


def training_seconds(need: Need, layers: int, done: Work) -> float | None:
    """Seconds of the optimizer steps; None without a known rate. ``layers``: how many are recomputed."""
    chosen, once = need.recipe.objective, _once(need, layers, done)
    return None if once is None else once * ((chosen.iterations or 1) + _FORWARD * need.extra_passes)


def _once(need: Need, layers: int, done: Work) -> float | None:
    """Seconds of going through that work once, forward and back."""
    if need.hardware.flops is None:
        return None
    found = parts(need, layers, done)
    if need.hardware.device != "cpu":
        return found["products"] / _EFFICIENCY_CARD
    times = _WITHOUT_KERNELS if need.recipe.train.kernels == "off" else 1.0
    return times * sum(cost * found[name] for name, cost in _COST.items())


def seconds(need: Need, layers: int, done: Work) -> float | None:
    """Seconds of the steps and of all evaluations."""
    training, load = training_seconds(need, layers, done), need.load
    if training is None or load is None:
        return training
    return training + sampling_seconds(need, done) + load.evaluations * judging_seconds(need, load)


def as_sampled(recipe: Recipe, steps: Sequence[Sequence[int]], load: Load) -> tuple[Sequence[Sequence[int]], Load]:
    """What goes through the model where the run samples: each prompt as often as it is answered, each answer as long as
    it may be. A course without sampling as it is."""
    chosen = recipe.objective
    if not chosen.completions or not chosen.max_new_tokens:
        return steps, load
    prompts = [length - answer for length, answer in zip(load.lengths, load.supervised, strict=True)]
    lengths = [prompt + chosen.max_new_tokens for prompt in prompts]
    again = [tuple(index for index in step for _ in range(chosen.completions)) for step in steps]
    return again, replace(load, lengths=lengths, supervised=[chosen.max_new_tokens] * len(lengths))


def sampling_seconds(need: Need, done: Work) -> float:
    """Seconds of answering the prompts of all steps; ``done`` as sampled. What judges the answers is not counted."""
    chosen = need.recipe.objective
    if not chosen.completions or not chosen.max_new_tokens or not chosen.batch_rows:
        return 0.0
    rows = done.supervised / chosen.max_new_tokens
    turns = done.steps * math.ceil(rows / max(1, done.steps) / chosen.batch_rows) * chosen.max_new_tokens
    passes = replace(done, steps=0, supervised=0, tokens=done.tokens - done.supervised)
    return _FORWARD * (_once(need, 0, passes) or 0.0) + _writing_seconds(need, turns)


def judging_seconds(need: Need, load: Load) -> float:
    """Seconds of judging the held-out rows once: their loss, and their answers where those are asked for."""
    wanted = need.recipe.evaluate

    def forward(tokens: float, supervised: float) -> float:
        one = Pass(tokens=0, supervised=0, longest=0)
        mean = sum(load.lengths) / len(load.lengths)
        read = Work(
            steps=0, passes=tokens / max(mean, 2048), tokens=tokens, supervised=supervised, squares=tokens * mean,
            heaviest=one,
        )  # fmt: skip
        return _FORWARD * (_once(need, 0, read) or 0.0)

    share = sum(load.supervised) / sum(load.lengths)
    total = (
        forward(load.evaluated_tokens, share * load.evaluated_tokens)
        if set(wanted.metrics) & {"loss", "multiple_choice"}
        else 0.0
    )
    if not set(wanted.metrics) & set(evals.ANSWERED) or not load.generated_rows:
        return total
    turns = -(-load.generated_rows // wanted.batch_rows) * wanted.max_new_tokens
    return total + forward(load.prompt_tokens, 0) + _writing_seconds(need, turns)


def _writing_seconds(need: Need, turns: float) -> float:
    """Seconds of so many tokens, each of all rows that are answered at once."""
    shape = need.shape
    reading = BYTES[need.compute] * (shape.linear_parameters() + shape.vocab * shape.hidden)
    bandwidth = need.hardware.bandwidth or _CARD_BANDWIDTH
    return turns * (shape.layers * _TOKEN_LAYER + reading / bandwidth)

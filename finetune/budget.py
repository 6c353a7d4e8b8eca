"""Memory, predicted by arithmetic on a decoder's shape: what ``plan`` weighs its choices with.

The formulas follow what the training step keeps. The constants of a CPU were measured (``make bench-plan``, whose
record ``tests/test_calibration.py`` holds them to); those of a card are estimates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from finetune import evals, forms, optimizer
from finetune.decoder import LINEARS, DecoderShape
from finetune.hardware import CONTEXT, Hardware
from finetune.kernels.causal_attention import ROWS
from finetune.kernels.cross_entropy import chunk_rows
from finetune.optimizer import Tensors
from finetune.recipe import Recipe
from finetune.recipe.objective_keys import extra_passes
from finetune.schedule import Part

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
USABLE = 0.9
_PROCESS = {"cuda": CONTEXT, "cpu": 0.46e9}
"""Bytes of the process itself: Python, torch and its companions, loaded; on a card its context."""
_TOKEN_ENTRY = 750
"""Bytes of the process for one entry of the tokenizer's vocabulary."""
_COMPILED, _MANY_SHAPES = 0.2e9, 350
"""Products that oneDNN compiled and keeps: as many as ``hardware.LIBRARIES`` lets it, which it comes near once it has
met some hundred shapes. In fp32 torch multiplies by another library, which keeps none."""
_SHAPES, _BLOCK_SHAPES = 30, 10
"""Shapes of products of one micro-batch: of its linears and head, and per block of the attention's rows."""
_HOLES_COMPILED = {"layer": 0.45, "head": 0.15}
_HOLES_KEPT = {"bf16": 0.32, "fp16": 0.32, "fp32": 0.85}
_HOLES_LIVE, _HOLES_RECOMPUTED, _HOLES_INPUTS, _HOLES_PLAIN = 0.9, 0.04e9, 1.3, (0.65, 0.25e9)
"""Memory of the C library's heap that is free and cannot be used: per byte of compiled products, which lie scattered in
it, by where the peak is (the head's blocks are too large for the heap); per byte that is kept through the forward pass;
per byte that comes and goes within a layer; where layers are recomputed, and per byte of their inputs; without kernels,
per byte kept and in all. glibc before 2.38 seldom finds an aligned block again that it has freed. On a card torch has
an allocator of its own, whose slack is in ``_PROCESS``."""
_PLAIN_TEACHER = 3
"""Times as much with a teacher's beside them, and what becomes of both."""
_PLAIN_HEAD = 13
"""Bytes per logit without kernels: in the compute dtype, in fp32, the log-probabilities, and the gradients of both."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Predicted peak memory by component, in bytes."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    generation: int
    overhead: int
    teacher: int = 0

    @property
    def total(self) -> int:
        # Training and generating take turns: the larger of the two counts.
        return max(self.training, self.training - self.activations - self.head + self.generation)

    @property
    def training(self) -> int:
        """The peak of the steps alone."""
        fixed = self.weights + self.adapter + self.gradients + self.optimizer + self.overhead + self.teacher
        return fixed + self.activations + self.head


@dataclass(frozen=True, kw_only=True)
class Load:
    """What goes through the model: the samples' lengths and how many of their tokens are supervised, by sample.

    ``parts``: whose samples they are, in that order.
    """

    lengths: Sequence[int]
    supervised: Sequence[int]
    parts: Sequence[Part] = ()
    evaluations: int = 0
    """How often the held-out rows are judged; what follows is of one time."""
    evaluated_tokens: int = 0
    generated_rows: int = 0
    prompt_tokens: int = 0
    longest_prompt: int = 0
    vocabulary: int = 0
    """Entries of the tokenizer; 0: as many as the model has rows."""


_CODES = 0.5
"""Bytes of a 4-bit weight without its scales."""
_IN_FLIGHT = 3
"""Layers that are whole at once where the rest is in shards: the one in use, and the next one twice while it is
gathered, in the buffer that arrives and in its own place."""


def weight_bytes(weights: str, double: bool, compute: str, shape: DecoderShape, device: str, shards: int = 1) -> int:
    """Bytes of the frozen base: the linears in their number format, everything else in the compute dtype.

    ``shards``: processes that hold the layers' linears together. Scales of packed ones stay whole.
    """
    linear = shape.linear_parameters()
    rest = shape.parameters() - linear
    per_weight = float(BYTES[compute])
    if forms.is_packed(weights):
        per_weight = forms.get(weights).bytes_per_weight(weights, shape, double=double, device=device)
    parted = _CODES if weights in forms.MEASURED else per_weight
    held = 1.0 if shards == 1 else min(1.0, 1 / shards + _IN_FLIGHT / shape.layers)
    return int(linear * (parted * held + per_weight - parted) + rest * BYTES[compute])


def layer_bytes(shape: DecoderShape, compute: str, *, kernels: bool, device: str, longest: int) -> tuple[int, int]:
    """(bytes that one layer keeps per token for its backward pass, bytes per token that come and go within that).

    ``longest``: the longest sample's tokens, which bound the attention's blocks on a CPU.
    """
    width, query, key_value = BYTES[compute], shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Inputs of both parts; query, key, value before and after their norms; the attention's result; gate and up.
    inner = 2 * shape.hidden + (2 if shape.qk_norm else 1) * (query + key_value) + key_value + query
    kept = width * (inner + 2 * shape.intermediate)
    if not kernels:  # norms in fp32 with their parts, rotary's halves, the activation and the product beside the rest
        kept += 2 * (4 + 4) * shape.hidden + width * (2 * query + 3 * key_value + 2 * shape.hidden)
        kept += width * (3 * shape.intermediate + 2 * shape.hidden)
    # The product and its gradient, or both factors' gradients; the norm's fp32 copies and the gradients in and out.
    mlp = width * (4 * shape.intermediate + 3 * shape.hidden) + 8 * shape.hidden
    attention = width * 4 * (query + key_value) + 8 * key_value
    if device == "cpu":  # scores, probabilities and their slope, a block of rows at a time, in fp32
        attention += 3 * 4 * shape.heads * min(ROWS, longest)
    return kept, max(mlp, attention)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What goes through the model at once. ``supervised``: of its ``tokens``, those that the head sees."""

    tokens: int
    supervised: int
    longest: int


def passing_bytes(
    shape: DecoderShape,
    weights: str,
    compute: str,
    one: Pass,
    layers: int,
    *,
    offload: bool,
    kernels: bool,
    device: str,
) -> tuple[int, int, int]:
    """(bytes kept through the forward pass, live within a layer, of the head) when a training pass holds most.

    ``layers``: how many are recomputed, the first ones; of those only the input is kept, which ``offload`` moves
    elsewhere. Either the forward pass has just ended, or the last of the recomputed layers is on its way back.
    """
    kept, live = layer_bytes(shape, compute, kernels=kernels, device=device, longest=one.longest)
    width, largest = BYTES[compute], max(out * inside for out, inside in map(shape.linear, LINEARS))
    live = live * one.tokens + (width * largest if weights not in BYTES else 0)
    held = 0 if offload else layers * width * shape.hidden * one.tokens
    ahead = held + (shape.layers - layers) * kept * one.tokens
    rows = min(one.supervised, chunk_rows(shape.vocab, device)) if kernels else one.supervised
    rows = 0 if shape.scored else rows  # one number a text
    head = rows * shape.vocab * ((4 + width) if kernels else _PLAIN_HEAD)
    final = shape.hidden * (3 * 4 + 3 * width) * one.tokens
    options = [(ahead, final, head), (ahead, live, 0)]
    if layers:
        options.append((held + kept * one.tokens, live, 0))
    return max(options, key=sum)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A teacher in memory. ``weights``: the number format of its own base, None where it has the run's; ``adapter``:
    bytes of its adapter."""

    shape: DecoderShape
    weights: str | None
    adapter: int

    def bytes(self, double: bool, compute: str, device: str) -> int:
        """What it holds all the time."""
        if self.weights is None:
            return self.adapter
        return self.adapter + weight_bytes(self.weights, double, products(self.weights, compute), self.shape, device)

    def passing(self, compute: str, one: Pass, device: str) -> int:
        """What is there at once while it reads: one layer's, and the hidden states of all."""
        width = products(self.weights, compute)
        _, live = layer_bytes(self.shape, width, kernels=True, device=device, longest=one.longest)
        return (live + 2 * BYTES[width] * self.shape.hidden) * one.tokens


def products(weights: str | None, compute: str) -> str:
    """The number format that a base is computed in: its own, where that is no packed one."""
    return weights if weights in BYTES else compute


@dataclass(frozen=True, kw_only=True)
class Need:
    """Memory of a run as a function of what goes through at once: a recipe on one model and machine."""

    recipe: Recipe
    shape: DecoderShape
    hardware: Hardware
    compute: str
    tensors: Sequence[Tensors]
    load: Load | None
    beside: Beside | None = None
    shards: int = 1
    """Processes that hold the layers together."""

    @property
    def extra_passes(self) -> float:
        """Forward passes of a step without gradients, in those of the model itself."""
        own = extra_passes(self.recipe.objective)
        if self.beside is None:
            return own
        return own + self.beside.shape.linear_parameters() / self.shape.linear_parameters()

    def budget(self, one: Pass, layers: int, *, offload: bool, passes: float | None = None) -> Budget:
        """Peak memory where ``one`` is the heaviest of ``passes`` micro-batches (None: of very many)."""
        train, quantize, device = self.recipe.train, self.recipe.quantize, self.hardware.device
        kernels = train.kernels != "off"
        kept, live, head = passing_bytes(
            self.shape, quantize.weights, self.compute, one, layers, offload=offload, kernels=kernels, device=device
        )
        slack, fixed = 0.0, _PROCESS[device] + _TOKEN_ENTRY * self._vocabulary()
        if device == "cpu":
            compiled = self._compiled(passes, one.longest)
            fixed += compiled
            inputs = 0 if offload else layers * BYTES[self.compute] * self.shape.hidden * one.tokens
            slack = _HOLES_LIVE * live + _HOLES_INPUTS * inputs + (_HOLES_RECOMPUTED if layers else 0)
            slack += _HOLES_COMPILED["head" if head and kernels else "layer"] * compiled
            share, most = (_HOLES_KEPT[self.compute], 0.0) if kernels else _HOLES_PLAIN
            slack += share * kept + min(most, kept)
        if self.beside:  # it reads before the model does, and leaves its last hidden states
            kept += BYTES[self.compute] * self.beside.shape.hidden * one.supervised
            kept = max(kept, self.beside.passing(self.compute, one, device) - live)
            head *= 1 if kernels else _PLAIN_TEACHER
        made = {"activations": int(kept + live + slack), "head": head, "overhead": int(fixed)}
        return replace(self._standing, **made)

    @functools.cached_property
    def _standing(self) -> Budget:
        """What does not depend on the micro-batch."""
        quantize, kind = self.recipe.quantize, self.recipe.train.optimizer
        trained = [one for one in self.tensors if optimizer.is_trained(kind, one.role)]
        return Budget(
            weights=weight_bytes(
                quantize.weights, quantize.double, self.compute, self.shape, self.hardware.device, self.shards
            ),
            # What a run began from stays known beside what it becomes.
            adapter=(8 if self.recipe.adapter.start_from else 4) * sum(one.parameters for one in self.tensors),
            gradients=4 * sum(one.parameters for one in trained),
            optimizer=optimizer.state_bytes(kind, self.tensors),
            activations=0, head=0, generation=_generation_bytes(self), overhead=0,
            teacher=self.beside.bytes(quantize.double, self.compute, self.hardware.device) if self.beside else 0,
        )  # fmt: skip

    def _vocabulary(self) -> int:
        return (self.load.vocabulary if self.load else 0) or self.shape.vocab

    def _compiled(self, passes: float | None, longest: int) -> float:
        if self.compute == "fp32":
            return 0.0
        shapes = math.inf if passes is None else passes * (_SHAPES + _BLOCK_SHAPES * -(-longest // ROWS))
        return _COMPILED * (1 - math.exp(-shapes / _MANY_SHAPES))


def _generation_bytes(need: Need) -> int:
    """Bytes while answers are generated, to be judged or to be trained on."""
    load, wanted, chosen = need.load, need.recipe.evaluate, need.recipe.objective
    most, longest = 0, need.recipe.train.max_length
    if set(wanted.metrics) & set(evals.ANSWERED) and (load is None or load.generated_rows):
        prompt, rows = (load.longest_prompt, load.generated_rows) if load else (longest, wanted.batch_rows)
        most = _answering_bytes(need, min(wanted.batch_rows, rows), prompt, wanted.max_new_tokens)
    if chosen.completions and chosen.batch_rows and chosen.max_new_tokens:
        rows = min(chosen.batch_rows, chosen.completions * (need.recipe.train.examples_per_step or chosen.batch_rows))
        most = max(most, _answering_bytes(need, rows, longest - chosen.max_new_tokens, chosen.max_new_tokens))
    return most


def _answering_bytes(need: Need, rows: int, prompt: int, answer: int) -> int:
    """Of so many prompts at once: the cache, and on a CPU the linears in few bits, dequantised once and kept."""
    shape, width = need.shape, BYTES[need.compute]
    packed = need.recipe.quantize.weights in forms.HELD
    dense = width * shape.linear_parameters() if need.hardware.device == "cpu" and packed else 0
    # The cache grows by a copy of itself; reading the prompts is a forward pass of all rows at once.
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * width * (prompt + answer)
    reading = prompt * (3 * shape.intermediate * width + 8 * shape.hidden)
    made = rows * (2 * cache + reading + shape.vocab * 8)
    return int(dense + made + (0 if need.compute == "fp32" or need.hardware.device != "cpu" else _COMPILED / 2))

"""Memory and time, predicted by arithmetic on a decoder's shape: what ``plan`` weighs its choices with.

The formulas follow what the training step keeps; the constants are estimates, not yet set against measured runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finetune import optimizer
from finetune.decoder import DecoderShape
from finetune.hardware import Hardware
from finetune.kernels.cross_entropy import chunk_rows
from finetune.optimizer import Tensors
from finetune.recipe import Recipe
from finetune.schedule import Part

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_MOST_TOKENS = {"cuda": 16_384, "cpu": 4_096}
"""Tokens of a micro-batch beyond which nothing is gained: dequantisation is below 2 % of a pass (CUDA)."""
_RECOMPUTE, _OFFLOAD = 0.47, 0.1
"""Time of a whole recomputation and of moving the layers' inputs, as shares of a step without them."""
_PASS_TOKENS = {"cuda": 200, "cpu": 100}
"""A pass over the weights (dequantisation, launches) costs as much as so many tokens."""
USABLE = 0.9
_OVERHEAD = {"cuda": 0.9e9, "cpu": 0.9e9}
"""Bytes of the process itself: libraries, CUDA context, allocator's slack."""
_EFFICIENCY = {"cuda": 0.45, "cpu": 0.45}
"""Share of the matrix-product rate that a whole training step reaches."""


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

    @property
    def total(self) -> int:
        # Training and generating take turns: the larger of the two counts.
        fixed = self.weights + self.adapter + self.gradients + self.optimizer + self.overhead
        return fixed + max(self.activations + self.head, self.generation)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What goes through the model: the samples' lengths and how many of their tokens are supervised, by sample.

    ``parts``: whose samples they are, in that order.
    """

    lengths: Sequence[int]
    supervised: Sequence[int]
    parts: Sequence[Part] = ()
    evaluated_tokens: int
    generated_rows: int


def weight_bytes(weights: str, double: bool, compute: str, shape: DecoderShape) -> int:
    """Bytes of the frozen base: the linears in their number format, everything else in the compute dtype."""
    linear = shape.linear_parameters()
    rest = shape.parameters() - linear
    if weights in ("nf4", "fp4"):
        # Per 64 weights one scale: fp32, or 8 bits and one fp32 per 256 scales (Dettmers et al. 2023, section 3).
        per_weight = 0.5 + (1 / 64 + 4 / (64 * 256) if double else 4 / 64)
    elif weights == "int8":
        per_weight = 1.0 + 4 / shape.hidden
    else:
        per_weight = float(BYTES[compute])
    return int(linear * per_weight + rest * BYTES[compute])


def token_bytes(shape: DecoderShape, compute: str, layers: int, *, offload: bool, kernels: bool) -> tuple[int, int]:
    """(bytes kept per token over all layers, bytes live per token within one layer) of a training pass.

    ``layers``: how many are recomputed; of those only the input is kept, which ``offload`` moves elsewhere.
    """
    width, query, key_value = BYTES[compute], shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # Inputs of both parts; query, key, value before and after their norms; the attention's result; gate and up.
    inner = 2 * shape.hidden + (2 if shape.qk_norm else 1) * (query + key_value) + key_value + query
    kept = width * (inner + 2 * shape.intermediate)
    if not kernels:  # norms in fp32 with their parts, rotary's halves, the activation and the product beside the rest
        kept += 2 * (4 + 4) * shape.hidden + width * (2 * query + 3 * key_value + 2 * shape.hidden)
        kept += width * (3 * shape.intermediate + 2 * shape.hidden)
    inputs = 0 if offload else width * shape.hidden
    live = kept + width * 3 * shape.intermediate
    return layers * inputs + (shape.layers - layers) * kept, live


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """``recompute``: none, layers or offload; ``layers``: how many of them."""

    recompute: str
    layers: int
    micro_batch_tokens: int
    budget: Budget


def fit(
    recipe: Recipe, shape: DecoderShape, hardware: Hardware, compute: str, tensors: Sequence[Tensors],
    load: Load | None,
) -> Fitted:  # fmt: skip
    """How many tokens go through at once and how many layers are recomputed, so that a token costs the least time.

    A recomputed layer costs one more forward; a pass over the weights costs as much as some tokens, which is shared by
    all tokens of a micro-batch. ``tensors``: the adapter's.
    """
    train, quantize = recipe.train, recipe.quantize
    weights = weight_bytes(quantize.weights, quantize.double, compute, shape)
    adapter = 4 * sum(one.parameters for one in tensors)
    gradients = 4 * sum(one.parameters for one in tensors if optimizer.is_trained(train.optimizer, one.role))
    states = optimizer.state_bytes(train.optimizer, tensors)
    fixed = weights + adapter + gradients + states + int(_OVERHEAD[hardware.device])
    rows = chunk_rows(shape.vocab, hardware.device)
    head = rows * shape.vocab * (4 + BYTES[compute])
    room = hardware.free_memory * USABLE - fixed - head
    step = step_tokens(recipe, load)

    def bytes_of(layers: int, offload: bool) -> tuple[int, int]:
        return token_bytes(shape, compute, layers, offload=offload, kernels=train.kernels != "off")

    choices = {"auto": range(shape.layers + 1), "none": [0]}.get(train.recompute, [shape.layers])
    options = [(layers, train.recompute == "offload") for layers in choices]
    options += [(shape.layers, True)] if train.recompute == "auto" and hardware.device == "cuda" else []

    def judged(layers: int, offload: bool) -> tuple[bool, float]:
        """Whether it fits; of those that do the fastest is best, of the others the smallest."""
        fitting = int(room // sum(bytes_of(layers, offload)))
        micro = _micro(recipe, hardware, fitting, step)
        time = _token_time(layers / shape.layers, offload, micro, hardware)
        fits = fitting >= min(micro, step or micro)
        return fits, -time if fits else -sum(bytes_of(layers, offload))

    layers, offload = max(options, key=lambda option: judged(*option))
    micro = _micro(recipe, hardware, int(room // sum(bytes_of(layers, offload))), step)
    budget = Budget(
        weights=weights, adapter=adapter, gradients=gradients, optimizer=states,
        activations=sum(bytes_of(layers, offload)) * min(micro, step or micro), head=head,
        generation=_generation_bytes(recipe, shape, hardware, compute, load), overhead=int(_OVERHEAD[hardware.device]),
    )  # fmt: skip
    word = "offload" if offload else "layers" if layers else "none"
    return Fitted(recompute=word, layers=layers, micro_batch_tokens=micro, budget=budget)


def _micro(recipe: Recipe, hardware: Hardware, fitting: int, step: int | None) -> int:
    if recipe.train.micro_batch_tokens != "auto":
        return recipe.train.micro_batch_tokens
    longest = recipe.train.max_length
    return max(longest, min(_MOST_TOKENS[hardware.device], fitting, max(step or fitting, longest)))


def _token_time(recomputed: float, offload: bool, micro: int, hardware: Hardware) -> float:
    """Relative to a token with nothing recomputed and no pass over the weights to share."""
    return 1 + _RECOMPUTE * recomputed + (_OFFLOAD if offload else 0) + _PASS_TOKENS[hardware.device] / micro


def step_tokens(recipe: Recipe, load: Load | None) -> int | None:
    """The most tokens that one step can hold, where that is known."""
    if recipe.train.tokens_per_step:
        return recipe.train.tokens_per_step
    if load and recipe.train.examples_per_step:
        return sum(sorted(load.lengths)[-recipe.train.examples_per_step :])
    return None


def _generation_bytes(recipe: Recipe, shape: DecoderShape, hardware: Hardware, compute: str, load: Load | None) -> int:
    """Bytes while answers are generated: the cache, and on a CPU the 4-bit linears, dequantised once and kept."""
    if "exact_match" not in recipe.evaluate.metrics:
        return 0
    packed = recipe.quantize.weights in ("nf4", "fp4")
    dense = BYTES[compute] * shape.linear_parameters() if hardware.device == "cpu" and packed else 0
    length = (max(load.lengths) if load else recipe.train.max_length) + recipe.evaluate.max_new_tokens
    rows = min(recipe.evaluate.batch_rows, load.generated_rows) if load else recipe.evaluate.batch_rows
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * BYTES[compute]
    return dense + rows * length * (per_token + 6 * shape.intermediate * BYTES[compute]) + rows * shape.vocab * 8


def seconds(shape: DecoderShape, hardware: Hardware, layers: int, load: Load, tokens: int) -> float | None:
    """Per token forward 2N, backward 2N (the base has no weight gradients), 2N of each recomputed layer; None without a
    known rate."""
    if hardware.flops is None:
        return None
    linear, head = shape.linear_parameters(), shape.vocab * shape.hidden
    passes = 4 + 2 * layers / shape.layers
    share = sum(load.supervised) / sum(load.lengths)
    training = tokens * (passes * linear + 4 * share * head)
    evaluating = load.evaluated_tokens * 2 * linear * (2 if load.generated_rows else 1)
    return (training + evaluating) / (hardware.flops * _EFFICIENCY[hardware.device])


def output_bytes(recipe: Recipe, tensors: Sequence[Tensors]) -> int:
    """Checkpoints hold the adapter and the optimizer's state; one more is being written while the last are kept."""
    adapter = 4 * sum(one.parameters for one in tensors)
    saved = optimizer.saved_bytes(recipe.train.optimizer, tensors)
    return (recipe.train.keep_last + 1) * (adapter + saved) + adapter + 10_000_000

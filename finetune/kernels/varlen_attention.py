"""Causal attention over packed samples: each sample attends to itself only, at no cost for the others.

Packed rows lie one after the other on the token axis. Masking a dense [tokens, tokens] product would compute what the
mask throws away; here each sample's own block is computed and nothing else, so a sample's result cannot depend on what
was packed beside it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from finetune.errors import ModelError
from finetune.kernels import logn

NAME = "finetune_varlen"

_FULL = 0.6
"""Share of real tokens from which samples padded to one length are cheaper than one call per sample."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: tuple[int, ...], scaling: float | None = None
) -> torch.Tensor:
    """Attention of packed samples.

    Args:
        query: [1, heads, tokens, head_dim]; key and value: [1, kv_heads, tokens, head_dim].
        bounds: where samples begin, and the end: (0, n1, n1+n2, …, tokens).

    Returns:
        [1, heads, tokens, head_dim]
    """
    grouped = query.shape[1] != key.shape[1]
    lengths = [high - low for low, high in pairwise(bounds)]
    longest = max(lengths)
    if len(lengths) == 1 or sum(lengths) < _FULL * longest * len(lengths):
        blocks = [(query[:, :, low:high], key[:, :, low:high], value[:, :, low:high])
                  for low, high in pairwise(bounds)]  # fmt: skip
        parts = [
            scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
            for q, k, v in blocks
        ]
        return torch.cat(parts, dim=2)
    # Samples of like length go through one call. The filling lies behind each sample, where causality hides it.
    places = [torch.arange(low, high) for low, high in pairwise(bounds)]
    index = pad_sequence(places, batch_first=True).to(query.device)
    real = torch.tensor(lengths, device=query.device)[:, None] > torch.arange(longest, device=query.device)
    q, k, v = (states[0].transpose(0, 1)[index].transpose(1, 2) for states in (query, key, value))
    attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
    return attended.transpose(1, 2)[real].transpose(0, 1)[None]


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: tuple[int, ...], scaling: float | None = None
) -> torch.Tensor:
    """The same by its definition: one dense product under a block-diagonal causal mask."""
    tokens = query.shape[2]
    sample = torch.zeros(tokens, dtype=torch.long)
    for start in bounds[1:-1]:
        sample[start:] += 1
    mask = (sample[:, None] == sample[None, :]) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value


def _transformers_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    segment_bounds: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The signature that transformers' layers call; ``segment_bounds`` travels from the model's keyword arguments.

    Raises:
        ModelError: the layer attends within a window and a sample is longer; full attention would be another model.
    """
    assert segment_bounds is not None, "packed attention was called without the samples' bounds"
    longest = max(high - low for low, high in pairwise(segment_bounds))
    if sliding_window is not None and longest > sliding_window:
        what = f"this model attends within {sliding_window} tokens, a sample has {longest}"
        raise ModelError(what, "config.json: sliding_window", f"set train.max_length to {sliding_window} or less")
    if start := getattr(module.config, "logn_from", 0):
        assert position_ids is not None, "logn attention needs each token's position"
        query = logn.scaled(query, position_ids, start)
    return attend(query, key, value, segment_bounds, scaling).transpose(1, 2).contiguous(), None


def register() -> str:
    """Make the attention known to transformers under the returned name. No mask function: none is ever built."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _transformers_attention)
    return NAME

"""Causal attention of samples of one length, with a backward pass made for CPUs.

torch's own backward of its CPU flash attention takes up to six times as long as its forward for samples of chat length.
Here the probabilities are formed again a block of rows at a time and everything else is batched matrix products
(Dao et al. 2022, algorithm 4, with blocks of rows only). Scores are formed in fp32 whatever the inputs are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

ROWS = 128
"""Query rows of one head whose probabilities are held at once: they should stay in the processor's cache."""


def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """By its definition. query: [samples, heads, tokens, head_dim]; key and value with their own number of heads."""
    tokens, repeat = query.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(2, 3) * scaling
    return scores.masked_fill(~seen, float("-inf")).softmax(dim=-1) @ value


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """The result alone: torch's kernel for this device. Shapes as ``reference``."""
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)


def backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, grad: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. ``out``: what ``forward`` gave; ``grad``: its gradient, shaped alike."""
    samples, heads, tokens, width = query.shape
    groups = samples * key.shape[1]  # heads that share a key are rows of one product
    folded = (groups, heads // key.shape[1], tokens, width)
    q, g = query.reshape(folded), grad.reshape(folded)
    k, v = key.reshape(groups, tokens, width), value.reshape(groups, tokens, width)
    wide = torch.promote_types(query.dtype, torch.float32)
    k_wide, v_wide = k.to(wide).transpose(1, 2), v.to(wide).transpose(1, 2)
    mean = (out.reshape(folded).to(wide) * g.to(wide)).sum(dim=-1, keepdim=True)
    grad_q = torch.empty_like(q)
    one_block = tokens <= ROWS
    grad_k, grad_v = (torch.zeros(k.shape if not one_block else (), dtype=wide, device=q.device) for _ in range(2))
    for low in range(0, tokens, ROWS):
        high = min(tokens, low + ROWS)
        shape = (groups, folded[1], high - low, high)
        q_rows, g_rows, mean_rows = (
            part[:, :, low:high].reshape(groups, shape[1] * shape[2], part.shape[-1]) for part in (q, g, mean)
        )
        with _exact_products(query.dtype):
            scores = torch.bmm(q_rows.to(wide) * scaling, k_wide[:, :, :high])
            slope = torch.bmm(g_rows.to(wide), v_wide[:, :, :high])
        future = torch.full((high - low, high - low), float("-inf"), dtype=wide, device=q.device).triu_(1)
        scores.view(shape)[..., low:].add_(future)
        probabilities = scores.softmax(dim=-1)
        slope = slope.sub_(mean_rows).mul_(probabilities).to(q.dtype)
        grad_q[:, :, low:high] = torch.bmm(slope, k[:, :high]).view(*shape[:3], width)
        to_k, to_v = (
            torch.bmm(rows.transpose(1, 2), by) for rows, by in ((slope, q_rows), (probabilities.to(q.dtype), g_rows))
        )
        if one_block:
            grad_k, grad_v = to_k, to_v
        else:
            grad_k[:, :high] += to_k
            grad_v[:, :high] += to_v
    grad_k = grad_k.mul_(scaling).to(k.dtype).view(key.shape)
    return grad_q.mul_(scaling).view(query.shape), grad_k, grad_v.to(v.dtype).view(value.shape)


@contextlib.contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Inside, fp32 products of numbers that are exact in bf16 may run on the processor's bf16 units: they lose nothing,
    since such units multiply exactly and add in fp32."""
    settings: Any = torch.backends.mkldnn
    settings = settings.matmul  # torch ships no types for it
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before

"""Causal attention of samples of one length, forward and backward made for CPUs.

torch's own CPU kernel takes up to twice as long forwards for samples of chat length, and its backward up to six times
its forward. Here probabilities are formed a block of rows at a time and everything else is batched matrix products
(Dao et al. 2022, algorithms 1 and 4, with blocks of rows only). Scores, probabilities and sums are fp32 whatever the
inputs are. Heads are dealt out to threads that work alone: operations this small lose more by meeting at the end of
each than they gain by being split (decision 0012).
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
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


def native(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """torch's kernel for this device, with its own gradient. Shapes as ``reference``."""
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """The result alone. Shapes as ``reference``."""
    q, (k, v) = _by_token(query, key.shape[1]), (one.flatten(0, 1) for one in (key, value))
    out = torch.empty_like(q)

    def work(part: slice) -> None:
        k_wide, v_wide = _wide(k[part]), _wide(v[part])
        for rows, seen in _blocks(q, k):
            probabilities = _probabilities(_wide(q[part, rows]), k_wide[:, :seen], scaling)
            out[part, rows] = torch.bmm(probabilities, v_wide[:, :seen])

    _share_out(work, len(q), query.dtype)
    return _by_head(out, query)


def backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grad: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. ``grad``: that of the result, shaped alike."""
    q, g = (_by_token(one, key.shape[1]) for one in (query, grad))
    k, v = (one.flatten(0, 1) for one in (key, value))
    grad_q, grad_k, grad_v = (torch.empty_like(one) for one in (q, k, v))

    def work(part: slice) -> None:
        k_wide, v_wide = _wide(k[part]), _wide(v[part])
        to_k, to_v = torch.zeros_like(k_wide), torch.zeros_like(v_wide)
        for rows, seen in _blocks(q, k):
            q_rows, g_rows = _wide(q[part, rows]), _wide(g[part, rows])
            probabilities = _probabilities(q_rows, k_wide[:, :seen], scaling)
            slope = torch.bmm(g_rows, v_wide[:, :seen].transpose(1, 2))
            # What softmax's gradient is: probabilities · (slope - its mean under them), in one pass.
            slope = torch._softmax_backward_data(slope, probabilities, -1, slope.dtype)
            grad_q[part, rows] = torch.bmm(slope, k_wide[:, :seen]).mul_(scaling)
            to_k[:, :seen].baddbmm_(slope.transpose(1, 2), q_rows)
            to_v[:, :seen].baddbmm_(probabilities.transpose(1, 2), g_rows)
        grad_k[part], grad_v[part] = to_k.mul_(scaling), to_v

    _share_out(work, len(q), query.dtype)
    return _by_head(grad_q, query), grad_k.view(key.shape), grad_v.view(value.shape)


def _by_token(states: torch.Tensor, groups: int) -> torch.Tensor:
    """[samples, heads, tokens, width] → [samples · groups, tokens · repeat, width]: heads that share a key are rows of
    one product, and a token's rows lie together, so that a block of tokens is a block of rows."""
    samples, heads, tokens, width = states.shape
    split = states.reshape(samples, groups, heads // groups, tokens, width).transpose(2, 3)
    return split.reshape(samples * groups, -1, width)


def _by_head(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What ``_by_token`` made, in the shape that it had."""
    samples, heads, tokens, width = like.shape
    split = rows.view(samples, -1, tokens, rows.shape[1] // tokens, width).transpose(2, 3)
    return split.reshape(samples, heads, tokens, width)


def _blocks(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, int]]:
    """(rows of q, keys that the last of their tokens sees), block by block."""
    tokens = k.shape[1]
    repeat = q.shape[1] // tokens
    for low in range(0, tokens, ROWS):
        high = min(tokens, low + ROWS)
        yield slice(low * repeat, high * repeat), high


def _probabilities(q_rows: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """q_rows: a block's rows, the last ones of the tokens that ``keys`` [groups, tokens, width] has."""
    groups, seen = keys.shape[:2]
    scores = q_rows.new_empty(groups, q_rows.shape[1], seen)
    torch.baddbmm(scores, q_rows, keys.transpose(1, 2), beta=0, alpha=scaling, out=scores)
    low = (seen - 1) // ROWS * ROWS
    future = scores.new_full((seen - low, seen - low), float("-inf")).triu_(1)[:, None]
    scores.view(groups, seen - low, -1, seen)[..., low:].add_(future)
    return scores.softmax(dim=-1)


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _share_out(work: Callable[[slice], None], count: int, dtype: torch.dtype) -> None:
    """Do ``work`` on ``count`` independent items, a share of them to each thread, or all of them here where there are
    fewer items than threads."""
    threads = torch.get_num_threads()
    with torch.no_grad(), _products_of(dtype):
        if threads == 1 or count < threads:
            work(slice(0, count))
            return
        bounds = [count * number // threads for number in range(threads + 1)]
        shares = [slice(low, high) for low, high in pairwise(bounds)]
        list(_pool(threads, os.getpid()).map(torch.no_grad()(work), shares))


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads whose operations are not split any further. ``process``: a forked child has none of its parent's."""
    started = threading.Barrier(threads + 1)

    def alone() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="attention", initializer=alone)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(threads)  # what one thread sets is also what threads of others will begin with
    return pool


@contextlib.contextmanager
def _products_of(dtype: torch.dtype) -> Iterator[None]:
    """Inside, products of fp32 numbers run on the processor's bf16 units where the inputs are bf16: such units multiply
    exactly and add in fp32, so that what was bf16 loses nothing; probabilities and their slopes are rounded once."""
    settings: Any = torch.backends.mkldnn
    settings = settings.matmul  # torch ships no types for it
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before

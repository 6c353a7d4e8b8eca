"""Causal attention over packed samples: each sample attends to itself only, at no cost for the others.

Packed rows lie one after the other on the token axis. Masking a dense [tokens, tokens] product would compute what the
mask throws away; here samples of like length go through one product together and nothing else is computed, so a
sample's result cannot depend on what was packed beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from finetune.errors import ModelError
from finetune.kernels import causal_attention, flash_attention, logn

NAME = "finetune_varlen"

_FULL = 0.8
"""Share of real tokens down to which samples are padded to one length, so as to go through one call."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Samples of like length. ``rows`` [samples x longest]: the token that each place takes; filling takes any token.

    ``real`` [tokens of the group]: which places hold a token, or None where all do; ``span``: of a single sample.
    """

    samples: int
    rows: torch.Tensor
    real: torch.Tensor | None
    span: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where samples lie in a pack, made once for all layers. ``bounds``: their starts and the end, behind which tokens
    may follow that belong to none; ``starts``: the same as int32 on the device."""

    bounds: tuple[int, ...]
    starts: torch.Tensor
    groups: tuple[Group, ...]

    @property
    def longest(self) -> int:
        return max(high - low for low, high in pairwise(self.bounds))


def lay_out(bounds: Sequence[int], device: torch.device, cuts: Sequence[int] = ()) -> Layout:
    """Samples, sorted by length, in as few groups as leave little to fill.

    ``cuts``: bounds that no group reaches across. What lies between two of them is grouped, and so rounded, as if it
    were alone.
    """
    groups: list[list[tuple[int, int]]] = []
    for low, high in pairwise([0, *cuts, bounds[-1]]):
        spans = [span for span in pairwise(bounds) if low <= span[0] < high]
        groups += _grouped(sorted(spans, key=lambda span: (span[0] - span[1], span[0])))
    starts = torch.tensor(bounds, dtype=torch.int32, device=device)
    return Layout(bounds=tuple(bounds), starts=starts, groups=tuple(_group(spans, device) for spans in groups))


def _grouped(spans: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    groups: list[list[tuple[int, int]]] = []
    for span in spans:
        longest = groups[-1][0][1] - groups[-1][0][0] if groups else 0
        real = sum(high - low for low, high in [*groups[-1], span]) if groups else 0
        if groups and real >= _FULL * longest * (len(groups[-1]) + 1):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _group(spans: Sequence[tuple[int, int]], device: torch.device) -> Group:
    longest = spans[0][1] - spans[0][0]
    starts = torch.tensor([low for low, _ in spans])
    places = starts[:, None] + torch.arange(longest)
    filled = torch.arange(longest) >= torch.tensor([high - low for low, high in spans])[:, None]
    rows = torch.where(filled, starts[:, None], places).flatten().to(device)
    real = (~filled).flatten().nonzero().squeeze(1).to(device) if bool(filled.any()) else None
    return Group(samples=len(spans), rows=rows, real=real, span=spans[0] if len(spans) == 1 else None)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float | None = None
) -> torch.Tensor:
    """Attention of packed samples.

    Args:
        query: [1, heads, tokens, head_dim]; key and value: [1, kv_heads, tokens, head_dim].

    Returns:
        [1, heads, tokens, head_dim]
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.device.type == "cpu":
        return _OnCpu.apply(query, key, value, layout, scaling)  # type: ignore[no-untyped-call, no-any-return]
    if flash_attention.works(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3]):
        return flash_attention.attend(query, key, value, layout.starts, layout.longest, scaling)
    return composed(query, key, value, layout, scaling)


def composed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float
) -> torch.Tensor:
    """``attend`` of torch's own operations."""
    return _by_group(causal_attention.native, query, key, value, layout, scaling)


def _by_group(
    way: Callable[..., torch.Tensor], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout,
    scaling: float,
) -> torch.Tensor:  # fmt: skip
    parts = []
    for group in layout.groups:
        states = way(*(_padded(one, group) for one in (query, key, value)), scaling)
        parts.append(_unpadded(states, group))
    return _in_order(parts, layout, query.shape[2])


def _padded(states: torch.Tensor, group: Group) -> torch.Tensor:
    """[1, heads, tokens, head_dim] → [samples, heads, longest, head_dim]. The filling lies behind each sample, where
    causality hides it."""
    if group.span:
        return states[:, :, group.span[0] : group.span[1]]
    rows = states[0].transpose(0, 1).index_select(0, group.rows)
    return rows.view(group.samples, -1, *rows.shape[1:]).transpose(1, 2)


def _unpadded(states: torch.Tensor, group: Group) -> torch.Tensor:
    """[samples, heads, longest, head_dim] → [tokens of the group, heads, head_dim]"""
    rows = states.transpose(1, 2).flatten(0, 1)
    return rows if group.real is None else rows.index_select(0, group.real)


def _in_order(parts: Sequence[torch.Tensor], layout: Layout, tokens: int) -> torch.Tensor:
    """Groups' tokens → [1, heads, tokens, head_dim], each at its place; what lies behind the last sample is zero."""
    filling = parts[0].new_zeros(tokens - layout.bounds[-1], *parts[0].shape[1:])
    order = [*map(_places, layout.groups), torch.arange(layout.bounds[-1], tokens, device=filling.device)]
    rows = torch.cat([*parts, filling])
    return torch.empty_like(rows).index_copy(0, torch.cat(order), rows).transpose(0, 1)[None]


def _places(group: Group) -> torch.Tensor:
    return group.rows if group.real is None else group.rows.index_select(0, group.real)


class _OnCpu(torch.autograd.Function):
    """All groups as one step of autograd, which keeps the packed inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, scaling: float
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.scaling = layout, scaling
        return _by_group(causal_attention.forward, query, key, value, layout, scaling)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        parts: list[list[torch.Tensor]] = []
        for group in ctx.layout.groups:
            q, k, v, slope = (_padded(states, group) for states in (query, key, value, grad))
            if group.real is not None:  # what stands in for a token has no part in the result
                slope = _only_real(slope, group)
            gradients = causal_attention.backward(q, k, v, slope, ctx.scaling)
            parts.append([_unpadded(one, group) for one in gradients])
        by_input = zip(*parts, strict=True)
        return (*(_in_order(list(one), ctx.layout, query.shape[2]) for one in by_input), None, None)


def _only_real(states: torch.Tensor, group: Group) -> torch.Tensor:
    rows = states.transpose(1, 2)
    kept = torch.zeros(rows.shape[:2].numel(), dtype=torch.bool, device=rows.device)
    assert group.real is not None
    kept[group.real] = True
    return rows.masked_fill(~kept.view(*rows.shape[:2], 1, 1), 0).transpose(1, 2)


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


def packed(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    position_ids: torch.Tensor | None = None,
    plain: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The signature that transformers' layers call; ``layout`` travels from the model's keyword arguments.

    Raises:
        ModelError: the layer attends within a window and a sample is longer; full attention would be another model.
    """
    assert layout is not None, "packed attention was called without the samples' places"
    if sliding_window is not None and layout.longest > sliding_window:
        what = f"this model attends within {sliding_window} tokens, a sample has {layout.longest}"
        raise ModelError(what, "config.json: sliding_window", f"set train.max_length to {sliding_window} or less")
    if start := getattr(module.config, "logn_from", 0):
        assert position_ids is not None, "logn attention needs each token's position"
        query = logn.scaled(query, position_ids, start)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    way = composed if plain else attend
    return way(query, key, value, layout, scaling).transpose(1, 2).contiguous(), None


def register(*, plain: bool = False) -> str:
    """Make the attention known to transformers under the returned name. No mask function: none is ever built.

    ``plain``: with torch's own gradients."""
    from transformers import AttentionInterface

    name = f"{NAME}_plain" if plain else NAME
    AttentionInterface.register(name, functools.partial(packed, plain=True) if plain else packed)
    return name

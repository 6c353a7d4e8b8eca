"""Rotary position embedding (Su et al. 2021): halves of each head turned by the token's angles.

A rotation's gradient is the rotation back, so the backward pass keeps the angles alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def reference(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """By its definition. states: [1, tokens, heads, head_dim]; cos, sin: [1, tokens, head_dim], both halves equal."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]


def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    """Turned by the angles, or back by them where ``sign`` is -1. Shapes as ``reference``."""
    half = states.shape[-1] // 2
    sin = sin[:, :, None, :half]
    out = states * cos[:, :, None]
    out[..., :half].addcmul_(states[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(states[..., :half], sin, value=sign)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: Way) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.way = way
        return way(states, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.way(grad, cos, sin, -1), None, None, None


Way = Callable[..., torch.Tensor]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, way: Way = turned) -> torch.Tensor:
    """``reference``, with a gradient. ``way``: ``turned``, or that compiled."""
    return _Rope.apply(states, cos, sin, way)  # type: ignore[no-untyped-call, no-any-return]

"""Root-mean-square norm with a frozen weight (Zhang and Sennrich 2019): y = w · x / rms(x), statistics in fp32.

The backward pass computes what it needs from x again, so that no fp32 copy of the activations waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """By its definition, rounded where transformers rounds. x: [..., width], weight: [width]."""
    wide = x.to(_wide(x))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The result alone."""
    wide = x.to(_wide(x), copy=True)
    return wide.mul_(_inverse(wide, eps)).to(x.dtype).mul_(weight)


def _inverse(wide: torch.Tensor, eps: float) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return norm.square_().div_(wide.shape[-1]).add_(eps).rsqrt_()


def backward(x: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of x: (g - n · mean(g · n)) / rms(x), n being the normed x and g the gradient times the weight."""
    normed = x.to(_wide(x), copy=True)
    inverse = _inverse(normed, eps)
    normed.mul_(inverse)
    slope = (grad * weight).to(normed.dtype)
    mean = (slope * normed).sum(dim=-1, keepdim=True).div_(-x.shape[-1])
    return slope.addcmul_(normed, mean).mul_(inverse).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, ways: tuple[Way, Way]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.way_back = eps, ways[1]
        return ways[0](x, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        return ctx.way_back(x, weight, ctx.eps, grad), None, None, None


Way = Callable[..., torch.Tensor]


def norm(x: torch.Tensor, module: Any, ways: tuple[Way, Way] = (forward, backward)) -> torch.Tensor:
    """``module`` (a norm of transformers' with a frozen weight) applied to x. ``ways``: as these two, or compiled."""
    return _RmsNorm.apply(x, module.weight, module.variance_epsilon, ways)  # type: ignore[no-untyped-call, no-any-return]

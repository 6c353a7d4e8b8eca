"""Base linear and LoRA as one step of autograd: y = x Wᵀ + s (x Aᵀ) Bᵀ.

PEFT owns the adapter's parameters, config and files; this replaces only how a forward and a backward are computed.
It keeps x and x Aᵀ for the backward pass and nothing else, adds in place, rounds once, and works in the activations'
dtype while A and B stay fp32 masters. A layer that it does not cover (dropout, DoRA, several adapters) goes through
PEFT's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear
from torch.nn.functional import linear

from finetune.kernels.frozen_linear import dense_weight


def reference(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The same by its definition. x: [..., in], w: [out, in], a: [r, in], b: [out, r] → [..., out]."""
    return linear(x, w) + scaling * linear(linear(x, a), b)


class _LoraMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, layer: torch.nn.Module
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low, high = a.to(x.dtype), b.to(x.dtype)
        inner = rows @ low.T
        y = linear(rows, dense_weight(layer, x.dtype))
        y.addmm_(inner, high.T, alpha=scaling)
        ctx.save_for_backward(rows, inner, a, b)
        ctx.scaling, ctx.layer, ctx.shape = scaling, layer, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ b.to(grad.dtype)).mul_(ctx.scaling)
        grad_b = (grad.T @ inner).to(b.dtype).mul_(ctx.scaling)
        grad_a = (grad_inner.T @ rows).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense_weight(ctx.layer, grad.dtype)
            grad_x.addmm_(grad_inner, a.to(grad.dtype))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None


def covered(layer: Any) -> str | None:
    """The adapter's name where the fused step says the same as PEFT's forward, else None."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    name: str = layer.active_adapters[0]
    dropout = layer.lora_dropout[name] if name in layer.lora_A else None
    if dropout is None or name in layer.lora_variant or layer.lora_bias.get(name):
        return None
    return None if layer.training and getattr(dropout, "p", 0.0) > 0 else name


class _Fused:
    """Mixed into PEFT's LoRA layers."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = None if args or kwargs else covered(self)
        if name is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        base = self.base_layer
        y: torch.Tensor = _LoraMatmul.apply(  # type: ignore[no-untyped-call]
            x, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], base
        )
        return y if base.bias is None else y + base.bias.to(y.dtype)


class FusedLinear(_Fused, Linear):  # type: ignore[misc]
    """LoRA on a 16- or 32-bit linear."""


class FusedLinear4bit(_Fused, Linear4bit):  # type: ignore[misc]
    """LoRA on a 4-bit linear."""


class FusedLinear8bit(_Fused, Linear8bitLt):  # type: ignore[misc]
    """LoRA on an 8-bit linear."""


_FUSED: dict[type[torch.nn.Module], Any] = {
    Linear: FusedLinear,
    Linear4bit: FusedLinear4bit,
    Linear8bitLt: FusedLinear8bit,
}


def fuse(model: torch.nn.Module) -> None:
    """Give every LoRA layer of a PEFT model the fused step, in place."""
    for module in model.modules():
        if type(module) in _FUSED:
            module.__class__ = _FUSED[type(module)]

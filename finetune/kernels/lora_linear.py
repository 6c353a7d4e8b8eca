"""Base linear and LoRA as one step of autograd: y = x Wᵀ + s (x Aᵀ) Bᵀ.

PEFT owns the adapter's parameters, config and files; this replaces only how a forward and a backward are computed.
It keeps x Aᵀ, and x where A is trained, for the backward pass and nothing else, adds in place, rounds once, and works
in the activations' dtype while A and B stay fp32 masters. Linears with one input (query, key and value; gate and up)
go through together: one product with all their A, and one buffer for the gradient of x. A layer that this does not
cover (dropout, DoRA, several adapters) goes through PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear
from torch.nn.functional import linear

from finetune.kernels import lora_routed
from finetune.kernels.frozen_linear import dense_weight
from finetune.kernels.lora_routed import RoutedSite

Tensors = Sequence[torch.Tensor]


def reference(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The same by its definition. x: [..., in], w: [out, in], a: [r, in], b: [out, r] → [..., out]."""
    return linear(x, w) + scaling * linear(linear(x, a), b)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A frozen linear and its adapter: ``a`` [r, in] and ``b`` [out, r], or neither."""

    base: Any
    scaling: float
    a: torch.nn.Parameter | None
    b: torch.nn.Parameter | None


AnySite = Site | RoutedSite
Sites = Sequence[Any]
"""Linears with one input: ``Site`` all, or ``RoutedSite`` all."""


def site(layer: Any) -> AnySite | None:
    """What a linear, adapted or not, computes; None where that is more than this module covers."""
    if hasattr(layer, "routed_site"):  # one linear under several adapters
        return layer.routed_site()  # type: ignore[no-any-return]
    if isinstance(layer, _Fused):
        if layer.disable_adapters and not layer.merged:
            return Site(base=layer.base_layer, scaling=0.0, a=None, b=None)
        name = _covered(layer)
        if name is None:
            return None
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return Site(base=layer.base_layer, scaling=layer.scaling[name], a=a, b=b)
    frozen = isinstance(layer, torch.nn.Linear) and not any(value.requires_grad for value in layer.parameters())
    return Site(base=layer, scaling=0.0, a=None, b=None) if frozen else None


def matrices(sites: Sites) -> list[torch.Tensor]:
    """A and B of each adapted site in turn, as ``forward`` and ``backward`` take them."""
    if lora_routed.are_routed(sites):
        return lora_routed.matrices(sites)
    return [value for one in sites if one.a is not None and one.b is not None for value in (one.a, one.b)]


def trains_a(ab: Tensors) -> bool:
    """Whether any A is trained: the backward pass needs x for that alone."""
    return any(a.requires_grad for a in ab[::2])


def forward(rows: torch.Tensor, sites: Sites, ab: Tensors) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(each site's output [tokens, out], x Aᵀ of all adapted sites side by side [tokens, sum of r]).

    rows: [tokens, in]; ``ab``: ``matrices(sites)``.
    """
    if lora_routed.are_routed(sites):
        return lora_routed.forward(rows, sites, ab)
    inner = rows @ torch.cat([a.to(rows.dtype) for a in ab[::2]]).T if ab else rows.new_empty(len(rows), 0)
    parts = iter(torch.split(inner, [len(a) for a in ab[::2]], dim=1))
    bs = iter(ab[1::2])
    outputs = []
    for one in sites:
        y = linear(rows, dense_weight(one.base, rows.dtype))
        if one.a is not None:
            y.addmm_(next(parts), next(bs).to(y.dtype).T, alpha=one.scaling)
        outputs.append(y if one.base.bias is None else y.add_(one.base.bias.to(y.dtype)))
    return outputs, inner


def backward(
    grads: Tensors, rows: torch.Tensor | None, inner: torch.Tensor, sites: Sites, ab: Tensors,
    *, need_x: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:  # fmt: skip
    """(the gradient of rows, those of ``ab``), from those of the outputs. ``rows``: None where no A is trained."""
    if lora_routed.are_routed(sites):
        return lora_routed.backward(grads, rows, inner, sites, ab, need_x=need_x)
    parts = iter(torch.split(inner, [len(a) for a in ab[::2]], dim=1))
    bs, slopes, to_b = iter(ab[1::2]), list[torch.Tensor](), list[torch.Tensor]()
    grad_x: torch.Tensor | None = None
    for grad, one in zip(grads, sites, strict=True):
        if one.a is not None:
            b = next(bs)
            slopes.append((grad @ b.to(grad.dtype)).mul_(one.scaling))
            to_b.append((grad.T @ next(parts)).to(b.dtype).mul_(one.scaling))
        if need_x:
            weight = dense_weight(one.base, grad.dtype)
            grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
    if not ab:
        return grad_x, []
    slope = torch.cat(slopes, dim=1)
    to_a: Sequence[torch.Tensor | None] = [None] * len(slopes)
    if rows is not None:
        to_a = torch.split((slope.T @ rows).to(ab[0].dtype), [len(a) for a in ab[::2]])
    if grad_x is not None:
        grad_x.addmm_(slope, torch.cat([a.to(slope.dtype) for a in ab[::2]]))
    return grad_x, [value for pair in zip(to_a, to_b, strict=True) for value in pair]


class _LoraMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sites: Sites, *ab: torch.Tensor) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        outputs, inner = forward(rows, sites, ab)
        ctx.save_for_backward(rows if trains_a(ab) else None, inner, *ab)
        ctx.sites, ctx.shape = sites, x.shape
        return tuple(y.view(*x.shape[:-1], -1) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, *ab = ctx.saved_tensors
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        grad_x, to_ab = backward(flat, rows, inner, ctx.sites, ab, need_x=ctx.needs_input_grad[0])
        return (None if grad_x is None else grad_x.view(ctx.shape), None, *to_ab)


def apply(x: torch.Tensor, sites: Sites) -> tuple[torch.Tensor, ...]:
    """The outputs of linears with one input, with their gradients. x: [..., in] → [..., out] each."""
    return _LoraMatmul.apply(x, sites, *matrices(sites))  # type: ignore[no-untyped-call, no-any-return]


def _covered(layer: Any) -> str | None:
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

    disable_adapters: bool
    merged: bool
    base_layer: Any
    scaling: dict[str, float]
    lora_A: Any  # noqa: N815 - PEFT's name
    lora_B: Any  # noqa: N815

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = None if args or kwargs or self.disable_adapters else site(self)
        if own is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        return apply(x, (own,))[0]


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

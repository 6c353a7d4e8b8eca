"""Base linear and LoRA as one step of autograd: y = x Wᵀ + s (x Aᵀ) Bᵀ.

PEFT owns the adapter's parameters, config and files; this replaces only how a forward and a backward are computed.
It keeps x Aᵀ, and x where A is trained, for the backward pass and nothing else, adds in place, rounds once, and works
in the activations' dtype while A and B stay fp32 masters. Linears with one input (query, key and value; gate and up)
go through together: one product with all their A, and one buffer for the gradient of x. A layer that this does not
cover (DoRA, a trained bias, several adapters) goes through PEFT's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
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
    """A frozen linear and its adapter: ``a`` [r, in] and ``b`` [out, r], or neither.

    The adapter sees x with a share ``dropout`` of its numbers left out, drawn anew at each forward pass from ``seed``:
    the backward pass draws them again instead of keeping them.
    """

    base: Any
    scaling: float
    a: torch.nn.Parameter | None
    b: torch.nn.Parameter | None
    dropout: float = 0.0
    seed: int = 0

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x as the adapter sees it, or a gradient on its way back through the same numbers."""
        if not self.dropout:
            return x
        chance = torch.Generator(x.device).manual_seed(self.seed)
        kept = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=chance)
        return kept.mul_(x).mul_(1 / (1 - self.dropout))


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
        dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0
        return Site(
            base=layer.base_layer, scaling=layer.scaling[name], a=layer.lora_A[name].weight,
            b=layer.lora_B[name].weight, dropout=dropout,
            seed=int(torch.randint(2**62, ())) if dropout else 0,
        )  # fmt: skip
    if isinstance(layer, BaseTunerLayer):  # another method's: some are linears, and at rest nothing in them is trained
        return None
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
    inner = _inner(rows, [one for one in sites if one.a is not None], [a.to(rows.dtype) for a in ab[::2]])
    parts = iter(torch.split(inner, [len(a) for a in ab[::2]], dim=1))
    bs = iter(ab[1::2])
    outputs = []
    for one in sites:
        y = linear(rows, dense_weight(one.base, rows.dtype))
        if one.a is not None:
            y.addmm_(next(parts), next(bs).to(y.dtype).T, alpha=one.scaling)
        outputs.append(y if one.base.bias is None else y.add_(one.base.bias.to(y.dtype)))
    return outputs, inner


def _inner(rows: torch.Tensor, adapted: Sequence[Site], a: Tensors) -> torch.Tensor:
    if not adapted:
        return rows.new_empty(len(rows), 0)
    if any(one.dropout for one in adapted):
        return torch.cat([one.dropped(rows) @ low.T for one, low in zip(adapted, a, strict=True)], dim=1)
    return rows @ torch.cat(list(a)).T


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
    to_a = _through_a(grad_x, slopes, rows, [one for one in sites if one.a is not None], ab[::2])
    return grad_x, [value for pair in zip(to_a, to_b, strict=True) for value in pair]


def _through_a(
    grad_x: torch.Tensor | None, slopes: Tensors, rows: torch.Tensor | None, adapted: Sequence[Site], a: Tensors
) -> Sequence[torch.Tensor | None]:
    """The gradients of each A, from those of x Aᵀ; what reaches x is added to ``grad_x``."""
    to_a: Sequence[torch.Tensor | None] = [None] * len(a)
    if any(one.dropout for one in adapted):
        for one, slope, low in zip(adapted, slopes, a, strict=True):
            if grad_x is not None:
                grad_x.add_(one.dropped(slope @ low.to(slope.dtype)))
        if rows is not None:
            to_a = [
                (slope.T @ one.dropped(rows)).to(low.dtype) for one, slope, low in zip(adapted, slopes, a, strict=True)
            ]
        return to_a
    slope = torch.cat(list(slopes), dim=1)
    if grad_x is not None:
        grad_x.addmm_(slope, torch.cat([low.to(slope.dtype) for low in a]))
    if rows is not None:
        to_a = torch.split((slope.T @ rows).to(a[0].dtype), [len(low) for low in a])
    return to_a


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
    plain = name in layer.lora_A and name not in layer.lora_variant and not layer.lora_bias.get(name)
    return name if plain else None


class _Fused:
    """Mixed into PEFT's LoRA layers."""

    disable_adapters: bool
    merged: bool
    base_layer: Any
    scaling: dict[str, float]
    training: bool
    lora_dropout: Any
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

"""Frozen linears under several adapters: each row range of the input has its own LoRA, or none.

The base product is one product over all rows, and a packed weight is dequantised once each way, whatever the number of
adapters; only the products of rank r are made range by range. A row's result hangs on its own adapter alone, so that
each adapter gets the gradient of a run of its own. ``lora_linear`` hands its sites here where they are routed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch.nn.functional import linear

from finetune.kernels.frozen_linear import dense_weight

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Rows ``low`` to ``high`` belong to one adapter. a: [r, in], b: [out, r]."""

    low: int
    high: int
    scaling: float
    a: torch.Tensor
    b: torch.Tensor
    drop: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Dropout of this adapter's input: rows as it sees them, or their gradient on its way back."""


@dataclass(frozen=True, kw_only=True)
class RoutedSite:
    """A frozen linear and the adapters of its rows; rows of no share have the base alone."""

    base: Any
    shares: tuple[Share, ...]


def are_routed(sites: Sequence[Any]) -> TypeGuard[Sequence[RoutedSite]]:
    """Whether these linears, which have one input, are under several adapters: all of them are, or none."""
    return isinstance(sites[0], RoutedSite)


def reference(x: torch.Tensor, w: torch.Tensor, shares: Sequence[Share]) -> torch.Tensor:
    """By its definition. x: [rows, in], w: [out, in] → [rows, out]."""
    y = linear(x, w)
    for one in shares:
        mine = torch.zeros(len(x), 1, dtype=x.dtype, device=x.device)
        mine[one.low : one.high] = one.scaling
        rows = slice(one.low, one.high)
        seen = x if one.drop is None else torch.cat([x[: one.low], one.drop(x[rows]), x[one.high :]])
        y = y + mine * linear(linear(seen, one.a), one.b)
    return y


def matrices(sites: Sequence[RoutedSite]) -> list[torch.Tensor]:
    """A and B of each site's shares in turn."""
    return [value for site in sites for share in site.shares for value in (share.a, share.b)]


@dataclass(frozen=True)
class _Range:
    """One adapter's rows, with what it has on the sites: (site, where its A and B stand among the matrices, share)."""

    low: int
    high: int
    parts: tuple[tuple[int, int, Share], ...]

    def columns(self, ab: Tensors) -> Iterator[slice]:
        """Where each part's x Aᵀ lies among those of the adapter, side by side."""
        low = 0
        for _, at, _ in self.parts:
            yield slice(low, low + len(ab[at]))
            low += len(ab[at])

    def rank(self, ab: Tensors) -> int:
        return sum(len(ab[at]) for _, at, _ in self.parts)

    def low_rank(self, rows: torch.Tensor, ab: Tensors) -> torch.Tensor:
        """x Aᵀ of all parts side by side, from the adapter's own rows."""
        a = [ab[at].to(rows.dtype) for _, at, _ in self.parts]
        if any(share.drop for *_, share in self.parts):
            return torch.cat(
                [_seen(rows, share) @ one.T for (*_, share), one in zip(self.parts, a, strict=True)], dim=1
            )
        return rows @ torch.cat(a).T

    def through_a(
        self, slopes: Tensors, rows: torch.Tensor | None, grad_x: torch.Tensor | None, ab: Tensors
    ) -> list[torch.Tensor | None]:
        """The gradient of each part's A, from those of x Aᵀ; what reaches the rows is added to ``grad_x``."""
        a = [ab[at] for _, at, _ in self.parts]
        if any(share.drop for *_, share in self.parts):
            for (*_, share), slope, one in zip(self.parts, slopes, a, strict=True) if grad_x is not None else ():
                grad_x.add_(_seen(slope @ one.to(slope.dtype), share))  # type: ignore[union-attr]
            if rows is None:
                return [None] * len(a)
            seen = [_seen(rows, share) for *_, share in self.parts]
            return [(slope.T @ x).to(one.dtype) for slope, x, one in zip(slopes, seen, a, strict=True)]
        slope = torch.cat(list(slopes), dim=1)
        if grad_x is not None:
            grad_x.addmm_(slope, torch.cat([one.to(slope.dtype) for one in a]))
        if rows is None:
            return [None] * len(a)
        return list(torch.split((slope.T @ rows).to(a[0].dtype), [len(one) for one in a]))


def _seen(rows: torch.Tensor, share: Share) -> torch.Tensor:
    return rows if share.drop is None else share.drop(rows)


def _ranges(sites: Sequence[RoutedSite]) -> list[_Range]:
    found: dict[tuple[int, int], list[tuple[int, int, Share]]] = {}
    at = 0
    for number, site in enumerate(sites):
        for share in site.shares:
            found.setdefault((share.low, share.high), []).append((number, at, share))
            at += 2
    return [_Range(low, high, tuple(parts)) for (low, high), parts in found.items()]


def forward(rows: torch.Tensor, sites: Sequence[RoutedSite], ab: Tensors) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(each site's output [tokens, out], each adapter's x Aᵀ in its rows [tokens, the largest sum of r]).

    rows: [tokens, in]; ``ab``: ``matrices(sites)``.
    """
    outputs = [linear(rows, dense_weight(site.base, rows.dtype)) for site in sites]
    ranges = _ranges(sites)
    inner = rows.new_empty(len(rows), max((one.rank(ab) for one in ranges), default=0))
    for one in ranges:
        mine = inner[one.low : one.high, : one.rank(ab)].copy_(one.low_rank(rows[one.low : one.high], ab))
        for (number, at, share), columns in zip(one.parts, one.columns(ab), strict=True):
            y = outputs[number][one.low : one.high]
            y.addmm_(mine[:, columns], ab[at + 1].to(y.dtype).T, alpha=share.scaling)
    for y, site in zip(outputs, sites, strict=True):
        if site.base.bias is not None:
            y.add_(site.base.bias.to(y.dtype))
    return outputs, inner


def backward(
    grads: Tensors, rows: torch.Tensor | None, inner: torch.Tensor, sites: Sequence[RoutedSite], ab: Tensors,
    *, need_x: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:  # fmt: skip
    """(the gradient of rows, those of ``ab``), from those of the outputs. ``rows``: None where no A is trained."""
    grad_x: torch.Tensor | None = None
    for grad, site in zip(grads, sites, strict=True) if need_x else ():
        weight = dense_weight(site.base, grad.dtype)
        grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
    found: list[torch.Tensor | None] = [None] * len(ab)
    for one in _ranges(sites):
        mine, slopes = inner[one.low : one.high], []
        for (number, at, share), columns in zip(one.parts, one.columns(ab), strict=True):
            grad, b = grads[number][one.low : one.high], ab[at + 1]
            slopes.append((grad @ b.to(grad.dtype)).mul_(share.scaling))
            found[at + 1] = (grad.T @ mine[:, columns]).to(b.dtype).mul_(share.scaling)
        own_rows, own_grad = (None if part is None else part[one.low : one.high] for part in (rows, grad_x))
        for (_, at, _), to_a in zip(one.parts, one.through_a(slopes, own_rows, own_grad, ab), strict=True):
            found[at] = to_a
    return grad_x, found

"""One frozen linear under several adapters: each row range of the input has its own LoRA, or none.

The base product is one product over all rows, and a packed weight is dequantised once each way, whatever the number of
adapters; only the products of rank r are made range by range. A row's result hangs on its own adapter alone, so that
each adapter gets the gradient of a run of its own. Where a layer is not covered by the fused step (DoRA, token rows),
each range goes through its own adapter's module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch.nn.functional import linear

from finetune.kernels import lora_linear
from finetune.kernels.frozen_linear import dense_weight


class Share(NamedTuple):
    """Rows ``low`` to ``high`` belong to one adapter. a: [r, in], b: [out, r]."""

    low: int
    high: int
    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def reference(x: torch.Tensor, w: torch.Tensor, shares: Sequence[Share]) -> torch.Tensor:
    """The same by its definition. x: [rows, in], w: [out, in] → [rows, out]; rows of no share get the base alone."""
    y = linear(x, w)
    return y.index_add(
        0,
        torch.cat([torch.arange(share.low, share.high) for share in shares]),
        torch.cat([share.scaling * linear(linear(x[share.low : share.high], share.a), share.b) for share in shares]),
    )


class _RoutedMatmul(torch.autograd.Function):
    """The adapters' matrices come as plain arguments (a, b, a, b, …), ``places`` says (low, high, scaling) of each."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layer: torch.nn.Module,
        places: Sequence[tuple[int, int, float]],
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = linear(rows, dense_weight(layer, x.dtype))
        inners = []
        for (low, high, scaling), a, b in zip(places, matrices[::2], matrices[1::2], strict=True):
            inners.append(rows[low:high] @ a.to(x.dtype).T)
            y[low:high].addmm_(inners[-1], b.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(rows, *inners, *matrices)
        ctx.layer, ctx.places, ctx.shape = layer, places, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        rows, *saved = ctx.saved_tensors
        inners, matrices = saved[: len(ctx.places)], saved[len(ctx.places) :]
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad @ dense_weight(ctx.layer, grad.dtype) if ctx.needs_input_grad[0] else None
        found: list[torch.Tensor] = []
        for (low, high, scaling), inner, a, b in zip(ctx.places, inners, matrices[::2], matrices[1::2], strict=True):
            own = grad[low:high]
            grad_inner = (own @ b.to(grad.dtype)).mul_(scaling)
            if grad_x is not None:
                grad_x[low:high].addmm_(grad_inner, a.to(grad.dtype))
            grad_b = (own.T @ inner).to(b.dtype).mul_(scaling)
            found += [(grad_inner.T @ rows[low:high]).to(a.dtype), grad_b]
        return None if grad_x is None else grad_x.view(ctx.shape), None, None, *found


def routed(x: torch.Tensor, layer: torch.nn.Module, shares: Sequence[Share]) -> torch.Tensor:
    """``reference`` with the layer's weight as it acts, without its bias. x: [..., in] → [..., out]."""
    places = [(share.low, share.high, share.scaling) for share in shares]
    matrices = [matrix for share in shares for matrix in (share.a, share.b)]
    y: torch.Tensor = _RoutedMatmul.apply(x, layer, places, *matrices)  # type: ignore[no-untyped-call]
    return y


class Routes:
    """Whose rows are whose in the pass that runs now: (low, high, adapter) in order, together all of them."""

    def __init__(self) -> None:
        self.places: tuple[tuple[int, int, int], ...] = ()


class Routed(torch.nn.Module):
    """One place of the base as several adapters have it. It owns no parameters: they are the adapters' own."""

    def __init__(self, base: torch.nn.Module, theirs: Sequence[torch.nn.Module], routes: Routes) -> None:
        super().__init__()
        self.shared = (base, tuple(theirs), routes)  # in a tuple: torch would take modules for its own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base, theirs, routes = self.shared
        shares = []
        for low, high, who in routes.places:
            layer: Any = theirs[who]
            if layer is base:
                continue
            name = lora_linear.covered(layer) if isinstance(layer, LoraLayer) else None
            if name is None:
                return torch.cat([theirs[who](x[:, low:high]) for low, high, who in routes.places], dim=1)
            shares.append(Share(low, high, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]))
        if not shares:
            y: torch.Tensor = base(x)
            return y
        y = routed(x, base, shares)
        bias: torch.Tensor | None = base.bias  # type: ignore[assignment]
        return y if bias is None else y + bias.to(y.dtype)

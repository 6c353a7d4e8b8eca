"""Output head and cross-entropy over the supervised positions, in chunks, with the gradient made on the way.

Full logits of a 16k-token batch under a 152k vocabulary are 9 GiB in fp32. Here only supervised positions pass the
head, a chunk at a time; each chunk's gradient with respect to its hidden states is formed at once and the logits are
dropped. (The frozen head has no gradient of its own.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

CHUNK = 1024


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of -log p(target) by the definition, all logits at once. hidden: [n, hidden], targets, scales: [n]."""
    losses = cross_entropy(wide(linear(hidden, weight)), targets, reduction="none")
    return (losses if scales is None else losses * scales).sum()


def wide(logits: torch.Tensor) -> torch.Tensor:
    """Logits in fp32, or in fp64 where they are that already: where softmax is computed."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scales: torch.Tensor | None
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for low in range(0, len(targets), CHUNK):
            part = slice(low, low + CHUNK)
            logits = wide(linear(hidden[part], weight))
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            picked = logits.gather(1, targets[part, None])
            losses = normaliser - picked
            total += (losses if scales is None else losses * scales[part, None]).sum(dtype=torch.float64)
            if gradient is not None:
                # d(-log p)/d logits = softmax - onehot; pushed through the head at once, so logits die here.
                slope = logits.sub_(normaliser).exp_()
                slope.scatter_add_(1, targets[part, None], -torch.ones_like(picked))
                if scales is not None:
                    slope *= scales[part, None].to(slope.dtype)
                gradient[part] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return total.to(wide(hidden[:1]).dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * grad_output.to(gradient.dtype)), None, None, None


def summed(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of -log p(target) over supervised positions, each times its scale.

    hidden: [n, hidden], targets: [n], scales: [n] (None means 1) → scalar. A head that is trained, adapted or has a
    bias goes through the module itself, chunk by chunk with recomputation.
    """
    if type(head) is torch.nn.Linear and getattr(head, "bias", None) is None and not head.weight.requires_grad:
        return _FrozenHeadLoss.apply(hidden, head.weight, targets, scales)  # type: ignore[no-untyped-call, no-any-return]
    total = torch.zeros((), dtype=wide(hidden[:1]).dtype, device=hidden.device)
    for low in range(0, len(targets), CHUNK):
        part = slice(low, low + CHUNK)
        total = total + torch.utils.checkpoint.checkpoint(
            lambda h, t, s: _through(head, h, t, s),
            hidden[part],
            targets[part],
            None if scales is None else scales[part],
            use_reentrant=False,
        )
    return total


def _through(
    head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor, scales: torch.Tensor | None
) -> torch.Tensor:
    logits = wide(head(hidden))
    if scales is None:
        return cross_entropy(logits, targets, reduction="sum")
    return (cross_entropy(logits, targets, reduction="none") * scales.to(logits.dtype)).sum()

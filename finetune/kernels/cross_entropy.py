"""Output head and log-probabilities of the supervised positions, in chunks, with the gradient made on the way.

Full logits of a 16k-token batch under a 152k vocabulary are 9 GiB in fp32. Here only supervised positions pass the
head, a chunk at a time; each chunk's gradient with respect to its hidden states is formed at once and the logits are
dropped. (The frozen head has no gradient of its own.) A position's gradient is that of its own log-probability alone,
so whatever an objective makes of the log-probabilities scales it afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy, linear

CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Logits that exist at once: on a CPU few enough for its caches to help, on a card enough for a launch to pay."""


def chunk_rows(vocab: int, device: str) -> int:
    """Positions whose logits are formed at once."""
    return max(16, CHUNK[device if device in CHUNK else "cuda"] // vocab)


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of -log p(target) by the definition, all logits at once. hidden: [n, hidden], targets, scales: [n]."""
    losses = cross_entropy(wide(linear(hidden, weight)), targets, reduction="none")
    return (losses if scales is None else losses * scales).sum()


def plain(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """``summed`` with all logits at once and torch's own gradient."""
    found = cross_entropy(wide(head(hidden)), targets, reduction="none")
    return (found if scales is None else found * scales.to(found.dtype)).sum()


def wide(logits: torch.Tensor) -> torch.Tensor:
    """Logits in fp32, or in fp64 where they are that already: where softmax is computed."""
    return logits if logits.dtype == torch.float64 else logits.float()


class _FrozenHead(torch.autograd.Function):
    """-log p(target) of each position, through a head that is not trained."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(targets), dtype=wide(hidden[:1]).dtype, device=hidden.device)
        inverse = torch.empty_like(losses)
        rows = chunk_rows(len(weight), hidden.device.type)
        for low in range(0, len(targets), rows):
            part = slice(low, low + rows)
            target = targets[part, None]
            logits = linear(hidden[part], weight)
            largest = logits.amax(dim=-1, keepdim=True)
            # One wide copy, worked on in place: every pass over the logits costs as much as a good part of the product.
            powers = wide(logits).sub_(largest)
            picked = powers.gather(1, target)
            total = powers.exp_().sum(dim=-1, keepdim=True)
            losses[part] = (total.log() - picked).squeeze(1)
            if gradient is not None:
                # d(-log p)/d logits = softmax - onehot; pushed through the head at once, so logits die here. What
                # softmax divides by is left for the backward pass, where it meets far smaller tensors.
                powers.scatter_add_(1, target, -total)
                gradient[part] = logits.copy_(powers) @ weight
                inverse[part] = total.reciprocal_().squeeze(1)
            del logits, powers  # before the next chunk has its own: half a gigabyte more on a card
        ctx.save_for_backward(gradient, inverse)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        gradient, inverse = ctx.saved_tensors
        if gradient is None:
            return None, None, None
        slope: torch.Tensor = (gradient * (inverse * grad_output)[:, None]).to(gradient.dtype)
        return slope, None, None


def losses(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    """-log p(target) of each position: what supervised and preference objectives are made of.

    hidden: [n, hidden], targets: [n] → [n], in fp32 or wider. A head that is trained, adapted or has a bias goes
    through the module itself, chunk by chunk with recomputation.
    """
    if type(head) is torch.nn.Linear and getattr(head, "bias", None) is None and not head.weight.requires_grad:
        return _FrozenHead.apply(hidden, head.weight, targets)  # type: ignore[no-untyped-call, no-any-return]
    rows = chunk_rows(int(getattr(head, "out_features", 1 << 17)), hidden.device.type)
    parts = [
        torch.utils.checkpoint.checkpoint(
            lambda h, t: cross_entropy(wide(head(h)), t, reduction="none"), states, wanted, use_reentrant=False
        )
        for states, wanted in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat(parts)


def summed(
    hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of -log p(target), each times its scale. hidden: [n, hidden], targets, scales: [n] (None: 1) → scalar."""
    found = losses(hidden, head, targets)
    total = (found if scales is None else found * scales.to(found.dtype)).sum(dtype=torch.float64)
    return total.to(found.dtype)

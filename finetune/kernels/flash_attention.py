"""Packed samples through the flash attention that torch carries for cards, where it does what it should.

torch's variable-length interface is young and differs between releases, so it is tried once against plain attention on
the card at hand, with its gradients; where it is missing, refuses or disagrees, ``varlen_attention`` composes the same
from torch's dense kernels.
"""

from __future__ import annotations

import functools

import torch

from finetune.kernels import causal_attention

_NEAR = 3e-2
"""Largest relative distance from plain attention that 16 bits account for; another mask or scaling is far beyond."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, longest: int, scaling: float
) -> torch.Tensor:
    """Causal attention within each sample.

    query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim]; starts: int32 [samples + 1], where
    samples begin, and the end → as query.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        starts,
        starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out.transpose(0, 1)[None]


@functools.cache
def works(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> bool:
    """Whether it can be taken for states of that kind, on that device."""
    taken = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return taken and agrees(device, dtype, heads, kv_heads, width)


def agrees(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> bool:
    """Whether ``attend`` runs there and says the same as plain attention, with its gradients."""
    drawn = torch.Generator(device).manual_seed(0)
    query, key, value, slope = (
        torch.randn(1, count, 24, width, generator=drawn, device=device).to(dtype).requires_grad_()
        for count in (heads, kv_heads, kv_heads, heads)
    )
    starts = torch.tensor([0, 17, 24], dtype=torch.int32, device=device)
    parts = [slice(0, 17), slice(17, 24)]
    try:
        with torch.enable_grad():
            found = attend(query, key, value, starts, 17, 0.3)
            plain = [causal_attention.reference(query[:, :, p], key[:, :, p], value[:, :, p], 0.3) for p in parts]
            ways = [
                [out.detach(), *torch.autograd.grad(out, (query, key, value), slope)]
                for out in (found, torch.cat(plain, dim=2))
            ]
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):  # RuntimeError: no kernel for this card
        return False
    return all(float((one - two).norm()) <= _NEAR * float(two.norm()) for one, two in zip(*ways, strict=True))

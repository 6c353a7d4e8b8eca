"""SwiGLU (Shazeer 2020): silu(gate) · up, where the backward pass forms the product again instead of keeping it."""

from __future__ import annotations

import torch
from torch.nn.functional import silu


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """By its definition. gate, up: [..., intermediate]."""
    return gate * torch.sigmoid(gate) * up


def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The product alone."""
    return silu(gate).mul_(up)


def backward(gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, from that of the product."""
    to_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return to_gate, silu(gate).mul_(grad)

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from finetune.kernels.rope import reference, rotate
from tests.tiny import distance


def parts(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States [1, 5, 3, 8] as a linear gives them, and the cosines and sines of each token's angles."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 5, 3, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    angles = torch.rand(1, 5, 4, generator=generator, dtype=torch.float64).repeat(1, 1, 2) * 6
    return states, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_value_and_gradient(dtype: torch.dtype, bound: float) -> None:
    states, cos, sin = parts(dtype)
    wide = states.detach().double().requires_grad_()
    fast, slow = rotate(states, cos, sin), reference(wide, cos.double(), sin.double())
    theirs, _ = apply_rotary_pos_emb(states.transpose(1, 2), states.transpose(1, 2), cos, sin)
    assert distance(fast, slow) < bound
    assert distance(fast, theirs.transpose(1, 2)) < 2 * bound
    slope = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (one,) = torch.autograd.grad(fast, states, slope.to(dtype))
    (two,) = torch.autograd.grad(slow, wide, slope)
    assert distance(one, two) < bound


def test_gradcheck() -> None:
    states, cos, sin = parts(torch.float64)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), (states,))

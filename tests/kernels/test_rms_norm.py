from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from finetune.kernels import rms_norm
from finetune.kernels.rms_norm import norm, reference
from tests.tiny import distance


def parts(dtype: torch.dtype) -> tuple[torch.Tensor, Qwen3RMSNorm, torch.Tensor]:
    """An input [3, 5, 16], a frozen norm, and a gradient of its result."""
    generator = torch.Generator().manual_seed(0)
    module = Qwen3RMSNorm(16, eps=1e-5).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(16, generator=generator) * 0.3 + 1)
    x, slope = (torch.randn(3, 5, 16, generator=generator, dtype=torch.float64) * 4 for _ in range(2))
    return x.to(dtype).requires_grad_(), module, slope.to(dtype)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_value_and_gradient(dtype: torch.dtype, bound: float) -> None:
    x, module, slope = parts(dtype)
    wide = x.detach().double().requires_grad_()
    fast, slow = norm(x, module), reference(wide, module.weight.double(), 1e-5)
    assert fast.dtype == dtype
    assert distance(fast, slow) < bound
    (one,), (two,) = torch.autograd.grad(fast, x, slope), torch.autograd.grad(slow, wide, slope.double())
    assert one.dtype == dtype
    assert distance(one, two) < bound


def test_rounds_where_transformers_rounds() -> None:
    x, module, _ = parts(torch.bfloat16)
    assert torch.equal(reference(x, module.weight, 1e-5), module(x))
    assert distance(norm(x, module), module(x)) < 1e-3


def test_gradcheck() -> None:
    x, module, _ = parts(torch.float64)
    assert torch.autograd.gradcheck(lambda x: norm(x, module), (x,))


def test_the_input_is_left_alone() -> None:
    x, module, slope = parts(torch.float32)
    before = x.detach().clone()
    rms_norm.backward(x.detach(), module.weight, 1e-5, slope)
    rms_norm.forward(x.detach(), module.weight, 1e-5)
    assert torch.equal(x, before)

from __future__ import annotations

import pytest
import torch

from finetune.kernels import swiglu
from tests.tiny import distance


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_value_and_gradients(dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, slope = (torch.randn(7, 12, generator=generator, dtype=torch.float64).to(dtype) * 3 for _ in range(3))
    wide = [value.double().requires_grad_() for value in (gate, up)]
    slow = swiglu.reference(*wide)
    assert distance(swiglu.forward(gate, up), slow) < bound
    kept = gate.clone(), up.clone(), slope.clone()
    for one, two in zip(swiglu.backward(gate, up, slope), torch.autograd.grad(slow, wide, slope.double()), strict=True):
        assert one.dtype == dtype
        assert distance(one, two) < bound
    assert all(torch.equal(one, two) for one, two in zip(kept, (gate, up, slope), strict=True))

from __future__ import annotations

import pytest
import torch

from finetune.kernels import cross_entropy
from finetune.kernels.log_probabilities import by_sample, plain, reference
from tests.kernels.test_cross_entropy import ROWS, batch, frozen
from tests.tiny import distance

SPANS = (4, 1, 11, 7)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("scaled", [False, True])
def test_value_and_gradient_equal_the_reference(
    chunk: int, dtype: torch.dtype, bound: float, head: str, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: chunk)
    hidden, weight, targets = batch(dtype)
    scales = torch.linspace(0.1, 3, ROWS) if scaled else None
    module = frozen(weight)
    module.weight.requires_grad_(head == "trained")
    slopes = torch.tensor([0.3, -1.7, 0.0, 2.0])  # a preference loss pushes some texts up and others down
    wanted = reference(hidden, weight, targets, SPANS, scales)
    (two,) = torch.autograd.grad((wanted * slopes).sum(), hidden)
    for made in (by_sample, plain):
        found = made(hidden, module, targets, SPANS, scales)
        assert found.dtype == torch.float64
        assert distance(found, wanted) < bound
        (one,) = torch.autograd.grad((found * slopes).sum(), hidden)
        assert one.dtype == dtype
        assert distance(one, two) < bound


@pytest.mark.parametrize("scaled", [False, True])
def test_gradcheck(scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 5)
    hidden, weight, targets = batch(torch.float64)
    scales = torch.linspace(0.1, 3, ROWS, dtype=torch.float64) if scaled else None
    assert torch.autograd.gradcheck(lambda x: by_sample(x, frozen(weight), targets, SPANS, scales), (hidden,))

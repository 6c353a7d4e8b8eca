from __future__ import annotations

import pytest
import torch

from finetune.kernels import cross_entropy, lora_linear
from finetune.kernels.cross_entropy import reference, summed
from tests.tiny import distance

ROWS, WIDTH, VOCAB = 23, 8, 31


def batch(dtype: torch.dtype, rows: int = ROWS, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden: [rows, width], head: [vocab, width], targets: [rows]"""
    generator = torch.Generator().manual_seed(3)
    hidden = (torch.randn(rows, WIDTH, generator=generator) * spread).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    return hidden, weight, torch.randint(VOCAB, (rows,), generator=generator)


def frozen(weight: torch.Tensor) -> torch.nn.Linear:
    head = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    head.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return head


@pytest.mark.parametrize("chunk", [1, 5, ROWS, 100])
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
    fast, slow = summed(hidden, module, targets, scales), reference(hidden, weight, targets, scales)
    assert fast.dtype == slow.dtype == dtype
    assert distance(fast, slow) < bound
    factor = 1 / 7  # what the loop does to a sum
    (one,), (two,) = (torch.autograd.grad(value * factor, hidden) for value in (fast, slow))
    assert one.dtype == dtype
    assert distance(one, two) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_logits_of_hundreds_do_not_overflow(dtype: torch.dtype, bound: float) -> None:
    hidden, weight, targets = batch(dtype, spread=100.0)
    fast, slow = summed(hidden, frozen(weight), targets), reference(hidden, weight, targets)
    assert slow > 88 * ROWS  # exp alone would be infinite
    assert distance(fast, slow) < bound
    (one,), (two,) = torch.autograd.grad(fast, hidden), torch.autograd.grad(slow, hidden)
    assert distance(one, two) < bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision_is_near_the_exact_value(
    dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 5)
    hidden, weight, targets = batch(dtype)
    exact = hidden.detach().double().requires_grad_()
    fast, slow = summed(hidden, frozen(weight), targets), reference(exact, weight.double(), targets)
    assert fast.dtype == torch.float32
    assert distance(fast, slow) < bound
    (one,), (two,) = torch.autograd.grad(fast, hidden), torch.autograd.grad(slow, exact)
    assert one.dtype == dtype
    assert distance(one, two) < bound


def test_sum_over_many_rows_keeps_its_digits() -> None:
    hidden, weight, targets = batch(torch.float32, rows=20_000)
    with torch.no_grad():
        exact = reference(hidden.double(), weight.double(), targets)
        assert distance(summed(hidden, frozen(weight), targets), exact) < 1e-7


@pytest.mark.parametrize("chunk", [2, 100])
def test_gradcheck(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: chunk)
    hidden, weight, targets = batch(torch.float64, rows=5)
    head = frozen(weight)
    assert torch.autograd.gradcheck(lambda h: summed(h, head, targets), (hidden,))


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    hidden, weight, targets = batch(torch.float64)
    with torch.no_grad():
        quiet = summed(hidden, frozen(weight), targets)
    assert not quiet.requires_grad
    assert torch.equal(quiet, summed(hidden, frozen(weight), targets).detach())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_head_with_a_bias_or_under_training(bias: bool, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 5)
    hidden, weight, targets = batch(torch.float64)
    head = torch.nn.Linear(WIDTH, VOCAB, bias=bias, dtype=torch.float64)
    head.weight.data.copy_(weight)
    head.requires_grad_(trained)
    inputs = [hidden, *(head.parameters() if trained else ())]
    fast = summed(hidden, head, targets)
    slow = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    assert distance(fast, slow) < 1e-12
    for one, two in zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs), strict=True):
        assert distance(one, two) < 1e-12


def test_adapted_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 5)
    hidden, weight, targets = batch(torch.float64)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["head"])
    model = get_peft_model(torch.nn.ModuleDict({"head": frozen(weight)}), config)
    lora_linear.fuse(model)
    layer = model.base_model.model["head"]
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    high.data.normal_(generator=torch.Generator().manual_seed(0))
    fast, slow = summed(hidden, layer, targets), reference(hidden, weight + 3.0 * high @ low, targets)
    assert distance(fast, slow) < 1e-12
    inputs = [hidden, low, high]
    for one, two in zip(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs), strict=True):
        assert distance(one, two) < 1e-12


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_log_probabilities_take_any_gradient(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What preference objectives do: sums over pairs, through functions that are not linear."""
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda *_: 5)
    hidden, weight, targets = batch(torch.float64)
    module = frozen(weight)
    module.weight.requires_grad_(head == "trained")
    fast = cross_entropy.losses(hidden, module, targets)
    slow = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert distance(fast, slow) < 1e-12
    margins = [torch.nn.functional.logsigmoid(one[:9].sum() - one[9:].mean() * 7) for one in (fast, slow)]
    found = [torch.autograd.grad(margin, hidden)[0] for margin in margins]
    assert distance(*found) < 1e-11

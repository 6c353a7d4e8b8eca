from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from finetune.kernels import causal_attention
from finetune.kernels.causal_attention import backward, forward, native, reference
from tests.tiny import distance


def states(
    tokens: int, heads: tuple[int, int], dtype: torch.dtype, samples: int = 2, width: int = 8
) -> list[torch.Tensor]:
    """Query, key, value and a gradient of the result."""
    generator = torch.Generator().manual_seed(tokens)
    counts = (heads[0], heads[1], heads[1], heads[0])
    drawn = [torch.randn(samples, count, tokens, width, generator=generator, dtype=torch.float64) for count in counts]
    return [one.to(dtype) for one in drawn]


def true_gradients(parts: list[torch.Tensor], scaling: float) -> tuple[torch.Tensor, ...]:
    query, key, value = (one.double().requires_grad_() for one in parts[:3])
    return torch.autograd.grad(reference(query, key, value, scaling), (query, key, value), parts[3].double())


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 7, 16, 40])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_equals_the_reference(
    tokens: int, heads: tuple[int, int], dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_attention, "ROWS", 16)  # one block, one block exactly full, and three
    parts = states(tokens, heads, dtype)
    query, key, value, grad = parts
    out = forward(query, key, value, 0.3)
    assert distance(out, reference(query.double(), key.double(), value.double(), 0.3)) < bound
    for one, true, like in zip(backward(query, key, value, grad, 0.3), true_gradients(parts, 0.3), parts, strict=False):
        assert one.dtype == dtype
        assert one.shape == like.shape
        # One token alone sees itself whatever its query and key are: their gradients are zero.
        assert distance(one, true) < bound if true.any() else one.abs().max() < bound


def test_in_bf16_it_is_as_near_the_truth_as_torchs_own() -> None:
    parts = states(150, (4, 2), torch.bfloat16, width=32)
    query, key, value = (one.clone().requires_grad_() for one in parts[:3])
    out = native(query, key, value, 0.2)
    theirs = [out, *torch.autograd.grad(out, (query, key, value), parts[3])]
    own = [forward(*parts[:3], 0.2), *backward(*parts, 0.2)]
    true = [reference(*(one.double() for one in parts[:3]), 0.2), *true_gradients(parts, 0.2)]
    for one, other, exact in zip(own, theirs, true, strict=True):
        assert distance(one, exact) < 1.5 * distance(other, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 4, 20])  # one, an even and an uneven share, more than there are heads
def test_heads_are_shared_out_among_threads(dtype: torch.dtype, threads: int) -> None:
    parts, before = states(150, (6, 3), dtype, samples=3, width=16), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = [[forward(*parts[:3], 0.2), *backward(*parts, 0.2)] for _ in range(2)]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, again) for one, again in zip(*found, strict=True))
    exact = [reference(*(one.double() for one in parts[:3]), 0.2), *true_gradients(parts, 0.2)]
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert all(distance(one, true) < bound for one, true in zip(found[0], exact, strict=True))


def test_threads_build_no_graph_and_leave_others_their_number() -> None:
    query, key, value, _ = (one.requires_grad_() for one in states(9, (4, 4), torch.float32))
    assert not forward(query, key, value, 0.3).requires_grad
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads()


def test_the_setting_of_products_is_put_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    query, key, value, grad = states(5, (2, 1), torch.bfloat16)
    backward(query, key, value, grad, 0.3)
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_wide_products_in_bf16_are_those_of_fp32() -> None:
    """Inputs that are exact in bf16 lose nothing; ones that are not would, which shows that the setting acts here."""
    one, other = (torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    rounded = [value.bfloat16().float() for value in (one, other)]
    with causal_attention._products_of(torch.bfloat16):
        product = torch.bmm(*rounded)
    assert distance(product, torch.bmm(*(value.double() for value in rounded))) < 1e-6

"""The routed linear is its definition, forwards and backwards, whatever the ranges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finetune.kernels import lora_linear, lora_routed
from finetune.kernels.lora_routed import RoutedSite, Share

CASES = {
    "two": [(0, 5, 3, 0.5), (5, 12, 2, 2.0)],
    "a gap": [(2, 5, 3, 0.5), (7, 9, 1, 1.5)],
    "one row": [(11, 12, 4, 1.0)],
    "all of one": [(0, 12, 3, 0.25)],
}


def parts(case: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.nn.Linear, list[torch.Tensor]]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 8, bias=False, dtype=dtype).requires_grad_(False)
    x = torch.randn(1, 12, 6, dtype=dtype, requires_grad=True)
    shapes = [shape for _, _, rank, _ in CASES[case] for shape in ((rank, 6), (8, rank))]
    return x, layer, [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def shares(case: str, matrices: list[torch.Tensor]) -> list[Share]:
    pairs = zip(matrices[::2], matrices[1::2], strict=True)
    return [
        Share(low=low, high=high, scaling=scale, a=a, b=b)
        for (low, high, _, scale), (a, b) in zip(CASES[case], pairs, strict=True)
    ]


def routed(x: torch.Tensor, layer: torch.nn.Linear, given: list[Share]) -> torch.Tensor:
    return lora_linear.apply(x, (RoutedSite(base=layer, shares=tuple(given)),))[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_it_is_its_definition(case: str, dtype: torch.dtype, bound: float) -> None:
    x, layer, matrices = parts(case, dtype)
    found = routed(x, layer, shares(case, matrices))
    expected = lora_routed.reference(x[0], layer.weight, shares(case, matrices))
    assert found.shape == (1, 12, 8)
    weight = torch.randn(12, 8, dtype=dtype)
    mine = torch.autograd.grad((found[0] * weight).sum(), [x, *matrices])
    theirs = torch.autograd.grad((expected * weight).sum(), [x, *matrices])
    for one, other in [(found[0], expected), *zip(mine, theirs, strict=True)]:
        assert float((one - other).detach().double().norm() / other.detach().double().norm()) < bound


@pytest.mark.parametrize("case", CASES)
def test_gradients_by_differences(case: str) -> None:
    x, layer, matrices = parts(case, torch.float64)
    assert torch.autograd.gradcheck(lambda x, *given: routed(x, layer, shares(case, list(given))), (x, *matrices))


@pytest.mark.parametrize("case", CASES)
def test_dropout_is_the_adapters_own(case: str) -> None:
    """By a mask, which is the same both ways."""
    x, layer, matrices = parts(case, torch.float64)
    mask = (torch.rand(12, 6, generator=torch.Generator().manual_seed(3)) < 0.6).double()

    def dropping(given: list[torch.Tensor]) -> list[Share]:
        return [replace(one, drop=lambda rows: rows * mask[: len(rows)]) for one in shares(case, given)]

    expected = lora_routed.reference(x[0], layer.weight, dropping(matrices))
    assert torch.allclose(routed(x, layer, dropping(matrices))[0], expected, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x, *given: routed(x, layer, dropping(list(given))), (x, *matrices))


def test_rows_of_one_adapter_give_nothing_to_another() -> None:
    x, layer, matrices = parts("two", torch.float64)
    routed(x, layer, shares("two", matrices))[0, :5].sum().backward()
    assert all(bool(one.grad.any()) for one in matrices[:2])  # type: ignore[union-attr]
    assert not any(bool(one.grad.any()) for one in matrices[2:])  # type: ignore[union-attr]

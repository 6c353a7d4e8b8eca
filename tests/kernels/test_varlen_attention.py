from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.errors import ModelError
from finetune.kernels import varlen_attention
from finetune.kernels.varlen_attention import attend, reference
from finetune.objectives import sft
from tests import tiny

# Which of the two ways a batch takes hangs on how like its lengths are; (bounds, products that are computed).
ALIKE = ((0, 5, 9, 14), 1)
RAGGED = ((0, 1, 9, 11), 3)
SINGLE = ((0, 7), 1)
HEADS = [(4, 2), (3, 3), (2, 1)]


def states(bounds: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype, width: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(bounds) + sum(heads))
    shapes = [(1, count, bounds[-1], width) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("bounds", "products"), [ALIKE, RAGGED, SINGLE])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_value_and_gradients_equal_the_reference(
    bounds: tuple[int, ...], products: int, heads: tuple[int, int], scaling: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = []
    product = varlen_attention.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return product(*args, **kwargs)

    monkeypatch.setattr(varlen_attention, "scaled_dot_product_attention", counted)
    inputs = states(bounds, heads, torch.float64)
    fast, slow = attend(*inputs, bounds, scaling), reference(*inputs, bounds, scaling)
    assert len(calls) == products
    assert fast.shape == slow.shape
    assert tiny.distance(fast, slow) < 1e-14
    slope = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, two in zip(
        torch.autograd.grad(fast, inputs, slope), torch.autograd.grad(slow, inputs, slope), strict=True
    ):
        assert tiny.distance(one, two) < 1e-13


@pytest.mark.parametrize("heads", [(2, 1), (2, 2)])
@pytest.mark.parametrize("bounds", [(0, 3, 5), (0, 1, 6), (0, 4)])
def test_gradcheck(bounds: tuple[int, ...], heads: tuple[int, int]) -> None:
    inputs = states(bounds, heads, torch.float64, width=2)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, bounds), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bounds", "_"), [ALIKE, RAGGED])
def test_a_sample_does_not_see_what_is_packed_beside_it(bounds: tuple[int, ...], _: int, dtype: torch.dtype) -> None:
    inputs = states(bounds, (4, 2), dtype)
    before = attend(*inputs, bounds)
    for low, high in pairwise(bounds):
        changed = [value.detach().clone() for value in inputs]
        for value in changed:
            value[:, :, low:high] += 3
        after = attend(*changed, bounds)
        others = [i for i in range(bounds[-1]) if not low <= i < high]
        assert torch.equal(after[:, :, others], before[:, :, others])
        assert not torch.equal(after[:, :, low:high], before[:, :, low:high])
        reached = torch.autograd.grad(before[:, :, low:high].sum(), inputs, retain_graph=True)
        assert all(not value[:, :, others].any() for value in reached)


@pytest.mark.parametrize("lengths", [(9, 10, 8), (2, 30, 4)])
def test_loss_of_a_sample_is_its_own(tiny_base: Path, lengths: tuple[int, ...]) -> None:
    policy = tiny.adapt(tiny.load(tiny_base))
    first, second = tiny.samples(lengths), tiny.samples(lengths, seed=1)
    mixed = [second[0], first[1], second[2]]
    low, high = lengths[0], lengths[0] + lengths[1]
    one, two = (sft.collate(batch) for batch in (first, mixed))
    states_one, states_two = (policy.hidden(batch.ids, batch.positions, batch.bounds)[0] for batch in (one, two))
    assert torch.equal(states_one[low:high], states_two[low:high])
    assert not torch.equal(states_one[:low], states_two[:low])


def test_window_shorter_than_a_sample_is_refused(build_tiny: Callable[..., Path], tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    policy = tiny.adapt(tiny.load(build_tiny(tmp_path / "windowed", **window)))
    assert sft.loss(policy, sft.collate(tiny.samples([8, 7]))).total.isfinite()
    with pytest.raises(ModelError, match="attends within 8 tokens, a sample has 9"):
        sft.loss(policy, sft.collate(tiny.samples([8, 9])))

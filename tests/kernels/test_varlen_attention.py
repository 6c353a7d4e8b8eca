from __future__ import annotations

import itertools
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from finetune.errors import ModelError
from finetune.kernels import varlen_attention
from finetune.kernels.varlen_attention import attend, lay_out, reference
from finetune.objectives import sft
from tests import tiny

# How many calls a batch takes hangs on how like its lengths are; (bounds, products that are computed).
ALIKE = ((0, 5, 9, 14), 1)
RAGGED = ((0, 1, 9, 11), 3)
PAIRED = ((0, 2, 9, 12, 18), 2)
SINGLE = ((0, 7), 1)
HEADS = [(4, 2), (3, 3), (2, 1)]


def states(bounds: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype, width: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(bounds) + sum(heads))
    shapes = [(1, count, bounds[-1], width) for count in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("bounds", "products"), [ALIKE, RAGGED, PAIRED, SINGLE])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_value_and_gradients_equal_the_reference(
    bounds: tuple[int, ...], products: int, heads: tuple[int, int], scaling: float | None
) -> None:
    inputs = states(bounds, heads, torch.float64)
    layout = lay_out(bounds, torch.device("cpu"))
    assert len(layout.groups) == products
    fast, slow = attend(*inputs, layout, scaling), reference(*inputs, bounds, scaling)
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
    layout = lay_out(bounds, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, layout), inputs)


@pytest.mark.parametrize(("bounds", "_"), [ALIKE, RAGGED, PAIRED, SINGLE])
def test_the_way_of_a_card_equals_that_of_a_cpu(bounds: tuple[int, ...], _: int) -> None:
    """On a card the samples' products are torch's own with torch's gradients; the gathering around them is the same."""
    inputs, layout = states(bounds, (4, 2), torch.float64), lay_out(bounds, torch.device("cpu"))
    fast, plain = attend(*inputs, layout), varlen_attention.composed(*inputs, layout, 0.5)
    assert tiny.distance(fast, plain) < 1e-14
    slope = torch.randn(fast.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, two in zip(
        torch.autograd.grad(fast, inputs, slope), torch.autograd.grad(plain, inputs, slope), strict=True
    ):
        assert tiny.distance(one, two) < 1e-13


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [3, 50, 2, 49, 50, 1], list(range(1, 90)), [700, 1, 1, 1]])
def test_every_token_has_one_place_and_little_is_filled(lengths: list[int]) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    layout = lay_out(bounds, torch.device("cpu"))
    places = torch.cat([varlen_attention._places(group) for group in layout.groups])
    assert sorted(places.tolist()) == list(range(sum(lengths)))
    assert sum(len(group.rows) for group in layout.groups) <= sum(lengths) / 0.8
    assert layout.longest == max(lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bounds", "_"), [ALIKE, RAGGED])
def test_a_sample_does_not_see_what_is_packed_beside_it(bounds: tuple[int, ...], _: int, dtype: torch.dtype) -> None:
    inputs, layout = states(bounds, (4, 2), dtype), lay_out(bounds, torch.device("cpu"))
    before = attend(*inputs, layout)
    for low, high in pairwise(bounds):
        changed = [value.detach().clone() for value in inputs]
        for value in changed:
            value[:, :, low:high] += 3
        after = attend(*changed, layout)
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

"""Four-bit whole numbers with group scales: every byte, every rounding, every order of groups, by their definition."""

from __future__ import annotations

import pytest
import torch

from finetune.kernels import int4
from finetune.kernels.int4 import Int4

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def made(out: int, inside: int, groups: torch.Tensor, *, explicit: bool) -> tuple[Int4, torch.Tensor]:
    """A random matrix, and its codes [out, in]."""
    chance = torch.Generator().manual_seed(out * inside)
    count = int(groups.max()) + 1
    codes = torch.randint(16, (out, inside), generator=chance, dtype=torch.uint8)
    zeros = torch.randint(16, (out, count), generator=chance, dtype=torch.uint8)
    scales = torch.rand(out, count, generator=chance).add(0.01).half()
    held = Int4(
        codes=int4.in_halves(codes), zeros=zeros, scales=scales, groups=groups.to(torch.int32) if explicit else None
    )
    return held, codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "order", ["runs", "runs by name", "ragged", "shuffled", "one"], ids=lambda word: word.replace(" ", "-")
)
def test_it_is_the_reference_to_the_bit(order: str, dtype: torch.dtype) -> None:
    inside = 72 if order == "ragged" else 64
    groups = torch.zeros(64, dtype=torch.int64) if order == "one" else torch.arange(inside) // 16
    if order == "shuffled":
        groups = groups[torch.randperm(inside, generator=torch.Generator().manual_seed(1))]
    held, codes = made(40, inside, groups, explicit=order not in ("runs", "one"))
    assert held.shape == (40, inside)
    wanted = int4.reference(codes, held.zeros, held.scales, groups, dtype)
    assert wanted.unique().numel() > 100
    assert torch.equal(held.dense(dtype), wanted)
    assert torch.equal(held.rows(8, 31).dense(dtype), wanted[8:31])


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_reference_where_it_is_made_in_many_pieces(dtype: torch.dtype) -> None:
    groups = torch.arange(2048) // 128
    held, codes = made(97, 2048, groups, explicit=False)
    assert 5 * int4._PIECE_CPU < 97 * 2048
    assert torch.equal(held.dense(dtype), int4.reference(codes, held.zeros, held.scales, groups, dtype))


def test_words_are_read_from_the_lowest_bits_and_whatever_their_sign() -> None:
    words = torch.tensor([[0x76543210, -1985229329, -1, -2147483648]], dtype=torch.int32)  # the second is 0x89ABCDEF
    assert int4.nibbles(words).tolist() == [
        [[0, 1, 2, 3, 4, 5, 6, 7], [15, 14, 13, 12, 11, 10, 9, 8], [15] * 8, [0] * 7 + [8]]
    ]


def test_rounded_once_to_bf16_and_not_by_way_of_the_scale() -> None:
    """A scale that bf16 does not hold: rounding it first would give another number."""
    scale = torch.tensor([[1 + 2**-10]], dtype=torch.float16)
    codes = torch.arange(16, dtype=torch.uint8)[None]
    held = Int4(codes=int4.in_halves(codes), zeros=torch.tensor([[3]], dtype=torch.uint8), scales=scale)
    exact = torch.tensor([[(code - 3) * (1 + 2**-10) for code in range(16)]], dtype=torch.float64)
    assert torch.equal(held.dense(torch.bfloat16), exact.to(torch.bfloat16))
    assert torch.equal(held.dense(torch.float32).double(), exact)
